"""Short, readable reprs: nested, indented, arrays as shape and dtype.

Knows text only; what a thing shows of itself it passes in as (name, value) pairs.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def show_value(value: Any) -> str:
    """An array as `float32[2,3]`, a small or concrete scalar as itself, everything else as its repr."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)


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
