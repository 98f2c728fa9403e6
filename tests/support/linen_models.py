"""Linen models of every kind, which the tests of ToNNX wrap, and what they compare them with."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(7, 4, 6))
KEY, DROPOUT = jax.random.key(1), jax.random.key(2)


# ---- real models -------------------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: list[int] = field(default_factory=lambda: [8, 3])
    acts: dict[str, Callable[..., Any]] = field(default_factory=lambda: {"hidden": nn.relu})

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in self.widths[:-1]:
            x = self.acts["hidden"](nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(-1, 2, 3, 1)
        x = nn.Conv(4, (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        self.sow("intermediates", "features", x)
        return nn.Dense(3)(x)


class Setup(nn.Module):
    features: int = 5

    def setup(self):
        self.enc = nn.Dense(self.features)
        self.layers = [nn.Dense(6), nn.Dense(6)]
        self.norm = nn.BatchNorm(momentum=0.5)

    @property
    def size(self):
        return self.features * 2

    def encode(self, x):
        return self.enc(x)

    def __call__(self, x, train: bool = False):
        for layer in self.layers:
            x = layer(x)
        return self.encode(self.norm(x, use_running_average=not train))


class Stack(nn.Module):
    """Layers under nn.scan and nn.remat, with dropout and statistics inside."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.remat(nn.Dense)(6)(x)
                x = nn.BatchNorm(use_running_average=not train)(x)
                return nn.Dropout(0.5, deterministic=not train)(x), None

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return layers()(x, None)[0]


MODELS = {"MLP": MLP, "CNN": CNN, "Setup": Setup, "Stack": Stack}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def both(make, **options):
    """The model wrapped, the Linen model, and its variables."""
    model = ToNNX(make(), nnx.Rngs(params=KEY, dropout=DROPOUT), parity=True, **options).lazy_init(X)
    return model, make(), make().init({"params": KEY, "dropout": DROPOUT}, X)


def mutable(variables):
    return [name for name in variables if name != "params"]


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x, key="n"):
        n = self.variable("counts", key, lambda: jnp.zeros(()))
        if not self.is_initializing():
            n.value += 1
        self.sow("intermediates", "seen", n.value)
        return x + n.value


def counts(model):
    return {name: int(stream.count[...]) for name, stream in model.rngs.items()}


class Block(nn.Module):
    """Parameters, statistics and keys, in a call that keeps the shape: for stacks, loops and branches."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return jnp.tanh(nn.Dropout(0.5, deterministic=not train)(x))


class Decoder(nn.Module):
    """Attention that keeps the keys and values of earlier calls."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, decode=True)(x, x)


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


def variables_in(model):
    """Every Variable, in the order of the graph: to see that they are the same objects later."""
    return [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)]


def same(before, model):
    """Whether the Variables are those of `before`, and no others."""
    after = variables_in(model)
    return len(after) == len(before) and all(a is b for a, b in zip(before, after, strict=True))
