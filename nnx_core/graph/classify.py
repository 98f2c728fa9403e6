"""How the walk treats a value, by its type; and what can change in it without telling.

Law: two readings of `contents` that are pairwise identical mean that nothing changed in a container.
Knows types and pytrees; knows nothing of walks, indices or groups.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from numbers import Number
from operator import is_
from typing import Any

import jax
import numpy as np

from nnx_core._changes import track
from nnx_core._errors import Path
from nnx_core._foreign import ForeignObjectError, is_foreign
from nnx_core.graph.objects import Object, is_array
from nnx_core.state import State, sorted_keys
from nnx_core.variables import Variable

VARIABLE, OBJECT, SEQUENCE, DICT, STATE, ARRAY, NUMBER, STATIC, PYTREE, FOREIGN = range(10)
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
    if is_foreign(type(x)):
        return FOREIGN
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


def children(x: Any, path: Path = ()) -> list[tuple[Hashable, Any]]:
    """(key, child) of one object, container or pytree, keys sorted; nothing for leaves and Variables.

    Raises:
      ForeignObjectError: if `x`, which is at `path`, is of another NNX library.
    """
    kind = kind_of(x)
    if kind == OBJECT:
        items = x._nnx_items()
        return [(key, items[key]) for key in sorted_keys(items)]
    if kind == DICT:
        return [(key, x[key]) for key in sorted_keys(x)]
    if kind == STATE:
        return children(x._mapping, path)
    if kind == SEQUENCE:
        return list(enumerate(x))
    if kind == PYTREE:
        keys, values, _ = one_level(x)
        return list(zip(keys, values, strict=True))
    if kind == FOREIGN:
        raise ForeignObjectError(path, type(x))
    return []


def plain_key(entry: Any) -> Hashable:
    """The key, name or index that an entry of a JAX key path stands for."""
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


def is_container(value: Any) -> bool:
    """Whether `value` is a container without identity: a list, a tuple, a dict, a State, a user's pytree."""
    return kind_of(value) in _CONTAINERS


def counting_states(value: Any) -> list[Any] | None:
    """The States that count every change of what `value` holds; None if it may change without being counted.

    A tuple changes only if what is in it does. A State counts its changes, those of a level of it at its root. A list,
    a dict and a user's pytree tell nobody.
    """
    kind = kind_of(value)
    if kind == STATE:
        return [value._root]
    if kind not in _CONTAINERS:
        return []
    if not isinstance(value, tuple):
        return None
    states: list[Any] = []
    for child in value:
        below = counting_states(child)
        if below is None:
            return None
        states += below
    return states


_CONTAINERS = (SEQUENCE, DICT, STATE, PYTREE)
_OPEN, _CLOSE, _ARRAY = object(), object(), object()


#: How deep plain containers may stand in one another; what is deeper holds itself.
_DEEPEST = 1_000


def contents(container: Any, *, deep: bool = True, depth: int = 0) -> Iterator[Any]:
    """What is in a container, one by one, nested containers between brackets; objects are not entered.

    An array stands for any array: another one in its place is a change of value, not of what the container holds.
    Without `deep` a State stands for its version, which counts its changes: a plan asks at every call.
    One by one, since a list that was made to hold itself has no end.

    Raises:
      RecursionError: if it is deeper than what anybody builds.
    """
    if depth > _DEEPEST:
        raise RecursionError
    kind = kind_of(container)
    yield _OPEN
    if kind == STATE and not deep:
        yield container
        yield track(container._root)
        yield _CLOSE
        return
    if kind == STATE:
        container = container._mapping
    if isinstance(container, dict):
        yield from container
        children: Any = container.values()
    elif isinstance(container, list | tuple):
        children = container
    else:
        _, children, treedef = one_level(container)
        yield type(container)
        yield from _aux(treedef)
    for x in children:
        child_kind = kind_of(x)
        if child_kind in _CONTAINERS:
            yield from contents(x, deep=deep, depth=depth + 1)
        else:
            yield _ARRAY if child_kind == ARRAY else x
    yield _CLOSE


def holds_still(container: Any, before: Sequence[Any], *, deep: bool = True) -> bool:
    """Whether the contents of `container` are those read `before`; read no further than to the first difference.

    By identity, since == of arrays is an array. Both end where their first bracket is closed, so neither can be
    the beginning of the other.
    """
    return kind_of(container) in _CONTAINERS and all(map(is_, before, contents(container, deep=deep)))


def plain_containers(value: Any) -> Iterator[Any]:
    """The lists, dicts and States in `value`, itself first: the containers that can be told from others like them.

    A tuple cannot be written to, so nobody can see whether it is the same one.
    """
    kind = kind_of(value)
    if kind not in _CONTAINERS:
        return
    if kind != PYTREE and not isinstance(value, tuple):
        yield value
    if kind == STATE:
        value = value._mapping
    children: Iterable[Any] = value.values() if isinstance(value, dict) else value
    if kind == PYTREE:
        children = one_level(value)[1]
    for child in children:
        yield from plain_containers(child)


def copied_containers(value: Any) -> Any:
    """`value` with new lists, dicts, tuples, States and other pytrees around the same things."""
    kind = kind_of(value)
    if kind not in _CONTAINERS:
        return value
    if kind == STATE:
        return type(value).over(copied_containers(value._mapping))
    if kind == DICT:
        return {key: copied_containers(child) for key, child in value.items()}
    if kind == SEQUENCE:
        return type(value)([copied_containers(child) for child in value])
    _, children, treedef = one_level(value)
    return treedef.unflatten([copied_containers(child) for child in children])


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
