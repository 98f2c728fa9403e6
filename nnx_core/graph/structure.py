"""What remains of an object graph when its leaves are taken out.

Law: structures are immutable and compare by content; two graphs have equal structures iff they differ in
nothing but the values of their leaves. Sharing and cycles are `Ref`s to an index that a `Node` or
`VariableDef` introduced earlier in walking order. Tuples underneath, so hashing and comparing run in C; the
`tag` keeps classes apart and `Static.kind` keeps 1, 1.0 and True apart.
"""

import math
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from types import GenericAlias
from typing import Any, NamedTuple, TypeAlias

import jax

from nnx_core._depth import ROOM
from nnx_core._errors import Path, SharedReferenceError
from nnx_core._statics import fixed, unfixed
from nnx_core.modes import sharing_allowed
from nnx_core.state import State, sorted_keys


class Static(NamedTuple):
    """A value that is part of the structure: configuration; `key` is what is hashed and compared of it."""

    kind: type
    key: Any
    tag: str = "static"

    @property
    def value(self) -> Any:
        """The value itself."""
        return unfixed(self.key)


def static(value: Any) -> Static:
    """`value` as configuration. 0.0 and -0.0 are two values, though Python says they are equal."""
    if type(value) is float and value == 0.0 and math.copysign(1.0, value) < 0:
        return Static(float, value, "static -0.0")
    return Static(type(value), fixed(value))


#: Tags of what comes out of a trace in which its `jax.Ref` was made: it travels as an array, and is put into a new Ref.
REF_LEAF, REF_VARIABLE = "leaf in a new ref", "variable in a new ref"


class Leaf(NamedTuple):
    """A loose value, which no object holds; it travels in group number `group`."""

    group: int
    tag: str = "leaf"

    @property
    def owned(self) -> bool:
        """Whether the value lives in a cell: one that belongs to a Variable or an object."""
        return False


class ArrayDef(NamedTuple):
    """The place of a plain array on an object, an `ArrayCell`; its value travels in group number `group`."""

    id: int
    group: int
    tag: str = "array"

    @property
    def owned(self) -> bool:
        """As of a `Leaf`."""
        return True


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

    @property
    def owned(self) -> bool:
        """As of a `Leaf`."""
        return True


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


Element: TypeAlias = Static | Leaf | ArrayDef | Ref | VariableDef | Node
#: What lives in a cell: `id` is its index.
CellDef: TypeAlias = ArrayDef | VariableDef
LeafDef: TypeAlias = Leaf | CellDef


#: The items of an object in its own order, static ones filled in, and the other keys with their elements.
Template: TypeAlias = tuple[dict[Hashable, Any], tuple[tuple[Hashable, Element], ...]]


def template_of(d: Node, known: dict[int, Template]) -> Template:
    """The Template of an object; remembered in `known`."""
    template = known.get(id(d))  # by identity: hashing a Node would hash everything below it
    if template is None:
        items: dict[Hashable, Any] = dict.fromkeys(d.keys if d.order is None else d.order)
        others: list[tuple[Hashable, Element]] = []
        for key, element in zip(d.keys, d.children, strict=True):
            if type(element) is Static:
                items[key] = element.value
            else:
                others.append((key, element))
        template = known[id(d)] = items, tuple(others)
    return template


class LeafPlace(NamedTuple):
    """How one leaf is found: its path, the index if it is a Variable's, and whether an object owns it."""

    path: Path
    id: int | None
    owned: bool


Layout: TypeAlias = tuple[LeafPlace, ...]

LEAVES = (Leaf, ArrayDef, VariableDef)


def nodes(element: Element, path: Path = ()) -> Iterator[tuple[Path, Element]]:
    """(path, element) of everything in `element`, depth first, itself first."""
    pending = [(path, element)]
    while pending:
        path, element = pending.pop()
        yield path, element
        if type(element) is Node:
            below = [((*path, key), child) for key, child in zip(element.keys, element.children, strict=True)]
            pending.extend(reversed(below))


def leaf_defs(element: Element) -> Iterator[tuple[Path, LeafDef]]:
    """(path, element) of every leaf in `element`, in walking order."""
    for path, d in nodes(element):
        if type(d) in LEAVES:
            yield path, d  # type: ignore[misc]  # one of `LeafDef`, as `LEAVES` says


#: `nnx.call`, from rooms above.
_call: Callable[[tuple[Any, ...]], Any]


def call_with(call: Callable[[tuple[Any, ...]], Any]) -> None:
    """Let `call` answer `GraphDef.apply`. A hook: `functional`, rooms above, knows how to merge."""
    global _call
    _call = call


@jax.tree_util.register_static
class GraphDef:
    """The structure of a graph, hashable: what `nnx.split` returns beside the States.

    Example:
      >>> import nnx_core as nnx
      >>> a, b = (nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(seed))) for seed in (0, 1))
      >>> a == b, hash(a) == hash(b)
      (True, True)
    """

    __slots__ = ("__weakref__", "_hash", "_layout", "_owns_all", "root", "templates")
    root: Element
    templates: dict[int, "Template"]  # of the Nodes in here, by identity; filled as they are needed

    def __init__(self, root: Element):
        self.root = root
        self._hash: int | None = None
        self._layout: Layout | None = None
        self._owns_all: bool | None = None
        self.templates = {}

    def __class_getitem__(cls, model: Any) -> GenericAlias:
        """`nnx.GraphDef[Model]`, as annotations say what it is the structure of."""
        return GenericAlias(cls, model)

    def apply(self, state: Any, *states: Any, graph: bool | None = None) -> Any:
        """`nnx.call` of this structure and the States: `graphdef.apply(state).method(x)`."""
        if not sharing_allowed(graph):
            _require_unshared(self.root)
        return _call((self, state, *states))

    def __hash__(self) -> int:
        if self._hash is None:
            with ROOM:
                self._hash = hash(self.root)
        return self._hash

    @property
    def layout(self) -> "Layout":
        """Where the leaves are, in walking order."""
        if self._layout is None:
            layout: list[LeafPlace] = []
            for path, d in leaf_defs(self.root):
                index = d.id if type(d) is VariableDef else None
                layout.append(LeafPlace(path, index, d.owned))
            self._layout = tuple(layout)
        return self._layout

    @property
    def owns_all(self) -> bool:
        """Whether no leaf is loose: the usual case, where the values alone are all leaves in walking order."""
        if self._owns_all is None:
            self._owns_all = all(leaf.owned for leaf in self.layout)
        return self._owns_all

    @property
    def paths(self) -> list[Path]:
        """The paths of the leaves, in walking order."""
        return [leaf.path for leaf in self.layout]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, GraphDef) or hash(self) != hash(other):
            return False
        with ROOM:
            return self.root == other.root

    def __repr__(self) -> str:
        elements = [element for _, element in nodes(self.root)]
        objects = sum(type(element) is Node and element.id is not None for element in elements)
        variables = sum(type(element) is VariableDef for element in elements)
        kind = getattr(self.root, "kind", type(self.root)).__name__
        return f"GraphDef({kind}, {objects} objects, {variables} variables)"

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphDef, (self.root,)


@jax.tree_util.register_pytree_with_keys_class
class GraphState(MutableMapping[Any, Any]):
    """A State together with the structure it is a part of: what `nnx.unpack` returns and `nnx.merge` takes.

    A mapping like the State itself, and a pytree of it; the structure travels as static data.
    """

    __slots__ = ("_graphdef", "_state")

    def __init__(self, _graphdef: GraphDef, _state: State):
        object.__setattr__(self, "_graphdef", _graphdef)
        object.__setattr__(self, "_state", _state)

    def __class_getitem__(cls, model: Any) -> GenericAlias:
        """`nnx.GraphState[Model]`, as annotations say what it is the state of."""
        return GenericAlias(cls, model)

    def __getattr__(self, name: str) -> Any:
        if name in GraphState.__slots__:
            raise AttributeError(name)  # not filled yet (copy, pickle)
        return getattr(self._state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._state[name] = value

    def __delattr__(self, name: str) -> None:
        del self._state[name]

    def __getitem__(self, key: Hashable) -> Any:
        return self._state[key]

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self._state[key] = value

    def __delitem__(self, key: Hashable) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return f"GraphState({self._graphdef}, {self._state})"

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphState, (self._graphdef, self._state)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """For JAX: the children of the State, under their own keys."""
        if not isinstance(self._state, State):  # of a lone Variable or array
            return [(jax.tree_util.GetAttrKey("state"), self._state)], (self._graphdef, None)
        keys = tuple(sorted_keys(self._state))
        return [(jax.tree_util.DictKey(k), self._state[k]) for k in keys], (self._graphdef, keys)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "GraphState":
        """For JAX: the inverse."""
        graphdef, keys = aux
        if keys is None:
            return cls(graphdef, *children)
        pairs = zip(keys, children, strict=True)
        return cls(graphdef, State.over({k: c._mapping if isinstance(c, State) else c for k, c in pairs}))


def _require_unshared(root: Element) -> None:
    first: dict[int, tuple[str, Path]] = {}
    for path, element in nodes(root):
        if type(element) is Ref:
            kind, before = first[element.id]
            raise SharedReferenceError(kind, before, path)
        if type(element) in (Node, VariableDef) and element.id is not None:  # type: ignore[union-attr]  # these have
            first[element.id] = element.kind.__name__, path  # type: ignore[union-attr]
