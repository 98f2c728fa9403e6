"""Linen's entries without content, and its lists: what a TrainState has on disk beside its leaves.

NNX has neither, so on the way to Linen they come from the note of an earlier conversion, from `tx`, or from the keys:
digits are the indices of a list, and a gap among them is an EmptyState.
Law: none of them hides or holds a leaf; a node is a list only if its keys are 0, 1, ... without a gap.
Knows paths and keys; knows nothing of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bridge._types import Path
from bridge.checkpoint.tree.canonical import Form, Key, Role

_ROOT = ("opt_state",)


@dataclass(frozen=True)
class EmptyNodes:
    """Entries without content, path -> 'None', 'Dict', ...; and nodes that are lists."""

    empty: Mapping[Path, str] = field(default_factory=dict)
    sequences: frozenset[Path] = frozenset()


def from_keys(keys: Iterable[Key]) -> EmptyNodes:
    """What the keys of an optimizer state tell: lists, and gaps in them.

    EmptyStates at the end of a chain leave no trace.

    >>> from_keys([Key(Role.OPTIMIZER, ("1", "count"))]).empty
    {('opt_state', '0'): 'None'}
    """
    below: dict[Path, set[str]] = {}
    for key in keys:
        if key.role is Role.OPTIMIZER:
            for depth, name in enumerate(key.prefix):
                below.setdefault((*_ROOT, *key.prefix[:depth]), set()).add(name)
            if key.location is not None and key.prefix:
                below.setdefault((*_ROOT, *key.prefix), set()).add("")  # of params: a dict
            elif key.location is not None:
                below.setdefault(_ROOT, set()).add("")
    # The labels of a multi_transform may be digits too.
    lists = {at: names for at, names in below.items() if at[-1] != "inner_states" and all(map(str.isdecimal, names))}
    empty = {
        (*at, str(index)): "None"
        for at, names in lists.items()
        for index in range(max(map(int, names)))
        if str(index) not in names
    }
    return EmptyNodes(empty, frozenset(lists))


def tails(keys: Iterable[Key], form: Form) -> frozenset[Path]:
    """Lists below a param: SM3 keeps one vector for each axis."""
    listed = [key for key in keys if key.location is not None and key.tail and key.tail[-1].isdecimal()]
    return frozenset(form.path(key)[:-1] for key in listed)


def fitting(found: EmptyNodes, paths: Iterable[Path]) -> EmptyNodes:
    """Those that go with leaves and masked params at these paths."""
    taken = set(paths)
    above = {path[:depth] for path in (*taken, *found.empty) for depth in range(len(path))}
    empty = {
        path: kind
        for path, kind in found.empty.items()
        if path not in taken and path not in above and not any(path[:depth] in taken for depth in range(len(path)))
    }
    below: dict[Path, set[str]] = {}
    for path in (*taken, *empty):
        for depth in range(len(path)):
            below.setdefault(path[:depth], set()).add(path[depth])
    lists = {at for at in found.sequences if below.get(at) == set(map(str, range(len(below.get(at, ())))))}
    return EmptyNodes(empty, frozenset(lists))


def called(empty: Mapping[Path, str], name: str, keys: Iterable[Key]) -> dict[Path, str]:
    """Entries without content of the optimizer under another name; not those among params, which are empty modules."""
    nodes = {(*_ROOT, *key.prefix) for key in keys if key.role is Role.OPTIMIZER and key.location is not None}

    def is_state(path: Path) -> bool:
        return path[:1] == _ROOT and not any(path[:depth] in nodes for depth in range(1, len(path)))

    # flax.serialization writes () as {} too; Orbax has a name of its own for it.
    other = ("None", "Dict") if name == "None" else ("None", "Dict", "Tuple", "List")
    return {path: name if is_state(path) and kind in other else kind for path, kind in empty.items()}
