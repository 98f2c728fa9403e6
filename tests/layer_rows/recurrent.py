"""Rows of the recurrent layers: a cell with a carry made from the input, and cells in a loop.

A cell that flax.nnx has under the same name may still get other initial values there: gates that share a kernel are
initialized one by one here, as in Linen; and flax.nnx cannot make orthogonal kernels in half precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from tests.twins import Layer

ANY = linen.initializers.normal()  # the default makes no half precision from jax 0.12 on; values are copied anyway


def state(x: jax.Array, features: int = 4) -> jax.Array:
    """A carry that depends on the input, in its dtype: it shows how dtypes are promoted, and has a gradient."""
    spread = jnp.linspace(-0.5, 0.5, features, dtype=x.dtype)
    return x[..., :1] * jnp.reshape(spread, (1,) * (x.ndim - 1) + (-1,))


def step(module: Any, x: jax.Array) -> Any:
    return module(state(x), x)


def step_with_memory(module: Any, x: jax.Array) -> Any:
    return module((state(x), -state(x)), x)


GATES = tuple((source, gate) for source in "ih" for gate in "ifgo")  # of an LSTM; i for input, h for state


def gates(names: str, leaf: str) -> tuple[str, ...]:
    """`gates("ir iz in", "kernel")`: the parts of a fused parameter."""
    return tuple(f"params/{name}/{leaf}" for name in names.split())


def sequence(module: Any, x: jax.Array) -> Any:
    """Padded sequences from the end. The carry is float32, which no step changes."""
    h = jnp.linspace(-0.5, 0.5, 8, dtype=jnp.float32).reshape(2, 4)
    lengths = jnp.array([3, 4])
    return module(x, initial_carry=(h, -h), seq_lengths=lengths, reverse=True, keep_order=True, return_carry=True)


def both_directions(module: Any, x: jax.Array) -> Any:
    h = jnp.linspace(-0.5, 0.5, 8, dtype=jnp.float32).reshape(2, 4)
    carry = (h, -h), (h[:, :2], h[:, 2:])
    return module(x, initial_carry=carry, seq_lengths=jnp.array([2, 4]), return_carry=True)


def lstm(prefix: str) -> dict[str, str]:
    """The parameters of an LSTMCell at `prefix`."""
    kernels = {
        f"{prefix}{s}{g}{'_' if s + g == 'if' else ''}/kernel": f"params/{prefix}{s}{g}/kernel" for s, g in GATES
    }
    return kernels | {f"{prefix}h{gate}/bias": f"params/{prefix}h{gate}/bias" for gate in "ifgo"}


ROWS = (
    Layer(
        "LSTMCell",
        make=lambda lib, rngs, **d: lib.LSTMCell(3, 4, rngs=rngs, **d),
        twin=lambda **d: linen.LSTMCell(4, recurrent_kernel_init=ANY, **d),
        shape=(2, 3),
        params=lstm(""),
        method=step_with_memory,
    ),
    Layer(
        "OptimizedLSTMCell",
        make=lambda lib, rngs, **d: lib.OptimizedLSTMCell(3, 4, rngs=rngs, **d),
        twin=lambda **d: linen.OptimizedLSTMCell(4, recurrent_kernel_init=ANY, **d),
        shape=(2, 3),
        params={
            "dense_i/kernel": gates("ii if ig io", "kernel"),
            "dense_h/kernel": gates("hi hf hg ho", "kernel"),
            "dense_h/bias": gates("hi hf hg ho", "bias"),
        },
        method=step_with_memory,
        same_initial_values=False,
    ),
    Layer(
        "GRUCell",
        make=lambda lib, rngs, **d: lib.GRUCell(3, 4, rngs=rngs, **d),
        twin=lambda **d: linen.GRUCell(4, recurrent_kernel_init=ANY, **d),
        shape=(2, 3),
        params={
            "dense_i/kernel": gates("ir iz in", "kernel"),
            "dense_i/bias": gates("ir iz in", "bias"),
            "dense_h/kernel": gates("hr hz hn", "kernel"),
            "hn_bias": "params/hn/bias",
        },
        method=step,
        same_initial_values=False,
        # One product for three gates: the gradient of the input is summed over all gates in one go, not gate by gate.
        same_bits=False,
    ),
    Layer(
        "MGUCell",
        make=lambda lib, rngs, **d: lib.MGUCell(3, 4, rngs=rngs, **d),
        twin=lambda **d: linen.MGUCell(4, recurrent_kernel_init=ANY, **d),
        shape=(2, 3),
        params={
            **{f"{name}_/{leaf}": f"params/{name}/{leaf}" for name in ("if", "in") for leaf in ("kernel", "bias")},
            **{path: f"params/{path}" for path in ("hf/kernel", "hn/kernel", "hn/bias")},
        },
        method=step,
        in_flax_nnx=False,
    ),
    Layer(
        "SimpleCell",
        make=lambda lib, rngs, **d: lib.SimpleCell(3, 4, rngs=rngs, **d),
        twin=lambda **d: linen.SimpleCell(4, recurrent_kernel_init=ANY, **d),
        shape=(2, 3),
        params={
            "dense_i/kernel": "params/i/kernel",
            "dense_i/bias": "params/i/bias",
            "dense_h/kernel": "params/h/kernel",
        },
        method=step,
        same_initial_values=False,
    ),
    Layer(
        "ConvLSTMCell",
        make=lambda lib, rngs, **d: lib.ConvLSTMCell(3, 4, (3,), rngs=rngs, **d),
        twin=lambda **d: linen.ConvLSTMCell(4, (3,), **d),
        shape=(2, 5, 3),
        params={f"{name}/{leaf}": f"params/{name}/{leaf}" for name in ("ih", "hh") for leaf in ("kernel", "bias")},
        method=step_with_memory,
        in_flax_nnx=False,
    ),
    Layer(
        "RNN",
        make=lambda lib, rngs, **d: lib.RNN(lib.LSTMCell(3, 4, rngs=rngs, **d)),
        twin=lambda **d: linen.RNN(linen.LSTMCell(4, recurrent_kernel_init=ANY, **d)),
        shape=(2, 4, 3),
        params=lstm("cell/"),
        method=sequence,
    ),
    Layer(
        "Bidirectional",
        make=lambda lib, rngs, **d: lib.Bidirectional(
            lib.RNN(lib.LSTMCell(3, 4, rngs=rngs, **d)), lib.RNN(lib.LSTMCell(3, 2, rngs=rngs, **d))
        ),
        twin=lambda **d: linen.Bidirectional(
            linen.RNN(linen.LSTMCell(4, recurrent_kernel_init=ANY, **d)),
            linen.RNN(linen.LSTMCell(2, recurrent_kernel_init=ANY, **d)),
        ),
        shape=(2, 4, 3),
        params=lstm("forward_rnn/cell/") | lstm("backward_rnn/cell/"),
        method=both_directions,
        same_bits=False,  # parameters stay outside of the loops here, and two gradients are summed in another order
    ),
)
