"""Links between two models as rules of a file: what a user can read, edit and keep.

Law: applied to Linen's leaves, the rules make what the links say; what no rule can say is an error that names it.
Knows links and rules; knows nothing of modules or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bridge._errors import BridgeError, show_path
from bridge._types import Location
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.rules.patterns import INDEX, ONE, Pattern, escape, escape_template
from bridge.tracing.pairs import Link, is_whole, permutation, raw_axis


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


def rules_of(links: Sequence[Link], dropped: Iterable[Location] = (), fresh: Iterable[Location] = ()) -> Rules:
    """The rules that lead from Linen's leaves to those of NNX: one for each module that keeps its variables' names.

    Raises:
      UnsayableRuleError: there are none.
    """
    dropped = tuple(dropped)
    groups = _components(links)
    everything = [*dict.fromkeys(link.linen.part.location for link in links), *dropped]
    modules = _renamed_modules(groups, everything)
    rules = [_moved(ours, theirs) for ours, theirs in modules.items()]
    rules += [_rule(group, everything) for group in groups if group[0].linen.part.location[:-1] not in modules]
    rules += [Rule([*map(escape, at)], drop=True) for at in dropped]
    rules += [Rule(target=[*map(escape, at)], new="target") for at in fresh]
    return Rules(rules, default="error", name="the derived rules")


def _components(links: Sequence[Link]) -> list[list[Link]]:
    """Links that have a variable in common, directly or through others."""
    groups: dict[tuple[str, Location], list[Link]] = {}
    for link in links:
        keys = ("linen", link.linen.part.location), ("nnx", link.nnx.part.location)
        touched = {id(group): group for key in keys if (group := groups.get(key)) is not None}
        first, *others = touched.values() or ([],)
        for other in others:
            first += other
        first.append(link)
        moved = (x for other in others for x in other)
        for x in (link, *moved):
            groups["linen", x.linen.part.location] = groups["nnx", x.nnx.part.location] = first
    return list({id(group): group for group in groups.values()}.values())


def _renamed_modules(groups: Sequence[list[Link]], everything: Iterable[Location]) -> dict[Location, Location]:
    """Linen modules whose variables, all of them, keep name and form in one NNX module; the collection first."""
    targets: dict[Location, set[Location | None]] = {at[:-1]: set() for at in everything}
    linked: set[Location] = set()
    for group in groups:
        ours, theirs = group[0].linen.part, group[0].nnx.part
        plain = is_whole(group) and group[0].nnx.count == 1 and ours.axes == theirs.axes
        same_name = ours.location[-1] == theirs.location[-1]
        for at in {link.linen.part.location for link in group}:
            linked.add(at)
            targets[at[:-1]].add(theirs.location[:-1] if plain and same_name else None)
    for at in everything:
        if at not in linked:  # dropped
            targets[at[:-1]].add(None)
    return {ours: found for ours, to in targets.items() if len(to) == 1 and (found := next(iter(to))) is not None}


def _moved(ours: Location, theirs: Location) -> Rule:
    if ours == theirs:
        return Rule([*map(escape, ours), ONE], keep=True)
    return Rule([*map(escape, ours), ONE], [*map(escape_template, theirs), ONE])


def _rule(group: list[Link], everything: Sequence[Location]) -> Rule:
    group = sorted(group, key=lambda link: (link.linen_index, link.nnx_index, link.nnx.index))
    ours = list(dict.fromkeys(link.linen.part for link in group))
    theirs = list(dict.fromkeys(link.nnx.part for link in group))
    slot = group[0].nnx
    target: Sequence[str] | None = [*map(escape_template, theirs[0].location)]
    if is_whole(group) and len(theirs) == 1:
        gates = list(dict.fromkeys(link.linen.part for link in sorted(group, key=lambda link: link.nnx.index)))
        axes = permutation(gates[0], theirs[0])
        transpose = None if axes == tuple(range(len(axes))) else axes
        options = {"concat": raw_axis(gates[0], slot.axis)} if len(gates) > 1 else {}
        return _with_gates([[*map(escape, part.location)] for part in gates], target, transpose=transpose, **options)
    by_gate = [[link for link in group if link.nnx.index == gate] for gate in range(slot.count)]
    if len(theirs) == 1 and len(theirs[0].axes) == 1 and not any(part.axes for part in ours):
        rows = [[x.linen.part.location for x in sorted(row, key=lambda x: x.nnx_index)] for row in by_gate]
        sources = [_numbered(row, r"(\d+)", escape) for row in rows]
        if None not in sources and sum(_taken(keys, everything) for keys in sources) == len(ours):
            options = {"concat": slot.axis} if slot.count > 1 else {}
            return _with_gates(sources, target, stack=theirs[0].axes[0], **options)
    if len(ours) == slot.count and len(ours[0].axes) == 1 and not any(part.axes for part in theirs):
        row = [x.nnx.part.location for x in sorted(by_gate[0], key=lambda x: x.linen_index)]
        target = _numbered(row, INDEX, escape_template)
        if target is not None:
            options = {"concat": raw_axis(ours[0], slot.axis)} if slot.count > 1 else {}
            gates = [[*map(escape, row[0].linen.part.location)] for row in by_gate]
            return _with_gates(gates, target, unstack=ours[0].axes[0], **options)
    raise UnsayableRuleError((part.location for part in ours), (part.location for part in theirs))


def _with_gates(sources: Sequence[Sequence[str]], target: Sequence[str], **options: Any) -> Rule:
    return Rule(sources[0] if len(sources) == 1 else sources, target, **options)


def _numbered(row: Sequence[Location], number: str, escaped: Callable[[str], str]) -> list[str] | None:
    """Keys with `number` where the locations count 0, 1, ... and differ in nothing else; None if they do not."""
    differs = {n for at in row for n, (a, b) in enumerate(zip(at, row[0], strict=False)) if a != b}
    if len({len(at) for at in row}) > 1 or len(differs) != 1:
        return None
    place = differs.pop()
    stem = row[0][place].rstrip("0123456789")
    if [at[place] for at in row] != [f"{stem}{n}" for n in range(len(row))]:
        return None
    return [escaped(stem) + number if n == place else escaped(key) for n, key in enumerate(row[0])]


def _taken(keys: Sequence[str], everything: Iterable[Location]) -> int:
    pattern = Pattern.parse(keys)
    return sum(pattern.match(at) is not None for at in everything)
