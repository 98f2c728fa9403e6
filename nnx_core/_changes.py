"""Change counters: how a cached plan knows that no object it saw has changed.

Law: if `now()` is what it was, nothing tracked has changed since; if a tracked thing's version is what it
was, that thing has not. Stamps are unique and each is stored in the clock at most once, so the clock never
shows an old reading again, whatever threads do. A thing that no plan has seen (version 0) costs nothing.
"""

import itertools
from typing import Protocol

_stamps = itertools.count(1)
_now = 0


class Tracked(Protocol):
    _nnx_version: int


def now() -> int:
    """Stamp of the last change to anything tracked. Read it before looking at versions, never after."""
    return _now


def track(thing: Tracked) -> int:
    """The version of `thing`, which from now on counts its changes."""
    if not thing._nnx_version:
        object.__setattr__(thing, "_nnx_version", next(_stamps))
    return thing._nnx_version


def touch(thing: Tracked) -> None:
    """Say that `thing` has changed. To be called after the change, never before."""
    global _now
    if thing._nnx_version:
        stamp = next(_stamps)
        object.__setattr__(thing, "_nnx_version", stamp)
        _now = stamp
