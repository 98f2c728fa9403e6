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
from bridge._types import Location, Path
from bridge.tracing.trace import Part, Slot, Unit
from bridge.variables.kinds import LINEN_COLLECTIONS

Index = tuple[int, ...]
Instance = tuple[Unit, Index]
#: What makes two units alike, and what names a variable of one.
Key = Callable[[Unit], Hashable]
Label = Callable[[Path, Slot], Hashable]


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
    """A module, or a variable, of Linen that could be paired in two ways.

    Attributes:
      nnx: the likelier counterpart: the one of that name, or of that shape.
      is_module: whether the whole module is meant.
      other: the other one.
    """

    linen: Path
    nnx: Path
    is_module: bool
    text: str
    other: Path


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


@dataclass(frozen=True)
class Group:
    """Layers that are alike, each with the partner that the order of calls, or its name, gives it.

    Attributes:
      pairs: a layer of Linen and its partner, each with its index along stacked axes.
      label: what names a variable within its layer.
      how: why these.
      by_order: whether the order of calls decided, and another would do as well.
    """

    pairs: tuple[tuple[Instance, Instance], ...]
    label: Label
    how: str
    by_order: bool

    def links(self, order: Sequence[int]) -> list[list[Link]]:
        """Those of each layer of NNX, if the k-th has the `order[k]`-th of Linen for its partner."""
        links: list[list[Link]] = []
        for number, (_, (theirs, there)) in enumerate(self.pairs):
            ours, at = self.pairs[order[number]][0]
            links.append(list(_links(ours, at, theirs, there, self.label, self.how.format(n=number + 1))))
        return links

    def told_apart(self, one: int, other: int) -> bool:
        """Whether names say of two pairs that they are not to be exchanged."""
        return _told_apart(self.pairs[one], self.pairs[other])


@dataclass
class Pairing:
    """What is paired, what is left, what could be paired in two ways, and what the order of calls alone has paired."""

    links: list[Link] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    linen: list[Unit] = field(default_factory=list)
    nnx: list[Unit] = field(default_factory=list)
    ambiguous: list[Doubt] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)


def is_whole(links: Sequence[Link]) -> bool:
    """Whether the target's stacked axes, if any, are those of one source for each gate, layer by layer."""
    target, axes = links[0].nnx.part, links[0].linen.part.axes
    gates: set[int] = set()
    sources: set[tuple[Location, int]] = set()
    for link in links:
        source = link.linen.part
        if link.nnx.part != target or source.axes != axes or source.sizes != target.sizes:
            return False
        if link.linen_index != link.nnx_index:
            return False
        gates.add(link.nnx.index)
        sources.add((source.location, link.nnx.index))
    return len(sources) == len(gates)


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
    pool.linen, pool.nnx = list(_single_variables(pool.linen)), list(_single_variables(pool.nnx))
    _pass(pool, _names, _name, "by the variable's name", needs_own=True, one_to_one=True)
    _pass(pool, _shapes, _shape, "the only one of its shape", needs_own=True, one_to_one=True)
    return pool


# ---- what makes two units alike ----


def _class_and_names(unit: Unit) -> Hashable:
    kind = unit.kind if unit.family is None else unit.family
    names = _names(unit)
    return None if names is None else (kind, names)


def _names(unit: Unit) -> Hashable:
    return _form(unit, lambda name, slot: (_name(name, slot), slot.shape))


def _shapes(unit: Unit) -> Hashable:
    return _form(unit, _shape)


def _form(unit: Unit, label: Label) -> Hashable:
    """What `label` says of all variables; None if it says the same of two, and so not which is which."""
    labels = {(label(name, slot), _shared(unit, slot)) for name, slot in unit.slots.items()}
    return frozenset(labels) if len(labels) == len(unit.slots) else None


def _name(name: Path, _slot: Slot | None = None) -> Hashable:
    return _collection(name[0]), *_words(name[1:])


def _shape(name: Path, slot: Slot) -> Hashable:
    return _collection(name[0]), slot.shape


def _collection(name: str) -> str | None:
    """None for one that a user has named: in NNX it is called like its Variable's class."""
    return name if name in LINEN_COLLECTIONS else None


def _shared(unit: Unit, slot: Slot) -> bool:
    return len(slot.part.axes) < len(unit.sizes)


def _shares(unit: Unit) -> bool:
    """Whether the repetitions of a unit have a variable in common."""
    return any(_shared(unit, slot) for slot in unit.slots.values())


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
    for linen, nnx in _groups(pool, key):
        if needs_own and _has_layers(linen) and _has_layers(nnx):
            continue
        if one_to_one and not (len(linen) == len(nnx) == 1):
            continue
        for pairs, why in _in_group(linen, nnx, pool.ambiguous):
            _take(pool, pairs, label, how, why)


def _groups(pool: Pairing, key: Key) -> Iterable[tuple[list[Unit], list[Unit]]]:
    """Units that `key` says are alike: Linen's, and those of NNX."""
    groups: dict[Hashable, tuple[list[Unit], list[Unit]]] = {}
    for side, units in enumerate((pool.linen, pool.nnx)):
        for unit in units:
            alike = key(unit)
            if alike is not None:
                groups.setdefault(alike, ([], []))[side].append(unit)
    return groups.values()


def _has_layers(units: Iterable[Unit]) -> bool:
    return any(unit.family is not None for unit in units)


def _take(pool: Pairing, pairs: Pairs, label: Label, how: str, why: str) -> None:
    """Link what is paired, and take it out of the pool."""
    for n, ((ours, ours_index), (theirs, theirs_index)) in enumerate(pairs, start=1):
        reasons = (f"{ours.kind}/{theirs.kind}", how, why.format(n=n, all=len(pairs)))
        links = list(_links(ours, ours_index, theirs, theirs_index, label, ", ".join(filter(None, reasons))))
        pool.links += links
        if label is _shape:
            pool.ambiguous += _shapes_against_names(links)
    if pairs:
        (ours, _), (theirs, _) = pairs[0]
        how = ", ".join(filter(None, (f"{ours.kind}/{theirs.kind}", how, why.replace("{all}", str(len(pairs))))))
        is_free = why is _BY_ORDER and not any(_shares(unit) for pair in pairs for unit, _ in pair)
        pool.groups.append(Group(tuple(pairs), label, how, is_free))
    if why is _BY_ORDER:
        neighbours = itertools.pairwise(pairs)
        pool.ties += [_tie(*two, label) for two in neighbours if not _told_apart(*two)]
    pool.linen = _without(pool.linen, (ours for (ours, _), _ in pairs))
    pool.nnx = _without(pool.nnx, (theirs for _, (theirs, _) in pairs))


def _without(units: list[Unit], taken: Iterable[Unit]) -> list[Unit]:
    """By identity: two layers that are alike are equal, or would be compared slot by slot."""
    gone = set(map(id, taken))
    return [unit for unit in units if id(unit) not in gone]


Pairs = list[tuple[Instance, Instance]]
_BY_ORDER = "call {n} of {all} alike"


def _in_group(linen: list[Unit], nnx: list[Unit], ambiguous: list[Doubt]) -> Iterator[tuple[Pairs, str]]:
    """Pairs among units that are alike, and why."""
    if (len(linen), len(nnx)) != (1, 1) and any(unit.order is None for unit in (*linen, *nnx)):
        named = _by_name(linen, nnx)
        by_name: Pairs = []
        for ours, theirs in named:
            by_name += [((ours, index), (theirs, index)) for index in _indices(ours)]
        yield by_name, "by name"
        linen = _without(linen, (ours for ours, _ in named))
        nnx = _without(nnx, (theirs for _, theirs in named))
        if (len(linen), len(nnx)) != (1, 1):
            linen = [unit for unit in linen if unit.order is not None]
            nnx = [unit for unit in nnx if unit.order is not None]
    linen_calls, nnx_calls = _instances(linen), _instances(nnx)
    if len(linen_calls) != len(nnx_calls) or not linen_calls:
        return
    pairs = list(zip(linen_calls, nnx_calls, strict=True))
    if any(map(_shares, linen)) and not _one_to_one(pairs):
        return  # one value for all repetitions cannot be that of several stacks
    ambiguous += _against_names(linen, nnx, pairs)
    yield pairs, _BY_ORDER if len(pairs) > 1 else "the only ones alike"


def _one_to_one(pairs: Pairs) -> bool:
    """Whether each unit, by identity, has one partner for all of its repetitions."""
    partners = {(id(ours), id(theirs)) for (ours, _), (theirs, _) in pairs}
    linen, nnx = (set(units) for units in zip(*partners, strict=True))
    return len(partners) == len(linen) == len(nnx)


def _by_name(linen: list[Unit], nnx: list[Unit]) -> list[tuple[Unit, Unit]]:
    """The units never called, and those with the same path; without those that have none, or several."""
    named: dict[tuple[int, int], tuple[Unit, Unit]] = {}  # by identity: both sides may name the same two
    for ours in linen:
        theirs = _namesake(ours, nnx)
        if theirs is not None:
            named[id(ours), id(theirs)] = ours, theirs
    for theirs in nnx:
        ours = _namesake(theirs, linen)
        if ours is not None:
            named[id(ours), id(theirs)] = ours, theirs
    return list(named.values())


def _namesake(unit: Unit, others: list[Unit]) -> Unit | None:
    """For a unit that is never called: the only one with its path."""
    if unit.order is not None:
        return None
    same = [other for other in others if _same_path(unit.path, other.path) and other.sizes == unit.sizes]
    return same[0] if len(same) == 1 else None


def _instances(units: Iterable[Unit]) -> list[Instance]:
    """(unit, index) of each call there would be without stacks, in order: a body's layers before its next round."""

    def when(instance: Instance) -> tuple[int, ...]:
        unit, index = instance
        return (*itertools.chain(*zip(unit.frames, index, strict=True)), unit.order or 0)

    instances: list[Instance] = []
    for unit in units:
        instances += [(unit, index) for index in _indices(unit)]
    return sorted(instances, key=when)


def _indices(unit: Unit) -> Iterator[Index]:
    return itertools.product(*map(range, unit.sizes))


def _links(ours: Unit, at: Index, theirs: Unit, there: Index, label: Label, how: str) -> Iterator[Link]:
    slots = {label(name, slot): slot for name, slot in ours.slots.items()}
    for name, nnx in theirs.slots.items():
        linen = slots[label(name, nnx)]
        yield Link(linen, at[: len(linen.part.axes)], nnx, there[: len(nnx.part.axes)], how)


def _tie(first: tuple[Instance, Instance], second: tuple[Instance, Instance], label: Label) -> Tie:
    (ours, theirs), (our_next, their_next) = first, second
    links = (*_links(*ours, *theirs, label, ""), *_links(*our_next, *their_next, label, ""))
    swapped = (*_links(*our_next, *theirs, label, "swapped"), *_links(*ours, *their_next, label, "swapped"))
    return Tie((ours, our_next), (theirs, their_next), links, swapped)


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
    words: list[str] = []
    for key in path:
        stem, number = re.fullmatch(r"(.*?)_?(\d*)", key, re.DOTALL).groups()
        words += filter(None, (stem.replace("_", "").lower(), number))
    return tuple(words)


def _same_path(one: Path, other: Path) -> bool:
    return one == other or (_words(one) == _words(other) and not any(map(is_automatic, (*one, *other))))


def _told_apart(first: tuple[Instance, Instance], second: tuple[Instance, Instance]) -> bool:
    """Whether names say of two pairs that they are not to be swapped: where the paths part, each has its partner's."""
    ((ours, _), (theirs, _)), ((our_next, _), (their_next, _)) = first, second
    parting = _parting(ours.path, our_next.path)
    if parting is None or parting[0] == parting[1]:
        return False
    return parting == _parting(theirs.path, their_next.path)


def _parting(one: Path, other: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The first names that differ, a number with the word before it; None if there are none of a user's."""
    depth = next((n for n, (key, its) in enumerate(zip(one, other, strict=False)) if key != its), None)
    if depth is None or is_automatic(one[depth]) or is_automatic(other[depth]):
        return None
    return _last_word(one[: depth + 1]), _last_word(other[: depth + 1])


def _last_word(path: Path) -> tuple[str, ...]:
    words = _words(path)
    return words[-2:] if words[-1].isdecimal() else words[-1:]


def _against_names(linen: list[Unit], nnx: list[Unit], pairs: Pairs) -> Iterator[Doubt]:
    """Units that have the name of another one's counterpart."""
    partners = {(id(ours), id(theirs)): (ours, theirs) for (ours, _), (theirs, _) in pairs}
    for ours, theirs in partners.values():
        other = _named_like(ours, theirs, linen, nnx)
        if other is not None:
            text = f"by the order of calls it is {show_path(theirs.path)}, by its name {show_path(other.path)}"
            whole = f"{show_path(ours.path)} ({ours.kind}): {text}"
            yield Doubt(ours.path, other.path, True, whole, theirs.path)


def _shapes_against_names(links: list[Link]) -> Iterator[Doubt]:
    """Variables that have the name of another one's counterpart."""

    def name(slot: Slot) -> Hashable:
        at = slot.part.location
        return _name((at[0], at[-1]))

    named = {name(link.nnx): link.nnx.part for link in links}
    for link in links:
        ours, theirs = link.linen.part, link.nnx.part
        other = named.get(name(link.linen), theirs)
        if other != theirs:
            text = f"{ours}: by its shape it is {theirs}, by its name {show_path(other.location)}"
            yield Doubt(ours.location[1:], theirs.location[1:], False, text, other.location[1:])


def _named_like(unit: Unit, partner: Unit, linen: list[Unit], nnx: list[Unit]) -> Unit | None:
    """The one of `nnx` with the name of `unit`, if that is not its partner: of the same path, or beside the partner."""
    if not unit.path or is_automatic(unit.path[-1]):
        return None
    if not any(map(is_automatic, unit.path)):
        same = [other for other in nnx if _words(other.path) == _words(unit.path)]
        if len(same) == 1:
            ours = [other.path for other in linen]
            theirs = [other.path for other in nnx]
            return _if_meant(same[0], partner, unit.path, ours, theirs)
    length = len(_words(unit.path[-1:]))
    siblings = [other for other in nnx if other.path[:-1] == partner.path[:-1]]
    same = [other for other in siblings if _words(other.path)[-length:] == _words(unit.path[-1:])]
    if len(same) != 1:
        return None
    ours = [other.path[-1:] for other in linen if other.path[:-1] == unit.path[:-1]]
    theirs = [other.path[-1:] for other in siblings]
    return _if_meant(same[0], partner, unit.path[-1:], ours, theirs)


def _if_meant(other: Unit, partner: Unit, name: Path, ours: list[Path], theirs: list[Path]) -> Unit | None:
    """Numbers are names only where both sides count alike: `fc1, fc2` may well be `fc0, fc1`."""
    numbered = any(word.isdecimal() for word in _words(name))
    if other is partner or (numbered and set(map(_words, ours)) != set(map(_words, theirs))):
        return None
    return other
