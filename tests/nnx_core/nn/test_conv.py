"""Conv's options against Linen's, one row each."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from nnx_core.nn._errors import OptionError
from tests.layers import LAYERS
from tests.tolerance import assert_trees_equal
from tests.twins import assert_equal_to_twin

CONV = next(layer for layer in LAYERS if layer.name == "Conv")
MASK = np.tril(np.ones((3, 3, 4, 6), np.float32))


def conv(kernel_size, shape=(2, 5, 7, 4), **options):
    """The row of a Conv with these options, which have the same names in Linen."""
    params = {"kernel": "params/kernel"} | ({"bias": "params/bias"} if options.get("use_bias", True) else {})
    return replace(
        CONV,
        make=lambda lib, rngs, **d: lib.Conv(shape[-1], 6, kernel_size, rngs=rngs, **options, **d),
        twin=lambda **d: linen.Conv(6, kernel_size, **options, **d),
        shape=shape,
        params=params,
    )


OPTIONS = {
    "int-kernel": conv(3, shape=(2, 7, 4)),
    "even-kernel-3d": conv((2, 4, 1), shape=(2, 5, 6, 3, 4)),
    "no-bias": conv((3, 3), use_bias=False),
    "stride": conv((3, 3), strides=2),
    "strides": conv((3, 3), strides=[2, 1]),
    "strides-none": conv((3, 3), strides=None, input_dilation=None, kernel_dilation=None),
    "valid": conv((3, 3), padding="VALID"),
    "same-lower": conv((2, 4), padding="SAME_LOWER"),
    "circular": conv((3, 4), padding="CIRCULAR", strides=2),
    "circular-dilated": conv((3, 2), padding="CIRCULAR", kernel_dilation=(1, 2)),
    "reflect": conv((3, 4), padding="REFLECT"),
    "causal": conv(3, shape=(2, 7, 4), padding="CAUSAL", kernel_dilation=2),
    "padding-int": conv((3, 3), padding=2),
    "padding-ints": conv((3, 3), padding=(1, 2)),
    "padding-pairs": conv((3, 3), padding=[(1, 2), (0, 1)]),
    "padding-mixed": conv((3, 3), padding=(1, (0, 2))),
    "dilations": conv((3, 3), padding=1, input_dilation=2, kernel_dilation=(2, 1)),
    "groups": conv((3, 3), feature_group_count=2),
    "depthwise": conv((3, 3), shape=(2, 5, 5, 6), feature_group_count=6),
    "mask": conv((3, 3), mask=MASK),
    "no-batch": conv((3, 3), shape=(5, 7, 4)),
    "no-batch-circular": conv((3, 3), shape=(5, 7, 4), padding="CIRCULAR"),
    "no-batch-causal": conv(3, shape=(7, 4), padding="CAUSAL"),
    "two-batch-axes-reflect": conv((3, 3), shape=(2, 3, 5, 7, 4), padding="REFLECT"),
    "mask-groups": conv((3, 3), mask=MASK[..., :2, :], feature_group_count=2),
    "three-batch-axes": conv((3, 3), shape=(2, 1, 3, 5, 7, 4)),
    "empty-batch": conv((3, 3), shape=(0, 2, 5, 7, 4)),
    "precision": conv((3, 3), precision=jax.lax.Precision.HIGHEST),
}


@pytest.mark.sample(20)
@pytest.mark.parametrize("inputs", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row, inputs):
    assert_equal_to_twin(row, train=False, inputs=inputs)


def test_options_are_hashable():
    layer = nnx.Conv(3, 4, [3, 3], strides=[1, 2], padding=[[1, 1], [0, 2]], rngs=nnx.Rngs(0))
    assert (layer.kernel_size, layer.strides, layer.padding) == ((3, 3), (1, 2), ((1, 1), (0, 2)))
    hash(nnx.split(layer)[0])


def test_mask_is_state_and_can_be_replaced():
    layer = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    layer.mask = jnp.zeros((3, 3, 4, 6))
    np.testing.assert_array_equal(layer(jnp.ones((1, 3, 3, 4))), 0)


def test_custom_function_gets_lax_arguments():
    calls = []

    def record(*args, **kwargs):
        calls.append((args[2:], kwargs))
        return jax.lax.conv_general_dilated(*args, **kwargs)

    layer = nnx.Conv(3, 4, (3, 3), conv_general_dilated=record, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 5, 5, 3))).shape == (1, 5, 5, 4)
    [((strides, padding), kwargs)] = calls
    assert (strides, padding) == ((1, 1), "SAME")
    assert kwargs["dimension_numbers"] == jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    assert kwargs["preferred_element_type"] is jnp.float32


def test_preferred_element_type_is_the_dtype_of_the_result():
    layer = nnx.Conv(3, 4, 3, dtype=jnp.bfloat16, use_bias=False, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 5, 3))).dtype == jnp.float32


def test_batch_axes_are_independent():
    layer = nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 3))
    one_by_one = jnp.stack([jnp.stack([layer(row) for row in rows]) for rows in x])
    assert_trees_equal(layer(x), one_by_one)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "circular"])
def test_input_dilation_needs_padding_in_integers(padding):
    message = rf"(?s)^Conv\(\.\.\., input_dilation=.*1, or a padding in integers.*found +\(1, 2\), padding {padding}"
    with pytest.raises(OptionError, match=message):
        nnx.Conv(3, 4, (3, 3), input_dilation=(1, 2), padding=padding, rngs=nnx.Rngs(0))
