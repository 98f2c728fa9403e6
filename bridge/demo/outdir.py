"""The output folder: what the demo writes there, and what it may remove.

Law: nothing is removed or overwritten that an earlier demo did not write. The record `demo.json` lists every
file the demo wrote; a second run removes exactly those, and refuses to start if anything else is in its way.
Knows files; knows nothing of what is in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bridge._errors import BridgeError

CHECKPOINT, FIGURE, PAGE, RECORD = "checkpoint", "demo.png", "compare.html", "demo.json"
_NAMES = (CHECKPOINT, FIGURE, PAGE, RECORD)
_AUTHOR = "linen-nnx demo"


class OutDirError(BridgeError, FileExistsError):
    """The demo would have to overwrite something that it did not write."""

    __str__ = Exception.__str__  # OSError's own __str__ formats errno and file name

    def __init__(self, found: Path, why: str):
        super().__init__(
            f"the demo cannot write here: {found}\n  expected: nothing, or what an earlier demo wrote\n"
            f"  found: {why}\nNothing was changed. Choose another folder with --out, or move this away."
        )


def prepare(out: Path) -> None:
    """Make `out`, without the files of an earlier demo; whatever else is in it stays.

    Raises OutDirError, before anything is removed, if a foreign file is in the way.
    """
    if out.exists() and not out.is_dir():
        raise OutDirError(out, "a file")
    ours = _recorded(out)
    for name in _NAMES:
        for file in _files(out / name):
            if file not in ours:
                raise OutDirError(file, "a file that no earlier demo recorded")
    out.mkdir(parents=True, exist_ok=True)
    for file in ours:
        file.unlink(missing_ok=True)
    folders = sorted((p for p in (out / CHECKPOINT).rglob("*") if p.is_dir()), reverse=True)
    for folder in [*folders, out / CHECKPOINT]:
        if folder.is_dir():
            folder.rmdir()


def record(out: Path, content: dict[str, Any]) -> None:
    """Write `demo.json`: `content`, and the list of all files that the demo has written so far."""
    written = {file for name in _NAMES for file in _files(out / name)} | {out / RECORD}
    files = sorted(file.relative_to(out).as_posix() for file in written)
    (out / RECORD).write_text(json.dumps({"by": _AUTHOR, **content, "files": files}, indent=1) + "\n")


def _files(path: Path) -> list[Path]:
    """The file itself, or all files below a folder; a link counts as a file and is never followed."""
    if path.is_symlink() or path.is_file():
        return [path]
    return [p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()] if path.is_dir() else []


def _recorded(out: Path) -> set[Path]:
    """The files an earlier demo wrote into `out`, as its record lists them; only names of ours count."""
    try:
        content = json.loads((out / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except ValueError as error:
        raise OutDirError(out / RECORD, f"a file that is no record of a demo ({error})") from None
    if not isinstance(content, dict) or content.get("by") != _AUTHOR:
        raise OutDirError(out / RECORD, "a file that is no record of a demo")
    named = [Path(name) for name in content.get("files", [])]
    return {out / p for p in named if ".." not in p.parts and p.parts and p.parts[0] in _NAMES}
