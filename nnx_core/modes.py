"""Defaults that a program sets once: what `graph=None`, `graph_updates=None`, `ref=None`, `capture_noop=None` mean.

Law: a default holds from the call on; used with `with` or as a decorator it holds there only. Each thread has
its own. There is one mechanism whatever the modes say: False only forbids (shared references, structure changes).
Knows nothing of graphs: those who take the keywords ask `sharing_allowed`, `updates_allowed`, `var_defaults`,
`sowing_needs_capture`, `use_eager_sharding.current_value`. flax's switches are read where flax is loaded; it is never
imported.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar


class _Setting:
    """Sets a default, and takes it back at the end of `with` or of the decorated call."""

    _variable: ClassVar[ContextVar[Any]]

    def __init__(self, value: Any, /):
        self._value = value
        self._before = self._variable.get()
        self._variable.set(value)

    @classmethod
    def current_value(cls) -> Any:
        """The default that holds here."""
        return cls._variable.get()

    def __enter__(self) -> None:
        self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._variable.set(self._before)

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        self._variable.set(self._before)

        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            with type(self)(self._value):
                return f(*args, **kwargs)

        return call


class set_graph_mode(_Setting):  # flax.nnx's name; used like a function
    """Set what `graph=None` stands for: True (shared references are welcome) or False (they are an error).

    Example:
      >>> import nnx_core.modes as modes
      >>> with modes.set_graph_mode(False):
      ...     modes.set_graph_mode.current_value()
      False
      >>> modes.set_graph_mode.current_value()
      True
    """

    _variable = ContextVar("graph", default=True)


class set_graph_updates(_Setting):  # see set_graph_mode
    """Set what `graph_updates=None` stands for: True (structure may change in a transform) or False (an error).

    Example:
      >>> import nnx_core.modes as modes
      >>> @modes.set_graph_updates(False)
      ... def strict():
      ...     return modes.updates_allowed(None), modes.updates_allowed(True)
      >>> strict(), modes.updates_allowed(None)
      ((False, True), True)
    """

    _variable = ContextVar("graph_updates", default=True)


def _flax_switch(name: str, default: bool) -> bool:
    """What flax's configuration says; where flax is not loaded, what the environment does, by flax's own rule."""
    config = getattr(sys.modules.get("flax.configurations"), "config", None)
    if config is not None:
        return bool(getattr(config, name, default))
    text = os.environ.get(name.upper(), "").lower()
    return default if not text else text in ("y", "yes", "t", "true", "on", "1")


class set_sow_capture_noop(_Setting):  # see set_graph_mode
    """Set what `capture_noop=None` stands for: True (outside `nnx.capture`, `sow` and `perturb` do nothing) or False.

    Until it is set here, flax's flag `nnx_sow_capture_noop` counts, as configuration or in the environment; it is off.

    Example:
      >>> import nnx_core.modes as modes
      >>> with modes.set_sow_capture_noop(True):
      ...     modes.sowing_needs_capture(None), modes.sowing_needs_capture(False)
      (True, False)
    """

    _variable = ContextVar("sow_capture_noop", default=None)

    @classmethod
    def current_value(cls) -> bool:
        """What holds here."""
        value = cls._variable.get()
        return _flax_switch("nnx_sow_capture_noop", default=False) if value is None else bool(value)


def sowing_needs_capture(capture_noop: bool | None) -> bool:
    """Whether `capture_noop`, as a user gave it, makes `sow` and `perturb` do nothing outside `nnx.capture`."""
    return set_sow_capture_noop.current_value() if capture_noop is None else capture_noop


def sharing_allowed(graph: bool | None) -> bool:
    """Whether `graph`, as a user gave it, lets shared references pass."""
    return (set_graph_mode.current_value() if graph is None else graph) is not False


def updates_allowed(graph_updates: bool | None) -> bool:
    """Whether `graph_updates`, as a user gave it, lets a transform change structure."""
    return (set_graph_updates.current_value() if graph_updates is None else graph_updates) is not False


class use_eager_sharding(_Setting):  # see set_graph_mode
    """Say whether new Variables move their values to where their axis names say.

    On unless flax's own switches are off: `flax_always_shard_variable`, as configuration or in the
    environment, and `flax.nnx.use_eager_sharding`. What is said here goes before them, and
    `Variable(..., eager_sharding=...)` before that. Without a mesh, in metadata or ambient, nothing
    moves in any case. Values are placed by `nnx_core.sharding.place_eagerly`.

    Example:
      >>> import nnx_core.modes as modes
      >>> with modes.use_eager_sharding(False):
      ...     modes.use_eager_sharding.current_value()
      False
      >>> modes.use_eager_sharding.current_value()
      True
    """

    _variable = ContextVar("eager_sharding", default=None)

    @classmethod
    def current_value(cls) -> bool:
        """What holds here."""
        value = cls._variable.get()
        return _flax_shards_eagerly() if value is None else bool(value)


def _flax_shards_eagerly() -> bool:
    """What flax's switches say: programs that leave flax.nnx turn them at import, and keep doing so."""
    using = getattr(sys.modules.get("flax.nnx"), "using_eager_sharding", None)
    if getattr(using, "__module__", "").startswith("flax."):  # else it is ours, under flax.nnx's name
        return bool(using())
    return _flax_switch("flax_always_shard_variable", default=True)


@dataclass(frozen=True)
class VarDefaults(Mapping[str, bool]):
    """What new Variables are: `ref`, held in a `jax.Ref`; `hijax` is accepted and changes nothing here."""

    hijax: bool = False
    ref: bool = False

    def __getitem__(self, name: str) -> bool:
        return {"hijax": self.hijax, "ref": self.ref}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("hijax", "ref"))

    def __len__(self) -> int:
        return 2


class VarDefaultsContext(_Setting):
    """Made by `var_defaults(...)`."""

    _variable = ContextVar("var_defaults", default=VarDefaults())  # noqa: B039  # frozen


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> VarDefaults | VarDefaultsContext:
    """The defaults for new Variables; with arguments, set them (also with `with`, or as a decorator).

    Example:
      >>> import nnx_core.modes as modes
      >>> with modes.var_defaults(ref=True):
      ...     modes.var_defaults()
      VarDefaults(hijax=False, ref=True)
      >>> modes.var_defaults().ref
      False
    """
    now: VarDefaults = VarDefaultsContext.current_value()
    if hijax is None and ref is None:
        return now
    return VarDefaultsContext(VarDefaults(now.hijax if hijax is None else hijax, now.ref if ref is None else ref))
