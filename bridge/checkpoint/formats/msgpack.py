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
from bridge._types import Path
from bridge.checkpoint.formats import stored
from bridge.checkpoint.formats.journal import Record, sync_folder, write_durably
from bridge.checkpoint.formats.one_file import FileSink
from bridge.checkpoint.formats.stored import ArrayFile, FileSource, Stored, number_type, pieces
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
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


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

    def _value(self, at: int, end: int, path: Path) -> int:
        """Note what begins at `at`; where it ends. Nothing of it may lie at or past `end`."""
        self._path, self._count = path, self._count + 1
        if self._count > _MOST_ENTRIES or len(path) > _DEEPEST:
            raise self._bad(f"at most {_MOST_ENTRIES} entries, {_DEEPEST} deep", "more", at)
        kind, content, start = self._head(at, end)
        if kind in ("map", "array"):
            return self._container(kind, content, start, end, path)
        if kind == "ext":
            return self._extension(*content, start, path)
        if kind == "bin":
            raise self._bad("arrays, numbers, strings or None", f"{content} raw bytes", at)
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

    def _container(self, kind: str, count: int, at: int, end: int, path: Path) -> int:
        if count * (2 if kind == "map" else 1) > end - at:
            raise self._bad(f"{count} entries", f"{end - at} bytes", at)
        if not count:
            self.empty[path] = "Dict" if kind == "map" else "List"
        if kind == "array":
            self.sequences.update([path] if count else [])
            for index in range(count):
                at = self._value(at, end, (*path, str(index)))
            return at
        keys: set[str] = set()
        before = len(self.leaves)
        for _ in range(count):
            self._path = path
            key, at = self._key(at, end)
            if key in keys:
                raise self._bad("each key once", f"{key!r} twice", at)
            keys.add(key)
            at = self._value(at, end, (*path, key))
        if _CHUNKED in keys:
            self._join_chunks(path, before, at)
        return at

    def _key(self, at: int, end: int) -> tuple[str, int]:
        kind, length, start = self._head(at, end)
        if kind != "str":
            raise self._bad("a key, which is text", kind, at)
        return self._text(start, length), start + length

    # leaves

    def _extension(self, code: int, length: int, at: int, path: Path) -> int:
        end = at + length
        if code in (_ARRAY, _SCALAR):
            array = self._array(at, end)
            if code == _SCALAR:
                if array.shape:
                    raise self._bad("a scalar", f"shape {array.shape}", at)
                self.scalars.add(path)
            self._leaf(path, self.arrays, array)
        elif code == _COMPLEX:
            (real, imag), after = self._numbers(at, end)
            if after != end:
                raise self._bad("two numbers", f"{end - after} more bytes", after)
            self._leaf(path, self.values, complex(real, imag))
        else:
            raise self._bad("one of flax's extension types, 1 to 3", str(code), at)
        return end

    def _numbers(self, at: int, end: int, count: int | None = 2) -> tuple[list[Any], int]:
        kind, length, at = self._head(at, end)
        if kind != "array" or (count is not None and length != count) or length > end - at:
            raise self._bad(f"{'some' if count is None else count} numbers", f"{kind} of {length}", at)
        found = []
        for _ in range(length):
            kind, value, at = self._head(at, end)
            if kind != "number":
                raise self._bad("a number", kind, at)
            found.append(value)
        return found, at

    def _array(self, at: int, end: int) -> Stored:
        kind, length, start = self._head(at, end)
        if (kind, length) != ("array", 3):
            raise self._bad("shape, dtype and bytes of an array", f"{kind} of {length}", at)
        shape, start = self._numbers(start, end, None)
        kind, length, start = self._head(start, end)
        name = self._text(start, length) if kind in ("str", "bin") else kind
        dtype = number_type(name)
        if dtype is None:
            raise self._bad("the name of a number type", repr(name)[:80], start)
        at = start + length
        kind, length, start = self._head(at, end)
        size = stored.array_bytes(shape, dtype)
        if kind not in ("bin", "str") or size != length or start + length != end:
            raise self._bad(f"{size} bytes for {name}{shape}", f"{kind} of {length}, with {end - start} left", at)
        return Stored(self.file, ((start, length),), tuple(shape), dtype)

    def _join_chunks(self, path: Path, before: int, at: int) -> None:
        """The entries of the map that has just been read are the shape and the parts of one large array."""
        parts: dict[Path, Any] = {}
        self._path = path
        while len(self.leaves) > before:
            place, _ = self.leaves.popitem()
            parts[place[len(path) :]] = self.arrays.pop(place, None) or self.values.pop(place)
        parts.pop((_CHUNKED,), None)
        shape = [parts.pop(("shape", str(index)), None) for index in range(sum(key[0] == "shape" for key in parts))]
        chunks = [parts.pop(("chunks", str(index)), None) for index in range(len(parts))]
        whole = bool(chunks) and all(isinstance(chunk, Stored) and len(chunk.shape) == 1 for chunk in chunks)
        if parts or not whole or len({chunk.dtype for chunk in chunks}) != 1:
            raise self._bad("shape and chunks of one array", "others", at)
        spans = tuple(span for chunk in chunks for span in chunk.spans)
        if stored.array_bytes(shape, chunks[0].dtype) != sum(length for _, length in spans):
            raise self._bad(f"chunks for {chunks[0].dtype}{shape}", f"{sum(n for _, n in spans)} bytes", at)
        self._leaf(path, self.arrays, Stored(self.file, spans, tuple(shape), chunks[0].dtype))

    # bytes

    def _head(self, at: int, end: int) -> tuple[str, Any, int]:
        """Kind and content, or length, of what begins at `at`, and where its content begins."""
        tag = self._bytes(at, 1, end)[0]
        at += 1
        if tag <= 0x7F or tag >= 0xE0:
            return "number", tag if tag <= 0x7F else tag - 256, at
        if tag <= 0xBF:
            kind, mask = ("map", 15) if tag <= 0x8F else ("array", 15) if tag <= 0x9F else ("str", 31)
            return self._room(kind, tag & mask, at, end)
        if tag in _CONSTANTS:
            return ("number" if tag != 0xC0 else "nil"), _CONSTANTS[tag], at
        if tag in _NUMBERS:
            size = struct.calcsize(_NUMBERS[tag])
            return "number", struct.unpack(_NUMBERS[tag], self._bytes(at, size, end))[0], at + size
        if tag in _SIZED:
            kind, width = _SIZED[tag]
            length, at = int.from_bytes(self._bytes(at, width, end), "big"), at + width
        elif 0xD4 <= tag <= 0xD8:
            kind, length = "ext", 1 << tag - 0xD4
        else:
            raise self._bad("msgpack", f"the byte {tag:#x}, which begins nothing", at - 1)
        if kind == "ext":
            code = int.from_bytes(self._bytes(at, 1, end), "big", signed=True)
            self._room(kind, length, at + 1, end)
            return kind, (code, length), at + 1
        return self._room(kind, length, at, end)

    def _room(self, kind: str, length: int, at: int, end: int) -> tuple[str, int, int]:
        if kind not in ("map", "array") and length > end - at:
            raise self._bad(f"{length} bytes", f"{end - at}", at)
        return kind, length, at

    def _bytes(self, at: int, count: int, end: int) -> bytes:
        if at + count > end:
            raise self._bad(f"{count} bytes", f"{end - at}", at)
        return self._data[at : at + count]

    def _text(self, at: int, length: int) -> str:
        try:
            return self._data[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise self._bad("text", f"bytes that are not UTF-8: {error.reason}", at) from None

    def _bad(self, expected: str, found: str, at: int) -> CheckpointCorruptError:
        return stored.damaged(
            self.file.path, expected=f"{show_path(self._path)}: {expected:.200}", found=f"{found:.200}, at byte {at}"
        )


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
        except (ValueError, UnicodeEncodeError) as error:
            raise self._unstorable("keys that are text", str(error)) from error

    def _needed_bytes(self) -> int:
        return self._size

    def _put_leaves(self, leaves: Mapping[Path, Any]) -> Record:
        expected = self.tree.order[self._next : self._next + len(leaves)]
        for path, wanted in zip(leaves, expected, strict=True):
            if path != wanted:
                raise self._unstorable(f"leaves in the order of tree.order: {show_path(wanted)}", show_path(path))
        at = self._size
        for path, value in leaves.items():
            at = self._put_leaf(self.put(at, self._before[path]), path, value)
        return {"count": self._next + len(leaves), "size": at}

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

    def _put_leaf(self, at: int, path: Path, value: Any) -> int:
        if isinstance(value, np.generic):
            return self._put_array(at, np.asarray(value), _SCALAR)
        if isinstance(value, complex):
            return self.put(at, msgpack.packb(msgpack.ExtType(_COMPLEX, msgpack.packb([value.real, value.imag]))))
        if isinstance(value, bool | int | float | str):
            try:
                return self.put(at, msgpack.packb(value))
            except (OverflowError, ValueError) as error:
                raise self._unstorable(
                    f"{show_path(path)}: what msgpack can hold", f"{value!r:.80}: {error}"
                ) from error
        array = np.asarray(value)
        if array.nbytes <= self._chunk_bytes:
            return self._put_array(at, array, _ARRAY)
        return self._put_chunks(at, array)

    def _put_array(self, at: int, array: np.ndarray, code: int) -> int:
        inner = b"\x93" + msgpack.packb(array.shape) + msgpack.packb(array.dtype.name) + _bin_head(array.nbytes)
        at = self.put(at, _ext_head(code, len(inner) + array.nbytes) + inner)
        return self.put_array(at, array)

    def _put_chunks(self, at: int, array: np.ndarray) -> int:
        """As flax cuts arrays near msgpack's limit: flat parts of 2^30 bytes."""
        shape = {str(axis): size for axis, size in enumerate(array.shape)}
        count = max(1, self._chunk_bytes // array.dtype.itemsize)
        starts = range(0, array.size, count)
        packer = msgpack.Packer()
        head = packer.pack_map_header(3) + msgpack.packb(_CHUNKED) + msgpack.packb(True) + msgpack.packb("shape")
        head += msgpack.packb(shape) + msgpack.packb("chunks") + packer.pack_map_header(len(starts))
        at = self.put(at, head)
        rest = _Flat(array)
        for index, start in enumerate(starts):
            size = min(count, array.size - start)
            inner = b"\x93" + msgpack.packb((size,)) + msgpack.packb(array.dtype.name)
            inner += _bin_head(size * array.dtype.itemsize)
            head = msgpack.packb(str(index)) + _ext_head(_ARRAY, len(inner) + size * array.dtype.itemsize)
            at = self.put(at, head + inner)
            for piece in rest.take(size * array.dtype.itemsize):
                at = self.put(at, piece)
        return at


class _Flat:
    """The bytes of an array in row-major order, handed out in runs."""

    def __init__(self, array: np.ndarray):
        self._pieces = pieces(array)
        self._rest = memoryview(b"")

    def take(self, count: int) -> Any:
        """The next `count` bytes, in pieces."""
        while count:
            if not self._rest:
                self._rest = next(self._pieces)
            piece, self._rest = self._rest[:count], self._rest[count:]
            count -= len(piece)
            yield piece


def _skeleton(tree: Tree) -> tuple[dict[Path, bytes], bytes]:
    """What stands before each leaf (headers, keys, empty entries), and after the last one."""
    packer = msgpack.Packer()
    children: dict[Path, dict[str, None]] = {}
    entries = depth_first(tree)
    for path in entries:
        for depth in range(len(path)):
            children.setdefault(path[:depth], {})[path[depth]] = None
    before, pending, opened = {}, b"", set()
    for path in entries:
        for depth in range(len(path)):
            if path[:depth] not in opened:
                opened.add(path[:depth])
                pending += packer.pack_map_header(len(children[path[:depth]]))
            if path[: depth + 1] not in opened:
                pending += msgpack.packb(path[depth])
        if path in tree.empty:
            pending += msgpack.packb(None if tree.empty[path] == "None" else {})
        else:
            before[path], pending = pending, b""
    if not entries:
        pending = packer.pack_map_header(0)
    return before, pending


def _bin_head(length: int) -> bytes:
    return _sized(length, (0xC4, 0xC5, 0xC6))


def _ext_head(code: int, length: int) -> bytes:
    if length in (1, 2, 4, 8, 16):
        return bytes([0xD4 + int(math.log2(length)), code])
    return _sized(length, (0xC7, 0xC8, 0xC9)) + bytes([code])


def _sized(length: int, tags: tuple[int, int, int]) -> bytes:
    width = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return bytes([tags[width]]) + length.to_bytes(1 << width, "big")
