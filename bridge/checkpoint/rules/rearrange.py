"""Axes by name: how the numbers of one array stand in another, as `rearrange` in a rule says it.

`in (part head dim) -> in (head part dim)` turns a fused kernel of three parts, each with all heads, into one of heads,
each with its three parts; names in brackets are one axis, the first of them the slowest; `1` is an axis of one number.
Law: nothing is lost and nothing is made: `inverse` undoes it, bit for bit, and needs no shape for it.
Knows names and expressions; knows nothing of locations or rules.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge._types import Shape
from bridge.checkpoint.rules.patterns import PatternError
from bridge.checkpoint.tree.ops import Block, Join, Op, Reshape, Transpose

#: The names that are one axis.
Axis = tuple[str, ...]

_TOKENS = re.compile(r"\s*(?:(?P<group>\([^()]*\))|(?P<name>[A-Za-z_]\w*)|(?P<one>1)(?!\w)|(?P<odd>\S))")


@dataclass(frozen=True)
class Rearrangement:
    """Named axes before and after.

    Attributes:
      before, after: the axes, each of several names, or of none where it has one number.
      lengths: of names; in each bracket all but one are needed.
      order: name -> which of the old indices stands at each of the new ones.

    >>> from bridge.checkpoint.tree.ops import Read
    >>> swapped = Rearrangement.parse("in (part dim) -> in (part dim)", {"part": 2}, {"part": [1, 0]})
    >>> swapped.apply(Read(("kernel",), (3, 8), "float32")).shape, str(swapped.inverse())
    ((3, 8), 'in (part dim) -> in (part dim)')
    """

    before: tuple[Axis, ...]
    after: tuple[Axis, ...]
    lengths: Mapping[str, int]
    order: Mapping[str, Sequence[int]]

    @classmethod
    def parse(cls, text: str, lengths: Mapping[str, Any] | None, order: Mapping[str, Any] | None) -> Rearrangement:
        """From what a rule says.

        Raises:
          PatternError: it is malformed, or could not be undone.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise PatternError(f"rearrange = {text!r}, where two sides with one '->' between them are expected")
        before, after = (_axes(side, text) for side in sides)
        names, others = (list(itertools.chain.from_iterable(side)) for side in (before, after))
        if max(Counter(names).values(), default=1) > 1 or sorted(names) != sorted(others):
            raise PatternError(f"rearrange = {text!r}, where each name stands once on either side")
        order = dict(order or {})
        counts = {name: len(indices) for name, indices in order.items() if hasattr(indices, "__len__")}
        result = cls(before, after, counts | dict(lengths or {}), order)
        result._require_order(names)
        result._require_lengths(names)
        return result

    def __str__(self) -> str:
        return " -> ".join(" ".join(map(_shown, side)) for side in (self.before, self.after))

    def inverse(self) -> Rearrangement:
        """What undoes it."""
        order = {name: tuple(map(list(old).index, range(len(old)))) for name, old in self.order.items()}
        return Rearrangement(self.after, self.before, self.lengths, order)

    def apply(self, op: Op) -> Op:
        """The rearranged value.

        Raises:
          PatternError: it has another number of axes.
          OpError: an axis cannot be cut so.
        """
        if len(op.shape) != len(self.before):
            raise PatternError(f"an array of shape {op.shape}, which has not the {len(self.before)} axes of {self}")
        # The order of whole blocks needs no reshape, for which a leaf is read whole.
        order = dict(self.order)
        for axis, group in enumerate(self.before):
            if group and group[0] in order:
                op = _taken(op, axis, self._size(group[0], group, op.shape[axis]), order.pop(group[0]))
        names = list(itertools.chain.from_iterable(self.before))
        apart = [self._size(name, group, n) for group, n in zip(self.before, op.shape, strict=True) for name in group]
        sizes = dict(zip(names, apart, strict=True))
        op = _reshaped(op, tuple(apart))
        for name, indices in order.items():
            op = _taken(op, names.index(name), len(indices), indices)
        axes = tuple(names.index(name) for group in self.after for name in group)
        if axes != tuple(range(len(axes))):
            op = Transpose(op, axes)
        return _reshaped(op, tuple(math.prod(sizes[name] for name in group) for group in self.after))

    def _size(self, name: str, group: Axis, size: int) -> int:
        known = [self.lengths[other] for other in group if other != name and other in self.lengths]
        return self.lengths.get(name, size // math.prod(known))

    def _require_lengths(self, names: Sequence[str]) -> None:
        for name, length in self.lengths.items():
            if name not in names or not isinstance(length, int) or isinstance(length, bool) or length < 1:
                raise PatternError(f"lengths = {dict(self.lengths)}, where lengths of {', '.join(names)} are expected")
        for group in (*self.before, *self.after):
            without = [name for name in group if name not in self.lengths]
            if len(without) > 1:
                raise PatternError(f"no lengths of {' and '.join(without)}: in each bracket all but one are needed")

    def _require_order(self, names: Sequence[str]) -> None:
        for name, indices in self.order.items():
            is_list = isinstance(indices, list | tuple) and all(type(index) is int for index in indices)
            whole = is_list and sorted(indices) == list(range(len(indices)))
            if name not in names or not whole or self.lengths.get(name, len(indices)) != len(indices):
                raise PatternError(f"order = {dict(self.order)}, where each index of a named axis is expected once")


def _axes(side: str, text: str) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    for token in _TOKENS.finditer(side):
        if token["group"]:
            group = tuple(token["group"].strip("()").split())
            if not group or not all(name.isidentifier() for name in group):
                raise PatternError(f"rearrange = {text!r}, in which {token['group']!r} holds no names")
            axes.append(group)
        elif token["odd"]:
            raise PatternError(f"rearrange = {text!r}, in which {token['odd']!r} is no name, bracket or 1")
        else:
            axes.append((token["name"],) if token["name"] else ())
    return tuple(axes)


def _shown(axis: Axis) -> str:
    if not axis:
        return "1"
    return axis[0] if len(axis) == 1 else f"({' '.join(axis)})"


def _taken(op: Op, axis: int, count: int, indices: Sequence[int]) -> Op:
    """Equal blocks along an axis in another order."""
    size = op.shape[axis] // count
    return Join(tuple(Block(op, axis, index * size, (index + 1) * size) for index in indices), axis)


def _reshaped(op: Op, shape: Shape) -> Op:
    return op if op.shape == shape else Reshape(op, shape)
