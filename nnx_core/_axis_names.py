"""Names of the axes of a value, as axes come and go under vmap and scan.

Law: `remove_name(insert_name(names, i, name), i) == names`, for negative `i` and for no names too. Knows names only.
"""

from typing import Any


class PaddedNames(tuple[Any, ...]):
    """Axis names that were too few for a new named axis, filled up with None; remembers what they were."""

    before: tuple[Any, ...]
    index: int


def insert_name(names: Any, index: int, name: Any) -> tuple[Any, ...]:
    """Axis names after a new axis `name` appeared at `index` (negative: from the end of the names).

    Axes beyond the last name have none. `remove_name` with the same index is the exact inverse.
    """
    names = tuple(names)
    if index < 0:
        index += len(names) + 1
    if index <= len(names):
        return (*names[:index], name, *names[index:])
    if name is None:
        return names
    padded = PaddedNames((*names, *[None] * (index - len(names)), name))
    padded.before, padded.index = names, index
    return padded


def remove_name(names: Any, index: int) -> tuple[Any, ...]:
    """Axis names after the axis `index` is gone; the inverse of `insert_name`."""
    if isinstance(names, PaddedNames) and names.index == index:
        return names.before
    names = tuple(names)
    if index < 0:
        index += len(names)
    return (*names[:index], *names[index + 1 :])
