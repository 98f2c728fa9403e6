"""Room for walks that are as deep as what users build.

A walk calls itself for each level, so Python's limit of 1,000 frames ends it at a few hundred levels; a chain of
1,000 modules is built without any recursion. While a walk of ours runs the limit is higher; while the user's function
runs it is the user's. Calls from Python to Python take nothing from the C stack, so the limit is only a number.
"""

import sys
import threading
from types import TracebackType

#: Frames beyond the user's limit: four a level, for 10,000 levels.
_FRAMES = 40_000


class _Room:
    """A context in which Python's recursion limit is raised; for all threads, for as long as one is in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._walks = 0
        self._limit = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._walks:
                self._limit = sys.getrecursionlimit()
                sys.setrecursionlimit(self._limit + _FRAMES)
            self._walks += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._walks -= 1
            if not self._walks:
                sys.setrecursionlimit(self._limit)


ROOM = _Room()
