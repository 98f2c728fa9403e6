"""Axes and sizes as options of a layer: one integer, or one for each of several.

Law: what a layer keeps is hashable, since options are part of the key of a compiled function; arrays, lists and
numpy's integers are taken for the tuples and integers that they hold. Knows no layer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

Axes = int | Sequence[int]
Shape = tuple[int, ...]


def hashable(option: Any) -> Any:
    """Lists and arrays as tuples, at every depth, and numpy's numbers as Python's; all else as it is.

    >>> hashable([[0, 1], [2, 3]]), hashable("SAME"), hashable(np.int64(3)), hashable(np.arange(2)), hashable(None)
    (((0, 1), (2, 3)), 'SAME', 3, (0, 1), None)
    """
    if isinstance(option, np.ndarray | np.generic | jax.Array):
        option = option.tolist()
    if isinstance(option, Sequence) and not isinstance(option, str):
        return tuple(map(hashable, option))
    return option


def as_tuple(sizes: Axes) -> tuple[int, ...]:
    """`sizes` as a tuple; a single integer means one axis."""
    sizes = hashable(sizes)
    return tuple(map(hashable, sizes)) if isinstance(sizes, Iterable) else (sizes,)
