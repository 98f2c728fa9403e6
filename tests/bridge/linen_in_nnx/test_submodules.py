"""ToNNX: submodules and values that `setup` makes are reached, called with state updates, and not overwritten."""

import copy
from dataclasses import field

import cloudpickle
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge.linen_in_nnx._errors import (
    LinenAttributeError,
    NoModeWarning,
    NotInitializedError,
    SubmoduleAccessError,
)
from tests.support.linen_models import CNN, X, counts, same, variables_in
from tests.tolerance import assert_trees_equal


class Inner(nn.Module):
    width: int = 3

    def setup(self):
        self.dense = nn.Dense(self.width, name="renamed")
        self.drop = nn.Dropout(0.5)

    def __call__(self, x, train: bool = False):
        return self.drop(self.dense(x), deterministic=not train)

    def twice(self, x):
        return 2 * self.dense(x)


class Model(nn.Module):
    """Submodules everywhere that `setup` may put them, and fields that hold some."""

    given: nn.Module = field(default_factory=lambda: nn.BatchNorm(use_running_average=False))
    several: tuple[nn.Module, ...] = (nn.Dense(3), nn.Dropout(0.5, deterministic=True))

    def setup(self):
        self.inner = Inner()
        self.layers = [nn.Dense(3), nn.Dense(3)]
        self.heads = {"a": nn.Dense(2), "b": {"c": nn.Dense(2)}}
        self.scale = 2.0
        self.weight = self.param("w", nn.initializers.ones, (3,))
        self.steps = self.variable("counts", "n", lambda: jnp.zeros((), jnp.int32))
        self.deterministic = True

    def __call__(self, x, train: bool = False):
        x = self.inner(self.given(x), train) * self.weight * self.scale
        for layer in (*self.layers, *self.several):
            x = layer(x)
        return self.heads["a"](x) + self.heads["b"]["c"](x)

    @property
    def doubled(self):
        return 2 * self.scale

    @staticmethod
    def loss(y):
        return (y**2).mean()


@pytest.fixture(scope="module")
def model():
    return ToNNX(Model(), nnx.Rngs(0)).lazy_init(X)


Y = X[:, :3]
VIEWS = {
    "inner": (lambda m: m.inner(X), lambda m: m.inner(X)),
    "inner.twice": (lambda m: m.inner.twice(X), lambda m: m.inner.twice(X)),
    "inner.twice by name": (lambda m: m.inner(X, method="twice"), lambda m: m.inner.twice(X)),
    "inner.dense": (lambda m: m.inner.dense(X), lambda m: m.inner.dense(X)),
    "inner.renamed": (lambda m: m.inner.renamed(X), lambda m: m.inner.dense(X)),
    "inner.drop": (lambda m: m.inner.drop(X, deterministic=True), lambda m: X),
    "layers": (lambda m: m.layers[1](Y), lambda m: m.layers[1](Y)),
    "layers_1": (lambda m: m.layers_1(Y), lambda m: m.layers[1](Y)),
    "heads": (lambda m: m.heads["b"]["c"](Y), lambda m: m.heads["b"]["c"](Y)),
    "several": (lambda m: m.several[0](Y), lambda m: m.several[0](Y)),
    "several without variables": (lambda m: m.several[1](Y), lambda m: Y),
}


@pytest.mark.parametrize("name", VIEWS)
def test_submodules_are_called_as_in_linen_row_23(model, name):
    ours, theirs = VIEWS[name]
    assert_trees_equal(ours(model), model.module.apply(variables_of(model), method=theirs))


def test_fields_values_and_variables_of_setup_are_read_row_23(model):
    assert (model.scale, model.doubled, model.inner.width, model.inner.drop.rate) == (2.0, 4.0, 3, 0.5)
    assert model.given.momentum == 0.99
    assert model.several[1].rate == 0.5
    assert model.weight.shape == (3,)
    assert model.steps is model.n  # the Variable, whatever setup calls it
    assert model.layers[0].kernel is nnx.state(model)["layers_0"]["kernel"]
    assert model.layers[0] is model.layers_0
    assert model.loss(jnp.ones(2)) == 1.0
    assert repr(model.inner.drop) == "Submodule(inner.drop: Dropout)"


def test_a_call_of_a_submodule_updates_state_row_23():
    model = ToNNX(Model(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    before, mean = variables_in(model), model.given.mean[...]
    model.given(X + 1)
    assert not np.array_equal(model.given.mean[...], mean)
    model.inner(X, train=True)
    assert counts(model)["dropout"] == 1
    nnx.jit(lambda m: m.given(X + 1))(model)
    assert same(before, model)


def test_submodules_are_reached_before_there_are_variables_row_23():
    class Plain(nn.Module):
        def setup(self):
            self.inner = Inner()
            self.width = 4

        def __call__(self, x):
            return self.inner(x)

    model = ToNNX(Plain(), nnx.Rngs(0))
    inner = model.inner
    assert (repr(inner), model.width, inner.width) == ("Submodule(inner: Inner)", 4, 3)
    with pytest.raises(NotInitializedError, match="before it has variables"):
        inner(X)
    assert bridge.lazy_init(inner, X) is inner
    assert inner.renamed.kernel is model.inner.renamed.kernel
    assert_trees_equal(inner(X), model(X))
    only = ToNNX(Plain(), nnx.Rngs(0))
    bridge.lazy_init(only.inner.dense, X)
    assert only.inner.renamed.kernel.shape == (6, 3)
    assert ToNNX(Model()).given.momentum == 0.99


def test_what_is_nowhere_is_no_attribute_row_23(model):
    for missing in (lambda: model.nothing, lambda: model.inner.nothing, lambda: model.inner.drop.nothing):
        with pytest.raises(AttributeError, match="nothing"):
            missing()
    for linens_own in ("scope", "parent", "variables", "init", "apply", "__wrapped__"):
        assert not hasattr(model, linens_own)
        assert not hasattr(model.inner.drop, linens_own)
    compact = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(SubmoduleAccessError, match="exist only while"):
        compact.Dense_0.features  # noqa: B018  # the access is the test


@pytest.mark.parametrize("name", ["scale", "doubled", "weight", "layers"])
def test_what_linen_computes_is_not_set_row_22(name):
    model = ToNNX(Model(), nnx.Rngs(0)).lazy_init(X)
    expected = rf"(?s){name!r} of ToNNX\(Model\) cannot be set.*computes itself.*Set the fields it is computed from"
    with pytest.raises(LinenAttributeError, match=expected):
        setattr(model, name, 3)
    with pytest.raises(LinenAttributeError, match="cannot be set"):
        nnx.List([model]).set_attributes(**{name: 3})
    assert name not in vars(model)


def test_a_flag_that_setup_computes_is_not_reached_and_says_so_row_22():
    class Computed(nn.Module):
        def setup(self):
            self.deterministic = True

        def __call__(self, x):
            return x

    model = ToNNX(Computed())
    with pytest.warns(NoModeWarning, match="no effect"):
        model.train()
    with pytest.raises(nnx.NnxError, match="deterministic"):
        model.set_attributes(deterministic=False)


def test_views_survive_copies_and_pickles_row_23(model):
    view = model.inner.drop
    for copied in (copy.deepcopy(view), cloudpickle.loads(cloudpickle.dumps(view))):
        assert copied.rate == 0.5
        assert_trees_equal(copied(X, deterministic=True), X)
    model.inner.renamed  # noqa: B018  # scopes now know where they are
    expected = model.inner.dense(X)
    for twin in (copy.deepcopy(model), nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert_trees_equal(twin.inner.dense(X), expected)
        twin.inner.renamed.kernel[...] = jnp.zeros((6, 3))
        assert_trees_equal(twin.inner.dense(X), jnp.zeros((4, 3)))
    assert_trees_equal(model.inner.dense(X), expected)
