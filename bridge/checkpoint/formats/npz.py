"""numpy's .npz files, as big_vision and others save parameters in them.

Law: opening reads the headers of the members only; a read decompresses one member, no further than the region needs,
and allocates what its header and the archive's table agree on; objects are refused, nothing is unpickled.
Knows zip and .npy; knows nothing of layouts. There is no sink: safetensors holds the same, and bfloat16 too.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import IO, Any

import numpy as np

from bridge._types import Path, Shape
from bridge.checkpoint.formats import stored
from bridge.checkpoint.formats.protocol import Around
from bridge.checkpoint.formats.stored import Identity, changed
from bridge.checkpoint.tree.ops import Region
from bridge.checkpoint.tree.tree import Tree

_SUFFIX = ".npy"
_MOST_RATIO = 1032  # deflate cannot do better: a table that says so lies
# What zipfile, zlib and numpy's header parser raise on damaged files.
_READ_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, KeyError, TypeError),
    *(SyntaxError, tokenize.TokenError, RecursionError, MemoryError, NotImplementedError, RuntimeError, OverflowError),
)


@dataclass(frozen=True)
class _Member:
    """One array: `shape` is the one that its bytes have in row-major order; a Fortran array is that, transposed."""

    name: str
    start: int
    shape: Shape
    stored_as: np.dtype
    dtype: np.dtype
    fortran: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class NpzSource:
    """A `protocol.Source` over the members of an archive."""

    path: FilePath
    reason: str
    tree: Tree
    members: Mapping[Path, _Member]
    archive: zipfile.ZipFile
    format: str = "npz"
    step: int | None = None
    item: str | None = None
    around: Around = field(default_factory=Around)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # Python 3.13's zipfile seeks relative to where another thread may have left the shared file.
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._identity = self._now()
        self._opened: IO[bytes] | None = None  # the member that was read last, if there is more in it

    def _now(self) -> Identity:
        assert self.archive.fp is not None  # until it is closed
        return Identity.of(os.fstat(self.archive.fp.fileno()))

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to the file since it was opened."""
        if (now := self._now()) != self._identity:
            raise changed(self.path, self._identity, now)

    def read(self, path: Path, region: Region | None = None) -> np.ndarray:
        """An array or a region of it: a copy.

        Only a read of all of it, also in runs from the first number to the last, checks the member's checksum. Runs
        that follow each other decompress it once.
        """
        member = self.members[path]
        if region is not None and member.fortran:
            region = region[::-1]
        first, block, rest = stored.rows(member.shape, region)
        array = np.empty(block, member.stored_as)
        with self.lock, _reading(self.path, member.name):
            offset = member.start + first * member.dtype.itemsize
            opened = self._at(member, offset)
            _fill(opened, array)
            is_end = offset + array.nbytes == member.start + member.nbytes
            if is_end and opened.read(1):  # zipfile compares the checksum at the end
                raise ValueError("more bytes than its shape has")
            if is_end:
                self._let_go()
        array = array.astype(array.dtype.newbyteorder("="), copy=False).view(member.dtype)[(*rest, ...)]
        return array.T if member.fortran else array

    def _at(self, member: _Member, offset: int) -> IO[bytes]:
        """The member, with the bytes from `offset` on to be read next."""
        if self._opened is None or self._opened.name != member.name or self._opened.tell() > offset:
            self._let_go()
            self._opened = self.archive.open(member.name)
            self._opened.read(member.start)  # a seek would switch the checksum off
        if self._opened.tell() != offset:
            self._opened.seek(offset)
        return self._opened

    def _let_go(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def piece(self, path: Path) -> int:
        """Bytes that reading any part of a leaf takes: all of it, where its last axis is the slowest."""
        member = self.members[path]
        return member.nbytes if member.fortran and len(member.shape) > 1 else 0

    def close(self) -> None:
        """Let go of the file."""
        self._let_go()
        self.archive.close()


def open_npz(file: FilePath, reason: str = "it was said to be", separator: str | None = None) -> NpzSource:
    """The .npz file as a source.

    Args:
      separator: what joins keys in the names. Default: see `stored.split_names`.

    Raises:
      CheckpointCorruptError: cut short, hostile, or with objects in it.
    """
    with _reading(file, "the table of the archive"):
        archive = zipfile.ZipFile(file)
    try:
        members = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(_SUFFIX)
            if name == info.filename or name in members:
                twice = " twice" if name in members else ""
                what = f"{info.filename:.80}{twice}"
                raise stored.damaged(file, expected="members that end in .npy, each once", found=what)
            members[name] = _read_member(file, archive, info)
        content: dict[Path, _Member] = {}
        kinds: dict[Path, tuple[Shape, str, int]] = {}
        for name, path in stored.split_names(members, separator).items():
            member = content[path] = members[name]
            kinds[path] = (_shape(member), member.dtype.name, member.nbytes)
        tree = stored.make_tree(file, kinds)
    except BaseException:
        archive.close()
        raise
    if any(member.stored_as.kind == "V" for member in members.values()):
        reason += "; numbers of 2 bytes without a type are read as bfloat16, which numpy saves so"
    return NpzSource(file, reason, tree, content, archive)


def _read_member(file: FilePath, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    with _reading(file, info.filename), archive.open(info) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about headers that Python 2 wrote
        version = np.lib.format.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of .npy: its arrays have fields")
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(opened)
        start = opened.tell()
    halves = dtype.str in ("|V2", "<V2")  # numpy saves bfloat16 so
    as_number = np.dtype("bfloat16") if halves else dtype.newbyteorder("=")
    if dtype.hasobject or stored.number_type(as_number.name) is None:
        what = f"{info.filename:.80}: {dtype}"
        raise stored.damaged(file, expected="arrays of numbers; objects are never unpickled", found=what)
    size = stored.array_bytes(shape, as_number)
    ratio = _MOST_RATIO if info.compress_type else 1
    possible = info.compress_size * ratio + 64
    if size is None or size + start != info.file_size or info.file_size > possible:
        expected = f"{info.filename:.80}: {size} bytes for {dtype}{list(shape)}"[:300]
        raise stored.damaged(file, expected=expected, found=f"{info.file_size - start}")
    order = tuple(shape[::-1] if fortran else shape)
    return _Member(info.filename, start, order, dtype, as_number, bool(fortran))


def _shape(member: _Member) -> Shape:
    return member.shape[::-1] if member.fortran else member.shape


def _fill(opened: IO[bytes], array: np.ndarray) -> None:
    target = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
    while target:
        count = opened.readinto(target[: 1 << 24])
        if not count:
            raise EOFError("it ends before its last number")
        target = target[count:]


@contextmanager
def _reading(file: FilePath, what: str) -> Iterator[None]:
    """Whatever zipfile or numpy raise in here becomes one CheckpointCorruptError."""
    try:
        yield
    except stored.CheckpointCorruptError:
        raise
    except _READ_ERRORS as error:
        raise stored.damaged(
            file, expected=f"{what:.80}, whole", found=f"{type(error).__name__}: {error}"[:300]
        ) from error
