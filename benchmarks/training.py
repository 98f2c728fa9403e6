"""Training: what a user waits for a step of a whole model, in each library and each wrapper, next to bare JAX.

Law: all variants of a model are the same network, the same loss and the same adam, from the same weights; before
anything is timed, their losses over several steps must agree. Unlike in `dispatch`, the arithmetic is most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.training import train_state

import bridge
import nnx_core
from benchmarks.timing import Step, Timings, interleaved
from bridge import flax_nnx

RATE, CLASSES = 1e-3, 10
HEADS, VOCABULARY = 4, 256

BARE, LINEN, CORE, FLAX = "bare jax.jit", "Linen TrainState", "nnx_core.jit", "flax.nnx.jit"
TO_NNX, TO_LINEN = "ToNNX in nnx_core.jit", "ToLinen in TrainState"


@dataclass(frozen=True)
class Model:
    """One network in both APIs, with the same names.

    Attributes:
      linen: the Linen module.
      native: (nnx_core or flax.nnx) -> the class, which takes rngs=.
      x: the batch. y: int32 labels, of the shape of the outputs without their last axis.
    """

    linen: linen.Module
    native: Callable[[ModuleType], Callable[..., Any]]
    x: np.ndarray
    y: np.ndarray


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# ---- an MLP ------------------------------------------------------------------------------------------------------


class _LinenMlp(linen.Module):
    width: int
    depth: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = linen.relu(linen.Dense(self.width, name=f"layer_{i}")(x))
        return linen.Dense(CLASSES, name="head")(x)


def mlp(size: int, batch: int) -> Model:
    """Six layers of 32 * size."""
    width, depth = 32 * size, 6

    def native(nnx: ModuleType) -> Callable[..., Any]:
        class Mlp(nnx.Module):
            def __init__(self, *, rngs: Any):
                for i in range(depth):
                    setattr(self, f"layer_{i}", nnx.Linear(width, width, rngs=rngs))
                self.head = nnx.Linear(width, CLASSES, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                for i in range(depth):
                    x = nnx.relu(getattr(self, f"layer_{i}")(x))
                return self.head(x)

        return Mlp

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, width)).astype(np.float32)
    return Model(_LinenMlp(width, depth), native, x, rng.integers(0, CLASSES, batch).astype(np.int32))


# ---- a ResNet ----------------------------------------------------------------------------------------------------


class _LinenResidual(linen.Module):
    channels: int
    stride: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        y = linen.Conv(self.channels, (3, 3), strides, use_bias=False, name="conv_0")(x)
        y = linen.relu(linen.BatchNorm(use_running_average=False, name="norm_0")(y))
        y = linen.Conv(self.channels, (3, 3), use_bias=False, name="conv_1")(y)
        y = linen.BatchNorm(use_running_average=False, name="norm_1")(y)
        return linen.relu(y + linen.Conv(self.channels, (1, 1), strides, use_bias=False, name="shortcut")(x))


class _LinenResNet(linen.Module):
    channels: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(self.channels, (3, 3), name="stem")(x)
        for i in range(4):
            x = _LinenResidual(self.channels << (i // 2), 1 + i % 2, name=f"block_{i}")(x)
        return linen.Dense(CLASSES, name="head")(x.mean((1, 2)))


def resnet(size: int, batch: int) -> Model:
    """Four residual blocks of size to 2 * size channels over images of 16 x 16."""

    def native(nnx: ModuleType) -> Callable[..., Any]:
        class Residual(nnx.Module):
            def __init__(self, n_in: int, channels: int, stride: int, *, rngs: Any):
                strides, options = (stride, stride), {"use_bias": False, "rngs": rngs}
                self.conv_0 = nnx.Conv(n_in, channels, (3, 3), strides, **options)
                self.norm_0 = nnx.BatchNorm(channels, rngs=rngs)
                self.conv_1 = nnx.Conv(channels, channels, (3, 3), **options)
                self.norm_1 = nnx.BatchNorm(channels, rngs=rngs)
                self.shortcut = nnx.Conv(n_in, channels, (1, 1), strides, **options)

            def __call__(self, x: jax.Array) -> jax.Array:
                y = nnx.relu(self.norm_0(self.conv_0(x)))
                return nnx.relu(self.norm_1(self.conv_1(y)) + self.shortcut(x))

        class ResNet(nnx.Module):
            def __init__(self, *, rngs: Any):
                self.stem = nnx.Conv(3, size, (3, 3), rngs=rngs)
                n_in = size
                for i in range(4):
                    channels = size << (i // 2)
                    setattr(self, f"block_{i}", Residual(n_in, channels, 1 + i % 2, rngs=rngs))
                    n_in = channels
                self.head = nnx.Linear(n_in, CLASSES, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                x = self.stem(x)
                for i in range(4):
                    x = getattr(self, f"block_{i}")(x)
                return self.head(x.mean((1, 2)))

        return ResNet

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, 16, 16, 3)).astype(np.float32)
    return Model(_LinenResNet(size), native, x, rng.integers(0, CLASSES, batch).astype(np.int32))


# ---- a Transformer -----------------------------------------------------------------------------------------------


class _LinenBlock(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attention = linen.MultiHeadDotProductAttention(HEADS, deterministic=True, name="attention")
        x = x + attention(linen.LayerNorm(name="norm_0")(x), mask=mask)
        hidden = linen.gelu(linen.Dense(4 * self.width, name="up")(linen.LayerNorm(name="norm_1")(x)))
        return x + linen.Dense(self.width, name="down")(hidden)


class _LinenTransformer(linen.Module):
    width: int
    depth: int

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        mask = linen.make_causal_mask(tokens)
        x = linen.Embed(VOCABULARY, self.width, name="embed")(tokens)
        for i in range(self.depth):
            x = _LinenBlock(self.width, name=f"block_{i}")(x, mask)
        return linen.Dense(VOCABULARY, name="head")(x)


def transformer(size: int, batch: int) -> Model:
    """A decoder of four blocks of width 8 * size over 32 tokens, four heads."""
    width, depth = 8 * size, 4

    def native(nnx: ModuleType) -> Callable[..., Any]:
        class Block(nnx.Module):
            def __init__(self, *, rngs: Any):
                self.norm_0, self.norm_1 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
                self.attention = nnx.MultiHeadAttention(HEADS, width, deterministic=True, decode=False, rngs=rngs)
                self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

            def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
                x = x + self.attention(self.norm_0(x), mask=mask)
                return x + self.down(nnx.gelu(self.up(self.norm_1(x))))

        class Transformer(nnx.Module):
            def __init__(self, *, rngs: Any):
                self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
                for i in range(depth):
                    setattr(self, f"block_{i}", Block(rngs=rngs))
                self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

            def __call__(self, tokens: jax.Array) -> jax.Array:
                mask = nnx.make_causal_mask(tokens)
                x = self.embed(tokens)
                for i in range(depth):
                    x = getattr(self, f"block_{i}")(x, mask)
                return self.head(x)

        return Transformer

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (batch, 33)).astype(np.int32)
    return Model(_LinenTransformer(width, depth), native, tokens[:, :-1], tokens[:, 1:])


MODELS = {"MLP": mlp, "ResNet": resnet, "Transformer": transformer}


# ---- the variants ------------------------------------------------------------------------------------------------


class _TrainState(train_state.TrainState):
    others: Any  # collections that are not trained


def _state(module: linen.Module, variables: Mapping[str, Any]) -> _TrainState:
    others = {name: collection for name, collection in variables.items() if name != "params"}
    return _TrainState.create(apply_fn=module.apply, params=variables["params"], tx=optax.adam(RATE), others=others)


def _linen_step(state: _TrainState, x: jax.Array, y: jax.Array) -> tuple[_TrainState, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn({"params": params, **state.others}, x, mutable=list(state.others))
        return cross_entropy(logits, y), updates

    (loss, others), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, others=others), loss


def _train_state(module: linen.Module, variables: Mapping[str, Any], x: jax.Array, y: jax.Array) -> Step:
    state, train_step = _state(module, variables), jax.jit(_linen_step)

    def step() -> jax.Array:
        nonlocal state
        state, loss = train_step(state, x, y)
        return loss

    return step


def _bare(module: linen.Module, variables: Mapping[str, Any], x: jax.Array, y: jax.Array) -> Step:
    """The same pure step over one flat list of arrays: the floor."""
    leaves, structure = jax.tree.flatten(_state(module, variables))
    leaves = [jnp.asarray(leaf) for leaf in leaves]  # the step starts as a Python int

    @jax.jit
    def run(leaves: list[jax.Array], x: jax.Array, y: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        state, loss = _linen_step(jax.tree.unflatten(structure, leaves), x, y)
        return jax.tree.leaves(state), loss

    def step() -> jax.Array:
        nonlocal leaves
        leaves, loss = run(leaves, x, y)
        return loss

    return step


def _nnx(nnx: ModuleType, model: Any, x: jax.Array, y: jax.Array) -> Step:
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x), y))(model)
        optimizer.update(model, grads)
        return loss

    return lambda: train_step(model, optimizer, x, y)


def variants(model: Model) -> dict[str, Step]:
    """Every variant of a model, ready to run."""
    x, y = jnp.asarray(model.x), jnp.asarray(model.y)
    variables = model.linen.init(jax.random.key(0), x)
    native = model.native(nnx_core)
    core, theirs = native(rngs=nnx_core.Rngs(0)), model.native(flax.nnx)(rngs=flax.nnx.Rngs(0))
    bridge.load_variables(core, variables)
    flax_nnx.load(theirs, core)
    wrapped = bridge.ToNNX(model.linen, rngs=nnx_core.Rngs(0)).lazy_init(x)
    bridge.load_variables(wrapped, variables)
    return {
        BARE: _bare(model.linen, variables, x, y),
        LINEN: _train_state(model.linen, variables, x, y),
        CORE: _nnx(nnx_core, core, x, y),
        FLAX: _nnx(flax.nnx, theirs, x, y),
        TO_NNX: _nnx(nnx_core, wrapped, x, y),
        TO_LINEN: _train_state(bridge.to_linen(native), variables, x, y),
    }


def measure(steps: Mapping[str, Step], *, rounds: int, calls: int) -> dict[str, Timings]:
    """Time all variants of one model, interleaved."""
    return interleaved(steps, rounds=rounds, calls=calls)
