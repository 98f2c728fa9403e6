"""A guess at what is what, before it is proven: pairs in some order, and what is done to the numbers of some of them.

Law: a proposal says each variable once, and can be said as a Derived.
Knows units, links and rules; runs nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bridge._types import Location, Shape
from bridge.checkpoint.derivation.derived import Derived, Reworked
from bridge.checkpoint.derivation.rework import Rework, reworks
from bridge.checkpoint.derivation.to_rules import UnsayableRuleError, components, fused_rule, reworked_rule
from bridge.tracing.pairs import Group, Link
from bridge.tracing.trace import Part, Unit

#: (number of the group, of NNX's layer in it, of the variable in that).
Spot = tuple[int, int, int]

#: How many layers one may be: gates, or query, key and value; or one of another shape.
FUSED, RESHAPED = (2, 3, 4), (1,)


@dataclass(frozen=True)
class Fusion:
    """One variable of a model that is several of the other's, or one of another shape.

    Attributes:
      many: in the order of their calls; one if shapes alone differ.
      one: what they become.
      linen_is_many: whose they are.
    """

    many: tuple[Part, ...]
    one: Part
    linen_is_many: bool

    @property
    def kept_axis(self) -> int | None:
        """The axis of the parts that is an axis of the whole: features that go in, as a rule; None if none is."""
        source, target = self.many[0].shape, self.one.shape
        if len(source) > 1 and len(target) > 1:
            if source[0] == target[0]:
                return 0
            if source[-1] == target[-1]:
                return -1
        return None

    @property
    def reworks(self) -> tuple[Rework, ...]:
        """What it could be; as it is, if nothing speaks against that."""
        others = reworks(self.many[0].shape, self.one.shape, len(self.many), False)
        is_same = len(self.many) == 1 and self.many[0].shape == self.one.shape
        return (Rework(), *others) if is_same else others

    def reworked(self, rework: Rework) -> Reworked:
        """As a rule."""
        rule = fused_rule(self.many, self.one, rework, not self.linen_is_many)
        many, one = self.many, (self.one,)
        linen, nnx = (many, one) if self.linen_is_many else (one, many)
        how = "fused" if len(many) > 1 else "of another shape"
        return Reworked(rule, linen, nnx, f"{how}, {_words(rework)}")


@dataclass(frozen=True)
class Proposal:
    """What is what.

    Attributes:
      groups: layers that are alike.
      orders: for each group which of Linen's layers each of NNX's has for its partner.
      reworks: what is done to the numbers of single variables.
      fusions: variables that are not one of one, and what is done to the numbers of each.
    """

    groups: tuple[Group, ...]
    orders: tuple[tuple[int, ...], ...]
    reworks: Mapping[Spot, Rework] = field(default_factory=dict)
    fusions: tuple[tuple[Fusion, Rework], ...] = ()
    dropped: tuple[Location, ...] = ()
    fresh: tuple[Location, ...] = ()

    @functools.cached_property
    def links(self) -> dict[Spot, Link]:
        """Every pair of variables."""
        links: dict[Spot, Link] = {}
        for number, (group, order) in enumerate(zip(self.groups, self.orders, strict=True)):
            for layer, own in enumerate(group.links(order)):
                links |= {(number, layer, n): link for n, link in enumerate(own)}
        return links

    @functools.cached_property
    def derived(self) -> Derived:
        """As what can be applied.

        Raises:
          UnsayableRuleError: layers of a stack whose numbers stand otherwise, each in its own way.
        """
        plain = [link for spot, link in self.links.items() if spot not in self.reworks]
        linked = sorted(dict.fromkeys(plain), key=lambda link: (link.linen.part.location, link.linen_index))
        reworked = [fusion.reworked(rework) for fusion, rework in self.fusions]
        if self.reworks:
            reworked += self._reworked_links()
            gone = {part.location for one in reworked for part in one.linen}
            linked = [link for link in linked if link.linen.part.location not in gone]
        return Derived(tuple(linked), self.dropped, self.fresh, reworked=tuple(reworked))

    def _reworked_links(self) -> Iterator[Reworked]:
        everything = [link.linen.part.location for link in self.links.values()]
        by_link = {id(link): self.reworks.get(spot, Rework()) for spot, link in self.links.items()}
        for group in components(list(self.links.values())):
            changes = {str((by_link[id(link)].options(), by_link[id(link)].parts)): by_link[id(link)] for link in group}
            if changes.keys() == {str(({}, (0,)))}:
                continue
            rework = next(iter(changes.values()))
            linen = tuple(dict.fromkeys(link.linen.part for link in group))
            nnx = tuple(dict.fromkeys(link.nnx.part for link in group))
            if len(changes) > 1 or any(link.nnx.count > 1 for link in group):
                raise UnsayableRuleError([part.location for part in linen], [part.location for part in nnx])
            rule = reworked_rule(group, rework, everything)
            yield Reworked(rule, linen, nnx, f"{group[0].how}, {_words(rework)}")


def _words(rework: Rework) -> str:
    words: list[str] = []
    if rework.rearrangement is not None:
        lengths = "".join(f", {name} = {size}" for name, size in rework.rearrangement.lengths.items())
        orders = "".join(f", {name} in order {list(x)}" for name, x in rework.rearrangement.order.items())
        words.append(f"{rework.rearrangement}{lengths}{orders}")
    if rework.add:
        words.append(f"{rework.add:+g}")
    return "; ".join(words) or "joined"


# ---- what has no partner of its own ----


def fusions_of(
    linen: Sequence[Unit], nnx: Sequence[Unit], counts: Sequence[int]
) -> tuple[list[Fusion], list[Unit], list[Unit]]:
    """Units that could be several of the other model's, or others in shape alone; and what is left of both sides.

    Args:
      counts: how many may be one.
    """
    fusions: list[Fusion] = []
    for linen_is_many in (True, False):
        many, ones = (linen, nnx) if linen_is_many else (nnx, linen)
        many, ones, more = _fused(list(many), list(ones), linen_is_many, counts)
        fusions += more
        linen, nnx = (many, ones) if linen_is_many else (ones, many)
    return fusions, list(linen), list(nnx)


def _fused(
    many: list[Unit], ones: list[Unit], linen_is_many: bool, counts: Sequence[int]
) -> tuple[list[Unit], list[Unit], list[Fusion]]:
    fusions: list[Fusion] = []
    for one in list(ones):
        for parts in _candidates(many, counts):
            matched = _matched(parts, one, linen_is_many)
            if matched is not None:
                fusions += matched
                many = [unit for unit in many if not any(unit is part for part in parts)]
                ones = [unit for unit in ones if unit is not one]
                break
    return many, ones, fusions


def _candidates(units: Sequence[Unit], counts: Sequence[int]) -> Iterator[list[Unit]]:
    """Neighbours in the order of calls, under one parent, with the same variables."""
    for count in counts:
        for start in range(len(units) - count + 1):
            parts = list(units[start : start + count])
            forms = [_form(unit) for unit in parts]
            if all(form == forms[0] for form in forms) and len({unit.path[:-1] for unit in parts}) == 1:
                yield parts


def _form(unit: Unit) -> dict[Location, Shape]:
    return {name: slot.part.shape for name, slot in unit.slots.items()}


def _matched(parts: Sequence[Unit], one: Unit, linen_is_many: bool) -> list[Fusion] | None:
    """A fusion for each variable, by name, or by rank where names differ; None if their numbers do not add up."""
    slots = [*itertools.chain(*(unit.slots.values() for unit in (*parts, one)))]
    if any(slot.part.axes or slot.count > 1 for slot in slots) or len(parts[0].slots) != len(one.slots):
        return None
    fusions: list[Fusion] = []
    free = dict(one.slots)
    for name in parts[0].slots:
        sizes = [math.prod(unit.slots[name].part.shape) for unit in parts]
        fits = [other for other, slot in free.items() if _fits(name, other, sum(sizes), slot.part)]
        if not fits:
            return None
        chosen = name if name in fits else fits[0]
        fusion = Fusion(tuple(unit.slots[name].part for unit in parts), free.pop(chosen).part, linen_is_many)
        if not fusion.many[0].shape or not fusion.reworks:
            return None
        fusions.append(fusion)
    differ = any(len(fusion.many) > 1 or fusion.many[0].shape != fusion.one.shape for fusion in fusions)
    return fusions if differ else None  # variables of one shape and other names are for the caller to tell


def _fits(name: Location, other: Location, size: int, part: Part) -> bool:
    return name[0] == other[0] and size == math.prod(part.shape)


def base_of(
    groups: Iterable[Group], fusions: Iterable[Fusion], dropped: tuple[Location, ...], fresh: tuple[Location, ...]
) -> Proposal:
    """What order, shape and names propose."""
    groups = tuple(groups)
    orders = tuple(tuple(range(len(group.pairs))) for group in groups)
    joined = tuple((fusion, fusion.reworks[0]) for fusion in fusions)
    return Proposal(groups, orders, {}, joined, dropped, fresh)
