"""Linear's options, against Linen where it has them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layers import LAYERS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

LINEAR = next(layer for layer in LAYERS if layer.name == "Linear")


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 4), (2, 3, 2, 4)], ids=str)
def test_any_batch_axes(shape):
    assert_equal_to_twin(replace(LINEAR, shape=shape), train=False)


def test_without_bias():
    row = replace(
        LINEAR,
        make=lambda lib, rngs, **d: lib.Linear(4, 5, use_bias=False, rngs=rngs, **d),
        twin=lambda **d: linen.Dense(5, use_bias=False, **d),
        params={"kernel": "params/kernel"},
    )
    assert_equal_to_twin(row, train=False)


def test_complex_input():
    x = jax.random.normal(jax.random.key(0), (2, 4), jnp.complex64)
    values = LINEAR.variables()
    ours, theirs = (jax.jit(f(train=False))(values, x) for f in (LINEAR.functional, LINEAR.functional_twin))
    assert ours[0].dtype == jnp.complex64
    assert_trees_equal(ours, theirs)


def test_integers_and_host_arrays_are_promoted():
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    assert_trees_equal(layer(np.ones((2, 4), np.int32)), layer(jnp.ones((2, 4))))


def test_a_bias_can_be_added_and_removed_later():
    layer = nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(0))
    without = layer(jnp.ones((2, 4)))
    layer.bias = nnx.Param(jnp.ones(5))
    assert_trees_equal(layer(jnp.ones((2, 4))), without + 1)
    layer.bias = None
    assert_trees_equal(layer(jnp.ones((2, 4))), without)


def test_the_kernel_decides_what_fits():
    # Inside shard_map the layer holds a shard; `in_features` still says 4.
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(layer.kernel[...][:2])
    assert layer(jnp.ones((3, 2))).shape == (3, 5)


def test_custom_dot_general_gets_lax_arguments():
    calls = []

    def record(lhs, rhs, dimension_numbers, **kwargs):
        calls.append((dimension_numbers, kwargs))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)

    for element_type in (None, jnp.float32):
        nnx.Linear(4, 5, dot_general=record, preferred_element_type=element_type, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4)))
    plain = {"precision": None, "out_sharding": None}
    numbers = (((2,), (0,)), ((), ()))
    assert calls == [(numbers, plain), (numbers, plain | {"preferred_element_type": jnp.float32})]


def test_custom_promote_dtype():
    seen = []

    def no_promotion(args, *, dtype):
        seen.append((tuple(a.dtype for a in args), dtype))
        return args

    layer = nnx.Linear(4, 5, dtype=jnp.bfloat16, promote_dtype=no_promotion, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 4))).dtype == jnp.float32
    assert seen == [((jnp.float32,) * 3, jnp.bfloat16)]


def test_metadata_and_variables_from_initializers():
    init = nnx.with_metadata(nnx.initializers.ones_init(), origin="test")
    layer = nnx.Linear(4, 5, kernel_init=init, kernel_metadata={"a": 1}, bias_metadata={"b": 2}, rngs=nnx.Rngs(0))
    assert isinstance(layer.kernel, nnx.Param)
    kernel, bias = layer.kernel.get_metadata(), layer.bias.get_metadata()
    assert (kernel["origin"], kernel["a"], bias["b"]) == ("test", 1, 2)
    assert_trees_equal(layer.kernel[...], jnp.ones((4, 5)))


def test_explicit_sharding_of_the_result():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    whole = layer(jnp.ones((2, 4)))
    spec = jax.sharding.PartitionSpec(None, "d")
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: layer(x, out_sharding=spec))(jnp.ones((2, 4)))
        sharded = jax.jit(lambda x: jnp.matmul(x, kernel, out_sharding=spec) + bias)(jnp.ones((2, 4)))
    assert y.sharding.spec == spec
    # Bit for bit with JAX's product of the same shards; some processors sum three columns otherwise than six.
    np.testing.assert_array_equal(y, sharded)
    assert_trees_close(np.asarray(y), np.asarray(whole))
