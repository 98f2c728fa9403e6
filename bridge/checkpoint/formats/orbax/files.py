"""Where Orbax keeps what: the folder of a checkpoint, its steps and items, and what a broken file is reported as.

Law: what is found is finished, and chosen without reading an array; an error of tensorstore or json names the file.
Knows Orbax's names on disk; knows nothing of the arrays in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import (
    CheckpointAccessError,
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    MissingDependencyError,
)
from bridge._types import Path
from bridge.checkpoint.formats.door import no_permission
from bridge.checkpoint.formats.nearby import contents, neighbours, what_is_at
from bridge.checkpoint.formats.protocol import Items
from bridge.checkpoint.formats.stores import asking, has_no_answer, is_on_store, no_answer, place_of

UNFINISHED_SAVE = ".orbax-checkpoint-tmp"
#: The file that Orbax writes last. On a store, where nothing is renamed, it alone tells a finished save.
COMMIT_MARKER = "commit_success.txt"
_PARTIAL = ".partial_save"  # what Orbax v1 adds to the name of a checkpoint that comes in several saves
#: `12`, `step_12`, `checkpoint_12`: what CheckpointManager and flax.training.checkpoints call the folder of a step.
STEP_NAME = re.compile(r"(.*_)?(\d+)")
#: Items of these names are whole states.
WHOLE_ITEMS = ("default", "state", "train_state", "items", "pytree")
_NNX_PARTS = frozenset({"model", "optimizer", "opt_state", "step"})
_NOT_CONTENT = (COMMIT_MARKER, "_CHECKPOINT_METADATA")
# Folders beside or in place of items that Orbax keeps for itself.
_OWN_FOLDERS = ("ocdbt.process_", "array_metadatas", "checkpoint_metadata", "descriptor")
# What tensorstore and json raise when a file is missing, cut short, empty, unreadable or not what it should be.
ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, OverflowError)
# Questions to a store at a time.
_AT_ONCE = 16


@dataclass(frozen=True)
class Location:
    """The folder with the arrays, and which step and item it is, if it is one."""

    root: FilePath
    step: int | None = None
    item: str | None = None


@dataclass(frozen=True)
class StepFolder:
    """A checkpoint, or a step of a folder: its number there, and the numbers of all."""

    folder: FilePath
    step: int | None = None
    steps: tuple[int, ...] = ()


def locate(path: str | FilePath, step: int | None, item: str | None) -> Location:
    """The folder with the arrays, from a checkpoint, a step or a folder of steps; an error if there are several."""
    place = find_step(path, step)
    if _is_item(place.folder) and item is None:
        return Location(place.folder, place.step)
    chosen = choose(place.folder, item)
    if len(chosen) > 1:
        raise CheckpointLayoutError(
            "the checkpoint has several items, which are one state",
            path,
            expected="one item",
            found=", ".join(chosen),
            hint="`open_source` and `convert` join them. Or choose one: item=... (--item NAME)",
        )
    ((name, folder),) = chosen.items()
    return Location(folder, place.step, name)


def find_step(path: str | FilePath, step: int | None) -> StepFolder:
    """The step in a folder of steps, by default the latest; any other folder as it is."""
    path = place_of(path)
    with asking(path):
        return _find_step(path, step)


def _find_step(path: FilePath, step: int | None) -> StepFolder:
    if not path.exists():
        raise CheckpointNotFoundError(
            "no checkpoint",
            path,
            expected="an Orbax checkpoint folder",
            found="nothing at this path",
            hint=neighbours(path),
        )
    if not path.is_dir():
        raise CheckpointLayoutError(
            "not an Orbax checkpoint",
            path,
            expected="a folder",
            found="an object" if is_on_store(path) else what_is_at(path),
        )
    if _is_unfinished(path.name):
        raise _unfinished(path, path.name)
    steps = steps_in(path)
    if step is None and steps and not any(map(_is_item, _no_steps(path))):
        steps = _finished(path, steps)
        step = max(steps)
    if step is None:
        _require_finished(path)
        return StepFolder(path)
    if step in steps:
        _require_finished(steps[step])
    else:
        listed = ", ".join(map(str, sorted(steps))) or "no step folders"
        raise CheckpointNotFoundError(f"no step {step}", path, expected=f"a folder for step {step}", found=listed)
    return StepFolder(steps[step], step, tuple(sorted(steps)))


def finished_steps(path: FilePath) -> dict[int, FilePath]:
    """The steps in a folder of steps, without those that somebody is still writing; none if it is one checkpoint."""
    steps = steps_in(path)
    return _finished(path, steps) if steps else {}


# --- on a store ---------------------------------------------------------------------------------------------


def _finished(path: FilePath, steps: Mapping[int, FilePath]) -> Mapping[int, FilePath]:
    """Those of the steps that are whole. Where folders are renamed, all that have their name are."""
    if not is_on_store(path):
        return steps
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        is_whole = dict(zip(steps, pool.map(_is_committed, steps.values()), strict=True))
    whole = {step: folder for step, folder in steps.items() if is_whole[step]}
    if not whole:
        raise _uncommitted(path, f"steps without it: {', '.join(map(str, sorted(steps)))}")
    return whole


def _require_finished(folder: FilePath) -> None:
    """On a store, a checkpoint, a step or an item of one has the marker that is written last."""
    if is_on_store(folder) and not _is_committed(folder) and not (_is_item(folder) and _is_committed(folder.parent)):
        raise _uncommitted(folder, contents(folder))


def _is_committed(folder: FilePath) -> bool:
    return (folder / COMMIT_MARKER).exists()


def _uncommitted(path: FilePath, found: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        "the checkpoint was never finished",
        path,
        expected=f"{COMMIT_MARKER}, which is written last",
        found=found,
        hint="If you know it for a whole copy of a checkpoint, put an empty file of that name there.",
    )


# --- items --------------------------------------------------------------------------------------------------


def choose(folder: FilePath, wanted: Items | None) -> dict[str, FilePath]:
    """The items of a step that are its state: name in the tree -> folder. One alone is all of the tree.

    Without `wanted`: the only item with arrays, or the only one that is called as a whole state is, or all of them, if
    their names are those of the parts of one state.

    Raises:
        CheckpointNotFoundError: there is no such item.
        CheckpointLayoutError: there are several, and nothing tells which.
    """
    items = items_in(folder)
    if wanted is not None:
        return {name: _item(folder, items, stored) for name, stored in _by_name(wanted).items()}
    if not items:
        raise _not_a_checkpoint(folder)
    if len(items) == 1:
        return items
    whole = [name for name in WHOLE_ITEMS if name in items]
    if len(whole) == 1:
        return {whole[0]: items[whole[0]]}
    if not whole and _are_parts(items):
        return items
    raise CheckpointLayoutError(
        "the checkpoint has several items",
        folder,
        expected=f"one item; or one that is called {' or '.join(WHOLE_ITEMS)}; or the parts of one state, params and "
        "opt_state and so on",
        found=", ".join(items),
        hint="Choose one, or several that are one state: item=... (--item NAME)",
    )


def _by_name(wanted: Items) -> Mapping[str, str]:
    if isinstance(wanted, str):
        return {wanted: wanted}
    return wanted if isinstance(wanted, Mapping) else {name: name for name in wanted}


def _item(folder: FilePath, items: Mapping[str, FilePath], name: str) -> FilePath:
    if name not in items:
        without = "a checkpoint without items" if _is_item(folder) else "no items with arrays"
        names = ", ".join(items) or without
        raise CheckpointNotFoundError(f"no item {name!r}", folder, expected=f"a folder {name!r}", found=names)
    return items[name]


def _are_parts(names: Iterable[str]) -> bool:
    """Whether items are the parts of one training state, Linen's or NNX's, by their names.

    Whatever else is beside `params` (`ema_params`, `data_iter`) is a field of that state: nothing of it is lost.
    """
    names = set(names)
    return ("params" in names and "model" not in names) or ("model" in names and names <= _NNX_PARTS)


def read_json_item(folder: FilePath) -> Any:
    """The content of an item that was saved as JSON. Raises ValueError: it is none."""
    files = [file for file in sorted(folder.iterdir()) if file.name not in _NOT_CONTENT]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError("not one file")
    return json.loads(files[0].read_bytes())


def other_items(folder: FilePath) -> list[FilePath]:
    """The folders of items that do not hold a tree of arrays: JSON, iterators, random keys."""
    folders = [child for child in _folders(folder) if not _is_item(child)]
    return [child for child in folders if not _is_unfinished(child.name) and not child.name.startswith(_OWN_FOLDERS)]


def item_handlers(folder: FilePath) -> dict[str, str]:
    """Which class of Orbax saved each item of a step; empty where nothing says so."""
    file = folder / "_CHECKPOINT_METADATA"
    if not file.is_file():
        return {}
    with reading(file, "who saved the checkpoint, as JSON"):
        handlers = json.loads(file.read_text()).get("item_handlers")
        return {str(name): str(handler) for name, handler in handlers.items()} if isinstance(handlers, dict) else {}


def _not_a_checkpoint(path: FilePath) -> Exception:
    names = {child.name for child in path.iterdir()}
    if names & {"manifest.ocdbt", "_sharding", "array_metadatas", "ocdbt.process_0"}:
        return CheckpointCorruptError(
            "the checkpoint is damaged", path, expected="_METADATA, which lists the arrays", found=contents(path)
        )
    if any(map(_is_unfinished, names)):
        return _unfinished(path, contents(path))
    return CheckpointLayoutError(
        "not an Orbax checkpoint",
        path,
        found=contents(path),
        expected="_METADATA and arrays, items with them, or step folders",
    )


def _is_unfinished(name: str) -> bool:
    return UNFINISHED_SAVE in name or name.endswith(_PARTIAL)


def _unfinished(path: FilePath, found: str) -> CheckpointCorruptError:
    return CheckpointCorruptError("the checkpoint was never finished", path, expected="a finished save", found=found)


def _is_item(path: FilePath) -> bool:
    return (path / "_METADATA").is_file()


def _no_steps(path: FilePath) -> list[FilePath]:
    """The folders that are not called as steps are."""
    return [folder for folder in _folders(path) if not STEP_NAME.fullmatch(folder.name)]


def _folders(path: FilePath) -> list[FilePath]:
    return sorted(child for child in path.iterdir() if child.is_dir())


def items_in(path: FilePath) -> dict[str, FilePath]:
    """The items of a step that hold a tree of arrays."""
    items = {}
    for folder in _folders(path):
        if _is_item(folder) and not _is_unfinished(folder.name):
            items[folder.name] = folder
    return items


def steps_in(path: FilePath) -> dict[int, FilePath]:
    """The step folders in `path`: those named by a number alone; if none, those with one common prefix."""
    if _is_item(path):
        return {}
    bare: dict[int, FilePath] = {}
    prefixed: dict[int, FilePath] = {}
    prefixes = set()
    for folder in _folders(path):
        match = STEP_NAME.fullmatch(folder.name)
        if not match or folder.name.startswith("ocdbt."):
            continue
        prefix, number = match[1], int(match[2])
        if prefix:
            prefixes.add(prefix)
            prefixed[number] = folder
        else:
            bare[number] = folder
    if bare:
        return bare
    return prefixed if len(prefixes) == 1 else {}


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
    added: dict[str, Any] = {}
    handlers = ""
    file = root / "_CHECKPOINT_METADATA"
    if not file.is_file():
        file = root.parent / file.name
    if file.is_file():
        with reading(file, "who saved the checkpoint, as JSON"):
            table = json.loads(file.read_text())
            added.update(table.get("custom_metadata") or {})
            handlers = json.dumps(table.get("item_handlers"))
    with reading(root / "_METADATA", "custom_metadata with names"):
        added.update(tree_metadata.get("custom_metadata") or {})
    if (root.parent / "orbax.checkpoint").is_file():
        return Save("orbax-v1", "the file orbax.checkpoint, which Orbax v1 writes, is beside its items", added)
    if ".experimental.v1." in handlers:
        return Save("orbax-v1", "_CHECKPOINT_METADATA names handlers of Orbax v1", added)
    return Save("orbax", "_METADATA lists the arrays, as Orbax v0 writes them", added)


# --- names of arrays ----------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """Orbax's name of an array: the keys joined by dots."""
    return ".".join(path)


def first_clash(paths: Iterable[Path]) -> tuple[Path, Path] | None:
    """Two paths of one name: of `a.b` and `a`/`b` only one is on disk, and the other is lost."""
    taken: dict[str, Path] = {}
    for path in paths:
        first = taken.setdefault(name_of(path), path)
        if first != path:
            return first, path
    return None


def points_out(name: str) -> bool:
    """Whether an array of this name would be outside the folder of its checkpoint."""
    return name.startswith("/") or ".." in name.split("/")


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


def caches(library: Any, chunk_bytes: int, index_bytes: int) -> Any:
    """tensorstore's Context that keeps so much of chunks, and of the index of a database."""
    limits = {"cache_pool": chunk_bytes, "cache_pool#index": index_bytes}
    return library.Context({pool: {"total_bytes_limit": limit} for pool, limit in limits.items()})


@contextmanager
def reading(place: FilePath, expected: str) -> Iterator[None]:
    """Whatever tensorstore or json raise in here becomes one CheckpointCorruptError that names `place`."""
    try:
        with asking(place):
            yield
    except ERRORS as error:
        if isinstance(error, CheckpointAccessError):
            raise
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
            raise no_permission(place, "read") from error
        if is_on_store(place) and has_no_answer(error):
            raise no_answer(place, first_words(error)) from error
        raise CheckpointCorruptError(
            "the checkpoint is damaged", place, expected=expected, found=first_words(error)
        ) from error


def first_words(error: Exception) -> str:
    """tensorstore appends its whole specification to a message; the part before it says what happened."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)=?", str(error))[0]
    text = " ".join(text.split())
    if len(text) > 400:
        text = text[:400] + " ..."
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
