"""Three small networks, each in Linen and in NNX with the same names, so that variables of one are the other's.

Law: for the same variables both compute the same. Knows both APIs; knows neither comparisons nor clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

import bridge
import nnx_core as nnx
from benchmarks import bridge as bridge_benchmark
from bridge.equivalence.drawing import Draw

LAYERS, WIDTH, HEADS, VOCABULARY, CLASSES = 2, 8, 2, 16, 3


@dataclass(frozen=True)
class SmallModel:
    """One network, twice.

    Attributes:
      linen: the module.
      native: (rngs=...) -> the NNX module.
      shape: of the input, abstract.
    """

    name: str
    linen: linen.Module
    native: Callable[..., nnx.Module]
    shape: jax.ShapeDtypeStruct

    def variables(self) -> Any:
        """Linen's, with random numbers in every one: zeros and ones would hide an exchanged or forgotten one."""
        made = self.linen.init(jax.random.key(0), jnp.zeros(self.shape.shape, self.shape.dtype))
        return jax.tree.map(jnp.asarray, jax.tree.map(Draw(0).near, made))

    def in_nnx(self, variables: Any) -> nnx.Module:
        """The NNX module with these."""
        model = self.native(rngs=nnx.Rngs(0))
        nnx.update(model, *variables.values())
        return model

    def wrapped(self, variables: Any) -> nnx.Module:
        """ToNNX around the Linen module, with these."""
        model = bridge.ToNNX(self.linen, rngs=nnx.Rngs(0)).lazy_init(jnp.zeros(self.shape.shape, self.shape.dtype))
        nnx.update(model, *variables.values())
        return model

    def in_linen(self) -> linen.Module:
        """ToLinen around the NNX class; its variables are those of the Linen module."""
        return bridge.to_linen(self.native)


class _LinenCnn(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.GroupNorm(4, name="norm")(linen.Conv(WIDTH, (3, 3), name="first")(x)))
        x = linen.relu(linen.Conv(WIDTH, (3, 3), strides=(2, 2), name="second")(x))
        x = linen.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return linen.Dense(CLASSES, name="head")(x)


class _Cnn(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, WIDTH, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(WIDTH, 4, rngs=rngs)
        self.second = nnx.Conv(WIDTH, WIDTH, (3, 3), strides=(2, 2), rngs=rngs)
        self.head = nnx.Linear(2 * 2 * WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(x)))))
        x = nnx.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return self.head(x)


class _LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = linen.MultiHeadDotProductAttention(HEADS, qkv_features=WIDTH, deterministic=True, name="attention")
        x = x + attention(linen.LayerNorm(name="before")(x))
        hidden = linen.gelu(linen.Dense(2 * WIDTH, name="up")(linen.LayerNorm(name="between")(x)))
        return x + linen.Dense(WIDTH, name="down")(hidden)


class _LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        for i in range(LAYERS):
            x = _LinenBlock(name=f"block_{i}")(x)
        return linen.Dense(VOCABULARY, name="head")(x)


class _Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.before, self.between = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, deterministic=True, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.before(x))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class _Transformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        for i in range(LAYERS):
            setattr(self, f"block_{i}", _Block(rngs=rngs))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for i in range(LAYERS):
            x = getattr(self, f"block_{i}")(x)
        return self.head(x)


def _mlp(*, rngs: nnx.Rngs) -> nnx.Module:
    model: nnx.Module = bridge_benchmark.nnx_classes(nnx)[1](LAYERS, rngs=rngs)
    return model


def small_models() -> list[SmallModel]:
    """Dense and BatchNorm in training; convolutions; attention over tokens."""
    floats, ids = jnp.float32, jnp.int32
    return [
        SmallModel("mlp", bridge_benchmark.LinenNetwork(LAYERS), _mlp, jax.ShapeDtypeStruct((4, 8), floats)),
        SmallModel("cnn", _LinenCnn(), _Cnn, jax.ShapeDtypeStruct((2, 8, 8, 1), floats)),
        SmallModel("transformer", _LinenTransformer(), _Transformer, jax.ShapeDtypeStruct((2, 5), ids)),
    ]
