"""A checkpoint in one file, while it is written: `NAME.unfinished` with the bytes, a journal of what is whole in it.

Law: the file gets its name in one step, when all of it is on disk; a batch is in the journal after its bytes are on
disk, so that whatever a killed run leaves can be continued, by the same tree only.
Knows files, offsets and trees; knows nothing of what a format writes where.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Self

import numpy as np

from bridge._errors import CheckpointExistsError, CheckpointWriteError, show_path
from bridge._types import Path
from bridge.checkpoint.formats.protocol import UNFINISHED
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.tree import Tree

_PIECE_BYTES = 1 << 25  # what is copied at once of an array that is not contiguous


class FileSink:
    """What the sinks of one-file formats share. A format says what goes where: `_begin`, `_put`, `_finish`."""

    format: str

    def __init__(self, path: str | FilePath, tree: Tree, *, resume: bool = False):
        self.path, self.tree = FilePath(path).expanduser().absolute(), tree
        for leaf in tree.leaves.values():
            self._require_storable(leaf)
        self._unfinished = Unfinished(self.path, _identity(self.format, tree), resume)
        try:
            with self._unfinished.writing():
                finished, records = self._unfinished.finished, self._unfinished.records
                self.done = frozenset(self.tree.leaves if finished else self._begin(records))
        except BaseException:
            self._unfinished.close()
            if not self._unfinished.records:
                self._unfinished.discard()
            raise
        self._written = set(self.done)

    def write(self, leaves: Mapping[Path, Any]) -> None:
        """Write some leaves, each once; they are on disk when this returns.

        Raises:
          CheckpointWriteError: disk full, or a leaf that is not the tree's, has another shape or dtype, comes twice.
        """
        for path, value in leaves.items():
            self._require_expected(path, value)
        with self._unfinished.writing():
            record = self._put(leaves)
            self._unfinished.record(record)
        self._recorded(record)
        self._written |= leaves.keys()

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Give the file its name, with `metadata` (JSON types).

        Raises:
          CheckpointWriteError: leaves are missing, or the disk is full.
        """
        missing = [path for path in self.tree.leaves if path not in self._written]
        if missing:
            listed = ", ".join(map(show_path, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise self._refused(f"all {len(self.tree.leaves)} leaves written", f"{len(missing)} missing: {listed}")
        with self._unfinished.writing():
            if self._unfinished.finished:
                self._unfinished.discard()
            else:
                self._finish(metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unfinished.close()

    # what a format says

    def _require_storable(self, leaf: Leaf) -> None:
        if leaf.dtype.startswith("key<"):
            raise CheckpointWriteError(
                f"{self.format} files cannot hold random keys",
                self.path,
                expected="arrays, numbers and strings",
                found=f"{show_path(leaf.path)}: {leaf.dtype}{list(leaf.shape)}",
                hint="Leave keys out (--rng drop), or write an Orbax checkpoint.",
            )

    def _begin(self, records: list[dict[str, Any]]) -> list[Path]:
        """Prepare the file; the leaves that `records` of an earlier run say are written."""
        raise NotImplementedError

    def _put(self, leaves: Mapping[Path, Any]) -> dict[str, Any]:
        """Write the leaves; what the journal must know of it."""
        raise NotImplementedError

    def _recorded(self, record: Mapping[str, Any]) -> None:
        """What `_put` gave is in the journal."""
        raise NotImplementedError

    def _finish(self, metadata: Mapping[str, Any]) -> None:
        """Write what is left and give the file its name."""
        raise NotImplementedError

    # checks

    def _require_expected(self, path: Path, value: Any) -> None:
        leaf = self.tree.leaves.get(path)
        if leaf is None:
            raise self._refused("leaves of the tree it was opened with", f"{show_path(path)}, which is not one")
        if path in self._written:
            raise self._refused("each leaf once", f"{show_path(path)} a second time")
        shape, dtype = layout.describe(value)
        if (shape, dtype) != (leaf.shape, leaf.dtype):
            raise self._refused(
                f"{show_path(path)}: {leaf.dtype}{list(leaf.shape)}, as its tree says", f"{dtype}{list(shape)}"
            )

    def _refused(self, expected: str, found: str) -> CheckpointWriteError:
        return CheckpointWriteError("the checkpoint cannot be written", self.path, expected=expected, found=found)


class Unfinished:
    """`NAME.unfinished` and `NAME.unfinished.json`, one line of JSON for the tree and one for each batch."""

    def __init__(self, target: FilePath, identity: dict[str, str], resume: bool):
        self.target = target
        self.path = target.with_name(target.name + UNFINISHED)
        self._journal_path = target.with_name(self.path.name + ".json")
        self._identity = identity
        self.records: list[dict[str, Any]] = []
        #: an earlier run came to its end, and was killed before it could clean up
        self.finished = False
        exists = os.path.lexists(target)
        if exists and not (resume and self._journal_path.exists()):
            raise self._target_exists()
        try:
            with self.writing():
                self._open_journal()
                begun = (self.path.exists() or exists) and self._take_over(resume)
                if exists and not self.finished:
                    raise self._target_exists()
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if begun else os.O_TRUNC), 0o666)
                if not begun:
                    self._journal.truncate(0)
                    self.record(identity)
        except BaseException:
            self.close()
            raise

    def _open_journal(self) -> None:
        self._journal = open(self._journal_path, "a+b")  # noqa: SIM115  close() is a method
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointWriteError(
                "the checkpoint is being written",
                self.path,
                expected="no other writer",
                found="another process or sink that has it open",
                hint="Wait for it, or end it.",
            ) from error

    def _take_over(self, resume: bool) -> bool:
        """Whether there is something to go on with. Then `records` says what."""
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave half a line
        try:
            identity, *records = [json.loads(line) for line in whole.splitlines()]
            self.finished = bool(records) and records[-1] == {"finished": _size(self.target)}
            self.records = [record for record in records if "finished" not in record]
        except (ValueError, TypeError):
            identity = None
        if identity is not None and not self.records:
            return False
        if not resume:
            raise CheckpointWriteError(
                "an unfinished checkpoint is in the way",
                self.path,
                expected="nothing at this path",
                found=f"{_size(self.path)} bytes of an earlier run",
                hint="Go on with it: resume=True (--resume). "
                f"Or delete {self.path.name} and {self._journal_path.name}.",
            )
        if identity != self._identity:
            raise CheckpointWriteError(
                "the unfinished checkpoint is of another conversion",
                self.path,
                expected="the same format, paths, shapes and dtypes",
                found="others" if identity else "a damaged journal",
                hint=f"Delete {self.path.name} and {self._journal_path.name}, or write to another path.",
            )
        self._journal.truncate(len(whole))
        return True

    def _target_exists(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            "the target exists",
            self.target,
            expected="nothing at this path",
            found="a folder" if self.target.is_dir() else f"a file of {_size(self.target)} bytes",
            hint="Choose another path, or delete what is there.",
        )

    def put(self, offset: int, data: Any) -> int:
        """Write all of `data` (bytes-like) at `offset`; where it ends."""
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file, rest, offset)
            offset, rest = offset + count, rest[count:]
        return offset

    def put_array(self, offset: int, array: np.ndarray) -> int:
        """Write an array in row-major, little-endian order; where it ends."""
        for piece in pieces(array):
            offset = self.put(offset, piece)
        return offset

    def resize(self, size: int) -> None:
        """Cut or lengthen the file."""
        os.ftruncate(self._file, size)

    def record(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the journal, after all bytes written so far are on disk."""
        os.fsync(self._file)
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file)
        self._rename(self.path)

    def publish_with_head(self, head: bytes, old_size: int) -> None:
        """Give its name to a copy with `head` in place of the first `old_size` bytes."""
        path = self.path.with_name(self.path.name + ".new")
        with open(path, "wb") as new, open(self.path, "rb") as old:
            new.write(head)
            old.seek(old_size)
            shutil.copyfileobj(old, new, _PIECE_BYTES)
            new.flush()
            os.fsync(new.fileno())
        self._rename(path)

    def _rename(self, path: FilePath) -> None:
        if os.path.lexists(self.target):
            raise FileExistsError("something has come to be at the target meanwhile")
        self.record({"finished": _size(path)})
        os.replace(path, self.target)
        sync_folder(self.target.parent)
        self.discard()
        self.close()

    def close(self) -> None:
        """Let go of the files, which stay."""
        if hasattr(self, "_journal"):
            self._journal.close()
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Delete the files."""
        self.path.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever the operating system refuses in here becomes one CheckpointWriteError."""
        try:
            yield
        except (CheckpointWriteError, CheckpointExistsError):
            raise
        except OSError as error:
            raise CheckpointWriteError(
                "the checkpoint could not be written",
                self.target,
                expected="a folder to write in, with room for the file",
                found=error.strerror or str(error),
                hint="Nothing is at the target. Make room, then go on with resume=True (--resume).",
            ) from error


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of `array`, row-major and little-endian. Only what is not laid out so is copied, in small parts."""
    if array.dtype.byteorder == ">" and array.nbytes <= _PIECE_BYTES:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.size and array.flags.c_contiguous and array.dtype.byteorder != ">":
        # through uint8: bfloat16 has no buffer interface
        yield memoryview(array.reshape(-1).view(np.uint8))
    elif array.size and array.nbytes <= _PIECE_BYTES:
        yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    elif array.size:
        count = min(len(array), math.ceil(array.nbytes / _PIECE_BYTES))
        parts = np.array_split(array, count) if count > 1 else list(array)
        for part in parts:
            yield from pieces(part)


def _size(path: FilePath) -> int:
    return path.lstat().st_size if os.path.lexists(path) else -1


def sync_folder(folder: FilePath) -> None:
    """Names in the folder are on disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _identity(format: str, tree: Tree) -> dict[str, str]:
    rows = [(path, leaf.shape, leaf.dtype) for path, leaf in tree.leaves.items()]
    content = json.dumps([rows, list(tree.empty.items()), sorted(tree.sequences)])
    return {"format": format, "tree": hashlib.sha256(content.encode()).hexdigest()}
