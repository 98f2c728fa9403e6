"""A path as a user gives it, made one that every library below understands; a URL is refused here.

Law: done once, where a path comes in: what passes is absolute and has no `..`, so that no library takes the spelling of
a path for damage in the data, and nobody makes a folder `gs:` of an address.
Knows paths; opens nothing.
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath

from bridge._errors import CheckpointAccessError

# `gs://bucket/x`, and `gs:/bucket/x`, which pathlib makes of it. One letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_COPY = {"gs": "gsutil cp -r {path} DIR", "s3": "rclone copy {path} DIR"}


def local_path(path: str | FilePath) -> FilePath:
    """`path`, absolute, without `~` and `..`. Nothing has to be there.

    Raises:
      CheckpointAccessError: it is a URL.

    >>> local_path("/data/run/../other")
    PosixPath('/data/other')
    >>> local_path("s3://bucket/run")
    Traceback (most recent call last):
    ...
    bridge._errors.CheckpointAccessError: not a path on this machine: s3://bucket/run
      expected: a file or folder on a local or mounted disk
      found: an address on s3
    Copy it here first, or from here afterwards: rclone copy s3://bucket/run DIR
    """
    if url := _URL.match(str(path)):
        raise _no_local_path(str(path), url[1].lower())
    expanded = FilePath(path).expanduser()
    # As the operating system goes through links; where there is nothing to undo, links keep their names.
    return expanded.resolve() if ".." in expanded.parts else expanded.absolute()


def _no_local_path(path: str, scheme: str) -> CheckpointAccessError:
    rest = path[len(scheme) + 1 :].lstrip("/")
    spelled = f"{scheme}://{rest}"  # pathlib has taken a slash
    if scheme == "file":
        spelled = f"file:///{rest}"
        hint = f"Give it without the scheme: /{rest}"
    elif scheme in _COPY:
        hint = f"Copy it here first, or from here afterwards: {_COPY[scheme].format(path=spelled)}"
    else:
        hint = "Copy it here first, or mount it. A local folder of that name: give its absolute path."
    return CheckpointAccessError(
        "not a path on this machine",
        spelled,
        expected="a file or folder on a local or mounted disk",
        found=f"an address on {scheme}",
        hint=hint,
    )


def only_orbax(path: object, found: str) -> CheckpointAccessError:
    """For a checkpoint on a store in one of the other formats."""
    scheme = str(path).partition(":")[0]
    copy = _COPY[scheme].format(path=path)
    return CheckpointAccessError(
        "only Orbax checkpoints are read and written on a store",
        path,
        expected="a folder that Orbax wrote, or `orbax`, `orbax-v1` as the format",
        found=found,
        hint=f"Copy it here first, or from here afterwards: {copy}",
    )


def no_permission(path: object, what: str) -> CheckpointAccessError:
    """For what the operating system does not let this process read, or write: `what`."""
    return CheckpointAccessError(
        f"the checkpoint may not be {what}",
        path,
        expected=f"the right to {'read' if what == 'read' else 'write'} there",
        found="permission denied",
        hint="The data may be sound: run as its owner, or ask for the right.",
    )
