"""Ways in which the numbers of some arrays may stand in another: what a fused, turned or cut kernel could be.

Law: each is a rule with a way back; those that change the least come first.
Knows shapes and rules; knows nothing of models.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge._types import Shape
from bridge.checkpoint.rules.rearrange import Axis, Rearrangement
from bridge.checkpoint.tree.ops import Read, values_of

_GATES = (2, 3, 4)  # GLU; query, key and value, or a GRU; an LSTM
_PARTS = "p"
_NAMES = "abcdefghijklmnoqrstuvwxyz"
_MOST_NAMES = 5  # 120 orders


@dataclass(frozen=True)
class Rework:
    """What is done to the numbers of one variable, or of several that are joined along their first axis.

    Attributes:
      parts: which of the sources stands where; (0,) for a single one.
      rearrangement: of the joined array.
      add: a constant, after that.
    """

    parts: tuple[int, ...] = (0,)
    rearrangement: Rearrangement | None = None
    add: float = 0.0

    def of_gradients(self, sources: Sequence[np.ndarray]) -> np.ndarray:
        """Where the gradient of each source stands in that of the result, to which a constant makes no difference."""
        whole = sources[0] if len(self.parts) == 1 else np.concatenate([sources[part] for part in self.parts])
        if self.rearrangement is None:
            return whole
        op = self.rearrangement.apply(Read(("x",), whole.shape, str(whole.dtype)))
        return values_of({("x",): op}, {("x",): whole})["x",]

    def options(self) -> dict[str, Any]:
        """The fields of a Rule."""
        options: dict[str, Any] = {}
        if self.rearrangement is not None:
            order = {name: list(indices) for name, indices in self.rearrangement.order.items()}
            lengths = dict(self.rearrangement.lengths)
            options = {"rearrange": str(self.rearrangement), "lengths": lengths or None, "order": order or None}
        if self.add:
            options["add"] = self.add
        return options


@functools.lru_cache(512)
def reworks(source: Shape, target: Shape, parts: int, turned: bool) -> tuple[Rework, ...]:
    """What could make an array of shape `target` of `parts` arrays of shape `source`, but for joining them as they are.

    Args:
      turned: whether whole axes may have changed places, or run backwards: not between two layers that are known to be
        the same one.

    >>> [str(rework.rearrangement) for rework in reworks((3, 3), (3, 3), 1, turned=True)]
    ['a b -> b a']
    """
    result: dict[Any, Rework] = {}
    for rearrangement in _rearrangements(source, target, parts, turned):
        for order in itertools.permutations(range(parts)):
            key = (order, str(rearrangement), *map(str, (rearrangement.lengths, rearrangement.order)))
            result.setdefault(key, Rework(order, rearrangement))
    return tuple(result.values())


def _rearrangements(source: Shape, target: Shape, parts: int, turned: bool) -> Iterator[Rearrangement]:
    for axis, sizes in _cuts(source, parts):
        before, lengths = _named(source, parts, axis, sizes)
        for order in _orders(before, turned):
            after = _grouped(order, lengths, target)
            if after is None:
                continue
            brackets = [group for group in (*before, *after) if len(group) > 1]
            needed = {name: lengths[name] for group in brackets for name in group}
            if before != after or parts > 1:
                yield Rearrangement(before, after, needed, {})
            if turned and axis is None and parts == 1 and len(source) > 2:
                backwards = {group[0]: tuple(reversed(range(lengths[group[0]]))) for group in before[:-2] if group}
                yield Rearrangement(before, after, needed, backwards)
            if axis is not None and parts == 1 and sizes[0] in _GATES:
                gate = before[axis][0]
                for gates in itertools.islice(itertools.permutations(range(sizes[0])), 1, None):
                    yield Rearrangement(before, after, needed, {gate: gates})


def _cuts(source: Shape, parts: int) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """Which axis is cut into which factors: none, one in two, and one in gates, each of which is cut in two."""
    yield None, ()
    for axis in reversed(range(len(source))):
        for factor in _factors(source[axis]):
            yield axis, (factor, source[axis] // factor)
    for gates in _GATES if parts == 1 and source else ():
        if source[-1] % gates == 0:
            for factor in _factors(source[-1] // gates):
                yield len(source) - 1, (gates, factor, source[-1] // gates // factor)


def _factors(size: int) -> list[int]:
    return [factor for factor in range(2, size) if size % factor == 0]


def _named(
    source: Shape, parts: int, cut: int | None, sizes: tuple[int, ...]
) -> tuple[tuple[Axis, ...], dict[str, int]]:
    """The axes of the joined array by names, and how long each is; an axis of one number has none."""
    names, lengths = iter(_NAMES), dict[str, int]()
    before: list[Axis] = []
    for axis, size in enumerate(source):
        factors = sizes if axis == cut else (size,) if size > 1 else ()
        group = tuple(itertools.islice(names, len(factors)))
        lengths |= zip(group, factors, strict=True)
        before.append(group)
    if parts > 1:
        lengths[_PARTS] = parts
        before[0] = (_PARTS, *before[0])
    return tuple(before), lengths


def _orders(before: Sequence[Axis], turned: bool) -> Iterator[tuple[str, ...]]:
    """The names in every order; those of whole axes in the order that they have, unless they may be turned."""
    names = tuple(itertools.chain.from_iterable(before))
    whole = [group[-1] for group in before if len(group) == 1 or group[:-1] == (_PARTS,)]
    for order in itertools.permutations(names) if len(names) <= _MOST_NAMES else [names]:
        if turned or [name for name in order if name in whole] == whole:
            yield order


def _grouped(order: Sequence[str], lengths: Mapping[str, int], target: Shape) -> tuple[Axis, ...] | None:
    """The names as axes of these sizes; None if they cannot be."""
    after: list[Axis] = []
    rest = list(order)
    for size in target:
        group: list[str] = []
        while rest and math.prod(lengths[name] for name in group) < size:
            group.append(rest.pop(0))
        if math.prod(lengths[name] for name in group) != size:
            return None
        after.append(tuple(group))
    return None if rest else tuple(after)
