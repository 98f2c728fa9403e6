"""Optimizer slots and averages follow their variables: made by the same expressions, from leaves of their own.

Law: a slot whose param is only renamed is copied, whatever its shape; a slot of the shape of its param is cast, cut,
stacked, joined and transposed as the param is; of any other there is no telling, and that is an error. A constant that
is added to a param is added to its averages, and not to what an optimizer keeps of its gradients.
A param that is dropped takes its slots along.
Knows keys and expressions; knows nothing of layouts, files or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np

from bridge._errors import BridgeError, show_path
from bridge._types import Location, Path
from bridge.checkpoint.tree.canonical import Key, Role
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Cast, Fill, Op, OpError, Read, without_added
from bridge.checkpoint.tree.tree import read_of


class SlotError(BridgeError, ValueError):
    """What an optimizer keeps of a param cannot be made as the param is made. `path` is where it keeps it."""

    def __init__(self, path: Path, param: Location, expected: str, found: str):
        self.path, self.param = path, param
        super().__init__(
            f"{show_path(path)} cannot follow the param {show_path(param)}:\n"
            f"  expected: {expected}\n  found: {found}\n"
            "Rename the param only, or start with a fresh optimizer state."
        )


@dataclass
class Followed:
    """Slots under the new names: `made`, those without a value, and old paths that have no place, with the reason."""

    made: dict[Key, Op] = field(default_factory=dict)
    masked: set[Key] = field(default_factory=set)
    dropped: dict[Path, str] = field(default_factory=dict)
    zeroed: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """One slot (`mu`, say) of all params: the paths by param, and which of them have no value."""

    role: Role
    prefix: Path
    tail: Path
    leaves: dict[Location, Path]
    masked: dict[Location, Path]

    def key(self, location: Location) -> Key:
        return Key(self.role, self.prefix, location, self.tail)

    def path(self, location: Location) -> Path | None:
        """Where the slot of a variable is, if it has one."""
        return self.leaves.get(location, self.masked.get(location))


def follow(
    leaves: Mapping[Key, Path],
    masked: Mapping[Key, Path],
    forms: Mapping[Path, Leaf],
    variables: Mapping[Location, Op],
    variable_forms: Mapping[Location, Leaf],
) -> Followed:
    """How the slots of converted variables are made.

    Args:
      leaves, masked: the slots: keys with a location, and where they are.
      forms: shape and dtype by path.
      variables: new location -> how it is made, from `Read`s of old locations.
      variable_forms: shape and dtype of the old variables.

    Raises:
      SlotError: a slot cannot be made as its param is.
    """
    result = Followed()
    made_from: dict[Location, list[Location]] = {}
    for location, op in variables.items():
        for source in dict.fromkeys(op.sources()):
            made_from.setdefault(source, []).append(location)
    new_params = [location for location, op in variables.items() if location[0] == "params" and is_new(op)]
    for group in _groups(leaves, masked):
        followers: dict[Location, None] = {}  # in the order of the slots, each once
        for old in (*group.leaves, *group.masked):
            for location in made_from.get(old, ()):
                followers[location] = None
        for location in followers:
            _follow_one(result, group, location, variables[location], forms, variable_forms)
        for old, path in group.leaves.items():
            if old not in made_from:
                result.dropped[path] = f"its param {show_path(old)} is dropped"
        if new_params and group.role is Role.OPTIMIZER and _like_params(group, forms, variable_forms):
            for location in new_params:
                result.made[group.key(location)] = _zeros(variables[location], group, forms)
                result.zeroed.append(group.key(location))
    return result


def _groups(leaves: Mapping[Key, Path], masked: Mapping[Key, Path]) -> Iterable[_Group]:
    groups: dict[Key, _Group] = {}

    def group_of(key: Key) -> _Group | None:
        if key.location is None or key.role not in (Role.OPTIMIZER, Role.EXTRA):
            return None
        return groups.setdefault(replace(key, location=None), _Group(key.role, key.prefix, key.tail, {}, {}))

    for key, path in leaves.items():
        if (group := group_of(key)) is not None:
            group.leaves[key.location] = path
    for key, path in masked.items():
        if (group := group_of(key)) is not None:
            group.masked[key.location] = path
    return groups.values()


def _follow_one(
    result: Followed,
    group: _Group,
    location: Location,
    op: Op,
    forms: Mapping[Path, Leaf],
    variable_forms: Mapping[Location, Leaf],
) -> None:
    """Put the slot of one new variable into the result: made as the variable is, from the slots of the old ones."""
    if group.role is Role.OPTIMIZER:
        op = without_added(op)
    sources = list(dict.fromkeys(op.sources()))
    absent = [old for old in sources if old not in group.leaves]
    if absent == sources and group.masked.keys() >= set(sources):
        result.masked.add(group.key(location))
        return
    first = next(path for old in sources if (path := group.path(old)) is not None)
    if absent:
        found = f"none for {', '.join(map(show_path, absent))}"
        raise SlotError(first, location, "an entry for each param that it is made from", found)
    for old in sources:
        shape, param = forms[group.leaves[old]].shape, variable_forms[old].shape
        if shape != param and not _is_rename(op):
            raise SlotError(group.leaves[old], location, f"shape {param}, as the param, which is reshaped", str(shape))
    try:
        result.made[group.key(location)] = op.on(lambda old: read_of(forms[group.leaves[old]]))
    except OpError as error:
        raise SlotError(first, location, "leaves that can be put together as the param's are", str(error)) from error


def is_new(op: Op) -> bool:
    """Whether nothing of the source is in it."""
    return next(op.sources(), None) is None


def _is_rename(op: Op) -> bool:
    return isinstance(op.of if isinstance(op, Cast) else op, Read)


def _like_params(group: _Group, forms: Mapping[Path, Leaf], variable_forms: Mapping[Location, Leaf]) -> bool:
    slots = group.leaves.items()
    return bool(slots) and all(forms[path].shape == variable_forms[location].shape for location, path in slots)


def _zeros(op: Op, group: _Group, forms: Mapping[Path, Leaf]) -> Fill:
    dtype = forms[next(iter(group.leaves.values()))].dtype
    return Fill(np.zeros(op.shape, jnp.dtype(dtype)))
