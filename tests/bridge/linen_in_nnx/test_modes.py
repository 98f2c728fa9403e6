"""ToNNX: train, eval and set_attributes reach the flags of the Linen module, or say that they do not."""

import warnings
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge.linen_in_nnx._errors import NoModeWarning, StateAttributeError
from tests.support.linen_models import CNN, MLP, Setup, X, counts
from tests.tolerance import assert_trees_equal


class FieldFlags(nn.Module):
    train: bool = False
    norm: nn.Module = field(default_factory=lambda: nn.BatchNorm(use_running_average=True))
    drops: Any = (nn.Dropout(0.5, deterministic=True),)

    @nn.compact
    def __call__(self, x):
        assert self.train is not self.drops[0].deterministic, "a flag was not reached"
        return self.drops[0](self.norm(x))


@pytest.mark.parametrize("make", [CNN, Setup, FieldFlags])
@pytest.mark.parametrize("outer", [False, True], ids=["wrapper", "container"])
def test_train_and_eval_reach_fields_and_call_arguments_row22(make, outer):
    model = ToNNX(make(), nnx.Rngs(0)).lazy_init(X)
    container = nnx.List([model]) if outer else model
    evaluated = model(X)
    container.train()
    stats = variables_of(model)["batch_stats"]
    assert not np.array_equal(model(X), evaluated)
    assert_trees_equal(jax.tree.structure(variables_of(model)["batch_stats"]), jax.tree.structure(stats))
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(variables_of(model)["batch_stats"]), strict=True)
    )
    container.eval()
    stats = variables_of(model)["batch_stats"]
    model(X)
    assert_trees_equal(variables_of(model)["batch_stats"], stats)


def test_an_argument_beats_the_mode_row22():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    model.train()
    assert_trees_equal(model(X, train=False), expected)
    assert_trees_equal(model(X, False), expected)


def test_layers_with_open_flags_row22():
    norm = ToNNX(nn.BatchNorm(), nnx.Rngs(0)).lazy_init(X, use_running_average=False)
    norm.train()
    norm(X)
    norm.eval()
    norm(X)
    norm(X, use_running_average=False)
    assert norm.use_running_average is True
    drop = ToNNX(nn.Dropout(0.5), nnx.Rngs(0))
    drop.eval()
    assert_trees_equal(drop(X), X)


def test_set_attributes_reaches_fields_row22():
    model = ToNNX(MLP(), nnx.Rngs(0))
    model.set_attributes(widths=[2, 2])
    assert model.module.widths == [2, 2]
    assert model.lazy_init(X)(X).shape == (4, 2)
    with pytest.raises(nnx.NnxError, match="deterministic"):
        ToNNX(nn.Dense(3)).set_attributes(deterministic=True)


def test_modes_are_seen_by_compiled_functions_row22():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    step = nnx.jit(lambda m: m(X))
    step(model)
    assert counts(model) == {"default": 1}
    model.train()
    step(model)
    assert counts(model) == {"default": 2}
    nnx.jit(lambda m: m.eval())(model)
    step(model)
    assert counts(model) == {"default": 2}


def test_a_module_without_flags_says_so_row22():
    model = ToNNX(nn.Dense(3), nnx.Rngs(0))
    for mode in (model.train, model.eval):
        with pytest.warns(NoModeWarning, match=rf"ToNNX\(Dense\)\.{mode.__name__}\(\) has no effect"):
            mode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx.List([model]).train()


class NamedLikeFlags(nn.Module):
    """Variables and submodules under the names of flags; `part` may have real ones."""

    part: nn.Module

    @nn.compact
    def __call__(self, x):
        x = x * self.param("deterministic", nn.initializers.ones, x.shape[-1:])
        x = x + self.variable("state", "use_running_average", jnp.zeros, x.shape[-1:]).value
        return self.part(nn.Dense(x.shape[-1], name="training")(x))


@pytest.mark.parametrize("part", [nn.Dropout(0.5, deterministic=True), nn.Dense(2)], ids=["flag", "no flag"])
def test_variables_named_like_flags_stay_and_flags_are_set_row22(part):
    model = ToNNX(NamedLikeFlags(part), nnx.Rngs(0)).lazy_init(X)
    before, expected = variables_of(model), model(X)
    container = nnx.List([model])
    container.train()
    with_flag = isinstance(part, nn.Dropout)
    assert np.array_equal(model(X), expected) is not with_flag
    if with_flag:
        assert model.module.part.deterministic is False
    container.eval()
    assert_trees_equal(model(X), expected)
    container.set_attributes(deterministic=False, training=True, use_running_average=None)
    model.eval() if with_flag else container.eval()
    assert_trees_equal(model(X), expected)
    assert_trees_equal(variables_of(model), before)
    assert isinstance(model.deterministic, nnx.Param)
    with pytest.raises(StateAttributeError, match="'deterministic' is part of the wrapped module's variables"):
        model.deterministic = 3.0
    model.deterministic = nnx.Param(jnp.zeros(X.shape[-1]))
    assert_trees_equal(variables_of(model)["params"]["deterministic"], np.zeros(X.shape[-1], np.float32))


@pytest.mark.parametrize("make", [CNN, Setup, FieldFlags])
def test_a_view_reaches_the_flags_row22(make):
    model = nnx.List([ToNNX(make(), nnx.Rngs(0)).lazy_init(X)])
    model.train()
    evaluated = nnx.view(model, deterministic=True, use_running_average=True)
    trained = nnx.view(evaluated, deterministic=False, use_running_average=False)
    before = variables_of(model)
    expected = nnx.clone(model)
    expected.eval()
    assert_trees_equal(evaluated[0](X), expected[0](X))
    assert_trees_equal(variables_of(model), before)
    assert not np.array_equal(trained[0](X), expected[0](X))
    with pytest.raises(nnx.NnxError, match="deterministic"):
        nnx.view(nnx.List([ToNNX(nn.Dense(3))]), deterministic=True)
