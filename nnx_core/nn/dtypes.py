"""The dtype a layer computes in.

Law: `dtype=None` means what JAX's promotion makes of the arguments, and at least a float where asked for one;
anything else is taken as it is. Results equal flax.linen's for every combination of dtypes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

Dtype = DTypeLike


class PromoteDtypeFn(Protocol):
    """`promote_dtype`, or what a user puts in its place."""

    def __call__(self, args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any: ...


def canonicalize_dtype(*args: ArrayLike | None, dtype: Dtype | None = None, inexact: bool = True) -> Dtype:
    """`dtype`, or the one that JAX's promotion gives `args`.

    Args:
      *args: arrays of any shape and dtype, or numbers; None is ignored.
      dtype: returned as it is, unless None.
      inexact: the result must be a floating or complex dtype: inferred integers become float32.

    Raises:
      ValueError: `dtype` is an integer dtype although `inexact`, or there is nothing to infer from.

    >>> import jax.numpy as jnp
    >>> canonicalize_dtype(jnp.ones(2, jnp.bfloat16), jnp.ones(3), None)
    dtype('float32')
    >>> canonicalize_dtype(jnp.arange(2))
    dtype('float32')
    >>> canonicalize_dtype(jnp.arange(2), inexact=False)
    dtype('int32')
    """
    if dtype is None:
        present = [x for x in args if x is not None]  # a list: a generator costs one more frame for each array
        dtype = jnp.result_type(*present)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"Dtype must be inexact (floating or complex): found {jnp.dtype(dtype)}. Pass such a dtype,"
            " or inexact=False where integers are meant."
        )
    return dtype


def promote_dtype(args: Sequence[ArrayLike | None], /, *, dtype: Dtype | None = None, inexact: bool = True) -> Any:
    """`args` as arrays of one dtype, which `canonicalize_dtype` chooses; None stays None.

    Unlike `flax.linen.dtypes.promote_dtype` it takes one tuple, not several arguments.

    >>> import jax.numpy as jnp
    >>> x, scale, bias = promote_dtype((jnp.ones(2, jnp.bfloat16), 2.0, None))
    >>> x.dtype, scale.dtype, bias
    (dtype(bfloat16), dtype(bfloat16), None)
    """
    dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    return tuple(None if x is None else jnp.asarray(x, dtype) for x in args)


def at_least_float32(x: jax.Array) -> Dtype:
    """The dtype to accumulate `x` in: half precision loses a sum over a few hundred terms."""
    return jnp.promote_types(x.dtype, jnp.float32)
