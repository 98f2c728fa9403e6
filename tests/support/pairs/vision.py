"""Pairs of models of images, and the faults planted into them: CNNs with BatchNorm, a ViT, a U-Net.

Knows models; knows nothing of how they are compared.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import nnx_core as nnx
from tests.support.arrays import noise
from tests.support.pairs.language import Block, LinenBlock
from tests.support.pairs.pair import Fault, Pair, Sides, drawn, twins, wrapped

# ---- a CNN with statistics -----------------------------------------------------------------------


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm1")(x))
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm2")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        x = nnx.relu(self.norm2(self.conv2(x), use_running_average=not train))
        return self.head(x.mean((1, 2)))


class CNNThatStaysInEval(CNN):
    """Somebody called `model.eval()` in front of the second norm, so to speak."""

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        x = nnx.relu(self.norm2(self.conv2(x), use_running_average=True))
        return self.head(x.mean((1, 2)))


class MaxPooledCNN(CNN):
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        x = nnx.relu(self.norm2(self.conv2(x), use_running_average=not train))
        return self.head(x.max((1, 2)))


def _images() -> tuple[jax.Array]:
    return (noise(1, 3, 6, 6, 2, mean=0.5),)


def _cnn_against_to_nnx(_: Any = None) -> Sides:
    module, inputs = LinenCNN(), _images()
    variables = drawn(module, *inputs, train=True)
    model = wrapped(module, variables, *inputs, train=True)
    return Sides((module, variables), model, inputs, {"train": True})


# ---- a ViT ---------------------------------------------------------------------------------------


class LinenViT(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(8, (3, 3), strides=3, padding="VALID", name="patches")(x)
        x = x.reshape(len(x), -1, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, 5, 8))
        x = LinenBlock(name="block")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(2, 8, (3, 3), strides=3, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 8)))
        self.positions = nnx.Param(jnp.zeros((1, 5, 8)))
        self.block, self.norm = Block(rngs), nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(len(x), 4, 8)
        x = jnp.concatenate([jnp.tile(self.token[...], (len(x), 1, 1)), x], axis=1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class ViTWithoutToken(ViT):
    """The head reads the last token."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(len(x), 4, 8)
        x = jnp.concatenate([jnp.tile(self.token[...], (len(x), 1, 1)), x], axis=1) + self.positions
        return self.head(self.norm(self.block(x))[:, -1])


# ---- a U-Net -------------------------------------------------------------------------------------


class LinenUNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        high = nn.relu(nn.GroupNorm(2, name="norm_down")(nn.Conv(4, (3, 3), name="down")(x)))
        low = nn.avg_pool(high, (2, 2), (2, 2))
        low = nn.relu(nn.GroupNorm(2, name="norm_middle")(nn.Conv(4, (3, 3), name="middle")(low)))
        up = nn.ConvTranspose(4, (2, 2), (2, 2), name="up")(low)
        return nn.Conv(2, (1, 1), name="out")(jnp.concatenate([up, high], axis=-1))


class UNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.middle = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norm_down = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.norm_middle = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), (2, 2), rngs=rngs)
        self.out = nnx.Conv(8, 2, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        high = nnx.relu(self.norm_down(self.down(x)))
        low = nnx.relu(self.norm_middle(self.middle(nnx.avg_pool(high, (2, 2), (2, 2)))))
        return self.out(jnp.concatenate([self.up(low), high], axis=-1))


class UNetOfOtherOrder(UNet):
    def __call__(self, x: jax.Array) -> jax.Array:
        high = nnx.relu(self.norm_down(self.down(x)))
        low = nnx.relu(self.norm_middle(self.middle(nnx.avg_pool(high, (2, 2), (2, 2)))))
        return self.out(jnp.concatenate([high, self.up(low)], axis=-1))


class MaxPooledUNet(UNet):
    def __call__(self, x: jax.Array) -> jax.Array:
        high = nnx.relu(self.norm_down(self.down(x)))
        low = nnx.relu(self.norm_middle(self.middle(nnx.max_pool(high, (2, 2), (2, 2)))))
        return self.out(jnp.concatenate([self.up(low), high], axis=-1))


_CNN = {name: name for name in ("conv1", "norm1", "conv2", "norm2", "head")}

PAIRS = (
    twins("cnn, training", LinenCNN, CNN, _images, layers=_CNN, train=True),
    twins("cnn, evaluating", LinenCNN, CNN, _images, layers=_CNN, train=False),
    twins(
        "cnn, trained for two steps", LinenCNN, CNN, _images, layers=_CNN, train=True,
        left_out=("rounding",), steps=2, tx=optax.sgd(0.1, 0.9),
    ),
    Pair("cnn against its ToNNX, training", _cnn_against_to_nnx, _CNN),
    twins(
        "vit", LinenViT, ViT, _images,
        layers={"block/attention/query": "block/attention/query", "norm": "norm"},
    ),
    twins("unet", LinenUNet, UNet, _images, layers={"up": "up", "norm_middle": "norm_middle"}),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _valid(model: CNN) -> None:
    model.conv1.padding = "VALID"


def _circular(model: CNN) -> None:
    model.conv1.padding = "CIRCULAR"


def _momentum(model: CNN) -> None:
    model.norm1.momentum = 0.99


def _stale(model: CNN) -> None:
    model.norm2.var.set_value(jnp.ones(4))


def _swapped_axes(model: CNN) -> None:
    model.conv2.kernel.set_value(model.conv2.kernel[...].swapaxes(0, 1))


def _swapped_channels(model: CNN) -> None:
    model.conv2.kernel.set_value(model.conv2.kernel[...].swapaxes(2, 3))


def _norm_in_half(model: CNN) -> None:
    model.norm1.dtype = jnp.float16


def _exchanged_scale_and_bias(model: CNN) -> None:
    norm = model.norm1
    scale, bias = norm.scale[...], norm.bias[...]
    norm.scale.set_value(bias)
    norm.bias.set_value(scale)


def _dilated(model: UNet) -> None:
    model.middle.kernel_dilation = (2, 2)


def _groups(model: UNet) -> None:
    model.norm_middle.num_groups, model.norm_middle.group_size = 1, 4


def _flipped(model: UNet) -> None:
    model.up.kernel.set_value(model.up.kernel[...][::-1, ::-1])


def _biased_variance(model: CNN) -> None:
    """Statistics as another framework keeps them: of `n - 1` samples."""
    model.norm2.var.set_value(model.norm2.var[...] * 27 / 26)


class StoppedConv(nnx.Conv):
    """Its kernel gets no gradient."""

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        kernel = self.kernel[...]
        self.kernel[...] = jax.lax.stop_gradient(kernel)
        y = super().__call__(x, **kwargs)
        self.kernel[...] = kernel
        return y


class CNNOfWhichOneConvIsStopped(CNN):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.conv2 = StoppedConv(4, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)


_EVAL, _TRAIN, _U = "cnn, evaluating", "cnn, training", "unet"

FAULTS = (
    Fault("another padding, another shape", _EVAL, "conv1", "conv1", "shape computation", _valid),
    Fault(
        "another padding, same shape", _EVAL, "conv1", "conv1", "computation", _circular,
        behind=("norm1", "conv2", "norm2", "head"),
    ),
    Fault("another momentum", _TRAIN, "norm1", "norm1", "state", _momentum, finding="state"),
    Fault(
        "stale statistics", _EVAL, "norm2", "norm2", "parameters state", _stale, finding="state",
        behind=("head",),
    ),
    Fault(
        "statistics of n - 1 samples", _EVAL, "norm2", "norm2", "parameters state",
        _biased_variance, finding="state", behind=("head",),
    ),
    Fault(
        "a kernel with its two window axes swapped", _EVAL, "conv2", "conv2", "parameters",
        _swapped_axes, behind=("norm2", "head"),
    ),
    Fault(
        "a kernel with its channels swapped", _TRAIN, "conv2", "conv2", "parameters",
        _swapped_channels, behind=("norm2", "head"),
    ),
    Fault(
        "scale and bias exchanged", _TRAIN, "norm1", "norm1", "parameters",
        _exchanged_scale_and_bias, behind=("conv2", "norm2", "head"),
    ),
    Fault("a norm in float16", _EVAL, "norm1", "norm1", "dtype", _norm_in_half),
    Fault(
        "the running average while training", _TRAIN, "norm2", "norm2", "mode",
        model=CNNThatStaysInEval, behind=("head",),
    ),
    Fault(
        "another pooling at the end", _EVAL, "", "", "computation", model=MaxPooledCNN,
        behind=("head",),
    ),
    Fault(
        "a kernel without gradient", _EVAL, "conv2", "conv2", "computation",
        model=CNNOfWhichOneConvIsStopped, finding="gradient",
    ),
    Fault(
        "the head reads another token", "vit", "", "", "computation", model=ViTWithoutToken,
        behind=("head",),
    ),
    Fault(
        "dilation", _U, "middle", "middle", "computation", _dilated,
        behind=("norm_middle", "up", "out"),
    ),
    Fault(
        "another number of groups", _U, "norm_middle", "norm_middle", "computation", _groups,
        behind=("up", "out"),
    ),
    Fault("a flipped kernel", _U, "up", "up", "parameters", _flipped, behind=("out",)),
    Fault(
        "a skip on the other side", _U, "", "", "computation order", model=UNetOfOtherOrder,
        behind=("out",),
    ),
    Fault(
        "another pooling inside", _U, "", "", "computation", model=MaxPooledUNet,
        behind=("middle", "up", "out"),
    ),
)  # fmt: skip
