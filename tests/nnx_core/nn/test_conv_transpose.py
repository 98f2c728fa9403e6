"""ConvTranspose: its options against Linen's, one row each; against Conv; its errors."""

from dataclasses import replace

import flax.nnx
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

ROW = next(row for row in ROWS if row.name == "ConvTranspose")
MASK = np.tril(np.ones((4, 6), np.float32))


def transpose(kernel_size=(3, 2), strides=2, *, shape=(2, 3, 4, 4), **options):
    """The row of a ConvTranspose with these options, which have the same names in Linen."""
    params = {"kernel": "params/kernel"} | ({"bias": "params/bias"} if options.get("use_bias", True) else {})
    return replace(
        ROW,
        make=lambda lib, rngs, **d: lib.ConvTranspose(shape[-1], 6, kernel_size, strides, rngs=rngs, **options, **d),
        twin=lambda **d: linen.ConvTranspose(6, kernel_size, strides, **options, **d),
        shape=shape,
        params=params,
    )


OPTIONS = {
    "int-kernel-no-stride": transpose(3, None, shape=(2, 7, 4)),
    "no-bias": transpose(use_bias=False),
    "strides": transpose(strides=[3, 1]),
    "stride-over-kernel": transpose(strides=4),
    "valid": transpose(padding="VALID"),
    "same-lower": transpose(strides=(1, 1), padding="SAME_LOWER"),
    "padding-int": transpose(padding=1),
    "padding-ints": transpose(padding=(1, 2)),
    "padding-pairs": transpose(padding=[(1, 2), (0, 1)]),
    "dilation": transpose(kernel_dilation=2),
    "dilations": transpose(kernel_dilation=(1, 2), padding="VALID"),
    "transpose-kernel": transpose(transpose_kernel=True),
    "transpose-kernel-mask": transpose(transpose_kernel=True, mask=np.tile(MASK.T, (3, 2, 1, 1))),
    "mask": transpose(mask=np.tile(MASK, (3, 2, 1, 1))),
    "circular": transpose(padding="CIRCULAR"),
    "circular-transpose-kernel": transpose(padding="CIRCULAR", transpose_kernel=True),
    "circular-dilated": transpose(padding="CIRCULAR", kernel_dilation=(1, 2), strides=(2, 1)),
    "circular-many-turns": transpose(10, 1, padding="CIRCULAR", shape=(2, 3, 4)),
    "circular-no-surplus": transpose((1, 2), (1, 3), padding="CIRCULAR"),
    "no-batch": transpose(shape=(3, 4, 4)),
    "no-batch-circular": transpose(shape=(3, 4, 4), padding="CIRCULAR"),
    "two-batch-axes": transpose(shape=(2, 3, 3, 4, 4)),
    "precision": transpose(precision=jax.lax.Precision.HIGHEST),
    "preferred-element-type": transpose(preferred_element_type=jnp.float32),
}
IN_BFLOAT16 = ("circular-many-turns", "mask", "preferred-element-type", "transpose-kernel")


@pytest.mark.sample(8)
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row):
    assert_equal_to_twin(row, train=False)


@pytest.mark.parametrize("option", IN_BFLOAT16)
def test_option_in_bfloat16(option):
    assert_equal_to_twin(OPTIONS[option], train=False, inputs=jnp.bfloat16, dtype=jnp.bfloat16)


@pytest.mark.parametrize("padding", ["same", "circular", "valid"])
def test_names_of_paddings_in_lower_case(padding):
    layer = nnx.ConvTranspose(3, 4, 4, 2, padding=padding, rngs=nnx.Rngs(0))
    upper = nnx.ConvTranspose(3, 4, 4, 2, padding=padding.upper(), rngs=nnx.Rngs(0))
    nnx.update(upper, nnx.state(layer))
    x = jax.random.normal(jax.random.key(1), (2, 6, 3))
    assert_trees_equal(layer(x), upper(x))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_without_strides_it_is_a_convolution(padding):
    conv = nnx.Conv(3, 4, (3, 5), padding=padding, rngs=nnx.Rngs(0))
    layer = nnx.ConvTranspose(3, 4, (3, 5), padding=padding, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(conv))
    x = jax.random.normal(jax.random.key(1), (2, 6, 7, 3))
    assert_trees_close(layer(x), conv(x))


def test_transposed_kernel_is_the_gradient_of_the_convolution():
    conv = nnx.Conv(3, 4, (3, 2), strides=2, padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    layer = nnx.ConvTranspose(4, 3, (3, 2), 2, padding="VALID", use_bias=False, transpose_kernel=True, rngs=nnx.Rngs(0))
    layer.kernel.set_value(conv.kernel[...])
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 3))
    y, pull_back = jax.vjp(conv, x)
    assert_trees_close(layer(y), pull_back(y)[0])


@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (2, 1), (3, 2)])
def test_causal_against_the_definition(stride, dilation):
    """Linen and flax.nnx raise: only flax.nnx's documentation has it."""
    layer = nnx.ConvTranspose(2, 3, 4, stride, padding="CAUSAL", kernel_dilation=dilation, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(3.0))
    x = np.random.default_rng(0).normal(size=(2, 5, 2))
    kernel = np.asarray(layer.kernel[...], np.float64)
    spread = np.zeros((2, 5 * stride, 2))
    spread[:, ::stride] = x
    y = np.tile(np.arange(3.0), (2, 5 * stride, 1))
    for t in range(5 * stride):
        for k in range(4):
            if (source := t - (3 - k) * dilation) >= 0:
                y[:, t] += spread[:, source] @ kernel[k]
    assert_trees_close(layer(jnp.asarray(x, jnp.float32)), y)


def test_causal_without_strides_is_the_causal_convolution():
    conv = nnx.Conv(3, 4, 3, padding="CAUSAL", kernel_dilation=2, rngs=nnx.Rngs(0))
    layer = nnx.ConvTranspose(3, 4, 3, padding="causal", kernel_dilation=2, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(conv))
    x = jax.random.normal(jax.random.key(1), (2, 6, 3))
    assert_trees_close(layer(x), conv(x))


@pytest.mark.parametrize("options", [{"transpose_kernel": True}, {"use_bias": False}], ids=str)
def test_initial_values(options):
    init = {"bias_init": nnx.initializers.normal()}
    ours = nnx.ConvTranspose(3, 4, (2, 3), rngs=nnx.Rngs(5), **options, **init)
    theirs = flax.nnx.ConvTranspose(3, 4, (2, 3), rngs=flax.nnx.Rngs(5), **options, **init)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(ours)), flax.nnx.to_pure_dict(flax.nnx.state(theirs)))


def test_options_are_hashable_and_metadata_is_kept():
    metadata = {"kernel_metadata": {"a": 1}, "bias_metadata": {"b": 2}}
    layer = nnx.ConvTranspose(3, 4, [3, 3], [1, 2], padding=[[1, 1], [0, 2]], rngs=nnx.Rngs(0), **metadata)
    assert (layer.kernel_size, layer.strides, layer.padding) == ((3, 3), (1, 2), ((1, 1), (0, 2)))
    assert (layer.kernel.a, layer.bias.b) == (1, 2)
    hash(nnx.split(layer)[0])


BAD_OPTIONS = {
    "strides": ({"strides": (1,)}, r"strides=.*one integer, or 2.*found +\(1,\)"),
    "dilation": ({"kernel_dilation": (1, 2, 3)}, r"kernel_dilation=.*or 2.*found +\(1, 2, 3\)"),
    "padding": ({"padding": "REFLECT"}, r"padding=.*one of SAME, SAME_LOWER, VALID, CIRCULAR, CAUSAL;.*found +REFLECT"),
    "causal": ({"padding": "CAUSAL"}, r"padding=.*CAUSAL only with one spatial axis.*kernel_size \(3, 3\)"),
    "same-lower": ({"padding": "SAME_LOWER", "strides": 2}, r"SAME_LOWER only without strides.*found +strides 2"),
    "mask": ({"mask": np.ones((3, 3, 3, 4)), "transpose_kernel": True}, r"mask=.*\(3, 3, 4, 3\).*\(3, 3, 3, 4\)"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(options, message):
    with pytest.raises(OptionError, match=rf"(?s)^ConvTranspose.*{message}.*This ConvTranspose has kernel_size"):
        nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("shape", [(8, 3), (1, 3, 8, 8)], ids=str)
def test_bad_input(shape, transpose_kernel):
    layer = nnx.ConvTranspose(3, 4, (3, 3), transpose_kernel=transpose_kernel, rngs=nnx.Rngs(0))
    message = rf"\(\*batch, spatial_0, spatial_1, 3\).*found +shape \({', '.join(map(str, shape))}\).*channels are"
    with pytest.raises(InputShapeError, match=f"(?s)^ConvTranspose at ConvTranspose:.*{message}"):
        layer(jnp.ones(shape))


def test_no_rngs():
    with pytest.raises(MissingRngsError, match=r"(?s)^ConvTranspose\(.*expected rngs to be an nnx.Rngs"):
        nnx.ConvTranspose(3, 4, 3, rngs=None)
