"""Two records of calls, layer by layer: which call is which, and how far inputs and outputs are apart.

Law: every call of a layer with a counterpart is in exactly one row, in the order in which `a` runs; what has none is
in a row of its own. A layer is wrong by itself if it makes something else of the very input that the other was fed.
Knows records, pairs of layers and numbers; knows nothing of how models are run.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import nnx_core as nnx
from bridge._types import Location, Path
from bridge.equivalence.counterparts import Counterparts, LayerPair
from bridge.equivalence.numbers import difference, is_inexact, on_host
from bridge.equivalence.recording import Event, stacked
from bridge.tracing.trace import family_of


@dataclass(frozen=True)
class Turn:
    """A call of a layer, or one lane of it."""

    event: Event
    lane: int | None = None

    def inputs(self) -> list[np.ndarray]:
        return [self._value(column) for column in self.event.inputs if column]

    def outputs(self) -> list[np.ndarray]:
        return [self._value(column) for column in self.event.outputs if column]

    def _value(self, column: Sequence[np.ndarray]) -> np.ndarray:
        if self.lane is None:
            return stacked(column)
        return column[self.lane if len(column) > 1 else 0]


@dataclass(frozen=True)
class Pair:
    """Two calls that are to do the same."""

    a: Turn
    b: Turn
    call: int


# ---- which layer is which ----


def path_pairs(pairs: Counterparts, a: Mapping[Path, Any], b: Mapping[Path, Any]) -> dict[Path, Path]:
    """Path in `a` -> path in `b`, of layers and of modules that hold the same variables, no more and no less.

    Of several, one inside of the other, those of one class are the same, or else the outermost with the outermost.

    Args:
      a, b: paths of all layers, each with its class.
    """
    if pairs.located is None:
        return {path: path for path in a if path in b}
    forth: dict[Location, set[Location]] = {}
    back: dict[Location, set[Location]] = {}
    for at, there in pairs.located:
        forth.setdefault(at, set()).add(there)
        back.setdefault(there, set()).add(at)
    ours, theirs = _by_variables(a, forth), _by_variables(b, back)
    result = {(): ()} if () in a and () in b else {}
    for held, paths in ours.items():
        image = frozenset(itertools.chain(*(forth[at] for at in held)))
        if frozenset(itertools.chain(*(back[at] for at in image))) == held:
            others = [path for path in theirs.get(image, ()) if path]
            result |= _one_by_one([path for path in paths if path], others, a, b)
    return result


def _by_variables(paths: Iterable[Path], known: Iterable[Location]) -> dict[frozenset[Location], list[Path]]:
    """The variables at or below a path, of those with a counterpart -> the paths with just these."""
    below: dict[Path, set[Location]] = {}
    for at in known:
        for length in range(len(at)):
            below.setdefault(at[1:][:length], set()).add(at)
    groups: dict[frozenset[Location], list[Path]] = {}
    for path in sorted(paths, key=len):
        if path in below:
            groups.setdefault(frozenset(below[path]), []).append(path)
    return groups


def _one_by_one(
    ours: Sequence[Path], theirs: Sequence[Path], a: Mapping[Path, Any], b: Mapping[Path, Any]
) -> dict[Path, Path]:
    chosen: dict[Path, Path] = {}
    for is_same in (are_of_one_class, lambda kind, other: True):
        for path in ours:
            free = [other for other in theirs if other not in chosen.values()]
            other = next((other for other in free if is_same(a[path], b[other])), None)
            if path not in chosen and other is not None:
                chosen[path] = other
    return chosen


def are_of_one_class(kind: Any, other: Any) -> bool:
    """Whether two classes are the same, or the same layer in both APIs."""
    family = family_of(kind)
    return kind.__name__ == other.__name__ or (family is not None and family is family_of(other))


def held_in(pairs: Counterparts, a: Iterable[Location], b: Iterable[Location]) -> dict[Path, set[Path]]:
    """Path of a layer in `a` -> those in `b` that have a counterpart of one of its variables."""
    held: dict[Path, set[Path]] = {}
    located = pairs.located
    for at, there in ((at, at) for at in set(a) & set(b)) if located is None else located:
        held.setdefault(at[1:-1], set()).add(there[1:-1])
    return held


def may_be_one(path: Path, other: Path, held: Mapping[Path, Collection[Path]]) -> bool:
    """Whether a layer of `a` is not known to be another one of `b`: a wrapper stands for the layer inside of it."""
    partners = held.get(path, (other,))
    return any(other[: len(known)] == known or known[: len(other)] == other for known in partners)


# ---- which call is which ----


def pair_calls(
    pairs: Counterparts, a: Sequence[Event], b: Sequence[Event], held: Mapping[Path, Collection[Path]]
) -> list[Pair]:
    """Calls that are to do the same, in the order of `a`.

    Args:
      held: which layers have each other's variables, see `held_in`: no others are the same.
    """
    a, b = outside_of_wrappers(a), outside_of_wrappers(b)
    kinds = [{event.path: event.kind for event in events} for events in (a, b)]
    paths = path_pairs(pairs, *kinds)
    indexed: dict[Path, list[LayerPair]] = {}
    for layer in pairs.layers:
        indexed.setdefault(layer.a, []).append(layer)
    calls_a, calls_b = _by_method(a), _by_method(b)
    result: list[Pair] = []
    for (path, method), ours in calls_a.items():
        if path in indexed:
            result += _expanded(indexed[path], ours, calls_b, method, pairs)
        elif path in paths:
            both = zip(ours, calls_b.get((paths[path], method), []), strict=False)
            result += [Pair(Turn(x), Turn(y), n) for n, (x, y) in enumerate(both, start=1)]
    result += _without_variables(result, a, b, held)
    begun = {id(event): n for n, event in enumerate(a)}
    return sorted(result, key=lambda pair: (begun[id(pair.a.event)], pair.a.lane or 0))


def outside_of_wrappers(events: Iterable[Event]) -> list[Event]:
    """Without calls of what WeightNorm and SpectralNorm wrap: its kernel is made by them, in either API otherwise."""
    return [event for event in events if not any(map(_makes_kernels, event.around()))]


def _makes_kernels(event: Event) -> bool:
    return family_of(event.kind) in (nnx.WeightNorm, nnx.SpectralNorm)


def _by_method(events: Iterable[Event]) -> dict[tuple[Path, str], list[Event]]:
    calls: dict[tuple[Path, str], list[Event]] = {}
    for event in events:
        calls.setdefault((event.path, event.method), []).append(event)
    return calls


def _expanded(
    layers: Sequence[LayerPair], ours: Sequence[Event], calls_b: Any, method: str, pairs: Counterparts
) -> Iterator[Pair]:
    """The calls of a stack, round by round, and those of its counterparts."""
    path = layers[0].a
    rounds_a = _rounds(ours, pairs.sizes_a.get(path, ()))
    for layer in layers:
        theirs = calls_b.get((layer.b, method), [])
        rounds_b = _rounds(theirs, pairs.sizes_b.get(layer.b, ()))
        both = zip(rounds_a.get(layer.a_index, ()), rounds_b.get(layer.b_index, ()), strict=False)
        number = (layer.a_index[-1] if layer.a_index else 0) + 1
        yield from (Pair(x, y, number) for x, y in both)


def _rounds(events: Sequence[Event], sizes: tuple[int, ...]) -> dict[tuple[int, ...], list[Turn]]:
    """Index along the stacked axes -> the calls with it: steps of a scan are calls, those of a vmap lanes."""
    count, lanes = len(events), max((event.lanes for event in events), default=1)
    rounds: dict[tuple[int, ...], list[Turn]] = {}
    total = int(np.prod(sizes)) if sizes else 1
    if not sizes:
        return {(): [Turn(event) for event in events]}
    for n, event in enumerate(events):
        if lanes == total:
            for lane in range(lanes):
                rounds.setdefault(_unravel(lane, sizes), []).append(Turn(event, lane))
        elif count % total == 0:
            step = n // (count // total)
            rounds.setdefault(_unravel(step, sizes), []).append(Turn(event))
        elif len(sizes) == 2 and lanes in sizes and count % (total // lanes) == 0:
            step = n // (count // (total // lanes))
            for lane in range(lanes):
                index = (step, lane) if sizes[1] == lanes else (lane, step)
                rounds.setdefault(index, []).append(Turn(event, lane))
    return rounds


def _unravel(n: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(n, sizes))


def _without_variables(
    known: Sequence[Pair], a: Sequence[Event], b: Sequence[Event], held: Mapping[Path, Collection[Path]]
) -> Iterator[Pair]:
    """Layers that have none, such as dropout: of one class, in calls that are paired, in order."""
    done_a = {id(pair.a.event) for pair in known}
    done_b = {id(pair.b.event) for pair in known}
    partners = {id(pair.a.event): pair.b.event for pair in known if pair.a.lane is None}
    inner_a, inner_b = _inside(a, done_a), _inside(b, done_b)
    for parent, ours in inner_a.items():
        partner = partners.get(parent)
        theirs = inner_b.get(id(partner), {}) if partner is not None else {}
        for key, events in ours.items():
            others = theirs.get(key, [])
            if len(events) == len(others):
                both = [(x, y) for x, y in zip(events, others, strict=True) if may_be_one(x.path, y.path, held)]
                yield from (Pair(Turn(x), Turn(y), n) for n, (x, y) in enumerate(both, start=1))


def _inside(events: Sequence[Event], done: set[int]) -> dict[int, dict[Any, list[Event]]]:
    """id of the call around -> (class, method) -> calls that have no counterpart yet."""
    inside: dict[int, dict[Any, list[Event]]] = {}
    for event in events:
        if id(event) in done or event.parent is None:
            continue
        kind = family_of(event.kind) or event.kind.__name__
        inside.setdefault(id(event.parent), {}).setdefault((kind, event.method), []).append(event)
    return inside


# ---- steps of a scan in another order ----


def by_steps(pairs: Sequence[Pair], differing: Collection[Path]) -> list[Pair]:
    """The pairs, those of the steps of a scan by the variables that each step has: one of both may run in reverse.

    Args:
      differing: layers of `a` that have not the variables of their counterparts: their steps are as they are called.
    """
    alike: dict[tuple[Path, str], list[Pair]] = {}
    for pair in pairs:
        if pair.a.lane is None and pair.b.lane is None:
            alike.setdefault((pair.a.event.path, pair.a.event.method), []).append(pair)
    orders: dict[Path, tuple[int, ...]] = {}
    for (path, _), steps in alike.items():
        order = _order_of_steps(steps) if path not in differing else None
        if order is not None:
            orders[path] = order
    moved: dict[int, Turn] = {}
    for (path, _), steps in alike.items():
        order = _order_around(path, len(steps), orders)
        for pair, number in zip(steps, order, strict=True):
            moved[id(pair)] = steps[number].b
    return [replace(pair, b=moved.get(id(pair), pair.b)) for pair in pairs]


def _order_of_steps(steps: Sequence[Pair]) -> tuple[int, ...] | None:
    """For each step of a's the one of b's that has its variables; None if they stand as they are, or some have none."""
    ours = [_sorted(pair.a.event.own) for pair in steps]
    theirs = [_sorted(pair.b.event.own) for pair in steps]
    if len(steps) == 1 or not ours[0].size or all(map(_are_equal, ours, theirs)):
        return None
    order: list[int] = []
    for x in ours:
        order += [n for n, y in enumerate(theirs) if n not in order and _are_equal(x, y)][:1]
    return tuple(order) if len(order) == len(steps) else None


def _sorted(own: Sequence[Any]) -> np.ndarray:
    """All numbers, whatever the layout of the variables."""
    numbers = [np.abs(on_host(x)).ravel() for x in own if is_inexact(x)]
    return np.sort(np.concatenate(numbers)) if numbers else np.zeros(0)


def _are_equal(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and difference(y, x).equal


def _order_around(path: Path, count: int, orders: Mapping[Path, tuple[int, ...]]) -> tuple[int, ...]:
    """That of a layer itself, or of one inside of it that runs as often."""
    inside = [order for known, order in orders.items() if known[: len(path)] == path and len(order) == count]
    return inside[0] if inside else tuple(range(count))
