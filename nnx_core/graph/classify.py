"""How the walk treats a value, by its type; and what can change in it without telling.

Law: two readings of `contents` that are pairwise identical mean that nothing changed in a container.
Knows types and pytrees; knows nothing of walks, indices or groups.
"""

from collections.abc import Hashable, Sequence
from numbers import Number
from operator import is_
from typing import Any

import jax
import numpy as np

from nnx_core.graph.objects import Object, is_array
from nnx_core.state import State
from nnx_core.variables import Variable

VARIABLE, OBJECT, SEQUENCE, DICT, STATE, ARRAY, NUMBER, STATIC, PYTREE = range(9)
_kinds: dict[type, int] = {list: SEQUENCE, tuple: SEQUENCE, dict: DICT, type(None): STATIC, str: STATIC}


def kind_of(x: Any) -> int:
    """How the walk treats `x`; remembered per type."""
    kind = _kinds.get(type(x))
    if kind is None:
        kind = _kinds[type(x)] = _classify(x)
    return kind


def _classify(x: Any) -> int:
    if isinstance(x, Variable):
        return VARIABLE
    if isinstance(x, Object):
        return OBJECT
    if isinstance(x, State):
        return STATE
    if isinstance(x, type):
        return STATIC
    if isinstance(x, np.ndarray) or (is_array(x) and not isinstance(x, np.generic)):
        return ARRAY
    if isinstance(x, Number | np.generic):
        return NUMBER
    treedef = jax.tree.structure(x, is_leaf=lambda y: y is not x)
    is_leaf = jax.tree_util.treedef_is_leaf(treedef) and treedef.num_leaves == 1  # type: ignore[attr-defined]
    return STATIC if is_leaf else PYTREE


def one_level(x: Any) -> tuple[list[Hashable], list[Any], Any]:
    """Keys, children and treedef of one level of any registered pytree."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    keys: list[Hashable] = []
    children: list[Any] = []
    for path, child in pairs:
        keys.append(plain_key(path[0]) if path else 0)
        children.append(child)
    return keys, children, treedef


def plain_key(entry: Any) -> Hashable:
    """The key, name or index that an entry of a JAX key path stands for."""
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


def can_change(value: Any) -> bool:
    """Whether `value` is a container without change counter that may change: a list, a dict, a pytree of the user's.

    Tuples and namedtuples change only if what is in them does.
    """
    if isinstance(value, tuple):
        return any(map(can_change, value))
    return kind_of(value) in (SEQUENCE, DICT, PYTREE)


_OPEN, _CLOSE = object(), object()


def contents(container: Any) -> list[Any]:
    """Everything in a container, nested containers flattened between brackets; objects and States are not entered."""
    out: list[Any] = [_OPEN]
    if isinstance(container, dict):
        out += container
        children: Any = container.values()
    elif isinstance(container, list | tuple):
        children = container
    else:
        _, children, treedef = one_level(container)
        out += [type(container), *_aux(treedef)]
    for x in children:
        if kind_of(x) in (SEQUENCE, DICT, PYTREE):
            out += contents(x)
        else:
            out.append(x)
    out.append(_CLOSE)
    return out


def same_things(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same things: compared by identity, since == of arrays is an array."""
    return len(a) == len(b) and all(map(is_, a, b))


def _aux(treedef: Any) -> list[Any]:
    """What a pytree holds beside its children, item by item: a new tuple of the same items is no change."""
    data = treedef.node_data()
    if data is None:
        return [None]
    _, aux = data
    return list(aux) if isinstance(aux, tuple) else [aux]
