"""What a call leaves behind, compared: state that it changes, makes or removes, attributes, numbers it draws.

Law: what one call alone leaves behind is a finding, unless the other side is of a kind that cannot have it, and then it
is listed.
Knows outcomes, pairs and findings; knows nothing of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge._errors import show_path
from bridge._types import Location
from bridge.equivalence.counterparts import Counterparts, Match
from bridge.equivalence.findings import Findings
from bridge.equivalence.layers import path_pairs
from bridge.equivalence.outcome import Outcome
from bridge.equivalence.report import Finding
from bridge.equivalence.subjects import ATTRIBUTES, DRAWS, Subject

_SOWN = "intermediates"


def compare_effects(
    a: Subject, b: Subject, pairs: Counterparts, findings: Findings, one: Outcome, two: Outcome, seed: int
) -> None:
    """Add what the two calls have written, each on its own side, to the findings."""
    known_a = {at: x for at, x in {**a.values, **one.written}.items() if at in a.values}
    known_b = {at: x for at, x in {**b.values, **two.written}.items() if at in b.values}

    def is_state(match: Match) -> bool:
        if match.a not in a.parameters or match.b not in b.parameters:
            return True
        return match.a in one.written or match.b in two.written

    def least(match: Match) -> float:
        return min(one.allowed("written", match.a), two.allowed("written", match.b))

    findings.compare_all("state", filter(is_state, pairs.values(known_a, known_b)), least, seed=seed)
    ours = {at: x for at, x in one.written.items() if at not in a.values}
    theirs = {at: x for at, x in two.written.items() if at not in b.values}
    _compare_draws(a, b, findings, _taken(ours, DRAWS), _taken(theirs, DRAWS), seed)
    new = _New(a, b, findings, seed)
    kinds = [{at[1:-1]: object for at in side} for side in (ours, theirs)]
    paths = path_pairs(pairs, *kinds)
    left = dict(theirs)
    for at, x in sorted(ours.items()):
        candidates = [(at[0], *paths[at[1:-1]], at[-1])] if at[1:-1] in paths else []
        candidates += [other for other in left if (other[0], other[-1]) == (at[0], at[-1])]
        partner = next((other for other in candidates if other in left), None)
        if partner is None:
            new.alone(at, x, "a")
            continue
        allowed = min(one.allowed("written", at), two.allowed("written", partner))
        findings.compare("state", show_path(at), show_path(partner), x, left.pop(partner), seed=seed, least=allowed)
    for at, x in left.items():
        new.alone(at, x, "b")


class _New:
    """What a call has made on one side alone."""

    def __init__(self, a: Subject, b: Subject, findings: Findings, seed: int):
        self._sides, self._findings, self._seed = {"a": a, "b": b}, findings, seed

    def alone(self, at: Location, x: Any, which: str) -> None:
        """A finding, or a line among what is not compared."""
        other = "b" if which == "a" else "a"
        own, counterpart = self._sides[which], self._sides[other]
        if at[0] == ATTRIBUTES:
            text = f"the call sets the attribute {show_path(at[1:])} of {which} to {_value(x)}, and not in {other}"
            # Nothing changes the attributes of a Linen module.
            is_listed = not counterpart.is_native
        else:
            text = f"state {show_path(at)}: the call makes it in {which}, and not in {other}"
            # Linen sows only where the caller asks for it, and `compare` always does.
            is_listed = counterpart.api == "function" or (at[0] == _SOWN and own.api == "linen")
        if is_listed:
            self._findings.leave_out(text)
            return
        paths = (show_path(at), "") if which == "a" else ("", show_path(at))
        what = "structure" if at[0] == ATTRIBUTES else "state"
        self._findings.add(Finding(what, *paths, None, False, self._seed, None, text))


def _value(x: Any) -> str:
    return str(x) if hasattr(x, "dtype") else repr(x)


def _taken(new: dict[Location, Any], collection: str) -> dict[str, int]:
    """What is in a collection, by name, taken out of `new`."""
    names = [at for at in new if at[0] == collection]
    return {at[1]: int(new.pop(at)) for at in names}


def _compare_draws(
    a: Subject, b: Subject, findings: Findings, ours: Mapping[str, int], theirs: Mapping[str, int], seed: int
) -> None:
    """How many numbers a call takes from the streams: of equal names, or else from all together."""
    if not (a.is_native and b.is_native):
        if any(ours.values()) or any(theirs.values()):
            findings.leave_out("random streams: how many keys the call takes, which one of the models does not count")
        return
    if ours.keys() != theirs.keys():
        ours, theirs = {"": sum(ours.values())}, {"": sum(theirs.values())}
    for name in sorted(ours):
        one, two = ours[name], theirs[name]
        stream = f"the stream {name}" if name else "all streams"
        text = f"the call takes {one} keys from {stream} in a, and {two} in b"
        findings.add(Finding("random", name, name, None, one == two, seed, None, text))
