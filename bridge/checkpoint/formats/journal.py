"""What survives a kill: a file of JSON lines that says what is being written and which batches of it are on disk.

Law: a line is whole or it is not there: half of one, which a full disk or a kill leaves, is cut off before the next;
who appends a line has put on disk what it tells of before. One writer at a time.
Knows lines, and how a file gets to the disk; knows nothing of checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

#: One line of a journal.
Record = Mapping[str, Any]


class Journal:
    """The lines at `path`. The file is made if there is none; what is there stays until `clear` or `go_on`.

    It has no buffer: what a full disk refuses is refused in `append`, and not once more when the file is closed.

    Raises:
      BlockingIOError: another process, or another Journal of this one, has it open.

    >>> import tempfile
    >>> journal = Journal(FilePath(tempfile.mkdtemp()) / "journal")
    >>> journal.append([{"tree": "3f"}])
    >>> journal.append([{"done": 1}])
    >>> journal.read()
    [{'tree': '3f'}, {'done': 1}]
    >>> journal.close()
    """

    def __init__(self, path: FilePath):
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  close() is a method
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._file.close()
            raise

    def read(self) -> list[dict[str, Any]]:
        """All whole lines. Raises ValueError if one is no JSON object."""
        records = []
        for line in self._whole().split(b"\n")[:-1]:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a line that is {type(record).__name__}, and no object")
            records.append(record)
        return records

    def restart(self, first: Record) -> None:
        """Forget what is there but for the line `first`."""
        if self._whole() == _line(first):
            self.go_on()
            return
        self._end = 0
        self._file.truncate(0)
        self.append([first])

    def go_on(self) -> None:
        """Keep the whole lines that are there."""
        self._end = len(self._whole())
        self._file.truncate(self._end)

    def append(self, records: Iterable[Record]) -> None:
        """Add lines; they are on disk when this returns. If the disk refuses, none of them is added."""
        content = b"".join(map(_line, records))
        self._file.truncate(self._end)  # half a line may be left of an earlier call
        try:
            if self._file.write(content) < len(content):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(content)

    def close(self) -> None:
        """Let go of the file, which stays, and of the lock."""
        self._file.close()

    def _whole(self) -> bytes:
        self._file.seek(0)
        text = self._file.read()
        return text[: text.rfind(b"\n") + 1]


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


# --- how a file gets to the disk ----------------------------------------------------------------------------


def write_durably(path: FilePath, content: str) -> None:
    """A small file; it is on disk when this returns, its name when `sync_folder` does."""
    with path.open("wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: FilePath) -> None:
    """Names in the folder are on disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
