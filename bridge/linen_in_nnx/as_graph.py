"""The variables of a wrapped Linen module, as the object graph holds them: Variables in nested scopes.

Law: what Linen is given is what the Variables hold, and what it changed is written into the same Variables;
an existing scope or Variable stays the same object.
Knows Variables by location; knows nothing of modules but that a scope may be called through its wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax.core import meta

import nnx_core as nnx
from bridge._errors import show_path
from bridge.linen_in_nnx._errors import SubmoduleAccessError
from bridge.linen_in_nnx.submodules import look, method_at
from bridge.variables.mapping import Location, locations
from bridge.variables.metadata import BOX, to_linen_value, to_nnx_variable
from bridge.variables.places import same_leaves
from nnx_core._errors import TraceError
from nnx_core.graph.containers import DictStorage


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

    def _nnx_place(self) -> tuple[Any, tuple[str, ...]]:
        """The wrapper and the path that this scope was reached by."""
        home = _home_of(self)
        if home is None:
            raise SubmoduleAccessError("a LinenScope that was not reached through its ToNNX", ("submodule",))
        return home


_set_home = LinenScope.__dict__["_nnx_home"].__set__


def _home_of(scope: LinenScope) -> tuple[Any, tuple[str, ...]] | None:
    try:
        return object.__getattribute__(scope, "_nnx_home")  # type: ignore[no-any-return]
    except AttributeError:
        return None


def at_home(value: Any, wrapper: Any, path: tuple[str, ...]) -> Any:
    """`value`, which knows where it is if it is a scope."""
    if type(value) is LinenScope:
        _set_home(value, (wrapper, path))
    return value


# ---- all of them, found once ----


class View(NamedTuple):
    """The variables of a wrapper, found once and kept while its structure is unchanged."""

    variables: dict[Location, nnx.Variable[Any]]
    template: list[Any]  # (key, Variable or deeper template, how to read it), nested as Linen wants it

    @property
    def collections(self) -> list[str]:
        """Names of the collections, sorted."""
        return sorted({at[0] for at in self.variables})


def view_of(attributes: Mapping[str, Any]) -> View:
    """The View of nested variables."""
    found = dict(locations(attributes))
    nested: dict[str, Any] = {}
    for at, variable in found.items():
        level = nested
        for key in at[:-1]:
            level = level.setdefault(key, {})
        level[at[-1]] = variable
    return View(found, _template(nested))


def _template(nested: dict[str, Any]) -> list[Any]:
    return [(k, _template(x), None) if type(x) is dict else (k, x, _reader(x)) for k, x in nested.items()]


def _reader(variable: nnx.Variable[Any]) -> Callable[[nnx.Variable[Any]], Any]:
    # Metadata that NNX added says nothing to Linen. What came in a box goes back in it: Linen shards by it.
    if variable.has_metadata(BOX):
        return to_linen_value
    return nnx.Variable.get_value


def filled(template: list[Any]) -> dict[str, Any]:
    """Linen's variables dict, with the values of now."""
    return {key: filled(x) if read is None else read(x) for key, x, read in template}


def write_value(variable: nnx.Variable[Any], value: Any, at: Location) -> None:
    """Write what Linen returned, unless it is what the Variable holds."""
    if isinstance(value, meta.AxisMetadata):
        value = to_nnx_variable(at[0], value).get_raw_value()
    old = variable.get_value()
    if value is old or (not isinstance(value, jax.Array) and same_leaves(value, old)):
        return
    try:
        variable.set_value(value)
    except TraceError:
        raise TraceError(f"{type(variable).__name__} at {show_path(at)}") from None


def is_empty(value: Any) -> bool:
    """Whether there is nothing in a value that Linen returned: it then needs no Variable."""
    return not isinstance(value, jax.Array) and not jax.tree.leaves(value)


# ---- structure ----


class Level(dict[str, Any]):
    """One level of variables on the way into LinenScopes."""


def sync(items: Any, wanted: Mapping[str, Any]) -> None:
    """Make `items`, a level of variables, hold what is wanted; scopes that exist stay the same objects.

    What is no variable was put there by the user and stays.
    """
    for key in [k for k, x in items.items() if isinstance(x, nnx.Variable | LinenScope) and k not in wanted]:
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
