"""A number that depends on every element of a model's output, to be differentiated.

Law: each element has a weight of its own that its place decides, so that models with equal outputs have equal sums, and
no gradient is zero because outputs cancel.
Knows arrays; knows nothing of models.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bridge.equivalence.numbers import is_inexact

_ODD = (2654435761, 40503, 2246822519, 3266489917)  # multipliers that mix the bits of 32-bit integers


def weighed(output: Any, salt: Any = 0) -> jax.Array:
    """The sum of all inexact elements of a tree, each times its weight in [-1, 1), over the root of their number.

    The weights are a hash of the element's place and of `salt`: no program for random numbers is compiled. Of a complex
    number both parts count, each with a weight of its own.

    >>> weighed({"a": jnp.ones(3), "b": jnp.arange(2)}).shape, float(weighed(jnp.arange(2)))
    ((), 0.0)
    """
    total = jnp.float32(0)
    inexact = [x for x in jax.tree.leaves(output) if is_inexact(x)]
    for number, x in enumerate(inexact):
        parts = (x.real, x.imag) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)
        for turn, part in enumerate(parts):
            wide = part.astype(jnp.promote_types(part.dtype, jnp.float32))
            weights = _weights(x.shape, 2 * number + turn, salt) / max(1, x.size) ** 0.5
            total = total + jnp.sum(wide * weights)
    return total


def _weights(shape: tuple[int, ...], number: int, salt: Any) -> jax.Array:
    mix, step, *rest = map(jnp.uint32, _ODD)
    size = 1
    for length in shape:
        size *= length
    bits = jax.lax.iota(jnp.uint32, max(size, 1))[:size] * mix
    bits += (jnp.uint32(number) + jnp.asarray(salt, jnp.uint32) * jnp.uint32(97) + jnp.uint32(1)) * step
    for shift, factor in zip((16, 13), rest, strict=True):
        bits = (bits ^ (bits >> shift)) * factor
    return ((bits >> 8).astype(jnp.float32) / 2.0**23 - 1).reshape(shape)
