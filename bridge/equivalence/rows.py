"""The rows of a report: each pair of calls with how far apart it was fed, returned, and what it makes of equal input.

Law: "wrong" is a layer that returns something else of what the other was fed; "fed wrong" one that returns something
else because it was fed something else.
Knows pairs of calls and numbers; knows nothing of causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bridge._types import Path
from bridge.equivalence.findings import Findings
from bridge.equivalence.layers import Pair, Turn
from bridge.equivalence.numbers import Difference
from bridge.equivalence.recording import Event, Place, fields_of
from bridge.equivalence.report import Row, Verdict
from bridge.tracing.trace import family_of


@dataclass(frozen=True)
class Evidence:
    """A row, and what else is known of it.

    Attributes:
      pair: the two calls; None for one that has no counterpart.
      natural: how far from a's input is what b itself would have fed the layer, had all layers before it been fed a's.
      natural_inputs: that.
      event: the call without a counterpart.
    """

    row: Row
    pair: Pair | None
    natural: Difference | None = None
    natural_inputs: Sequence[np.ndarray] = ()
    event: Event | None = None

    @property
    def is_given_otherwise(self) -> bool:
        """Whether the two calls have not as many arrays."""
        return self.pair is not None and _is_given_otherwise(self.pair)


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
    by_place = {event.place: event for event in fed}
    rows = [(pair.a.event.begin, _paired(pair, by_place, findings, parameters)) for pair in pairs]
    known = _with_those_around([pair.a.event for pair in pairs] + [pair.b.event for pair in pairs])
    rows += [(event.begin, _alone(event, "a")) for event in _unpaired(a, known)]
    last = max((event.begin for event in a), default=0)
    rows += [(last + 1 + event.begin, _alone(event, "b")) for event in _unpaired(b, known)]
    return _innermost([row for _, row in sorted(rows, key=lambda item: item[0])])


def _innermost(rows: list[Evidence]) -> list[Evidence]:
    """With the verdict on modules: wrong is one whose own code is, and not one in which a wrong layer is."""
    own_code, holders = _with_wrong_code(rows), _with_wrong_layers(rows)
    result: list[Evidence] = []
    for evidence in rows:
        row, here = evidence.row, id(evidence.pair.a.event) if evidence.pair is not None else 0
        if here in own_code and row.verdict != "equal":
            row = replace(row, verdict="wrong", text=_joined(row.text, "its own code, between layers"))
        elif here in holders and row.verdict == "wrong":
            row = replace(row, verdict="fed wrong", text=_joined(row.text, "a layer inside of it is wrong"))
        result.append(replace(evidence, row=row))
    return result


def _with_wrong_layers(rows: Iterable[Evidence]) -> set[int]:
    """Ids of the calls in which there is a layer that is wrong."""
    holders: set[int] = set()
    for evidence in rows:
        if evidence.pair is not None and evidence.row.verdict == "wrong":
            holders.update(map(id, evidence.pair.a.event.around()))
    return holders


def _with_wrong_code(rows: Iterable[Evidence]) -> set[int]:
    """Ids of the calls that would feed a layer something else before any layer in them is wrong."""
    first: dict[int, tuple[int, bool]] = {}
    for evidence in rows:
        is_fed_otherwise = evidence.natural is not None and not evidence.natural.equal
        if evidence.pair is not None and (is_fed_otherwise or evidence.is_given_otherwise):
            first[id(evidence.pair.a.event)] = (-1, False)  # what it was fed is to blame
    given_otherwise = {id(row.pair.a.event) for row in rows if row.pair is not None and row.is_given_otherwise}
    for evidence in rows:
        if evidence.pair is None or evidence.pair.a.event.parent is None:
            continue
        event, natural = evidence.pair.a.event, evidence.natural
        if natural is not None and not (natural.equal and not natural.forms):
            moment = (event.begin, True)
            first[id(event.parent)] = min(first.get(id(event.parent), moment), moment)
            # A layer that has not as many arrays as in a does otherwise inside: that is its caller's code.
            caller = next((above for above in event.around() if id(above) not in given_otherwise), None)
            first[id(caller)] = min(first.get(id(caller), moment), moment)
        for above in event.around() if evidence.row.verdict == "wrong" else ():
            moment = (event.end, False)
            first[id(above)] = min(first.get(id(above), moment), moment)
    return {parent for parent, (_, is_between) in first.items() if is_between}


def _joined(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def _paired(
    pair: Pair, fed: Mapping[Place, Event], findings: Findings, parameters: Mapping[Path, Difference]
) -> Evidence:
    ours, theirs = pair.a.event, pair.b.event
    takes_others, is_otherwise = _takes_other_arrays(pair), _is_given_otherwise(pair)
    given, given_text = (None, "") if takes_others else apart(pair.a.inputs(), pair.b.inputs(), findings)
    output, output_text = apart(pair.a.outputs(), pair.b.outputs(), findings)
    replayed = fed.get(theirs.place)
    alone = natural = None
    natural_inputs: list[np.ndarray] = []
    if replayed is not None:
        returned, _ = apart(pair.a.outputs(), Turn(replayed).outputs(), findings)
        alone = returned if replayed.is_fed else None
        natural_inputs = Turn(replayed).inputs()
        natural, count = apart(pair.a.inputs(), natural_inputs, findings)
        if len(natural_inputs) != len(pair.a.inputs()) and returned is not None and not returned.equal:
            natural = Difference(np.inf, 0.0, None, 0.0, False, count)
        if takes_others:
            natural = None
    verdict = _verdict_of_other_arguments(output) if is_otherwise else _verdict(given, output, alone)
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
        verdict=verdict,
        text=_joined(*texts),
    )
    return Evidence(row, pair, natural, natural_inputs)


def _is_given_otherwise(pair: Pair) -> bool:
    """Whether the two calls have not as many arrays: a mask that only one side gives, say."""
    return not _takes_other_arrays(pair) and len(pair.a.inputs()) != len(pair.b.inputs())


def _takes_other_arrays(pair: Pair) -> bool:
    """Whether these are calls of both whole models, of which one hands on other arrays than it got, as a `method` may.

    They got the same: it is no difference of what they are given.
    """
    a, b = pair.a.event, pair.b.event
    is_whole = not (a.path or b.path) and a.parent is None and b.parent is None
    return is_whole and len(pair.a.inputs()) != len(pair.b.inputs())


def _verdict(given: Difference | None, output: Difference | None, alone: Difference | None) -> Verdict:
    if output is None or (output.equal and not output.forms):
        return "equal"
    if alone is not None:
        return "fed wrong" if alone.equal and not alone.forms else "wrong"
    return "fed wrong" if given is not None and (not given.equal or given.forms) else "wrong"


def _verdict_of_other_arguments(output: Difference | None) -> Verdict:
    """Of calls of which one has an array that the other has not: what is made of that is not the layer's fault."""
    return "equal" if output is None or (output.equal and not output.forms) else "fed wrong"


def _with_those_around(events: Iterable[Event]) -> set[int]:
    """Of calls that have a counterpart, and of the modules that they are in: these are there, one way or another."""
    known: set[int] = set()
    for event in events:
        here: Event | None = event
        while here is not None and id(here) not in known:
            known.add(id(here))
            here = here.parent
    return known


def _unpaired(events: Iterable[Event], known: set[int]) -> list[Event]:
    """Calls without a counterpart that are worth a row.

    Not those of helpers (`initialize_carry`), of which one API may not tell; nor of what a layer of the library, which
    has a counterpart itself, is made of: the gates of a cell are fused in one API.
    """
    calls = [event for event in events if id(event) not in known and event.method == "__call__"]
    return [event for event in calls if not _is_part(event, known)]


def _is_part(event: Event, known: set[int]) -> bool:
    return any(id(above) in known and family_of(above.kind) is not None for above in event.around())


def _alone(event: Event, side: str) -> Evidence:
    here = show(event.path)
    a, b = (here, "") if side == "a" else ("", here)
    call, method = event.call, event.method
    text = f"no counterpart of this call in {'b' if side == 'a' else 'a'}"
    return Evidence(
        Row(a, b, event.kind.__name__, call, method, None, None, None, None, "unpaired", text), None, event=event
    )


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
