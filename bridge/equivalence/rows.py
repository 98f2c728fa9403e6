"""The rows of a report: each pair of calls with how far apart it was fed, returned, and what it makes of equal input.

Law: "wrong" is a layer that returns something else of what the other was fed; "fed wrong" one that returns something
else because it was fed something else.
Knows pairs of calls and numbers; knows nothing of causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridge._types import Path
from bridge.equivalence.findings import Findings
from bridge.equivalence.layers import Pair, Turn
from bridge.equivalence.numbers import Difference
from bridge.equivalence.recording import Event, Place, fields_of
from bridge.equivalence.report import Row, Verdict


@dataclass(frozen=True)
class Evidence:
    """A row, and what else is known of it.

    Attributes:
      pair: the two calls; None for one that has no counterpart.
      natural: how far from a's input is what b itself would have fed the layer, had all layers before it been fed a's.
    """

    row: Row
    pair: Pair | None
    natural: Difference | None = None


def to_feed(pairs: Iterable[Pair]) -> dict[Place, list[np.ndarray]]:
    """What b's layers are to be fed so that each has a's input: those that are called one by one."""
    feed: dict[Place, list[np.ndarray]] = {}
    for pair in pairs:
        if pair.b.lane is None and pair.b.event.lanes <= 1:
            feed[pair.b.event.place] = pair.a.inputs()
    return feed


def evidence(
    pairs: Sequence[Pair],
    a: Sequence[Event],
    b: Sequence[Event],
    fed: Sequence[Event],
    findings: Findings,
    parameters: Mapping[Path, Difference],
) -> list[Evidence]:
    """All rows: those of pairs in the order of `a`, and those of calls without a counterpart where they happen.

    Args:
      fed: the calls of b in a run in which its layers were fed a's inputs; empty if there was none.
      parameters: path of a layer in a -> the worst difference of its own variables.
    """
    by_place = {event.place: event for event in fed if event.is_fed}
    rows = [(pair.a.event.begin, _paired(pair, by_place, findings, parameters)) for pair in pairs]
    known = {id(pair.a.event) for pair in pairs} | {id(pair.b.event) for pair in pairs}
    rows += [(event.begin, _alone(event, "a")) for event in _unpaired(a, known)]
    last = max((event.begin for event in a), default=0)
    rows += [(last + 1 + event.begin, _alone(event, "b")) for event in _unpaired(b, known)]
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _paired(
    pair: Pair, fed: Mapping[Place, Event], findings: Findings, parameters: Mapping[Path, Difference]
) -> Evidence:
    ours, theirs = pair.a.event, pair.b.event
    given, given_text = apart(pair.a.inputs(), pair.b.inputs(), findings)
    output, output_text = apart(pair.a.outputs(), pair.b.outputs(), findings)
    replayed = fed.get(theirs.place)
    alone = natural = None
    if replayed is not None:
        alone, _ = apart(pair.a.outputs(), Turn(replayed).outputs(), findings)
        natural, _ = apart(pair.a.inputs(), Turn(replayed).inputs(), findings)
    texts = [given_text and f"input: {given_text}", output_text and f"output: {output_text}", _options(ours, theirs)]
    row = Row(
        a=show(ours.path),
        b=show(theirs.path),
        kind=f"{ours.kind.__name__}/{theirs.kind.__name__}",
        call=pair.call,
        method=ours.method,
        input=given,
        output=output,
        alone=alone,
        parameters=parameters.get(ours.path),
        verdict=_verdict(given, output, alone),
        text="; ".join(filter(None, texts)),
    )
    return Evidence(row, pair, natural)


def _verdict(given: Difference | None, output: Difference | None, alone: Difference | None) -> Verdict:
    if output is None or (output.equal and not output.forms):
        return "equal"
    if alone is not None:
        return "fed wrong" if alone.equal and not alone.forms else "wrong"
    return "fed wrong" if given is not None and not given.equal else "wrong"


def _unpaired(events: Iterable[Event], known: set[int]) -> list[Event]:
    """Calls without a counterpart; of helpers (`initialize_carry`) only one API may tell."""
    return [event for event in events if id(event) not in known and event.method == "__call__"]


def _alone(event: Event, side: str) -> Evidence:
    here = show(event.path)
    a, b = (here, "") if side == "a" else ("", here)
    call, method = event.call, event.method
    text = f"no counterpart of this call in {'b' if side == 'a' else 'a'}"
    return Evidence(Row(a, b, event.kind.__name__, call, method, None, None, None, None, "unpaired", text), None)


def show(path: Path) -> str:
    """The path of a layer; the whole model is "(root)"."""
    return "/".join(path) or "(root)"


def _options(ours: Event, theirs: Event) -> str:
    """Options that both layers have and that differ: epsilon, padding, ..."""
    own, other = fields_of(ours.layer), fields_of(theirs.layer)
    names = [name for name in sorted(own.keys() & other.keys()) if None not in (own[name], other[name])]
    texts = [f"{name} {own[name]} in a, {other[name]} in b" for name in names if own[name] != other[name]]
    if None not in (ours.trains, theirs.trains) and ours.trains is not theirs.trains:
        texts.append(f"{_mode(ours)} in a, {_mode(theirs)} in b")
    return ", ".join(texts)


def _mode(event: Event) -> str:
    return "in training mode" if event.trains else "in evaluation mode"


def apart(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], findings: Findings) -> tuple[Difference | None, str]:
    """The worst difference of arrays, one by one in order, and what is to be said of their number and shapes."""
    worst: Difference | None = None
    text = "" if len(xs) == len(ys) else f"{len(xs)} arrays in a, {len(ys)} in b"
    for x, y in zip(xs, ys, strict=False):
        if x.shape != y.shape and x.size == y.size:
            reshaped = findings.difference(x, y.reshape(x.shape))
            off = reshaped if reshaped.equal else findings.difference(x, y)
        else:
            off = findings.difference(x, y)
        if worst is None or _badness(off) > _badness(worst):
            worst = off
    if worst is not None and worst.forms:
        text = ", ".join(filter(None, (text, f"{worst.forms} (b, a)")))
    return worst, text


def _badness(off: Difference) -> tuple[bool, float, bool]:
    return not off.equal, off.ratio, bool(off.forms)
