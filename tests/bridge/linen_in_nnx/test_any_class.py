"""Whatever names, values, keywords and attributes a Linen class has: what Linen answers, ToNNX answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.linen import partitioning

import bridge
import nnx_core as nnx
from tests.tolerance import assert_trees_equal

KEY = jax.random.key(0)


@functools.cache
def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def loaded(module: nn.Module, *args, **kwargs) -> tuple[bridge.ToNNX, dict]:
    """A ToNNX with the variables of Linen's own init, and those."""
    variables = nn.Module.init(module, KEY, *args, **kwargs)
    model = bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(0)), *args, **kwargs)
    bridge.load_variables(model, variables)
    return model, variables


# ---- names ----

#: What a Linen module has, and what a wrapper has.
NAMES = ("init", "apply", "variables", "path", "has_rng", "make_rng", "sow", "rngs", "module", "train", "copy", "bind")


def with_method(name: str) -> nn.Module:
    def method(self, x):
        return nn.Dense(2)(x)

    method.__name__ = name
    body = {name: nn.compact(method), "__call__": lambda self, x: getattr(self, name)(x), "__module__": __name__}
    return type(f"Method_{name}", (nn.Module,), body)()


def with_field(name: str) -> nn.Module:
    def __call__(self, x):
        return nn.Dense(2)(x) * object.__getattribute__(self, name)

    body = {"__annotations__": {name: int}, name: 3, "__call__": nn.compact(__call__), "__module__": __name__}
    return type(f"Field_{name}", (nn.Module,), body)()


@pytest.mark.parametrize("kind", [with_method, with_field])
@pytest.mark.parametrize("name", NAMES)
def test_a_class_may_define_any_name(kind, name):
    module = kind(name)
    model, variables = loaded(module, ones(1, 2))
    assert_trees_equal(model(ones(1, 2)), nn.Module.apply(module, variables, ones(1, 2)))
    assert_trees_equal(bridge.variables_of(model), variables)
    if kind is with_method:
        assert_trees_equal(model(ones(1, 2), method=name), model(ones(1, 2)))


class Part(nn.Module):
    width: int = 4

    def setup(self):
        self.inner = nn.Dense(self.width)

    def __call__(self, x):
        return self.inner(x)

    def double(self, x):
        return self.inner(x) * 2


class NamedLikeAField(nn.Module):
    llm: int

    def setup(self):
        self._llm = Part(self.llm, name="llm")

    def __call__(self, x):
        return self._llm(x)


def test_a_child_named_like_a_field_is_reached():
    module = NamedLikeAField(5)
    model, variables = loaded(module, ones(1, 3))
    want = module.apply(variables, ones(1, 3))
    assert_trees_equal((model._llm(ones(1, 3)), model._llm.double(ones(1, 3))), (want, want * 2))
    assert model._llm.width == 5
    assert_trees_equal(model._llm.inner(ones(1, 3)), want)


class NamedLikeAMethod(nn.Module):
    @nn.compact
    def encoder(self, x):
        return nn.Dense(4, name="encoder")(x)

    def __call__(self, x):
        return self.encoder(x) + 1


def test_a_method_that_is_also_a_scope_is_called():
    module = NamedLikeAMethod()
    model, variables = loaded(module, ones(1, 3))
    assert_trees_equal(model.encoder(ones(1, 3)), module.apply(variables, ones(1, 3), method="encoder"))
    assert model.encoder["kernel"].shape == (3, 4)


class Delegating(nn.Module):
    inner: nn.Module

    def __getattr__(self, name):
        return 42 if name == "answer" else super().__getattr__(name)

    def __call__(self, x):
        return self.inner(x) * self.answer


def test_a_getattr_of_the_class_answers():
    module = Delegating(nn.Dense(4))
    model, variables = loaded(module, ones(1, 3))
    assert model.answer == 42
    assert_trees_equal(model(ones(1, 3)), module.apply(variables, ones(1, 3)))
    with pytest.raises(AttributeError, match=r"ToNNX\(Delegating\) has no attribute or variable 'question'"):
        _ = model.question


# ---- keywords ----


class AnyKeyword(nn.Module):
    @nn.compact
    def __call__(self, x, variables=1, module=1, args=1, kwargs=1, model=1):
        return nn.Dense(2)(x) * variables * module * args * kwargs * model


def test_any_keyword_reaches_the_method():
    keywords = {"variables": 2, "module": 5, "args": 7, "kwargs": 11, "model": 13}

    class Outer(nnx.Module):
        def __init__(self):
            self.part = bridge.ToNNX(AnyKeyword(), rngs=nnx.Rngs(0))

        def __call__(self, x, **keywords):
            return self.part(x, **keywords)

    alone = bridge.lazy_init(bridge.ToNNX(AnyKeyword(), rngs=nnx.Rngs(0)), ones(1, 3), **keywords)
    outer = bridge.lazy_init(Outer(), ones(1, 3), **keywords)
    for model in (alone, outer):
        want = model(ones(1, 3)) * np.prod(list(keywords.values()))
        np.testing.assert_allclose(model(ones(1, 3), **keywords), want, rtol=1e-6)


# ---- values ----

VALUES = {
    "None": lambda: None,
    "empty tuple": lambda: (),
    "empty dict": dict,
    "text": lambda: "hello",
    "number": lambda: 3,
    "function": lambda: jnp.tanh,
    "class": lambda: jnp.float32,
    "key": lambda: jax.random.key(1),
    "list with None": lambda: [jnp.ones(2), None],
    "integer keys": lambda: {0: jnp.ones(1)},
    "spec": lambda: jax.sharding.PartitionSpec("a"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_collection_may_hold_any_value(kind):
    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            value = self.variable("cache", "v", VALUES[kind]).value
            seen.append(value)
            return nn.Dense(2)(x)

    seen: list = []
    model, variables = loaded(Holder(), ones(1, 2))
    held = bridge.variables_of(model)
    assert set(held) == {"params", "cache"}
    assert jax.tree.structure(held) == jax.tree.structure(variables)
    y = model(ones(1, 2))
    assert jax.tree.structure(seen[-1]) == jax.tree.structure(seen[0])
    assert_trees_equal(nnx.merge(*nnx.split(model))(ones(1, 2)), y)
    assert_trees_equal(nnx.clone(model)(ones(1, 2)), y)


def test_axis_names_beside_the_params_are_kept_and_loaded():
    class WithAxes(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ partitioning.param_with_axes("kernel", nn.initializers.ones, (4, 4), axes=("embed", "mlp"))

    variables = WithAxes().init(KEY, ones(2, 4))
    made = nnx.jit(lambda: bridge.lazy_init(bridge.ToNNX(WithAxes(), rngs=nnx.Rngs(0)), ones(2, 4)))()
    assert bridge.variables_of(made)["params_axes"] == variables["params_axes"]
    assert bridge.load_variables(made, variables).complete
    assert_trees_equal(nnx.jit(lambda m, x: m(x))(made, ones(2, 4)), WithAxes().apply(variables, ones(2, 4)))


# ---- keys ----


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.variable("cache", "n", lambda: jnp.zeros(())).value


def test_what_draws_no_key_needs_none():
    model = bridge.lazy_init(bridge.ToNNX(Counter()), ones(2))
    assert float(model.n[...]) == 0.0
    inside = bridge.lazy_init(nnx.Sequential(bridge.ToNNX(Counter())), ones(2))
    assert float(inside.layers[0].n[...]) == 0.0
    with pytest.raises(ValueError, match=r"lazy_init of ToNNX\(Dense\) needs random keys"):
        bridge.lazy_init(bridge.ToNNX(nn.Dense(2)), ones(1, 2))


# ---- writing weights ----


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.BatchNorm(use_running_average=True, name="norm")(x))


@pytest.mark.parametrize("mark", [lambda x: x, nnx.data], ids=["plain", "nnx.data"])
@pytest.mark.parametrize("initialised", [True, False])
def test_attributes_from_linen_variables_are_set_and_read_back(initialised, mark):
    variables = Two().init(KEY, ones(1, 3))
    attributes = bridge.linen_vars_to_nnx_attrs(variables)
    model = bridge.ToNNX(Two(), rngs=nnx.Rngs(1))
    if initialised:
        kernel = bridge.lazy_init(model, ones(1, 3)).out.kernel
    for name, nested in attributes.items():
        setattr(model, name, mark(nested))
    if initialised:
        assert model.out.kernel is kernel
    assert_trees_equal(model(ones(1, 3)), Two().apply(variables, ones(1, 3)))
    read = {name: getattr(model, name) for name in attributes}
    assert_trees_equal(bridge.nnx_attrs_to_linen_vars(read), variables)


def test_attributes_that_do_not_fit_are_one_error_and_write_nothing():
    model, _ = loaded(Two(), ones(1, 3))
    before = model.out.bias[...]
    with pytest.raises(ValueError, match=r"(?s)out of ToNNX\(Two\).*params/out/kernel"):
        model.out = {"kernel": nnx.Param(jnp.ones((1, 1))), "bias": nnx.Param(jnp.ones(2))}
    with pytest.raises(ValueError, match=r"(?s)out of ToNNX\(Two\).*params/out/bias"):
        model.out = {"kernel": nnx.Param(jnp.ones((3, 2)))}
    assert_trees_equal(model.out.bias[...], before)
    model.out = {"kernel": nnx.Param(jnp.ones((3, 2))), "bias": nnx.Param(jnp.ones(2)), "more": nnx.Param(jnp.ones(2))}
    assert model.out["more"].shape == (2,)
