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

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from bridge._errors import CheckpointExistsError, CheckpointWriteError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats.orbax.files import ERRORS, UNFINISHED, first_words, tensorstore
from bridge.checkpoint.formats.orbax.tables import (
    HANDLERS,
    Row,
    check_names,
    item_tables,
    line_of,
    row_of,
    row_of_line,
    save_tables,
)
from bridge.checkpoint.formats.sink import sync_folder
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.tree import Tree

_SUFFIX = f"{UNFINISHED}-linen-nnx"
# Bytes of chunks that are being compressed and written at once.
_IN_FLIGHT = 16 << 20
_DELETE = "Delete that folder, or write to another path."


class OrbaxSink:
    """A checkpoint that is written to `path`. A `files.Sink`.

    Args:
        path: the folder that the checkpoint will be; it must not exist. Folders above it are made.
        tree: the leaves, empty nodes and sequences that it will hold.
        version: 'v0', what `StandardCheckpointer` and `CheckpointManager` write, or 'v1', what
            `orbax.checkpoint.experimental.v1` does.
        item: the name of the item in the folder. By default 'state' for v1; for v0 'default' if the folder's name is a
            number, as the steps of a CheckpointManager are, and otherwise no item: the arrays are in the folder.
        resume: go on with what a killed run of the same `tree`, `version` and `item` left; if none left anything,
            begin.

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

    done: frozenset[Path]

    def __init__(
        self,
        path: str | FilePath,
        tree: Tree,
        *,
        version: str = "v0",
        item: str | None = None,
        resume: bool = False,
    ):
        self.path, self.tree, self.version = FilePath(path).expanduser().absolute(), tree, version
        if version not in HANDLERS:
            raise CheckpointWriteError("no such version of Orbax's layout", path, expected="v0 or v1", found=version)
        usual = "state" if version == "v1" else "default" if self.path.name.isdigit() else None
        self.item = item or usual
        check_names(self.path, tree)
        self._started = time.time_ns()
        self._folder = self.path.with_name(self.path.name + _SUFFIX)
        self._root = self._folder / "checkpoint" / (self.item or "")
        self._ts = tensorstore("Writing an Orbax checkpoint")
        pools = {"cache_pool": 0, "cache_pool#index": 16 << 20}
        self._context = self._ts.Context({name: {"total_bytes_limit": size} for name, size in pools.items()})
        self._journal: FileIO | None = None
        try:
            self._rows = self._begin(_digest(tree, version, self.item), resume)
        except BaseException:
            self._close()
            raise
        self.done = frozenset(self._rows)

    def __enter__(self) -> OrbaxSink:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def write(self, leaves: Mapping[Path, Any]) -> None:
        """Write some leaves of the tree, each once; they are on disk when this returns.

        Args:
            leaves: numpy or jax arrays, Python numbers, strings and typed random keys, by path.

        Raises:
            CheckpointWriteError: a leaf is not as the tree tells, or comes again; or the disk is full, ...
        """
        self._check_leaves(leaves)
        self._require_open()
        rows = {path: row_of(path, value) for path, value in leaves.items()}
        arrays = {path: _numbers(leaves[path]) for path, row in rows.items() if row.text is None}
        with self._writing(sum(array.nbytes for array in arrays.values())):
            stores = {path: self._create(rows[path], array) for path, array in arrays.items()}
            _write_all((stores[path].result(), rows[path].chunk, array) for path, array in arrays.items())
            self._note(map(line_of, rows.values()))
        self._rows |= rows

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Put the checkpoint in its place.

        Args:
            metadata: JSON types, stored as Orbax's custom metadata: `open_orbax(path).metadata`,
                `StandardCheckpointer().metadata(path).custom_metadata`.

        Raises:
            CheckpointWriteError: leaves are missing; or the disk is full, ...
            CheckpointExistsError: meanwhile something else is at `path`.
        """
        missing = [path for path in self.tree.leaves if path not in self._rows]
        if missing:
            raise self._refuse("leaves are missing", f"{len(self.tree.leaves)} leaves", _listed(missing, "without"))
        self._require_open()
        checkpoint = self._folder / "checkpoint"
        with self._writing(0):
            if checkpoint.exists():  # if not, an earlier run was killed after its last step, the rename
                for name, content in self._tables(dict(metadata)).items():
                    _write_file(checkpoint / name, content)
                for lock in checkpoint.rglob("*.__lock"):
                    lock.unlink()
                for folder in [checkpoint, *(child for child in checkpoint.rglob("*") if child.is_dir())]:
                    sync_folder(folder)
                if os.path.lexists(self.path):
                    raise _exists(self.path)
                checkpoint.rename(self.path)
                sync_folder(self.path.parent)
            self._close()
            shutil.rmtree(self._folder)

    # beginning, and going on

    def _begin(self, digest: str, resume: bool) -> dict[Path, Row]:
        """Make the folder, or take over what is there; returns the rows of the leaves that it holds."""
        journal = self._folder / "journal"
        finished = self.path.exists() and resume and journal.exists() and not (self._folder / "checkpoint").exists()
        if os.path.lexists(self.path) and not finished:
            raise _exists(self.path)
        with self._writing(0):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._journal = journal.open("a+b", buffering=0)
            self._lock(self._journal)
            self._journal.seek(0)
            header, *lines = self._journal.read().split(b"\n")[:-1] or [b""]  # what follows the last \n is torn
            if lines and not resume:
                raise self._refuse(
                    "an unfinished checkpoint is in the way",
                    "nothing of an earlier run",
                    f"{len(lines)} leaves in {self._folder}",
                    "Go on with it: resume=True (--resume). Or delete that folder.",
                )
            if lines:
                rows = self._read_rows(header, lines, digest)
                self._journal.truncate(sum(len(line) + 1 for line in (header, *lines)))
                return rows
            shutil.rmtree(self._folder / "checkpoint", ignore_errors=True)
            self._journal.truncate(0)
            self._root.mkdir(parents=True)
            self._note([json.dumps({"digest": digest})])
        return {}

    def _lock(self, journal: FileIO) -> None:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refuse("another process is writing the checkpoint", "one writer", "two") from None

    def _read_rows(self, header: bytes, lines: list[bytes], digest: str) -> dict[Path, Row]:
        try:
            found = json.loads(header)["digest"]
            rows = {row.path: row for row in (row_of_line(json.loads(line)) for line in lines)}
        except ERRORS as error:
            text = f"{first_words(error)} in {self._folder / 'journal'}"
            raise self._refuse("what was left unfinished is damaged", "a journal", text, _DELETE) from error
        if found != digest or not rows.keys() <= self.tree.leaves.keys():
            wanted = f"the same tree, version and item ({digest[:12]})"
            text = f"{str(found)[:12]} in {self._folder}"
            raise self._refuse("what was left unfinished is another conversion", wanted, text, _DELETE)
        return rows

    def _note(self, lines: Iterable[str]) -> None:
        journal, content = self._require_open(), "".join(line + "\n" for line in lines).encode()
        before = journal.seek(0, os.SEEK_END)
        try:
            if journal.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(journal.fileno())
        except OSError:
            journal.truncate(before)  # half a line, and what is written next, would be one damaged line
            raise

    def _require_open(self) -> FileIO:
        if self._journal is None:
            raise self._refuse("the sink is closed", "no call after the end of its `with`", "one")
        return self._journal

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # leaves

    def _check_leaves(self, leaves: Mapping[Path, Any]) -> None:
        for path, value in leaves.items():
            place = show_path(path)
            if path not in self.tree.leaves:
                raise self._refuse("a leaf does not belong to the checkpoint", "a leaf of the tree", place)
            if path in self._rows:
                raise self._refuse("a leaf is written twice", "each leaf once", place)
            leaf = self.tree.leaves[path]
            shape, dtype = layout.describe(value)
            if (shape, dtype) != (tuple(leaf.shape), leaf.dtype):
                raise self._refuse(
                    "a leaf is not what the tree tells",
                    f"{place}: {leaf.dtype}{list(leaf.shape)}",
                    f"{dtype}{list(shape)}",
                )

    def _create(self, row: Row, array: np.ndarray) -> Any:
        spec: dict[str, Any] = {
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self._root}/"},
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
                dtype=self._ts.dtype(array.dtype),
                shape=array.shape,
                chunk_layout=self._ts.ChunkLayout(chunk_shape=[max(size, 1) for size in row.chunk]),
                context=self._context,
            )
        except (ValueError, TypeError) as error:
            wanted = f"{show_path(row.path)}: a number type that it can hold"
            raise self._refuse("Orbax cannot store a leaf", wanted, f"{array.dtype}: {first_words(error)}") from error

    def _tables(self, metadata: dict[str, Any]) -> dict[str, str]:
        rows = [self._rows[path] for path in self.tree.leaves]
        beside = item_tables(self.tree, rows, self.version)
        inside = {f"{self.item}/{name}" if self.item else name: content for name, content in beside.items()}
        return inside | save_tables(self.path, self.version, self.item, metadata, self._started)

    # errors

    @contextmanager
    def _writing(self, nbytes: int) -> Iterator[None]:
        """Whatever tensorstore or the disk raise in here becomes one CheckpointWriteError that names the path."""
        try:
            yield
        except (CheckpointWriteError, CheckpointExistsError):
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refuse(
                "the checkpoint cannot be written",
                f"a disk with room for {nbytes} more bytes, and the right to write there",
                _cause(error),
                "Nothing is at the path. Free space or choose another one; "
                "with resume (--resume) the conversion goes on where it stopped.",
            ) from error

    def _refuse(self, problem: str, expected: str, found: str, hint: str = "") -> CheckpointWriteError:
        return CheckpointWriteError(problem, self.path, expected=expected, found=found, hint=hint)


def _digest(tree: Tree, version: str, item: str | None) -> str:
    leaves = [(leaf.path, leaf.shape, leaf.dtype) for leaf in tree.leaves.values()]
    content = [version, item, leaves, sorted(tree.empty.items()), sorted(tree.sequences)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _numbers(value: Any) -> np.ndarray:
    """The array to store, in this machine's byte order, without a copy where it can be."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
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
    grid = [range(0, size, max(step, 1)) for size, step in zip(shape, chunk, strict=True)]
    for corner in np.ndindex(*map(len, grid)):
        starts = [axis[n] for axis, n in zip(grid, corner, strict=True)]
        yield tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(starts, chunk, shape, strict=True)
        )


def _listed(paths: list[Path], word: str) -> str:
    return f"{word} " + ", ".join(map(show_path, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _exists(path: FilePath) -> CheckpointExistsError:
    return CheckpointExistsError(
        "something is in the way",
        path,
        expected="nothing at this path",
        found="a folder" if path.is_dir() else "a file",
        hint="Choose another path, or move it away: nothing is ever written over.",
    )


def _cause(error: Exception) -> str:
    """What the operating system said, which tensorstore puts last, before ` [name='...']`s; or the first words."""
    found = re.search(r": ([^:]*?) \[\w+='", str(error))
    return found[1] if found and "[os_error_code='" in str(error) else first_words(error)


def _write_file(path: FilePath, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
