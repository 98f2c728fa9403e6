"""What an NNX class makes inside Linen: a structure without numbers, and where Linen keeps the numbers.

Law: equal recipes make equal structures, so a structure is found out once; arguments reach the constructor as the
very objects that were passed, and what was passed is never changed. Keys in Linen are strings.
Knows constructors, paths and locations; knows no scopes, and no numbers.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

import nnx_core as nnx
from bridge._to_linen_errors import KeyClashError, Location, NotAFactoryError, NotAnNnxModuleError
from bridge.context import Host, LinenRngs, give_back_streams, hosted
from bridge.kinds import collection_of

Factory = Callable[..., nnx.Module]
#: The collection of arrays that are plain attributes: state that has no Variable type to name it.
ARRAYS = "arrays"


# ---- the arguments of a constructor ----


class _Untouched:
    """Arguments on their way through Linen, which would freeze lists and dicts in a field.

    Not iterable on purpose: Linen's fingerprints would take an iterable apart, and lose the values of a mapping.
    """

    __slots__ = ("__weakref__", "_owner", "_value")

    def __init__(self, value: Any, owner: Any = None):
        self._value, self._owner = value, owner

    def key(self) -> Any:
        """The content as something hashable. Raises TypeError if it holds something that is not."""
        return distinct(self._value)

    def __hash__(self) -> int:
        try:
            return hash((self._owner, self.key()))  # Linen's fingerprint of a dataclass type leaves out which
        except TypeError:
            return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if isinstance(other, _Untouched) else other))

    def __len__(self) -> int:
        return len(self._value)

    def __getitem__(self, key: Any) -> Any:
        return self._value[key]

    def __repr__(self) -> str:
        return repr(self._value)

    def __reduce__(self) -> Any:
        return type(self), (self._value, self._owner)


class Arguments(_Untouched):
    """Positional arguments; a sequence, equal to the tuple of them."""

    __slots__ = ()


class Keywords(_Untouched):
    """Keyword arguments; a mapping, equal to the dict of them."""

    __slots__ = ()

    def keys(self) -> Any:
        """The names."""
        return self._value.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._value

    __iter__ = None


def distinct(x: Any) -> Any:
    """`x` as a hashable value that keeps 1, 1.0 and True, lists and tuples apart."""
    if isinstance(x, Mapping):
        return type(x), tuple((k, distinct(v)) for k, v in x.items())
    if isinstance(x, list | tuple):
        return type(x), tuple(map(distinct, x))
    if isinstance(x, nnx.Object):
        raise TypeError("a module may change")  # hashes by identity, which says nothing of its content
    hash(x)
    return type(x), x


# ---- building ----


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that an NNX module is made from but its random keys; equal if it makes the same structure."""

    factory: Factory
    args: Arguments
    kwargs: Keywords
    skip_rng: bool = False
    abstract: bool = True

    @functools.cached_property
    def key(self) -> Any:
        """What it is compared by, or None if the arguments cannot be compared."""
        try:
            key = self.factory, self.args.key(), self.kwargs.key(), self.skip_rng, self.abstract
            hash(key)
        except TypeError:
            return None
        return key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key is not None and self.key == other.key

    @property
    def name(self) -> str:
        """The name of the class."""
        target = unwrapped(self.factory)
        return str(getattr(target, "__name__", target))

    def make(self, host: Host) -> nnx.Module:
        """A new module, with keys from `host`, whose streams are then Linen's."""
        with hosted(host):
            kwargs = dict(self.kwargs)
            if not self.skip_rng and _takes_rngs(self.factory, self.args, kwargs):
                kwargs["rngs"] = LinenRngs.of(host)
            module = self.factory(*self.args, **kwargs)
        if not isinstance(module, nnx.Module):
            raise NotAnNnxModuleError(unwrapped(self.factory), module)
        module = nnx.clone(module)  # what was passed in as an argument stays the caller's
        give_back_streams(module)
        return module


def unwrapped(factory: Any) -> Any:
    """The class or function in a `functools.partial`."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


def _takes_rngs(factory: Factory, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # written in C
        return True
    parameters = signature.parameters.values()
    if "rngs" not in signature.parameters:
        return any(p.kind is p.VAR_KEYWORD for p in parameters) and "rngs" not in kwargs
    if isinstance(factory, functools.partial) and "rngs" in factory.keywords:
        return False
    try:
        return "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return True  # the call itself will say what is wrong with the arguments


def require_factory(factory: Any) -> None:
    """Raise NotAFactoryError unless `factory` is a class or function."""
    if isinstance(factory, nnx.Object | nn.Module):
        raise NotAFactoryError(factory, instance=True)
    if not callable(factory):
        raise NotAFactoryError(factory, instance=False)


# ---- structures ----


@dataclass(frozen=True, eq=False)
class Slot:
    """One Variable (or, `kind` None, plain array) of a structure, and where Linen keeps it."""

    location: Location
    path: tuple[Any, ...]
    kind: type[nnx.Variable[Any]] | None
    shape: tuple[int, ...]
    metadata: dict[str, Any]


class Structure:
    """An NNX module without numbers, and where Linen keeps the numbers."""

    def __init__(self, module: nnx.Module):
        # Collected by the call, not kept by Linen unless it asks: the module has to do without at the start.
        nnx.pop(module, nnx.Intermediate)
        self.module = module
        self.graphdef, state = nnx.split(module)
        self.slots: dict[Location, Slot] = {}
        for path, leaf in nnx.to_flat_state(state):
            slot = _slot(path, leaf)
            if (other := self.slots.setdefault(slot.location, slot)) is not slot:
                raise KeyClashError(slot.location, other.path, path)
        self.later: dict[Any, Structure] = {}  # as it is after a call that created state


def location_of(path: tuple[Any, ...], leaf: Any) -> Location:
    """Where Linen keeps the Variable or array at `path`."""
    collection = collection_of(type(leaf)) if isinstance(leaf, nnx.Variable) else ARRAYS
    return collection, *map(str, path)


def _slot(path: tuple[Any, ...], leaf: Any) -> Slot:
    location = location_of(path, leaf)
    if not isinstance(leaf, nnx.Variable):
        return Slot(location, path, None, np.shape(leaf), {})
    shape = tuple(getattr(leaf.get_raw_value(), "shape", ()))
    return Slot(location, path, type(leaf), shape, leaf.get_metadata())


@functools.lru_cache(maxsize=512)
def _remembered(recipe: Recipe, streams: tuple[str, ...]) -> Structure:
    if recipe.abstract:
        return Structure(nnx.eval_shape(lambda: recipe.make(Host.abstract(streams))))
    with jax.ensure_compile_time_eval():  # the constructor wants real numbers, whatever is traced around us
        return Structure(recipe.make(Host.abstract(streams)))


def structure_of(recipe: Recipe, streams: tuple[str, ...]) -> Structure:
    """The structure of what `recipe` makes; the constructor is traced (or run) the first time only."""
    if recipe.key is None:
        return _remembered.__wrapped__(recipe, streams)
    return _remembered(recipe, streams)
