"""Which proposal is right: found by runs on numbers that do not show what is not known yet.

Layers that may be exchanged are given the same numbers, kernels that may be turned are made symmetric, those that may
be cut or fused otherwise are made constant along the axis: then the outputs of both models agree whatever is what, and
where they do not, the fault lies elsewhere. The gradients, which are not symmetric, then tell what is what, all at
once.

Law: what is handed out was proven on numbers that show everything; a search ends after a fixed number of runs.
Knows proposals and benches; knows nothing of how models are traced.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bridge._errors import show_path
from bridge._types import Location
from bridge.checkpoint.derivation.bench import Bench, Evidence
from bridge.checkpoint.derivation.derived import Proof
from bridge.checkpoint.derivation.proposal import Fusion, Proposal, Spot
from bridge.checkpoint.derivation.rework import Rework, reworks
from bridge.checkpoint.derivation.to_rules import UnsayableRuleError
from bridge.equivalence.numbers import is_inexact
from bridge.tracing.pairs import Group, Index, Link
from bridge.tracing.trace import Slot

SEEDS = (0, 1, 2)
_MOST_RUNS = 96
_MOST_TOWERS = 16
_FAR = 10.0  # models that differ by rounding do so by a like amount whichever of two layers is which
_ROUNDING = 1e-2  # a sum in another order is off by as much of the tolerance: (a + b) + c and (c + b) + a
_ALIKE = 1e-3  # of gradients, relative to the larger one
_NOTHING = 3e-6  # of the largest gradient: what rounding leaves where there should be zero
_FEATURES = 6
_MOST_NAMED = 5


#: Two layers of a group: its number, and theirs in it.
Exchange = tuple[int, int, int]


@dataclass(frozen=True)
class Mode:
    """What is made invisible: the layout of a group along an axis, its whole axes, or a constant that is added."""

    kind: str
    group: int
    variable: int = 0
    amount: float = 0.0


def _of_unseen(unseen: set[Location]) -> str:
    named = ", ".join(show_path(at) for at in sorted(unseen)[:_MOST_NAMED])
    rest = f" and {len(unseen) - _MOST_NAMED} more" if len(unseen) > _MOST_NAMED else ""
    return f"no output depends on {named}{rest}, which names and shapes alone pair"


def proven(bench: Bench, rules: Any) -> tuple[Proof | None, Evidence]:
    """The proof that rules are right, or None; and the worst of what was seen, or what speaks against it."""
    worst: Evidence | None = None
    notes: list[str] = []
    unseen: set[Location] | None = None
    all_bits = True
    for seed in SEEDS:
        point = bench.point(seed)
        expected = bench.expected(seed)
        evidence = bench.compare(point, rules, expected)
        if seed and "finite" in evidence.misfit:
            continue  # numbers that the model is not made for say nothing
        if evidence.worst > 1:
            return None, evidence
        zero = {at for at, x in expected.gradients.items() if not np.any(np.asarray(x))}
        unseen = zero if unseen is None else unseen & zero
        all_bits = all_bits and evidence.bit_equal
        if worst is None or evidence.worst > worst.worst:
            worst = evidence
    if bench.without_gradients:
        notes.append(f"gradients were not compared: {bench.without_gradients}")
    if unseen:
        notes.append(_of_unseen(unseen))
    if worst.missing:
        named = ", ".join(sorted({at[0] for at in worst.missing}))
        notes.append(f"what a call writes into {named} was not all compared: bridge.equivalence.compare does")
    counts = len(worst.outputs), len(worst.gradients)
    proof = Proof(SEEDS, *counts, worst.worst, all_bits, tuple(notes), len(worst.written))
    return proof, worst


class Search:
    """Tries proposals until one is proven, or there are none left, or too many runs have been made."""

    def __init__(self, bench: Bench, base: Proposal):
        self.bench, self.base = bench, base
        self.runs = 0

    def find(self) -> tuple[Proposal, Proof] | None:
        """The first proposal that is proven."""
        if self.bench.without_gradients:
            return None
        tried: set[str] = set()
        for proposal in self._proposals():
            if self.runs >= _MOST_RUNS:
                return None
            changes = sorted(map(str, proposal.reworks.items()))
            key = str((proposal.orders, changes, [str(rework) for _, rework in proposal.fusions]))
            if key in tried:
                continue
            tried.add(key)
            try:
                proof, _ = proven(self.bench, proposal.derived)
            except UnsayableRuleError:
                continue
            self.runs += 1
            if proof is not None:
                return proposal, proof
        return None

    def _proposals(self) -> Iterator[Proposal]:
        """What the gradients tell where something is hidden; and exchanged towers, whose gradients may be zero then."""
        for number, modes in enumerate(self._modes()):
            proposal = self._read(modes)
            if proposal is not None:
                yield proposal
                if not number:
                    yield from self._towers()
            if self.runs >= _MOST_RUNS:
                return

    def _towers(self) -> Iterator[Proposal]:
        """Whole subtrees exchanged, as with the same numbers in both nothing may be left of an output."""
        exchanges: list[Exchange] = []
        for number, group in enumerate(self.base.groups):
            if group.by_order:
                exchanges += [(number, *two) for two in itertools.combinations(range(len(group.pairs)), 2)]
        for tower in itertools.islice(_towers(self.base, exchanges), _MOST_TOWERS):
            yield _exchanged(self.base, tower)

    def _modes(self) -> Iterator[tuple[Mode, ...]]:
        """What may be unknown at once: the order alone, one more thing, two more."""
        singles: list[Mode] = []
        for number, group in enumerate(self.base.groups):
            (ours, _), (theirs, _) = group.pairs[0]
            same = ours.family is not None and ours.family is theirs.family
            links = [link for spot, link in self.base.links.items() if spot[:2] == (number, 0)]
            if any(link.nnx.count > 1 for link in links):
                continue
            if not same:
                vectors = [n for n, link in enumerate(links) if len(link.linen.shape) == 1]
                singles += [Mode("add", number, n, amount) for n in vectors for amount in (1.0, -1.0)]
                if any(len(link.linen.shape) > 1 for link in links):
                    singles.append(Mode("axes", number))
            singles.append(Mode("out", number))
            if any(len(link.linen.shape) > 1 for link in links):
                singles.append(Mode("in", number))
        yield ()
        for mode in singles:
            yield (mode,)
        yield from itertools.combinations(singles, 2)

    def _read(self, modes: tuple[Mode, ...]) -> Proposal | None:
        """The proposal that gradients tell, if nothing but what `modes` hide is wrong."""
        base = self._with_constants(modes)
        if base is None:
            return None
        point = replace(self.bench.point(0), values=self._hidden(modes))
        try:
            derived = base.derived
        except UnsayableRuleError:
            return None
        self.runs += 1
        expected, actual = self.bench.linen(point), self.bench.nnx(point, derived)
        if self.bench.compare(point, derived, expected).worst_output > 1:
            return None
        return self._told(base, modes, expected.gradients, actual.gradients)

    def _with_constants(self, modes: Sequence[Mode]) -> Proposal | None:
        added: dict[Spot, Rework] = {}
        for mode in modes:
            if mode.kind == "add":
                for layer in range(len(self.base.groups[mode.group].pairs)):
                    if (mode.group, layer, mode.variable) in added:
                        return None
                    added[mode.group, layer, mode.variable] = Rework(add=mode.amount)
        return replace(self.base, reworks=added) if added else self.base

    # ---- numbers that hide ----

    def _hidden(self, modes: Sequence[Mode]) -> Mapping[Location, Any]:
        values = {at: np.array(x) if is_inexact(x) else x for at, x in self.bench.point(0).values.items()}
        kinds: dict[int, set[str]] = {}
        for mode in modes:
            kinds.setdefault(mode.group, set()).add(mode.kind)
        firsts: dict[tuple[int, int], np.ndarray] = {}
        for (number, _, n), link in self.base.links.items():
            own = _get(values, link.linen, link.linen_index)
            if not is_inexact(own):
                continue
            if self.base.groups[number].by_order:
                own = firsts.setdefault((number, n), own)
            _put(values, link.linen, link.linen_index, _blurred(own, kinds.get(number, ())))
        for fusion, _ in self.base.fusions:
            _blur_fusion(values, fusion)
        return values

    # ---- what gradients tell ----

    def _told(
        self, base: Proposal, modes: Sequence[Mode], linen: Mapping[Location, Any], nnx: Mapping[Location, Any]
    ) -> Proposal:
        hidden = {mode.group for mode in modes if mode.kind != "add"}
        orders = list(base.orders)
        for number, group in enumerate(base.groups):
            if group.by_order and len(group.pairs) > 1:
                orders[number] = _matched(group, linen, nnx, number in hidden)
        ordered = replace(base, orders=tuple(orders))
        changes = dict(base.reworks)
        for spot, link in ordered.links.items():
            if spot[0] in hidden:
                rework = _rework_of(link, linen, nnx, any(mode == Mode("axes", spot[0]) for mode in modes))
                if rework is not None:
                    changes[spot] = replace(rework, add=changes.get(spot, Rework()).add)
        fusions = tuple((fusion, _fusion_told(fusion, rework, linen, nnx)) for fusion, rework in base.fusions)
        return replace(ordered, reworks=changes, fusions=fusions)


def _at(slot: Slot, index: Index) -> tuple[Any, ...]:
    """Where one layer of a stacked variable is."""
    place: list[Any] = [slice(None)] * len(slot.part.shape)
    rest = list(range(len(place)))
    for axis, n in zip(slot.part.axes, index, strict=True):
        place[rest.pop(axis)] = n
    return tuple(place)


def _get(values: Mapping[Location, Any], slot: Slot, index: Index) -> Any:
    value = values.get(slot.part.location)
    if value is None or not is_inexact(value):
        return value
    layer = np.asarray(value)[_at(slot, index)]
    if slot.count == 1:
        return layer
    return np.split(layer, slot.count, slot.axis)[slot.index]


def _put(values: Mapping[Location, Any], slot: Slot, index: Index, new: np.ndarray) -> None:
    values[slot.part.location][_at(slot, index)] = new


def _blurred(x: np.ndarray, kinds: Any) -> np.ndarray:
    """The same along the axes whose layout is not known; the same for any order of its axes."""
    if "out" in kinds and x.ndim:
        x = np.broadcast_to(x[..., :1], x.shape)
    if "in" in kinds and x.ndim > 1:
        x = np.broadcast_to(x[..., :1, :], x.shape)
    if "axes" in kinds and x.ndim > 1:
        turned = [rework.of_gradients([x]) for rework in reworks(x.shape, x.shape, 1, True) if _whole(rework)]
        x = np.mean(np.stack([x, *turned]).astype("float64"), 0).astype(x.dtype)
    return x


def _whole(rework: Rework) -> bool:
    return all(len(group) <= 1 for group in rework.rearrangement.before)


def _blur_fusion(values: dict[Location, Any], fusion: Fusion) -> None:
    """The parts are one, and constant but along the axis that the whole has too."""
    kept, own = fusion.kept_axis, fusion.many[0].location if fusion.linen_is_many else fusion.one.location
    line = np.asarray(values[own])
    if kept is None:
        line = line.ravel()[0]
    else:
        line = line.reshape(line.shape[0], -1)[:, 0] if kept == 0 else line.reshape(-1, line.shape[-1])[0]
    for part in fusion.many if fusion.linen_is_many else (fusion.one,):
        shaped = line if kept != 0 else line.reshape((-1,) + (1,) * (len(part.shape) - 1))
        values[part.location] = np.array(np.broadcast_to(shaped, part.shape))


def _matched(
    group: Group, linen: Mapping[Location, Any], nnx: Mapping[Location, Any], by_values: bool
) -> tuple[int, ...]:
    """For each of NNX's layers the one of Linen's whose gradients are the same; `by_values`: wherever they stand."""
    from scipy.optimize import linear_sum_assignment  # late: half a second that most who import bridge never need

    identity = tuple(range(len(group.pairs)))
    links = group.links(identity)
    ours = [[_get(linen, link.linen, link.linen_index) for link in own] for own in links]
    theirs = [[_get(nnx, link.nnx, link.nnx_index) for link in own] for own in links]
    one, other = (np.array([_features(layer, by_values) for layer in side]) for side in (theirs, ours))
    if one.shape != other.shape or not one.size:
        return identity
    scale = np.maximum(np.abs(one[:, None]), np.abs(other[None]))
    # The gradient of a key's bias is nothing but rounding: compared with itself, it would say that nothing fits.
    floor = max(_NOTHING * float(np.abs(other).max()), 1e-30)
    apart = (np.abs(one[:, None] - other[None]) / np.maximum(scale, floor / _ALIKE)).max(-1)
    cost = np.where(apart < _ALIKE, 0.0, apart) + 1e-6 * (1 - np.eye(len(identity)))
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=1e6, posinf=1e6))
    return tuple(int(columns[row]) for row in np.argsort(rows))


def _features(layer: Sequence[Any], by_values: bool) -> np.ndarray:
    """A few numbers that tell gradients apart."""
    features: list[float] = []
    for x in layer:
        if x is None or not is_inexact(x):
            continue
        flat = np.asarray(x).astype("complex128" if np.asarray(x).dtype.kind == "c" else "float64").ravel()
        flat = np.sort(flat) if by_values else flat
        random = np.random.default_rng(flat.size)
        features += [float(abs(flat @ random.normal(size=flat.size))) for _ in range(_FEATURES)]
    return np.array(features)


def _near(one: np.ndarray, other: np.ndarray, floor: float = 0.0) -> bool:
    largest = max(float(np.abs(one).max(initial=0)), float(np.abs(other).max(initial=0)))
    apart = float(np.abs(one - other).max(initial=0)) if one.shape == other.shape else np.inf
    return apart <= max(_ALIKE * largest, floor)


def _rework_of(link: Link, linen: Mapping[Location, Any], nnx: Mapping[Location, Any], turned: bool) -> Rework | None:
    """What takes the gradient of one to that of the other; None if they are the same as they stand."""
    ours, theirs = _get(linen, link.linen, link.linen_index), _get(nnx, link.nnx, link.nnx_index)
    if ours is None or theirs is None or _near(ours, theirs):
        return None
    for rework in reworks(link.linen.shape, link.nnx.shape, 1, turned):
        if _makes(rework, [ours], theirs):
            return rework
    return None


def _makes(rework: Rework, sources: Sequence[np.ndarray], target: np.ndarray) -> bool:
    """Whether the numbers are where the rework says. Looked at in a slice first, along axes that it leaves alone."""
    axes = rework.rearrangement
    same = len(rework.parts) == 1 and len(axes.before) == len(axes.after)
    if same:
        cut = tuple(
            slice(0, 1) if before == after and len(before) == 1 and before[0] not in axes.order else slice(None)
            for before, after in zip(axes.before, axes.after, strict=True)
        )
        if not _near(rework.of_gradients([sources[0][cut]]), target[cut]):
            return False
    return _near(rework.of_gradients(sources), target)


def _fusion_told(fusion: Fusion, rework: Rework, linen: Mapping[Location, Any], nnx: Mapping[Location, Any]) -> Rework:
    sides = (linen, nnx) if fusion.linen_is_many else (nnx, linen)
    if any(part.location not in sides[0] for part in fusion.many) or fusion.one.location not in sides[1]:
        return rework
    sources = [np.asarray(sides[0][part.location]) for part in fusion.many]
    target = np.asarray(sides[1][fusion.one.location])
    for candidate in (rework, *fusion.reworks):
        if _near(candidate.of_gradients(sources), target):
            return candidate
    return rework


# ---- what no output shows ----


def undecided(bench: Bench, proposal: Proposal, proof: Proof) -> list[list[tuple[int, int]]]:
    """Layers of each group that could be exchanged as well: pairs of numbers in the group.

    With the same numbers in all layers of a group, two that may be exchanged have the same gradients: one run tells
    which may be at all, and each of these is tried.
    """
    pairs: list[list[tuple[int, int]]] = []
    hidden = Search(bench, proposal)._hidden(())
    point = replace(bench.point(0), values=hidden)
    gradients = bench.linen(point).gradients
    suspects: list[Exchange] = []
    largest = [float(np.abs(np.asarray(x)).max(initial=0)) for x in gradients.values()]
    floor = _NOTHING * max(largest, default=0.0)
    for number, group in enumerate(proposal.groups):
        pairs.append([])
        if not group.by_order or len(group.pairs) == 1:
            continue
        order = proposal.orders[number]
        links = group.links(order)
        layers = [[_get(gradients, link.linen, link.linen_index) for link in own] for own in links]
        for one, other in itertools.combinations(range(len(layers)), 2):
            named = group.told_apart(order[one], order[other]) and order[one] == one and order[other] == other
            if not named and _layers_alike(layers[one], layers[other], floor):
                suspects.append((number, one, other))
    for count, (number, one, other) in enumerate(suspects):
        # Too many to be tried are not told apart either.
        if count >= _MOST_RUNS or not _is_worse(bench, _exchanged(proposal, [(number, one, other)]), proof):
            pairs[number].append((one, other))
    decided = [suspect for suspect in suspects if suspect[1:] not in pairs[suspect[0]]]
    for tower in _towers(proposal, decided):
        if not _is_worse(bench, _exchanged(proposal, tower), proof):
            for number, one, other in tower:
                pairs[number].append((one, other))
    return pairs


def _layers_alike(one: Sequence[Any], other: Sequence[Any], floor: float) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(_near(np.asarray(a), np.asarray(b), floor) for a, b in pairs)


def _towers(proposal: Proposal, suspects: Sequence[Exchange]) -> Iterator[list[Exchange]]:
    """Exchanges of whole subtrees: those whose layers stand below the same two modules of Linen, or of NNX."""
    by_modules: dict[Any, list[Exchange]] = {}
    for number, one, other in suspects:
        pairs, order = proposal.groups[number].pairs, proposal.orders[number]
        for side, (first, second) in enumerate(((order[one], order[other]), (one, other))):
            paths = [pairs[n][side][0].path for n in (first, second)]
            common = next((n for n, (a, b) in enumerate(zip(*paths, strict=False)) if a != b), None)
            if common is not None and paths[0][common + 1 :] == paths[1][common + 1 :]:
                key = (side, paths[0][: common + 1], paths[1][common])
                by_modules.setdefault(key, []).append((number, one, other))
    yield from (tower for tower in by_modules.values() if len(tower) > 1)


def _exchanged(proposal: Proposal, exchanges: Sequence[Exchange]) -> Proposal:
    orders = [list(order) for order in proposal.orders]
    for number, one, other in exchanges:
        orders[number][one], orders[number][other] = orders[number][other], orders[number][one]
    return replace(proposal, orders=tuple(map(tuple, orders)))


def _is_worse(bench: Bench, proposal: Proposal, proof: Proof) -> bool:
    """Whether outputs or gradients are off by far more than they were. Deep in a model, that may be little."""
    try:
        evidence = bench.compare(bench.point(0), proposal.derived, bench.expected(0))
    except UnsayableRuleError:
        return True
    return evidence.worst > max(_FAR * proof.worst, _ROUNDING)
