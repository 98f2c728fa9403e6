"""Leaves of a checkpoint as a stream: in batches that fit a budget of memory, each leaf with its hash.

Law: every leaf comes once, and the bytes of one batch, values and what is read for them, stay within the budget, unless
a single leaf is larger; a hash depends on dtype, shape and bits alone, not on where the leaf is or how it is stored.
Knows expressions over leaves; knows nothing of file formats or layouts.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from bridge._types import Path, Shape
from bridge.checkpoint.formats.stored import host, pieces
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Block, Fill, Op, Pick, Read, Reader
from bridge.checkpoint.tree.regions import Region, shape_of

T = TypeVar("T")
#: Called with what is being done, the bytes done and the bytes in all.
Progress = Callable[[str, int, int], None]


class Done:
    """How many of the bytes of a checkpoint are done, for a `progress` that may be None.

    >>> done = Done(print, "converting", 24)
    >>> done.add(16)
    converting 16 24
    >>> [region for region, value in done.telling([("all", np.zeros(1))])]
    converting 24 24
    ['all']
    """

    def __init__(self, progress: Progress | None, doing: str, total: int):
        self._progress, self._doing, self._total, self._bytes = progress, doing, total, 0

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        self._bytes += nbytes
        if self._progress is not None:
            self._progress(self._doing, self._bytes, self._total)

    def telling(self, blocks: Iterable[tuple[T, Any]]) -> Iterator[tuple[T, Any]]:
        """`blocks`, each told when it was used."""
        for region, value in blocks:
            yield region, value
            nbytes = value.nbytes
            del value
            self.add(nbytes)


#: Leaves of one batch: whatever reads or writes keeps something for each of them while it waits.
MOST_LEAVES = 1000
_LEAF_COST = 1 << 16  # what a leaf costs beside its bytes, as if it had so many more
_THREADS = min(4, os.cpu_count() or 1)
# mallopt's numbers
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_ours: list[bool] = []  # whether this process does nothing but stream leaves
_LARGE = 1 << 20  # bytes; what is as large goes back to the operating system when it is freed


def share_freed_memory() -> None:
    """From now on what one thread frees another can use. For a process whose threads do nothing but stream leaves.

    glibc keeps what a thread has freed for that thread: a stream of 256 MiB at a time then holds nearly twice as much.
    To be called before a checkpoint is opened, which starts the threads. Where there is no glibc, nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        _ours.append(True)


def give_back_large_memory() -> None:
    """From now on what is large goes back when it is freed, where `share_freed_memory` has been called.

    For leaves in blocks alone: blocks and chunks of many sizes leave gaps, and for small leaves it costs time.
    """
    if _ours:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


class LeafHash:
    """SHA-256 of a leaf that comes in parts: its dtype, its shape and its bytes in row-major order, little-endian.

    >>> parts = LeafHash((2, 3), "float64")
    >>> parts.update(np.zeros((1, 3)))
    >>> parts.update(np.ones((1, 3)))
    >>> parts.hexdigest() == leaf_hash(np.repeat([[0.0], [1.0]], 3, axis=1))
    True
    """

    def __init__(self, shape: Shape, dtype: str):
        self._digest = hashlib.sha256(f"{_plain_name(dtype)}{list(shape)}".encode())

    def update(self, part: Any) -> None:
        """The next elements: an array, or a string."""
        if isinstance(part, str):
            self._digest.update(part.encode())
            return
        for piece in pieces(host(part)):
            self._digest.update(piece)

    def hexdigest(self) -> str:
        """The hash of all that came."""
        return self._digest.hexdigest()


def leaf_hash(value: Any) -> str:
    """The `LeafHash` of a whole leaf.

    Args:
      value: an array (numpy or JAX, any strides), a Python number, a string, or typed random keys.

    >>> leaf_hash(np.arange(6.0).reshape(2, 3)) == leaf_hash(np.arange(6.0).reshape(3, 2).reshape(2, 3))
    True
    >>> leaf_hash(np.float32(0.0)) == leaf_hash(np.float32(-0.0))
    False
    """
    digest = LeafHash(*layout.describe(value))
    digest.update(value)
    return digest.hexdigest()


def _plain_name(dtype: str) -> str:
    """'int16' for '>i2' too: files of other machines have big-endian arrays."""
    return np.dtype(dtype).name if dtype[:1] in "<>" else dtype


# --- batches ------------------------------------------------------------------------------------------------


class Batch:
    """Target leaves that are made together.

    A source leaf that they read as often as it has bytes, or more, is read once and whole (one layer after the other
    out of a stack: each read of a part costs the reading of the chunk it is in).

    Attributes:
      leaves: target path -> how it is made.
      nbytes: bytes in memory at once: what is read, each source leaf counted once at most, and what is made of it.
    """

    def __init__(self, sizes: Mapping[Path, int]):
        self.leaves: dict[Path, Op] = {}
        self.nbytes = 0
        self._sizes = sizes
        self._reads: dict[Path, int] = {}

    def take(self, path: Path, op: Op, nbytes: int, budget: int) -> bool:
        """Add a leaf of `nbytes` bytes and say True; or, if it does not fit `budget` beside others, say False."""
        reads = dict(bytes_read(op, self._sizes))
        more = 0 if _is_view(op) else nbytes
        for source, size in reads.items():
            before, whole = self._reads.get(source, 0), self._sizes[source]
            more += min(before + size, whole) - min(before, whole)
        if self.leaves and (self.nbytes + more > budget or len(self.leaves) >= MOST_LEAVES):
            return False
        self.leaves[path] = op
        self.nbytes += more
        for source, size in reads.items():
            self._reads[source] = self._reads.get(source, 0) + size
        return True

    def reader(self, read: Reader) -> Reader:
        """`read`, with the source leaves that several leaves of this batch take apart kept in memory."""
        users = Counter(source for op in self.leaves.values() for source in op.sources())
        whole = [path for path, size in self._reads.items() if users[path] > 1 and size >= self._sizes[path]]
        kept = {path: read(path, None) for path in whole}

        def from_memory(path: Path, region: Region | None) -> Any:
            if path not in kept:
                return read(path, region)
            return kept[path] if region is None else kept[path][region]

        return from_memory


def bytes_read(op: Op, sizes: Mapping[Path, int]) -> Counter[Path]:
    """Bytes that `op.value` reads, by source leaf: of one that is cut only its part.

    Args:
      op: how a leaf is made.
      sizes: bytes of the source leaves.

    >>> stack = Read(("kernel",), (4, 2, 8), "float32")
    >>> bytes_read(Pick(stack, axis=0, index=3), {("kernel",): 256})
    Counter({('kernel',): 64})
    """
    read: Counter[Path] = Counter()
    for leaf, region in op.reads():
        part = 1.0 if region is None else math.prod(shape_of(region)) / max(math.prod(leaf.shape), 1)
        read[leaf.path] += round(sizes[leaf.path] * part)
    return read


def _is_view(op: Op) -> bool:
    """Whether the value is what was read, or a part of it."""
    return isinstance(op, Read | Fill) or (isinstance(op, Pick | Block) and _is_view(op.of))


def batches(
    made: Mapping[Path, Op], target: Mapping[Path, Leaf], source: Mapping[Path, Leaf], budget: int
) -> Iterator[Batch]:
    """`made` in its own order, cut into batches of at most `budget` bytes and `MOST_LEAVES` leaves.

    A leaf larger than the budget is a batch by itself.

    Args:
      made: target path -> how it is made.
      target, source: the leaves on both sides, for their sizes.
      budget: bytes.

    >>> leaves = {(n,): Leaf((n,), (2,), "float32", 8) for n in "abc"}
    >>> ops = {path: Read(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    >>> [len(batch.leaves) for batch in batches(ops, leaves, leaves, budget=16)]
    [2, 1]
    """
    sizes = {path: leaf.nbytes for path, leaf in source.items()}
    batch = Batch(sizes)
    for path, op in made.items():
        if not batch.take(path, op, target[path].nbytes, budget):
            yield batch
            batch = Batch(sizes)
            batch.take(path, op, target[path].nbytes, budget)
    if batch.leaves:
        yield batch


def by_source(made: Mapping[Path, Op]) -> dict[Path, Op]:
    """`made` with leaves that read the same source leaf side by side, so that one batch can hold them.

    >>> stack = {name: Read((name,), (2, 8), "float32") for name in "kb"}
    >>> ops = {(str(i), name): Pick(stack[name], 0, i) for i in range(2) for name in "kb"}
    >>> [*by_source(ops)]
    [('0', 'k'), ('1', 'k'), ('0', 'b'), ('1', 'b')]
    """
    first: dict[Path, int] = {}
    place: dict[Path, int] = {}
    for number, (path, op) in enumerate(made.items()):
        place[path] = min((first.setdefault(source, number) for source in op.sources()), default=-1)
    return dict(sorted(made.items(), key=lambda item: place[item[0]]))


def share(made: Mapping[Path, Op], target: Mapping[Path, Leaf], rank: int, count: int) -> dict[Path, Op]:
    """The part of `made` that is the share of process `rank` of `count`: neighbours, about as many bytes for each.

    >>> leaves = {(n,): Leaf((n,), (2,), "float32", 8) for n in "abcd"}
    >>> ops = {path: Read(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    >>> [[name for (name,) in share(ops, leaves, rank, 3)] for rank in range(3)]
    [['a'], ['b', 'c'], ['d']]
    """
    total = sum(target[path].nbytes + _LEAF_COST for path in made)
    before, mine = 0, {}
    for path, op in made.items():
        cost = target[path].nbytes + _LEAF_COST
        if (before + cost / 2) * count // total == rank:
            mine[path] = op
        before += cost
    return mine


def values(batch: Batch, read: Reader) -> dict[Path, tuple[Any, str]]:
    """The leaves of a batch, each as `(value, hash)`. Several threads read and hash, which both wait outside Python."""
    shared = batch.reader(read)

    def make(op: Op) -> tuple[Any, str]:
        value = op.value(shared)
        return value, leaf_hash(value)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(batch.leaves, pool.map(make, batch.leaves.values()), strict=True))
