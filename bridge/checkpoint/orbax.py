"""Reads Orbax checkpoints, from the files on disk to a tree of arrays.

Law: what is read has exactly the paths, shapes and dtypes that `read_metadata` tells, without reading an
array; every leaf is a value, never a placeholder; a file that is missing or cut short is an error, never
zeros.
Owns the optional dependency (extra `orbax`). Knows Orbax's files; knows nothing of models or optimizers.

Arrays are opened with tensorstore, Orbax's own storage library, leaf by leaf, and not through Orbax's
`restore`, because that casts dtypes, turns a stored float32 scalar into a float64, leaves absent leaves as
ShapeDtypeStruct, needs the devices the checkpoint was saved on, and when a file is damaged prints one
traceback for each leaf from its event loop. Orbax must go on reading its old files, so the files are steadier
than its Python interface. Tests hold the two equal.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    CheckpointTooLargeError,
    MissingDependencyError,
    near_misses,
    show_path,
)
from bridge.checkpoint import layout
from bridge.checkpoint.layout import Kind, Layout, Leaf, Path
from bridge.checkpoint.train_state import LinenTrainState, require_linen, take_apart

# `12`, `step_12`, `checkpoint_12`: what CheckpointManager and flax.training.checkpoints call the folder of a
# step.
_STEP = re.compile(r"(.*_)?(\d+)")
_UNFINISHED = ".orbax-checkpoint-tmp"
_USUAL_ITEMS = ("default", "state", "train_state", "items", "pytree", "params")
_EMPTY = {"Dict": dict, "List": list, "Tuple": tuple}
# What tensorstore and json raise when a file is missing, cut short, empty, unreadable or not what it should
# be.
_READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, from its metadata.

    Attributes:
        root: the folder with the arrays: of the item, inside the step, inside what was asked for.
        layout: which layout it is, and `reason` why, in words.
        leaves: every array, number and string, sorted by path.
        empty: paths of entries without content: EmptyState, masked params, empty dicts.
        step: the step of the folder it is in, if it is in one.
        item: the name of the item in that step, if it has one.
        boxed: paths (without `value`) that look like Linen's boxes.
    """

    root: FilePath
    layout: Kind
    reason: str
    leaves: tuple[Leaf, ...]
    empty: tuple[Path, ...] = ()
    step: int | None = None
    item: str | None = None
    boxed: frozenset[Path] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in memory."""
        return sum(leaf.nbytes for leaf in self.leaves)


# --- public -------------------------------------------------------------------------------------------------


def read_metadata(path: str | FilePath, *, step: int | None = None, item: str | None = None) -> CheckpointInfo:
    """What the checkpoint at `path` holds. No array is read.

    Args:
        path: a checkpoint folder, a step folder, or a CheckpointManager's folder of steps.
        step: the step; the latest by default.
        item: the item of a composite checkpoint; by default the only one with arrays, or the one called
            `default`, `state`, `train_state`, `items`, `pytree` or `params`.

    Raises:
        CheckpointNotFoundError: nothing there, or no such step or item.
        CheckpointCorruptError: a file is missing or damaged.
        CheckpointLayoutError: several items and none of the usual names.
        MissingDependencyError: orbax is not installed.
    """
    return _Stored.open(FilePath(path), step, item).info()


def read_tree(path: str | FilePath, target: Any = None, *, step: int | None = None, item: str | None = None) -> Any:
    """The arrays of the checkpoint at `path`.

    Args:
        path, step, item: as for `read_metadata`.
        target: a tree of arrays or `jax.ShapeDtypeStruct`s. If given, it says what must be there: paths,
            shapes and dtypes are compared before the first array is read.

    Returns:
        Without `target`: nested dicts and lists of `numpy.ndarray`s, exactly as stored; Python numbers and
        strings as they were saved; typed random keys as such; None for EmptyState and masked params. With
        `target`: its own containers, with jax.Arrays on its shardings.

    Raises:
        VariablesMismatchError: lists every path where checkpoint and `target` differ.
        CheckpointTooLargeError: the arrays are larger than this machine's memory.
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError, MissingDependencyError: as
        above.
    """
    stored = _Stored.open(FilePath(path), step, item)
    if target is None:
        return stored.read()
    from bridge.checkpoint.opt_state import fill

    layout.require_match(target, stored.abstract(), source=f"the checkpoint {stored.root}", target="the target")
    return fill(target, stored.read())


def read_train_state(path: str | FilePath, *, step: int | None = None, item: str | None = None) -> LinenTrainState:
    """The Linen training state in the checkpoint at `path`; variables alone and params alone are read too.

    Raises:
        CheckpointLayoutError: the checkpoint holds no params, or an NNX state.
        CheckpointNotFoundError, CheckpointCorruptError, MissingDependencyError: as for `read_metadata`.
    """
    stored = _Stored.open(FilePath(path), step, item)
    require_linen(stored.detected(), stored.root)
    return take_apart(stored.read(), stored.detected(), stored.root)


# --- finding the folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Location:
    root: FilePath
    step: int | None = None
    item: str | None = None


def _locate(path: FilePath, step: int | None, item: str | None) -> _Location:
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


def _locate_item(path: FilePath, step: int | None, item: str | None) -> _Location:
    if _is_item(path) and item is None:
        return _Location(path, step)
    items = _items(path)
    if item is not None:
        if item not in items:
            found = ", ".join(items) or ("a checkpoint without items" if _is_item(path) else "no items with arrays")
            raise CheckpointNotFoundError(f"no item {item!r}", path, expected=f"a folder {item!r}", found=found)
        return _Location(items[item], step, item)
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
    return _Location(items[name], step, name)


def _not_a_checkpoint(path: FilePath) -> Exception:
    names = sorted(child.name for child in path.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "an empty folder"
    if {"manifest.ocdbt", "_sharding", "array_metadatas", "ocdbt.process_0"} & set(names):
        return CheckpointCorruptError(
            "the checkpoint is damaged", path, expected="_METADATA, which lists the arrays", found=shown
        )
    if any(_UNFINISHED in name for name in names):
        return CheckpointCorruptError(
            "the checkpoint was never finished", path, expected="a finished save", found=shown
        )
    return CheckpointLayoutError(
        "not an Orbax checkpoint",
        path,
        found=shown,
        expected="_METADATA and arrays, items with them, or step folders",
    )


def _is_item(path: FilePath) -> bool:
    return (path / "_METADATA").is_file()


def _items(path: FilePath) -> dict[str, FilePath]:
    return {child.name: child for child in sorted(path.iterdir()) if child.is_dir() and _is_item(child)}


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


# --- what is stored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One row of `_METADATA`. `typestr` is Orbax's name of the type; `is_empty` entries have no array."""

    path: Path
    sequences: tuple[bool, ...]
    typestr: str
    is_empty: bool

    @property
    def name(self) -> str:
        """Orbax's name of the array: the keys joined by dots."""
        return ".".join(self.path)


class _Stored:
    """One item on disk: its rows, and tensorstore handles to its arrays, opened once."""

    def __init__(self, location: _Location, metadata: dict[str, Any]):
        self.root, self.step, self.item = location.root, location.step, location.item
        self.metadata = metadata
        with _reading(self.root / "_METADATA", "a table of the arrays, as JSON"):
            self.entries = [_entry(row) for row in metadata["tree_metadata"].values()]
        self._check_names()
        self.strings = self._load_strings()
        self.key_impls = self._load_key_impls()
        self.arrays = self._open_arrays()

    @classmethod
    def open(cls, path: FilePath, step: int | None, item: str | None) -> _Stored:
        location = _locate(path, step, item)
        file = location.root / "_METADATA"
        with _reading(file, "a table of the arrays, as JSON"):
            metadata = json.loads(file.read_text())
        return cls(location, metadata)

    def detected(self) -> Layout:
        return layout.detect([entry.path for entry in self.entries])

    def info(self) -> CheckpointInfo:
        found = self.detected()
        leaves = [self._leaf(entry, found.kind) for entry in self.entries if not entry.is_empty]
        empty = [entry.path for entry in self.entries if entry.is_empty]
        return CheckpointInfo(
            root=self.root,
            layout=found.kind,
            reason=found.reason,
            boxed=found.boxed,
            step=self.step,
            item=self.item,
            leaves=tuple(sorted(leaves, key=lambda leaf: leaf.path)),
            empty=tuple(sorted(empty)),
        )

    def abstract(self) -> Any:
        """The tree with what `layout.describe` needs in place of arrays."""
        return self._nest(
            {e.path: _EMPTY.get(e.typestr, _none)() if e.is_empty else self._stand_in(e) for e in self.entries}
        )

    def read(self) -> Any:
        """The tree of values. All reads are started before the first is waited for."""
        self._require_memory()
        futures = {}
        for entry in self.entries:
            if entry.path in self.arrays:
                with _reading(self.root, f"the array {show_path(entry.path)}"):
                    futures[entry.path] = self.arrays[entry.path].read()
        return self._nest({entry.path: self._value(entry, futures.get(entry.path)) for entry in self.entries})

    def _require_memory(self) -> None:
        """tensorstore ends the process when it cannot allocate: one wrong digit in a stored shape is enough."""
        info, memory = self.info(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if info.nbytes > memory:
            largest = max(info.leaves, key=lambda leaf: leaf.nbytes)
            raise CheckpointTooLargeError(
                "the checkpoint does not fit into memory",
                self.root,
                expected=f"at most {memory} bytes",
                found=f"{info.nbytes} bytes, most of them in {show_path(largest.path)}: {largest.shape}",
            )

    # how a row becomes a leaf

    def _value(self, entry: _Entry, future: Any) -> Any:
        if entry.is_empty:
            return _EMPTY.get(entry.typestr, _none)()
        if entry.typestr == "string":
            return self.strings[entry.path]
        store = self.arrays[entry.path]
        expected = f"{show_path(entry.path)}: {store.dtype.name}{list(store.shape)}"
        with _reading(self.root, expected):
            array = np.asarray(future.result())
        if entry.name in self.key_impls:
            import jax

            return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=self.key_impls[entry.name])
        return _as_number(array) if entry.typestr == "scalar" else array

    def _stand_in(self, entry: _Entry) -> Any:
        if entry.typestr == "string":
            return self.strings[entry.path]
        shape, dtype = self._shape_dtype(entry)
        if entry.typestr == "scalar":
            return _as_number(np.zeros(shape, self.arrays[entry.path].dtype.numpy_dtype))
        return _Abstract(shape, dtype)

    def _shape_dtype(self, entry: _Entry) -> tuple[layout.Shape, str]:
        store = self.arrays[entry.path]
        if entry.name in self.key_impls:
            return _key_shape_dtype(tuple(store.shape), self.key_impls[entry.name])
        return tuple(store.shape), str(np.dtype(store.dtype.numpy_dtype))

    def _leaf(self, entry: _Entry, kind: Kind) -> Leaf:
        collection = layout.collection_of(entry.path, kind)
        if entry.typestr == "string":
            return Leaf(entry.path, (), "str", len(self.strings[entry.path].encode()), collection)
        shape, dtype = self._shape_dtype(entry)
        store = self.arrays[entry.path]
        size = int(np.prod(store.shape, dtype=object)) * np.dtype(store.dtype.numpy_dtype).itemsize
        return Leaf(entry.path, shape, dtype, size, collection)

    def _nest(self, leaves: dict[Path, Any]) -> Any:
        lists = {e.path[:n] for e in self.entries for n, is_list in enumerate(e.sequences) if is_list}
        try:
            return layout.nest(leaves, lists)
        except layout.TreeStructureError as error:
            raise CheckpointCorruptError(
                "the checkpoint is damaged",
                self.root / "_METADATA",
                expected="paths that form one tree",
                found=str(error),
            ) from error

    # opening files

    def _check_names(self) -> None:
        """Orbax joins keys with dots: of `a.b` and `a`/`b` only one is on disk, the other is lost."""
        taken: dict[str, Path] = {}
        for entry in self.entries:
            if entry.is_empty:
                continue
            other = taken.setdefault(entry.name, entry.path)
            if other != entry.path:
                raise CheckpointCorruptError(
                    "two leaves are stored as one",
                    self.root,
                    expected="one array for each leaf",
                    found=f"{show_path(other)} and {show_path(entry.path)} are both stored as {entry.name!r}",
                )
            if ".." in entry.name.split("/") or entry.name.startswith("/"):
                raise CheckpointCorruptError(
                    "a leaf points out of the checkpoint",
                    self.root,
                    expected="names inside the folder",
                    found=repr(entry.name),
                )

    def _load_strings(self) -> dict[Path, str]:
        wanted = [entry for entry in self.entries if entry.typestr == "string"]
        if not wanted:
            return {}
        file = self.root / "_strings.json"
        found = {}
        with _reading(file, f"the text of {show_path(wanted[0].path)}"):
            table = json.loads(file.read_text())
            for entry in wanted:
                value = table
                for key in entry.name.split("/"):  # Orbax writes the name as a JSON pointer, which `/` splits
                    value = value[key]
                found[entry.path] = str(value)
        return found

    def _load_key_impls(self) -> dict[str, str]:
        """Name of the random bit generator of each typed key, by the name of its array."""
        impls = {}
        for file in sorted((self.root / "array_metadatas").glob("process_*")):
            with _reading(file, "shapes and extra metadata of the arrays, as JSON"):
                for row in json.loads(file.read_text())["array_metadatas"]:
                    meta = row["array_metadata"]
                    impl = (meta.get("ext_metadata") or {}).get("random_key_impl")
                    if impl:
                        impls[str(meta["param_name"])] = str(impl)
        return impls

    def _open_arrays(self) -> dict[Path, Any]:
        ts = _tensorstore()
        manifest = self.root / "manifest.ocdbt"
        in_database = self.metadata.get("use_ocdbt", manifest.exists())
        arrays = [entry for entry in self.entries if not entry.is_empty and entry.typestr != "string"]
        if in_database and arrays and not manifest.is_file():
            raise CheckpointCorruptError(
                "the checkpoint is damaged",
                self.root,
                expected="manifest.ocdbt, the index of the arrays",
                found="no such file",
            )
        context = ts.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
        opened = {}
        for entry in arrays:
            with _reading(self.root, f"the array {show_path(entry.path)}"):
                opened[entry.path] = ts.open(self._spec(entry, in_database), open=True, read=True, context=context)
        stores = {}
        for path, future in opened.items():
            with _reading(self.root, f"the array {show_path(path)}"):
                stores[path] = future.result()
        return stores

    def _spec(self, entry: _Entry, in_database: bool) -> dict[str, Any]:
        base = {"driver": "file", "path": f"{self.root}/"}
        store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{entry.name}/"}
        if not in_database:
            store = {"driver": "file", "path": f"{self.root}/{entry.name}/"}
        # Files that are older than this flag leave chunks of zeros out; in all others an absent chunk is a
        # lost one.
        zeros_are_stored = bool(self.metadata.get("store_array_data_equal_to_fill_value"))
        return {
            "driver": "zarr3" if self.metadata.get("use_zarr3") else "zarr",
            "kvstore": store,
            "fill_missing_data_reads": not zeros_are_stored,
        }


@dataclass(frozen=True)
class _Abstract:
    shape: layout.Shape
    dtype: str


def _none() -> None:
    return None


def _entry(row: dict[str, Any]) -> _Entry:
    keys, value = row["key_metadata"], row["value_metadata"]
    return _Entry(
        path=tuple(str(key["key"]) for key in keys),
        sequences=tuple(key["key_type"] == 1 for key in keys),
        typestr=str(value["value_type"]),
        is_empty=bool(value["skip_deserialize"]),
    )


def _as_number(array: np.ndarray) -> Any:
    """A stored scalar as it was saved: these are the dtypes of Python's int, float and bool."""
    return array.item() if array.dtype in (np.int64, np.float64, np.bool_) else array[()]


def _key_shape_dtype(shape: layout.Shape, impl: str) -> tuple[layout.Shape, str]:
    import jax

    keys = jax.eval_shape(lambda: jax.random.wrap_key_data(jax.numpy.zeros(shape, "uint32"), impl=impl))
    return tuple(keys.shape), str(keys.dtype)


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        if error.name != "tensorstore":
            raise
        raise MissingDependencyError("Reading an Orbax checkpoint", "orbax-checkpoint", "orbax") from error
    return tensorstore


@contextmanager
def _reading(place: FilePath, expected: str) -> Iterator[None]:
    """Whatever tensorstore or json raise in here becomes one CheckpointCorruptError that names `place`."""
    try:
        yield
    except _READ_ERRORS as error:
        raise CheckpointCorruptError(
            "the checkpoint is damaged", place, expected=expected, found=_first_words(error)
        ) from error


def _first_words(error: Exception) -> str:
    """tensorstore appends its whole specification to a message; the part before it says what happened."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)=?", str(error))[0]
    text = " ".join(text.split())
    text = text if len(text) <= 400 else text[:400] + " ..."
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
