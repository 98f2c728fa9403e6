"""Where variables and submodules find their place among the attributes of a bridge module.

Law: what is assigned gets the variables that wait under the attribute's name, or an error says that they are missing;
a Variable that waited stays the same object. An attribute belongs to the user, a method or a field first: what Linen
names like one of them is kept beside it.
Knows attributes, scopes and waiting variables; knows nothing of methods and their runs, but which one is running.
"""

from __future__ import annotations

import functools
from typing import Any

import nnx_core as nnx
from bridge._types import Path
from bridge.modules.scope import current_context
from bridge.modules.tree import current_run, has_place, is_bridge_module, rebuilt_with, unbound
from bridge.modules.waiting import Parked, Waiting, fill, flat, parked, take
from bridge.variables.mapping import inside, locations, put
from nnx_core.graph.walk import children


def keep(module: Any, collection: str, name: str, variable: nnx.Variable[Any]) -> None:
    """Make `variable`, which Linen calls `name`, an attribute."""
    key = free_key(module, name)
    module.scope.register(key, collection, name)
    nnx.Module.__setattr__(module, key, variable)


def free_key(module: Any, name: str) -> str:
    """An attribute for what Linen calls `name`: `name`, unless something else has it."""
    while name in module.__dict__ or hasattr(type(module), name):
        name += "@"
    return name


def park(module: Any) -> None:
    """In a module that is kept, give what waits the attribute, and so the path, that it will have."""
    scope = module.scope
    if not scope._stays:
        return
    waiting, scope._waiting = scope._waiting, {}
    for location, variable in list(flat(waiting)):
        if len(location) == 2:
            keep(module, *location, variable)
    for name, tree in parked(waiting).items():
        key = free_key(module, name)
        scope.register(key, None, name)
        nnx.Module.__setattr__(module, key, tree)


def unpark(module: Any, name: str) -> None:
    """Let what was parked under `name` wait again: something asks for it."""
    key = module.scope.attribute_of(None, name)
    tree = module.__dict__.get(key)
    if isinstance(tree, Parked):
        for location, variable in locations(tree):
            put(module.scope._waiting, inside(location, (name,)), variable)
        nnx.Module.__delattr__(module, key)
        module.scope.forget(key)


def adopt(module: Any, names: Path, value: Any, *, owned: bool) -> Any:
    """`value`, about to be the attribute `names`, with what waits for it; a copy of a module that is not ours."""
    unpark(module, names[0])
    if is_bridge_module(value):
        return _adopt_module(module, names, value, owned=owned)
    if isinstance(value, nnx.List | nnx.Dict) or type(value) in (list, tuple, dict):
        changed = {}
        for key, child in children(value):
            new = adopt(module, (*names, str(key)), child, owned=owned)
            if new is not child:
                changed[key] = new
        return rebuilt_with(value, changed)
    is_random = isinstance(value, nnx.Rngs | nnx.RngStream | nnx.RngState)
    if isinstance(value, nnx.Object | nnx.Variable) and not is_random:
        _adopt_nnx(module, names, value, owned=owned)
    return value


def _adopt_module(module: Any, names: Path, child: Any, *, owned: bool) -> Any:
    waiting = take(module.scope._waiting, names)
    if child.scope is not None:  # made elsewhere; what waits here is for it all the same
        for location, variable in flat(waiting):
            put(child.scope._waiting, location, variable)
        return child
    entry = current_context()
    owned = owned or (entry is not None and any(child is x for x in entry.created))
    if not owned:
        child = unbound(child)
    scope = module.scope.copy()
    scope._path, scope._waiting = (*scope._path, *names), waiting
    child._bind(scope, owned=owned)
    return child


def _adopt_nnx(module: Any, names: Path, child: Any, *, owned: bool) -> None:
    scope, entry = module.scope, current_context()
    waiting = take(scope._waiting, names, nnx.Variable if isinstance(child, nnx.Variable) else dict)
    if not waiting and has_place(child, owned=owned):
        return
    if not waiting and not scope._initializing and entry is not None and entry.method == "setup":
        entry.due.append(functools.partial(_fill_if_due, module, names, child))
        return
    _fill_nnx(module, names, child, waiting)


def _fill_if_due(module: Any, names: Path, child: Any) -> None:
    if not has_place(child, owned=True):
        _fill_nnx(module, names, child, {})


def _fill_nnx(module: Any, names: Path, child: Any, waiting: Waiting) -> None:
    scope = module.scope
    for location, variable in flat(fill(child, waiting, (*scope._path, *names), scope.may_make)):
        put(scope._waiting, inside(location, names), variable)
    current_run().note(child, initializing=scope._initializing)
