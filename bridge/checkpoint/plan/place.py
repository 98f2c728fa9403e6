"""Which part of a tree a conversion is about: a training state at some depth, and what is outside of it.

Law: what is outside is carried unchanged, or stands in `dropped`; a place that was not asked for is noted.
Knows trees and plans; knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge._errors import CheckpointLayoutError, near_misses, show_path
from bridge._types import Path
from bridge.checkpoint.options import ConversionOptions
from bridge.checkpoint.plan.note import NOTE, read_note
from bridge.checkpoint.plan.plan import Plan
from bridge.checkpoint.tree.inner import around, below, outside, states_in
from bridge.checkpoint.tree.ops import Op
from bridge.checkpoint.tree.tree import Tree, read_of


def place_in(tree: Tree, metadata: Mapping[str, Any], asked: Path | None, where: object = "(tree)") -> Path:
    """Where in `tree` the training state is: as asked for, as an earlier conversion noted, or the only one there.

    Raises:
      CheckpointLayoutError: nothing is at the place that was asked for, or there are several states to choose from.
    """
    if asked is not None:
        if not below(tree, asked).leaves:
            raise _nothing_there(tree, asked, where)
        return asked
    noted = read_note(metadata).place
    if noted and below(tree, noted).leaves:
        return noted
    places = states_in(tree)
    if len(places) > 1:
        names = [show_path(place) for place in places]
        raise CheckpointLayoutError(
            "the checkpoint holds several training states",
            where,
            expected="one, or the place of one",
            found=", ".join(names),
            hint=f"Choose one: at={names[0]!r} (--at {names[0]}). What is outside of it is carried unchanged.",
        )
    return places[0] if places else ()


def _nothing_there(tree: Tree, asked: Path, where: object) -> CheckpointLayoutError:
    nodes: dict[str, None] = {}
    for path in tree.leaves:
        nodes |= dict.fromkeys(show_path(path[:depth]) for depth in range(1, len(path)))
    close = near_misses(show_path(asked), nodes)
    return CheckpointLayoutError(
        "nothing is at that place of the checkpoint",
        where,
        expected=f"leaves below {show_path(asked)}",
        found=", ".join(close) or f"the keys {', '.join(dict.fromkeys(show_path(path[:1]) for path in tree.leaves))}",
        hint="Give another place: at=... (--at PATH).",
    )


def metadata_of(metadata: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    """The metadata without the note of a conversion of another place, which says nothing of this one."""
    if NOTE in metadata and read_note(metadata).place != place:
        return {name: value for name, value in metadata.items() if name != NOTE}
    return metadata


def embedded(plan: Plan, tree: Tree, place: Path, options: ConversionOptions) -> Plan:
    """The plan for all of `tree`, from the one for the state at `place` of it.

    Where the rest is dropped, the target is the state alone; nobody has asked for that unless `at` was given.
    """
    if not place:
        return plan

    def whole(path: Path) -> Op:
        return read_of(tree.leaves[(*place, *path)])

    rest = outside(tree, place)
    dropped = {(*place, *path): why for path, why in plan.dropped.items()}
    asked = {(*place, *path) for path in plan.asked}
    made = {path: op.on(whole) for path, op in plan.made.items()}
    notes = [f"the training state is at {show_path(place)}"]
    if options.outside == "drop":
        dropped |= dict.fromkeys(rest, f"it is outside of {show_path(place)}")
        asked |= set(rest) if options.at is not None else set()
        changes: dict[str, Any] = {"made": made}
    else:
        if rest:
            notes = [f"{notes[0]}; what is outside of it is carried unchanged: {len(rest)} leaves"]
        target = around(tree, place, plan.target)
        inside = {(*place, *path): op for path, op in made.items()}
        every = {path: inside[path] if path in inside else read_of(tree.leaves[path]) for path in target.leaves}
        changes = {"made": every, "target": target, "memo": replace(plan.memo, place=place)}
    return replace(plan, source=tree, dropped=dropped, asked=frozenset(asked), notes=(*notes, *plan.notes), **changes)
