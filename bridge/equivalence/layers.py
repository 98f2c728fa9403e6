"""Two records of calls, layer by layer: which call is which, and how far inputs and outputs are apart.

Law: every call of a layer with a counterpart is in exactly one row, in the order in which `a` runs; what has none is
in a row of its own. A layer is wrong by itself if it makes something else of the very input that the other was fed.
Knows records, pairs of layers and numbers; knows nothing of how models are run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge._types import Path
from bridge.equivalence.counterparts import Counterparts, LayerPair
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


def path_pairs(pairs: Counterparts, a: Iterable[Path], b: Iterable[Path]) -> dict[Path, list[Path]]:
    """Path in `a` -> paths in `b`: of layers with variables, of what holds them, and of their neighbours without.

    Args:
      a, b: paths of all layers that were called.
    """
    ours, theirs = list(dict.fromkeys(a)), list(dict.fromkeys(b))
    if pairs.layers is None:
        known = set(theirs)
        return {path: [path] for path in ours if path in known}
    partners: dict[Path, dict[Path, None]] = {}
    for pair in pairs.layers:
        partners.setdefault(pair.a, {})[pair.b] = None
    partners.setdefault((), {(): None})
    containers = _containers(partners)
    for path, other in containers.items():
        partners.setdefault(path, {})[other] = None
    return {path: list(others) for path, others in partners.items()}


def _containers(partners: Mapping[Path, Mapping[Path, None]]) -> dict[Path, Path]:
    """What holds the same layers on both sides; of several, one inside the other, the outermost with the outermost."""
    below_a = _below(partners)
    below_b = _below(itertools.chain(*partners.values()))
    by_layers: dict[frozenset[Path], list[Path]] = {}
    for path in sorted(below_b, key=len):
        by_layers.setdefault(frozenset(below_b[path]), []).append(path)
    containers: dict[Path, Path] = {}
    taken: dict[Path, int] = {}
    for path in sorted(below_a, key=len):
        image = frozenset(other for layer in below_a[path] for other in partners[layer])
        candidates = [other for other in by_layers.get(image, ()) if other not in taken]
        if path and candidates:
            containers[path] = candidates[0]
            taken[candidates[0]] = 1
    return containers


def _below(paths: Iterable[Path]) -> dict[Path, set[Path]]:
    below: dict[Path, set[Path]] = {}
    for path in paths:
        for length in range(1, len(path)):
            below.setdefault(path[:length], set()).add(path)
    return below


# ---- which call is which ----


def pair_calls(pairs: Counterparts, a: Sequence[Event], b: Sequence[Event]) -> list[Pair]:
    """Calls that are to do the same, in the order of `a`."""
    paths = path_pairs(pairs, (event.path for event in a), (event.path for event in b))
    indexed: dict[Path, list[LayerPair]] = {}
    for layer in pairs.layers or ():
        indexed.setdefault(layer.a, []).append(layer)
    calls_a, calls_b = _by_method(a), _by_method(b)
    result: list[Pair] = []
    for (path, method), ours in calls_a.items():
        layers = indexed.get(path, [])
        if _is_restacked(layers):
            result += _expanded(layers, ours, calls_b, method, pairs)
            continue
        for other in paths.get(path, []):
            theirs = calls_b.get((other, method), [])
            both = zip(ours, theirs, strict=False)
            result += [Pair(Turn(x), Turn(y), n) for n, (x, y) in enumerate(both, start=1)]
    result += _without_variables(result, a, b)
    begun = {id(event): n for n, event in enumerate(a)}
    return sorted(result, key=lambda pair: (begun[id(pair.a.event)], pair.a.lane or 0))


def _by_method(events: Iterable[Event]) -> dict[tuple[Path, str], list[Event]]:
    calls: dict[tuple[Path, str], list[Event]] = {}
    for event in events:
        calls.setdefault((event.path, event.method), []).append(event)
    return calls


def _is_restacked(layers: Sequence[LayerPair]) -> bool:
    """Whether rounds of one side are layers, or other rounds, of the other."""
    others = {layer.b for layer in layers}
    return len(others) > 1 or any(layer.a_index != layer.b_index for layer in layers)


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


def _without_variables(known: Sequence[Pair], a: Sequence[Event], b: Sequence[Event]) -> Iterator[Pair]:
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
                both = zip(events, others, strict=True)
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
