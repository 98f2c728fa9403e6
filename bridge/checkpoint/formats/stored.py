"""Arrays that lie in a file as they lie in memory: their bytes, where each begins, reading one or a part of it.

Law: `Stored.read(region)` equals `Stored.read()[region]`, touches only the rows between the region's first and
last, and holds little more than the region; nothing is read past the end of a file, nothing is allocated that the
file does not hold.
Files are read and not mapped into memory: a view of a file that somebody cuts short ends the process.
Knows offsets, number types and trees; knows nothing of what a format writes between the arrays.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge._errors import CheckpointChangedError, CheckpointCorruptError, CheckpointLayoutError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats.protocol import Around
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.regions import Region, shape_of
from bridge.checkpoint.tree.tree import Tree

_PIECE_BYTES = 1 << 25  # what is copied at once of an array that is not contiguous
# Keys in a path. What walks a tree calls itself once a level, and Python's limit is 1,000 calls, its callers' included.
_DEEPEST = 500
_COVERED = 1 << 22  # what is read at once of an array for the sake of a region with gaps
_SHORT = 256  # bytes of a row of a region, below which what is between two rows is read with them
_MOST_DIMENSIONS = 64  # numpy's own limit
_LARGEST = 1 << 62


def damaged(file: FilePath, *, expected: str, found: str) -> CheckpointCorruptError:
    """The one error for a file that is not what its format says."""
    return CheckpointCorruptError("the checkpoint is damaged", file, expected=expected, found=found)


# --- number types -------------------------------------------------------------------------------------------


def number_type(name: str) -> np.dtype | None:
    """The number type of that name, of numpy or ml_dtypes; None for any other text.

    >>> number_type("bfloat16").itemsize, number_type("object"), number_type("i4,i4")
    (2, None, None)
    """
    if len(name) > 32:
        return None
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        return None
    numeric = dtype.kind == "b" or jnp.issubdtype(dtype, np.number)
    return dtype if numeric and dtype.name == name else None


def array_bytes(shape: Sequence[Any], dtype: np.dtype) -> int | None:
    """Bytes of an array, None if no array has that shape.

    >>> array_bytes((2, 3), np.dtype("float32")), array_bytes((-1,), np.dtype("int8"))
    (24, None)
    """
    if len(shape) > _MOST_DIMENSIONS:
        return None
    largest = dtype.itemsize  # as if no axis were empty: numpy refuses (2**62, 0) too
    for size in shape:
        if type(size) is not int or size < 0:
            return None
        largest *= size or 1
    return math.prod(shape) * dtype.itemsize if largest <= _LARGEST else None


def host(value: Any) -> np.ndarray:
    """A leaf's numbers as a numpy array on the host; random keys as the integers they are made of."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of `array`, row-major and little-endian. Only what is not laid out so is copied, in small parts."""
    if array.dtype.byteorder == ">" and array.nbytes <= _PIECE_BYTES:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.size and array.flags.c_contiguous and array.dtype.byteorder != ">":
        # through uint8: bfloat16 has no buffer interface
        yield memoryview(array.reshape(-1).view(np.uint8))
    elif array.size and array.nbytes <= _PIECE_BYTES:
        yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    elif array.size:
        count = min(len(array), math.ceil(array.nbytes / _PIECE_BYTES))
        parts = np.array_split(array, count) if count > 1 else list(array)
        for part in parts:
            yield from pieces(part)


# --- files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What tells a file from itself after somebody wrote to it."""

    inode: int
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """From what `os.stat` or `os.fstat` says."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        return f"inode {self.inode}, {self.size} bytes, modified at {self.modified} ns"


def changed(file: object, before: object, now: object) -> CheckpointChangedError:
    """The one error for a source that was written to while it was read."""
    return CheckpointChangedError(
        "the checkpoint changed while it was read",
        file,
        expected=f"what was opened: {before}",
        found=str(now),
        hint="Read it again when nobody writes to it, or read a copy.",
    )


class ArrayFile:
    """An open file. What was read stays good after `close`."""

    def __init__(self, path: FilePath):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._file)
        self._identity = Identity.of(os.fstat(self._file))
        self.size = self._identity.size

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to the file since it was opened.

        A file that was replaced by another of its name is none: what was opened is there until it is closed.
        """
        now = Identity.of(os.fstat(self._file))
        if now != self._identity:
            raise changed(self.path, self._identity, now)

    def copy(self, offset: int, length: int) -> bytes:
        """A copy of some bytes."""
        out = np.empty(length, np.uint8)
        self._copy(offset, out)
        return out.tobytes()

    def bytes(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """The bytes of these (offset, length) one after the other."""
        out = np.empty(_length(spans), np.uint8)
        filled = 0
        for offset, length in spans:
            self._copy(offset, out[filled : filled + length])
            filled += length
        return out

    def _copy(self, offset: int, out: np.ndarray) -> None:
        filled = 0
        while filled < out.size:
            count = os.preadv(self._file, [out[filled:]], offset + filled)
            if not count:
                self.require_unchanged()
                raise damaged(self.path, expected=f"{out.size} bytes at {offset}", found=f"{filled} bytes")
            filled += count

    def close(self) -> None:
        """Let go of the file."""
        self._close()


@dataclass(frozen=True)
class Stored:
    """An array in a file: `spans` are (offset, length) of its bytes in row-major order, mostly one."""

    file: ArrayFile
    spans: tuple[tuple[int, int], ...]
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return _length(self.spans)

    def read(self, region: Region | None = None) -> np.ndarray:
        """The array, or a region of it."""
        if region is not None and self._has_wide_gaps(region):
            return self._gathered(region)
        return self._covering(region)

    def _covering(self, region: Region | None) -> np.ndarray:
        """The region, out of the one run of elements that holds it."""
        first, block, rest = rows(self.shape, region)
        size = math.prod(block)
        if not size:
            return np.empty(block, self.dtype)[(*rest, ...)]
        begin = first * self.dtype.itemsize
        spans = list(_cut(self.spans, begin, begin + size * self.dtype.itemsize))
        array = self.file.bytes(spans).view(self.dtype).reshape(block)
        return array[(*rest, ...)]  # `...`: an array, also without axes

    def _has_wide_gaps(self, region: Region) -> bool:
        """Whether the run that holds the region is large, and more than the region."""
        count = math.prod(rows(self.shape, region)[1])
        return count * self.dtype.itemsize > _COVERED and count > math.prod(shape_of(region)) > 0

    def _gathered(self, region: Region) -> np.ndarray:
        """The region, row by row, or as many rows at once as are little with what is between them."""
        out = np.empty(shape_of(region), self.dtype)
        axis = max(axis for axis, part in enumerate(region) if part.stop - part.start != self.shape[axis])
        row, segment = math.prod(self.shape[axis:]), math.prod(shape_of(region[axis:]))
        at_once = 1
        if segment * self.dtype.itemsize < _SHORT:
            at_once = max(1, _COVERED // (row * self.dtype.itemsize))
        along = region[axis - 1]
        for outer in itertools.product(*(range(part.start, part.stop) for part in region[: axis - 1])):
            before = tuple(slice(index, index + 1) for index in outer)
            place = tuple(index - part.start for index, part in zip(outer, region, strict=False))
            for start in range(along.start, along.stop, at_once):
                stop = min(start + at_once, along.stop)
                part = self._covering((*before, slice(start, stop), *region[axis:]))
                out[(*place, slice(start - along.start, stop - along.start))] = part.reshape(part.shape[axis - 1 :])
        return out


def _length(spans: Iterable[tuple[int, int]]) -> int:
    return sum(length for _, length in spans)


def rows(shape: Shape, region: Region | None) -> tuple[int, Shape, Region]:
    """The smallest run of elements that holds `region`: index of its first, its shape, and the region in that.

    >>> rows((4, 6, 5), (slice(2, 3), slice(1, 3), slice(0, 5)))
    (65, (1, 2, 5), (slice(None, None, None), slice(None, None, None), slice(0, 5, None)))
    """
    if region is None or not shape:
        return 0, shape, ()
    first, stride, axis, count = 0, math.prod(shape), -1, 1
    while axis + 1 < len(shape) and count == 1:
        axis += 1
        start, stop, _ = region[axis].indices(shape[axis])
        count = max(stop - start, 0)
        stride //= shape[axis] or 1
        first += start * stride
    block = (*(1,) * axis, count, *shape[axis + 1 :])
    return first, block, (*(slice(None),) * (axis + 1), *region[axis + 1 :])


def _cut(spans: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Those parts of `spans` that hold the bytes begin:end of them all together."""
    before = 0
    for offset, length in spans:
        start, stop = max(begin - before, 0), min(end - before, length)
        if start < stop:
            yield offset + start, stop - start
        before += length


# --- sources ------------------------------------------------------------------------------------------------


@dataclass
class FileSource:
    """A `protocol.Source` whose arrays are `Stored` and whose numbers and strings are known since it was opened."""

    path: FilePath
    format: str
    reason: str
    tree: Tree
    stored: Mapping[Path, Stored]
    values: Mapping[Path, Any] = field(default_factory=dict)
    #: what makes the saved value of an array: a Python number, a numpy scalar
    finish: Mapping[Path, Callable[[np.ndarray], Any]] = field(default_factory=dict)
    names: Mapping[Path, str] = field(default_factory=dict)  #: what the format itself calls each array
    metadata: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    item: str | None = None
    around: Around = field(default_factory=Around)

    def read(self, path: Path, region: Region | None = None) -> Any:
        """A leaf or a region of it."""
        if path in self.values:
            return self.values[path]
        array = self.stored[path].read(region)
        return self.finish[path](array) if path in self.finish else array

    def piece(self, path: Path) -> int:
        """Bytes that reading any part of a leaf takes: none, as each byte can be read alone."""
        return 0

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to one of the files since they were opened."""
        for file in self._files:
            file.require_unchanged()

    def close(self) -> None:
        """Let go of the files; arrays that were read stay good."""
        for file in self._files:
            file.close()

    @property
    def _files(self) -> set[ArrayFile]:
        return {stored.file for stored in self.stored.values()}


def make_tree(
    file: FilePath,
    kinds: Mapping[Path, tuple[Shape, str, int]],
    empty: Mapping[Path, str] | None = None,
    sequences: Iterable[Path] = (),
) -> Tree:
    """The tree of leaves given as (shape, dtype, bytes).

    Raises:
      CheckpointCorruptError: one leaf lies below another.
      CheckpointLayoutError: paths too long to be walked.
    """
    empty, sequences = dict(empty or {}), frozenset(sequences)
    require_walkable(file, [*kinds, *empty])
    try:
        layout.nest(dict.fromkeys([*kinds, *empty]), sequences)
    except layout.TreeStructureError as error:
        raise damaged(
            file, expected="names that form one tree, split where keys are joined", found=str(error)
        ) from error
    leaves = {path: Leaf(path, *kind) for path, kind in kinds.items()}
    return Tree(leaves, empty, sequences)


def require_walkable(file: FilePath, paths: Iterable[Path]) -> None:
    """Raise CheckpointLayoutError if a path has more keys than a tree can be deep."""
    deepest = max(paths, key=len, default=())
    if len(deepest) > _DEEPEST:
        start = show_path(deepest[:5])
        raise unsupported(file, f"paths of at most {_DEEPEST} keys", f"one of {len(deepest)}: {start:.200}/...")


def kinds_of(stored: Mapping[Path, Stored], values: Mapping[Path, Any]) -> dict[Path, tuple[Shape, str, int]]:
    """Shape, dtype name and size in memory of each leaf."""
    kinds = {}
    for path, array in stored.items():
        kinds[path] = (array.shape, array.dtype.name, array.nbytes)
    for path, value in values.items():
        shape, dtype = layout.describe(value)
        nbytes = len(value.encode()) if isinstance(value, str) else np.dtype(dtype).itemsize
        kinds[path] = (shape, dtype, nbytes)
    return kinds


def split_names(names: Iterable[str], separator: str | None = None) -> dict[str, Path]:
    """Names of another program's file as paths: split at `/` if any name has one, else at `.`.

    >>> split_names(["params/layers.0/kernel", "step"])
    {'params/layers.0/kernel': ('params', 'layers.0', 'kernel'), 'step': ('step',)}
    >>> split_names(["layers.0.kernel"])
    {'layers.0.kernel': ('layers', '0', 'kernel')}
    """
    names = list(names)
    separator = separator or separator_of(names)
    return {name: tuple(name.split(separator)) for name in names}


def separator_of(names: Iterable[str]) -> str:
    """What joins keys in names that another program wrote."""
    return "/" if any("/" in name for name in names) else "."


# --- one checkpoint in several files ------------------------------------------------------------------------


def open_shards(index: FilePath, format: str, open_one: Callable[[FilePath], FileSource]) -> FileSource:
    """The files that a `*.index.json` of Hugging Face lists, as one source.

    Args:
      index: `{"metadata": {...}, "weight_map": {name of a leaf: file beside the index}}`.
      open_one: opens one of the files.

    Raises:
      CheckpointCorruptError: the index is no such table, a file is missing, or one holds other leaves than it says.
    """
    table, metadata = read_index(index)
    parts = _open_parts(index, table, open_one)
    kinds: dict[Path, tuple[Shape, str, int]] = {}
    stored, values, finish, empty = {}, {}, {}, {}
    for part in parts:
        if twice := kinds.keys() & part.tree.leaves.keys():
            raise damaged(index, expected="each leaf in one file", found=f"{show_path(min(twice))} in two")
        for path, leaf in part.tree.leaves.items():
            kinds[path] = (leaf.shape, leaf.dtype, leaf.nbytes)
        stored.update(part.stored)
        values.update(part.values)
        finish.update(part.finish)
        empty.update(part.tree.empty)
    return FileSource(
        path=index,
        format=format,
        reason=f"an index of {len(parts)} {format} files",
        tree=make_tree(index, kinds, {path: mark for path, mark in empty.items() if path not in kinds}),
        stored=stored,
        values=values,
        finish=finish,
        metadata=metadata,
    )


def _open_parts(
    index: FilePath, table: Mapping[str, str], open_one: Callable[[FilePath], FileSource]
) -> list[FileSource]:
    """The files of the index, each with the leaves that it says."""
    parts = []
    for name in dict.fromkeys(table.values()):
        if not (index.parent / name).is_file():
            raise damaged(index, expected=f"the file {name} beside it", found="no such file")
        part = open_one(index.parent / name)
        parts.append(part)
        in_index = {leaf for leaf, file in table.items() if file == name}
        in_file = set(part.names.values())
        if in_index != in_file:
            wrong = min(in_index ^ in_file)
            where = "the index alone" if wrong in in_index else "the file alone"
            expected = f"the leaves of {name} as the index lists them"
            raise damaged(index, expected=expected, found=f"{wrong!r} in {where}")
    return parts


def read_index(index: FilePath) -> tuple[dict[str, str], dict[str, Any]]:
    """Name of each leaf -> the file it is in, and the metadata beside it."""
    content = read_json(index)
    table, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(table, dict) or not table or not isinstance(metadata, dict):
        raise damaged(index, expected="a 'weight_map' from leaves to files", found=f"the keys {sorted(content)[:6]}")
    for name in table.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise damaged(index, expected="names of files beside the index", found=repr(name)[:200])
    return table, metadata


def read_json(file: FilePath) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointCorruptError if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(file, expected="a JSON object", found=f"{type(error).__name__}: {error}"[:300]) from error
    if not isinstance(content, dict):
        raise damaged(file, expected="a JSON object", found=type(content).__name__)
    return content


def unsupported(file: FilePath, expected: str, found: str, hint: str = "") -> CheckpointLayoutError:
    """For what is whole and of that format, and yet not read."""
    return CheckpointLayoutError("the checkpoint is not read", file, expected=expected, found=found, hint=hint)
