"""The Variables of an object graph by location: each read once, and added only where nothing is."""

import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX
from bridge.variables.identity import same_leaves
from bridge.variables.state import attach, child_at, state_of, taker_of


class Shared(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.layers = nnx.List([self.first, nnx.BatchNorm(2, rngs=nnx.Rngs(0))])
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.free = None


def test_what_is_shared_is_read_once_and_random_state_never():
    model = Shared()
    state = dict(state_of(model))
    assert set(state) == {
        ("params", "first", "bias"),
        ("params", "first", "kernel"),
        ("params", "layers", "1", "bias"),
        ("params", "layers", "1", "scale"),
        ("batch_stats", "layers", "1", "mean"),
        ("batch_stats", "layers", "1", "var"),
    }
    assert state["params", "first", "kernel"] is model.first.kernel
    assert dict(state_of(model.first.kernel)) == {("params",): model.first.kernel}


def test_a_variable_takes_a_free_attribute_of_a_module_and_nothing_else():
    model = Shared()
    variable = nnx.Cache(jnp.ones(2))
    assert child_at(model, ("layers", "1")) is model.layers[1]
    assert child_at(model, ("layers", "2", "x")) is None
    assert attach(model, ("cache", "free"), variable)
    assert model.free is variable
    assert attach(model, ("cache", "layers", "1", "new"), variable)
    assert model.layers[1].new is variable
    refused = [
        ("cache", "free"),  # taken by now
        ("params", "also_free"),  # a parameter is part of what the module computes
        ("cache", "train"),  # a method
        ("cache", "layers", "5"),  # no attribute of a module
        ("cache", "nowhere", "x"),
    ]
    assert [at for at in refused if attach(model, at, variable)] == []


def test_what_belongs_to_a_wrapped_module_is_left_to_it():
    model = nnx.Dict(wrapped=ToNNX(nn.Dense(3)))
    owner, inside = taker_of(model, ("intermediates", "wrapped", "Dense_0", "x"))
    assert owner is model.wrapped
    assert inside == ("intermediates", "Dense_0", "x")
    assert not attach(model, ("intermediates", "wrapped", "x"), nnx.Intermediate(1.0))
    assert taker_of(model, ("intermediates", "other", "x")) is None


def test_same_leaves_reads_no_array():
    x, equal = jnp.ones(2), jnp.ones(2)
    assert same_leaves({"a": x}, {"a": x})
    assert not same_leaves({"a": x}, {"a": equal})
    assert not same_leaves({"a": x}, {"b": x})
    assert not same_leaves([x, None], [x])
