"""Random object graphs as plain data, so that one graph can be built in nnx_core and in flax.nnx.

Law: `graph.build(library)` makes a fresh, equal graph at each call: a twin that needs no clone. Everything is
drawn from small integers, so that a program over it has one exact result in whatever order XLA computes it.
Knows the classes of a library by name alone; compares nothing and runs nothing.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

CELL_KINDS = ("Param", "BatchStat", "Cache", "Count")
THING_KINDS = ("Node", "Record", "List", "Dict", "Rngs")
SHAPES = ((), (2,), (3,))
DTYPES = ("float32", "int32", "bfloat16")
METADATA = ((), (("tag", "x"),), (("note", 1), ("tag", "y")))
NAMES = "abc"


class Settings:
    """An ordinary config object: it compares by value, can be changed, and so has no hash."""

    def __init__(self, width: int):
        self.width = width

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and other.width == self.width

    __hash__ = None  # type: ignore[assignment]  # what `__eq__` alone would do; said aloud, since it is the point

    def __repr__(self) -> str:
        return f"Settings({self.width})"


STATICS = (1, 2.5, True, "s", None, (1, "t"), jnp.tanh, Settings(3))


class Library:
    """The classes that a graph is made of, in one of the two libraries."""

    def __init__(self, nnx: ModuleType, own: Mapping[str, type] | None = None):
        """own: the user's classes Node, Record and Count; by default they are made."""
        self.nnx = nnx
        self.is_flax = nnx.__name__.startswith("flax")
        own = own or {
            "Node": type("Node", (nnx.Module,), {"__doc__": "A module without attributes of its own."}),
            "Record": type("Record", (nnx.Pytree,), {"__doc__": "An object that is not a module."}),
            "Count": type("Count", (nnx.Variable,), {"__doc__": "A Variable type of the user's own."}),
        }
        self._kinds = dict(own) | {kind: getattr(nnx, kind) for kind in (*CELL_KINDS, *THING_KINDS) if kind not in own}

    def kind(self, name: str) -> type:
        """The class of that name."""
        return self._kinds[name]

    def attach(self, x: Any, name: str, value: Any) -> None:
        """Gives x one more member, in the way of its type."""
        if isinstance(x, self.nnx.List):
            x.append(value)
        elif isinstance(x, self.nnx.Dict):
            x[name] = value
        else:
            setattr(x, name, self.marked(value) if self.is_flax else value)

    def marked(self, value: Any) -> Any:
        """What flax has to be told is data: a plain container (REQUIREMENTS 40), and what replaces a static
        (FAULTS A9: a mark belongs to a value, not to a name for ever)."""
        if isinstance(value, list | tuple | dict | jax.Array | np.ndarray | self.nnx.Variable | self.nnx.Pytree):
            return self.nnx.data(value)
        return value


@functools.cache
def library_of(nnx: ModuleType) -> Library:
    """One Library for each namespace, so that its classes are made once."""
    return Library(nnx)


def numbers(shape: tuple[int, ...], dtype: str, start: int) -> np.ndarray:
    """start, start + 1, ...: small integers, whatever the dtype."""
    size = int(np.prod(shape))
    return (np.arange(size) + start).reshape(shape).astype(jnp.dtype(dtype))


@dataclass(frozen=True)
class Cell:
    """A Variable."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    metadata: tuple[tuple[str, Any], ...]

    def build(self, library: Library) -> Any:
        value = jnp.asarray(numbers(self.shape, self.dtype, self.start))
        return library.kind(self.kind)(value, **dict(self.metadata))


@dataclass(frozen=True)
class Thing:
    """An object and its members: names with ("cell", i), ("thing", i), ("array" | "numpy", start),
    ("static", value), or ("list" | "tuple" | "dict", members)."""

    kind: str
    members: tuple[tuple[str, tuple[str, Any]], ...]

    def build(self, library: Library) -> Any:
        """The object without its members."""
        if self.kind == "Rngs":
            return library.nnx.Rngs(len(self.members))
        return library.kind(self.kind)()


@dataclass(frozen=True)
class Graph:
    """A root, `things[0]`, over a pool of objects and Variables wired at random."""

    cells: tuple[Cell, ...]
    things: tuple[Thing, ...]

    def build(self, library: Library) -> Any:
        cells = [cell.build(library) for cell in self.cells]
        things = [thing.build(library) for thing in self.things]

        def member(description: tuple[str, Any]) -> Any:
            match description:
                case ("cell", i):
                    return cells[i]
                case ("thing", i):
                    return things[i]
                case ("array", start):
                    return jnp.asarray(numbers((2,), "float32", start))
                case ("numpy", start):
                    return numbers((2,), "float32", start)
                case ("static", value):
                    return value
                case ("dict", items):
                    return {key: member(item) for key, item in items}
                case (kind, items):
                    return {"list": list, "tuple": tuple}[kind](map(member, items))

        for thing, x in zip(self.things, things, strict=True):
            if thing.kind == "Rngs":
                continue
            for name, description in thing.members:
                library.attach(x, name, member(description))
        return things[0]


def cells() -> st.SearchStrategy[Cell]:
    """Variables with small integers in them."""
    return st.builds(
        Cell,
        kind=st.sampled_from(CELL_KINDS),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        start=st.integers(0, 9),
        metadata=st.sampled_from(METADATA),
    )


def _named(member: st.SearchStrategy[Any], names: str, most: int) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(names), member, max_size=most).map(lambda items: tuple(items.items()))


def _containers(
    member: st.SearchStrategy[Any], in_tuples: st.SearchStrategy[Any], kinds: tuple[str, ...]
) -> list[st.SearchStrategy[Any]]:
    contents = {
        "list": st.lists(member, max_size=2).map(tuple),
        "tuple": st.lists(in_tuples, max_size=2).map(tuple),
        "dict": _named(member, "xy", 2),
    }
    return [st.tuples(st.just(kind), contents[kind]) for kind in kinds]


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    arrays: tuple[str, ...] = ("array", "numpy"),
    statics: tuple[Any, ...] = STATICS,
    containers: tuple[str, ...] = ("list", "tuple", "dict"),
    things: tuple[str, ...] = THING_KINDS,
) -> Graph:
    """Graphs with sharing, cycles, all kinds of Variables, arrays of JAX and numpy, containers and statics.

    An array never stands right in a tuple, where nobody could write to it.
    """
    pool = draw(st.lists(cells(), min_size=1, max_size=3))
    kinds = draw(st.lists(st.sampled_from(things), max_size=3))
    in_lists, in_objects = _members(len(pool), len(kinds), arrays, statics, containers)
    members = [draw(in_lists if kind in ("List", "Dict") else in_objects) for kind in ("Node", *kinds)]
    return connected(Graph(tuple(pool), tuple(map(Thing, ("Node", *kinds), members))))


def _members(
    n_cells: int, n_things: int, arrays: tuple[str, ...], statics: tuple[Any, ...], containers: tuple[str, ...]
) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    """What a List or Dict has: leaves by name. And what other objects have: containers too."""
    # By identity: of the statics some have no hash, and 1 and True are equal.
    key = (n_cells, n_things, arrays, tuple(map(id, statics)), containers)
    if key not in _MEMBERS:
        _MEMBERS[key] = _new_members(n_cells, n_things, arrays, statics, containers)
    return _MEMBERS[key]


_MEMBERS: dict[Any, Any] = {}  # to make a strategy takes longer than to draw from it


def _new_members(
    n_cells: int, n_things: int, arrays: tuple[str, ...], statics: tuple[Any, ...], containers: tuple[str, ...]
) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    cell = st.tuples(st.just("cell"), st.integers(0, n_cells - 1))
    thing = st.tuples(st.just("thing"), st.integers(0, n_things))
    in_tuples = st.one_of(cell, thing, st.tuples(st.just("static"), st.sampled_from(statics)))
    leaf = in_tuples
    if arrays:
        leaf = st.one_of(in_tuples, st.tuples(st.sampled_from(arrays), st.integers(0, 9)))
    nested = _containers(leaf, in_tuples, containers)
    if nested:
        nested += _containers(st.one_of(*nested), st.one_of(*nested), containers)
    return _named(leaf, NAMES, 3), _named(st.one_of(cell, leaf, *nested), NAMES, 3)


def connected(graph: Graph) -> Graph:
    """The graph, whose root has what it did not reach as further members."""
    root, *others = graph.things
    members = dict(root.members)
    everything = [("cell", i) for i in range(len(graph.cells))] + [("thing", i + 1) for i in range(len(others))]
    for part in reversed(everything):
        root = Thing(root.kind, tuple(members.items()))
        if part not in _reached(Graph(graph.cells, (root, *others))):
            members[f"{part[0]}_{part[1]}"] = part
    return Graph(graph.cells, (Thing(root.kind, tuple(members.items())), *others))


def _reached(graph: Graph) -> set[tuple[str, Any]]:
    seen: set[tuple[str, Any]] = set()

    def walk(description: tuple[str, Any]) -> None:
        kind, content = description
        if kind in ("cell", "thing"):
            if description in seen:
                return
            seen.add(description)
            members = graph.things[content].members if kind == "thing" else ()
            if kind == "thing" and graph.things[content].kind == "Rngs":
                return
            for _, member in members:
                walk(member)
        elif kind == "dict":
            for _, member in content:
                walk(member)
        elif kind in ("list", "tuple"):
            for member in content:
                walk(member)

    walk(("thing", 0))
    return seen
