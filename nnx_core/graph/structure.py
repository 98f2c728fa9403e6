"""What remains of an object graph when its leaves are taken out.

Law: structures are immutable and compare by content; two graphs have equal structures iff they differ in
nothing but the values of their leaves. Sharing and cycles are `Ref`s to an index that a `Node` or
`VariableDef` introduced earlier in walking order. Tuples underneath, so hashing and comparing run in C; the
`tag` keeps classes apart and `Static.kind` keeps 1, 1.0 and True apart.
"""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax

from nnx_core._errors import Path, StaticAttributeError


class Static(NamedTuple):
    """A value that is part of the structure: configuration."""

    kind: type
    value: Any
    tag: str = "static"


class Leaf(NamedTuple):
    """A value that travels in group number `group`; `owned` if it is an attribute of an object."""

    group: int
    owned: bool
    tag: str = "leaf"


class Ref(NamedTuple):
    """What is already known under the index `id`."""

    id: int
    tag: str = "ref"


class VariableDef(NamedTuple):
    """A Variable seen for the first time; its value travels in group number `group`."""

    kind: type
    id: int
    metadata: tuple[tuple[str, Any], ...]
    group: int
    tag: str = "variable"


class Node(NamedTuple):
    """An object seen for the first time, or (id None) a container without identity.

    `order` lists the keys as the object holds them, where that differs from the sorted `keys`.
    `extra` is what the kind of node needs to be rebuilt: attribute marks, or a treedef.
    """

    kind: type
    id: int | None
    keys: tuple[Hashable, ...]
    children: tuple["Element", ...]
    order: tuple[Hashable, ...] | None
    extra: Any
    tag: str = "node"

    def rebuild(self, children: list[Any]) -> Any:
        """A list, tuple or other pytree from its children; not for objects, dicts and States."""
        make: Any = self.kind if self.extra is None else self.extra.unflatten
        return make(children)


Element: TypeAlias = Static | Leaf | Ref | VariableDef | Node


def nodes(element: Element, path: Path = ()) -> Iterator[tuple[Path, Element]]:
    """(path, element) of everything in `element`, depth first, itself first."""
    yield path, element
    if type(element) is Node:
        for key, child in zip(element.keys, element.children, strict=True):
            yield from nodes(child, (*path, key))


@jax.tree_util.register_static
class GraphDef:
    """The structure of a graph, hashable: what `nnx.split` returns beside the States.

    Example:
      >>> import nnx_core as nnx
      >>> a, b = (nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(seed))) for seed in (0, 1))
      >>> a == b, hash(a) == hash(b)
      (True, True)
    """

    __slots__ = ("__weakref__", "_hash", "root")
    root: Element

    def __init__(self, root: Element):
        self.root = root
        self._hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            try:
                self._hash = hash(self.root)
            except TypeError:
                _raise_unhashable(self.root)
                raise
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, GraphDef) and hash(self) == hash(other) and self.root == other.root

    def __repr__(self) -> str:
        defs = [e for _, e in nodes(self.root)]
        objects = sum(type(e) is Node and e.id is not None for e in defs)
        variables = sum(type(e) is VariableDef for e in defs)
        kind = getattr(self.root, "kind", type(self.root)).__name__
        return f"GraphDef({kind}, {objects} objects, {variables} variables)"

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphDef, (self.root,)


def _raise_unhashable(root: Element) -> None:
    for path, element in nodes(root):
        try:
            hash(element)
        except TypeError:
            if type(element) is Static:
                raise StaticAttributeError(path, element.value) from None
            if type(element) is VariableDef:
                for name, value in element.metadata:
                    try:
                        hash(value)
                    except TypeError:
                        raise StaticAttributeError((*path, name), value) from None
