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
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointTooLargeError,
    near_misses,
    show_path,
)
from bridge._types import Path, Shape
from bridge.checkpoint.formats.orbax.files import (
    Location,
    caches,
    first_clash,
    locate,
    name_of,
    points_out,
    read_save,
    reading,
    tensorstore,
)
from bridge.checkpoint.formats.protocol import Around
from bridge.checkpoint.formats.stored import Identity, changed, require_walkable
from bridge.checkpoint.formats.stores import StoredIdentity, is_on_store, kvstore
from bridge.checkpoint.formats.stores import identities as stored_identities
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.ops import Region
from bridge.checkpoint.tree.train_state import LinenTrainState, require_linen, take_apart
from bridge.checkpoint.tree.tree import Tree

# Bytes of chunks that are kept while leaves are read in part.
_CACHE = 16 << 20
_INDEX = 10**8  # bytes kept of the index of a database
_OPENED_AT_ONCE = 1000
_EMPTY = {"Dict": dict, "List": list, "Tuple": tuple}


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


def open_orbax(path: str | FilePath, step: int | None = None, item: str | None = None) -> OrbaxSource:
    """The checkpoint at `path`, v0 or v1, opened to be read leaf by leaf (`protocol.Source`). No array is read.

    Args:
        path, step, item: as for `read_metadata`.

    Returns:
        The source: `tree`, `read(path, region)`, `format`, `reason`, `step`, `item`, and `metadata`: what the
        writer added to `_CHECKPOINT_METADATA` and `_METADATA` as custom metadata.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError, MissingDependencyError: as for
        `read_metadata`.

    >>> import tempfile, numpy as np
    >>> from bridge.checkpoint.formats.orbax.write import OrbaxSink
    >>> leaf = Leaf(("params", "w"), (2,), "float32", 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with OrbaxSink(folder + "/ck", Tree({leaf.path: leaf})) as sink:
    ...         sink.write({leaf.path: np.ones(2, "float32")})
    ...         sink.finish({"made": "here"})
    ...     with open_orbax(folder + "/ck") as source:
    ...         source.format, dict(source.metadata), source.read(("params", "w"), (slice(0, 1),))
    ('orbax', {'made': 'here'}, array([1.], dtype=float32))
    """
    return OrbaxSource(locate(path, step, item))


def read_metadata(path: str | FilePath, *, step: int | None = None, item: str | None = None) -> CheckpointInfo:
    """What the checkpoint at `path` holds. No array is read.

    Args:
        path: a checkpoint folder, a step folder, or a CheckpointManager's folder of steps.
        step: the step; the latest by default.
        item: the item of a composite checkpoint; by default the only one with arrays, or the one called
            `default`, `state`, `train_state`, `items` or `pytree`. `open_source` joins several.

    Raises:
        CheckpointNotFoundError: nothing there, or no such step or item.
        CheckpointCorruptError: a file is missing or damaged.
        CheckpointLayoutError: several items and none of the usual names.
        MissingDependencyError: orbax is not installed.
    """
    return open_orbax(path, step=step, item=item).info()


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
    stored = open_orbax(path, step=step, item=item)
    if target is None:
        return stored.read_all()
    from bridge.checkpoint.tree.opt_state import fill

    layout.require_match(target, stored.abstract(), source=f"the checkpoint {stored.path}", target="the target")
    return fill(target, stored.read_all())


def read_train_state(path: str | FilePath, *, step: int | None = None, item: str | None = None) -> LinenTrainState:
    """The Linen training state in the checkpoint at `path`; variables alone and params alone are read too.

    Raises:
        CheckpointLayoutError: the checkpoint holds no params, or an NNX state.
        CheckpointNotFoundError, CheckpointCorruptError, MissingDependencyError: as for `read_metadata`.
    """
    stored = open_orbax(path, step=step, item=item)
    require_linen(stored.tree.layout, stored.path)
    return take_apart(stored.read_all(), stored.tree.layout, stored.path)


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
        return name_of(self.path)


class OrbaxSource:
    """One item on disk: its rows, and tensorstore handles to its arrays, opened once. A `protocol.Source`."""

    around = Around()

    def __init__(self, location: Location):
        self.path, self.step, self.item = location.root, location.step, location.item
        self._files = _identities(self.path)  # before the first of them is read
        with reading(self.path / "_METADATA", "a table of the arrays, as JSON"):
            metadata = json.loads((self.path / "_METADATA").read_text())
            self._table = metadata
            self._entries = {entry.path: entry for entry in map(_entry, metadata["tree_metadata"].values())}
        require_walkable(self.path, self._entries)
        save = read_save(location, metadata)
        self.format, self.reason, self.metadata = save.format, save.reason, save.metadata
        self._check_names()
        self._strings = self._load_strings()
        self._key_impls = self._load_key_impls()
        self._arrays = self._open_arrays()
        self._parts = _PartCache()
        self.tree = self._make_tree()

    def __enter__(self) -> OrbaxSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and of cached chunks."""
        self._arrays = {}
        self._parts.clear()

    def read(self, path: Path, region: Region | None = None) -> Any:
        """The leaf at `path`, or a region of it: numpy array, number, string or typed keys, as it was saved.

        A region reads the chunks that it touches and no others; the chunks of the last leaves that were read in
        part stay in memory, so that taking the layers out of a stack one by one reads it once.

        Raises:
            CheckpointCorruptError: chunks are missing or damaged.
            CheckpointLayoutError: no leaf has that path.
            CheckpointTooLargeError: it is larger than this machine's memory.
        """
        entry = self._entries.get(path)
        if entry is None or entry.is_empty:
            close = near_misses(show_path(path), map(show_path, self.tree.leaves))
            raise CheckpointLayoutError(
                "the checkpoint has no such leaf",
                self.path,
                expected=show_path(path),
                found=", ".join(close) or "nothing like it",
            )
        if entry.typestr == "string":
            return self._value(entry, None)
        store = self._arrays[path]
        wanted = _region(store.shape, region)
        _require_memory(self.path, self.tree.leaves[path], _bytes_at_once(store, wanted))
        with reading(self.path, f"the array {show_path(path)}"):
            if wanted != _region(store.shape, None):
                store = self._parts.get(entry, _chunk_bytes(store), self._open)
            future = store[wanted].read()
        return self._value(entry, future)

    def piece(self, path: Path) -> int:
        """Bytes that reading any part of a leaf takes, beside the part: its chunks are stored whole."""
        return _chunk_bytes(self._arrays[path]) if path in self._arrays else 0

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if a file in the folder is another than when it was opened, or new, or gone."""
        now = _identities(self.path)
        for name in sorted(self._files.keys() | now.keys()):
            if self._files.get(name) != now.get(name):
                raise changed(self.path / name, self._files.get(name, "no such file"), now.get(name, "no such file"))

    def detected(self) -> Layout:
        """Linen's layout or NNX's."""
        return self.tree.layout

    def info(self) -> CheckpointInfo:
        """The same in the form of `read_metadata`."""
        return CheckpointInfo(
            root=self.path,
            layout=self.tree.layout.kind,
            reason=self.tree.layout.reason,
            boxed=self.tree.layout.boxed,
            step=self.step,
            item=self.item,
            leaves=tuple(sorted(self.tree.leaves.values(), key=lambda leaf: leaf.path)),
            empty=tuple(sorted(self.tree.empty)),
        )

    def abstract(self) -> Any:
        """The tree with what `layout.describe` needs in place of arrays."""
        return self._nest({path: self._stand_in(entry) for path, entry in self._entries.items()})

    def read_all(self) -> Any:
        """The tree of values. All reads are started before the first is waited for."""
        largest = max(self.tree.leaves.values(), key=lambda leaf: leaf.nbytes, default=None)
        if largest:
            _require_memory(self.path, largest, self.tree.nbytes)
        futures = {}
        for path, store in self._arrays.items():
            with reading(self.path, f"the array {show_path(path)}"):
                futures[path] = store.read()
        values = {path: self._value(entry, futures.get(path)) for path, entry in self._entries.items()}
        self.require_unchanged()
        return self._nest(values)

    # how a row becomes a leaf

    def _value(self, entry: _Entry, future: Any) -> Any:
        if entry.is_empty:
            return _EMPTY.get(entry.typestr, _none)()
        if entry.typestr == "string":
            return self._strings[entry.path]
        store = self._arrays[entry.path]
        expected = f"{show_path(entry.path)}: {store.dtype.name}{list(store.shape)}"
        with reading(self.path, expected):
            array = np.asarray(future.result())
            if entry.name in self._key_impls:
                import jax

                return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=self._key_impls[entry.name])
            return _as_number(array) if entry.typestr == "scalar" else array

    def _stand_in(self, entry: _Entry) -> Any:
        if entry.is_empty:
            return _EMPTY.get(entry.typestr, _none)()
        if entry.typestr == "string":
            return self._strings[entry.path]
        shape, dtype = self._shape_dtype(entry)
        if entry.typestr == "scalar":
            return _as_number(np.zeros(shape, self._arrays[entry.path].dtype.numpy_dtype))
        return _Abstract(shape, dtype)

    def _shape_dtype(self, entry: _Entry) -> tuple[Shape, str]:
        store = self._arrays[entry.path]
        if entry.name in self._key_impls:
            return _key_shape_dtype(tuple(store.shape), self._key_impls[entry.name])
        return tuple(store.shape), str(np.dtype(store.dtype.numpy_dtype))

    def _make_tree(self) -> Tree:
        leaves: dict[Path, Leaf] = {}
        empty: dict[Path, str] = {}
        sequences = set()
        for path, entry in self._entries.items():
            if entry.is_empty:
                empty[path] = entry.typestr if entry.typestr in _EMPTY else "None"
            else:
                leaves[path] = self._leaf(entry)
            for depth, is_list in enumerate(entry.sequences):
                if is_list:
                    sequences.add(path[:depth])
        return Tree(leaves, empty, frozenset(sequences))

    def _leaf(self, entry: _Entry) -> Leaf:
        if entry.typestr == "string":
            return Leaf(entry.path, (), "str", len(self._strings[entry.path].encode()))
        with reading(self.path, f"shape and number type of {show_path(entry.path)}"):
            shape, dtype = self._shape_dtype(entry)
        store = self._arrays[entry.path]
        return Leaf(entry.path, shape, dtype, _nbytes(store.shape, store))

    def _nest(self, leaves: dict[Path, Any]) -> Any:
        try:
            return layout.nest(leaves, self.tree.sequences)
        except layout.TreeStructureError as error:
            raise CheckpointCorruptError(
                "the checkpoint is damaged",
                self.path / "_METADATA",
                expected="paths that form one tree",
                found=str(error),
            ) from error

    # opening files

    def _check_names(self) -> None:
        """Each array has a name of its own, inside the folder."""
        stored = [path for path, entry in self._entries.items() if not entry.is_empty]
        if clash := first_clash(stored):
            first, second = map(show_path, clash)
            raise CheckpointCorruptError(
                "two leaves are stored as one",
                self.path,
                expected="one array for each leaf",
                found=f"{first} and {second} are both stored as {name_of(clash[0])!r}",
            )
        for name in map(name_of, stored):
            if points_out(name):
                raise CheckpointCorruptError(
                    "a leaf points out of the checkpoint",
                    self.path,
                    expected="names inside the folder",
                    found=repr(name),
                )

    def _load_strings(self) -> dict[Path, str]:
        entries = [entry for entry in self._entries.values() if entry.typestr == "string"]
        if not entries:
            return {}
        file = self.path / "_strings.json"
        texts = {}
        with reading(file, f"the text of {show_path(entries[0].path)}"):
            table = json.loads(file.read_text())
            for entry in entries:
                value = table
                for key in entry.name.split("/"):  # Orbax writes the name as a JSON pointer, which `/` splits
                    value = value[key]
                texts[entry.path] = str(value)
        return texts

    def _load_key_impls(self) -> dict[str, str]:
        """Name of the random bit generator of each typed key, by the name of its array."""
        impls = {}
        for file in sorted((self.path / "array_metadatas").glob("process_*")):
            with reading(file, "shapes and extra metadata of the arrays, as JSON"):
                for row in json.loads(file.read_text())["array_metadatas"]:
                    meta = row["array_metadata"]
                    impl = (meta.get("ext_metadata") or {}).get("random_key_impl")
                    if impl:
                        impls[str(meta["param_name"])] = str(impl)
        return impls

    def _open_arrays(self) -> dict[Path, Any]:
        arrays = [entry for entry in self._entries.values() if not entry.is_empty and entry.typestr != "string"]
        if self._in_database and arrays and not (self.path / "manifest.ocdbt").is_file():
            raise CheckpointCorruptError(
                "the checkpoint is damaged",
                self.path,
                expected="manifest.ocdbt, the index of the arrays",
                found="no such file",
            )
        # Chunks are not cached: a leaf is read once. The index of a database is, for every leaf looks into it.
        ts = tensorstore("Reading an Orbax checkpoint")
        context = caches(ts, chunk_bytes=0, index_bytes=_INDEX)
        stores = {}
        # The index is a tree by names: neighbours are in one node of it, and what is asked for at once stays in memory.
        by_name = sorted(arrays, key=lambda entry: entry.name)
        for first in range(0, len(by_name), _OPENED_AT_ONCE):
            opened = {}
            for entry in by_name[first : first + _OPENED_AT_ONCE]:
                with reading(self.path, f"the array {show_path(entry.path)}"):
                    opened[entry.path] = self._open(entry, context)
            for path, future in opened.items():
                with reading(self.path, f"the array {show_path(path)}"):
                    stores[path] = future.result()
        return stores

    def _open(self, entry: _Entry, context: Any) -> Any:
        ts = tensorstore("Reading an Orbax checkpoint")
        store = kvstore(self.path, entry.name)
        if self._in_database:
            base = kvstore(self.path)
            store = {"driver": "ocdbt", "base": base, "path": f"{entry.name}/", "cache_pool": "cache_pool#index"}
        # Files that are older than this flag leave chunks of zeros out; in all others an absent chunk is a
        # lost one.
        zeros_are_stored = bool(self._table.get("store_array_data_equal_to_fill_value"))
        spec = {
            "driver": "zarr3" if self._table.get("use_zarr3") else "zarr",
            "kvstore": store,
            "fill_missing_data_reads": not zeros_are_stored,
            "recheck_cached_data": "open",  # a finished checkpoint does not change
        }
        return ts.open(spec, open=True, read=True, context=context)

    @cached_property
    def _in_database(self) -> bool:
        return bool(self._table.get("use_ocdbt", (self.path / "manifest.ocdbt").exists()))


class _PartCache:
    """Handles that keep the chunks of leaves read in part: the largest such chunk, and _CACHE bytes more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self._limit, self._context, self._stores = 0, None, {}

    def get(self, entry: _Entry, chunk_bytes: int, opener: Callable[[_Entry, Any], Any]) -> Any:
        """The handle of `entry`. `opener` belongs to the source, which holds this: to keep it would be a cycle."""
        with self._lock:
            if self._context is None or chunk_bytes + _CACHE > self._limit:
                ts = tensorstore("Reading an Orbax checkpoint")
                self._limit, self._stores = chunk_bytes + _CACHE, {}
                self._context = caches(ts, self._limit, _CACHE)
            if entry.path not in self._stores:
                self._stores[entry.path] = opener(entry, self._context).result()
            return self._stores[entry.path]


def _identities(root: FilePath) -> Mapping[str, Identity | StoredIdentity]:
    """Every file of the checkpoint: a finished one is never written to again."""
    if is_on_store(root):
        return stored_identities(root)
    identities = {}
    for folder, _, files in os.walk(root):
        for name in files:
            file = FilePath(folder, name)
            identities[str(file.relative_to(root))] = Identity.of(file.stat())
    return identities


def _region(shape: Shape, region: Region | None) -> Region:
    """One slice an axis of the stored array: `region` may be shorter (random keys have an axis of their own)."""
    given = region or ()
    rest = (slice(None),) * (len(shape) - len(given))
    bounds = [part.indices(size) for part, size in zip((*given, *rest), shape, strict=True)]
    return tuple(slice(start, stop) for start, stop, _ in bounds)


def _nbytes(shape: Iterable[int], store: Any) -> int:
    return int(math.prod(shape)) * np.dtype(store.dtype.numpy_dtype).itemsize


def _chunk_bytes(store: Any) -> int:
    return _nbytes(store.chunk_layout.read_chunk.shape or (), store)


def _bytes_at_once(store: Any, region: Region) -> int:
    return max(_nbytes((part.stop - part.start for part in region), store), _chunk_bytes(store))


def _require_memory(root: FilePath, largest: Leaf, nbytes: int) -> None:
    """tensorstore ends the process when it cannot allocate: one wrong digit in a stored shape is enough."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > memory:
        raise CheckpointTooLargeError(
            "the checkpoint does not fit into memory",
            root,
            expected=f"at most {memory} bytes",
            found=f"{nbytes} bytes, most of them in {show_path(largest.path)}: {largest.shape}",
        )


@dataclass(frozen=True)
class _Abstract:
    shape: Shape
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


def _key_shape_dtype(shape: Shape, impl: str) -> tuple[Shape, str]:
    import jax

    keys = jax.eval_shape(lambda: jax.random.wrap_key_data(jax.numpy.zeros(shape, "uint32"), impl=impl))
    return tuple(keys.shape), str(keys.dtype)
