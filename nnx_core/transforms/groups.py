"""How users say which leaf is treated how: filters to groups.

Law: a `ByFilter` spec sends each leaf to the group of the first filter that matches it, and two such specs are
equal iff they say the same. Knows filters; knows nothing of JAX's transforms.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from nnx_core import filters as filterlib
from nnx_core._errors import FilterError, Path, SpecError, show_path
from nnx_core.graph.pack import ByFilter
from nnx_core.state import State, iter_leaves
from nnx_core.variables import Variable

_HOW = "Give an axis, a sharding or None, StateAxes or StateSharding of these, or a tuple, list or dict of them."


class Carry:
    """Treatment of leaves that a loop passes from one step to the next."""


class Named:
    """A treatment that is only a name."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


Rest, Diff, Out = Named("not differentiated"), Named("differentiated"), Named("returned")


class FilterGroups(ByFilter):
    """Sends each leaf to the group of the first filter that matches its path and value.

    Args:
      rules: a mapping or pairs of filter and group, or a State with one group for each path.
    """

    def __init__(self, rules: Mapping[Any, Hashable] | Iterable[tuple[Any, Hashable]], /):
        if isinstance(rules, State):
            rules = [(filterlib.PathIn(path), _content(group)) for path, group in iter_leaves(rules)]
        pairs = tuple(rules.items() if isinstance(rules, Mapping) else rules)
        self._filters = tuple(f for f, _ in pairs)
        self.rules = tuple((filterlib.to_predicate(f), group) for f, group in pairs)

    @property
    def filters(self) -> tuple[Any, ...]:
        """The filters, as they were given."""
        return self._filters

    @property
    def groups(self) -> tuple[Hashable, ...]:
        """The group of each filter."""
        return tuple(group for _, group in self.rules)

    @property
    def is_pure(self) -> bool:
        """Whether the same leaf has the same group while path, type and metadata are unchanged."""
        return all(filterlib.is_pure(predicate) for predicate, _ in self.rules)

    def group(self, path: Path, value: Any) -> Hashable:
        for predicate, group in self.rules:
            if predicate(path, value):
                return group
        raise FilterError(f"No filter of {self!r} matches {show_path(path)} ({type(value).__name__}). End with `...`.")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.rules == self.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def __repr__(self) -> str:
        rules = ", ".join(f"{predicate}: {group}" for predicate, group in self.rules)
        return f"{type(self).__name__}({{{rules}}})"


def _content(group: Any) -> Any:
    """A State of treatments may hold them in Variables, as `get_named_sharding` makes it."""
    return group._raw_value if isinstance(group, Variable) else group


class StateAxes(FilterGroups, Mapping[Any, Hashable]):
    """Axes of a module's Variables for vmap, pmap and scan: `StateAxes({nnx.Param: 0, ...: None})`.

    A mapping too, from the filters as they were given to their axes.
    """

    def __init__(self, filter_axes: Mapping[Any, Hashable] | Iterable[tuple[Any, Hashable]], /):
        super().__init__(filter_axes)

    def __getitem__(self, filter: filterlib.Filter) -> Hashable:
        for own_filter, axis in zip(self._filters, self.groups, strict=True):
            if own_filter == filter:
                return axis
        raise KeyError(f"{self!r} has no axis for the filter {filter}; it has {list(self._filters)}.")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._filters)

    def __len__(self) -> int:
        return len(self._filters)

    __eq__, __hash__ = FilterGroups.__eq__, FilterGroups.__hash__  # and not those of a mapping

    @property
    def axes(self) -> tuple[Hashable, ...]:
        """The axis of each filter."""
        return self.groups


class StateSharding(FilterGroups):
    """Shardings of a module's Variables for jit: `StateSharding({nnx.Param: sharding, ...: None})`."""

    def __init__(self, filter_sharding: Mapping[Any, Hashable] | Iterable[tuple[Any, Hashable]], /):
        super().__init__(filter_sharding)

    @property
    def shardings(self) -> tuple[Hashable, ...]:
        """The sharding of each filter."""
        return self.groups


class DiffState:
    """Which Variables of argument `argnum` a gradient is taken of.

    Args:
      argnum: position of the argument.
      filter: the Variables.
    """

    def __init__(self, argnum: int, filter: filterlib.Filter):
        self.argnum, self.filter = argnum, filter

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiffState) and (self.argnum, self.filter) == (other.argnum, other.filter)

    def __hash__(self) -> int:
        return hash((self.argnum, self.filter))

    def __repr__(self) -> str:
        return f"DiffState(argnum={self.argnum}, filter={self.filter})"


def are_pure(*specs: Any) -> bool:
    """Whether none of the filters in `specs` has to be asked at every call."""
    for spec in specs:
        if isinstance(spec, FilterGroups) and not spec.is_pure:
            return False
        below = spec.values() if type(spec) is dict else spec
        if type(spec) in (list, tuple, dict) and not are_pure(*below):
            return False
    return True


def distinct(*specs: Any) -> tuple[Hashable, ...]:
    """The groups that are named anywhere in `specs`, in order of first appearance."""
    groups: dict[Hashable, None] = {}  # a set that keeps its order
    for spec in specs:
        _add_groups(spec, groups)
    return tuple(groups)


def _add_groups(spec: Any, groups: dict[Hashable, None]) -> None:
    if isinstance(spec, FilterGroups):
        for group in spec.groups:
            groups.setdefault(group)
    elif isinstance(spec, State):
        _add_groups(spec._mapping, groups)
    elif type(spec) in (list, tuple, dict):
        for child in spec.values() if type(spec) is dict else spec:
            _add_groups(child, groups)
    else:
        try:
            groups.setdefault(spec)
        except TypeError:
            raise SpecError(f"{spec!r} cannot say how to treat a leaf: it is not hashable. {_HOW}") from None
