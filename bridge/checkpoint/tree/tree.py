"""A checkpoint without its values: leaves, entries without content, and which nodes are lists.

Law: a tree has one order, node by node, in which a file that is written from start to end has its leaves.
Knows leaves by path; knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bridge._types import Path
from bridge.checkpoint.tree.layout import Layout, Leaf, detect
from bridge.checkpoint.tree.ops import Op, Read


@dataclass(frozen=True)
class Tree:
    """A checkpoint without its values.

    Attributes:
      leaves: every array, number and string by path, in the tree's order.
      empty: entries without content, path -> 'None', 'Dict', 'List' or 'Tuple'.
      sequences: paths of the nodes that are lists or tuples; every other node is a dict.
    """

    leaves: Mapping[Path, Leaf]
    empty: Mapping[Path, str] = field(default_factory=dict)
    sequences: frozenset[Path] = frozenset()

    @cached_property
    def layout(self) -> Layout:
        """What the paths say that the tree is, found once."""
        return detect([*self.leaves, *self.empty])

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in memory."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @cached_property
    def order(self) -> tuple[Path, ...]:
        """The leaves in their order, but node by node: so a file that is written from start to end has them.

        >>> paths = [("b", "x"), ("a",), ("b", "y")]
        >>> Tree({path: Leaf(path, (), "int8", 1) for path in paths}).order
        (('b', 'x'), ('b', 'y'), ('a',))
        """
        return tuple(path for path in depth_first(self) if path in self.leaves)


def read_of(leaf: Leaf) -> Read:
    """The leaf as it is."""
    return Read(leaf.path, leaf.shape, leaf.dtype)


def reads_of(leaves: Mapping[Path, Leaf]) -> dict[Path, Op]:
    """Each leaf as it is, under its path."""
    return {path: read_of(leaf) for path, leaf in leaves.items()}


def depth_first(tree: Tree) -> list[Path]:
    """Leaves and empty entries node by node: the nodes as they come in `tree`."""
    if () in tree.leaves or () in tree.empty:
        return [()]
    root: dict[str, Any] = {}
    for path in [*tree.leaves, *tree.empty]:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = None
    paths: list[Path] = []
    pending: list[tuple[Path, dict[str, Any] | None]] = [((), root)] if root else []
    while pending:
        path, below = pending.pop()
        if not below:
            paths.append(path)
            continue
        full = [key for key in below if (*path, key) not in tree.empty]
        ordered = _ordered(list(below), full)
        pending.extend(((*path, key), below[key]) for key in reversed(ordered))
    return paths


def _ordered(keys: list[str], full: list[str]) -> list[str]:
    """Where empty entries stood among the `full` ones, a Tree does not tell: indices and sorted keys do."""
    if all(key.isascii() and key.isdecimal() for key in keys) and full == sorted(full, key=int):
        return sorted(keys, key=int)
    return sorted(keys) if full == sorted(full) else keys
