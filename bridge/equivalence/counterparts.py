"""Which variable of one model is which of the other, whole or in blocks, and so which layer is which.

Rules say it where they are given; names, where both models have the same ones; else layers are paired by class, shapes
and the order of calls (`tracing.pairs`), and where that order is contradicted by the numbers themselves, by these.

Law: what has no counterpart is listed. Gradients are compared through the same pairs: through rules, by the transpose
of what they compute.
Knows variables and units; knows nothing of calls, outputs or reports.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge._errors import BridgeError, show_path
from bridge._types import Location, Path
from bridge.equivalence.numbers import difference
from bridge.equivalence.subjects import ComparisonError, Subject, ValueRules, Values
from bridge.tracing.pairs import Index, Link, Pairing, pair
from bridge.tracing.trace import Slot, Unit, is_array

#: With more layers than this that differ, nobody looks which of them were exchanged: each is held against each.
_MOST_EXCHANGED = 64


@dataclass(frozen=True)
class Match:
    """Two values that are to be the same; `text` says which block, if they are not whole variables."""

    a: Location
    b: Location
    x_a: Any
    x_b: Any
    text: str = ""


@dataclass(frozen=True)
class LayerPair:
    """Two layers, each with its index along the axes that a transform stacked."""

    a: Path
    a_index: Index
    b: Path
    b_index: Index


@dataclass(frozen=True)
class Counterparts:
    """What is what.

    Attributes:
      values: pairs of two models' values.
      cotangents: the same of gradients, and of whatever has the form of the parameters.
      located: pairs of locations, None where equal paths are the same layer; at least a part of one is the other's.
      only_a, only_b: without a counterpart in a layer that has one, so that the models differ.
      unpaired_a, unpaired_b: without a counterpart, and nobody knows why.
      layers: pairs of layers of which one is stacked, and the other is not or otherwise.
      sizes_a, sizes_b: how often transforms repeat a layer, by path.
      exchanged: pairs that the order of calls has otherwise than the numbers.
    """

    values: Callable[[Values, Values], Iterable[Match]]
    cotangents: Callable[[Values, Values], Iterable[Match]]
    located: tuple[tuple[Location, Location], ...] | None = None
    only_a: tuple[Location, ...] = ()
    only_b: tuple[Location, ...] = ()
    unpaired_a: tuple[Location, ...] = ()
    unpaired_b: tuple[Location, ...] = ()
    layers: tuple[LayerPair, ...] = ()
    sizes_a: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    sizes_b: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    exchanged: tuple[LayerPair, ...] = ()


def counterparts(
    a: Subject, b: Subject, rules: ValueRules | None, units: Callable[[Subject], list[Unit]]
) -> Counterparts:
    """What of `a` is what of `b`.

    Args:
      units: a subject's layers; asked only where they are needed.

    Raises:
      ComparisonError: the rules are of other models.
    """
    if rules is not None:
        return _by_rules(a, b, rules, units)
    common = a.values.keys() & b.values.keys()
    if 2 * len(common) >= max(len(a.values), len(b.values)) or not (a.values and b.values):
        return _by_names(a, b)
    return _by_units(a, b, units(a), units(b))


# ---- by names ----


def _by_names(a: Subject, b: Subject) -> Counterparts:
    def matches(ours: Values, theirs: Values) -> Iterator[Match]:
        for at in sorted((ours.keys() & theirs.keys()) - other):
            yield Match(at, at, ours[at], theirs[at])

    # Of another shape it is laid out otherwise, or the layer is another one: the outputs tell.
    other = {at for at in a.values.keys() & b.values.keys() if _shape(a.values[at]) != _shape(b.values[at])}
    only_a, only_b = _without(a.values, b.values), _without(b.values, a.values)
    if "function" in (a.api, b.api):
        return Counterparts(matches, matches, unpaired_a=only_a, unpaired_b=only_b)
    unpaired = tuple(sorted(other))
    exchanged = tuple(_exchanged_names(a.values, b.values))
    return Counterparts(matches, matches, None, only_a, only_b, unpaired, unpaired, exchanged=exchanged)


def _shape(x: Any) -> Any:
    return tuple(x.shape) if is_array(x) else None


def _exchanged_names(a: Values, b: Values) -> Iterator[LayerPair]:
    """Layers that differ, and hold what others of the same names and shapes hold in the other model."""
    layers: dict[Path, list[Location]] = {}
    for at in sorted(a.keys() & b.keys()):
        layers.setdefault(at[1:-1], []).append(at)
    wrong: dict[Hashable, list[Path]] = {}
    for path, own in layers.items():
        if not _equal([a[at] for at in own], [b[at] for at in own]):
            form = tuple((at[0], at[-1], _shape(a[at])) for at in own)
            wrong.setdefault(form, []).append(path)
    for paths in wrong.values():
        if len(paths) > _MOST_EXCHANGED:
            continue
        for path, other in itertools.permutations(paths, 2):
            if _equal([a[at] for at in layers[path]], [b[at] for at in layers[other]]):
                yield LayerPair(path, (), other, ())


def _equal(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    arrays = [(x, y) for x, y in zip(xs, ys, strict=True) if is_array(x) and is_array(y)]
    return all(x.shape == y.shape and difference(y, x).equal for x, y in arrays)


def _without(values: Iterable[Location], others: Iterable[Location]) -> tuple[Location, ...]:
    return tuple(sorted(set(values) - set(others)))


# ---- by rules ----


def _by_rules(a: Subject, b: Subject, rules: ValueRules, units: Callable[[Subject], list[Unit]]) -> Counterparts:
    forward, pairs = _direction(a, b, rules)
    source = a if forward else b
    of_target = {nnx: linen for linen, nnx in reversed(pairs)}
    of_source = dict(reversed(pairs))

    def match(linen: Location, nnx: Location, x: Any, y: Any) -> Match:
        return Match(linen, nnx, x, y) if forward else Match(nnx, linen, y, x)

    def values(ours: Values, theirs: Values) -> Iterator[Match]:
        linen, nnx = (ours, theirs) if forward else (theirs, ours)
        present = {at: x for at, x in linen.items() if at in source.values}
        made = rules.convert({**source.values, **present})
        for at in sorted(of_target):
            if at in nnx and at in made and of_target[at] in linen:
                yield match(of_target[at], at, made[at], nnx[at])

    def cotangents(ours: Values, theirs: Values) -> Iterator[Match]:
        linen, nnx = (ours, theirs) if forward else (theirs, ours)
        start = {at: jnp.asarray(source.values[at]) for at in linen}

        def convert(values: Values) -> Values:
            made = rules.convert({**source.values, **values})
            return {at: made[at] for at in nnx if at in made}

        made, transpose = jax.vjp(convert, start)
        pulled = transpose({at: jnp.asarray(nnx[at], x.dtype) for at, x in made.items()})[0]
        for at in sorted(linen):
            if at in of_source:
                yield match(at, of_source[at], linen[at], pulled[at])

    located = tuple(pairs) if forward else tuple((nnx, linen) for linen, nnx in pairs)
    unpaired_a = _without(a.values, (at for at, _ in located))
    unpaired_b = _without(b.values, (at for _, at in located))
    if _keeps_stacks(located, a.values, b.values):
        return Counterparts(values, cotangents, located, (), (), unpaired_a, unpaired_b)
    layers, sizes_a, sizes_b = _restacked(located, units(a), units(b))
    return Counterparts(values, cotangents, located, (), (), unpaired_a, unpaired_b, tuple(layers), sizes_a, sizes_b)


def _direction(a: Subject, b: Subject, rules: ValueRules) -> tuple[bool, list[tuple[Location, Location]]]:
    """Whether the rules lead from `a` to `b`, and what they pair.

    Raises:
      ComparisonError: they lead neither way.
    """
    both = ((True, a, b), (False, b, a))
    reasons: list[str] = []
    for forward, source, target in both[::-1] if (a.api, b.api) == ("nnx", "linen") else both:
        try:
            needs_values = bool(inspect.signature(rules.pairs).parameters)
            pairs = rules.pairs(source.values) if needs_values else rules.pairs()
        except BridgeError as error:
            reasons.append(str(error))
            continue
        strangers = sorted({at for at, _ in pairs} - source.values.keys())
        strangers += sorted({at for _, at in pairs} - target.values.keys())
        if pairs and not strangers:
            return forward, pairs
        reasons += [f"{show_path(at)}, which is not there" for at in strangers[:1]] or ["no pair"]
    raise ComparisonError(
        "the rules are not of these two models",
        "rules whose pairs of locations are Linen's and the NNX model's",
        reasons[0],
        "Derive them from these models, or write them for their variables.",
    )


def _keeps_stacks(pairs: Sequence[tuple[Location, Location]], a: Values, b: Values) -> bool:
    """Whether each variable has one counterpart of the same rank: then a layer is stacked on both sides or on none."""
    one_to_one = len({at for at, _ in pairs}) == len({at for _, at in pairs}) == len(pairs)
    return one_to_one and all(np.ndim(a[at]) == np.ndim(b[there]) for at, there in pairs)


def _restacked(pairs: Iterable[tuple[Location, Location]], a: list[Unit], b: list[Unit]) -> Any:
    """Pairs of layers one of which is a stack of the other, in the order of calls; and the sizes of stacks."""
    owners_a, owners_b = _owners(a), _owners(b)
    forth: dict[Path, dict[Path, None]] = {}
    back: dict[Path, dict[Path, None]] = {}
    for at, there in pairs:
        ours, theirs = owners_a.get(at), owners_b.get(there)
        if ours is not None and theirs is not None:
            forth.setdefault(ours.path, {})[theirs.path] = None
            back.setdefault(theirs.path, {})[ours.path] = None
    units_a, units_b = {unit.path: unit for unit in a}, {unit.path: unit for unit in b}
    layers = [LayerPair(path, at, other, ()) for path, at, other in _rounds(forth, back, units_a, units_b)]
    layers += [LayerPair(other, (), path, at) for path, at, other in _rounds(back, forth, units_b, units_a)]
    return layers, _sizes(a), _sizes(b)


def _rounds(
    partners: Mapping[Path, Iterable[Path]],
    others: Mapping[Path, Iterable[Path]],
    stacks: Mapping[Path, Unit],
    units: Mapping[Path, Unit],
) -> Iterator[tuple[Path, Index, Path]]:
    """(stack, index in it, the layer that is this round) where each round is a layer with no other partner."""
    for path, single in partners.items():
        rounds = sorted(single, key=lambda other: units[other].order or 0)
        is_stack = stacks[path].sizes == (len(rounds),) and not any(units[other].sizes for other in rounds)
        if is_stack and all(list(others[other]) == [path] for other in rounds):
            yield from ((path, (n,), other) for n, other in enumerate(rounds))


# ---- by units ----


def _by_units(a: Subject, b: Subject, units_a: list[Unit], units_b: list[Unit]) -> Counterparts:
    pairing = pair(units_a, units_b)
    leftover = list(_rest(pairing, a.values, b.values))
    owners_a, owners_b = _owners(units_a), _owners(units_b)
    links, exchanged = _by_numbers([*pairing.links, *leftover], a.values, b.values, owners_a, owners_b)

    def matches(ours: Values, theirs: Values) -> Iterator[Match]:
        for link in links:
            at, there = link.linen.part.location, link.nnx.part.location
            if at in ours and there in theirs:
                x, y = _block(link.linen, link.linen_index, ours[at]), _block(link.nnx, link.nnx_index, theirs[there])
                yield Match(at, there, x, y, _block_text(link))

    located = tuple(dict.fromkeys((link.linen.part.location, link.nnx.part.location) for link in links))
    linked_a, linked_b = {at for at, _ in located}, {at for _, at in located}
    halves_a = {at for at in a.values if at in owners_a and _has_partner(owners_a[at], linked_a)}
    halves_b = {at for at in b.values if at in owners_b and _has_partner(owners_b[at], linked_b)}
    return Counterparts(
        matches,
        matches,
        located,
        _without(halves_a, linked_a),
        _without(halves_b, linked_b),
        _without(a.values, linked_a | halves_a),
        _without(b.values, linked_b | halves_b),
        tuple(_layer_pairs(links, owners_a, owners_b)),
        _sizes(units_a),
        _sizes(units_b),
        exchanged,
    )


def _owners(units: Iterable[Unit]) -> dict[Location, Unit]:
    return {slot.part.location: unit for unit in units for slot in unit.slots.values()}


def _sizes(units: Iterable[Unit]) -> dict[Path, tuple[int, ...]]:
    return {unit.path: unit.sizes for unit in units}


def _has_partner(unit: Unit, linked: set[Location]) -> bool:
    """Whether a layer has a counterpart, though not all of its variables have."""
    return unit.family is not None and any(slot.part.location in linked for slot in unit.slots.values())


def _rest(pairing: Pairing, a: Values, b: Values) -> Iterator[Link]:
    """What is left, of one class: by equal paths, by equal numbers, or else in the order of calls if as many.

    So a layer whose bias is missing, or of another shape, has a counterpart, and one beside layers that nobody uses.
    """
    groups: dict[Any, tuple[list[Unit], list[Unit]]] = {}
    for side, units in enumerate((pairing.linen, pairing.nnx)):
        for unit in units:
            if unit.family is not None and not unit.sizes and unit.order is not None:
                groups.setdefault(unit.family, ([], []))[side].append(unit)
    for linen, nnx in groups.values():
        for is_same in (_at_one_path, functools.partial(_of_equal_numbers, a, b)):
            for ours in list(linen):
                partners = [theirs for theirs in nnx if is_same(ours, theirs)]
                if len(partners) == 1:
                    yield from _by_slots(ours, partners[0])
                    linen.remove(ours)
                    nnx.remove(partners[0])
        if len(linen) == len(nnx):
            for ours, theirs in zip(linen, nnx, strict=True):
                yield from _by_slots(ours, theirs)


def _by_slots(ours: Unit, theirs: Unit) -> Iterator[Link]:
    for name in ours.slots.keys() & theirs.slots.keys():
        if ours.slots[name].shape == theirs.slots[name].shape:
            yield Link(ours.slots[name], (), theirs.slots[name], (), "by class alone")


def _at_one_path(ours: Unit, theirs: Unit) -> bool:
    return ours.path == theirs.path


def _of_equal_numbers(a: Values, b: Values, ours: Unit, theirs: Unit) -> bool:
    links = list(_by_slots(ours, theirs))
    has_all = len(links) == len(ours.slots) == len(theirs.slots)
    return has_all and all(_same(link, link, a, b) for link in links)


def _block(slot: Slot, index: Index, x: Any) -> Any:
    """The layer of a stack, and the part of a fused variable."""
    if not is_array(x):
        return x
    for axis, n in zip(slot.part.axes, index, strict=False):
        x = x[(slice(None),) * axis + (n,)]
    if slot.count > 1:
        axis = slot.axis % x.ndim
        size = x.shape[axis] // slot.count
        x = x[(slice(None),) * axis + (slice(slot.index * size, (slot.index + 1) * size),)]
    return x


def _block_text(link: Link) -> str:
    texts = []
    for name, slot, index in (("a", link.linen, link.linen_index), ("b", link.nnx, link.nnx_index)):
        place = "".join(f"[{n}]" for n in index)
        part = f"part {slot.index + 1} of {slot.count}" if slot.count > 1 else ""
        where = " ".join(filter(None, (place, part)))
        if where:
            texts.append(f"{where} in {name}")
    return ", ".join(texts)


def _layer_pairs(links: Sequence[Link], owners_a: Any, owners_b: Any) -> Iterator[LayerPair]:
    """Pairs with an index, where the two have not the same stacks."""
    pairs: dict[LayerPair, None] = {}
    for link in links:
        ours, theirs = owners_a[link.linen.part.location], owners_b[link.nnx.part.location]
        # A variable that the rounds of a scan share has no index; another one of the layer may have.
        if len(link.linen_index) == len(ours.sizes) and len(link.nnx_index) == len(theirs.sizes):
            pairs[LayerPair(ours.path, link.linen_index, theirs.path, link.nnx_index)] = None
    partners: dict[Path, set[Path]] = {}
    for layers in pairs:
        partners.setdefault(layers.a, set()).add(layers.b)
    for layers in pairs:
        is_indexed = layers.a_index != layers.b_index or len(partners[layers.a]) > 1
        if is_indexed and (layers.a_index or layers.b_index):
            yield layers


# ---- by the numbers ----

Instance = tuple[Path, Index, Path, Index]


def _by_numbers(
    links: Sequence[Link], a: Values, b: Values, owners_a: Any, owners_b: Any
) -> tuple[list[Link], tuple[LayerPair, ...]]:
    """The links; where layers alike differ in their numbers, and others of them are the same, paired by these."""
    instances: dict[Instance, list[Link]] = {}
    for link in sorted(links, key=lambda link: (link.linen.part.location, link.nnx.index)):
        ours, theirs = owners_a[link.linen.part.location], owners_b[link.nnx.part.location]
        key = (ours.path, link.linen_index, theirs.path, link.nnx_index)
        instances.setdefault(key, []).append(link)
    wrong: dict[Hashable, list[Instance]] = {}
    for key, group in instances.items():
        if not all(_same(link, link, a, b) for link in group):
            form = tuple((link.linen.part.location[-1], link.linen.shape, link.nnx.index) for link in group)
            wrong.setdefault(form, []).append(key)
    moved: dict[Instance, Instance] = {}
    for keys in wrong.values():
        if len(keys) <= _MOST_EXCHANGED:
            moved |= _exchanges(keys, instances, a, b)
    result: list[Link] = []
    exchanged: list[LayerPair] = []
    for key, group in instances.items():
        other = moved.get(key, key)
        if other != key:
            exchanged.append(LayerPair(key[0], key[1], other[2], other[3]))
        for link, its in zip(group, instances[other], strict=True):
            result.append(Link(link.linen, link.linen_index, its.nnx, its.nnx_index, link.how))
    return result, tuple(exchanged)


def _exchanges(keys: list[Instance], instances: Any, a: Values, b: Values) -> dict[Instance, Instance]:
    """For each of some pairs of layers the pair whose second layer it shall have: a permutation, or nothing."""
    chosen: dict[Instance, Instance] = {}
    free = list(keys)
    for key in keys:
        for other in free:
            both = zip(instances[key], instances[other], strict=True)
            if all(_same(link, its, a, b) for link, its in both):
                chosen[key] = other
                free.remove(other)
                break
    closed = set(chosen) == set(chosen.values())
    return chosen if closed else {}


def _same(link: Link, other: Link, a: Values, b: Values) -> bool:
    """Whether the first's variable of `a` equals the second's of `b`."""
    at, there = link.linen.part.location, other.nnx.part.location
    if at not in a or there not in b:
        return True
    x, y = _block(link.linen, link.linen_index, a[at]), _block(other.nnx, other.nnx_index, b[there])
    return _equal([x], [y])
