"""Where Orbax keeps what: the folder of a checkpoint, its steps and items, and what a broken file is reported as.

Law: what is found is finished, and chosen without reading an array; an error of tensorstore or json names the file.
Knows Orbax's names on disk; knows nothing of the arrays in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    MissingDependencyError,
    near_misses,
)

UNFINISHED = ".orbax-checkpoint-tmp"
_PARTIAL = ".partial_save"  # what Orbax v1 adds to the name of a checkpoint that comes in several saves
# `12`, `step_12`, `checkpoint_12`: what CheckpointManager and flax.training.checkpoints call the folder of a
# step.
_STEP = re.compile(r"(.*_)?(\d+)")
_USUAL_ITEMS = ("default", "state", "train_state", "items", "pytree", "params")
# What tensorstore and json raise when a file is missing, cut short, empty, unreadable or not what it should
# be.
ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Location:
    """The folder with the arrays, and which step and item it is, if it is one."""

    root: FilePath
    step: int | None = None
    item: str | None = None


def locate(path: FilePath, step: int | None, item: str | None) -> Location:
    """The folder with the arrays, from a checkpoint, a step or a folder of steps."""
    path = path.expanduser()
    if not path.exists():
        raise CheckpointNotFoundError(
            "no checkpoint",
            path,
            expected="an Orbax checkpoint folder",
            found="nothing at this path",
            hint=_neighbours(path),
        )
    if not path.is_dir():
        raise CheckpointLayoutError(
            "not an Orbax checkpoint",
            path,
            expected="a folder",
            found=f"a file of {path.stat().st_size} bytes",
        )
    if _is_unfinished(path.name):
        raise _unfinished(path, path.name)
    steps = _steps(path)
    named_items = [name for name in _items(path) if not _STEP.fullmatch(name)]
    if step is None and steps and not named_items:
        step = max(steps)
    if step is None:
        return _locate_item(path.absolute(), None, item)
    if step not in steps:
        listed = ", ".join(map(str, sorted(steps))) or "no step folders"
        raise CheckpointNotFoundError(f"no step {step}", path, expected=f"a folder for step {step}", found=listed)
    return _locate_item(steps[step].absolute(), step, item)


def _locate_item(path: FilePath, step: int | None, item: str | None) -> Location:
    if _is_item(path) and item is None:
        return Location(path, step)
    items = _items(path)
    if item is not None:
        if item not in items:
            found = ", ".join(items) or ("a checkpoint without items" if _is_item(path) else "no items with arrays")
            raise CheckpointNotFoundError(f"no item {item!r}", path, expected=f"a folder {item!r}", found=found)
        return Location(items[item], step, item)
    if not items:
        raise _not_a_checkpoint(path)
    name = next((name for name in _USUAL_ITEMS if name in items), None) or (
        next(iter(items)) if len(items) == 1 else None
    )
    if name is None:
        raise CheckpointLayoutError(
            "the checkpoint has several items",
            path,
            expected="one item, or one called " + " or ".join(_USUAL_ITEMS),
            found=", ".join(items),
            hint="Choose one: item=... (--item NAME)",
        )
    return Location(items[name], step, name)


def _not_a_checkpoint(path: FilePath) -> Exception:
    names = sorted(child.name for child in path.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "an empty folder"
    if {"manifest.ocdbt", "_sharding", "array_metadatas", "ocdbt.process_0"} & set(names):
        return CheckpointCorruptError(
            "the checkpoint is damaged", path, expected="_METADATA, which lists the arrays", found=shown
        )
    if any(map(_is_unfinished, names)):
        return CheckpointCorruptError(
            "the checkpoint was never finished", path, expected="a finished save", found=shown
        )
    return CheckpointLayoutError(
        "not an Orbax checkpoint",
        path,
        found=shown,
        expected="_METADATA and arrays, items with them, or step folders",
    )


def _is_unfinished(name: str) -> bool:
    return UNFINISHED in name or name.endswith(_PARTIAL)


def _unfinished(path: FilePath, found: str) -> CheckpointCorruptError:
    return CheckpointCorruptError("the checkpoint was never finished", path, expected="a finished save", found=found)


def _is_item(path: FilePath) -> bool:
    return (path / "_METADATA").is_file()


def _items(path: FilePath) -> dict[str, FilePath]:
    folders = [child for child in sorted(path.iterdir()) if child.is_dir() and not _is_unfinished(child.name)]
    return {child.name: child for child in folders if _is_item(child)}


def _steps(path: FilePath) -> dict[int, FilePath]:
    """The step folders in `path`: those named by a number alone; if none, those with one common prefix."""
    if _is_item(path):
        return {}
    folders = [child for child in sorted(path.iterdir()) if child.is_dir() and not child.name.startswith("ocdbt.")]
    matches = [(match, child) for child in folders if (match := _STEP.fullmatch(child.name))]
    bare = {int(match[2]): child for match, child in matches if not match[1]}
    prefixed = {int(match[2]): child for match, child in matches if match[1]}
    one_prefix = len({match[1] for match, _ in matches if match[1]}) == 1
    return bare or (prefixed if one_prefix else {})


def _neighbours(path: FilePath) -> str:
    if not path.parent.is_dir():
        return ""
    close = near_misses(path.name, (child.name for child in path.parent.iterdir()))
    return f"Near it: {', '.join(close)}" if close else ""


@dataclass(frozen=True)
class Save:
    """Who wrote a checkpoint: `format` 'orbax' or 'orbax-v1', the `reason`, and the `metadata` the writer added."""

    format: str
    reason: str
    metadata: dict[str, Any]


def read_save(location: Location, tree_metadata: dict[str, Any]) -> Save:
    """How the item at `location` was saved: v0 keeps one `_CHECKPOINT_METADATA` in the item, others one above it.

    `tree_metadata` is the content of `_METADATA`. Of metadata with one name in both files, the item's own wins.
    """
    root = location.root
    above = [root.parent] if not (root / "_CHECKPOINT_METADATA").is_file() else []
    added: dict[str, Any] = {}
    handlers = ""
    for folder in [*above, root]:
        file = folder / "_CHECKPOINT_METADATA"
        if file.is_file():
            with reading(file, "who saved the checkpoint, as JSON"):
                table = json.loads(file.read_text())
                added.update(table.get("custom_metadata") or {})
                handlers += json.dumps(table.get("item_handlers"))
    with reading(root / "_METADATA", "custom_metadata with names"):
        added.update(tree_metadata.get("custom_metadata") or {})
    if (root.parent / "orbax.checkpoint").is_file():
        return Save("orbax-v1", "the file orbax.checkpoint, which Orbax v1 writes, is beside its items", added)
    if ".experimental.v1." in handlers:
        return Save("orbax-v1", "_CHECKPOINT_METADATA names handlers of Orbax v1", added)
    return Save("orbax", "_METADATA lists the arrays, as Orbax v0 writes them", added)


# --- opening files -------------------------------------------------------------------------------------------


def tensorstore(what: str) -> Any:
    """The library, for `what`. Raises MissingDependencyError."""
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        if error.name != "tensorstore":
            raise
        raise MissingDependencyError(what, "orbax-checkpoint", "orbax") from error
    return tensorstore


@contextmanager
def reading(place: FilePath, expected: str) -> Iterator[None]:
    """Whatever tensorstore or json raise in here becomes one CheckpointCorruptError that names `place`."""
    try:
        yield
    except ERRORS as error:
        raise CheckpointCorruptError(
            "the checkpoint is damaged", place, expected=expected, found=first_words(error)
        ) from error


def first_words(error: Exception) -> str:
    """tensorstore appends its whole specification to a message; the part before it says what happened."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)=?", str(error))[0]
    text = " ".join(text.split())
    text = text if len(text) <= 400 else text[:400] + " ..."
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
