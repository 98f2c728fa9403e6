"""What must hold, and whether it does.

Law: a figure passes only if it is what was demanded. What was compiled whole has no tolerance: both sides are the same
arithmetic, compiled by the same XLA for the same CPU, so a difference of any size is a defect.
Knows figures; knows nothing of models or of how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bridge.demo.cross import Continued, Measured, differences
from bridge.demo.task import accuracy
from bridge.equivalence.numbers import Difference, difference
from bridge.equivalence.report import Report

LEAST_ACCURACY = 0.95


@dataclass(frozen=True)
class Check:
    """One figure: its name, what was found, what is demanded, and whether it holds."""

    name: str
    found: str
    demanded: str
    holds: bool

    def __str__(self) -> str:
        return f"{self.name}: found {self.found}, demanded {self.demanded}"


@dataclass(frozen=True)
class Comparison:
    """Every figure of the demo: Linen, its rivals, both continued trainings, each rival layer by layer."""

    labels: np.ndarray
    linen: Measured
    others: tuple[Measured, ...]
    linen_continued: Continued
    native_continued: Continued
    reports: Mapping[str, Report]

    def accuracy(self, side: Measured) -> float:
        return accuracy(side.logits, self.labels)

    def logits(self, side: Measured) -> Difference:
        return difference(side.logits, self.linen.logits)

    def gradients(self, side: Measured) -> dict[tuple[str, ...], Difference]:
        return differences(side.gradients, self.linen.gradients)

    def losses(self) -> Difference:
        return difference(self.native_continued.losses, self.linen_continued.losses)

    def states(self) -> dict[str, dict[tuple[str, ...], Difference]]:
        """Where the steps ended: each array of the params, the batch statistics and the optimizer state."""
        ours, theirs = self.native_continued, self.linen_continued
        return {
            "params": differences(ours.params, theirs.params),
            "batch_stats": differences(ours.batch_stats, theirs.batch_stats),
            "opt_state": differences(ours.opt_state, theirs.opt_state),
        }


def checks(comparison: Comparison) -> list[Check]:
    """Every demand on the comparison, in the order in which it is shown."""
    learned, crossed = _on_learning(comparison), _on_crossing(comparison)
    return [*learned, *crossed, *_on_layers(comparison), *_on_training_on(comparison)]


def _on_learning(comparison: Comparison) -> Iterator[Check]:
    reached = comparison.accuracy(comparison.linen)
    yield Check(
        f"{comparison.linen.name}: test accuracy",
        f"{reached:.2%}",
        f"more than {LEAST_ACCURACY:.0%}",
        reached > LEAST_ACCURACY,
    )


def _on_crossing(comparison: Comparison) -> Iterator[Check]:
    reached = comparison.accuracy(comparison.linen)
    for side in comparison.others:
        found = comparison.accuracy(side)
        yield Check(f"{side.name}: test accuracy", f"{found:.2%}", f"{reached:.2%}", found == reached)
        yield _zero(f"{side.name}: logits", comparison.logits(side))
        for path, gap in comparison.gradients(side).items():
            yield _zero(f"{side.name}: gradient of {'/'.join(path)}", gap)


def _on_layers(comparison: Comparison) -> Iterator[Check]:
    """Compiled one by one, layers are not the program that was compiled whole: their bits may differ."""
    for name, report in comparison.reports.items():
        found = report.headline if report.first is None else f"{report.headline}; first at {report.first.place}"
        holds = report.equal and not report.not_compared
        yield Check(f"{name}: layer by layer", found, "equal, nothing left out", holds)


def _on_training_on(comparison: Comparison) -> Iterator[Check]:
    ours, theirs = comparison.native_continued, comparison.linen_continued
    steps = len(theirs.losses)
    yield _zero(f"{ours.name}: losses of {steps} more steps", comparison.losses())
    yield Check(
        f"{ours.name}: step after {steps} more steps",
        str(ours.step),
        str(theirs.step),
        ours.step == theirs.step,
    )
    for collection, gaps in comparison.states().items():
        for path, gap in gaps.items():
            yield _zero(f"{ours.name}: {collection}/{'/'.join(path)} after {steps} more steps", gap)


def _zero(name: str, gap: Difference) -> Check:
    return Check(f"{name}: max |difference| from Linen", shown(gap), "exactly 0.0", gap.bit_equal)


def shown(gap: Difference) -> str:
    """The largest difference; `0.0` is every bit equal, and what is of another dtype or shape is told.

    >>> shown(difference(np.float32([1, 2]), np.float32([1, 2]))), shown(difference(np.float32(0.0), np.float32(-0.0)))
    ('0.0', '0.0e+00')
    """
    return "0.0" if gap.bit_equal else gap.forms or f"{gap.absolute:.1e}"


def worst(gaps: Iterable[Difference]) -> Difference:
    """The one difference that stands for many: the farthest, and of those as far one with other bits."""
    return max(gaps, key=lambda gap: (gap.absolute, not gap.bit_equal))
