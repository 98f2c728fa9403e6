"""Pairs of models under transforms, and faults planted: scan, vmap, remat, branches, shared layers.

Knows models; knows nothing of how they are compared.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.rules.rule import Rule
from tests.support.arrays import noise
from tests.support.pairs.pair import Fault, Pair, Sides, drawn, twins, wrapped

LAYERS, WIDTH = 3, 4

# ---- one layer, stacked by scan or written out ---------------------------------------------------


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        y = nn.Dense(WIDTH, name="mix")(nn.LayerNorm(name="norm")(x))
        return x + jnp.tanh(y), None


class LinenStack(nn.Module):
    """`nn.scan` over layers; `remat` computes each again."""

    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.remat(LinenLayer) if self.remat else LinenLayer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(2, name="head")(x)


class LinenUnrolled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(LAYERS):
            x, _ = LinenLayer(name=f"layers_{n}")(x)
        return nn.Dense(2, name="head")(x)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.mix = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.mix(self.norm(x)))


class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, remat: bool = False, reverse: bool = False):
        self.layers = nnx.vmap(Layer)(rngs.fork(split=LAYERS))
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.remat, self.reverse = remat, reverse

    def __call__(self, x: jax.Array) -> jax.Array:
        call = nnx.remat(_call) if self.remat else _call
        run = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, reverse=self.reverse)
        return self.head(run(self.layers, x))


def _call(layer: Layer, x: jax.Array) -> jax.Array:
    return layer(x)


class Unrolled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class UnrolledOnce(Unrolled):
    """The last layer is left out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.head(x)


def _x() -> tuple[jax.Array]:
    return (noise(1, 5, WIDTH),)


def _stack_against_to_nnx(_: Any = None) -> Sides:
    module, inputs = LinenStack(), _x()
    variables = drawn(module, *inputs)
    return Sides((module, variables), wrapped(module, variables, *inputs), inputs)


# ---- an ensemble ---------------------------------------------------------------------------------


class LinenMember(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="out")(jnp.tanh(nn.Dense(3, name="hidden")(x)))


class LinenEnsemble(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mapped = nn.vmap(
            LinenMember,
            in_axes=None,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return mapped(name="members")(x).mean(0)


class Member(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(WIDTH, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


class Ensemble(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.members = nnx.vmap(Member)(rngs.fork(split=3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(_call, in_axes=(0, None))(self.members, x).mean(0)


class EnsembleOfMedian(Ensemble):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.median(nnx.vmap(_call, in_axes=(0, None))(self.members, x), axis=0)


# ---- a layer that is called twice, one that never is, and a branch that is not taken -------------


class LinenShared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shared = nn.Dense(WIDTH, name="shared")
        self.param("unused", nn.initializers.ones, (3,))
        x = jnp.tanh(shared(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="head")(jnp.tanh(shared(x)))


class Shared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head, self.unused = nnx.Linear(WIDTH, 2, rngs=rngs), nnx.Param(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(jnp.tanh(self.shared(x)))
        return self.head(jnp.tanh(self.shared(x)))


class SharedOnce(Shared):
    """The second call is left out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.norm(jnp.tanh(self.shared(x)))))


class LinenBranches(nn.Module):
    """Which branch is taken is known at run time; the other one is dead for the inputs here."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH, name="stem")(x)
        often, seldom = nn.Dense(WIDTH, name="often"), nn.Dense(WIDTH, name="seldom")
        if self.is_initializing():
            seldom(x)
        y = nn.cond(
            jnp.sum(x) < 1e6,
            lambda module, x: often(x),
            lambda module, x: seldom(x),
            self,
            x,
        )
        return nn.Dense(2, name="head")(y)


class Branches(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem, self.often, self.seldom = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        y = nnx.cond(jnp.sum(x) < 1e6, lambda m, x: m.often(x), lambda m, x: m.seldom(x), self, x)
        return self.head(y)


class BranchesTheOtherWay(Branches):
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        y = nnx.cond(jnp.sum(x) < 1e6, lambda m, x: m.seldom(x), lambda m, x: m.often(x), self, x)
        return self.head(y)


# ---- dropout -------------------------------------------------------------------------------------


class LinenDropped(nn.Module):
    """Its key is an input, so that a native twin can have the same."""

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        x = nn.Dense(16, name="up")(x)
        x = nn.Dropout(0.5, deterministic=False, name="dropout")(x, rng=key)
        return nn.Dense(2, name="head")(x)


class Dropped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.head = nnx.Linear(WIDTH, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.up(x), deterministic=False, rngs=key))


class NotDropped(Dropped):
    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.up(x), deterministic=True, rngs=key))


class DroppedOtherwise(Dropped):
    """With another key than that which it was given."""

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return super().__call__(x, jax.random.fold_in(key, 1))


def _x_and_key() -> tuple[jax.Array, jax.Array]:
    return noise(1, 5, WIDTH), jax.random.key(3)


class LinenDroppedTwice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(16)(x))
        return nn.Dropout(0.2, deterministic=False)(nn.Dense(4)(x))


def _dropout_in_parity(rate: float = 0.5) -> Sides:
    module, inputs = LinenDroppedTwice(), _x()
    variables = drawn(module, *inputs)
    model = wrapped(module, variables, *inputs)
    return Sides((module, variables), model, inputs, {"rngs": {"dropout": jax.random.key(4)}})


_UNSTACK = (Rule("params/layers/**", "params/layers/{i}/**", unstack=0),)
_STACK = (Rule(r"params/layers_(\d+)/**", "params/layers/**", stack=0),)

PAIRS = (
    twins(
        "scanned layers", LinenStack, Stack, _x,
        layers={"layers/mix": "layers/mix", "head": "head"},
    ),
    Pair("scanned layers against their ToNNX", _stack_against_to_nnx, {"layers/mix": "layers/mix"}),
    twins(
        "scanned in linen, written out in nnx", LinenStack, Unrolled, _x, *_UNSTACK,
        layers={"head": "head"},
    ),
    twins(
        "written out in linen, scanned in nnx", LinenUnrolled, Stack, _x, *_STACK,
        layers={"head": "head"},
    ),
    twins(
        "written out in both", LinenUnrolled, Unrolled, _x, (r"layers_(\d+)", r"layers/\1"),
        layers={"layers_2/norm": "layers/2/norm"},
    ),
    twins(
        "scanned, and computed again", lambda: LinenStack(remat=True),
        lambda rngs: Stack(rngs, remat=True), _x, layers={"head": "head"},
    ),
    twins("ensemble", LinenEnsemble, Ensemble, _x, layers={"members/out": "members/out"}),
    twins(
        "a layer called twice", LinenShared, Shared, _x,
        layers={"shared": "shared", "norm": "norm"},
    ),
    twins(
        "a branch that is not taken", LinenBranches, Branches, _x,
        layers={"stem": "stem", "head": "head"},
    ),
    twins(
        "dropout with a key as input", LinenDropped, Dropped, _x_and_key,
        layers={"dropout": "dropout"},
    ),
    Pair("dropout with the same streams", _dropout_in_parity, {"Dropout_0": "Dropout_0"}),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _second_of_the_stack(model: Stack) -> None:
    kernel = model.layers.mix.kernel
    kernel.set_value(kernel[...].at[1].multiply(1.1))


def _order_of_the_stack(model: Stack) -> None:
    for _, x in nnx.iter_graph(model.layers):
        if isinstance(x, nnx.Param):
            x.set_value(x[...][np.array([1, 0, 2])])


def _one_written_out(model: Unrolled) -> None:
    model.layers[2].norm.epsilon = 1e-2


def _one_member(model: Ensemble) -> None:
    bias = model.members.hidden.bias
    bias.set_value(bias[...].at[2].add(0.3))


def _another_rate(model: Dropped) -> None:
    model.dropout.rate = 0.4


def _unused(model: Shared) -> None:
    model.unused.set_value(jnp.full(3, 7.0))


def _never_taken(model: Branches) -> None:
    model.seldom.kernel.set_value(-model.seldom.kernel[...])


FAULTS = (
    Fault(
        "one layer of a stack", "scanned layers", "layers/mix", "layers/mix", "parameters",
        _second_of_the_stack, finding="parameter", behind=("head",),
    ),
    Fault(
        "layers of a stack exchanged", "scanned layers", "layers/norm", "layers/norm",
        "parameters order", _order_of_the_stack, also=("layers/mix",), behind=("head",),
    ),
    Fault(
        "a stack in reverse", "scanned layers", "layers", "layers", "order",
        model=lambda rngs: Stack(rngs, reverse=True), behind=("head",),
    ),
    Fault(
        "epsilon of one layer that is written out", "written out in both", "layers_2/norm",
        "layers/2/norm", "computation", _one_written_out, behind=("layers_2/mix", "head"),
    ),
    Fault(
        "epsilon of one layer, where linen scans", "scanned in linen, written out in nnx",
        "layers/norm", "layers/2/norm", "computation", _one_written_out, behind=("head",),
    ),
    Fault(
        "a layer left out", "written out in both", "", "", "structure order computation",
        model=UnrolledOnce, behind=("head",),
    ),
    Fault(
        "one member of an ensemble", "ensemble", "members/hidden", "members/hidden", "parameters",
        _one_member, behind=("members/out",),
    ),
    Fault("another mean of an ensemble", "ensemble", "", "", "computation", model=EnsembleOfMedian),
    Fault(
        "a second call left out", "a layer called twice", "", "", "structure order computation",
        model=SharedOnce, behind=("head",),
    ),
    Fault(
        "an unused parameter", "a layer called twice", "", "", "parameters", _unused,
        finding="parameter",
    ),
    Fault(
        "branches exchanged", "a branch that is not taken", "often", "seldom", "order",
        model=BranchesTheOtherWay, behind=("head",),
    ),
    Fault(
        "a parameter of the branch not taken", "a branch that is not taken", "seldom", "seldom",
        "parameters", _never_taken, finding="parameter",
    ),
    Fault(
        "another dropout rate", "dropout with a key as input", "dropout", "dropout",
        "computation random", _another_rate, behind=("head",),
    ),
    Fault(
        "dropout in the wrong mode", "dropout with a key as input", "dropout", "dropout", "mode",
        model=NotDropped, behind=("head",),
    ),
    Fault(
        "another key", "dropout with a key as input", "", "", "random computation",
        model=DroppedOtherwise, behind=("head",),
    ),
)  # fmt: skip
