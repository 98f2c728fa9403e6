"""Writes Orbax checkpoints, v0 and v1, a batch of leaves at a time.

Law: until `finish` has renamed the folder, nothing is at the path; a batch whose `write` has returned survives a kill;
no more than the batch and `_IN_FLIGHT` bytes of it, compressed, are in memory.
Owns the optional dependency (extra `orbax`). Knows Orbax's files; knows nothing of models or optimizers.

Arrays are written with tensorstore, Orbax's own storage library, and the tables beside them as JSON, because Orbax
itself writes a tree in one call (all of it in memory), or in calls whose cost grows with each and that cannot replace
an array that a kill had torn (`experimental.v1.partial`). Tests restore every kind of leaf with Orbax and hold the
tables equal to those that it writes.

While it is written, the checkpoint is in `NAME.orbax-checkpoint-tmp-linen-nnx/`, a name that Orbax takes for an
unfinished save: `checkpoint/` and `journal`, with a line that tells which tree it is and one for each leaf on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import CheckpointWriteError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats.journal import Journal, Record, sync_folder, write_durably
from bridge.checkpoint.formats.orbax.files import UNFINISHED_SAVE, caches, first_words, tensorstore
from bridge.checkpoint.formats.orbax.tables import (
    HANDLERS,
    Row,
    check_names,
    chunk_of,
    item_tables,
    record_of,
    row_of,
    row_of_record,
    save_tables,
    take_json_items,
)
from bridge.checkpoint.formats.sink import ResumableSink
from bridge.checkpoint.formats.stored import host
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.regions import Region
from bridge.checkpoint.tree.tree import Tree

_SUFFIX = f"{UNFINISHED_SAVE}-linen-nnx"
# Bytes of chunks that are being compressed and written at once.
_IN_FLIGHT = 16 << 20


class OrbaxSink(ResumableSink):
    """A checkpoint that is written to `path`. A `protocol.Sink`.

    Args:
        path: the folder that the checkpoint will be; it must not exist. Folders above it are made.
        tree: the leaves, empty nodes and sequences that it will hold.
        version: 'v0', what `StandardCheckpointer` and `CheckpointManager` write, or 'v1', what
            `orbax.checkpoint.experimental.v1` does.
        item: the name of the item in the folder. By default 'state' for v1; for v0 'default' if the folder's name is a
            number, as the steps of a CheckpointManager are, and otherwise no item: the arrays are in the folder.
        resume: go on with what a killed run of the same `tree`, `version` and `item` left; if none left anything,
            begin.
        part: `(rank, count)` of this process among those that write the checkpoint together: each its leaves, into a
            database of its own. Process 0 opens its sink before the others, takes what they `told` and finishes.

    Attributes:
        done: leaves that an earlier run had written whole.

    Raises:
        CheckpointExistsError: something is at `path`.
        CheckpointWriteError: the tree has names that Orbax cannot store, the folder cannot be written, another process
            is writing it, or a killed run left leaves there and `resume` is False or it was another conversion.
        MissingDependencyError: orbax is not installed.

    >>> import tempfile, numpy as np
    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> from bridge.checkpoint.formats.orbax.read import read_tree
    >>> leaf = Leaf(("params", "w"), (2,), "float32", 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with OrbaxSink(folder + "/ck", Tree({leaf.path: leaf}, empty={("opt",): "None"})) as sink:
    ...         sink.write({leaf.path: np.ones(2, "float32")})
    ...         sink.finish({"made": "here"})
    ...     read_tree(folder + "/ck")
    {'params': {'w': array([1., 1.], dtype=float32)}, 'opt': None}
    """

    _same = "the same tree, version, item and number of processes"
    _leftovers = "that folder"
    # tensorstore says with these what the operating system refused
    _system_errors = (OSError, ValueError, RuntimeError)

    def __init__(
        self,
        path: str | FilePath,
        tree: Tree,
        *,
        version: str = "v0",
        item: str | None = None,
        resume: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        if version not in HANDLERS:
            raise CheckpointWriteError("no such version of Orbax's layout", path, expected="v0 or v1", found=version)
        self.version, self.item, (self._rank, self._count) = version, item, part
        self._started = time.time_ns()
        self._rows: dict[Path, Row] = {}
        self._ts = tensorstore("Writing an Orbax checkpoint")
        self._context = caches(self._ts, chunk_bytes=0, index_bytes=16 << 20)
        super().__init__(path, tree, resume=resume)

    @property
    def _folder(self) -> FilePath:
        return self.path.with_name(self.path.name + _SUFFIX)

    @property
    def _content(self) -> FilePath:
        return self._root / _process(self._rank) if self._rank else self._folder / "checkpoint"

    @property
    def _journal_path(self) -> FilePath:
        return self._folder / (f"journal.{self._rank}" if self._rank else "journal")

    @property
    def _root(self) -> FilePath:
        return self._folder / "checkpoint" / (self.item or "")

    @property
    def _database(self) -> FilePath:
        """What this process writes its arrays into."""
        return self._root / _process(self._rank) if self._count > 1 else self._root

    def _lay_out(self) -> None:
        check_names(self.path, self.tree)
        if self.item:
            return
        if self.version == "v1":
            self.item = "state"
        else:
            self.item = "default" if self.path.name.isdigit() else None

    # what the journal tells

    def _identity(self) -> dict[str, str]:
        leaves = [(leaf.path, leaf.shape, leaf.dtype) for leaf in self.tree.leaves.values()]
        content = [self.version, self.item, leaves, sorted(self.tree.empty.items()), sorted(self.tree.sequences)]
        content += [self._count] if self._count > 1 else []
        return {"digest": hashlib.sha256(json.dumps(content).encode()).hexdigest()}

    def _take(self, record: Record) -> Iterable[Path]:
        row = row_of_record(record)
        self._rows[row.path] = row
        return [row.path]

    def _left(self, records: list[Record]) -> str:
        return f"{len(records)} leaves in {self._folder}" if records else super()._left(records)

    def _is_finished(self, records: list[Record]) -> bool:
        return not self._content.exists()  # renamed

    # the folder

    def _open_journal(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        return super()._open_journal()

    def _open_content(self, anew: bool) -> None:
        if anew:
            shutil.rmtree(self._content, ignore_errors=True)
            self._root.mkdir(parents=True, exist_ok=True)
            self._database.mkdir(exist_ok=True)

    def _put(self, leaves: Mapping[Path, Any]) -> list[Record]:
        rows = {path: row_of(path, value) for path, value in leaves.items()}
        begun = []
        for path, row in rows.items():
            if row.text is None:
                array = _numbers(leaves[path])
                begun.append((self._create(row, array.dtype), row.chunk, array))
        _write_all((future.result(), chunk, array) for future, chunk, array in begun)
        return [record_of(row) for row in rows.values()]

    def chunk(self, path: Path) -> Shape | None:
        """The shape of the chunks of an array, between which blocks end."""
        leaf = self.tree.leaves[path]
        return chunk_of(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize)

    def _begin_blocks(self, leaf: Leaf, first: Any) -> _Blocks:
        row = row_of(leaf.path, first, tuple(leaf.shape))
        return _Blocks(row, self._create(row, _numbers(first).dtype).result())

    def told(self) -> list[Record]:
        """What process 0 must know of the leaves that this one has written."""
        return [record_of(row) for row in self._rows.values()]

    def take(self, records: Iterable[Record]) -> None:
        """What another process has `told`."""
        for record in records:
            self._written.update(self._take(record))

    def _join_databases(self) -> None:
        """One index over the arrays of all processes, as Orbax makes it; they stay where they are."""

        def opened(folder: FilePath) -> Any:
            base = {"driver": "file", "path": f"{folder}/"}
            spec = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#index"}
            return self._ts.KvStore.open(spec, context=self._context).result()

        whole, transaction = opened(self._root), self._ts.Transaction(atomic=True)
        for rank in range(self._count):
            part = self._root / _process(rank)
            if (part / "manifest.ocdbt").is_file():  # none for a process that had nothing to write
                opened(part).experimental_copy_range_to(whole.with_transaction(transaction)).result()
        transaction.commit_async().result()

    def _complete(self, metadata: Mapping[str, Any]) -> FilePath:
        if self._count > 1:
            self._join_databases()
        for name, text in self._tables(dict(metadata)).items():
            file = self._content / name
            file.parent.mkdir(exist_ok=True)
            write_durably(file, text)
        for lock in self._content.rglob("*.__lock"):
            lock.unlink()
        sync_folder(self._content)
        for child in self._content.rglob("*"):
            if child.is_dir():
                sync_folder(child)
        return self._content

    def _discard(self) -> None:
        if self._rank:
            shutil.rmtree(self._content, ignore_errors=True)
            self._journal_path.unlink(missing_ok=True)
        else:
            shutil.rmtree(self._folder)

    # leaves

    def _create(self, row: Row, dtype: np.dtype) -> Any:
        spec: dict[str, Any] = {
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self._database}/"},
                "path": f"{row.name}/",
                "cache_pool": "cache_pool#index",
            },
            "store_data_equal_to_fill_value": True,  # a chunk that is absent is then a lost one
        }
        if self.version == "v0":
            spec |= {"driver": "zarr", "metadata": {"compressor": {"id": "zstd", "level": 1}}}
        else:
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
            codecs += [{"name": "zstd", "configuration": {"level": 1}}]
            spec |= {"driver": "zarr3", "metadata": {"codecs": codecs}}
        try:
            return self._ts.open(
                spec,
                create=True,
                delete_existing=True,  # what a killed run had begun to write
                dtype=self._ts.dtype(dtype),
                shape=row.shape,
                chunk_layout=self._ts.ChunkLayout(chunk_shape=[max(size, 1) for size in row.chunk]),
                context=self._context,
            )
        except (ValueError, TypeError) as error:
            wanted = f"{show_path(row.path)}: a number type that it can hold"
            raise self._refused("Orbax cannot store a leaf", wanted, f"{dtype}: {first_words(error)}") from error

    def _tables(self, metadata: dict[str, Any]) -> dict[str, str]:
        """All files beside the arrays, by their place in the checkpoint."""
        rows = [self._rows[path] for path in self.tree.leaves]
        folder = f"{self.item}/" if self.item else ""
        json_items: dict[str, Any] = {}
        if self.item and self.version == "v0":  # as CheckpointManager has them; elsewhere they stay in the metadata
            json_items, metadata = take_json_items(metadata, besides=self.item)
        tables = save_tables(self.path, self.version, self.item, metadata, self._started, json_items)
        for name, text in item_tables(self.tree, rows, self.version).items():
            tables[folder + name] = text
        return tables

    def _reason(self, error: Exception) -> str:
        return getattr(error, "strerror", None) or _cause(error)


class _Blocks:
    """One array that is written block by block."""

    def __init__(self, row: Row, store: Any):
        self._row, self._store = row, store

    def put(self, region: Region, value: Any) -> None:
        """Write the next block; its chunks are on disk when this returns."""
        part = self._store[region].translate_to[(0,) * len(region)]
        _write_all([(part, self._row.chunk, _numbers(value))])

    def end(self) -> list[Record]:
        """What the journal must know."""
        return [record_of(self._row)]


def _process(rank: int) -> str:
    """What Orbax calls the database of a process."""
    return f"ocdbt.process_{rank}"


def _numbers(value: Any) -> np.ndarray:
    """The array to store, in this machine's byte order, without a copy where it can be."""
    array = host(value)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _write_all(stores: Iterable[tuple[Any, Shape, np.ndarray]]) -> None:
    """Write arrays chunk by chunk, with at most _IN_FLIGHT bytes, or one chunk, under way."""
    pending: deque[tuple[Any, int]] = deque()
    in_flight = 0
    for store, chunk, array in stores:
        for region in _chunks(array.shape, chunk or array.shape):
            part = array[region]
            future = store[region].write(part, can_reference_source_data_indefinitely=True).commit
            future.force()
            pending.append((future, part.nbytes))
            in_flight += part.nbytes
            while in_flight > _IN_FLIGHT:
                oldest, nbytes = pending.popleft()
                oldest.result()
                in_flight -= nbytes
    for future, _ in pending:
        future.result()


def _chunks(shape: Shape, chunk: Shape) -> Iterator[tuple[slice, ...]]:
    """The regions of an array that are a chunk each, in row-major order."""
    axes = []
    for size, step in zip(shape, chunk, strict=True):
        starts = range(0, size, max(step, 1))
        axes.append([slice(start, min(start + step, size)) for start in starts])
    return itertools.product(*axes)


def _cause(error: Exception) -> str:
    """What the operating system said, which tensorstore puts last, before ` [name='...']`s; or the first words."""
    text = str(error)
    last = re.search(r": ([^:]*?) \[\w+='", text)
    if last and "[os_error_code='" in text:
        return last[1]
    return first_words(error)
