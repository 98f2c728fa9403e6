"""ToLinen: decode caches of attention, created in a call (row 13 of REQUIREMENTS.md)."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.nnx_in_linen.wrapper import to_linen, to_linen_class
from tests.support.numbers import normal
from tests.support.to_linen_models import KEY
from tests.tolerance import assert_trees_close, assert_trees_equal

HEADS, WIDTH, LENGTH = 2, 4, 5
X = jnp.asarray(normal(3, 2, LENGTH, WIDTH))


class Decoder(nnx.Module):
    """A layer of attention that decodes one position a call."""

    def __init__(self, *, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs)

    def init_cache(self, shape):
        self.attention.init_cache(shape)

    def __call__(self, x, mask=None):
        return x + self.attention(x, mask=mask)

    def all_at_once(self, x):
        return x + self.attention(x, decode=False, mask=nnx.make_causal_mask(x[..., 0]))


def decode(model, variables, cache):
    step = jax.jit(lambda v, x: model.apply(v, x, mutable=["cache"]))
    ys = []
    for i in range(LENGTH):
        y, cache = step({**variables, **cache}, X[:, i : i + 1])
        ys.append(y)
    return jnp.concatenate(ys, axis=1), cache


def params_of(model):
    return {"params": model.init(KEY, X, nnx_method="all_at_once")["params"]}


def test_row_13_a_cache_that_a_method_creates():
    model = to_linen(Decoder)
    variables = params_of(model)
    _, cache = model.apply(variables, X.shape, method="init_cache", mutable=["cache"])
    assert jax.tree.map(jnp.shape, cache) == {
        "cache": {
            "attention": {
                "cache_index": (),
                "cached_key": (2, LENGTH, HEADS, WIDTH // HEADS),
                "cached_value": (2, LENGTH, HEADS, WIDTH // HEADS),
            }
        }
    }
    y, after = decode(model, variables, cache)
    assert int(after["cache"]["attention"]["cache_index"]) == LENGTH
    assert_trees_close(y, model.apply(variables, X, method="all_at_once"))
    again, _ = decode(model, variables, cache)
    assert_trees_equal(again, y)


def test_row_13_the_cache_equals_that_of_linens_attention():
    twin = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    model = to_linen(nnx.MultiHeadAttention, HEADS, WIDTH, decode=True)
    fresh = twin.init(KEY, X)  # Linen makes the cache in init
    variables = {"params": fresh["params"]}
    _, cache = model.apply(variables, X.shape, method="init_cache", mutable=["cache"])
    assert_trees_equal(cache, {"cache": fresh["cache"]})
    theirs, ours = {"cache": fresh["cache"]}, cache
    for i in range(LENGTH):
        x = X[:, i : i + 1]
        y, ours = model.apply({**variables, **ours}, x, mutable=["cache"])
        z, theirs = twin.apply({**variables, **theirs}, x, mutable=["cache"])
        assert_trees_close((y, ours), (z, theirs))


def test_row_13_a_cache_under_linens_transforms():
    class Model(nn.Module):
        def setup(self):
            self.layers = nn.jit(nn.remat(to_linen_class(Decoder)), methods=["__call__"])()

        def make(self, shape):
            return self.layers.init_cache(shape)

        def __call__(self, x):
            return self.layers(x)

        def all_at_once(self, x):
            return self.layers.all_at_once(x)

    model = Model()
    variables = model.init(KEY, X, method="all_at_once")
    _, cache = model.apply(variables, X.shape, method="make", mutable=["cache"])
    y, _ = decode(model, variables, cache)
    assert_trees_close(y, model.apply(variables, X, method="all_at_once"))


def test_a_cache_of_another_size_is_what_the_call_says_it_is():
    model = to_linen(Decoder)
    variables = params_of(model)
    _, small = model.apply(variables, (2, 1, WIDTH), method="init_cache", mutable=["cache"])
    _, large = model.apply({**variables, **small}, (2, 9, WIDTH), method="init_cache", mutable=["cache"])
    assert large["cache"]["attention"]["cached_key"].shape == (2, 9, HEADS, WIDTH // HEADS)
    with pytest.raises(ValueError, match="cache"):
        model.apply(variables, X[:, :1], mutable=["cache"])
