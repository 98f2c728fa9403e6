"""Filters choose part of a State or graph by (path, value).

Law: for filters f1..fn that end in `...`, merging what split returned gives the input back; every value goes
to the first filter that matches. A filter that `is_pure` answers by path, type and metadata alone, so its answer may be
remembered while these are unchanged; any other may read what it likes, and is to be asked again.
Knows paths and values; knows nothing of objects, traces or transforms.
"""

import abc
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any as AnyType

import jax

from nnx_core._errors import FilterError, Path
from nnx_core._foreign import is_foreign

PathParts = Path  # flax.nnx's name
Predicate = Callable[[PathParts, AnyType], bool]
#: What users may write: a type, a tag, `...`/True, None/False, a predicate, a compiled regular expression of the
#: path, or a list/tuple (any of them).
Filter = AnyType


def to_predicate(filter: Filter) -> Predicate:
    """The predicate (path, value) -> bool that `filter` stands for.

    Raises:
      FilterError: if `filter` is nothing of the kind.

    Example:
      >>> import nnx_core as nnx
      >>> nnx.filterlib.to_predicate("dropout")
      WithTag(tag='dropout')
    """
    if isinstance(filter, str):
        return WithTag(filter)
    if isinstance(filter, type):
        if is_foreign(filter):
            raise FilterError(
                f"{filter.__module__}.{filter.__qualname__} is a type of another NNX library, and nothing in a graph of"
                f" nnx_core is of it. Expected nnx_core's: nnx.{filter.__name__}, or"
                " bridge.flax_nnx.variable_type(...) for a type of your own."
            )
        return OfType(filter)
    if filter is ... or filter is True:
        return Everything()
    if filter is None or filter is False:
        return Nothing()
    if callable(filter):
        return filter
    if isinstance(filter, list | tuple):
        return Any(*filter)
    if isinstance(filter, re.Pattern):
        return PathRegex(filter)
    raise FilterError(
        f"Expected a filter (a type, a tag, ..., a bool, None, a predicate, or a list of these), found {filter!r}."
    )


@dataclass(frozen=True)
class WithTag:
    """Values whose metadata `tag` equals `tag` (RNG streams carry their name as tag)."""

    tag: str

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return getattr(value, "tag", None) == self.tag


@dataclass(frozen=True)
class OfType:
    """Values of `type`, or whose own `.type` is a subclass of it."""

    type: type

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return isinstance(value, self.type)


@dataclass(frozen=True)
class ExactType:
    """Values of exactly `type`: `nnx.pop(model, ExactType(Intermediate))` leaves subclasses alone."""

    type: type

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return type(value) is self.type


@dataclass(frozen=True)
class PathContains:
    """Values with `key` somewhere in their path; with `exact=False` as a part of a key is enough."""

    key: Hashable
    exact: bool = True

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        if self.exact:
            return self.key in path
        return any(str(self.key) in str(part) for part in path)


@dataclass(frozen=True)
class PathIn:
    """Values at exactly one of `paths`."""

    paths: frozenset[PathParts]

    def __init__(self, *paths: PathParts):
        object.__setattr__(self, "paths", frozenset(paths))

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return path in self.paths


@dataclass(frozen=True)
class PathRegex:
    r"""Values whose path, joined by `/`, matches `pattern` (a string, or a compiled pattern) in full.

    A compiled pattern is a filter by itself: `nnx.state(model, re.compile(r"encoder/.*"))`.

    Example:
      >>> PathRegex(r"layers/\d+/kernel")(("layers", 3, "kernel"), None)
      True
    """

    pattern: str | re.Pattern[str]

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return re.fullmatch(self.pattern, "/".join(map(str, path))) is not None


class _Combined:
    def __init__(self, *filters: Filter):
        self.predicates = tuple(to_predicate(f) for f in filters)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.predicates == self.predicates

    def __hash__(self) -> int:
        return hash((type(self), self.predicates))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.predicates))})"


class Any(_Combined):
    """Values that at least one of the filters matches."""

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return any(p(path, value) for p in self.predicates)


class All(_Combined):
    """Values that every one of the filters matches."""

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return all(p(path, value) for p in self.predicates)


@dataclass(frozen=True)
class Not:
    """Values that the filter does not match."""

    predicate: Predicate

    def __init__(self, collection_filter: Filter):
        object.__setattr__(self, "predicate", to_predicate(collection_filter))

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return not self.predicate(path, value)


@dataclass(frozen=True)
class Everything:
    """Every value."""

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return True


@dataclass(frozen=True)
class Nothing:
    """No value."""

    def __call__(self, path: PathParts, value: AnyType) -> bool:
        return False


def to_predicates(filters: tuple[Filter, ...]) -> tuple[Predicate, ...]:
    """Predicates of `filters`; `...` may stand only at the end, where nothing comes after it.

    Raises:
      FilterError: if a filter follows `...` or True.
    """
    for i, filter in enumerate(filters[:-1]):
        if (filter is ... or filter is True) and not all(f is ... or f is True for f in filters[i:]):
            raise FilterError(
                f"`...` or True can only be used as the last filter, got {filter} at index {i} of {filters}."
            )
    return tuple(map(to_predicate, filters))


filters_to_predicates = to_predicates  # flax.nnx's name


def is_pure(filter: Filter) -> bool:
    """Whether `filter` answers by path, type and metadata alone, and so the same while these are unchanged.

    A callable of the user's may read anything (a set that it closes over, the shape of the value, the time), and so
    may the `isinstance` of a type with a metaclass of its own (jaxtyping's `Float[Array, "4"]` reads the shape): these
    are not pure. A predicate that is says so by an attribute `is_pure = True`.

    Example:
      >>> import nnx_core as nnx
      >>> is_pure((nnx.Param, "dropout")), is_pure(nnx.Not(lambda path, value: value.ndim == 2))
      (True, False)
    """
    predicate = to_predicate(filter)
    kind = type(predicate)
    if kind in (Any, All):
        return all(map(is_pure, predicate.predicates))  # type: ignore[attr-defined]  # these two have it
    if kind is Not:
        return is_pure(predicate.predicate)  # type: ignore[attr-defined]  # as above
    if kind is OfType:
        return _tells_by_type(predicate.type)  # type: ignore[attr-defined]  # as above
    return kind in _BY_PATH_OR_METADATA or getattr(predicate, "is_pure", False) is True


def _tells_by_type(kind: type) -> bool:
    """Whether `isinstance(x, kind)` asks for nothing but the type of `x`."""
    return kind is jax.Array or type(kind).__instancecheck__ in _INSTANCE_CHECKS


_BY_PATH_OR_METADATA = (WithTag, ExactType, PathContains, PathIn, PathRegex, Everything, Nothing)
_INSTANCE_CHECKS = (type.__instancecheck__, abc.ABCMeta.__instancecheck__)


def first_match(predicates: tuple[Predicate, ...], path: PathParts, value: AnyType) -> int | None:
    """Index of the first predicate that takes (path, value), or None."""
    for i, predicate in enumerate(predicates):
        if predicate(path, value):
            return i
    return None
