"""Pairs of recurrent models, and the faults planted into them.

Knows models; knows nothing of how they are compared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.rules.rule import Rule
from tests.support.arrays import noise
from tests.support.pairs.pair import Fault, twins

IN, STATE = 3, 4
_PLAIN = nn.initializers.normal()  # the default of recurrent kernels needs a decomposition: slow

# ---- LSTM ----------------------------------------------------------------------------------------


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(IN, name="stem")(x)
        cell = nn.LSTMCell(STATE, recurrent_kernel_init=_PLAIN, name="cell")
        x = nn.RNN(cell, name="rnn")(x)
        return nn.Dense(2, name="head")(x)


class LSTM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem, self.head = nnx.Linear(IN, IN, rngs=rngs), nnx.Linear(STATE, 2, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(IN, STATE, rngs=rngs), rngs=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(self.stem(x)))


class LSTMFromOnes(LSTM):
    """Another initial carry."""

    def __call__(self, x: jax.Array) -> jax.Array:
        ones = jnp.ones((len(x), STATE))
        return self.head(self.rnn(self.stem(x), initial_carry=(ones, ones)))


_LSTM = (
    ("cell/if", "rnn/cell/if_"),
    ("cell", "rnn/cell"),
)


# ---- GRU, its gates fused in NNX -----------------------------------------------------------------


class LinenGRU(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        cell = nn.GRUCell(STATE, recurrent_kernel_init=_PLAIN, name="cell")
        carry, y = nn.RNN(cell, return_carry=True, name="rnn")(x, seq_lengths=lengths)
        return nn.Dense(2, name="head")(carry), y


class GRU(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(IN, STATE, rngs=rngs), return_carry=True, rngs=False)
        self.head = nnx.Linear(STATE, 2, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry, y = self.rnn(x, seq_lengths=lengths)
        return self.head(carry), y


class GRUToTheEnd(GRU):
    """It does not stop where a sequence ends."""

    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry, y = self.rnn(x)
        return self.head(carry), y


class GRUOfSwappedOutputs(GRU):
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, y = super().__call__(x, lengths)
        return y, logits


def _gates(names: str, leaf: str) -> list[str]:
    return [f"params/cell/{name}/{leaf}" for name in names.split()]


_GRU = (
    Rule(_gates("ir iz in", "kernel"), "params/rnn/cell/dense_i/kernel", concat=-1),
    Rule(_gates("ir iz in", "bias"), "params/rnn/cell/dense_i/bias", concat=-1),
    Rule(_gates("hr hz hn", "kernel"), "params/rnn/cell/dense_h/kernel", concat=-1),
    Rule("params/cell/hn/bias", "params/rnn/cell/hn_bias"),
)


# ---- both directions -----------------------------------------------------------------------------


class LinenBoth(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forth = nn.SimpleCell(STATE, recurrent_kernel_init=_PLAIN, name="forth")
        back = nn.SimpleCell(STATE, recurrent_kernel_init=_PLAIN, name="back")
        both = nn.Bidirectional(nn.RNN(forth), nn.RNN(back), name="both")(x)
        return nn.Dense(2, name="head")(both)


class Both(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        forth, back = (nnx.RNN(nnx.SimpleCell(IN, STATE, rngs=rngs), rngs=False) for _ in range(2))
        self.both = nnx.Bidirectional(forth, back, rngs=False)
        self.head = nnx.Linear(2 * STATE, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.both(x))


def _direction(source: str, target: str) -> tuple[Rule, ...]:
    cell = f"params/both/{target}_rnn/cell"
    inputs = Rule(f"params/{source}/i/(kernel|bias)", rf"{cell}/dense_i/\1")
    return inputs, Rule(f"params/{source}/h/kernel", f"{cell}/dense_h/kernel")


def _x() -> tuple[jax.Array]:
    return (noise(1, 2, 4, IN),)


def _x_of_lengths() -> tuple[jax.Array, jax.Array]:
    return noise(1, 2, 4, IN), jnp.asarray([4, 2], jnp.int32)


PAIRS = (
    twins(
        "lstm", LinenLSTM, LSTM, _x, *_LSTM, layers={"stem": "stem", "rnn": "rnn", "head": "head"},
    ),
    twins(
        "gru, its gates fused in nnx", LinenGRU, GRU, _x_of_lengths, *_GRU,
        layers={"rnn": "rnn", "head": "head"},
    ),
    twins(
        "both directions", LinenBoth, Both, _x, *_direction("forth", "forward"),
        *_direction("back", "backward"), layers={"both": "both", "head": "head"},
    ),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _reversed(model: LSTM) -> None:
    model.rnn.reverse = model.rnn.keep_order = True


def _order_of_gates(model: GRU) -> None:
    kernel = model.rnn.cell.dense_i.kernel
    r, z, n = jnp.split(kernel[...], 3, axis=-1)
    kernel.set_value(jnp.concatenate([z, r, n], axis=-1))


def _gates_of_lstm(model: LSTM) -> None:
    cell = model.rnn.cell
    cell.ii, cell.if_ = cell.if_, cell.ii


def _gate_function(model: LSTM) -> None:
    model.rnn.cell.gate_fn = functools.partial(jax.nn.hard_sigmoid)


def _exchanged_directions(model: Both) -> None:
    both = model.both
    both.forward_rnn.cell, both.backward_rnn.cell = both.backward_rnn.cell, both.forward_rnn.cell


def _forgets_its_bias(model: LSTM) -> None:
    model.rnn.cell.hf.bias.set_value(model.rnn.cell.hf.bias[...] + 1)


def _merged_the_other_way(model: Both) -> None:
    def merge(a: Any, b: Any) -> jax.Array:
        return jnp.concatenate([b, a], axis=-1)

    model.both.merge_fn = merge


FAULTS = (
    Fault(
        "a scan in reverse", "lstm", "rnn", "rnn", "computation order", _reversed, behind=("head",),
    ),
    Fault(
        "another initial carry", "lstm", "", "", "computation", model=LSTMFromOnes,
        behind=("head",),
    ),
    Fault(
        "another function of gates", "lstm", "cell", "rnn/cell", "computation", _gate_function,
        behind=("head",),
    ),
    Fault(
        "input and forget gate exchanged", "lstm", "cell/ii", "rnn/cell/ii", "parameters order",
        _gates_of_lstm, also=("cell/if",), behind=("head",),
    ),
    Fault(
        "a bias added to the forget gate", "lstm", "cell/hf", "rnn/cell/hf", "parameters",
        _forgets_its_bias, behind=("head",),
    ),
    Fault(
        "another order of fused gates", "gru, its gates fused in nnx", "cell", "rnn/cell",
        "parameters", _order_of_gates, also=("cell/ir", "cell/iz", "cell/in"), behind=("head",),
    ),
    Fault(
        "lengths that are not used", "gru, its gates fused in nnx", "", "", "structure shape",
        model=GRUToTheEnd, behind=("head",),
    ),
    Fault(
        "swapped outputs", "gru, its gates fused in nnx", "", "",
        "computation order structure shape", model=GRUOfSwappedOutputs,
    ),
    Fault(
        "directions exchanged", "both directions", "forth/i", "both/forward_rnn/cell/dense_i",
        "parameters order", _exchanged_directions,
        also=("forth", "forth/h", "back", "back/i", "back/h"), behind=("head",),
    ),
    Fault(
        "directions put together the other way", "both directions", "both", "both",
        "computation order", _merged_the_other_way, behind=("head",),
    ),
)  # fmt: skip
