"""Random object graphs, effects on them, and portraits to compare them by: shared by all tests.

Law: two graphs have equal portraits iff they are isomorphic in types, sharing, cycles, metadata and values.
Knows what a user sees of an object: public attributes, items, Variables. It calls no function that walks
graphs in `nnx_core`, so that it can judge them.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import nnx_core as nnx
from tests.support.graphs import Graph, Library
from tests.support.graphs import graphs as drawn_graphs

LAW = settings(max_examples=60)  # nothing is compiled
COMPILED_LAW = settings(max_examples=25)  # an example compiles once or more


# ---- specimens: small modules with known arithmetic ----------------------------------------------------------


class Count(nnx.Variable):
    """A Variable type of the user's own: counts calls."""


class Affine(nnx.Module):
    """`x @ kernel`, counting its calls."""

    def __init__(self, n_in: int = 3, n_out: int = 3, *, seed: int = 0):
        self.n_in, self.n_out = n_in, n_out
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(seed), (n_in, n_out)))
        self.calls = Count(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Counts the call and multiplies: (..., n_in) -> (..., n_out)."""
        self.calls[...] += 1
        return x @ self.kernel[...]


class Tied(nnx.Module):
    """One Affine under three names; a second one beside it."""

    def __init__(self):
        self.encode = Affine()
        self.decode = self.encode
        self.layers = nnx.List([self.encode, Affine(seed=1)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The shared layer twice: its gradient has two terms."""
        return self.decode(self.encode(x))


def stack_of_affine(depth: int, n: int = 3) -> Affine:
    """One Affine whose Variables carry a leading axis of `depth` different layers, made without vmap."""
    stack = Affine(n, n)
    stack.kernel.set_value(jnp.stack([Affine(n, n, seed=i).kernel[...] for i in range(depth)]))
    stack.calls.set_value(jnp.zeros(depth, jnp.int32))
    return stack


# ---- what a user sees ------------------------------------------------------------------------------------------


def members(x: Any) -> list[tuple[Any, Any]]:
    """(name, value) of everything one step below an object, in the order that the object has them."""
    if isinstance(x, nnx.List):
        return list(enumerate(x))
    if isinstance(x, nnx.Dict):
        return list(x.items())
    return [(k, v) for k, v in vars(x).items() if not k.startswith("_")]


def _walking_order(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return sorted(items, key=lambda item: item[0])


def is_identity(x: Any) -> bool:
    """Whether x has an identity that transforms must keep."""
    return isinstance(x, nnx.Variable | nnx.Pytree)


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def reachable(root: Any) -> list[Any]:
    """Every object and Variable under root, each once, in walking order."""
    found: dict[int, Any] = {}

    def walk(x):
        if is_identity(x):
            if id(x) in found:
                return
            found[id(x)] = x
        if isinstance(x, nnx.Variable):
            walk(x.get_value())
        elif isinstance(x, nnx.Pytree):
            for _, value in _walking_order(members(x)):
                walk(value)
        elif isinstance(x, list | tuple):
            for value in x:
                walk(value)
        elif isinstance(x, dict):
            for _, value in _walking_order(x.items()):
                walk(value)

    walk(root)
    return list(found.values())


def variables_of(root: Any) -> list[nnx.Variable]:
    return [x for x in reachable(root) if isinstance(x, nnx.Variable)]


def objects_of(root: Any) -> list[nnx.Pytree]:
    return [x for x in reachable(root) if isinstance(x, nnx.Pytree)]


def portrait(root: Any, *, origin: Sequence[Any] = (), values: bool = True, shapes: bool = True) -> Any:
    """Nested tuples that are equal iff two graphs are isomorphic, order of members included.

    origin: what was reachable before some call. A member of it is drawn by its place there, so that equal
    portraits mean: the same old objects sit in the same places.
    values: False leaves the numbers out and keeps shapes and dtypes; then tracers can be drawn too.
    shapes: False leaves these out as well: what remains of an array is that it is one.
    """
    old = {id(x): i for i, x in enumerate(origin)}
    seen: dict[int, int] = {}

    def draw(x):
        if is_identity(x):
            if id(x) in seen:
                return "seen", seen[id(x)]
            seen[id(x)] = len(seen)
            who = type(x).__qualname__, old.get(id(x), "new")
            if isinstance(x, nnx.Variable):
                meta = tuple(sorted(x.get_metadata().items(), key=lambda item: item[0]))
                return *who, meta, draw(x.get_value())
            order = tuple(key for key, _ in members(x))
            return *who, order, tuple((key, draw(value)) for key, value in _walking_order(members(x)))
        if isinstance(x, list | tuple):
            return type(x).__name__, tuple(draw(value) for value in x)
        if isinstance(x, dict):
            return "dict", tuple(x), tuple((key, draw(value)) for key, value in _walking_order(x.items()))
        if is_array(x):
            form = (str(x.dtype), tuple(x.shape)) if shapes else ()
            return "array", *form, _bytes(x) if values else None
        return "static", x

    return draw(root)


def _bytes(x: Any) -> bytes:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def fingerprint(root: Any) -> int:
    """A number for the structure alone: inside a trace it is a constant, so a stale trace gives a stale one."""
    return zlib.crc32(repr(portrait(root, values=False)).encode()) >> 1


def assert_no_tracer(root: Any) -> None:
    for leaf in jax.tree.leaves([v.get_value() for v in variables_of(root)]):
        assert not isinstance(leaf, jax.core.Tracer), leaf
    for x in objects_of(root):
        for name, value in members(x):
            assert not isinstance(value, jax.core.Tracer), (type(x), name)


# ---- random graphs ---------------------------------------------------------------------------------------------


class Node(nnx.Module):
    """A module without attributes of its own."""


class Record(nnx.Pytree):
    """An object that is not a module."""


#: The classes above, for `tests.support.graphs`: there a graph is data, so that each `build` makes a fresh twin.
CORE = Library(nnx, {"Node": Node, "Record": Record, "Count": Count})


def recipes(things=("Node", "Record", "List", "Dict"), **options) -> st.SearchStrategy[Graph]:
    """Graphs as data, without Rngs: keys have no axis to map over, and what the laws write is numbers."""
    return drawn_graphs(things=things, **options)


def graphs(**options) -> st.SearchStrategy[nnx.Pytree]:
    """Fresh object graphs with sharing, cycles, containers, several Variable kinds, statics and plain arrays."""
    return recipes(**options).map(lambda graph: graph.build(CORE))


# ---- random effects --------------------------------------------------------------------------------------------


def _write(root, i, j):
    v = _pick(variables_of(root), i)
    if v is not None:
        v[...] = v[...] * 2


def _retag(root, i, j):
    v = _pick(variables_of(root), i)
    if v is not None:
        v.set_metadata(mark=j)


def _create(root, i, j):
    x = _pick(objects_of(root), i)
    CORE.attach(x, "fresh", nnx.Param(jnp.ones(2)))


def _alias(root, i, j):
    CORE.attach(_pick(objects_of(root), i), "again", _pick(reachable(root), j))


def _note(root, i, j):
    x = _pick(objects_of(root), i)
    CORE.attach(x, "note", f"seen {j}")


def _table(root, i, j):
    x = _pick(objects_of(root), i)
    CORE.attach(x, "table", jnp.arange(2.0))


def _rewrite(root, i, j):
    """A new value for a plain array."""
    for x in objects_of(root):
        for name, value in _walking_order(members(x)):
            if is_array(value) and not is_identity(value):
                if isinstance(x, nnx.List | nnx.Dict):
                    x[name] = value + 1
                else:
                    setattr(x, name, value + 1)
                return


def _grow(root, i, j):
    """One more member for each plain list and dict among the attributes of an object."""
    x = _pick(objects_of(root), i)
    for _, value in _walking_order(members(x)):
        if isinstance(value, list):
            value.append(nnx.Param(jnp.ones(2)))
        elif isinstance(value, dict):
            value["z"] = jnp.ones(2)


def _delete(root, i, j):
    x = _pick(objects_of(root), i)
    keys = [key for key, _ in members(x)]
    if not keys:
        return
    if isinstance(x, nnx.List | nnx.Dict):
        del x[keys[j % len(keys)]]
    else:
        delattr(x, keys[j % len(keys)])


def _pick(things, i):
    return things[i % len(things)] if things else None


EFFECTS = {f.__name__[1:]: f for f in (_write, _retag, _create, _alias, _note, _table, _rewrite, _grow, _delete)}


@dataclass(frozen=True)
class Effect:
    """Something a user's function does to its argument; the same on equal graphs."""

    name: str
    i: int
    j: int

    def apply(self, root: nnx.Pytree) -> None:
        EFFECTS[self.name](root, self.i, self.j)


def effects(names: Sequence[str] = tuple(EFFECTS), max_size: int = 4) -> st.SearchStrategy[list[Effect]]:
    """Lists of effects: writes, new and deleted members, aliases, metadata."""
    one = st.builds(Effect, name=st.sampled_from(list(names)), i=st.integers(0, 7), j=st.integers(0, 7))
    return st.lists(one, max_size=max_size)


def apply_all(todo: Iterable[Effect], root: nnx.Pytree) -> None:
    for effect in todo:
        effect.apply(root)
