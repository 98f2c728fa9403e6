"""Every error of the layers: the layer's path, what was expected, what was found, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core._errors import NnxError
from nnx_core.nn._errors import (
    InputDtypeError,
    InputShapeError,
    MissingFlagError,
    MissingRngsError,
    OptionError,
)
from tests.support.arrays import key


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.up = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x):
        return self.up(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(3, rngs), Block(5, rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


WRAPS = {
    "plain": lambda model, x: model(x),
    "jax-jit": lambda model, x: jax.jit(lambda x: model(x))(x),
    "nnx-jit": nnx.jit(lambda model, x: model(x)),
    "nnx-grad": nnx.grad(lambda model, x: model(x).sum()),
}


@pytest.mark.parametrize("call", WRAPS.values(), ids=WRAPS)
def test_the_path_of_the_layer_in_the_model(call):
    message = (
        r"(?s)^Linear at Model\.blocks\[1\]\.up:"
        r".*expected an input of shape \(\.\.\., 5\).*found +shape \(2, 3\)"
    )
    with pytest.raises(InputShapeError, match=message):
        call(Model(nnx.Rngs(0)), jnp.ones((2, 3)))


def test_a_layer_that_nothing_holds():
    with pytest.raises(InputShapeError, match=r"^Linear at Linear:"):
        nnx.Linear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))


SHAPES = {
    "linear-rank": (
        lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        (),
        r"\(\.\.\., 3\).*found +shape \(\).*in_features",
    ),
    "conv-rank": (
        lambda: nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        (8, 3),
        r"\(\*batch, spatial_0, spatial_1, 3\).*found +shape \(8, 3\).*channels are last",
    ),
    "conv-features": (
        lambda: nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        (1, 3, 8, 8),
        r"\(\*batch, spatial_0, spatial_1, 3\).*found +shape \(1, 3, 8, 8\)",
    ),
    "conv-groups": (
        lambda: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=nnx.Rngs(0)),
        (1, 8, 2),
        r"\(\*batch, spatial_0, 4\).*found +shape \(1, 8, 2\)",
    ),
    "batch-norm": (lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)), (2, 1), r"\(\.\.\., 4\).*found +shape \(2, 1\)"),
    "batch-norm-axis": (
        lambda: nnx.BatchNorm(4, axis=1, rngs=nnx.Rngs(0)),
        (2, 3, 4),
        r"with 4 features on axes \(1,\).*found +shape \(2, 3, 4\)",
    ),
    "batch-norm-rank": (
        lambda: nnx.BatchNorm(4, axis=2, rngs=nnx.Rngs(0)),
        (2, 4),
        r"with an axis 2.*found +shape \(2, 4\)",
    ),
    "layer-norm": (lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)), (2, 5), r"\(\.\.\., 4\).*found +shape \(2, 5\)"),
    "layer-norm-rank": (lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)), (), r"with an axis -1.*found +shape \(\)"),
    "layer-norm-reduction": (
        lambda: nnx.LayerNorm(4, reduction_axes=3, rngs=nnx.Rngs(0)),
        (2, 4),
        r"with an axis 3.*found +shape \(2, 4\)",
    ),
}


@pytest.mark.parametrize(("make", "shape", "message"), SHAPES.values(), ids=SHAPES)
def test_shape(make, shape, message):
    with pytest.raises(InputShapeError, match=f"(?s){message}"):
        make()(jnp.ones(shape))


def test_attend_shape():
    with pytest.raises(InputShapeError, match=r"(?s)^Embed at Embed:.*\(\.\.\., 4\).*found +shape \(2, 3\)"):
        nnx.Embed(7, 4, rngs=nnx.Rngs(0)).attend(jnp.ones((2, 3)))


def test_input_dtypes():
    with pytest.raises(InputDtypeError, match=r"(?s)^Embed at Embed:.*integer.*found +float32"):
        nnx.Embed(7, 4, rngs=nnx.Rngs(0))(jnp.ones(3))
    with pytest.raises(InputDtypeError, match=r"(?s)^Dropout at Dropout:.*floating or complex.*found +int32"):
        nnx.Dropout(0.5, rngs=nnx.Rngs(0))(jnp.arange(3))


OPTIONS = {
    "strides": ({"strides": (1,)}, r"strides=.*one integer, or 2.*found +\(1,\)"),
    "dilation": ({"kernel_dilation": (1, 2, 3)}, r"kernel_dilation=.*or 2.*found +\(1, 2, 3\)"),
    "padding-name": ({"padding": "FOO"}, r"padding=.*one of SAME.*found +FOO"),
    "padding-count": (
        {"padding": (1, 2, 3)},
        r"padding=.*2 integers or \(before, after\).*found +\(1, 2, 3\)",
    ),
    "padding-pairs": ({"padding": ((1,), (2,))}, r"padding=.*found +\(\(1,\), \(2,\)\)"),
    "padding-type": ({"padding": 1.5}, r"padding=.*found +1\.5"),
    "causal": ({"padding": "CAUSAL"}, r"padding=.*CAUSAL only with one spatial axis.*kernel_size \(3, 3\)"),
    "groups-in": (
        {"feature_group_count": 2},
        r"a divisor of in_features.*in_features 3, feature_group_count 2",
    ),
    "groups-out": (
        {"feature_group_count": 3},
        r"a divisor of out_features.*out_features 4, feature_group_count 3",
    ),
    "mask": ({"mask": np.ones(3)}, r"mask=.*shape of the kernel, \(3, 3, 3, 4\).*found +\(3,\)"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_conv_options(options, message):
    with pytest.raises(OptionError, match=f"(?s)^Conv.*{message}"):
        nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_dropout_rate(rate):
    with pytest.raises(OptionError, match=rf"(?s)^Dropout.*rate=.*\[0, 1\].*found +{rate}.*not to keep"):
        nnx.Dropout(rate)


def test_flags_that_nobody_gives():
    with pytest.raises(MissingFlagError, match=r"(?s)`deterministic`.*Dropout at Dropout.*None in both.*\.eval\(\)"):
        nnx.Dropout(0.5, deterministic=None, rngs=nnx.Rngs(0))(jnp.ones(3))
    with pytest.raises(MissingFlagError, match=r"(?s)`use_running_average`.*BatchNorm at BatchNorm"):
        nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))


@pytest.mark.parametrize("rngs", [None, 0, key(0)], ids=["none", "int", "key"])
@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(3, 4, rngs=rngs),
        lambda rngs: nnx.Conv(3, 4, 3, rngs=rngs),
        lambda rngs: nnx.Embed(3, 4, rngs=rngs),
        lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        lambda rngs: nnx.LayerNorm(3, rngs=rngs),
    ],
    ids=["Linear", "Conv", "Embed", "BatchNorm", "LayerNorm"],
)
def test_no_rngs_to_initialize_from(make, rngs, request):
    name = request.node.callspec.id.split("-")[0]
    with pytest.raises(MissingRngsError, match=rf"(?s)^{name}\(.*expected rngs to be an nnx.Rngs.*nnx\.Rngs\(0\)"):
        make(rngs)


def test_no_rngs_to_drop_with():
    with pytest.raises(
        MissingRngsError, match=r"(?s)^Dropout at Dropout is not deterministic.*found +None.*\.eval\(\)"
    ):
        nnx.Dropout(0.5)(jnp.ones(3))
    with pytest.raises(MissingRngsError, match=r"(?s)^Dropout\(.*RngStream or None.*found +3"):
        nnx.Dropout(0.5, rngs=3)


def test_each_is_an_nnx_error_and_a_builtin():
    for error in (InputShapeError, InputDtypeError, MissingFlagError, MissingRngsError, OptionError):
        assert issubclass(error, NnxError)
        assert issubclass(error, ValueError)
