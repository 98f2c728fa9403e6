"""Object stores, `gs://` and `s3://`: their paths for etils, their addresses for tensorstore, and what they refuse.

Law: what is asked is what is there now, and not what a listing remembered; whatever a store or its client says in here
is a CheckpointError that names the address. No credentials are read, kept or shown: the clients find their own.
Knows addresses; knows nothing of checkpoints. On a store a path is an `etils.epath.Path`, which is used as pathlib's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import BridgeError, CheckpointAccessError, MissingDependencyError
from bridge.checkpoint.formats.door import local_path, no_permission

# Scheme -> the package that etils needs for it, through fsspec, and our extra of its name.
_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# `gs://bucket/x`, and `gs:/bucket/x`, which pathlib makes of it.
_ADDRESS = re.compile(r"(gs|s3):/+([^/]+)((?:/.*)?)", re.IGNORECASE)
# Who raises what is no OSError when a store cannot be reached, or takes no credentials.
_CLIENT_MODULES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# What tensorstore says when it is the store that does not answer, and not the data that is wrong.
_NO_ANSWER = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b")


@dataclass(frozen=True)
class StoredIdentity:
    """What tells an object from itself after somebody wrote to it."""

    tag: str
    size: int

    def __str__(self) -> str:
        return f"{self.size} bytes, tag {self.tag}"


def place_of(path: str | FilePath) -> FilePath:
    """`path` as an absolute local path, or as a path on a store, where it is an address of one.

    Raises:
      CheckpointAccessError: it is an address of another kind.
      MissingDependencyError: the client of that store is not installed.

    >>> place_of("/data/run/../other")
    PosixPath('/data/other')
    """
    address = _ADDRESS.fullmatch(str(path))
    if address is None:
        return local_path(path)
    scheme, bucket, rest = address[1].lower(), address[2], address[3]
    folders: list[str] = []
    for name in rest.split("/"):
        if name == "..":
            del folders[-1:]
        elif name not in ("", "."):
            folders.append(name)
    place = _epath(scheme).Path(f"{scheme}://{bucket}", *folders)
    forget(place)
    return place


def is_on_store(place: FilePath) -> bool:
    """Whether `place`, which `place_of` has made, is on a store."""
    return not isinstance(place, FilePath)


def kvstore(folder: FilePath, name: str = "") -> dict[str, Any]:
    """What tensorstore calls all that is below a folder, or below `name` in it, here or on a store.

    >>> kvstore(FilePath("/data/run")), kvstore(FilePath("/data/run"), "a")
    ({'driver': 'file', 'path': '/data/run/'}, {'driver': 'file', 'path': '/data/run/a/'})
    """
    below = f"{name}/" if name else ""
    if not is_on_store(folder):
        return {"driver": "file", "path": f"{folder}/{below}"}
    _, scheme, bucket, *folders = folder.parts
    path = "".join(f"{part}/" for part in folders) + below
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path}
    return {"driver": "s3", "bucket": bucket, "path": path, **_elsewhere(folder)}


def identities(folder: FilePath) -> dict[str, StoredIdentity]:
    """Every object below a folder of a store, by its name there."""
    found = {}
    with asking(folder):
        forget(folder)
        client = _client(folder)
        root = client._strip_protocol(str(folder))
        for name, info in client.find(str(folder), detail=True).items():
            tag = info.get("generation") or info.get("ETag") or info.get("etag") or ""
            found[name.removeprefix(f"{root}/")] = StoredIdentity(str(tag).strip('"'), int(info["size"]))
    return found


def forget(place: FilePath) -> None:
    """What comes next asks the store: clients keep listings, and others write there."""
    _client(place).invalidate_cache()


@contextmanager
def asking(place: FilePath) -> Iterator[None]:
    """Whatever the client of a store raises in here becomes one error that names `place`; elsewhere nothing happens."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (BridgeError, *_NOT_THERE)) or not is_on_store(place):
            raise
        if isinstance(error, PermissionError):
            raise no_permission(place, "read") from error
        module = type(error).__module__.partition(".")[0]
        if module not in _CLIENT_MODULES and not isinstance(error, OSError):
            raise
        raise no_answer(place, f"{type(error).__name__}: {error}") from error


def has_no_answer(error: Exception) -> bool:
    """Whether an error of tensorstore is about a store that does not answer, and not about what is there."""
    return bool(_NO_ANSWER.search(str(error)))


def no_answer(place: object, said: str) -> CheckpointAccessError:
    """For a store that cannot be reached, or does not take the credentials that its client has found."""
    return CheckpointAccessError(
        "the store does not answer",
        place,
        expected="a store that can be reached, and credentials that it takes",
        found=" ".join(said.split())[:400],
        hint="The data may be sound. Credentials are found by the store's own client, as its tools find them; see that "
        "these reach the address.",
    )


# --- the libraries ------------------------------------------------------------------------------------------


def _epath(scheme: str) -> Any:
    """The library of paths, able to open those of that scheme."""
    package, extra = _CLIENTS[scheme]
    try:
        from etils import epath
        from etils.epath import backend

        backend.fsspec_backend.fs(f"{scheme}://")
    except ImportError as error:
        raise MissingDependencyError(f"A checkpoint on {scheme}://", package, extra) from error
    return epath


def _client(place: FilePath) -> Any:
    """The very client that etils asks, with its listings."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(str(place))


def _elsewhere(place: FilePath) -> dict[str, str]:
    """Where the S3 is, if not Amazon's: tensorstore does not look for it where all other clients do."""
    with asking(place):
        meta = _client(place).s3.meta
    if ".amazonaws." in meta.endpoint_url:
        return {}
    return {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
