"""Pooling: one number for each window, feature by feature.

Law: channels are last, the window covers the axes before them, any number of batch axes comes first; results are
flax.linen's bit for bit. Knows arrays only, no modules.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core._errors import NnxError
from nnx_core.nn._axes import hashable
from nnx_core.nn._windows import LAX_PADDINGS, LaxPadding, is_pair

Reduction = Callable[[Any, Any], Any]


class PoolingError(NnxError, ValueError):
    """The window, its strides or its padding do not fit the input or each other."""

    def __init__(self, what: str, expected: str, found: object, fix: str):
        super().__init__(f"{what} of a pooling:\n  expected {expected}\n  found    {found}\n{fix}")


def pool(
    inputs: jax.Array,
    init: Any,
    reduce_fn: Reduction,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: LaxPadding,
) -> jax.Array:
    """Reduce each window of `inputs` with `reduce_fn`, by `jax.lax.reduce_window`.

    Differentiable in reverse mode only where JAX knows the reduction: `lax.add`, `lax.max`, `lax.min`.

    Args:
      inputs: `[*batch, *spatial, features]` with as many spatial axes as `window_shape` has entries, and any
        number of batch axes.
      init: the value a reduction starts with, and the value of the padding.
      reduce_fn: (a, b) -> value, associative and commutative.
      window_shape: the size of the window along each spatial axis.
      strides: between windows, one for each spatial axis; None is 1 for all.
      padding: "SAME", "SAME_LOWER" or "VALID"; or for each spatial axis a pair (before, after).

    Returns:
      `[*batch, *spatial', features]`, in the dtype of `inputs`.

    Raises:
      PoolingError: too few axes, or options that do not fit `window_shape`.

    >>> import jax, jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.pool(jnp.array([[2.0], [3.0], [4.0]]), 1.0, jax.lax.mul, (2,), None, "VALID").ravel()
    Array([ 6., 12.], dtype=float32)
    """
    inputs = jnp.asarray(inputs)
    window, strides, padding = _checked(inputs.shape, window_shape, strides, padding)
    batch = inputs.ndim - len(window) - 1
    if not isinstance(padding, str):
        padding = [*[(0, 0)] * batch, *padding, (0, 0)]
    return lax.reduce_window(
        inputs, init, reduce_fn, (1,) * batch + window + (1,), (1,) * batch + strides + (1,), padding
    )


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: LaxPadding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window.

    Args:
      inputs: `[*batch, *spatial, features]`.
      window_shape, strides, padding: see `pool`.
      count_include_pad: whether padding counts as zeros; if not, the mean is over the pixels of the input only.

    Returns:
      `[*batch, *spatial', features]`. The sum is taken in the dtype of `inputs`, which also is that of the result;
      but it is float32 for integers, and at least that without `count_include_pad`, as in Linen.

    Raises:
      PoolingError: too few axes, or options that do not fit `window_shape`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> x = jnp.array([[1.0], [3.0], [5.0]])
    >>> nnx.avg_pool(x, (2,), padding="SAME").ravel()
    Array([2. , 4. , 2.5], dtype=float32)
    >>> nnx.avg_pool(x, (2,), padding="SAME", count_include_pad=False).ravel()
    Array([2., 4., 5.], dtype=float32)
    """
    inputs = jnp.asarray(inputs)
    total = pool(inputs, 0.0, lax.add, window_shape, strides, padding)
    if count_include_pad:
        return total / math.prod(hashable(window_shape))
    spatial = inputs.shape[-len(window_shape) - 1 : -1]
    batch = (1,) * (inputs.ndim - len(spatial) - 1)
    return total / pool(jnp.ones((*batch, *spatial, 1)), 0.0, lax.add, window_shape, strides, padding)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: LaxPadding = "VALID",
) -> jax.Array:
    """The largest value of each window; padding never wins.

    Args:
      inputs: `[*batch, *spatial, features]`, any dtype with an order.
      window_shape, strides, padding: see `pool`.

    Returns:
      `[*batch, *spatial', features]`, in the dtype of `inputs`.

    Raises:
      PoolingError: too few axes, or options that do not fit `window_shape`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.max_pool(jnp.ones((2, 28, 28, 3)), (2, 2), strides=(2, 2)).shape
    (2, 14, 14, 3)
    """
    return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)


def min_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: LaxPadding = "VALID",
) -> jax.Array:
    """The smallest value of each window; padding never wins.

    Args:
      inputs: `[*batch, *spatial, features]`, any dtype with an order.
      window_shape, strides, padding: see `pool`.

    Returns:
      `[*batch, *spatial', features]`, in the dtype of `inputs`.

    Raises:
      PoolingError: too few axes, or options that do not fit `window_shape`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.min_pool(jnp.array([[4], [2], [3]]), (2,)).ravel()
    Array([2, 2], dtype=int32)
    """
    return pool(inputs, jnp.inf, lax.min, window_shape, strides, padding)


def _checked(
    shape: tuple[int, ...], window: Any, strides: Any, padding: Any
) -> tuple[tuple[int, ...], tuple[int, ...], LaxPadding]:
    """Window, strides and padding as tuples or a name, once they fit; PoolingError if they do not."""
    window, strides, padding = hashable(window), hashable(strides), hashable(padding)
    if not isinstance(window, tuple):
        one_each = "Write (2, 2), not 2: the window has one size for each spatial axis."
        raise PoolingError("window_shape", "a sequence of integers", repr(window), one_each)
    rank = len(window)
    if len(shape) < rank + 1:
        spatial = ", ".join(f"spatial_{i}" for i in range(rank))
        fix = f"window_shape {window} has {rank} spatial axes, and features are last (NHWC, not NCHW)."
        raise PoolingError("inputs", f"shape (*batch, {spatial}, features)", f"shape {shape}", fix)
    if strides is not None and not (isinstance(strides, tuple) and len(strides) == rank):
        fix = f"window_shape is {window}; strides are along the same axes, without batch and features."
        raise PoolingError("strides", f"None or {rank} integers, one for each spatial axis", repr(strides), fix)
    if not (padding.upper() in LAX_PADDINGS if isinstance(padding, str) else _is_pairs(padding, rank)):
        expected = f"one of {', '.join(LAX_PADDINGS)}, or {rank} (before, after) pairs"
        raise PoolingError("padding", expected, repr(padding), f"window_shape is {window}; write ((1, 1), ...).")
    padding = padding.upper() if isinstance(padding, str) else padding
    return window, strides or (1,) * rank, padding


def _is_pairs(padding: Any, rank: int) -> bool:
    pairs = padding if isinstance(padding, tuple) else ()
    return len(pairs) == rank and all(map(is_pair, pairs))
