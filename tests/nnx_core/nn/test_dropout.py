"""Dropout: masks, streams, modes. Its numbers for a given key are in test_linen_twin.py."""

from dataclasses import replace

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layers import LAYERS
from tests.tolerance import assert_trees_equal
from tests.twins import assert_equal_to_twin

DROPOUT = next(layer for layer in LAYERS if layer.name == "Dropout")
X = jax.device_put(np.arange(1, 41, dtype=np.float32))


def dropout(rate, **options):
    return replace(
        DROPOUT,
        make=lambda lib, rngs, **_: lib.Dropout(rate, rngs=rngs, **options),
        twin=lambda **_: linen.Dropout(rate, **options),
    )


OPTIONS = {
    "none": dropout(0.0),
    "all": dropout(1),
    "axis": dropout(0.3, broadcast_dims=(1,)),
    "axes": dropout(0.3, broadcast_dims=[0, -1]),
}


@pytest.mark.parametrize("inputs", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row, inputs):
    assert_equal_to_twin(row, train=True, inputs=inputs)


def test_complex_input():
    x = X.astype(jnp.complex64)
    key = jax.random.key(0)
    ours = nnx.Dropout(0.5)(x, rngs=key)
    assert_trees_equal(ours, linen.Dropout(0.5).apply({}, x, deterministic=False, rng=key))


@pytest.mark.parametrize(
    "seeds", [{"dropout": 1}, {"default": 1}, {"dropout": 1, "params": 2}], ids=lambda s: "+".join(s)
)
def test_same_masks_as_flax_nnx(seeds):
    ours = nnx.Dropout(0.5, rngs=nnx.Rngs(**seeds))
    theirs = flax.nnx.Dropout(0.5, rngs=flax.nnx.Rngs(**seeds))
    for _ in range(3):
        assert_trees_equal(ours(X), theirs(X))


def test_each_layer_has_its_own_stream():
    rngs = nnx.Rngs(0)
    first, second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    assert not (first(X) == second(X)).all()
    assert int(first.rngs.count[...]) == int(second.rngs.count[...]) == 1
    assert sorted("/".join(path) for path, _ in nnx.to_flat_state(nnx.state(first))) == [
        "rngs/count",
        "rngs/key",
    ]


def test_what_may_be_given_as_rngs():
    key = nnx.Rngs(dropout=3).dropout()
    expected = nnx.Dropout(0.5)(X, rngs=key)
    assert_trees_equal(nnx.Dropout(0.5)(X, rngs=nnx.Rngs(dropout=3)), expected)
    assert_trees_equal(nnx.Dropout(0.5)(X, rngs=nnx.Rngs(dropout=3).dropout), expected)
    assert_trees_equal(nnx.Dropout(0.5, rng_collection="noise")(X, rngs=nnx.Rngs(noise=3)), expected)
    forked = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3))(X)
    assert_trees_equal(nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3).dropout)(X), forked)


def test_rngs_of_the_call_go_first():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert_trees_equal(layer(X, rngs=jax.random.key(5)), nnx.Dropout(0.5)(X, rngs=jax.random.key(5)))
    assert int(layer.rngs.count[...]) == 0


@pytest.mark.parametrize("quiet", [{"rate": 0.0}, {"rate": 1.0}, {"rate": 0.5, "deterministic": True}], ids=str)
def test_no_key_is_drawn_where_none_is_needed(quiet):
    layer = nnx.Dropout(**quiet, rngs=nnx.Rngs(0))
    layer(X)
    assert int(layer.rngs.count[...]) == 0


def test_train_and_eval():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert (layer(X) == 0).any()  # training is the default
    layer.eval()
    assert layer(X) is X
    assert (layer(X, deterministic=False) == 0).any()  # the call goes before the layer
    layer.train()
    assert (layer(X) == 0).any()
    layer.set_view(deterministic=True)
    layer.set_view()
    assert layer(X) is X
