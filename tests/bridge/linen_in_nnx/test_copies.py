"""ToNNX: split, merge, copies, pickles, hashes, and calls inside of Linen."""

import copy
import functools
import pickle
from typing import Any

import cloudpickle
import flax.errors
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX
from tests.support.linen_models import (
    CNN,
    MLP,
    Counter,
    Stack,
    X,
    both,
)
from tests.tolerance import assert_trees_equal


def test_split_merge_clone_eval_shape():
    model, module, variables = both(CNN)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graphdef, params, rest)
    assert merged.Conv_0.kernel is not model.Conv_0.kernel
    assert_trees_equal(merged(X), module.apply(variables, X))
    assert nnx.eval_shape(lambda m: m(X), model).shape == (4, 3)
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(model)))


@pytest.mark.parametrize("make", [MLP, CNN, Stack])
def test_copies_and_pickles(make):
    model, module, variables = both(make)
    for twin in (
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)) if make is CNN else cloudpickle.loads(cloudpickle.dumps(model)),
    ):
        assert_trees_equal(twin(X), module.apply(variables, X))


def test_list_and_dict_fields_are_hashed_row36():
    traces = []

    @nnx.jit
    def run(model):
        traces.append(1)
        return model(X)

    for widths in ([8, 3], [8, 3], [4, 3]):
        model = ToNNX(MLP(widths), nnx.Rngs(0)).lazy_init(X)
        assert run(model).shape == (4, 3)
    assert len(traces) == 2
    fields = [MLP([1]), MLP((1,)), MLP([True]), MLP([1], {"hidden": nn.gelu})]
    defs = [nnx.graphdef(ToNNX(m)) for m in fields]
    assert len(set(defs)) == len(fields)
    assert nnx.graphdef(ToNNX(MLP([1]))) == defs[0]


def test_fields_with_arrays_sets_and_partials_are_hashed_row36():
    class Odd(nn.Module):
        table: Any
        tags: Any
        f: Any
        thing: Any

        @nn.compact
        def __call__(self, x):
            return self.f(x) + self.table.sum()

    class Thing:
        __hash__ = None

    thing = Thing()

    def make(n):
        return ToNNX(Odd(np.arange(n), {1, 2}, functools.partial(jnp.sum, axis=[1][0]), thing))

    assert nnx.graphdef(make(3)) == nnx.graphdef(make(3))
    assert nnx.graphdef(make(3)) != nnx.graphdef(make(4))
    assert nnx.jit(lambda m: m(X))(make(3)).shape == (4,)


def test_a_steady_call_does_not_walk():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    view = model._nnx_inventory()
    model(X)
    model(X, train=True)
    assert model._nnx_inventory() is view
    model.Conv_0.kernel.set_metadata(unit="m")
    assert model._nnx_inventory() is not view


def test_a_module_made_inside_another_linen_module_row14():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            child = nn.Dense(3)
            model = ToNNX(child, nnx.Rngs(0)).lazy_init(x)
            assert model.module.parent is None
            return model(x)

    y = Parent().apply({}, X)
    assert y.shape == (4, 3)


def test_inside_linen_the_modules_own_rules_hold():
    model = ToNNX(Counter(), nnx.Rngs(0)).lazy_init(X)

    class Parent(nn.Module):
        def __call__(self, x):
            return model(x)

    with pytest.raises(flax.errors.ModifyScopeVariableError, match="counts"):
        Parent().apply({}, X)
    Parent().apply({}, X, mutable=["counts"])
    assert float(model.n[...]) == 1.0
