"""Links between two models as rules of a file: what a user can read, edit and keep.

Law: applied to Linen's leaves, the rules make what the links say; what no rule can say is an error that names it.
Knows links and rules; knows nothing of modules or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from bridge._errors import BridgeError, show_path
from bridge._types import Location
from bridge.checkpoint.derivation.rework import Rework
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.rules.patterns import INDEX, ONE, Pattern, escape, escape_template
from bridge.checkpoint.rules.rearrange import Axis, Rearrangement
from bridge.tracing.pairs import Link, is_whole, permutation, raw_axis
from bridge.tracing.trace import Part


class UnsayableRuleError(BridgeError, ValueError):
    """Layers that are stacked in a way, or have names, for which there is no rule."""

    def __init__(self, linen: Iterable[Location], nnx: Iterable[Location]):
        self.linen, self.nnx = tuple(linen), tuple(nnx)
        super().__init__(
            "no rule of a file can say how these become one another:\n"
            f"  Linen: {', '.join(map(show_path, self.linen))}\n  NNX: {', '.join(map(show_path, self.nnx))}\n"
            "  expected: the same stacks on both sides, or one stacked axis and names that count 0, 1, ...\n"
            "  found: other names, or several axes\n"
            "Use what derive returns as it is, or rename the layers so that they count from 0."
        )


def rules_of(
    links: Sequence[Link],
    dropped: Iterable[Location] = (),
    fresh: Iterable[Location] = (),
    taken: Iterable[Location] = (),
) -> Rules:
    """The rules that lead from Linen's leaves to those of NNX: one for each module that keeps its variables' names.

    Args:
      taken: Linen's variables that other rules, which come before, are for.

    Raises:
      UnsayableRuleError: there are none.
    """
    dropped = tuple(dropped)
    groups = components(links)
    everything = [*dict.fromkeys(link.linen.part.location for link in links), *dropped, *taken]
    modules = _renamed_modules(groups, everything)
    rules = [_moved(ours, theirs) for ours, theirs in modules.items()]
    single = [group for group in groups if group[0].linen.part.location[:-1] not in modules]
    rules += [_rule(group, everything) for group in single]
    rules += [Rule(_pattern(location), drop=True) for location in dropped]
    rules += [Rule(target=_pattern(location), new="target") for location in fresh]
    return Rules(rules, default="error", name="the derived rules")


def components(links: Sequence[Link]) -> list[list[Link]]:
    """Links that have a variable in common, directly or through others."""
    groups: dict[tuple[str, Location], list[Link]] = {}
    for link in links:
        ours, theirs = ("linen", link.linen.part.location), ("nnx", link.nnx.part.location)
        group = groups.get(ours, groups.get(theirs, []))
        other = groups.get(theirs, group)
        moved = [link]
        if other is not group:  # by identity: the link joins two groups
            group += other
            moved += other
        group.append(link)
        for x in moved:
            groups["linen", x.linen.part.location] = groups["nnx", x.nnx.part.location] = group
    return list({id(group): group for group in groups.values()}.values())


def _renamed_modules(groups: Sequence[list[Link]], everything: Iterable[Location]) -> dict[Location, Location]:
    """Linen modules whose variables, all of them, keep name and form in one NNX module; the collection first."""
    targets: dict[Location, set[Location | None]] = {location[:-1]: set() for location in everything}
    linked: set[Location] = set()
    for group in groups:
        ours, theirs = group[0].linen.part, group[0].nnx.part
        plain = is_whole(group) and group[0].nnx.count == 1 and ours.axes == theirs.axes
        keeps = plain and ours.location[-1] == theirs.location[-1]
        for location in {link.linen.part.location for link in group}:
            linked.add(location)
            targets[location[:-1]].add(theirs.location[:-1] if keeps else None)
    for location in everything:
        if location not in linked:  # dropped, or another rule's
            targets[location[:-1]].add(None)
    renamed: dict[Location, Location] = {}
    for module, found in targets.items():
        target = next(iter(found))
        if len(found) == 1 and target is not None:
            renamed[module] = target
    return renamed


def _moved(ours: Location, theirs: Location) -> Rule:
    if ours == theirs:
        return Rule([*_pattern(ours), ONE], keep=True)
    return Rule([*_pattern(ours), ONE], [*_template(theirs), ONE])


# ---- one rule for a group ----


def _rule(group: list[Link], everything: Sequence[Location]) -> Rule:
    """The rule for variables that become one, or that one becomes."""
    group = sorted(group, key=lambda link: (link.linen_index, link.nnx_index, link.nnx.index))
    ours = list(dict.fromkeys(link.linen.part for link in group))
    theirs = list(dict.fromkeys(link.nnx.part for link in group))
    rule: Rule | None = None
    if is_whole(group) and len(theirs) == 1:
        rule = _joining(group, theirs[0])
    elif len(theirs) == 1 and len(theirs[0].axes) == 1 and not any(part.axes for part in ours):
        rule = _stacking(group, ours, theirs[0], everything)
    if rule is None and len(ours) == group[0].nnx.count and len(ours[0].axes) == 1:
        rule = _unstacking(group, ours[0], theirs)
    if rule is None:
        linen = [part.location for part in ours]
        nnx = [part.location for part in theirs]
        raise UnsayableRuleError(linen, nnx)
    return rule


def reworked_rule(group: list[Link], rework: Rework, everything: Sequence[Location]) -> Rule:
    """The rule for variables that become one, or that one becomes, if each layer's numbers stand otherwise in it.

    Raises:
      UnsayableRuleError: there is none.
    """
    ours, theirs = group[0].linen.part, group[0].nnx.part
    rule = _rule(group, everything)
    if rule.concat is not None:
        raise UnsayableRuleError([ours.location], [theirs.location])
    axes, options = rework.rearrangement, rework.options()
    if axes is None or not (ours.axes or theirs.axes):
        return replace(rule, **options)
    stacks = [f"layer{number}" for number in range(max(len(ours.axes), len(theirs.axes)))]
    if rule.stack is not None:
        rule = replace(rule, stack=0)
    if rule.unstack is not None:
        rule = replace(rule, unstack=0)
    before = _with_stacks(axes.before, ours.axes or (0,), stacks)
    after = _with_stacks(axes.after, theirs.axes or (0,), stacks)
    lengths = dict(axes.lengths)
    whole = Rearrangement(before, after, lengths, axes.order)
    return replace(rule, transpose=None, **{**options, "rearrange": str(whole)})


def _with_stacks(axes: Sequence[Axis], places: Sequence[int], names: Sequence[str]) -> tuple[Axis, ...]:
    result = list(axes)
    for place, name in zip(reversed(places), reversed(names), strict=True):
        result.insert(place, (name,))
    return tuple(result)


def fused_rule(many: Sequence[Part], one: Part, rework: Rework, towards_many: bool) -> Rule:
    """The rule that makes one variable of several, along their first axis, or several of one."""
    sources = [_pattern(part.location) for part in many]
    rule = Rule(
        [sources[part] for part in rework.parts] if len(sources) > 1 else sources[0],
        _template(one.location),
        concat=0 if len(sources) > 1 else None,
        **rework.options(),
    )
    return rule.inverse() if towards_many else rule


def _joining(group: list[Link], target: Part) -> Rule:
    """Gates become one, stacked as they are."""
    by_gate = sorted(group, key=lambda link: link.nnx.index)
    gates = list(dict.fromkeys(link.linen.part for link in by_gate))
    axes = permutation(gates[0], target)
    transpose = None if axes == tuple(range(len(axes))) else axes
    concat = raw_axis(gates[0], group[0].nnx.axis) if len(gates) > 1 else None
    sources = [_pattern(part.location) for part in gates]
    return _with_gates(sources, _template(target.location), transpose=transpose, concat=concat)


def _stacking(group: list[Link], ours: list[Part], target: Part, everything: Sequence[Location]) -> Rule | None:
    """Layers with a number in their names become a stack; None if the names do not count."""
    slot = group[0].nnx
    sources: list[list[str]] = []
    for gate in _gates(group):
        layers = sorted(gate, key=lambda link: link.nnx_index)
        keys = _numbered([link.linen.part.location for link in layers], r"(\d+)", escape)
        if keys is None:
            return None
        sources.append(keys)
    if sum(_taken(keys, everything) for keys in sources) != len(ours):
        return None  # the pattern takes more than the layers
    concat = slot.axis if slot.count > 1 else None
    return _with_gates(sources, _template(target.location), stack=target.axes[0], concat=concat)


def _unstacking(group: list[Link], source: Part, theirs: list[Part]) -> Rule | None:
    """A stack becomes layers with a number in their names; None if the names do not count."""
    slot, gates = group[0].nnx, _gates(group)
    if any(part.axes for part in theirs):
        return None
    layers = sorted(gates[0], key=lambda link: link.linen_index)
    target = _numbered([link.nnx.part.location for link in layers], INDEX, escape_template)
    if target is None:
        return None
    concat = raw_axis(source, slot.axis) if slot.count > 1 else None
    sources = [_pattern(gate[0].linen.part.location) for gate in gates]
    return _with_gates(sources, target, unstack=source.axes[0], concat=concat)


def _gates(group: list[Link]) -> list[list[Link]]:
    gates: list[list[Link]] = [[] for _ in range(group[0].nnx.count)]
    for link in group:
        gates[link.nnx.index].append(link)
    return gates


def _pattern(location: Location) -> list[str]:
    return list(map(escape, location))


def _template(location: Location) -> list[str]:
    return list(map(escape_template, location))


def _with_gates(sources: Sequence[list[str]], target: list[str], **options: Any) -> Rule:
    return Rule(sources[0] if len(sources) == 1 else sources, target, **options)


def _numbered(row: Sequence[Location], number: str, escaped: Callable[[str], str]) -> list[str] | None:
    """Keys with `number` where the locations count 0, 1, ... and differ in nothing else; None if they do not."""
    if len(set(map(len, row))) > 1:
        return None
    differs = [n for n, keys in enumerate(zip(*row, strict=True)) if len(set(keys)) > 1]
    if len(differs) != 1:
        return None
    place = differs[0]
    stem = row[0][place].rstrip("0123456789")
    for n, location in enumerate(row):
        if location[place] != f"{stem}{n}":
            return None
    keys = list(map(escaped, row[0]))
    keys[place] = escaped(stem) + number
    return keys


def _taken(keys: Sequence[str], everything: Iterable[Location]) -> int:
    """How many locations a pattern matches."""
    matches = map(Pattern.parse(keys).match, everything)
    return sum(match is not None for match in matches)
