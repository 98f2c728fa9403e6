"""Short, readable reprs: nested, indented, arrays as shape and dtype.

Knows text only; what a thing shows of itself it passes in as (name, value) pairs.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_NUMBERS = 6


def show_value(value: Any) -> str:
    """An array as `float32[2,3]`, with its numbers if they are few; everything else as its repr."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        shape = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        return f"{shape} {_numbers(value)}".rstrip()
    return repr(value)


def _numbers(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer) or value.size > MAX_NUMBERS:
        return ""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ""
    if isinstance(value, jax.Array) and (value.is_deleted() or not value.is_fully_addressable):
        return ""
    return np.array2string(np.asarray(value), separator=", ").replace("\n", "")


def show_fields(name: str, fields: Iterable[tuple[str, Any]], brackets: str = "()") -> str:
    """`name(a=1, b=...)`, one field a line as soon as there is a nested one."""
    shown = [f"{key}{show_value(value)}" for key, value in fields]
    flat = f"{name}{brackets[0]}{', '.join(shown)}{brackets[1]}"
    if len(flat) <= 100 and "\n" not in flat:
        return flat
    body = ",\n".join("  " + text.replace("\n", "\n  ") for text in shown)
    return f"{name}{brackets[0]}\n{body}\n{brackets[1]}"


def size_of(arrays: Iterable[Any]) -> str:
    """`1,234 (4.8 KB)`: number of elements and bytes of arrays; empty for none."""
    count = size = 0
    for x in arrays:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            n = int(np.prod(x.shape))
            count, size = count + n, size + n * x.dtype.itemsize
    if not count:
        return ""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            break
        size /= 1024
    return f"{count:,} ({size:.1f} {unit})" if unit != "B" else f"{count:,} ({size} B)"
