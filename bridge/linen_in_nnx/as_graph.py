"""How the object graph sees a wrapped Linen module: configuration, plain attributes, Variables in nested scopes.

Law: what Linen is given is what the Variables hold, and what it changed is written into the same Variables;
an existing scope or Variable stays the same object. While the structure is unchanged it is not walked again.
Knows Variables by location, and keys of the graph; knows nothing of calls, but that a wrapper can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._errors import show_path
from bridge._types import Location, Path
from bridge.linen_in_nnx._errors import SubmoduleAccessError
from bridge.linen_in_nnx.config import Wrapped
from bridge.linen_in_nnx.submodules import Submodule, Wrapper, look, method_at
from bridge.variables.identity import same_leaves
from bridge.variables.mapping import EMPTY, locations, nest, put
from bridge.variables.metadata import BOX, to_linen_value, to_nnx_variable
from nnx_core._changes import touch
from nnx_core._errors import TraceError
from nnx_core.graph.api import plan_of
from nnx_core.graph.containers import DictStorage
from nnx_core.graph.objects import Marked


class LinenScope(DictStorage[Any]):
    """The variables of a submodule of a wrapped module, by name: `model.encoder["kernel"]`, `model.encoder.kernel`.

    Reached through its wrapper, it can be called where Linen lets a submodule be called from outside.
    """

    __slots__ = ("_nnx_home",)  # the wrapper and the path it was reached by; no part of the graph

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        home = _home_of(self)
        return value if home is None else at_home(value, home[0], (*home[1], key))

    def __call__(self, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        """Call the submodule, or its method of this name; further keywords as for ToNNX.

        Raises:
          SubmoduleAccessError: if it exists only while its parent's compact method runs.
        """
        wrapper, path = self._nnx_place()
        return wrapper(*args, method=method_at(path, method), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name.startswith(("__", "_nnx_")) or _home_of(self) is None:
            return super().__getattr__(name)
        return look(*self._nnx_place(), name)

    def _nnx_place(self) -> tuple[Wrapper, Path]:
        """The wrapper and the path that this scope was reached by."""
        home = _home_of(self)
        if home is None:
            raise SubmoduleAccessError("a LinenScope that was not reached through its ToNNX", ("submodule",))
        return home


# Past `__setattr__`, which would set an item of the scope.
_set_home = LinenScope.__dict__["_nnx_home"].__set__


def _home_of(scope: LinenScope) -> tuple[Wrapper, Path] | None:
    try:
        return object.__getattribute__(scope, "_nnx_home")  # type: ignore[no-any-return]
    except AttributeError:
        return None


def at_home(value: Any, wrapper: Wrapper, path: Path) -> Any:
    """`value`, which knows where it is if it is a scope."""
    if type(value) is LinenScope:
        _set_home(value, (wrapper, path))
    return value


# ---- all of them, found once ----


class Inventory(NamedTuple):
    """The variables of a wrapper, found once and kept while its structure is unchanged."""

    variables: dict[Location, nnx.Variable[Any]]
    # (key, Variable or deeper template, how to read it), nested as Linen wants it.
    template: list[Any]

    @property
    def collections(self) -> list[str]:
        """Names of the collections, sorted."""
        return sorted({location[0] for location in self.variables})


def inventory_of(attributes: Mapping[str, Any]) -> Inventory:
    """The Inventory of nested variables."""
    variables = dict(locations(attributes))
    nested: dict[str, Any] = {}
    for location, variable in variables.items():
        put(nested, location, variable)
    return Inventory(variables, _template(nested))


def _template(nested: dict[str, Any]) -> list[Any]:
    template: list[Any] = []
    for key, child in nested.items():
        if type(child) is dict:
            template.append((key, _template(child), None))
        else:
            template.append((key, child, _reader(child)))
    return template


def _reader(variable: nnx.Variable[Any]) -> Callable[[nnx.Variable[Any]], Any]:
    # Metadata that NNX added says nothing to Linen. What came in a box goes back in it: Linen shards by it.
    if variable.has_metadata(BOX):
        return to_linen_value
    return nnx.Variable.get_value


def filled(template: list[Any]) -> dict[str, Any]:
    """Linen's variables dict, with the values of now."""
    # In every call: the one place here where short counts for more than long names.
    return {key: filled(x) if read is None else read(x) for key, x, read in template}


def write_value(variable: nnx.Variable[Any], value: Any, location: Location) -> None:
    """Write what Linen returned, unless it is what the Variable holds."""
    if isinstance(value, meta.AxisMetadata):
        value = to_nnx_variable(location[0], value).get_raw_value()
    old = variable.get_value()
    # By identity: what Linen hands back unchanged is no write, in a trace too, and costs no comparison of numbers.
    if value is old or (not isinstance(value, jax.Array) and same_leaves(value, old)):
        return
    try:
        variable.set_value(value)
    except TraceError:
        raise TraceError(f"{type(variable).__name__} at {show_path(location)}") from None


def is_empty(value: Any) -> bool:
    """Whether this stands for a collection without variables; axis names, None or `{}` are values."""
    return type(value) is type(EMPTY)


# ---- structure ----


class Level(dict[str, Any]):
    """One level of variables on the way into LinenScopes."""


def sync(items: Any, wanted: Mapping[str, Any]) -> None:
    """Make `items`, a level of variables, hold what is wanted; scopes that exist stay the same objects.

    What is no variable was put there by the user and stays.
    """
    for key, old in list(items.items()):
        if isinstance(old, nnx.Variable | LinenScope) and key not in wanted:
            del items[key]
    for key, new in wanted.items():
        old = items.get(key)
        if not isinstance(new, Level):
            if old is not new:
                items[key] = new
            continue
        if type(old) is not LinenScope:
            items[key] = old = LinenScope()
        sync(old, new)


def scoped(x: Any) -> Any:
    """`x`, a level of variables given as plain dicts, with LinenScopes for these."""
    if isinstance(x, dict):
        return LinenScope({key: scoped(child) for key, child in x.items()})
    return x


def nested_variables(x: Any) -> Mapping[str, Any] | None:
    """`x` if it is nested dicts of Variables alone, as `linen_vars_to_nnx_attrs` makes them; else None."""
    if isinstance(x, Marked):
        x = x.value
    if isinstance(x, LinenScope) or not isinstance(x, Mapping) or not x:
        return None
    below = (nested_variables(child) for child in x.values() if not isinstance(child, nnx.Variable))
    return None if any(child is None for child in below) else x


# ---- the node ----


class LinenNode(nnx.Module):
    """A wrapped Linen module as a node of the graph: the module as configuration, plain attributes, variables.

    Any name is legal in Linen, so variables keep theirs as keys in the graph, and what else is there makes room.
    """

    __slots__ = ("_nnx_variables", "_nnx_wrapped")
    _nnx_variables: dict[str, Any]  # Variables and LinenScopes, by their keys in the graph
    _nnx_wrapped: Wrapped
    rngs: nnx.Rngs | None

    @property
    def module(self) -> nn.Module:
        """The Linen module."""
        return self._nnx_wrapped.module

    def _nnx_wrap(self, wrapped: Wrapped) -> None:
        """Be a wrapper of this; does not count as a change."""
        object.__setattr__(self, "_nnx_wrapped", wrapped)

    def _nnx_arrange(self) -> None:
        """Give attributes keys in the graph that no variable has; kept in `_nnx_wrapped`, so that copies agree."""
        wrapped, used = self._nnx_wrapped, set(self._nnx_variables)
        key = _free("to_nnx__module", used)
        attributes = tuple([(_free(name, used), name) for name in self.__dict__])
        if key != wrapped.key or attributes != wrapped.attributes:
            self._nnx_wrap(wrapped.replace(key=key, attributes=attributes))

    # ---- what a walk asks of every object ----

    def _nnx_items(self) -> dict[Any, Any]:
        wrapped = self._nnx_wrapped
        own = {key: self.__dict__[name] for key, name in wrapped.attributes}
        return {wrapped.key: wrapped, **own, **self._nnx_variables}

    def _nnx_storage(self) -> Any:
        return _Storage(self)

    def _nnx_mark(self, key: Any) -> str | None:
        if key == self._nnx_wrapped.key:
            return "static"
        name = dict(self._nnx_wrapped.attributes).get(key)
        return None if name is None else super()._nnx_mark(name)

    def _nnx_fill(self, items: dict[Any, Any], marks: Any) -> None:
        # By type: the configuration is what says under which key it is itself, and which keys are attributes.
        [wrapped] = [x for x in items.values() if type(x) is Wrapped]
        names = dict(wrapped.attributes)
        variables: dict[str, Any] = {}
        self.__dict__.clear()
        for key, x in items.items():
            if key in names:
                self.__dict__[names[key]] = x
            elif x is not wrapped:
                variables[key] = scoped(x)
        object.__setattr__(self, "_nnx_variables", variables)
        self._nnx_wrap(wrapped)
        self._nnx_arrange()
        if marks:
            object.__setattr__(self, "_nnx_marks", dict(marks))

    def _nnx_assign(self, changed: dict[Any, Any], removed: tuple[Any, ...]) -> None:
        items = {key: x for key, x in self._nnx_items().items() if key not in removed}
        self._nnx_fill({**items, **changed}, ())
        touch(self)

    # ---- variables ----

    def _nnx_inventory(self) -> Inventory:
        # The plan of this object holds while nothing in it has changed, so a steady call walks nothing.
        plan = plan_of(self)
        return plan.remember(Inventory, lambda: inventory_of(self._nnx_variables))  # type: ignore[no-any-return]

    def _nnx_set_variables(self, variables: Mapping[Location, nnx.Variable[Any]]) -> None:
        """Hold these variables and no others."""
        sync(self._nnx_variables, nest(variables, Level))
        self._nnx_arrange()
        touch(self)

    def _nnx_add(self, new: Mapping[Location, nnx.Variable[Any]]) -> None:
        """Hold these variables too."""
        self._nnx_check_can_write(next(iter(new))[1])
        self._nnx_set_variables({**self._nnx_inventory().variables, **new})

    def _nnx_take(self, location: Location, variable: nnx.Variable[Any]) -> None:
        """Hold a Variable that the Linen module around kept for this one."""
        self._nnx_add({location: variable})

    def _nnx_at(self, path: Path) -> Any:
        """The submodule at `path`: itself, its variables, or a view where it has none."""
        scope: Any = self
        for depth, name in enumerate(path):
            level = self._nnx_variables if depth == 0 else scope
            if type(level.get(name)) is not LinenScope:
                return Submodule(self, path)
            scope = at_home(level[name], self, path[: depth + 1])
        return scope

    def _nnx_variable_at(self, location: Location) -> nnx.Variable[Any]:
        return self._nnx_inventory().variables[location]

    def _nnx_linen_variables(self) -> dict[str, Any]:
        return filled(self._nnx_inventory().template)


def nodes_in(node: Any) -> list[LinenNode]:
    """The wrapped Linen modules in an object graph, in the order of the walk."""
    return [x for _, x in nnx.iter_graph(node) if isinstance(x, LinenNode)]


class _Storage:
    """Reads and writes one item of a LinenNode by its key in the graph."""

    __slots__ = ("_owner",)

    def __init__(self, owner: LinenNode):
        self._owner = owner

    def _place_of(self, key: str) -> tuple[dict[str, Any], str]:
        names = dict(self._owner._nnx_wrapped.attributes)
        if key in names:
            return self._owner.__dict__, names[key]
        return self._owner._nnx_variables, key

    def __getitem__(self, key: str) -> Any:
        items, name = self._place_of(key)
        return items[name]

    def __setitem__(self, key: str, value: Any) -> None:
        items, name = self._place_of(key)
        items[name] = value


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "@"
    used.add(name)
    return name
