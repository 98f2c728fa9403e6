"""One leaf that does not fit a budget of memory: made, hashed and handed on block by block.

Law: the blocks are the leaf, in row-major order, with its hash; what is in memory at once stays within the budget, but
for what a source reads whole. What stands otherwise in the source (axes that change places) goes through a temporary
file, which has no name and is gone with its process.
Knows expressions over leaves, and hashes; knows nothing of formats or layouts.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import IO, Any, TypeVar

import numpy as np

from bridge._errors import CheckpointWriteError
from bridge._types import Path, Shape
from bridge.checkpoint.formats.stored import ArrayFile, Stored, pieces
from bridge.checkpoint.stream import Batch, LeafHash, give_back_large_memory
from bridge.checkpoint.tree.ops import Add, Cast, Fill, Join, OfOne, Op, Read, Reader, Transpose
from bridge.checkpoint.tree.regions import Region, blocks, shape_of, whole

T = TypeVar("T")
#: A block: where in the leaf it is, and its numbers.
Block = tuple[Region, Any]

# Blocks that are in memory at once: one is written, one hashed, one made.
_AT_ONCE = 3
_END = object()


def too_large(batch: Batch, budget: int) -> tuple[Path, Op] | None:
    """The leaf of a batch that is larger than the budget, and how it is made; None where it fits, or is no numbers."""
    ((path, op), *others) = batch.leaves.items()
    is_array = op.dtype != "str" and not op.dtype.startswith("key<") and op.shape
    if others or batch.nbytes <= budget or not is_array:
        return None
    return path, op


@dataclass(frozen=True)
class InBlocks:
    """A leaf in blocks.

    Attributes:
      op: how it is made.
      read: reads what it is made of.
      budget: bytes in memory at once.
      chunk: the shape of the chunks that the blocks are cut between; None to cut anywhere.
      folder: where a temporary file may be.

    >>> leaf = np.arange(12.0).reshape(4, 3)
    >>> read = lambda path, region: leaf[region]
    >>> turned = Transpose(Read(("w",), (4, 3), "float64"), (1, 0))
    >>> blocks = InBlocks(turned, read, budget=96, folder=FilePath(tempfile.gettempdir()))
    >>> with blocks.made() as made:
    ...     [part.tolist() for _, part in made]
    [[[0.0, 3.0, 6.0, 9.0]], [[1.0, 4.0, 7.0, 10.0]], [[2.0, 5.0, 8.0, 11.0]]]
    """

    op: Op
    read: Reader
    budget: int
    chunk: Shape | None = None
    folder: FilePath | None = None

    @contextmanager
    def hashed(self, digest: LeafHash) -> Iterator[Iterator[Block]]:
        """The blocks, which have been added to `digest`. One is made and one is hashed while one is used."""
        give_back_large_memory()
        with self.made() as made, ahead(made) as first, ahead(_hashed(first, digest)) as second:
            yield second

    @contextmanager
    def made(self) -> Iterator[Iterator[Block]]:
        """The blocks, one after the other."""
        with ExitStack() as files:
            op, read = self._without_turns(files)
            yield _blocks(op, read, self.budget, self.chunk)

    def _without_turns(self, files: ExitStack) -> tuple[Op, Reader]:
        """The same with what must change its axes in files, and what reads from them."""
        kept: dict[Path, Stored] = {}

        def read(path: Path, region: Region | None) -> Any:
            return kept[path].read(region) if path in kept else self.read(path, region)

        def filed(inner: Op) -> Read:
            path = ("", "filed", str(len(kept)))
            kept[path] = files.enter_context(_file(inner, read, self.budget, self.folder))
            return Read(path, inner.shape, inner.dtype)

        return _swapped(self.op, filed), read


def hash_in_blocks(op: Op, read: Reader, budget: int) -> str:
    """The hash of a leaf that is read as it is, block by block."""
    digest = LeafHash(op.shape, op.dtype)
    with InBlocks(op, read, budget).hashed(digest) as made:
        for _ in made:
            pass
    return digest.hexdigest()


@contextmanager
def ahead(values: Iterator[T]) -> Iterator[Iterator[T]]:
    """`values`, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        yield _ahead(values, pool)


def _ahead(values: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    pending = pool.submit(next, values, _END)
    while (value := pending.result()) is not _END:
        pending = pool.submit(next, values, _END)
        yield value
        del value  # not kept while the next one is waited for


def _hashed(made: Iterator[Block], digest: LeafHash) -> Iterator[Block]:
    for region, value in made:
        digest.update(value)
        yield region, value
        del value


def _blocks(op: Op, read: Reader, budget: int, chunk: Shape | None) -> Iterator[Block]:
    most = max(1, int(budget / _AT_ONCE / _bytes_per_element(op)))
    for region in blocks(op.shape, most, chunk):
        yield region, op.value(_Rows(read, op, region).read, region)


def _bytes_per_element(op: Op) -> float:
    """Bytes in memory for one element of a block: what is read for it, and what is made of that."""
    size = max(math.prod(op.shape), 1)
    nbytes = 0
    for leaf, region in op.reads():
        part = leaf.shape if region is None else shape_of(region)
        nbytes += math.prod(part) * np.dtype(leaf.dtype).itemsize
    pending = [op]
    while pending:
        outer = pending.pop()
        if isinstance(outer, Cast | Add | Join | Fill):
            nbytes += math.prod(outer.shape) * np.dtype(outer.dtype).itemsize
        pending.extend(outer._parts())
    return max(nbytes / size, np.dtype(op.dtype).itemsize)


class _Rows:
    """What reads for one block: a leaf that the block takes several parts of, side by side, is read once for them.

    Gates of a fused kernel that change places are such parts: each would cost the reading of all chunks of its rows.
    """

    def __init__(self, read: Reader, op: Op, region: Region):
        self._read = read
        wanted: dict[Path, list[Region]] = {}
        for leaf, part in op.reads(region):
            wanted.setdefault(leaf.path, []).append(part or whole(leaf.shape))
        self._bounds = {path: _bounds(parts) for path, parts in wanted.items() if len(parts) > 1}
        for path, parts in wanted.items():
            if path in self._bounds and _elements(self._bounds[path]) > sum(map(_elements, parts)):
                del self._bounds[path]
        self._kept: dict[Path, Any] = {}

    def read(self, path: Path, region: Region | None) -> Any:
        """A region of a leaf."""
        if path not in self._bounds or region is None:
            return self._read(path, region)
        bounds = self._bounds[path]
        if path not in self._kept:
            self._kept[path] = self._read(path, bounds)
        inside = zip(region, bounds, strict=True)
        return self._kept[path][tuple(slice(part.start - b.start, part.stop - b.start) for part, b in inside)]


def _bounds(parts: list[Region]) -> Region:
    """The smallest region that holds all of them."""
    axes = zip(*parts, strict=True)
    return tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in axes)


def _elements(region: Region) -> int:
    return math.prod(shape_of(region))


# --- what goes through a file ---------------------------------------------------------------------------------


def _swapped(op: Op, filed: Callable[[Op], Read]) -> Op:
    """`op` with `filed(inner)` for whatever would be read all over for each block of it."""
    if isinstance(op, Join):
        return Join(tuple(_swapped(part, filed) for part in op.parts), op.axis, op.stack)
    if not isinstance(op, OfOne):
        return op
    inner = _swapped(op.of, filed)
    if isinstance(op, Transpose) and _moves_rows(op):
        inner = filed(inner)
    return replace(op, of=inner)  # type: ignore[type-var]  # each subclass is a dataclass


def _moves_rows(op: Transpose) -> bool:
    """Whether the slowest axis becomes another."""
    before = [axis for axis, size in enumerate(op.of.shape) if size > 1]
    after = [axis for axis in op.axes if op.of.shape[axis] > 1]
    return before[:1] != after[:1]


@contextmanager
def _file(op: Op, read: Reader, budget: int, folder: FilePath | None) -> Iterator[Stored]:
    """The numbers of `op` in a file that has no name any more when its first byte is written."""
    dtype = np.dtype(op.dtype)
    with _room_for(op, folder):
        handle, name = tempfile.mkstemp(dir=folder, prefix=".linen-nnx-")
        file = ArrayFile(FilePath(name))
        os.unlink(name)
    try:
        with os.fdopen(handle, "wb", buffering=0) as opened, ahead(_blocks(op, read, budget, None)) as made:
            for _, value in made:
                with _room_for(op, folder):
                    _write(opened, value)
        yield Stored(file, ((0, math.prod(op.shape) * dtype.itemsize),), op.shape, dtype)
    finally:
        file.close()


def _write(opened: IO[bytes], value: Any) -> None:
    for piece in pieces(np.asarray(value)):
        while piece:
            piece = piece[opened.write(piece) :]


@contextmanager
def _room_for(op: Op, folder: FilePath | None) -> Iterator[None]:
    """What the operating system refuses in here is told with what was to be written."""
    try:
        yield
    except OSError as error:
        nbytes = math.prod(op.shape) * np.dtype(op.dtype).itemsize
        raise CheckpointWriteError(
            "a temporary file could not be written",
            folder or tempfile.gettempdir(),
            expected=f"room for {nbytes} bytes, for {op}, which is larger than the memory allowed",
            found=error.strerror or str(error),
            hint="Make room, or allow more memory: max_memory (--max-memory).",
        ) from error
