"""Whatever state, keywords and names an NNX class has in Linen."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from tests.tolerance import assert_trees_equal

KEY = jax.random.key(0)


class Remembering(nnx.Module):
    """Has an Intermediate from its constructor on, and reads it."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.last = nnx.Intermediate(jnp.zeros((1, 2)))

    def __call__(self, x):
        self.last[...] = self.linear(x) + self.last
        return self.last[...]


def test_an_intermediate_of_the_constructor_is_there_in_each_call():
    x = jnp.ones((1, 3))
    module = bridge.to_linen(Remembering)
    variables = module.init(KEY, x)
    assert list(variables) == ["params"]
    y = jax.jit(module.apply)(variables, x)
    assert_trees_equal(y, module.apply(variables, x))
    _, state = module.apply(variables, x, mutable=["intermediates"])
    assert_trees_equal(state["intermediates"]["last"], y)
    assert_trees_equal(module.apply({**variables, **state}, x), y * 2)


def test_an_intermediate_that_is_random_has_linens_keys():
    class Noisy(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.noise = nnx.Intermediate(jax.random.normal(rngs.noise(), (2,)))

        def __call__(self):
            return self.noise[...]

    module = bridge.to_linen(Noisy)
    first, second = (module.apply({}, rngs={"noise": jax.random.key(seed)}) for seed in (0, 1))
    assert not jnp.array_equal(first, second)


def test_an_intermediate_in_a_bridge_module():
    class Outer(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return bridge.nnx_in_bridge_mdl(Remembering, name="part")(x)

    x = jnp.ones((1, 3))
    variables = Outer().init(0, x)
    want = x @ variables["params"]["part"]["linear"]["kernel"]
    assert_trees_equal(Outer().apply(variables, x), want)


def test_keywords_are_plain_dicts_at_every_depth():
    class Configured(nnx.Module):
        def __init__(self, config, *, rngs, **options):
            assert type(config) is type(config["layer"]) is type(options["options"]) is dict
            self.linear = nnx.Linear(3, config.copy()["layer"]["width"], rngs=rngs)

        def __call__(self, x, **keywords):
            assert type(keywords["given"]) is type(keywords["given"]["deep"]) is dict
            return self.linear(x)

    module = bridge.to_linen(Configured, {"layer": {"width": 2}}, options={"a": 1})
    y, _ = module.init_with_output(KEY, jnp.ones((1, 3)), given={"deep": {}})
    assert y.shape == (1, 2)
    assert type(module.kwargs.copy()) is dict
    assert module.kwargs.get("options") == {"a": 1} == dict(module.kwargs.items())["options"]
    assert list(module.kwargs.values()) == [{"a": 1}]


def test_linens_table_shows_boxes():
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("in", "out"))
    table = nn.tabulate(bridge.to_linen(nnx.Linear, 3, 4, kernel_init=init), KEY, console_kwargs={"width": 200})
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table(jnp.ones((1, 3))))
    assert "float32[3,4] P(in, out)" in plain


class Inside(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.wrapped = bridge.ToNNX(nn.Dense(2), rngs=rngs)

    def __call__(self, x):
        return self.wrapped(self.first(x))


@pytest.mark.parametrize("run", ["init", "apply"])
def test_interceptors_see_linen_modules_at_their_place_only(run):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bridge.to_linen(Inside, name="inside")(x)

    seen = []

    def note(method, args, kwargs, context):
        if type(context.module) is nn.Dense:
            seen.append(context.module.path)
        return method(*args, **kwargs)

    x = jnp.ones((1, 3))
    variables = Outer().init(KEY, x)
    with nn.intercept_methods(note):
        Outer().init(KEY, x) if run == "init" else Outer().apply(variables, x)
    assert set(seen) == {("inside", "wrapped")}
