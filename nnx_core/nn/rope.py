"""Rotary position embedding: the angle between two vectors says how far apart they are.

Law: names, tables and numbers are those of flax.nnx 0.12.12. Feature i is turned together with feature
i + size / 2 ("half rotation"), not with its neighbour. Knows arrays; knows nothing of parameters and caches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.graph.objects import data
from nnx_core.module import Module
from nnx_core.nn._errors import InputShapeError, OptionError
from nnx_core.nn._options import size
from nnx_core.nn.attention_dot_product import dot_product_attention
from nnx_core.variables import Variable


class RoPE(Module):
    """Turns feature pairs by position * theta^(-2i / size) (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    With both sizes, `cached_sin` and `cached_cos` are Variables of shape `(max_seq_len, embedding_size / 2)`;
    else None, and each call computes what it needs.

    Args:
      theta: base of the frequencies.
      embedding_size: size of a vector, of attention that of a head; even.
      max_seq_len: number of positions that the tables have.

    Raises:
      OptionError: one size without the other, an odd `embedding_size`, or a `theta` that is not above zero.

    >>> import functools
    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> rope = nnx.RoPE(embedding_size=4, max_seq_len=8)
    >>> x = jnp.ones((1, 3, 4))
    >>> bool((rope(x)[0, 0] == x[0, 0]).all())
    True
    >>> attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(self, theta: float = 10000.0, embedding_size: int | None = None, max_seq_len: int | None = None):
        if not theta > 0:
            fix = "It is the base of the frequencies; 10000 is usual."
            raise OptionError(self, "theta", "a number above 0", repr(theta), fix)
        self.theta = theta
        self.cached_sin = self.cached_cos = data(None)  # `data`: places for Variables
        if (embedding_size is None) != (max_seq_len is None):
            sizes = f"embedding_size={embedding_size}, max_seq_len={max_seq_len}"
            fix = "The tables have one row for each position: give both sizes, or neither to compute them in each call."
            raise OptionError(self, "embedding_size=..., max_seq_len", "both or neither", sizes, fix)
        if embedding_size is not None:
            features, length = size(self, "embedding_size", embedding_size), size(self, "max_seq_len", max_seq_len)
            if features < 1 or features % 2:
                fix = "Features are turned in pairs; in attention it is the size of a head."
                raise OptionError(self, "embedding_size", "an even number above 0", features, fix)
            sin, cos = _sin_and_cos(self.theta, features, jnp.arange(length, dtype=jnp.float32))
            self.cached_sin, self.cached_cos = Variable(sin), Variable(cos)

    def __call__(self, x: jax.Array, input_positions: jax.Array | None = None) -> jax.Array:
        """Turn the vectors of `x`.

        Args:
          x: `[..., length, size]`.
          input_positions: `[length]`, or `[..., length]` with axes that broadcast to those of `x`; None: 0, 1, and so
            on, which is what the tables are for.

        Returns:
          Shape of `x`, in the dtype promoted from `x` and float32.

        Raises:
          InputShapeError: an odd number of features, or other sizes than those of the tables or the positions.
        """
        _check_input(self, jnp.shape(x), input_positions)
        if input_positions is None and self.cached_sin is not None and self.cached_cos is not None:
            length = x.shape[-2]
            sin, cos = self.cached_sin[...][:length], self.cached_cos[...][:length]
        else:
            positions = jnp.arange(x.shape[-2], dtype=jnp.float32) if input_positions is None else input_positions
            sin, cos = _sin_and_cos(self.theta, x.shape[-1], positions)
        sin, cos = (_both_halves(table, jnp.ndim(x)) for table in (sin, cos))
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _sin_and_cos(theta: float, features: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[..., features / 2]` each, for `positions` of shape `[...]`, in float32."""
    frequencies = 1.0 / theta ** (2 * jnp.arange(features // 2, dtype=jnp.float32) / features)
    angles = jnp.expand_dims(positions, -1) * frequencies.reshape((1,) * jnp.ndim(positions) + (-1,))
    return jnp.sin(angles), jnp.cos(angles)


def _both_halves(table: jax.Array, rank: int) -> jax.Array:
    """`table` for the pairs' first and second features, with as many axes as the input has."""
    table = jnp.concatenate([table, table], axis=-1)
    return jnp.expand_dims(table, tuple(range(rank - table.ndim)))


def _check_input(layer: RoPE, shape: tuple[int, ...], positions: Any) -> None:
    if len(shape) < 2 or shape[-1] % 2:
        raise InputShapeError(layer, "(..., length, size) with an even size", shape, "Features are turned in pairs.")
    if positions is not None:
        own = jnp.shape(positions)
        try:
            fits = jnp.broadcast_shapes(own, shape[:-1]) == shape[:-1]
        except ValueError:
            fits = False
        if not fits:
            fix = "input_positions has one entry for each vector: its last axis is the length of the input."
            raise InputShapeError(layer, f"that fits input_positions of shape {own}", shape, fix)
    elif layer.cached_sin is not None:
        length, pairs = layer.cached_sin.shape
        if shape[-1] != 2 * pairs or shape[-2] > length:
            fix = "Give RoPE the embedding_size of its input and a max_seq_len that is long enough, or neither."
            raise InputShapeError(layer, f"(..., up to {length}, {2 * pairs})", shape, fix)


def dot_product_attention_with_rope(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rope: RoPE,
    input_positions: jax.Array | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`nnx.dot_product_attention` of a query and a key that `rope` has turned.

    As the `attention_fn` of MultiHeadAttention: `functools.partial(nnx.dot_product_attention_with_rope, rope=rope)`.

    Args:
      query: `[*batch, q_length, heads, depth]`.
      key: `[*batch, kv_length, kv_heads, depth]`.
      value: `[*batch, kv_length, kv_heads, v_depth]`.
      rope: of the depth of a head.
      input_positions: `[length]` or `[*batch, length]`, of queries and keys; None: 0, 1, and so on for both. So it is
        for whole sequences: a query that is decoded alone would stand at position 0, as in flax.nnx.
      **kwargs: of `dot_product_attention`.

    Returns:
      `[*batch, q_length, heads, v_depth]`.

    Raises:
      InputShapeError: what does not fit `rope` or the positions.
      AttentionShapeError: arguments that do not fit each other.
    """
    positions = None if input_positions is None else jnp.expand_dims(input_positions, -2)  # the same for all heads

    def turned(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(rope(jnp.swapaxes(x, -3, -2), positions), -3, -2)

    return dot_product_attention(turned(query), turned(key), value, **kwargs)
