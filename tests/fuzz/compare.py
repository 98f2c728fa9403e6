"""What a user sees of a graph, as nested tuples that are equal iff two graphs are; and kinds of errors.

Law: two graphs of either library have equal portraits iff they agree in types, sharing, cycles, metadata, dtypes
and values, bit for bit. Calls no function that walks graphs in a library, so that it can judge them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import flax.nnx
import jax
import numpy as np

import nnx_core

LISTS = (nnx_core.List, flax.nnx.List)
DICTS = (nnx_core.Dict, flax.nnx.Dict)
VARIABLES = (nnx_core.Variable, flax.nnx.Variable)
OBJECTS = (nnx_core.Pytree, flax.nnx.Pytree, nnx_core.Rngs, nnx_core.RngStream)
RNG_STATE = (nnx_core.RngState, flax.nnx.RngState)
FLAX_METADATA = {"hijax", "ref", "eager_sharding"}  # what flax keeps of its own beside the user's metadata


class Planned(Exception):
    """Raised by a program on purpose."""


# ---- walking -------------------------------------------------------------------------------------------------


def members(x: Any) -> list[tuple[Any, Any]]:
    """(name, value) of everything one step below x, in the order that x has them."""
    if isinstance(x, (*LISTS, list, tuple)):
        return list(enumerate(x))
    if isinstance(x, (*DICTS, dict)):
        return list(x.items())
    return [(name, value) for name, value in vars(x).items() if not name.startswith("_")]


def in_walking_order(x: Any) -> list[tuple[Any, Any]]:
    """The members of x by name: in which order they were set is no part of where a walk goes."""
    return sorted(members(x), key=lambda item: item[0])


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def reachable(root: Any) -> list[Any]:
    """Every object and Variable under root, each once, in walking order."""
    seen: dict[int, Any] = {}

    def walk(x: Any) -> None:
        if isinstance(x, (*VARIABLES, *OBJECTS)):
            if id(x) in seen:
                return
            seen[id(x)] = x
        if isinstance(x, (*OBJECTS, list, tuple, dict)):
            for _, value in in_walking_order(x):
                walk(value)

    walk(root)
    return list(seen.values())


def variables_of(root: Any) -> list[Any]:
    return [x for x in reachable(root) if isinstance(x, VARIABLES)]


def objects_of(root: Any) -> list[Any]:
    return [x for x in reachable(root) if isinstance(x, OBJECTS)]


def plain_arrays(root: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(holder, name, array) of every array that is no Variable's value; a holder in a tuple cannot be written to."""
    holders: dict[int, Any] = {}

    def walk(x: Any) -> Iterator[tuple[Any, Any, Any]]:
        if id(x) in holders:
            return
        holders[id(x)] = x
        for name, value in in_walking_order(x):
            if is_array(value) and not isinstance(x, tuple):
                yield x, name, value
            elif isinstance(value, (*OBJECTS, list, tuple, dict)):
                yield from walk(value)

    yield from walk(root)


# ---- portraits -----------------------------------------------------------------------------------------------


def portrait(root: Any, *, origin: Sequence[Any] | None = None, values: bool = True, strict: bool = True) -> Any:
    """The whole graph under root.

    origin: what was reachable before some call. A member of it is drawn by its place there, so that equal
      portraits mean: the same old objects sit in the same places.
    values: False leaves the numbers out; then tracers can be drawn too.
    strict: False leaves out what flax does not keep: in which order members were set (it sorts them), and whether an
      array is numpy's (its jit hands JAX's back).
    """
    old = {id(x): i for i, x in enumerate(origin or ())}
    seen: dict[int, int] = {}

    def draw(x: Any) -> Any:
        if isinstance(x, (*VARIABLES, *OBJECTS)):
            if id(x) in seen:
                return "seen", seen[id(x)]
            seen[id(x)] = len(seen)
            who = type(x).__name__, old.get(id(x), "new")
            if isinstance(x, VARIABLES):
                return *who, _metadata(x), draw(x.get_value())
            return *who, _drawn_members(x)
        if isinstance(x, list | tuple | dict):
            return type(x).__name__, _drawn_members(x)
        if is_array(x):
            kind = "numpy" if strict and isinstance(x, np.ndarray | np.generic) else "array"
            return kind, str(x.dtype), tuple(x.shape), _bits(x) if values else None
        return "static", type(x).__name__, x

    def _drawn_members(x: Any) -> Any:
        names = tuple(name for name, _ in members(x)) if strict else ()
        return names, tuple((name, draw(value)) for name, value in in_walking_order(x))

    return draw(root)


def _metadata(variable: Any) -> tuple[tuple[str, Any], ...]:
    metadata = {key: value for key, value in variable.get_metadata().items() if key not in FLAX_METADATA}
    return tuple(sorted(metadata.items()))


def _bits(x: Any) -> tuple[Any, ...]:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    return (x.astype(np.float64) if x.dtype.kind not in "iub" else x).ravel().tolist(), x.tobytes()


def first_difference(expected: Any, actual: Any, path: str = "") -> str:
    """Where two portraits part, and what stands there."""
    if isinstance(expected, tuple) and isinstance(actual, tuple) and len(expected) == len(actual):
        for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
            if a != b:
                named = isinstance(a, tuple) and isinstance(b, tuple) and a[:1] == b[:1] != ()
                return first_difference(a, b, path + (f".{a[0]}" if named else f"[{i}]"))
    return f"at {path or 'the root'}: expected {expected!r}, got {actual!r}"


def tracers_in(root: Any) -> list[Any]:
    """What a failed or careless trace left behind."""
    cells = [leaf for v in variables_of(root) for leaf in jax.tree.leaves(v.get_value())]
    cells += [array for _, _, array in plain_arrays(root)]
    return [cell for cell in cells if isinstance(cell, jax.core.Tracer)]


# ---- errors --------------------------------------------------------------------------------------------------

#: No user's program here asks for these: they are a fault of the library, whatever the other way of running does.
CRASHES = (AssertionError, AttributeError, IndexError, KeyError, RecursionError, UnboundLocalError, StopIteration)


def kind_of(error: Exception) -> str:
    """ "planned", "refused" (the library says why it cannot), or the name of the class for what looks like a crash."""
    if isinstance(error, Planned):
        return "planned"
    if isinstance(error, jax.errors.UnexpectedTracerError) or not str(error):
        return type(error).__name__
    if isinstance(error, CRASHES) and not isinstance(error, nnx_core.NnxError):
        return type(error).__name__
    return "refused"
