"""Cells: where a value lives that may be read and written while the structure around it stays.

A Variable is a cell. So is each plain array that an object holds, as an attribute or somewhere in the plain
containers of one: an `ArrayCell`, which is that place, and not the array in it.

Law: both kinds have `_raw_value`, and `write_cell` writes both, so nobody has to ask which one it is.
Knows objects and containers; knows nothing of walks, indices or groups.
"""

import weakref
from collections.abc import Hashable
from typing import Any, TypeAlias

from nnx_core.graph.classify import DICT, SEQUENCE, STATE, kind_of, one_level
from nnx_core.graph.objects import Object
from nnx_core.variables import Variable, set_raw

#: From an object down to an array in it: its own key first; below, keys of containers, and positions among the
#: children of a pytree that only JAX can open.
Way: TypeAlias = tuple[Hashable, ...]


class ArrayCell:
    """The place of a plain array on an object. The object is held weakly: a plan must not keep it alive."""

    __slots__ = ("_owner", "way")

    def __init__(self, owner: Object, way: Way):
        self._owner = weakref.ref(owner)
        self.way = way

    @property
    def owner(self) -> Object:
        """The object, which has to be alive."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"the object that held the array at {self.way} is gone")
        return owner

    @property
    def _raw_value(self) -> Any:  # the name that a Variable's value has
        value = self.owner._nnx_storage()[self.way[0]]
        for key in self.way[1:]:
            value = _child(value, key)
        return value

    def put(self, value: Any) -> None:
        """Let `value` stand here. No change of structure, so none is counted."""
        storage = self.owner._nnx_storage()
        first, *rest = self.way
        storage[first] = _with(storage[first], rest, value) if rest else value


Cell: TypeAlias = Variable[Any] | ArrayCell


def write_cell(cell: Cell, value: Any) -> None:
    """Let `value` stand in `cell`; no hooks, no check of the trace."""
    if isinstance(cell, ArrayCell):
        cell.put(value)
    else:
        set_raw(cell, value)


def require_writable(cell: Cell) -> None:
    """Raise TraceError if `cell` belongs to another trace."""
    if isinstance(cell, ArrayCell):
        cell.owner._nnx_check_can_write(str(cell.way[0]))
    else:
        cell._check_can_write()


def _child(container: Any, key: Any) -> Any:
    kind = kind_of(container)
    if kind in (SEQUENCE, DICT):
        return container[key]
    return container._mapping[key] if kind == STATE else one_level(container)[1][key]


def _with(container: Any, way: list[Any], value: Any) -> Any:
    """`container` with `value` at the end of `way`: itself where it can be written to, else a new one."""
    if not way:
        return value
    key, *rest = way
    kind = kind_of(container)
    if type(container) in (list, dict) or kind == STATE:
        storage = container._mapping if kind == STATE else container
        storage[key] = _with(storage[key], rest, value)
        return container
    if kind == SEQUENCE:
        children = list(container)
        children[key] = _with(children[key], rest, value)
        return type(container)(children)
    _, children, treedef = one_level(container)
    children[key] = _with(children[key], rest, value)
    return treedef.unflatten(children)
