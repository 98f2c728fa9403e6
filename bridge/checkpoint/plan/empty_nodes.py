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
from bridge.checkpoint.tree.inner import names_below

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
    paths: list[Path] = []
    for key in keys:
        if key.role is Role.OPTIMIZER:
            of_params = ("",) if key.location is not None else ()  # a key that is no number: params are a dict
            paths.append((*_ROOT, *key.prefix, *of_params))
    empty: dict[Path, str] = {}
    lists: set[Path] = set()
    for path, names in names_below(paths).items():
        is_label = path[-1:] == ("inner_states",)  # of a multi_transform; labels may be digits too
        if path[:1] != _ROOT or is_label or not all(map(str.isdecimal, names)):
            continue
        lists.add(path)
        for index in map(str, range(max(map(int, names)))):
            if index not in names:
                empty[(*path, index)] = "None"
    return EmptyNodes(empty, frozenset(lists))


def tails(keys: Iterable[Key], form: Form) -> frozenset[Path]:
    """Lists below a param: SM3 keeps one vector for each axis."""
    listed = [key for key in keys if key.location is not None and key.tail and key.tail[-1].isdecimal()]
    return frozenset(form.path(key)[:-1] for key in listed)


def fitting(nodes: EmptyNodes, paths: Iterable[Path]) -> EmptyNodes:
    """Those that go with leaves and masked params at these paths."""
    taken = set(paths)
    above = names_below((*taken, *nodes.empty))
    empty: dict[Path, str] = {}
    for path, kind in nodes.empty.items():
        inside = any(path[:depth] in taken for depth in range(len(path) + 1))
        if not inside and path not in above:
            empty[path] = kind
    below = names_below((*taken, *empty))
    lists: set[Path] = set()
    for path in nodes.sequences:
        names = below.get(path)
        if names is not None and names == set(map(str, range(len(names)))):
            lists.add(path)
    return EmptyNodes(empty, frozenset(lists))


def called(empty: Mapping[Path, str], name: str, keys: Iterable[Key]) -> dict[Path, str]:
    """Entries without content of the optimizer under another name; not those among params, which are empty modules."""
    nodes = {(*_ROOT, *key.prefix) for key in keys if key.role is Role.OPTIMIZER and key.location is not None}

    def is_state(path: Path) -> bool:
        return path[:1] == _ROOT and not any(path[:depth] in nodes for depth in range(1, len(path)))

    # flax.serialization writes () as {} too; Orbax has a name of its own for it.
    others = ("None", "Dict") if name == "None" else ("None", "Dict", "Tuple", "List")
    renamed = dict(empty)
    for path, kind in empty.items():
        if kind in others and is_state(path):
            renamed[path] = name
    return renamed
