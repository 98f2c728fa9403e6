"""What was compared, and how it came out: the worst of all seeds for each thing.

Law: a tolerance comes from the table of tolerances. It is relative to the largest element of what is compared; where
that is no more than the rounding of larger numbers beside it (a gradient that is zero but for rounding), to these.
Knows arrays and reports; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from bridge._errors import show_path
from bridge.equivalence.counterparts import Match
from bridge.equivalence.numbers import Difference, difference, is_inexact, largest, same_bits
from bridge.equivalence.report import Finding, What
from bridge.equivalence.tolerance import TOLERANCES, tolerance_of
from bridge.tracing.trace import is_array

#: With this begins the text of state that differs already in the models as they are given.
BEFORE = "before the call"


@dataclass
class Findings:
    """Findings, the worst for each thing; and what could not be compared.

    Attributes:
      least: the smallest tolerance of what a layer returns, relative to its scale, as something was computed in half
        precision on both sides; of an output, a gradient, ... it is given with the two values.
    """

    least: float = 0.0
    tightest: float = math.inf
    not_compared: dict[str, None] = field(default_factory=dict)
    _worst: dict[tuple[Any, ...], Finding] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Finding, ...]:
        return tuple(self._worst.values())

    def leave_out(self, text: str) -> None:
        """Say what could not be compared, and why."""
        self.not_compared[text] = None

    def add(self, finding: Finding) -> None:
        """Keep it, unless there is a worse one."""
        # Of an optimizer's state the text says which slot of the parameter's; elsewhere, which block is the worst.
        has_own = finding.difference is None or finding.what == "optimizer state" or finding.text.startswith(BEFORE)
        key = (finding.what, finding.path, finding.other, finding.step, finding.text if has_own else "")
        before = self._worst.get(key)
        if before is None or _badness(finding) > _badness(before):
            self._worst[key] = finding

    def compare(
        self,
        what: What,
        path: str,
        other: str,
        x_a: Any,
        x_b: Any,
        *,
        seed: int | None = None,
        step: int | None = None,
        least: float = 0.0,
        floor: float = 0.0,
        text: str = "",
    ) -> None:
        """Compare two values: arrays, or trees of arrays; what is none must be equal.

        Args:
          least: the smallest tolerance, relative to the scale; above 0 if half precision reaches both values.
          floor: what the difference may be in any case, absolute.
        """
        leaves_a, leaves_b = jax.tree.leaves(x_a), jax.tree.leaves(x_b)
        if len(leaves_a) != len(leaves_b):
            counts = f"{len(leaves_a) or 'no'} arrays in a and {len(leaves_b) or 'none'} in b"
            self.add(Finding(what, path, other, None, False, seed, step, f"{text}{', ' if text else ''}{counts}"))
            return
        for one, two in zip(leaves_a, leaves_b, strict=True):
            if not (_is_number(one) and _is_number(two)):
                equal = bool(type(one) is type(two) and one == two)
                self.add(Finding(what, path, other, None, equal, seed, step, text or f"{one!r} and {two!r}"))
                continue
            off = _difference(one, two, least, floor)
            if not off.equal:
                self.tightest = min(self.tightest, least)
            words = ", ".join(filter(None, (text, off.forms and f"{off.forms} (b, a)")))
            self.add(Finding(what, path, other, off, off.equal and not off.forms, seed, step, words))

    def difference(self, x_a: Any, x_b: Any) -> Difference:
        """How far the value of b's layer is from that of a's.

        No looser than what was found to differ: where half precision does not reach that, it has not led there.
        """
        return _difference(x_a, x_b, min(self.least, self.tightest))

    def compare_all(
        self,
        what: What,
        matches: Iterable[Match],
        least: Callable[[Match], float] = lambda match: 0.0,
        floor_of: Callable[[Match, float], tuple[float, str]] = lambda match, floor: (floor, ""),
        *,
        seed: int | None = None,
    ) -> None:
        """Compare pairs of values, each with its smallest tolerance.

        A value's floor is the rounding of the largest of them; of state, of the largest beside it in its module that is
        not the same on both sides (a mean that is zero but for rounding stands beside a variance).
        """
        pairs = list(matches)
        scales: dict[Any, float] = {}
        for pair in pairs:
            group = pair.a[:-1] if what == "state" else ()
            if what != "state" or not _is_same(pair):
                scales[group] = max(scales.get(group, 0.0), largest([pair.x_a]))
        for pair in pairs:
            group = pair.a[:-1] if what == "state" else ()
            own = least(pair)
            floor, why = floor_of(pair, scales.get(group, 0.0) * rounding(pair.x_a, own))
            text = ", ".join(filter(None, (pair.text, why)))
            path, other = show_path(pair.a), show_path(pair.b)
            self.compare(
                what, path, other, pair.x_a, pair.x_b, seed=seed, least=own, floor=floor, text=text
            )  # fmt: skip


def rounding(x: Any, least: float = 0.0) -> float:
    """What the table allows beside each element, in the coarsest dtype that `x` was made in, as `least` tells."""
    rows = [tolerance_of(leaf.dtype.name) for leaf in jax.tree.leaves(x) if is_array(leaf)]
    halves = [tolerance_of(name) for name in TOLERANCES]
    rows += [row for row in halves if row is not None and row.model == least]
    return max((row.atol for row in rows if row is not None), default=0.0)


def _difference(x_a: Any, x_b: Any, least: float, floor: float = 0.0) -> Difference:
    off = difference(x_b, x_a, least)
    if floor > off.tolerance and off.absolute < np.inf and is_inexact(x_a):
        return replace(off, tolerance=floor)
    return off


def is_near(x_a: Any, x_b: Any, least: float, floor: float) -> bool:
    """Whether `compare` would call them equal."""
    return _difference(x_a, x_b, least, floor).equal


def _is_same(pair: Match) -> bool:
    return same_bits(pair.x_a, pair.x_b)


def _is_number(x: Any) -> bool:
    return is_array(x) or isinstance(x, bool | int | float | complex)


def _badness(finding: Finding) -> tuple[bool, float, float]:
    off = finding.difference
    return not finding.equal, 0.0 if off is None else off.ratio, 0.0 if off is None else off.absolute
