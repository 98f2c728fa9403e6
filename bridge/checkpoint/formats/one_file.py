"""A checkpoint in one file, while it is written: `NAME.unfinished` with the bytes, `NAME.unfinished.json` its journal.

Law: bytes that `_put` has written are on disk when it returns; the journal's last line tells how large the whole file
is, so that a file which has its name already is known for what it is.
Knows files and offsets; knows nothing of what a format writes where.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import CheckpointWriteError, show_path
from bridge._types import Path
from bridge.checkpoint.formats.journal import Record
from bridge.checkpoint.formats.nearby import bytes_in
from bridge.checkpoint.formats.protocol import UNFINISHED
from bridge.checkpoint.formats.sink import ResumableSink
from bridge.checkpoint.formats.stored import pieces
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.regions import Region

_COPIED_AT_ONCE = 1 << 25
_CLOSED = -1


class FileSink(ResumableSink):
    """What the sinks of one-file formats share.

    A format says where each leaf goes: `_lay_out`, `_needed_bytes`, `_put_leaves`, `_take_leaves`, `_complete`.
    """

    format: str
    _same = "the same format, paths, shapes and dtypes"

    _file = _CLOSED

    @property
    def _content(self) -> FilePath:
        return self.path.with_name(self.path.name + UNFINISHED)

    @property
    def _journal_path(self) -> FilePath:
        return self._content.with_name(self._content.name + ".json")

    @property
    def _copy(self) -> FilePath:
        return self._content.with_name(self._content.name + ".new")

    @property
    def _leftovers(self) -> str:
        return f"{self._content.name} and {self._journal_path.name}"

    # what a format says

    def _lay_out(self) -> None:
        for leaf in self.tree.leaves.values():
            self._require_storable(leaf)

    def _require_storable(self, leaf: Leaf) -> None:
        if leaf.dtype.startswith("key<"):
            raise CheckpointWriteError(
                f"{self.format} files cannot hold random keys",
                self.path,
                expected="arrays, numbers and strings",
                found=f"{show_path(leaf.path)}: {leaf.dtype}{list(leaf.shape)}",
                hint="Leave keys out (--rng drop), or write an Orbax checkpoint.",
            )

    def _needed_bytes(self) -> int:
        """How long the file must be to go on: what is written, or as much as there will be."""
        raise NotImplementedError

    def _put_leaves(self, leaves: Mapping[Path, Any]) -> Record:
        """Write the leaves; what the journal must know of it."""
        raise NotImplementedError

    def _take_leaves(self, record: Record) -> Iterable[Path]:
        """What `_put_leaves` gave is in the journal; the leaves that it tells of."""
        raise NotImplementedError

    def _unstorable(self, expected: str, found: str) -> CheckpointWriteError:
        return self._refused("the checkpoint cannot be written", expected, found)

    # what the journal tells

    def _identity(self) -> dict[str, str]:
        rows = [(path, leaf.shape, leaf.dtype) for path, leaf in self.tree.leaves.items()]
        content = json.dumps([rows, list(self.tree.empty.items()), sorted(self.tree.sequences)])
        return {"format": self.format, "tree": hashlib.sha256(content.encode()).hexdigest()}

    def _take(self, record: Record) -> Iterable[Path]:
        return () if "finished" in record else self._take_leaves(record)

    def _seal(self, content: FilePath) -> None:
        self._require_open().append([{"finished": bytes_in(content)}])

    def _is_finished(self, records: list[Record]) -> bool:
        return records[-1] == {"finished": bytes_in(self.path)}

    # the file

    def _open_content(self, anew: bool) -> None:
        self._file = os.open(self._content, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if anew else 0), 0o666)

    def _make_room(self) -> None:
        os.ftruncate(self._file, self._needed_bytes())

    def _put(self, leaves: Mapping[Path, Any]) -> list[Record]:
        record = self._put_leaves(leaves)
        self.sync()
        return [record]

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

    def sync(self) -> None:
        """What was put is on disk when this returns."""
        os.fsync(self._file)

    def with_head(self, head: bytes, old_size: int) -> FilePath:
        """A copy of the file with `head` in place of its first `old_size` bytes."""
        with open(self._copy, "wb") as new, open(self._content, "rb") as old:
            new.write(head)
            old.seek(old_size)
            shutil.copyfileobj(old, new, _COPIED_AT_ONCE)
            new.flush()
            os.fsync(new.fileno())
        return self._copy

    def whole(self, size: int) -> FilePath:
        """The file, which is `size` bytes and all written."""
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        return self._content

    def _discard(self) -> None:
        for path in (self._content, self._copy, self._journal_path):
            path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        if self._file != _CLOSED:
            handle, self._file = self._file, _CLOSED
            os.close(handle)


class Run:
    """An array that is written block by block, one after the other from `offset` on, and then tells `record`."""

    def __init__(self, sink: FileSink, offset: int, record: Record):
        self._sink, self._offset, self._record = sink, offset, record

    def put(self, region: Region, value: Any) -> None:
        """Write the next block."""
        self._offset = self._sink.put_array(self._offset, np.asarray(value))

    def end(self) -> list[Record]:
        """What the journal must know."""
        self._sink.sync()
        return [self._record]
