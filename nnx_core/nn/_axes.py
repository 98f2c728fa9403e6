"""Axes and sizes as options of a layer: one integer, or one for each of several.

Law: what a layer keeps is hashable, since options are part of the key of a compiled function. Knows no layer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Axes = int | Sequence[int]
Shape = tuple[int, ...]


def hashable(option: Any) -> Any:
    """Lists and numpy arrays as tuples, at every depth; all else as it is.

    >>> hashable([[0, 1], [2, 3]]), hashable("SAME"), hashable(3), hashable(None)
    (((0, 1), (2, 3)), 'SAME', 3, None)
    """
    if isinstance(option, Sequence | np.ndarray) and not isinstance(option, str):
        return tuple(map(hashable, option))
    return option


def as_tuple(sizes: Axes) -> tuple[int, ...]:
    """`sizes` as a tuple; a single integer means one axis."""
    return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
