"""Embed's lookup and attend, against Linen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layers import LAYERS
from tests.tolerance import assert_trees_equal
from tests.twins import assert_equal_to_twin

EMBED = next(layer for layer in LAYERS if layer.name == "Embed")


@pytest.mark.parametrize("shape", [(), (3,), (2, 0)], ids=str)
def test_any_shape_of_integers(shape):
    assert_equal_to_twin(replace(EMBED, shape=shape), train=False)


def test_a_table_of_one_row_answers_everything():
    row = replace(
        EMBED,
        make=lambda lib, rngs, **d: lib.Embed(1, 4, rngs=rngs, **d),
        twin=lambda **d: linen.Embed(1, 4, **d),
    )
    assert_equal_to_twin(row, train=False)


def test_negative_integers_count_from_the_end_and_others_are_nan():
    layer = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
    rows = layer(jnp.array([-1, 2, 3, -4]))
    assert_trees_equal(rows[0], rows[1])
    assert np.isnan(rows[2:]).all()


@pytest.mark.parametrize("rows", [1, 6])
def test_explicit_sharding_of_the_result(rows):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = nnx.Embed(rows, 4, rngs=nnx.Rngs(0))
    ids = jnp.array([0, 0, -1, 9])
    expected = layer(ids)
    spec = jax.sharding.PartitionSpec("d", None)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda ids: layer(ids, out_sharding=spec))(ids)
    assert y.sharding.spec == spec
    np.testing.assert_array_equal(y, expected)


def test_attend_computes_in_the_promoted_dtype():
    # flax.nnx rounds the query to the table's bfloat16; Linen computes in float32.
    layer = nnx.Embed(7, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.attend(jnp.ones((2, 4))).dtype == jnp.float32
    assert layer(jnp.array([1])).dtype == jnp.bfloat16


def test_custom_promote_dtype_sees_the_documented_arguments():
    seen = []

    def record(args, **kwargs):
        seen.append((len(args), kwargs))
        return args

    layer = nnx.Embed(7, 4, dtype=jnp.float32, promote_dtype=record, rngs=nnx.Rngs(0))
    layer(jnp.array([1]))
    layer.attend(jnp.ones((2, 4)))
    assert seen == [(1, {"dtype": jnp.float32, "inexact": False}), (2, {"dtype": jnp.float32})]


def test_metadata():
    layer = nnx.Embed(7, 4, embedding_metadata={"a": 1}, rngs=nnx.Rngs(0))
    assert layer.embedding.get_metadata()["a"] == 1
