"""What lies at a path and near it, in words: for errors.

Law: nothing is opened; a path at which nothing is has no size and no neighbours, and is no error.
Knows names and sizes; knows no format.
"""

from __future__ import annotations

from pathlib import Path as FilePath

from bridge._errors import listed, near_misses

_MOST_NAMES = 8


def contents(folder: FilePath) -> str:
    """The names in a folder."""
    names = sorted(child.name for child in folder.iterdir())
    return listed(names, _MOST_NAMES) or "an empty folder"


def neighbours(path: FilePath) -> str:
    """Names beside `path` that look like its own, as a hint; empty if there are none."""
    if not path.parent.is_dir():
        return ""
    close = near_misses(path.name, (child.name for child in path.parent.iterdir()))
    return f"Near it: {', '.join(close)}" if close else ""


def what_is_at(path: FilePath) -> str:
    """A folder, or a file of how many bytes."""
    return "a folder" if path.is_dir() else f"a file of {bytes_in(path)} bytes"


def bytes_in(path: FilePath) -> int:
    """Bytes of a file, or of all files in a folder; 0 if nothing is there."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(child.lstat().st_size for child in path.rglob("*") if not child.is_dir())
