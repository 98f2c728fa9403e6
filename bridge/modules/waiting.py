"""Linen variables on their way into a tree of modules that is only made while it runs, and out of it again.

Until something asks for them, variables wait: nested dicts {collection: {name: ... Variable}}. What takes them keeps
the very Variables; what nobody took goes back as it came.
Law: nothing is made up: a Variable that a module has and the variables lack is an error, as Linen raises it.
Knows nested dicts, Variables and NNX modules; knows nothing of bridge.Module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import jax
import numpy as np

import nnx_core as nnx
from bridge.nnx_in_linen.host import Host, LinenRngs, LinenStream, MissingRng, give_back_streams, hosted
from bridge.variables.kinds import variable_type
from bridge.variables.mapping import EMPTY, Location, leaves, nest, variable_location
from bridge.variables.metadata import to_nnx_variable
from bridge.variables.places import attach, hand_over
from nnx_core.graph.walk import children

#: {collection: {name: ... Variable}}
Waiting = dict[str, Any]


def waiting_of(variables: Mapping[str, Any]) -> Waiting:
    """New Variables for Linen variables, which are not changed; keys of lists may be integers.

    >>> waiting_of({"params": {"layers": {0: 1.0}}})["params"]["layers"]["0"]
    Param(1.0)
    """
    waiting: Waiting = {}
    for at, value in leaves({key: _with_string_keys(tree) for key, tree in variables.items()}):
        if value is not EMPTY:
            put(waiting, at, to_nnx_variable(at[0], value))
    return waiting


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping) or not all(isinstance(key, str | int) for key in tree):
        return tree
    return {str(key): _with_string_keys(child) for key, child in tree.items()}


def put(waiting: Waiting, at: Location, variable: Any) -> None:
    """Let `variable` wait at a location."""
    for key in at[:-1]:
        waiting = waiting.setdefault(key, {})
    waiting[at[-1]] = variable


def take(waiting: Waiting, names: tuple[str, ...], kind: type = dict) -> Waiting:
    """What waits at `names` in every collection, levels or (`kind`) Variables; it waits there no longer."""
    found = {collection: _pop(tree, names, kind) for collection, tree in waiting.items()}
    return {collection: x for collection, x in found.items() if x is not None}


def take_one(waiting: Waiting, collection: str, name: str) -> nnx.Variable[Any] | None:
    """The Variable that waits at `name`, or one of all that waits below `name`; None if nothing does."""
    found = waiting.get(collection, {}).pop(name, None)
    return variable_type(collection)(_values(found)) if isinstance(found, dict) else found


def _pop(tree: dict[str, Any], names: tuple[str, ...], kind: type) -> Any:
    for key in names[:-1]:
        tree = tree.get(key, {})
        if not isinstance(tree, dict):
            return None
    return tree.pop(names[-1]) if isinstance(tree.get(names[-1]), kind) else None


def _values(tree: Any) -> Any:
    return {key: _values(child) for key, child in tree.items()} if isinstance(tree, dict) else tree.get_raw_value()


def flat(waiting: Any, at: Location = ()) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of all that waits."""
    for key, child in waiting.items():
        if isinstance(child, dict):
            yield from flat(child, (*at, key))
        else:
            yield (*at, key), child


class Parked(nnx.Dict[Any]):
    """Variables that wait in a module that is kept: in its graph they have the paths that they will have."""


def parked(waiting: Waiting) -> dict[str, Parked]:
    """name -> what waits below this name; Variables at the top are left out."""
    found: dict[str, dict[Location, nnx.Variable[Any]]] = {}
    for at, variable in flat(waiting):
        if len(at) > 2:
            found.setdefault(at[1], {})[at[0], *at[2:]] = variable
    return {name: Parked(nest(variables, Parked)) for name, variables in found.items()}


# ---- errors, as Linen raises them ----


def place(location: Location) -> tuple[str, str]:
    """(name, path of its scope) as Linen's errors show them."""
    return location[-1], "/" + "/".join(location[1:-1])


def not_found(location: Location, *, empty: bool) -> Exception:
    """What Linen raises for a variable that is missing; `empty`: so is its collection."""
    collection, (name, path) = location[0], place(location)
    if empty:
        return flax.errors.ScopeCollectionNotFound(collection, name, path)
    if collection == "params":
        return flax.errors.ScopeParamNotFoundError(name, path)
    return flax.errors.ScopeVariableNotFoundError(name, collection, path)


def check_shape(at: Location, variable: nnx.Variable[Any], make: Callable[[Any], Any]) -> None:
    """Raise ScopeParamShapeError unless `variable` has the shape that its initializer gives."""

    def initial() -> Any:
        made = make(jax.random.key(0))
        return made.raw_value if isinstance(made, nnx.VariableMetadata) else made  # a box is a pytree of its value

    pairs = zip(jax.tree.leaves(variable.get_raw_value()), jax.tree.leaves(jax.eval_shape(initial)), strict=False)
    for found, expected in pairs:
        if np.shape(found) != expected.shape:
            raise flax.errors.ScopeParamShapeError(*place(at), np.shape(found), expected.shape)


# ---- NNX modules ----


def state_of(x: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of everything in an NNX value but random state, at `names`; shared ones once."""
    yield from _state_of(x, names, set())


def _state_of(x: Any, names: tuple[str, ...], seen: set[int]) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    if isinstance(x, nnx.Variable | nnx.Object):
        if id(x) in seen:
            return
        seen.add(id(x))
    if isinstance(x, nnx.Variable):
        if not isinstance(x, nnx.RngState):
            yield variable_location(names, type(x)), x
        return
    for key, child in children(x):
        yield from _state_of(child, (*names, str(key)), seen)


def fill(child: Any, waiting: Waiting, path: tuple[str, ...], may_make: Callable[[str], bool]) -> Waiting:
    """Give the NNX module `child`, which is at `path`, the values that wait for it; what no place was found for.

    Raises:
      ScopeParamNotFoundError, ScopeVariableNotFoundError, ScopeCollectionNotFound: if one is missing that may not be
        made now.
      ScopeParamShapeError: if a parameter has another shape.
    """
    found: dict[int, nnx.Variable[Any]] = {}
    for at, variable in state_of(child):
        tree = waiting
        for key in at[:-1]:
            tree = tree.get(key, {}) if isinstance(tree, dict) else {}
        if isinstance(tree, dict) and at[-1] in tree:
            found[id(variable)] = _fitting(variable, tree.pop(at[-1]), (at[0], *path, *at[1:]))
        elif not may_make(at[0]):
            raise not_found((at[0], *path, *at[1:]), empty=at[0] not in waiting)
    _put_in_place(child, found)
    rest: Waiting = {}
    for at, variable in list(flat(waiting)):
        if not (hand_over(child, at, variable) or attach(child, at, variable)):
            put(rest, at, variable)
    return rest


def _fitting(variable: nnx.Variable[Any], new: Any, at: Location) -> nnx.Variable[Any]:
    """The Variable that waited in place of `variable`, or, of another type, `variable` with its value."""
    value, expected = _values(new), getattr(variable.get_raw_value(), "shape", None)
    if at[0] == "params" and expected is not None and np.shape(value) != expected:
        raise flax.errors.ScopeParamShapeError(*place(at), np.shape(value), expected)
    metadata = new.get_metadata() if isinstance(new, nnx.Variable) else {}
    same = type(new) is type(variable)
    if same and (more := variable.get_metadata()):
        new.set_metadata(**{**more, **metadata})
    if not same:
        variable.set_raw_value(value)
        if metadata:
            variable.set_metadata(**metadata)
    return new if same else variable


def _put_in_place(child: Any, found: Mapping[int, nnx.Variable[Any]]) -> None:
    """Replace the Variables in `child`, by id; one that is in a plain list or dict gets the value instead."""
    for _, owner in list(nnx.iter_graph(child)):
        if isinstance(owner, nnx.Object):
            items = owner._nnx_items().items()
            changed = {key: found[id(x)] for key, x in items if isinstance(x, nnx.Variable) and id(x) in found}
            if changed:
                owner._nnx_assign(changed, ())
    for _, variable in state_of(child):
        if (new := found.get(id(variable))) is not None and new is not variable:
            variable.set_raw_value(new.get_raw_value())


def abstract(factory: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs, module: str) -> Any:
    """What `factory` makes, without its numbers; its random streams are those in `rngs`, and it draws no key.

    A stream that `rngs` has not may not be drawn from: who does is told what Linen says then.
    """

    def make() -> Any:
        host = Host.abstract(tuple(rngs))
        with hosted(host):
            made = nnx.clone(factory(LinenRngs.of(host)))
            give_back_streams(made)
            return made

    with hosted(None):  # a host would hand its keys to the streams that are walked over
        made = nnx.eval_shape(make)
        return nnx.recursive_map(lambda _, x: _stream_for(x, rngs, module) if isinstance(x, LinenStream) else x, made)


def _stream_for(stream: LinenStream, rngs: nnx.Rngs, module: str) -> nnx.RngStream:
    name = stream_name(rngs, stream.tag)
    if name is None:
        own = nnx.RngStream(0, tag=stream.tag)
        own.key = nnx.RngKey(jax.random.key(0), tag=stream.tag, on_get_value=MissingRng(module, stream.tag))
        return own
    return rngs[name].fork(split=stream.shape) if stream.shape else rngs[name]


def stream_name(rngs: nnx.Rngs, name: str) -> str | None:
    """The stream that stands for `name`: itself, `default` as in NNX, or `params` as in Linen."""
    return next((found for found in (name, "default", "params") if found in rngs), None)
