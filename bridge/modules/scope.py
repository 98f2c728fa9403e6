"""What a bound bridge module has to work with, and which one is running.

A `Scope` is a module's share of one `init`, `apply` or `bind`: random streams, which collections may be written,
variables that nothing has asked for yet. A `ModuleStackEntry` is one run of a method.
Law: in one run a name is given once; in different methods of one module a name means different things, so it is
given once too.
Knows streams, names and waiting variables; knows nothing of what modules do with them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.errors
import jax
from flax.core.scope import CollectionFilter, DenyList, in_filter

import nnx_core as nnx
from bridge.modules._errors import NameTwiceError
from bridge.modules.waiting import Waiting, stream_name


class AttrPriority(enum.IntEnum):
    """Which attribute names a submodule that several attributes hold: the lowest number, then the alphabet."""

    HIGH = 0
    INIT_PARENT = 20
    DEFAULT = 50
    LOW = 100


class Scope(nnx.Object):
    """A bound module's random streams, and the collections that it may write.

    Args:
      rngs: the streams; modules below share them.
      mutable: a bool, the name of a collection, several of them, or a `flax.core.DenyList`.

    >>> import nnx_core as nnx
    >>> scope = Scope(nnx.Rngs(0), mutable=True)
    >>> scope.copy().rngs is scope.rngs
    True
    """

    rngs: nnx.Rngs
    mutable: CollectionFilter

    def __init__(self, rngs: nnx.Rngs, mutable: CollectionFilter):
        self.rngs = rngs
        self.mutable = _hashable_filter(mutable)
        self._path: tuple[str, ...] = ()
        self._initializing = False
        self._waiting: Waiting = {}
        self._config: tuple[str, ...] = ()  # attributes that the module was made with
        # (attribute, collection or None, name in Linen)
        self._names: tuple[tuple[str, str | None, str], ...] = ()
        self._made_in: tuple[tuple[str, str], ...] = ()  # (name, method that gave it)
        self._setup_due = False
        # Whether the module is kept, as NNX modules are, and not only for one call.
        self._stays = False

    def copy(self) -> Scope:
        """A scope of its own with the same streams, for a module below."""
        new = Scope(self.rngs, self.mutable)
        new._path, new._initializing, new._stays = self._path, self._initializing, self._stays
        return new

    def may_make(self, collection: str) -> bool:
        """Whether variables of this collection may be made now."""
        return self._initializing or in_filter(self.mutable, collection)

    def attribute_of(self, collection: str | None, name: str) -> str | None:
        """The attribute that holds the variable (or, for None, the submodule) of this name."""
        for key, *what in self._names:
            if what == [collection, name]:
                return key
        return None

    def variable_at(self, attribute: str) -> tuple[str, str] | None:
        """(collection, name in Linen) of the variable that `attribute` holds; None if it holds none."""
        for key, collection, name in self._names:
            if key == attribute and collection is not None:
                return collection, name
        return None

    def register(self, attribute: str, collection: str | None, name: str) -> None:
        """Remember that `attribute` holds what Linen calls `name`."""
        kept = tuple(entry for entry in self._names if entry[1:] != (collection, name))
        self._names = (*kept, (attribute, collection, name))

    def forget(self, attribute: str) -> None:
        """Undo `register`."""
        self._names = tuple(entry for entry in self._names if entry[0] != attribute)

    def make_key(self, name: str, module: str) -> jax.Array:
        """The next key of a stream. Raises InvalidRngError if none can stand for it."""
        stream = stream_name(self.rngs, name)
        if stream is None:
            raise flax.errors.InvalidRngError(f'{module} at /{"/".join(self._path)} needs PRNG for "{name}"')
        return self.rngs[stream]()


def _hashable_filter(mutable: Any) -> Any:
    if isinstance(mutable, DenyList):
        return DenyList(_hashable_filter(mutable.deny))
    return mutable if isinstance(mutable, bool | str) else tuple(mutable)


def streams(rngs: Any) -> nnx.Rngs:
    """Random streams from an Rngs (itself), a seed, a key, seeds and keys by name, or None."""
    if isinstance(rngs, nnx.Rngs):
        return rngs
    return nnx.Rngs() if rngs is None else nnx.Rngs(rngs)


# ---- which module is running ----


@dataclasses.dataclass(eq=False)
class ModuleStackEntry:
    """One run of a method of a bridge module.

    Attributes:
      module: the module.
      in_compact: whether submodules that are made now become its own, named by their class.
      type_counter: how many of each class have been made.
    """

    module: Any
    in_compact: bool
    type_counter: defaultdict[type, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    method: str = ""
    names_given: set[tuple[str | None, str]] = dataclasses.field(repr=False, default_factory=set)
    created: list[Any] = dataclasses.field(repr=False, default_factory=list)
    due: list[Any] = dataclasses.field(repr=False, default_factory=list)

    def give(self, what: str, collection: str | None, name: str) -> None:
        """Give `name` to something of this module: a variable of a collection, or a submodule (None).

        Raises:
          NameTwiceError: if something else has it.
        """
        scope, kind = self.module.scope, type(self.module)
        where = kind.__name__, "/" + "/".join(scope._path), name, what
        if name in scope._config:
            raise NameTwiceError(*where, "a field of the module")
        for other, taken in self.names_given:
            if taken == name and (other == collection or None in (other, collection)):
                raise NameTwiceError(*where, f"a {'submodule' if other is None else f'{other} variable'} made before")
        makers = dict(scope._made_in)
        key = f"{collection}/{name}"
        if makers.setdefault(key, self.method) != self.method:
            raise NameTwiceError(*where, f"one that the method {makers[key].rpartition('<locals>.')[2]!r} made")
        self.names_given.add((collection, name))
        scope._made_in = tuple(makers.items())

    def automatic_name(self, cls: type) -> str:
        """The next free name for a submodule of this class."""
        while True:
            name = f"{cls.__name__}_{self.type_counter[cls]}"
            self.type_counter[cls] += 1
            if all(taken != name for _, taken in self.names_given):
                return name


# The module cannot be an argument: constructors and NNX modules stand between.
_stack: ContextVar[tuple[ModuleStackEntry, ...]] = ContextVar("bridge_modules", default=())


def current_context() -> ModuleStackEntry | None:
    """The innermost run of a bridge module's method; None outside."""
    stack = _stack.get()
    return stack[-1] if stack else None


def current_module() -> Any:
    """The bridge module whose method is running; None outside.

    >>> current_module() is None
    True
    """
    entry = current_context()
    return None if entry is None else entry.module


@contextmanager
def running(entry: ModuleStackEntry) -> Iterator[None]:
    """Run code as a method of a bridge module."""
    token = _stack.set((*_stack.get(), entry))
    try:
        yield
    finally:
        _stack.reset(token)


def modules_running() -> list[Any]:
    """The modules of all runs, outermost first."""
    return [entry.module for entry in _stack.get() if entry is not None]
