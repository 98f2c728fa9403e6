"""ConvLocal: its options against Linen's, one row each; against Conv; initial values; its errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from nnx_core.nn._errors import InputShapeError, MissingRngsError, OptionError
from tests.layer_rows.conv import ROWS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

ROW = next(row for row in ROWS if row.name == "ConvLocal")


def local(kernel_size=(3, 2), *, shape=(2, 4, 5, 3), batch_axes=1, **options):
    """The row of a ConvLocal with these options, which have the same names in Linen."""
    params = {"kernel": "params/kernel"} | ({"bias": "params/bias"} if options.get("use_bias", True) else {})
    spatial = shape[batch_axes:-1]
    return replace(
        ROW,
        make=lambda lib, rngs, **d: lib.ConvLocal(
            shape[-1], 6, kernel_size, in_spatial_shape=spatial, rngs=rngs, **options, **d
        ),
        twin=lambda **d: linen.ConvLocal(6, kernel_size, **options, **d),
        shape=shape,
        params=params,
    )


MASK = np.tril(np.ones((18, 6), np.float32)) * np.arange(20, dtype=np.float32).reshape(4, 5, 1, 1)
OPTIONS = {
    "int-kernel": local(3, shape=(2, 5, 3)),
    "no-bias": local(use_bias=False),
    "strides": local(strides=[2, 1]),
    "nones": local(strides=None, input_dilation=None, kernel_dilation=None),
    "valid": local(padding="VALID"),
    "same-lower": local(padding="SAME_LOWER", strides=2),
    "circular": local(padding="CIRCULAR", strides=2),
    "circular-dilated": local(padding="CIRCULAR", kernel_dilation=(1, 2)),
    "reflect": local(padding="REFLECT"),
    "causal": local(3, shape=(2, 5, 3), padding="CAUSAL", kernel_dilation=2),
    "padding-int": local(padding=2),
    "padding-mixed": local(padding=(1, (0, 2))),
    "dilations": local(padding=1, input_dilation=2, kernel_dilation=(2, 1)),
    "mask": local(mask=MASK),
    "no-batch": local(shape=(4, 5, 3), batch_axes=0, padding="CIRCULAR"),
    "two-batch-axes": local(shape=(2, 3, 4, 5, 3), batch_axes=2),
    "precision": local(precision=jax.lax.Precision.HIGHEST),
}
IN_BFLOAT16 = ("mask", "reflect")


@pytest.mark.sample(6)
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row):
    assert_equal_to_twin(row, train=False)


@pytest.mark.parametrize("option", IN_BFLOAT16)
def test_option_in_bfloat16(option):
    assert_equal_to_twin(OPTIONS[option], train=False, inputs=jnp.bfloat16)


def test_one_kernel_everywhere_is_a_convolution():
    conv = nnx.Conv(3, 4, (3, 2), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0))
    layer = nnx.ConvLocal(3, 4, (3, 2), strides=2, padding="CIRCULAR", in_spatial_shape=(4, 6), rngs=nnx.Rngs(0))
    features_first = jnp.moveaxis(conv.kernel[...], -2, 0).reshape(18, 4)
    layer.kernel.set_value(jnp.broadcast_to(features_first, (2, 3, 18, 4)))
    layer.bias.set_value(jnp.broadcast_to(conv.bias[...], (2, 3, 4)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 3))
    assert_trees_close(layer(x), conv(x))


def test_initial_values_are_drawn_in_the_shape_of_linen():
    init = nnx.initializers.normal()
    layer = nnx.ConvLocal(3, 4, 3, in_spatial_shape=5, bias_init=init, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(7))
    rngs = nnx.Rngs(7)
    assert_trees_equal(layer.kernel[...], nnx.initializers.default_kernel_init(rngs.params(), (5, 9, 4), jnp.bfloat16))
    assert_trees_equal(layer.bias[...], init(rngs.params(), (5, 4), jnp.bfloat16))


def test_initializer_of_the_docstring_keeps_the_variance():
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=range(2))
    layer = nnx.ConvLocal(16, 32, (3, 3), in_spatial_shape=(6, 6), padding="VALID", kernel_init=init, rngs=nnx.Rngs(0))
    y = layer(jax.random.normal(jax.random.key(1), (32, 6, 6, 16)))
    assert 0.95 < float(jnp.std(y)) < 1.05  # lecun_normal, the default, gives a quarter of it


def test_options_are_hashable_and_metadata_is_kept():
    metadata = {"kernel_metadata": {"a": 1}, "bias_metadata": {"b": 2}}
    layer = nnx.ConvLocal(
        3, 4, [3, 3], [1, 2], in_spatial_shape=[4, 5], padding=[1, (0, 1)], rngs=nnx.Rngs(0), **metadata
    )
    assert (layer.in_spatial_shape, layer.out_spatial_shape) == ((4, 5), (4, 2))
    assert (layer.kernel.a, layer.bias.b) == (1, 2)
    hash(nnx.split(layer)[0])


BAD_OPTIONS = {
    "strides": ({"strides": (1,)}, r"strides=.*one integer, or 2.*found +\(1,\)"),
    "dilation": ({"input_dilation": (1, 2, 3)}, r"input_dilation=.*or 2.*found +\(1, 2, 3\)"),
    "input-dilation": ({"input_dilation": 2}, r"input_dilation=.*a padding in integers.*found +2, padding SAME"),
    "padding": ({"padding": "FOO"}, r"padding=.*one of SAME.*CIRCULAR.*found +FOO"),
    "rank": ({"in_spatial_shape": 5}, r"in_spatial_shape=.*2 integers.*found +\(5,\)"),
    "window": (
        {"in_spatial_shape": (5, 2), "padding": "VALID"},
        r"in_spatial_shape=.*at least as large as the window.*found +\(5, 2\), which gives an output of \(3, 0\)",
    ),
    "mask": ({"mask": np.ones((3, 3, 3, 4))}, r"mask=.*\(5, 6, 27, 4\).*found +\(3, 3, 3, 4\)"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(options, message):
    with pytest.raises(OptionError, match=rf"(?s)^ConvLocal.*{message}.*This ConvLocal has kernel_size \(3, 3\)"):
        nnx.ConvLocal(3, 4, (3, 3), rngs=nnx.Rngs(0), **({"in_spatial_shape": (5, 6)} | options))


BAD_INPUTS = {
    "rank": ((6, 3), r"\(\*batch, spatial_0, spatial_1, 3\).*found +shape \(6, 3\).*channels are last"),
    "features": ((1, 5, 6, 4), r"\(\*batch, spatial_0, spatial_1, 3\).*found +shape \(1, 5, 6, 4\)"),
    "spatial": ((1, 6, 5, 3), r"\(\*batch, 5, 6, 3\).*found +shape \(1, 6, 5, 3\).*in_spatial_shape of its input"),
}


@pytest.mark.parametrize(("shape", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(shape, message):
    layer = nnx.ConvLocal(3, 4, (3, 3), in_spatial_shape=(5, 6), rngs=nnx.Rngs(0))
    with pytest.raises(InputShapeError, match=f"(?s)^ConvLocal at ConvLocal:.*{message}"):
        layer(jnp.ones(shape))


def test_no_rngs():
    with pytest.raises(MissingRngsError, match=r"(?s)^ConvLocal\(.*expected rngs to be an nnx.Rngs"):
        nnx.ConvLocal(3, 4, 3, in_spatial_shape=5, rngs=None)
