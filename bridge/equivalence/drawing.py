"""Random inputs and variables to run models on.

Law: the same seed draws the same numbers; what is drawn for a variable is of the size that its author meant.
Knows arrays; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.equivalence.numbers import is_key
from bridge.tracing.trace import is_array


class Draw:
    """A source of random arrays.

    >>> Draw(0).array(jax.ShapeDtypeStruct((2,), "float32")).shape, Draw(0).array("a flag")
    ((2,), 'a flag')
    """

    def __init__(self, seed: int = 0):
        self._random = np.random.default_rng(seed)

    def array(self, x: Any, below: int = 2) -> Any:
        """For an abstract array normal numbers, 0 and 1 for bools, integers from 0 to `below`; anything else as it is.

        Integers are spread evenly: as many different ones as there is place for.
        """
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if is_key(x):
            impls: list[Any] = []  # an abstract key does not tell its implementation, and a traced one does
            jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), x)
            key = jax.random.key(int(self._random.integers(2**31)), impl=impls[0])
            return jax.random.split(key, x.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return self._random.normal(size=x.shape).astype(x.dtype)
        if x.dtype == bool:
            return self._random.integers(2, size=x.shape).astype(bool)
        size, most = math.prod(x.shape), min(below, int(jnp.iinfo(x.dtype).max))
        places = self._random.permutation(size) + self._random.random(size)
        return np.minimum(places * (most / max(size, 1)), most - 1).astype(x.dtype).reshape(x.shape)

    def near(self, x: Any) -> Any:
        """Random numbers of the sizes and signs of `x`, which is what `init` makes.

        Each number is multiplied by another in [0.7, 1.3). Where all are the same, as in a bias, they are drawn from
        [0.5, 1.5) with their sign; zeros from [-0.5, 0.5), over the root of the fan-in. Integers, bools are shuffled;
        where all are the same (a counter, a mask of True, a kernel of zeros), up to 2 is added, or all are drawn.
        """
        if is_key(x) or not is_array(x):
            return x
        x = np.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return self._near_integers(x)
        factor = self._random.uniform(-0.5, 0.5, x.shape)
        if x.size and not (x == x.flat[0]).all():
            return (x * (1 + 0.6 * factor)).astype(x.dtype)
        # Not `x * factor`: a scale of 1e-6 (CaiT, ConvNeXt) would hide the layers before it from every tolerance.
        near_zero = factor / _fan_in(x.shape) ** 0.5
        near_one = np.where(x.real < 0, -1, 1) * (1 + factor)
        return np.where(x == 0, near_zero, near_one).astype(x.dtype)

    def _near_integers(self, x: np.ndarray) -> np.ndarray:
        if x.size and (x == x.flat[0]).all():
            if x.dtype == bool:
                return self._random.integers(2, size=x.shape).astype(bool)
            return x + self._random.integers(3, size=x.shape).astype(x.dtype)
        return self._random.permutation(x.ravel()).reshape(x.shape)


def with_other_key(x: Any) -> Any:
    """Another key for a random key; anything else as it is."""
    if not is_key(x):
        return x
    return jax.random.wrap_key_data(jax.random.key_data(x) + 1, impl=jax.random.key_impl(x))


def with_last_bits_moved(tree: Any, eps: float, seed: int = 0) -> Any:
    """The tree with every floating number up or down by `eps` of it, at random; on the host."""
    random = np.random.default_rng(seed)

    def moved(x: Any) -> Any:
        if not (is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)) or is_key(x):
            return x
        x = np.asarray(x)
        return (x * (1 + eps * random.choice((-1.0, 1.0), x.shape))).astype(x.dtype)

    return jax.tree.map(moved, tree)


def _fan_in(shape: Sequence[int]) -> int:
    return max(1, math.prod(shape[:-1])) if len(shape) > 1 else 1
