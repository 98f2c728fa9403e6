"""Both models run layer by layer: recorded, fed each other's inputs, and, where nothing differs, fed small ones.

Law: what is found here is added to the findings only if it is a difference; a run that fails costs rows, and is said.
A layer that is the same on its input may differ on another: an epsilon of 1e-5 instead of 1e-6 shows where the variance
is small. So every layer of the library is also fed a thousandth of its input, in both models.
Knows subjects, records and rows; knows nothing of causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from bridge._types import Location, Path
from bridge.equivalence.counterparts import Counterparts
from bridge.equivalence.findings import Findings
from bridge.equivalence.layers import Pair, Turn, by_steps, held_in, pair_calls
from bridge.equivalence.numbers import Difference, is_inexact
from bridge.equivalence.recording import Event, Place, record
from bridge.equivalence.report import Finding
from bridge.equivalence.rows import Evidence, apart, evidence, to_feed
from bridge.equivalence.subjects import Keys, Subject
from bridge.tracing.trace import family_of

_SMALL = 1e-3


@dataclass(frozen=True)
class Inspection:
    """Two models, and what they are run on.

    Attributes:
      args, kwargs: of the draw of this seed.
    """

    a: Subject
    b: Subject
    pairs: Counterparts
    keys: Keys
    seed: int
    args: Any
    kwargs: Any

    def rows(self, findings: Findings) -> list[Evidence]:
        """All rows; adds what layers show, and outputs do not, to `findings`."""
        if "function" in (self.a.api, self.b.api):
            findings.leave_out("layers: a function has none")
            return []
        try:
            ours, theirs = self._record(self.a), self._record(self.b)
        except Exception as error:  # noqa: BLE001  the model does run, compiled: all that is lost is where they part
            findings.leave_out(f"layers: the models do not run without jit: {type(error).__name__}: {error}")
            return []
        held = held_in(self.pairs, self.a.values, self.b.values)
        pairs = pair_calls(self.pairs, ours, theirs, held)
        parameters = self._parameters(pairs, findings)
        pairs = by_steps(pairs, [path for path, off in parameters.items() if not off.equal])
        is_equal = all(finding.equal for finding in findings.all) and not any(map(_differ_in_dtype, pairs))
        fed = [] if is_equal else self._fed(self.b, to_feed(pairs), findings)
        rows = evidence(pairs, ours, theirs, fed, findings, parameters)
        _compare_dtypes(rows, findings)
        return self._probed(rows, findings) if is_equal else rows

    def _record(self, subject: Subject, feed: Any = None) -> list[Event]:
        return record(subject, subject.values, self.keys, self.args, self.kwargs, feed)

    def _fed(self, subject: Subject, feed: dict[Place, list[np.ndarray]], findings: Findings) -> list[Event]:
        try:
            return self._record(subject, feed)
        except Exception as error:  # noqa: BLE001  as above
            text = f"{type(error).__name__}: {error}"
            findings.leave_out(f"layers of {subject.words}, each fed a given input: {text}")
            return []

    def _parameters(self, pairs: Sequence[Pair], findings: Findings) -> dict[Path, Difference]:
        """Path of a layer in a -> the worst difference of its own variables, and of parts without a counterpart."""
        paths = {pair.a.event.path for pair in pairs}
        worst: dict[Path, Difference] = {}
        for match in self.pairs.values(self.a.values, self.b.values):
            layer = layer_of(match.a, paths)
            for x, y in zip(jax.tree.leaves(match.x_a), jax.tree.leaves(match.x_b), strict=False):
                off = findings.difference(x, y)
                if layer not in worst or (not off.equal, off.ratio) > (not worst[layer].equal, worst[layer].ratio):
                    worst[layer] = off
        return worst

    def _probed(self, rows: list[Evidence], findings: Findings) -> list[Evidence]:
        """The rows, with those as wrong that make something else of a thousandth of their input."""
        layers = [row.pair for row in rows if row.pair is not None and _is_of_library(row.pair)]
        ours = _by_place(self._fed(self.a, {pair.a.event.place: _small(pair) for pair in layers}, findings))
        theirs = _by_place(self._fed(self.b, {pair.b.event.place: _small(pair) for pair in layers}, findings))
        result: list[Evidence] = []
        for row in rows:
            one = None if row.pair is None else ours.get(row.pair.a.event.place)
            other = None if row.pair is None else theirs.get(row.pair.b.event.place)
            if one is not None and other is not None:
                row = self._with_probe(row, one, other, findings)
            result.append(row)
        return result

    def _with_probe(self, before: Evidence, one: Event, other: Event, findings: Findings) -> Evidence:
        off, _ = apart(Turn(one).outputs(), Turn(other).outputs(), findings)
        if off is None or off.equal:
            return before
        row, text = before.row, "fed a thousandth of its input"
        findings.add(Finding("output", row.a, row.b, off, False, self.seed, None, f"of the layer, {text}"))
        text = "; ".join(filter(None, (row.text, text)))
        return replace(before, row=replace(row, alone=off, verdict="wrong", text=text))


def layer_of(at: Location, paths: set[Path]) -> Path:
    """The innermost layer that was called and has a variable at this location."""
    path = at[1:-1]
    while path and path not in paths:
        path = path[:-1]
    return path


def _is_of_library(pair: Pair) -> bool:
    ours, theirs = pair.a.event, pair.b.event
    family = family_of(ours.kind)
    is_single = ours.lanes <= 1 and theirs.lanes <= 1
    return is_single and family is not None and family is family_of(theirs.kind)


def _small(pair: Pair) -> list[np.ndarray]:
    # Half precision would underflow.
    return [x * x.dtype.type(_SMALL) if is_inexact(x) and x.dtype.itemsize >= 4 else x for x in pair.a.inputs()]


def _by_place(events: Sequence[Event]) -> dict[Place, Event]:
    return {event.place: event for event in events if event.is_fed}


def _differ_in_dtype(pair: Pair) -> bool:
    both = zip(pair.a.outputs(), pair.b.outputs(), strict=False)
    return any(x.dtype != y.dtype and x.shape == y.shape for x, y in both)


def _compare_dtypes(rows: Sequence[Evidence], findings: Findings) -> None:
    """A layer that is in another dtype by itself, which the outputs may not show."""
    for row in rows:
        if row.pair is not None and row.row.verdict == "wrong" and _differ_in_dtype(row.pair):
            dtypes = [", ".join(x.dtype.name for x in turn.outputs()) for turn in (row.pair.b, row.pair.a)]
            text = f"the layer returns {dtypes[0]}, expected {dtypes[1]}"
            findings.add(Finding("structure", row.row.a, row.row.b, None, False, text=text))
