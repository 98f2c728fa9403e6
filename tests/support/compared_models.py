"""Two models of one shape, a Linen one and a native one, and stacks of layers: what the tests of `compare` compare.

Law: every option that a fault is planted in is an argument.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge.tracing.pure_call import quick_options

X = jax.ShapeDtypeStruct((3, 4), "float32")
#: Layers of LinenNet and NativeNet that are the same.
LAYERS = {"up": "a", "bn": "b", "ln": "c", "down": "d"}


def initialized(module, *inputs):
    """What Linen's `init` makes, in one program: operation by operation it takes as long as comparing."""
    return jax.jit(lambda *x: module.init(jax.random.key(0), *x), compiler_options=quick_options())(*inputs)


class LinenNet(nn.Module):
    epsilon: float = 1e-6
    momentum: float = 0.9
    norm_dtype: Any = None
    sows: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        h = nn.tanh(nn.Dense(6, name="up")(x))
        h = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="bn")(h)
        if self.sows:
            self.sow("intermediates", "hidden", h)
        h = nn.LayerNorm(epsilon=self.epsilon, dtype=self.norm_dtype, name="ln")(h)
        return nn.Dense(2, name="down")(h)


class NativeNet(nnx.Module):
    def __init__(self, rngs, momentum=0.9, activation=jnp.tanh, sows=False):
        self.activation, self.sows = activation, sows
        self.a = nnx.Linear(4, 6, rngs=rngs)
        self.b = nnx.BatchNorm(6, momentum=momentum, rngs=rngs)
        self.c = nnx.LayerNorm(6, rngs=rngs)
        self.d = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, train: bool = False):
        h = self.b(self.activation(self.a(x)), use_running_average=not train)
        if self.sows:
            self.sow(nnx.Intermediate, "hidden", h)
        return self.d(self.c(h))


def linen(**options: Any) -> tuple[LinenNet, Any]:
    """The Linen model and its variables, always the same ones."""
    return LinenNet(**options), initialized(LinenNet(), jnp.zeros(X.shape))


def native(**options: Any) -> NativeNet:
    """The native model with the variables of `linen()`."""
    model = NativeNet(nnx.Rngs(0), **options)
    for tree in linen()[1].values():
        for name, values in tree.items():
            nnx.update(getattr(model, LAYERS[name]), values)
    return model


class Round(nn.Module):
    """The body of a scan: one layer, in a remat."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.remat(nn.Dense)(4, name="fc")(x)), None


class LinenStack(nn.Module):
    """Three layers in a scan, two in a vmap."""

    @nn.compact
    def __call__(self, x):
        rounds = nn.scan(Round, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = rounds(name="rounds")(x, None)[0]
        heads = nn.vmap(nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return heads(2, name="heads")(x)


class NativeStack(nnx.Module):
    """The same layers, one by one."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.heads = nnx.List([nnx.Linear(4, 2, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.stack([head(x) for head in self.heads])


def linen_stack() -> tuple[LinenStack, Any]:
    """The stack and its variables, always the same ones; biases are not zero."""
    variables = initialized(LinenStack(), jnp.zeros(X.shape))
    return LinenStack(), jax.tree.map(lambda x: x + 0.1, variables)


def native_stack() -> NativeStack:
    """The native stack with the variables of `linen_stack()`."""
    model, params = NativeStack(nnx.Rngs(0)), linen_stack()[1]["params"]
    for layers, values in ((model.layers, params["rounds"]["fc"]), (model.heads, params["heads"])):
        for n, layer in enumerate(layers):
            nnx.update(layer, {name: x[n] for name, x in values.items()})
    return model


class Chain(nn.Module):
    """Two layers of one shape, called in one order or the other; a gradient may be stopped between them."""

    is_reversed: bool = False
    stops: bool = False

    @nn.compact
    def __call__(self, x):
        first, second = nn.Dense(4, name="first"), nn.Dense(4, name="second")
        if self.is_reversed:
            first, second = second, first
        h = nn.tanh(first(x))
        return second(jax.lax.stop_gradient(h) if self.stops else h)


def chain(**options: Any) -> tuple[Chain, Any]:
    """The chain and its variables, always the same ones."""
    return Chain(**options), initialized(Chain(), jnp.zeros(X.shape))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x))


class NativeDropping(nnx.Module):
    def __init__(self, rngs):
        self.fc, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.fc(x))
