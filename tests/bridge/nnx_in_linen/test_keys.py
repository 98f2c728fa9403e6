"""ToLinen and row 32: which numbers equal Linen's for the same keys, and which do not; see the docstring of ToLinen."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.nnx_in_linen.wrapper import to_linen
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY, DROPOUT = jax.random.key(0), jax.random.key(1)
X = jnp.asarray(normal(7, 4, 3))


def ours(name):
    return to_linen(nnx.Linear, 3, 3, name=name)


def theirs(name):
    return nn.Dense(3, name=name)


def compact(make):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make("b")(nn.tanh(make("a")(x)))

    return Model()


def in_setup(make):
    class Model(nn.Module):
        def setup(self):
            self.layers, self.head = [make(None) for _ in range(2)], make(None)

        def __call__(self, x):
            return self.head(self.layers[1](self.layers[0](x)))

    return Model()


def deep(make):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return compact(make)(compact(make)(x))

    return Model()


def scanned(make):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return make("layer")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="stack")(x, None)[0]

    return Model()


@pytest.mark.parametrize("place", [compact, in_setup, deep, scanned], ids=lambda f: f.__name__)
def test_a_layer_of_its_own_has_linens_initial_values_in_every_place_row32(place):
    assert_trees_equal(place(ours).init(KEY, X), place(theirs).init(KEY, X))


def test_a_dropout_of_its_own_has_linens_mask_in_every_place_row32():
    def model(make):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                return make("b")(make("a")(x))

        return Model()

    found = model(lambda name: to_linen(nnx.Dropout, 0.5, name=name)).apply({}, X, rngs={"dropout": DROPOUT})
    wanted = model(lambda name: nn.Dropout(0.5, deterministic=False, name=name))
    assert_trees_equal(found, wanted.apply({}, X, rngs={"dropout": DROPOUT}))


class Own(nnx.Module):
    """Parameters of its own, in the order in which Linen's twin makes them."""

    def __init__(self, rngs):
        self.scale = nnx.Param(nnx.initializers.normal()(rngs.params(), (3,)))
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3)))

    def __call__(self, x):
        return (x * self.scale) @ self.kernel


class LinenOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.normal(), (3,))
        return (x * scale) @ self.param("kernel", nn.initializers.lecun_normal(), (3, 3))


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = Own(rngs), Own(rngs)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x, deterministic=False):
        for part, drop in zip((self.first, self.second), self.drops, strict=True):
            x = drop(part(x), deterministic=deterministic)
        return x


class LinenNested(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        for name in ("first", "second"):
            x = nn.Dropout(0.5)(LinenOwn(name=name)(x), deterministic=deterministic)
        return x


class Keys(nn.Module):
    """The first keys that Linen gives a module in this place."""

    @nn.compact
    def __call__(self, n, stream):
        return [self.make_rng(stream) for _ in range(n)]


def keys_of(n, stream):
    return Keys().apply({}, n, stream, rngs={stream: KEY})


def test_a_class_that_draws_for_itself_has_linens_initial_values_row32():
    assert_trees_equal(to_linen(Own).init(KEY, X), LinenOwn().init(KEY, X))


def test_modules_inside_draw_one_after_another_and_not_as_in_linen_row32():
    found = to_linen(Nested).init(KEY, X, deterministic=True)["params"]
    keys = keys_of(4, "params")
    for i, name in enumerate(("first", "second")):
        assert_trees_equal(found[name]["scale"], nnx.initializers.normal()(keys[2 * i], (3,)))
        assert_trees_equal(found[name]["kernel"], nnx.initializers.lecun_normal()(keys[2 * i + 1], (3, 3)))
    linen = LinenNested().init(KEY, X, deterministic=True)["params"]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, linen)
    for name in ("first", "second"):
        assert not (found[name]["kernel"] == linen[name]["kernel"]).any()


def test_dropouts_inside_draw_one_after_another_row32():
    class Drops(nnx.Module):
        def __init__(self, rngs):
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return [drop(x) for drop in self.drops]

    found = to_linen(Drops).apply({}, X, rngs={"dropout": KEY})
    for mask, key in zip(found, keys_of(2, "dropout"), strict=True):
        assert_trees_equal(mask != 0, jax.random.bernoulli(key, 0.5, X.shape))


def test_linens_values_are_taken_as_they_are_row32():
    variables = LinenNested().init(KEY, X, deterministic=True)
    found = to_linen(Nested).apply(variables, X, deterministic=True)
    assert_trees_close(found, LinenNested().apply(variables, X, deterministic=True))


def test_wrapped_one_by_one_a_whole_model_has_linens_values_and_masks_row32():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, name in enumerate(("first", "second")):
                x = to_linen(nnx.Dropout, 0.5, name=f"Dropout_{i}")(to_linen(Own, name=name)(x))
            return x

    variables = Model().init(KEY, X)
    assert_trees_equal(variables, LinenNested().init({"params": KEY, "dropout": DROPOUT}, X))
    rngs = {"dropout": DROPOUT}
    assert_trees_close(Model().apply(variables, X, rngs=rngs), LinenNested().apply(variables, X, rngs=rngs))
