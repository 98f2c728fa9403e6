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
from bridge._errors import linen_not_found, linen_place
from bridge._types import Location, Path
from bridge.nnx_in_linen.host import (
    Host,
    LinenRngs,
    LinenStream,
    MissingRng,
    give_back_streams,
    hosted,
    intermediates_made,
    made_by,
)
from bridge.variables.kinds import variable_type
from bridge.variables.mapping import EMPTY, inside, leaves, nest, put
from bridge.variables.metadata import to_nnx_variable
from bridge.variables.state import attach, hand_over, state_of

#: {collection: {name: ... Variable}}
Waiting = dict[str, Any]


def waiting_of(variables: Mapping[str, Any]) -> Waiting:
    """New Variables for Linen variables, which are not changed; keys of lists may be integers.

    >>> waiting_of({"params": {"layers": {0: 1.0}}})["params"]["layers"]["0"]
    Param(1.0)
    """
    waiting: Waiting = {}
    for location, value in leaves({key: _with_string_keys(tree) for key, tree in variables.items()}):
        if value is not EMPTY:
            put(waiting, location, to_nnx_variable(location[0], value))
    return waiting


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping) or not all(isinstance(key, str | int) for key in tree):
        return tree
    return {str(key): _with_string_keys(child) for key, child in tree.items()}


def take(waiting: Waiting, names: Path, kind: type = dict) -> Waiting:
    """What waits at `names` in every collection, levels or (`kind`) Variables; it waits there no longer."""
    taken: Waiting = {}
    for collection, tree in waiting.items():
        level = _level(tree, names[:-1])
        if level is not None and isinstance(level.get(names[-1]), kind):
            taken[collection] = level.pop(names[-1])
    return taken


def take_one(waiting: Waiting, collection: str, name: str) -> nnx.Variable[Any] | None:
    """The Variable that waits at `name`, or one of all that waits below `name`; None if nothing does."""
    child = waiting.get(collection, {}).pop(name, None)
    return variable_type(collection)(_values(child)) if isinstance(child, dict) else child


def _level(tree: Any, names: Path) -> dict[str, Any] | None:
    """The level of nested dicts that is under these names; None if there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def _values(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _values(child) for key, child in tree.items()}
    return tree.get_raw_value()


def flat(waiting: Any, location: Location = ()) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of all that waits."""
    for key, child in waiting.items():
        if isinstance(child, dict):
            yield from flat(child, (*location, key))
        else:
            yield (*location, key), child


class Parked(nnx.Dict[Any]):
    """Variables that wait in a module that is kept: in its graph they have the paths that they will have."""


def parked(waiting: Waiting) -> dict[str, Parked]:
    """name -> what waits below this name; Variables at the top are left out."""
    below: dict[str, dict[Location, nnx.Variable[Any]]] = {}
    for location, variable in flat(waiting):
        if len(location) > 2:
            below.setdefault(location[1], {})[location[0], *location[2:]] = variable
    return {name: Parked(nest(variables, Parked)) for name, variables in below.items()}


def check_shape(location: Location, variable: nnx.Variable[Any], make: Callable[[Any], Any]) -> None:
    """Raise ScopeParamShapeError unless `variable` has the shape that its initializer gives."""

    def initial() -> Any:
        value = make(jax.random.key(0))
        # A box is a pytree of its value.
        return value.raw_value if isinstance(value, nnx.VariableMetadata) else value

    # The initializer is traced, and computes nothing; of pytrees that are not alike, what both have is compared.
    leaves, initial_leaves = jax.tree.leaves(variable.get_raw_value()), jax.tree.leaves(jax.eval_shape(initial))
    for leaf, expected in zip(leaves, initial_leaves, strict=False):
        if np.shape(leaf) != expected.shape:
            raise flax.errors.ScopeParamShapeError(*linen_place(location), np.shape(leaf), expected.shape)


# ---- NNX modules ----


def fill(child: Any, waiting: Waiting, path: Path, may_make: Callable[[str], bool]) -> Waiting:
    """Give the NNX module `child`, which is at `path`, the values that wait for it; what no place was found for.

    Raises:
      ScopeParamNotFoundError, ScopeVariableNotFoundError, ScopeCollectionNotFound: if one is missing that may not be
        made now.
      ScopeParamShapeError: if a parameter has another shape.
    """
    # By the id of what is replaced: a Variable that is met again in `_put_in_place` is known by nothing else.
    replacements: dict[int, nnx.Variable[Any]] = {}
    for location, variable in state_of(child):
        level, whole_location = _level(waiting, location[:-1]), inside(location, path)
        if level is not None and location[-1] in level:
            replacements[id(variable)] = _fitting(variable, level.pop(location[-1]), whole_location)
        elif not may_make(location[0]) and not isinstance(variable, nnx.Intermediate):
            raise linen_not_found(whole_location, empty=location[0] not in waiting)
    _put_in_place(child, replacements)
    rest: Waiting = {}
    for location, variable in list(flat(waiting)):
        if not (hand_over(child, location, variable) or attach(child, location, variable)):
            put(rest, location, variable)
    return rest


def _fitting(variable: nnx.Variable[Any], new: Any, location: Location) -> nnx.Variable[Any]:
    """The Variable that waited in place of `variable`, or, of another type, `variable` with its value."""
    value, expected = _values(new), getattr(variable.get_raw_value(), "shape", None)
    if location[0] == "params" and expected is not None and np.shape(value) != expected:
        raise flax.errors.ScopeParamShapeError(*linen_place(location), np.shape(value), expected)
    metadata = new.get_metadata() if isinstance(new, nnx.Variable) else {}
    if type(new) is type(variable):
        if own_metadata := variable.get_metadata():
            new.set_metadata(**{**own_metadata, **metadata})
        return new
    variable.set_raw_value(value)
    if metadata:
        variable.set_metadata(**metadata)
    return variable


def _put_in_place(child: Any, replacements: Mapping[int, nnx.Variable[Any]]) -> None:
    """Replace the Variables in `child`, by id; one that is in a plain list or dict gets the value instead."""
    for _, owner in list(nnx.iter_graph(child)):
        if isinstance(owner, nnx.Object):
            changed = {key: replacements[id(x)] for key, x in owner._nnx_items().items() if id(x) in replacements}
            if changed:
                owner._nnx_assign(changed, ())
    for _, variable in state_of(child):
        new = replacements.get(id(variable))
        if new is not None and new is not variable:
            variable.set_raw_value(new.get_raw_value())


def abstract(factory: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs, owner: str) -> Any:
    """What `factory` makes, without its numbers; its random streams are those in `rngs`, and it draws no key.

    A stream that `rngs` has not may not be drawn from: who does is told what Linen says of the module `owner` then.
    """

    def make() -> Any:
        host = Host.abstract(tuple(rngs))
        with hosted(host):
            module = nnx.clone(made_by(factory, (), {}, LinenRngs.of(host), None))
            give_back_streams(module)
            return module

    def with_streams(_: Any, x: Any) -> Any:
        return _stream_for(x, rngs, owner) if isinstance(x, LinenStream) else x

    with hosted(None):  # a host would hand its keys to the streams that are walked over
        module = nnx.recursive_map(with_streams, nnx.eval_shape(make))
    last = dict(nnx.to_flat_state(nnx.state(module, nnx.Intermediate)))
    if last:  # nobody gives these, as what a call sows: they are as the constructor made them
        values = intermediates_made(make)
        for path, variable in last.items():
            variable.set_raw_value(values[path])
    return module


def _stream_for(stream: LinenStream, rngs: nnx.Rngs, owner: str) -> nnx.RngStream:
    name = stream_name(rngs, stream.tag)
    if name is None:
        own = nnx.RngStream(0, tag=stream.tag)
        own.key = nnx.RngKey(jax.random.key(0), tag=stream.tag, on_get_value=MissingRng(owner, stream.tag))
        return own
    return rngs[name].fork(split=stream.shape) if stream.shape else rngs[name]


def stream_name(rngs: nnx.Rngs, name: str) -> str | None:
    """The stream that stands for `name`: itself, `default` as in NNX, or `params` as in Linen."""
    return next((candidate for candidate in (name, "default", "params") if candidate in rngs), None)
