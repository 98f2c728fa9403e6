"""ToNNX: any names, and attributes of the wrapper and of the Linen module side by side."""

import copy

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge.linen_in_nnx._errors import (
    StateAttributeError,
    SubmoduleAccessError,
)
from bridge.linen_in_nnx.as_graph import LinenScope
from tests.support.linen_models import (
    CNN,
    KEY,
    MLP,
    Setup,
    X,
    both,
)
from tests.tolerance import assert_trees_equal

# ---- names -------------------------------------------------------------------------------------------------

HOSTILE = (
    "module", "rngs", "train", "eval", "sow", "perturb", "set_attributes", "lazy_init", "iter_modules", "items",
    "to_nnx__module", "mutable", "value", "keys",
)  # fmt: skip


class Named(nn.Module):
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = nn.Dense(6, name=name)(x)
            self.variable("stats", name + "_", lambda: jnp.zeros(()))
        return x


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_collide_with_methods_row17(name):
    module = Named((name,))
    model = ToNNX(module, KEY, parity=True).lazy_init(X)
    variables = module.init(KEY, X)
    assert_trees_equal(variables_of(model), variables)
    assert_trees_equal(model(X), module.apply(variables, X))
    assert type(nnx.state(model)[name]["kernel"]) is nnx.Param
    assert model.module is module
    assert isinstance(model.rngs, nnx.Rngs)
    for copied in (nnx.clone(model), nnx.merge(*nnx.split(model)), copy.deepcopy(model)):
        assert isinstance(copied.rngs, nnx.Rngs)
        assert_trees_equal(variables_of(copied), variables)
    assert_trees_equal(nnx.jit(lambda m, x: m(x))(model, X), jax.jit(module.apply)(variables, X))
    nnx.jit(lambda m: m(X, mutable=True))(model)
    model.note = 3
    assert_trees_equal(variables_of(model), variables)


def test_all_hostile_names_at_once_row17():
    module = Named(HOSTILE)
    model = ToNNX(module, KEY, parity=True).lazy_init(X)
    assert_trees_equal(variables_of(model), module.init(KEY, X))
    assert_trees_equal(variables_of(jax.tree.map(lambda x: x, model)), module.init(KEY, X))


class TwoCollections(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (6,))
        ema = self.variable("ema", "w", lambda: jnp.zeros(6))
        if not self.is_initializing():
            ema.value = 0.5 * ema.value + w
        return x * ema.value


def test_same_name_in_two_collections_row18():
    module, model = TwoCollections(), ToNNX(TwoCollections(), nnx.Rngs(0)).lazy_init(X)
    variables = module.init(KEY, X)
    assert_trees_equal(variables_of(model), variables)
    for _ in range(2):
        expected, updates = module.apply(variables, X, mutable=["ema"])
        variables = {**variables, **updates}
        assert_trees_equal(model(X), expected)
        assert_trees_equal(variables_of(model), variables)
    assert type(model.w) is nnx.Param
    ema = nnx.state(model)["w@ema"]
    nnx.jit(lambda m: m(X))(model)
    assert nnx.state(model)["w@ema"] is ema


def test_a_name_in_a_second_collection_that_comes_later_row18():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (6,))
            self.sow("intermediates", "w", x)
            return x * w

    model = ToNNX(Late(), nnx.Rngs(0)).lazy_init(X)
    w = model.w
    model(X, mutable=["intermediates"])
    assert model.w is w
    assert list(nnx.pop(model, nnx.Intermediate)) == ["w@intermediates"]
    assert_trees_equal(model(X), X)


# ---- attributes of the wrapper and of the Linen module -----------------------------------------------------


def test_plain_attributes_are_left_alone_rows_20_57():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    model.qwix_path = ("a", "b")
    model.array = jnp.ones(2)
    model.parts = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.zeros(1)]
    model.extra = nnx.Param(jnp.ones(2))
    model.Dense_0.note = "mine"
    assert_trees_equal(model(X), expected)
    model(X, train=True)
    nnx.jit(lambda m: m(X, train=True))(model)
    assert model.qwix_path == ("a", "b")
    assert model.Dense_0.note == "mine"
    assert nnx.state(model)["parts"][0]["kernel"].shape == (2, 2)
    nnx.jit(lambda m: setattr(m, "array", m.array + 1))(model)
    assert model.array.tolist() == [2.0, 2.0]
    del model.array, model.qwix_path
    assert not hasattr(model, "array")
    copied = copy.copy(model)
    assert copied.extra is model.extra
    assert_trees_equal(nnx.clone(model)(X), model(X))


def test_an_attribute_set_before_a_variable_of_that_name():
    model = ToNNX(MLP(), nnx.Rngs(0))
    model.Dense_0 = "mine"
    model.lazy_init(X)
    assert model.Dense_0 == "mine"
    assert nnx.state(model)["Dense_0"]["kernel"].shape == (6, 8)
    assert nnx.clone(model).Dense_0 == "mine"
    assert_trees_equal(model(X), MLP().apply(variables_of(model), X))


def test_fields_properties_and_methods_are_reached_row23():
    model, module, variables = both(Setup)
    assert model.features == 5
    assert model.size == 10
    assert_trees_equal(model.encode(X), module.apply(variables, X, method="encode"))
    assert_trees_equal(model(X, method=Setup.encode), model.encode(X))
    assert_trees_equal(model(X, method=module.encode), model.encode(X))
    assert_trees_equal(model(X, method=lambda m, x: m.enc(x)), model.encode(X))
    with pytest.raises(AttributeError, match=r"ToNNX\(Setup\) has no attribute or variable 'nothing'"):
        model.nothing  # noqa: B018  # the access is the test
    with pytest.raises(AttributeError, match="'tabulate'"):
        model.tabulate  # noqa: B018  # nn.Module's own methods are on model.module


def test_setup_submodules_are_callable_row23():
    model, module, variables = both(Setup)
    assert_trees_equal(model.enc(X), module.apply(variables, X, method="encode"))
    assert_trees_equal(model.layers_1(X), module.apply(variables, X, method=lambda m, x: m.layers[1](x)))
    model.norm(X, use_running_average=False)
    assert float(abs(model.norm.mean[...]).sum()) > 0
    assert model.enc.kernel is model.enc["kernel"]


def test_compact_submodules_are_not_callable_row23():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(SubmoduleAccessError, match=r"(?s)Dense_0 of CNN cannot be called.*exist only while"):
        model.Dense_0(X)
    with pytest.raises(SubmoduleAccessError, match="not reached through its ToNNX"):
        LinenScope()(X)


def test_writing_attributes_that_are_variables():
    model = ToNNX(nn.Dense(3), nnx.Rngs(0)).lazy_init(X)
    model.bias = nnx.Param(jnp.full(3, 2.0))
    assert_trees_equal(model(X), nn.Dense(3).apply(variables_of(model), X))
    assert float(variables_of(model)["params"]["bias"].sum()) == 6.0
    with pytest.raises(StateAttributeError, match=r"model\.bias\[\.\.\.\] = value"):
        model.bias = jnp.zeros(3)
    del model.bias
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="bias"):
        model(X)
