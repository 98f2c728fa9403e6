"""Training states inside a larger tree: `{"state": TrainState, "epoch": 4}`.

Law: a state is told by the names of its own parts, never by the name that it has; of several none is chosen.
Knows trees and the names of a state's parts; reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bridge._types import Path
from bridge.checkpoint.tree.layout import Kind, Leaf
from bridge.checkpoint.tree.tree import Tree
from bridge.variables.kinds import LINEN_COLLECTIONS

_COUNTED = frozenset({"opt_state", "step"})
#: Layouts that a tree is taken for although a training state lies in it: its names look like those of modules.
_LOOK_LIKE_MODULES = (Kind.PARAMS_ONLY, Kind.NNX_STATE)


def states_in(tree: Tree) -> list[Path]:
    """Where training states lie below the root of a tree that is none itself; the outermost, in the tree's order.

    >>> paths = [("state", "params", "w"), ("state", "step"), ("epoch",)]
    >>> states_in(Tree({path: Leaf(path, (), "int8", 1) for path in paths}))
    [('state',)]
    """
    kind = tree.layout.kind
    if kind is not Kind.UNKNOWN and kind not in _LOOK_LIKE_MODULES:
        return []
    names = names_below([*tree.leaves, *tree.empty])
    places: list[Path] = []
    for path in names:
        if not path or any(path[: len(outer)] == outer for outer in places):
            continue
        if _is_training(path, names) or (kind is Kind.UNKNOWN and _are_variables(path, names)):
            places.append(path)
    return places


def below(tree: Tree, place: Path) -> Tree:
    """What lies at `place`, as a tree of its own; empty if nothing does."""
    if not place:
        return tree
    depth = len(place)
    leaves: dict[Path, Leaf] = {}
    for path, leaf in tree.leaves.items():
        if path[:depth] == place:
            leaves[path[depth:]] = Leaf(path[depth:], leaf.shape, leaf.dtype, leaf.nbytes)
    empty = {path[depth:]: kind for path, kind in tree.empty.items() if path[:depth] == place}
    return Tree(leaves, empty, frozenset(path[depth:] for path in tree.sequences if path[:depth] == place))


def around(tree: Tree, place: Path, state: Tree) -> Tree:
    """`tree` with another `state` at `place`.

    >>> paths = [("state", "w"), ("epoch",)]
    >>> tree = Tree({path: Leaf(path, (), "int8", 1) for path in paths})
    >>> list(around(tree, ("state",), Tree({("v",): Leaf(("v",), (), "int8", 1)})).leaves)
    [('state', 'v'), ('epoch',)]
    """
    depth = len(place)
    inside: dict[Path, Leaf] = {}
    for path, leaf in state.leaves.items():
        whole = (*place, *path)
        inside[whole] = Leaf(whole, leaf.shape, leaf.dtype, leaf.nbytes)
    leaves: dict[Path, Leaf] = {}
    for path, leaf in tree.leaves.items():
        leaves |= inside if path[:depth] == place else {path: leaf}
        if path[:depth] == place:
            inside = {}  # once, where the first of them was
    empty = {path: kind for path, kind in tree.empty.items() if path[:depth] != place}
    empty |= {(*place, *path): kind for path, kind in state.empty.items()}
    sequences = {path for path in tree.sequences if path[:depth] != place}
    sequences |= {(*place, *path) for path in state.sequences}
    return Tree({**leaves, **inside}, empty, frozenset(sequences))


def outside(tree: Tree, place: Path) -> list[Path]:
    """The leaves that do not lie at `place`."""
    return [path for path in tree.leaves if path[: len(place)] != place]


def names_below(paths: Iterable[Path]) -> dict[Path, set[str]]:
    """The keys of each node, in the order in which the nodes come, outer ones first."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        for depth, key in enumerate(path):
            names.setdefault(path[:depth], set()).add(key)
    return names


def _is_training(path: Path, names: Mapping[Path, set[str]]) -> bool:
    """Variables beside what an optimizer keeps, in Linen's names or NNX's."""
    own = names[path]
    if "params" in own and own & _COUNTED:
        return True
    return "model" in own and bool((names.get((*path, "optimizer"), set()) | own) & _COUNTED)


def _are_variables(path: Path, names: Mapping[Path, set[str]]) -> bool:
    """Collections of Linen and nothing else."""
    return (*path, "params") in names and names[path] <= LINEN_COLLECTIONS
