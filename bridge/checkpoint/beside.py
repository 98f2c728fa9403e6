"""What travels beside the leaves of a checkpoint: its writer's metadata, and items that hold JSON.

Law: all of it is in the target's metadata under its own name, or is named as left out.
Knows metadata; knows nothing of leaves, layouts or formats.
"""

from __future__ import annotations

from typing import Any

from bridge.checkpoint.formats.protocol import JSON_ITEMS, LeftOut, Source
from bridge.checkpoint.plan.note import NOTE
from bridge.checkpoint.verification import HASHES

#: What the converter itself writes, and a target has of its own.
_OURS = (NOTE, HASHES, "converted_from", "converted_by", "unproven")


def carried(source: Source) -> tuple[dict[str, Any], tuple[LeftOut, ...]]:
    """The metadata that a target takes over, and what of it has no place there.

    Items that hold JSON are under `JSON_ITEMS`, by their names; a step of a CheckpointManager has them as items again.
    """
    metadata = {name: value for name, value in source.metadata.items() if name not in (*_OURS, JSON_ITEMS)}
    json_items = source.around.json_items
    earlier = source.metadata.get(JSON_ITEMS)
    if isinstance(earlier, dict):
        json_items = {**earlier, **json_items}
    if json_items:
        metadata[JSON_ITEMS] = dict(json_items)
    if NOTE in source.metadata:
        return metadata, ()
    clashes = [name for name in _OURS if name in source.metadata]
    why = "metadata of a name that the converter uses itself"
    return metadata, tuple(LeftOut(name, why) for name in clashes)
