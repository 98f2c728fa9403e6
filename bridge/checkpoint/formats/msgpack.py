"""flax's msgpack files: `flax.serialization.to_bytes`, Hugging Face's `flax_model.msgpack`, `checkpoint_7`.

Law of the source: opening walks the file's structure and skips every array; what flax.serialization would refuse, or
would need more memory for than the file has bytes, is an error that names the leaf and the offset.
Law of the sink: the file is, byte for byte, what `to_bytes` makes of the tree; no more than one batch is in memory.
Knows msgpack and flax's three extension types; knows nothing of the layouts that the trees have. Lists and tuples come
back as dicts with the keys '0', '1', ...: flax writes both so.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import msgpack
import numpy as np

from bridge._errors import CheckpointCorruptError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats import stored
from bridge.checkpoint.formats.journal import Record, sync_folder, write_durably
from bridge.checkpoint.formats.one_file import FileSink
from bridge.checkpoint.formats.stored import ArrayFile, FileSource, Stored, number_type, pieces
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.regions import Region
from bridge.checkpoint.tree.tree import Tree, depth_first

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 1 << 30  # flax cuts larger arrays: msgpack's limit is 2^32 - 1 bytes
_ELSEWHERE = "//GDAPlaceholder:"  # flax.training.checkpoints: the array is in a folder beside the file
_DEEPEST = 128
_MOST_ENTRIES = 1_000_000

# First byte -> kind and width of the length that follows, or format of the number.
_SIZED = {
    0xC4: ("bin", 1),
    0xC5: ("bin", 2),
    0xC6: ("bin", 4),
    0xC7: ("ext", 1),
    0xC8: ("ext", 2),
    0xC9: ("ext", 4),
    0xD9: ("str", 1),
    0xDA: ("str", 2),
    0xDB: ("str", 4),
    0xDC: ("array", 2),
    0xDD: ("array", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: ("nil", None), 0xC2: ("number", False), 0xC3: ("number", True)}


# --- source -------------------------------------------------------------------------------------------------


def open_msgpack(file: FilePath, reason: str = "it was said to be") -> FileSource:
    """The msgpack file, or the index of several (`flax_model.msgpack.index.json`), as a source.

    Raises:
      CheckpointCorruptError: cut short, or not what flax writes.
      CheckpointLayoutError: its arrays are in another folder (`checkpoint_7_gda`).
    """
    if file.suffix == ".json":
        return stored.open_shards(file, "msgpack", open_msgpack)
    arrays = ArrayFile(file)
    index = _Index(arrays)
    metadata, note = _read_metadata(file, arrays.size)
    kinds = stored.kinds_of(index.arrays, index.values)
    return FileSource(
        path=file,
        format="msgpack",
        reason=reason + note,
        tree=stored.make_tree(file, {path: kinds[path] for path in index.leaves}, index.empty, index.sequences),
        stored=index.arrays,
        values=index.values,
        finish=dict.fromkeys(index.scalars, lambda array: array[()]),
        names={path: "/".join(path) for path in index.leaves},
        metadata=metadata,
    )


class _Index:
    """Where each leaf of the file is. Arrays are skipped, never looked at."""

    def __init__(self, file: ArrayFile):
        self.file = file
        self.arrays: dict[Path, Stored] = {}
        self.values: dict[Path, Any] = {}
        self.leaves: dict[Path, None] = {}  # both, in the file's order
        self.scalars: set[Path] = set()
        self.empty: dict[Path, str] = {}
        self.sequences: set[Path] = set()
        self._count = 0
        self._path: Path = ()
        with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
            end = self._value(0, file.size, ())
        if end != file.size:
            raise self._bad("the end of the file", f"{file.size - end} more bytes", end)

    # containers

    def _value(self, offset: int, end: int, path: Path) -> int:
        """Note what begins at `offset`; where it ends. Nothing of it may lie at or past `end`."""
        self._path, self._count = path, self._count + 1
        if self._count > _MOST_ENTRIES or len(path) > _DEEPEST:
            raise self._bad(f"at most {_MOST_ENTRIES} entries, {_DEEPEST} deep", "more", offset)
        kind, content, start = self._head(offset, end)
        if kind in ("map", "array"):
            return self._container(kind, content, start, end, path)
        if kind == "ext":
            return self._extension(*content, start, path)
        if kind == "bin":
            raise self._bad("arrays, numbers, strings or None", f"{content} raw bytes", offset)
        if content is None:
            self.empty[path] = "None"
            return start
        if kind == "str":
            content, start = self._text(start, content), start + content
            if content.startswith(_ELSEWHERE):
                raise stored.unsupported(
                    self.file.path,
                    "arrays in the file",
                    f"{show_path(path)}: it is in the folder {self.file.path.name}_gda, saved by several processes",
                    "Restore it with flax.training.checkpoints, and save it with Orbax.",
                )
        self._leaf(path, self.values, content)
        return start

    def _leaf(self, path: Path, table: dict[Path, Any], value: Any) -> None:
        table[path] = value
        self.leaves[path] = None

    def _container(self, kind: str, count: int, offset: int, end: int, path: Path) -> int:
        least = 2 * count if kind == "map" else count  # an entry is a byte or more, and so is a key
        if least > end - offset:
            raise self._bad(f"{count} entries", f"{end - offset} bytes", offset)
        if not count:
            self.empty[path] = "Dict" if kind == "map" else "List"
            return offset
        if kind == "array":
            self.sequences.add(path)
            for index in range(count):
                offset = self._value(offset, end, (*path, str(index)))
            return offset
        keys: set[str] = set()
        before = len(self.leaves)
        for _ in range(count):
            self._path = path
            key, offset = self._key(offset, end)
            if key in keys:
                raise self._bad("each key once", f"{key!r} twice", offset)
            keys.add(key)
            offset = self._value(offset, end, (*path, key))
        if _CHUNKED in keys:
            self._join_chunks(path, before, offset)
        return offset

    def _key(self, offset: int, end: int) -> tuple[str, int]:
        kind, length, start = self._head(offset, end)
        if kind != "str":
            raise self._bad("a key, which is text", kind, offset)
        return self._text(start, length), start + length

    # leaves

    def _extension(self, code: int, length: int, offset: int, path: Path) -> int:
        end = offset + length
        if code in (_ARRAY, _SCALAR):
            array = self._array(offset, end)
            if code == _SCALAR:
                if array.shape:
                    raise self._bad("a scalar", f"shape {array.shape}", offset)
                self.scalars.add(path)
            self._leaf(path, self.arrays, array)
        elif code == _COMPLEX:
            (real, imag), after = self._numbers(offset, end)
            if after != end:
                raise self._bad("two numbers", f"{end - after} more bytes", after)
            self._leaf(path, self.values, complex(real, imag))
        else:
            raise self._bad("one of flax's extension types, 1 to 3", str(code), offset)
        return end

    def _numbers(self, offset: int, end: int, count: int | None = 2) -> tuple[list[Any], int]:
        kind, length, offset = self._head(offset, end)
        if kind != "array" or (count is not None and length != count) or length > end - offset:
            raise self._bad(f"{'some' if count is None else count} numbers", f"{kind} of {length}", offset)
        numbers = []
        for _ in range(length):
            kind, value, offset = self._head(offset, end)
            if kind != "number":
                raise self._bad("a number", kind, offset)
            numbers.append(value)
        return numbers, offset

    def _array(self, offset: int, end: int) -> Stored:
        kind, length, start = self._head(offset, end)
        if (kind, length) != ("array", 3):
            raise self._bad("shape, dtype and bytes of an array", f"{kind} of {length}", offset)
        shape, start = self._numbers(start, end, None)
        kind, length, start = self._head(start, end)
        name = self._text(start, length) if kind in ("str", "bin") else kind
        dtype = number_type(name)
        if dtype is None:
            raise self._bad("the name of a number type", repr(name)[:80], start)
        offset = start + length
        kind, length, start = self._head(offset, end)
        size = stored.array_bytes(shape, dtype)
        if kind not in ("bin", "str") or size != length or start + length != end:
            raise self._bad(f"{size} bytes for {name}{shape}", f"{kind} of {length}, with {end - start} left", offset)
        return Stored(self.file, ((start, length),), tuple(shape), dtype)

    def _join_chunks(self, path: Path, before: int, offset: int) -> None:
        """The entries of the map that has just been read are the shape and the parts of one large array."""
        entries: dict[Path, Any] = {}
        self._path = path
        while len(self.leaves) > before:
            place, _ = self.leaves.popitem()
            entries[place[len(path) :]] = self.arrays.pop(place, None) or self.values.pop(place)
        entries.pop((_CHUNKED,), None)
        shape = _take_list(entries, "shape")
        chunks = _take_list(entries, "chunks")
        if entries or not chunks or not all(map(_is_chunk, chunks)):
            raise self._bad("shape and chunks of one array", "others", offset)
        dtype = chunks[0].dtype
        if any(chunk.dtype != dtype for chunk in chunks):
            raise self._bad("shape and chunks of one array", "others", offset)
        spans: list[tuple[int, int]] = []
        for chunk in chunks:
            spans.extend(chunk.spans)
        array = Stored(self.file, tuple(spans), tuple(shape), dtype)
        if stored.array_bytes(shape, dtype) != array.nbytes:
            raise self._bad(f"chunks for {dtype}{shape}", f"{array.nbytes} bytes", offset)
        self._leaf(path, self.arrays, array)

    # bytes

    def _head(self, offset: int, end: int) -> tuple[str, Any, int]:
        """Kind and content, or length, of what begins at `offset`, and where its content begins."""
        tag = self._bytes(offset, 1, end)[0]
        offset += 1
        if tag <= 0x7F:
            return "number", tag, offset
        if tag >= 0xE0:
            return "number", tag - 256, offset
        if tag <= 0x8F:
            return "map", tag & 15, offset
        if tag <= 0x9F:
            return "array", tag & 15, offset
        if tag <= 0xBF:
            return self._room("str", tag & 31, offset, end)
        if tag in _CONSTANTS:
            return *_CONSTANTS[tag], offset
        if tag in _NUMBERS:
            size = struct.calcsize(_NUMBERS[tag])
            return "number", struct.unpack(_NUMBERS[tag], self._bytes(offset, size, end))[0], offset + size
        if tag in _SIZED:
            kind, width = _SIZED[tag]
            length, offset = int.from_bytes(self._bytes(offset, width, end), "big"), offset + width
        elif 0xD4 <= tag <= 0xD8:
            kind, length = "ext", 1 << tag - 0xD4
        else:
            raise self._bad("msgpack", f"the byte {tag:#x}, which begins nothing", offset - 1)
        if kind == "ext":
            code = int.from_bytes(self._bytes(offset, 1, end), "big", signed=True)
            self._room(kind, length, offset + 1, end)
            return kind, (code, length), offset + 1
        return self._room(kind, length, offset, end)

    def _room(self, kind: str, length: int, offset: int, end: int) -> tuple[str, int, int]:
        if kind not in ("map", "array") and length > end - offset:
            raise self._bad(f"{length} bytes", f"{end - offset}", offset)
        return kind, length, offset

    def _bytes(self, offset: int, count: int, end: int) -> bytes:
        if offset + count > end:
            raise self._bad(f"{count} bytes", f"{end - offset}", offset)
        return self._data[offset : offset + count]

    def _text(self, offset: int, length: int) -> str:
        try:
            return self._data[offset : offset + length].decode()
        except UnicodeDecodeError as error:
            raise self._bad("text", f"bytes that are not UTF-8: {error.reason}", offset) from None

    def _bad(self, expected: str, found: str, offset: int) -> CheckpointCorruptError:
        wanted = f"{show_path(self._path)}: {expected:.200}"
        return stored.damaged(self.file.path, expected=wanted, found=f"{found:.200}, at byte {offset}")


def _take_list(entries: dict[Path, Any], name: str) -> list[Any]:
    """Take `name/0`, `name/1`, ... out of `entries`, as far as they go."""
    values = []
    while (name, str(len(values))) in entries:
        values.append(entries.pop((name, str(len(values)))))
    return values


def _is_chunk(value: Any) -> bool:
    return isinstance(value, Stored) and len(value.shape) == 1


# --- metadata beside the file -------------------------------------------------------------------------------


def _metadata_file(file: FilePath) -> FilePath:
    return file.with_name(file.name + ".metadata.json")


def _read_metadata(file: FilePath, size: int) -> tuple[dict[str, Any], str]:
    beside = _metadata_file(file)
    if not beside.is_file():
        return {}, ""
    content = stored.read_json(beside)
    metadata = content.get("metadata")
    if not isinstance(metadata, dict):
        raise stored.damaged(beside, expected="an object 'metadata'", found=f"the keys {sorted(content)[:6]}")
    if content.get("size") != size:
        return {}, f"; {beside.name} is of another file and left out"
    return metadata, ""


# --- sink ---------------------------------------------------------------------------------------------------


class MsgpackSink(FileSink):
    """Writes what `flax.serialization.to_bytes` would, in the order of `tree.order`, batch by batch.

    Lists and tuples become dicts of '0', '1', ..., empty ones `{}`. The metadata goes beside it, into
    `NAME.metadata.json`, since msgpack has no place for it.
    """

    format = "msgpack"

    def __init__(self, path: str | FilePath, tree: Tree, *, resume: bool = False, chunk_bytes: int = _CHUNK_BYTES):
        self._chunk_bytes = chunk_bytes
        self._next, self._size = 0, 0  # which leaf comes next, and where
        super().__init__(path, tree, resume=resume)

    def _lay_out(self) -> None:
        super()._lay_out()
        deepest = max([*self.tree.leaves, *self.tree.empty], key=len, default=())
        if len(deepest) > _DEEPEST:
            start = show_path(deepest[:5])
            raise self._unstorable(f"keys nested at most {_DEEPEST} deep", f"{start}/..., {len(deepest)} deep")
        try:
            self._before, self._tail = _skeleton(self.tree)
        except UnicodeEncodeError as error:
            raise self._unstorable("keys that are text", str(error)) from error

    def _needed_bytes(self) -> int:
        return self._size

    def _put_leaves(self, leaves: Mapping[Path, Any]) -> Record:
        expected = self.tree.order[self._next : self._next + len(leaves)]
        for path, wanted in zip(leaves, expected, strict=True):
            if path != wanted:
                raise self._unstorable(f"leaves in the order of tree.order: {show_path(wanted)}", show_path(path))
        offset = self._size
        for path, value in leaves.items():
            offset = self._put_leaf(self.put(offset, self._before[path]), path, value)
        return {"count": self._next + len(leaves), "size": offset}

    def _take_leaves(self, record: Record) -> Iterable[Path]:
        first, self._next, self._size = self._next, record["count"], record["size"]
        return self.tree.order[first : self._next]

    def _complete(self, metadata: Mapping[str, Any]) -> FilePath:
        size = self.put(self._size, self._tail)
        content = self.whole(size)
        beside = _metadata_file(self.path)
        new = beside.with_name(beside.name + ".new")
        write_durably(new, json.dumps({"size": size, "metadata": dict(metadata)}))
        os.replace(new, beside)
        sync_folder(beside.parent)
        return content

    def _put_leaf(self, offset: int, path: Path, value: Any) -> int:
        if isinstance(value, np.generic):
            return self._put_array(offset, np.asarray(value), _SCALAR)
        if isinstance(value, complex):
            return self.put(offset, msgpack.packb(msgpack.ExtType(_COMPLEX, msgpack.packb([value.real, value.imag]))))
        if isinstance(value, bool | int | float | str):
            try:
                return self.put(offset, msgpack.packb(value))
            except (OverflowError, ValueError) as error:
                raise self._unstorable(
                    f"{show_path(path)}: what msgpack can hold", f"{value!r:.80}: {error}"
                ) from error
        array = np.asarray(value)
        if array.nbytes <= self._chunk_bytes:
            return self._put_array(offset, array, _ARRAY)
        return self._put_chunks(offset, array)

    def _put_array(self, offset: int, array: np.ndarray, code: int) -> int:
        offset = self.put(offset, _array_head(array.shape, array.dtype, code))
        return self.put_array(offset, array)

    def _put_chunks(self, offset: int, array: np.ndarray) -> int:
        chunks = _Chunks(self, offset, array.shape, array.dtype, self._chunk_bytes)
        for piece in pieces(array):
            chunks.put(piece)
        return chunks.offset

    def _begin_blocks(self, leaf: Leaf, first: Any) -> _Blocks:
        """What comes before the leaf is written here, and its bytes as they come."""
        wanted = self.tree.order[self._next]
        if leaf.path != wanted:
            raise self._unstorable(f"leaves in the order of tree.order: {show_path(wanted)}", show_path(leaf.path))
        offset = self.put(self._size, self._before[leaf.path])
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        if math.prod(shape) * dtype.itemsize > self._chunk_bytes:
            return _Blocks(self, _Chunks(self, offset, shape, dtype, self._chunk_bytes), self._next + 1)
        return _Blocks(self, _Plain(self, self.put(offset, _array_head(shape, dtype, _ARRAY))), self._next + 1)


class _Plain:
    """The bytes of an array in row-major order, one after the other."""

    def __init__(self, sink: FileSink, offset: int):
        self._sink, self.offset = sink, offset

    def put(self, piece: memoryview) -> None:
        """Write the next bytes."""
        self.offset = self._sink.put(self.offset, piece)


class _Chunks:
    """The same, cut as flax cuts arrays near msgpack's limit: flat parts of 2^30 bytes, each with a head."""

    def __init__(self, sink: FileSink, offset: int, shape: Shape, dtype: np.dtype, chunk_bytes: int):
        self._sink, self._dtype = sink, dtype
        self._count, self._size = max(1, chunk_bytes // dtype.itemsize), math.prod(shape)
        self._index, self._left = 0, 0  # the next chunk, and bytes to come of the one before
        sizes = {str(axis): size for axis, size in enumerate(shape)}
        packer = msgpack.Packer()
        head = packer.pack_map_header(3) + msgpack.packb(_CHUNKED) + msgpack.packb(True) + msgpack.packb("shape")
        head += msgpack.packb(sizes) + msgpack.packb("chunks")
        self.offset = sink.put(offset, head + packer.pack_map_header(math.ceil(self._size / self._count)))

    def put(self, piece: memoryview) -> None:
        """Write the next bytes, and a head wherever a chunk begins."""
        while piece:
            if not self._left:
                self._begin()
            part, piece = piece[: self._left], piece[self._left :]
            self.offset = self._sink.put(self.offset, part)
            self._left -= len(part)

    def _begin(self) -> None:
        count = min(self._count, self._size - self._index * self._count)
        head = msgpack.packb(str(self._index)) + _array_head((count,), self._dtype, _ARRAY)
        self.offset = self._sink.put(self.offset, head)
        self._index, self._left = self._index + 1, count * self._dtype.itemsize


class _Blocks:
    """One array that is written block by block; it is the leaf before the one of number `after`."""

    def __init__(self, sink: FileSink, rest: _Plain | _Chunks, after: int):
        self._sink, self._rest, self._after = sink, rest, after

    def put(self, region: Region, value: Any) -> None:
        """Write the next block."""
        for piece in pieces(np.asarray(value)):
            self._rest.put(piece)

    def end(self) -> list[Record]:
        """What the journal must know."""
        self._sink.sync()
        return [{"count": self._after, "size": self._rest.offset}]


def _skeleton(tree: Tree) -> tuple[dict[Path, bytes], bytes]:
    """What stands before each leaf (headers, keys, empty entries), and after the last one."""
    packer = msgpack.Packer()
    entries = depth_first(tree)
    children: dict[Path, set[str]] = {}
    for path in entries:
        for depth, key in enumerate(path):
            children.setdefault(path[:depth], set()).add(key)
    before: dict[Path, bytes] = {}
    pending, opened = b"", set()
    for path in entries:
        for depth, key in enumerate(path):
            node, child = path[:depth], path[: depth + 1]
            if node not in opened:
                opened.add(node)
                pending += packer.pack_map_header(len(children[node]))
            if child not in opened:  # it comes first here, and is opened in the next round, or is the entry itself
                pending += msgpack.packb(key)
        if path in tree.empty:
            pending += msgpack.packb(None if tree.empty[path] == "None" else {})
        else:
            before[path], pending = pending, b""
    if not entries:
        pending = packer.pack_map_header(0)
    return before, pending


def _array_head(shape: Shape, dtype: np.dtype, code: int) -> bytes:
    """What stands before the bytes of an array."""
    nbytes = math.prod(shape) * dtype.itemsize
    inner = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name) + _bin_head(nbytes)
    return _ext_head(code, len(inner) + nbytes) + inner


def _bin_head(length: int) -> bytes:
    return _sized(length, (0xC4, 0xC5, 0xC6))


def _ext_head(code: int, length: int) -> bytes:
    if length in (1, 2, 4, 8, 16):
        return bytes([0xD4 + int(math.log2(length)), code])
    return _sized(length, (0xC7, 0xC8, 0xC9)) + bytes([code])


def _sized(length: int, tags: tuple[int, int, int]) -> bytes:
    small, middle, large = tags
    if length < 1 << 8:
        return bytes([small, length])
    if length < 1 << 16:
        return bytes([middle]) + length.to_bytes(2, "big")
    return bytes([large]) + length.to_bytes(4, "big")
