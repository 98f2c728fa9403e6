"""Why two models part: the first place in the order of the run where one does not do what the other does.

Law: a cause is said of the innermost layer that is wrong by itself. What lies between layers is said of the module
whose code it is.
Knows findings and rows; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bridge._types import Path
from bridge.equivalence.counterparts import LayerPair
from bridge.equivalence.findings import BEFORE
from bridge.equivalence.layers import are_of_one_class, may_be_one
from bridge.equivalence.numbers import Difference, difference
from bridge.equivalence.recording import Event
from bridge.equivalence.report import Cause, Finding, Parting
from bridge.equivalence.rows import Evidence, show

_MOST_NAMED = 4


@dataclass(frozen=True)
class Case:
    """What is known of two models that differ.

    Attributes:
      findings: all of them.
      rows: of layers, in the order of `a`.
      exchanged: layers that hold each other's variables.
      draws: whether each model draws random numbers in this call.
      layers: path of a variable in a -> the layer that it is of.
      held: layers of a -> those of b that have their variables, be it one that does the work of several.
    """

    findings: Sequence[Finding]
    rows: Sequence[Evidence]
    exchanged: Sequence[LayerPair]
    draws: tuple[bool, bool]
    layers: Mapping[str, Path]
    held: Mapping[Path, Collection[Path]] = field(default_factory=dict)


def parting(case: Case) -> Parting:
    """Where and why they first part."""
    first = _parting(case)
    a, b = ("" if path == show(()) or path.startswith("inputs/") else path for path in (first.a, first.b))
    return Parting(a, b, first.cause, first.text)


def _parting(case: Case) -> Parting:
    wrong = [finding for finding in case.findings if not finding.equal]
    kinds = {finding.what for finding in wrong}
    named = [finding for finding in wrong if finding.what == "structure" and not (finding.path or finding.other)]
    if named and "output" not in kinds:
        return Parting("", "", "structure", f"{named[0].text}. {_advice('structure')}")
    if kinds & {"output", "structure", "random"}:
        return _of_outputs(case, wrong)
    return _of_one(case, wrong)


# ---- outputs differ ----


def _of_outputs(case: Case, wrong: Sequence[Finding]) -> Parting:
    first = _first_wrong(case.rows)
    if first is not None:
        evidence, is_between = first
        return _between(case, evidence) if is_between else _of_layer(case, evidence)
    counts = [finding for finding in wrong if finding.what == "random" and finding.difference is None]
    if counts and not any(finding.what == "output" for finding in wrong):
        return Parting("", "", "random", f"{counts[0].text}. Let both take as many.")
    if case.draws != (False, False):
        return _random(case)
    parameters = [finding for finding in wrong if finding.what == "parameter"]
    if parameters:
        return _of_parameter(case, _first(case, parameters))
    return _of_one(case, wrong)


def _first_wrong(rows: Sequence[Evidence]) -> tuple[Evidence, bool] | None:
    """The row with which it begins, and whether it is wrong before the layer is called.

    In time: what a layer would have been fed, as it begins; what it makes of a's input, as it ends. So a layer comes
    before the module that it is in, unless that is wrong behind it.
    """
    moments: list[tuple[int, Evidence, bool]] = []
    for evidence in rows:
        if evidence.pair is None:
            continue
        event, row = evidence.pair.a.event, evidence.row
        if evidence.natural is not None and not _is_equal(evidence.natural):
            moments.append((event.begin, evidence, True))
        if row.verdict == "wrong":
            moments.append((event.end, evidence, False))
    if not moments:
        return None
    _, evidence, is_between = min(moments, key=lambda moment: moment[0])
    return evidence, is_between


def _is_equal(off: Difference) -> bool:
    return off.equal and not off.forms


def _of_layer(case: Case, evidence: Evidence) -> Parting:
    row, pair = evidence.row, evidence.pair
    assert pair is not None
    ours, theirs = pair.a.event, pair.b.event
    is_leaf = not any(_is_inside(other, ours) for other in case.rows)
    numbers = f"its output differs by {_numbers(row.alone or row.output)} on equal input"
    if None not in (ours.trains, theirs.trains) and ours.trains is not theirs.trains:
        return _mode(row.a, row.b, ours, theirs)
    own = row.parameters
    if own is not None and not _is_equal(own):
        return _of_parameter(case, _finding_in(case, ours.path))
    off = row.alone or row.output
    if off is not None and off.forms:
        cause: Cause = "dtype" if off.absolute < float("inf") else "shape"
        return Parting(row.a, row.b, cause, f"it returns {off.forms} (b, a). {_advice(cause)}")
    if own is None and is_leaf and any(case.draws):
        return _random(case, row.a, row.b)
    options = f": {row.text}" if row.text else ""
    what = "the layer computes something else" if is_leaf else "its own code, behind the last layer, does so"
    return Parting(row.a, row.b, "computation", f"{what}{options}; {numbers}. {_advice('computation')}")


def _is_inside(other: Evidence, event: Event) -> bool:
    return other.pair is not None and any(above is event for above in other.pair.a.event.around())


def _between(case: Case, evidence: Evidence) -> Parting:
    pair = evidence.pair
    assert pair is not None
    ours, theirs = pair.a.event, pair.b.event
    if case.exchanged:
        return _exchanged(case.exchanged)
    around = _row_at(case, ours.parent)
    if around is not None and around.row.parameters is not None and not _is_equal(around.row.parameters):
        return _of_parameter(case, _finding_in(case, around.pair.a.event.path))
    if around is not None and around.is_given_otherwise:
        ours, theirs = around.pair.a.event, around.pair.b.event
    a, b = (show(event.parent.path) if event.parent is not None else "" for event in (ours, theirs))
    other = _called_otherwise(case.rows, evidence)
    if other is not None:
        one, two = _named_calls(evidence, other)
        text = f"expected {one} before or after {two} as in a; b calls the two in the other order."
        return Parting(evidence.row.a, evidence.row.b, "order", f"{text} {_advice('order')}")
    options = f" ({evidence.row.text})" if evidence.row.text else ""
    numbers = _numbers(evidence.natural)
    text = f"before {evidence.row.a}, what it is fed differs by {numbers}, though all layers before it agree{options}."
    left_out = _left_out(case, evidence.pair.a.event)
    instead = _instead_of(case, left_out, evidence.pair.b.event)
    if left_out is not None and instead is not None:
        text = f"{left_out.row.a} is called in a, and {instead.row.b} in its place in b: {text}"
        return Parting(left_out.row.a, instead.row.b, "order", f"{text} {_advice('order')}")
    if left_out is not None:
        text = f"{left_out.row.a} is called in a, and nothing in its place in b: {text}"
        return Parting(a, b, "structure", f"{text} {_advice('structure')}")
    if evidence.is_given_otherwise:
        return Parting(a, b, "structure", f"{text} {_advice('structure')}")
    if case.draws[0] != case.draws[1]:
        return Parting(a, b, "mode", f"{text} One model draws random numbers. {_advice('mode')}")
    natural = evidence.natural
    is_cast = natural is not None and bool(natural.forms) and natural.absolute < float("inf")
    cause: Cause = "dtype" if is_cast else "computation"
    return Parting(a, b, cause, f"{text} {_advice(cause)}")


def _left_out(case: Case, event: Event) -> Evidence | None:
    """The first layer, since the last one with a counterpart, that a calls before this one, and b does not."""

    def is_before(other: Event) -> bool:
        return other.parent is event.parent and other.begin < event.begin

    paired = [row.pair.a.event.begin for row in case.rows if row.pair is not None and is_before(row.pair.a.event)]
    known = {row.pair.a.event.path for row in case.rows if row.pair is not None}
    called = {row.pair.b.event.path for row in case.rows if row.pair is not None}
    called |= {row.event.path for row in case.rows if row.event is not None and row.row.b}
    for row in case.rows:
        if row.event is not None and row.event.path not in known and called & set(case.held.get(row.event.path, ())):
            continue
        if row.event is not None and row.row.a and is_before(row.event) and row.event.begin > max(paired, default=-1):
            return row
    return None


def _instead_of(case: Case, left_out: Evidence | None, event: Event) -> Evidence | None:
    """What b calls in the place of a layer of the same class whose variables it has elsewhere, and calls nothing of."""
    if left_out is None or left_out.event is None or left_out.event.path not in case.held:
        return None

    def is_before(other: Event) -> bool:
        return other.parent is event.parent and other.begin < event.begin

    kind = left_out.event.kind
    alone = [row for row in case.rows if row.event is not None and row.row.b and is_before(row.event)]
    alike = [row for row in alone if row.event is not None and are_of_one_class(kind, row.event.kind)]
    path, held = left_out.event.path, case.held
    return next((row for row in alike if row.event and not may_be_one(path, row.event.path, held)), None)


def _named_calls(one: Evidence, other: Evidence) -> tuple[str, str]:
    """Two layers, or two calls of one."""
    names = (one.row.a, other.row.a)
    if names[0] != names[1]:
        return names
    return f"call {one.row.call} of {names[0]}", f"call {other.row.call}"


def _row_at(case: Case, event: Event | None) -> Evidence | None:
    return next((row for row in case.rows if row.pair is not None and row.pair.a.event is event), None)


def _called_otherwise(rows: Sequence[Evidence], evidence: Evidence) -> Evidence | None:
    """The layer that b calls in the place of this one: on the other side of it, and with what one of the two is fed."""
    assert evidence.pair is not None
    ours, theirs = evidence.pair.a.event, evidence.pair.b.event
    for other in rows:
        if other.pair is None or other is evidence:
            continue
        its, there = other.pair.a.event, other.pair.b.event
        is_moved = its.parent is ours.parent and (its.begin < ours.begin) != (there.begin < theirs.begin)
        if is_moved and (_are_same(other.natural_inputs, evidence) or _are_same(evidence.natural_inputs, other)):
            return other
    return None


def _are_same(fed: Sequence[np.ndarray], evidence: Evidence) -> bool:
    """Whether b would feed what a feeds the layer of another row."""
    assert evidence.pair is not None
    wanted = evidence.pair.a.inputs()
    return (
        bool(fed) and len(fed) == len(wanted) and all(difference(x, y).equal for x, y in zip(fed, wanted, strict=True))
    )


# ---- something differs, and outputs do not, or nobody has looked at layers ----


def _of_one(case: Case, wrong: Sequence[Finding]) -> Parting:
    causes: Mapping[str, Cause] = {
        "parameter": "parameters",
        "structure": "structure",
        "state": "state",
        "random": "random",
        "output": "computation",
        "gradient": "computation",
        "loss": "training",
        "trained parameter": "training",
        "optimizer state": "training",
    }
    before = [finding for finding in wrong if finding.what == "state" and finding.text.startswith(BEFORE)]
    if before and not any(finding.what == "parameter" for finding in wrong):
        return _of_parameter(case, _first(case, before))
    kind = min((finding.what for finding in wrong), key=list(causes).index)
    finding = _first(case, [finding for finding in wrong if finding.what == kind])
    if finding.what == "gradient":
        finding = _last(case, [finding for finding in wrong if finding.what == "gradient"])
    if finding.what == "parameter":
        return _of_parameter(case, finding)
    cause, off = causes[finding.what], finding.difference
    if off is not None and off.forms and finding.what in ("output", "state"):
        cause = "dtype" if off.absolute < float("inf") else "shape"
    evidence = _row_of(case, finding)
    if evidence is not None and evidence.pair is not None:
        ours, theirs = evidence.pair.a.event, evidence.pair.b.event
        if None not in (ours.trains, theirs.trains) and ours.trains is not theirs.trains:
            return _mode(evidence.row.a, evidence.row.b, ours, theirs)
    options = f" ({evidence.row.text})" if evidence is not None and evidence.row.text else ""
    if off is None:
        return Parting(finding.path, finding.other, cause, f"{finding.what}: {finding.text}. {_advice(cause)}")
    where = "" if finding.step is None else f" at step {finding.step}"
    also = f", {finding.text}" if finding.text else ""
    what = f"{finding.what}{where}: differs by {_numbers(off)}{also}{options}"
    return Parting(finding.path, finding.other, cause, f"{what}. {_advice(cause)}")


def _first(case: Case, wrong: Sequence[Finding]) -> Finding:
    """The one of the layer that is called first."""
    return min(wrong, key=lambda finding: _when(case, finding, len(case.rows)))


def _last(case: Case, wrong: Sequence[Finding]) -> Finding:
    """The one of the layer that is called last: gradients go backwards, so there it begins."""
    return max(wrong, key=lambda finding: _when(case, finding, -1))


def _when(case: Case, finding: Finding, otherwise: int) -> int:
    """The number of the layer's row."""
    layer = case.layers.get(finding.path)
    for number, evidence in enumerate(case.rows):
        if evidence.pair is not None and evidence.pair.a.event.path == layer and layer:
            return number
    return otherwise


def _row_of(case: Case, finding: Finding) -> Evidence | None:
    """The row of the layer that a variable is in."""
    layer = case.layers.get(finding.path)
    for evidence in case.rows:
        if evidence.pair is not None and evidence.pair.a.event.path == layer:
            return evidence
    return None


def _of_parameter(case: Case, finding: Finding) -> Parting:
    off = finding.difference
    if any(pair.a == case.layers.get(finding.path) for pair in case.exchanged):
        return _exchanged(case.exchanged)
    if off is not None and off.forms:
        cause: Cause = "dtype" if off.absolute < float("inf") else "shape"
        return Parting(finding.path, finding.other, cause, f"{off.forms} (b, a). {_advice('parameters')}")
    numbers = "" if off is None else f"differ by {_numbers(off)}"
    also = f", {finding.text}" if finding.text else ""
    row = _row_of(case, finding)
    if finding.what == "state" and row is not None:
        text = f"the values of {finding.path} {numbers}{also}. {_advice('state')}"
        return Parting(row.row.a, row.row.b, "state", text)
    text = f"the values {numbers}{also}. {_advice('parameters')}"
    return Parting(finding.path, finding.other, "parameters" if finding.what == "parameter" else "state", text)


def _finding_in(case: Case, path: Path) -> Finding:
    """The variable of a layer that differs the most; parameters first."""
    inside = [finding for finding in case.findings if case.layers.get(finding.path) == path and not finding.equal]
    own = [finding for finding in inside if finding.what in ("parameter", "state")]
    return min(own, key=lambda finding: finding.what != "parameter")


def _exchanged(exchanged: Sequence[LayerPair]) -> Parting:
    first = exchanged[0]
    pairs = named_pairs(exchanged)
    text = f"layers have each other's variables, or are called in each other's place: by their numbers {pairs}."
    return Parting(show(first.a), show(first.b), "order", f"{text} {_advice('order')}")


def named_pairs(pairs: Sequence[LayerPair]) -> str:
    """Which layer of a is which of b, for people; the first few.

    >>> named_pairs([LayerPair(("q",), (), ("d",), ()), LayerPair(("d",), (0,), ("q",), (1,))])
    'q = d, d[0] = q[1]'
    """
    named = [f"{_indexed(pair.a, pair.a_index)} = {_indexed(pair.b, pair.b_index)}" for pair in pairs]
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return f"{', '.join(named[:_MOST_NAMED])}{more}"


def _indexed(path: Path, index: Sequence[int]) -> str:
    return show(path) + "".join(f"[{n}]" for n in index)


def _mode(a: str, b: str, ours: Event, theirs: Event) -> Parting:
    modes = {True: "in training mode", False: "in evaluation mode", None: "told no mode"}
    text = f"the layer is {modes[ours.trains]} in a and {modes[theirs.trains]} in b."
    return Parting(a, b, "mode", f"{text} {_advice('mode')}")


def _random(case: Case, a: str = "", b: str = "") -> Parting:
    if all(case.draws):
        text = "both models draw random numbers, and not the same ones: each API folds its own names into keys."
        return Parting(a, b, "random", f"{text} {_advice('random')}")
    which = "a" if case.draws[0] else "b"
    return Parting(a, b, "mode", f"{which} draws random numbers and the other does not. {_advice('mode')}")


_ADVICE: Mapping[str, str] = {
    "parameters": "Convert or load the variables again, and look at the rules for this one.",
    "computation": "Compare the code and the options of the two.",
    "dtype": "Give both the same dtype and param_dtype.",
    "shape": "Compare the options that decide on shapes.",
    "mode": "Give both the same mode: model.eval() or model.train(), deterministic=, train=, use_running_average=.",
    "order": "Exchange them in one model, or say in the rules which is which.",
    "structure": "Let both return, and hold, the same things.",
    "random": "Compare a call without (deterministic=True), or a ToNNX with the same rngs.",
    "state": "Compare momentum and mode of the layer, and what was loaded into it.",
    "training": "Compare what the optimizer is told of each: masks, labels, schedules.",
}


def _advice(cause: Cause) -> str:
    return _ADVICE[cause]


def _numbers(off: Difference | None) -> str:
    if off is None:
        return "an unknown amount"
    return f"{off.absolute:.3g} (scale {off.scale:.3g}, tolerance {off.tolerance:.3g})"
