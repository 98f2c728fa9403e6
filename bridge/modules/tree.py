"""Trees of bridge modules: copied as configuration, read as variables.

Law: a copy shares what the original shared, and nothing with the original; every Variable is read once, under the
name of the attribute that comes first (by priority; names that were given before others; by the alphabet).
Knows attributes, scopes and Variables; knows nothing of how methods make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import flax.errors
from flax.core.scope import CollectionFilter, in_filter

import nnx_core as nnx
from bridge.modules.scope import AttrPriority, Scope, modules_running
from bridge.modules.waiting import flat, place, state_of
from bridge.variables.hashable import frozen
from bridge.variables.mapping import Location, variable_location
from bridge.variables.places import same_leaves
from nnx_core._trace import current_trace
from nnx_core.graph.walk import children

OWN = ("scope", "attr_priorities")


def is_bridge_module(x: Any) -> bool:
    """Whether `x` is a bridge module."""
    return isinstance(x, nnx.Module) and "attr_priorities" in x.__dict__


# ---- configuration ----


def config_keys(module: Any) -> tuple[str, ...]:
    """The attributes that a module was made with."""
    scope = module.__dict__.get("scope")
    return tuple(key for key in module.__dict__ if key not in OWN) if scope is None else scope._config


def config_of(module: Any) -> Any:
    """What makes two modules the same configuration; hashable."""
    return tuple((key, _config_value(module.__dict__.get(key))) for key in config_keys(module))


def _config_value(x: Any) -> Any:
    return (type(x), config_of(x)) if is_bridge_module(x) else frozen(x)


def unbound(x: Any, done: dict[int, Any] | None = None) -> Any:
    """A copy of a module, or of what a field holds, without variables; what is shared stays shared."""
    done = {} if done is None else done
    if id(x) in done:
        return done[id(x)]
    if is_bridge_module(x):
        new = done[id(x)] = type(x).__new__(type(x))
        for key in config_keys(x):
            nnx.Module.__setattr__(new, key, unbound(x.__dict__[key], done))
            if (mark := x._nnx_marks.get(key)) is not None:
                new._nnx_set_mark(key, mark)
        nnx.Module.__setattr__(new, "scope", None)
        nnx.Module.__setattr__(new, "attr_priorities", dict(x.attr_priorities))
        return new
    if isinstance(x, nnx.Object | nnx.Variable):
        done[id(x)] = nnx.clone(x)
        return done[id(x)]
    if type(x) in (list, tuple):
        return type(x)(unbound(child, done) for child in x)
    if type(x) is dict:
        return {key: unbound(child, done) for key, child in x.items()}
    return x


def rebuilt_with(container: Any, changed: Mapping[Any, Any]) -> Any:
    """A list, tuple or dict (of nnx too) with other children; itself if there are none."""
    if not changed:
        return container
    if isinstance(container, dict):
        return {**container, **changed}
    if type(container) in (list, tuple):
        return type(container)(changed.get(i, x) for i, x in enumerate(container))
    container._nnx_assign(dict(changed), ())
    return container


# ---- one init, apply or bind ----


@dataclass
class Run:
    """What one `init`, `apply` or `bind` has met.

    Attributes:
      adopted: NNX modules and Variables that have their place.
      constructed: (Variable, its value as the constructor made it) of NNX modules that `init` made.
    """

    adopted: list[Any] = field(default_factory=list)
    constructed: list[tuple[nnx.Variable[Any], Any]] = field(default_factory=list)

    def note(self, child: Any, *, initializing: bool) -> None:
        """`child` has its place; if it has just been made, what its constructor made of it."""
        self.adopted.append(child)
        if initializing:
            self.constructed += [(v, v.get_raw_value()) for at, v in state_of(child) if at[0] != "params"]

    def restore(self) -> None:
        """As in Linen's own layers, init returns state as it was before the first step."""
        for variable, value in self.constructed:
            if variable._trace_state == current_trace():
                variable.set_raw_value(value)


_run: ContextVar[Run | None] = ContextVar("bridge_module_run", default=None)


@contextmanager
def run_of() -> Iterator[Run]:
    """One run; methods that are called later on a bound module are in none."""
    token = _run.set(Run())
    try:
        yield current_run()
    finally:
        _run.reset(token)


def current_run() -> Run:
    """The run, or a new one outside."""
    return _run.get() or Run()


def has_place(x: Any, *, owned: bool) -> bool:
    """Whether an NNX module or Variable belongs to a module already; `owned`: only if it was met in this run."""
    if any(x is other for other in current_run().adopted):
        return True
    return not owned and any(x is other for module in modules_running() for _, other in nnx.iter_graph(module))


# ---- variables ----


def collect(module: Any) -> dict[Location, nnx.Variable[Any]]:
    """location -> Variable of a bound module and all below, from the place of the module; what waits included."""
    found: dict[Location, nnx.Variable[Any]] = {}
    _collect(module, (), found, set())
    return found


def _collect(module: Any, names: Location, found: dict[Location, Any], seen: set[int]) -> None:
    scope: Scope = module.scope
    seen.add(id(module))
    known = {key: (collection, name) for key, collection, name in scope._names}
    for key, (collection, name) in known.items():
        variable = module.__dict__.get(key)
        if collection is not None and isinstance(variable, nnx.Variable) and id(variable) not in seen:
            seen.add(id(variable))
            found[collection, *names, name] = variable
    priorities = module.attr_priorities

    def order(key: str) -> Any:
        # What `nnx_in_bridge_mdl` named took its variables by that name: no other attribute may name it.
        fixed = key in known and not is_bridge_module(module.__dict__[key])
        return not fixed, priorities.get(key, AttrPriority.DEFAULT), key not in known, key

    for key in sorted(module.__dict__, key=order):
        if key not in OWN:
            _collect_value(module.__dict__[key], (*names, known.get(key, (None, key))[1]), found, seen)
    for at, variable in flat(scope._waiting):
        found.setdefault((at[0], *names, *at[1:]), variable)


def _collect_value(x: Any, names: Location, found: dict[Location, Any], seen: set[int]) -> None:
    if isinstance(x, nnx.Object | nnx.Variable):
        if id(x) in seen:
            return
        seen.add(id(x))
    if isinstance(x, nnx.Variable):
        if not isinstance(x, nnx.RngState):
            found[variable_location(names, type(x))] = x
    elif is_bridge_module(x):
        if x.scope is not None:
            _collect(x, names, found, seen)
    elif isinstance(x, nnx.Object | list | tuple | Mapping):
        for key, child in children(x):
            _collect_value(child, (*names, str(key)), found, seen)


def check_writes(
    before: Mapping[Location, Any], found: Mapping[Location, nnx.Variable[Any]], mutable: CollectionFilter
) -> None:
    """Raise ModifyScopeVariableError if a collection that is not mutable was written."""
    for at, variable in found.items():
        if in_filter(mutable, at[0]) or isinstance(variable, nnx.Intermediate):
            continue
        if at in before and not same_leaves(before[at], variable.get_raw_value()):
            raise flax.errors.ModifyScopeVariableError(at[0], *place(at))
