"""A disk that is full when a journal is written, and has room again later.

Law: it behaves as the kernel does: a write takes as many bytes as there is room for, and says how many; the next one
is refused. Nothing else is refused.
Knows the journal's `open`; knows nothing of formats.
"""

import errno
import io
import os
from contextlib import contextmanager

from bridge.checkpoint.formats import journal


class _File(io.FileIO):
    room: int

    def write(self, content):
        count = super().write(bytes(content)[: _File.room])
        _File.room -= count
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return count


def _open(path, mode, buffering):
    """As the built-in: without a buffer what it gives is a FileIO."""
    raw = _File(path, mode.replace("b", ""))
    return raw if buffering == 0 else io.BufferedRandom(raw)


@contextmanager
def journal_has_room(count, monkeypatch):
    """Inside, what opens a journal can write `count` more bytes into it. Opened outside, it is not limited."""
    with monkeypatch.context() as patch:
        patch.setattr(journal, "open", _open, raising=False)
        _File.room = count
        yield


def fill_up(left=0):
    """From now on there is room for `left` bytes."""
    _File.room = left
