"""Which layer of one model is which layer of the other: pairs of units, by class, shapes and the order of calls.

Law: each unit is paired at most once, and only where nothing else would do as well: among units alike, the order of
their first calls decides, and names must not say otherwise; a layer that was never called is told by its name, or by
being the only one of its shape. A layer that a transform repeats counts as often as it is repeated.
Knows units; knows nothing of modules, arrays or files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from bridge._errors import show_path
from bridge._types import Path
from bridge.tracing.trace import Part, Slot, Unit
from bridge.variables.kinds import LINEN_COLLECTIONS

Index = tuple[int, ...]
Instance = tuple[Unit, Index]


@dataclass(frozen=True)
class Link:
    """One variable of Linen, or one layer of a stacked one, and its counterpart.

    Attributes:
      linen_index, nnx_index: along the stacked axes; empty for a variable that the repetitions share.
      how: why these two.
    """

    linen: Slot
    linen_index: Index
    nnx: Slot
    nnx_index: Index
    how: str


@dataclass(frozen=True)
class Doubt:
    """A module, or a variable, of Linen that could be paired in two ways, and the likelier counterpart."""

    linen: Path
    nnx: Path
    is_module: bool
    text: str


@dataclass(frozen=True)
class Tie:
    """Two layers of a group next to each other in the order of calls, which names do not tell apart.

    Attributes:
      linen, nnx: the two, each with its index along stacked axes.
      links, swapped: their links, as the order of calls has them, and the other way round.
    """

    linen: tuple[Instance, Instance]
    nnx: tuple[Instance, Instance]
    links: tuple[Link, ...]
    swapped: tuple[Link, ...]


@dataclass
class Pairing:
    """What is paired, what is left, what could be paired in two ways, and what the order of calls alone has paired."""

    links: list[Link] = field(default_factory=list)
    linen: list[Unit] = field(default_factory=list)
    nnx: list[Unit] = field(default_factory=list)
    ambiguous: list[Doubt] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)


def is_whole(links: Sequence[Link]) -> bool:
    """Whether the target's stacked axes, if any, are those of one source for each gate, layer by layer."""
    first = links[0]
    return all(
        link.linen_index == link.nnx_index
        and link.linen.part.sizes == first.nnx.part.sizes
        and link.linen.part.axes == first.linen.part.axes
        and link.nnx.part == first.nnx.part
        for link in links
    ) and len({(link.linen.part.location, link.nnx.index) for link in links}) == len({link.nnx.index for link in links})


def raw_axis(part: Part, axis: int) -> int:
    """Where an axis that the layer sees is in the stacked array."""
    return _order(part)[len(part.axes) :][axis]


def permutation(source: Part, target: Part) -> tuple[int, ...]:
    """The axes of `target` by those of `source`: their stacked axes may stand elsewhere."""
    order = _order(source)
    stacked, inner = order[: len(source.axes)], order[len(source.axes) :]
    for axis, position in zip(reversed(target.axes), reversed(stacked), strict=True):
        inner.insert(axis, position)
    return tuple(inner)


def _order(part: Part) -> list[int]:
    """The positions of the stacked axes, outermost first, and of the rest."""
    rest = list(range(len(part.shape)))
    return [rest.pop(axis) for axis in part.axes] + rest


def pair(linen: Iterable[Unit], nnx: Iterable[Unit]) -> Pairing:
    """Pair the units of two models.

    >>> kernel = lambda *at: {("params", "kernel"): Slot(Part(("params", *at, "kernel"), (3, 3), "float32"))}
    >>> ours = [Unit((f"Dense_{n}",), "Dense", None, 1 - n, kernel(f"Dense_{n}")) for n in (1, 0)]
    >>> theirs = [Unit((name,), "Linear", None, n, kernel(name)) for n, name in enumerate(("first", "last"))]
    >>> [(link.linen.part.location[1], link.nnx.part.location[1]) for link in pair(ours, theirs).links]
    [('Dense_1', 'first'), ('Dense_0', 'last')]
    """
    pool = Pairing(linen=list(linen), nnx=list(nnx))
    _pass(pool, _class_and_names, _name, "")
    _pass(pool, _names, _name, "alike but for the class")
    _pass(pool, _shapes, _shape, "by shapes", needs_own=True)
    pool.linen, pool.nnx = (list(_single_variables(units)) for units in (pool.linen, pool.nnx))
    _pass(pool, _names, _name, "by the variable's name", needs_own=True, one_to_one=True)
    _pass(pool, _shapes, _shape, "the only one of its shape", needs_own=True, one_to_one=True)
    return pool


# ---- what makes two units alike ----

Key = Callable[[Unit], Hashable]
Label = Callable[[Path, Slot], Hashable]


def _class_and_names(unit: Unit) -> Hashable:
    kind = unit.kind if unit.family is None else unit.family
    return None if (names := _names(unit)) is None else (kind, names)


def _names(unit: Unit) -> Hashable:
    return _form(unit, lambda name, slot: (_name(name, slot), slot.shape))


def _shapes(unit: Unit) -> Hashable:
    return _form(unit, _shape)


def _form(unit: Unit, label: Label) -> Hashable:
    """What `label` says of all variables; None if it says the same of two, and so not which is which."""
    labels = {(label(name, slot), _shared(unit, slot)) for name, slot in unit.slots.items()}
    return frozenset(labels) if len(labels) == len(unit.slots) else None


def _name(name: Path, slot: Slot) -> Hashable:
    return _collection(name[0]), *_words(name[1:])


def _shape(name: Path, slot: Slot) -> Hashable:
    return _collection(name[0]), slot.shape


def _collection(name: str) -> str | None:
    """None for one that a user has named: in NNX it is called like its Variable's class."""
    return name if name in LINEN_COLLECTIONS else None


def _shared(unit: Unit, slot: Slot) -> bool:
    return len(slot.part.axes) < len(unit.sizes)


def _single_variables(units: Iterable[Unit]) -> Iterator[Unit]:
    for unit in units:
        if unit.family is None and all(slot.count == 1 for slot in unit.slots.values()):
            yield from (unit.only([name]) for name in unit.slots)
        else:
            yield unit


# ---- pairing ----


def _pass(pool: Pairing, key: Key, label: Label, how: str, needs_own: bool = False, one_to_one: bool = False) -> None:
    """Pair what `key` says is alike, variables by `label`, and take it out of the pool.

    Args:
      needs_own: only if all of one side are modules of the user's own, whose variables may have any names.
      one_to_one: only if there are no others alike.
    """
    groups: dict[Hashable, tuple[list[Unit], list[Unit]]] = {}
    for side, units in enumerate((pool.linen, pool.nnx)):
        for unit in units:
            if (alike := key(unit)) is not None:
                groups.setdefault(alike, ([], []))[side].append(unit)
    for linen, nnx in groups.values():
        if needs_own and all(any(unit.family is not None for unit in units) for units in (linen, nnx)):
            continue
        if one_to_one and not (len(linen) == len(nnx) == 1):
            continue
        for pairs, why in _in_group(linen, nnx, pool.ambiguous):
            for n, ((ours, at), (theirs, there)) in enumerate(pairs, start=1):
                text = ", ".join(filter(None, (f"{ours.kind}/{theirs.kind}", how, why.format(n=n, all=len(pairs)))))
                found = list(_links(ours, at, theirs, there, label, text))
                pool.links += found
                pool.ambiguous += _shapes_against_names(found) if label is _shape else []
            if why is _BY_ORDER:
                pool.ties += [_tie(*two, label) for two in itertools.pairwise(pairs) if not _told_apart(*two)]
            pool.linen = _without(pool.linen, (ours for (ours, _), _ in pairs))
            pool.nnx = _without(pool.nnx, (theirs for _, (theirs, _) in pairs))


def _without(units: list[Unit], taken: Iterable[Unit]) -> list[Unit]:
    gone = {id(unit) for unit in taken}
    return [unit for unit in units if id(unit) not in gone]


Pairs = list[tuple[Instance, Instance]]
_BY_ORDER = "call {n} of {all} alike"


def _in_group(linen: list[Unit], nnx: list[Unit], ambiguous: list[Doubt]) -> Iterator[tuple[Pairs, str]]:
    """Pairs among units that are alike, and why."""
    if (len(linen), len(nnx)) != (1, 1) and any(unit.order is None for unit in (*linen, *nnx)):
        named = _by_name(linen, nnx)
        yield [((ours, at), (theirs, at)) for ours, theirs in named for at in _indices(ours)], "by name"
        linen = _without(linen, (ours for ours, _ in named))
        nnx = _without(nnx, (theirs for _, theirs in named))
        if (len(linen), len(nnx)) != (1, 1):
            linen, nnx = ([unit for unit in units if unit.order is not None] for units in (linen, nnx))
    ours, theirs = _instances(linen), _instances(nnx)
    if len(ours) != len(theirs) or not ours:
        return
    pairs = list(zip(ours, theirs, strict=True))
    if any(_shared(unit, slot) for unit in linen for slot in unit.slots.values()) and not _one_to_one(pairs):
        return  # one value for all repetitions cannot be that of several stacks
    ambiguous += _against_names(linen, nnx, pairs)
    yield pairs, _BY_ORDER if len(pairs) > 1 else "the only ones alike"


def _one_to_one(pairs: Pairs) -> bool:
    units = {(id(ours), id(theirs)) for (ours, _), (theirs, _) in pairs}
    return len(units) == len({a for a, _ in units}) == len({b for _, b in units})


def _by_name(linen: list[Unit], nnx: list[Unit]) -> list[tuple[Unit, Unit]]:
    """The units never called, and those with the same path; without those that have none, or several."""
    found = []
    for unit, others in ((unit, others) for units, others in ((linen, nnx), (nnx, linen)) for unit in units):
        same = [other for other in others if _same_path(unit.path, other.path) and other.sizes == unit.sizes]
        if unit.order is None and len(same) == 1:
            found.append((unit, same[0]) if others is nnx else (same[0], unit))
    return list({(id(a), id(b)): (a, b) for a, b in found}.values())


def _instances(units: Iterable[Unit]) -> list[Instance]:
    """(unit, index) of each call there would be without stacks, in order: a body's layers before its next round."""

    def when(instance: Instance) -> tuple[int, ...]:
        unit, index = instance
        return (*itertools.chain(*zip(unit.frames, index, strict=True)), unit.order or 0)

    return sorted(((unit, index) for unit in units for index in _indices(unit)), key=when)


def _indices(unit: Unit) -> Iterator[Index]:
    return itertools.product(*map(range, unit.sizes))


def _links(ours: Unit, at: Index, theirs: Unit, there: Index, label: Label, how: str) -> Iterator[Link]:
    slots = {label(name, slot): slot for name, slot in ours.slots.items()}
    for name, nnx in theirs.slots.items():
        linen = slots[label(name, nnx)]
        yield Link(linen, at[: len(linen.part.axes)], nnx, there[: len(nnx.part.axes)], how)


def _tie(first: tuple[Instance, Instance], second: tuple[Instance, Instance], label: Label) -> Tie:
    (a, p), (b, q) = first, second
    links = (*_links(*a, *p, label, ""), *_links(*b, *q, label, ""))
    swapped = (*_links(*b, *p, label, "swapped"), *_links(*a, *q, label, "swapped"))
    return Tie((a, b), (p, q), links, swapped)


# ---- names ----

_AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")


def is_automatic(key: str) -> bool:
    """Whether Linen named a module so by itself: such a name tells in which order modules were made, no more.

    >>> is_automatic("Dense_0"), is_automatic("encoder_0")
    (True, False)
    """
    return _AUTOMATIC.fullmatch(key) is not None


def _words(path: Iterable[str]) -> tuple[str, ...]:
    """`layers_0/if_` and `layers/0/if` in one form."""
    words = []
    for key in path:
        stem, number = re.fullmatch(r"(.*?)_?(\d*)", key, re.DOTALL).groups()
        words += [word for word in (stem.replace("_", "").lower(), number) if word]
    return tuple(words)


def _same_path(one: Path, other: Path) -> bool:
    return one == other or (_words(one) == _words(other) and not any(map(is_automatic, (*one, *other))))


def _told_apart(first: tuple[Instance, Instance], second: tuple[Instance, Instance]) -> bool:
    """Whether names say of two pairs that they are not to be swapped: where the paths part, each has its partner's."""
    (a, p), (b, q) = first, second
    ours, theirs = _parting(a[0].path, b[0].path), _parting(p[0].path, q[0].path)
    return ours is not None and ours == theirs and ours[0] != ours[1]


def _parting(one: Path, other: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The first names that differ, a number with the word before it; None if there are none of a user's."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if same is None or is_automatic(one[same]) or is_automatic(other[same]):
        return None
    words = _words(one[: same + 1]), _words(other[: same + 1])
    return tuple(found[-2:] if found[-1].isdecimal() else found[-1:] for found in words)


def _against_names(linen: list[Unit], nnx: list[Unit], pairs: Pairs) -> Iterator[Doubt]:
    """Units that have the name of another one's counterpart."""
    for ours, theirs in {(id(a), id(b)): (a, b) for (a, _), (b, _) in pairs}.values():
        if (other := _named_like(ours, theirs, linen, nnx)) is not None:
            text = f"by the order of calls it is {show_path(theirs.path)}, by its name {show_path(other.path)}"
            yield Doubt(ours.path, other.path, True, f"{show_path(ours.path)} ({ours.kind}): {text}")


def _shapes_against_names(links: list[Link]) -> Iterator[Doubt]:
    """Variables that have the name of another one's counterpart."""

    def name(slot: Slot) -> Hashable:
        at = slot.part.location
        return _name((at[0], at[-1]), slot)

    named = {name(link.nnx): link.nnx.part for link in links}
    for link in links:
        ours, theirs = link.linen.part, link.nnx.part
        other = named.get(name(link.linen), theirs)
        if other != theirs:
            text = f"{ours}: by its shape it is {theirs}, by its name {show_path(other.location)}"
            yield Doubt(ours.location[1:], theirs.location[1:], False, text)


def _named_like(unit: Unit, partner: Unit, linen: list[Unit], nnx: list[Unit]) -> Unit | None:
    """The one of `nnx` with the name of `unit`, if that is not its partner: of the same path, or beside the partner."""
    if not unit.path or is_automatic(unit.path[-1]):
        return None
    if not any(map(is_automatic, unit.path)):
        same = [other for other in nnx if _words(other.path) == _words(unit.path)]
        if len(same) == 1:
            return _if_meant(same[0], partner, unit.path, [u.path for u in linen], [u.path for u in nnx])
    length = len(_words(unit.path[-1:]))
    siblings = [other for other in nnx if other.path[:-1] == partner.path[:-1]]
    same = [other for other in siblings if _words(other.path)[-length:] == _words(unit.path[-1:])]
    if len(same) != 1:
        return None
    around = [u.path[-1:] for u in linen if u.path[:-1] == unit.path[:-1]]
    return _if_meant(same[0], partner, unit.path[-1:], around, [other.path[-1:] for other in siblings])


def _if_meant(other: Unit, partner: Unit, name: Path, ours: list[Path], theirs: list[Path]) -> Unit | None:
    """Numbers are names only where both sides count alike: `fc1, fc2` may well be `fc0, fc1`."""
    numbered = any(word.isdecimal() for word in _words(name))
    if other is partner or (numbered and set(map(_words, ours)) != set(map(_words, theirs))):
        return None
    return other
