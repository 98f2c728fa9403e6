"""A step of a CheckpointManager, or a composite checkpoint: all of its items as one source.

Law: every item is part of the source, is carried beside it (JSON), or is named as left out. What nobody has chosen and
nothing tells is an error.
Knows Orbax's items; knows nothing of the arrays in them, or of what a training state is but its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._types import Path
from bridge.checkpoint.formats.joined import JoinedSource
from bridge.checkpoint.formats.orbax.files import (
    STEP_NAME,
    StepFolder,
    choose,
    find_step,
    item_handlers,
    items_in,
    other_items,
    read_json_item,
)
from bridge.checkpoint.formats.orbax.read import open_orbax
from bridge.checkpoint.formats.protocol import Around, Items, LeftOut, Source
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Region
from bridge.checkpoint.tree.tree import Tree

# The item that `ocp.args.ArraySave` writes is a tree of one leaf of this name.
_ONE_ARRAY = ("checkpoint",)
_ARRAY_HANDLER = "ArrayCheckpointHandler"


def open_step(path: FilePath, step: int | None = None, item: Items | None = None) -> Source:
    """The checkpoint at `path`, or a step of it; items that are the parts of one state are joined. No array is read.

    Args:
        path: an Orbax checkpoint, a step, or a folder of steps.
        step: the step; the latest by default.
        item: the item, several of them, or their names in the tree -> their names on disk; by default the only one with
            arrays, the only one that is called as a whole state is (`state`, `default`, ...), or all, if they are the
            parts of one state (`params`, `opt_state`, ...).

    Raises:
        CheckpointNotFoundError: nothing there, or no such step or item.
        CheckpointCorruptError: a file is missing or damaged.
        CheckpointLayoutError: several items, and nothing tells what they are to each other.
        MissingDependencyError: orbax is not installed.
    """
    place = find_step(path, step)
    if items_in(place.folder) or item is not None:
        chosen = choose(place.folder, item)
        source = _open_items(place, chosen)
    else:
        chosen, source = {}, open_orbax(place.folder)
    source.step = place.step
    source.around = _around(place, chosen, source, asked=item is not None)
    return source


def _open_items(place: StepFolder, chosen: Mapping[str, FilePath]) -> Any:
    with ExitStack() as opened:
        parts: dict[str, Any] = {}
        handlers = item_handlers(place.folder)
        for name, folder in chosen.items():
            parts[name] = opened.enter_context(open_orbax(folder))
            if handlers.get(folder.name, "").endswith(_ARRAY_HANDLER):
                parts[name] = _OneArray(parts[name])
        opened.pop_all()
    if len(parts) == 1:
        ((name, source),) = parts.items()
        source.item = chosen[name].name
        return source
    listed = ", ".join(folder.name for folder in chosen.values())
    step = _step_of(place) if "opt_state" in parts and "step" not in parts else None
    values = {} if step is None else {("step",): np.int32(step)}
    return JoinedSource(place.folder, parts, values=values, reason=f"the items {listed} are the parts of one state")


def _step_of(place: StepFolder) -> int | None:
    """The number of a step folder, also of one that was opened by itself."""
    match = STEP_NAME.fullmatch(place.folder.name)
    number = int(match[2]) if match else -1
    return number if 0 <= number < 2**31 else None


def _around(place: StepFolder, chosen: Mapping[str, FilePath], source: Source, *, asked: bool) -> Around:
    """What else is in the folder of the step: of a single checkpoint without items, nothing."""
    if not chosen:
        return Around(place.steps)
    holds = dict.fromkeys(items_in(place.folder), "arrays")
    taken = {folder.name for folder in chosen.values()}
    instead = f"the state is {', '.join(sorted(taken))}"
    left_out = [LeftOut(name, f"an item with arrays; {instead}", asked) for name in holds if name not in taken]
    json_items: dict[str, Any] = {}
    handlers = item_handlers(place.folder)
    for folder in other_items(place.folder):
        try:
            json_items[folder.name] = read_json_item(folder)
            holds[folder.name] = "JSON"
        except (ValueError, OSError):
            holds[folder.name] = handlers.get(folder.name, "unknown").rpartition(".")[2]
            why = f"an item that is neither a tree of arrays nor JSON ({holds[folder.name]})"
            left_out.append(LeftOut(folder.name, why, asked))
    notes = []
    if isinstance(source, JoinedSource):
        notes.append(source.reason)
        if source.values:
            notes.append(f"the items hold no step: it is taken from the name of the folder, {place.folder.name}")
    return Around(place.steps, holds, tuple(left_out), json_items, tuple(notes))


class _OneArray:
    """An item that is one array, without a name of its own: a leaf at the root. A `protocol.Source`."""

    def __init__(self, inner: Source):
        self._inner = inner
        self.path, self.format, self.reason = inner.path, inner.format, inner.reason
        self.step, self.item, self.around, self.metadata = inner.step, inner.item, inner.around, inner.metadata
        leaf = inner.tree.leaves[_ONE_ARRAY]
        self.tree = Tree({(): Leaf((), leaf.shape, leaf.dtype, leaf.nbytes)})

    def read(self, path: Path, region: Region | None = None) -> Any:
        """The array, or a region of it."""
        return self._inner.read((*_ONE_ARRAY, *path), region)

    def piece(self, path: Path) -> int:
        """Bytes that reading any part of it takes, beside the part."""
        return self._inner.piece((*_ONE_ARRAY, *path))

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to the item since it was opened."""
        self._inner.require_unchanged()

    def close(self) -> None:
        """Close the item."""
        self._inner.close()
