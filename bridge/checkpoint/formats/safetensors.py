"""safetensors files: 8 bytes of length, a JSON header, arrays one after the other.

Law of the source: the header is believed only as far as the `safetensors` package would: offsets that follow each
other without a hole or an overlap up to the end of the file, sizes that are the shapes'.
Law of the sink: other programs read every array; what they have no place for (key tuples, empty entries, which numbers
are Python's, strings, metadata) stands as JSON in `__metadata__`, so that what was written comes back whole.
Knows the format; knows nothing of layouts.

The `safetensors` package is the oracle of the tests and not what reads here, because in numpy (0.8.0) it copies every
array (here a large one is a view of the file, so that a batch costs no memory before it is used), knows no float8,
cannot slice an array without elements, dies of a SIGBUS when the file has become shorter, takes the last of two arrays
of one name, and says neither where a header is wrong nor what it should be. It writes only what is all in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import CheckpointCorruptError, CheckpointWriteError, show_path
from bridge._types import Path
from bridge.checkpoint.formats import stored
from bridge.checkpoint.formats.journal import Record
from bridge.checkpoint.formats.one_file import FileSink
from bridge.checkpoint.formats.stored import ArrayFile, FileSource, Stored
from bridge.checkpoint.tree.layout import Leaf

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the package's own limit
_METADATA = "__metadata__"
_PREFIX = "bridge."
_ROOM = 4096  # kept in the header for the metadata, and as much for each leaf as a hash and its path take
_ROOM_OF_LEAF = 160


# --- source -------------------------------------------------------------------------------------------------


def open_safetensors(file: FilePath, reason: str = "it was said to be", separator: str | None = None) -> FileSource:
    """The safetensors file, or the index of several (`model.safetensors.index.json`), as a source.

    Args:
      separator: what joins keys in the names, in a file of another program. Default: see `stored.split_names`.

    Raises:
      CheckpointCorruptError: cut short, or a header that does not fit the file.
    """
    if file.suffix == ".json":
        table, _ = stored.read_index(file)
        separator = separator or stored.separator_of(table)
        return stored.open_shards(file, "safetensors", lambda part: open_safetensors(part, separator=separator))
    arrays = ArrayFile(file)
    header, start = _read_header(arrays)
    ours = _read_ours(file, header.pop(_METADATA, {}))
    names = _paths(file, list(header), ours, separator)
    spans = _spans(arrays, header, start)
    content = {path: spans[name] for name, path in names.items()}
    numbers = [names.get(name) for name in ours.get("numbers", [])]
    if any(path is None or content[path].shape for path in numbers):
        raise stored.damaged(file, expected="scalars as Python's numbers", found="others in bridge.numbers")
    strings = {tuple(path): text for path, text in ours.get("strings", [])}
    kinds = stored.kinds_of(content, strings)
    empty = {tuple(path): mark for path, mark in ours.get("empty", [])}
    if len(kinds) != len(content) + len(strings):
        raise stored.damaged(file, expected="each path once", found="a string where an array is")
    return FileSource(
        path=file,
        format="safetensors",
        reason=reason,
        tree=stored.make_tree(file, kinds, empty, map(tuple, ours.get("sequences", []))),
        stored=content,
        values=strings,
        finish=dict.fromkeys(numbers, np.ndarray.item),
        names={path: name for name, path in names.items()},
        metadata=ours.get("metadata", {}),
    )


def _read_header(file: ArrayFile) -> tuple[dict[str, Any], int]:
    """The JSON object, and where the arrays begin."""
    length = int.from_bytes(file.copy(0, 8), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(file.size - 8, _LONGEST_HEADER):
        raise stored.damaged(
            file.path, expected="8 bytes that say how long the header is", found=f"{length}, of {file.size} bytes"
        )
    try:
        header = json.loads(file.copy(8, length).decode(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:300]
        raise stored.damaged(file.path, expected="a header in JSON", found=found) from error
    if not isinstance(header, dict):
        raise stored.damaged(file.path, expected="a JSON object as header", found=type(header).__name__)
    return header, 8 + length


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _spans(file: ArrayFile, header: Mapping[str, Any], start: int) -> dict[str, Stored]:
    """Where each array is. Any that lies elsewhere than right behind its predecessor is an error."""
    found: dict[str, Stored] = {}
    for name, row in header.items():
        if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
            raise _bad_row(file, name, "dtype, shape and data_offsets", row)
        dtype = stored.number_type(_DTYPES.get(row["dtype"], "")) if isinstance(row["dtype"], str) else None
        if dtype is None:
            raise _bad_row(file, name, f"a dtype of {', '.join(_DTYPES)}", row["dtype"])
        size = stored.array_bytes(row["shape"], dtype) if isinstance(row["shape"], list) else None
        if size is None:
            raise _bad_row(file, name, "a shape", row["shape"])
        offsets = row["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int for at in offsets):
            raise _bad_row(file, name, "where it begins and ends", offsets)
        if offsets[1] - offsets[0] != size or offsets[0] < 0:
            raise _bad_row(file, name, f"{size} bytes for {row['dtype']}{row['shape']}", offsets)
        found[name] = Stored(file, ((start + offsets[0], size),), tuple(row["shape"]), dtype)
    at = start
    for name, array in sorted(found.items(), key=lambda item: item[1].spans[0]):
        (offset, size), at = array.spans[0], at
        if offset != at:
            raise _bad_row(file, name, f"to begin at {at - start}, behind the one before", offset - start)
        at += size
    if at != file.size:
        raise stored.damaged(file.path, expected=f"{at} bytes, as the header says", found=f"{file.size}")
    return found


def _bad_row(file: ArrayFile, name: str, expected: str, found: object) -> CheckpointCorruptError:
    return stored.damaged(file.path, expected=f"{name:.80}: {expected}", found=f"{found!r}"[:200])


def _read_ours(file: FilePath, metadata: Any) -> dict[str, Any]:
    """What `SafetensorsSink` wrote into `__metadata__`, and all else in it as `metadata`."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise stored.damaged(file, expected=f"texts in {_METADATA}", found=f"{metadata!r}"[:200])
    ours = {}
    for key, check in _OURS.items():
        if _PREFIX + key not in metadata:
            continue
        try:
            ours[key] = json.loads(metadata[_PREFIX + key])
            whole = check(ours[key])
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise stored.damaged(
                file, expected=f"{_PREFIX}{key} as it was written", found=metadata[_PREFIX + key][:200]
            )
    theirs = {key: value for key, value in metadata.items() if key.removeprefix(_PREFIX) not in _OURS}
    return {**ours, "metadata": {**theirs, **ours.get("metadata", {})}}


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) for key in value)


def _is_marks(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == 2 and _is_path(row[0]) and isinstance(row[1], str) for row in value
    )


#: What stands in `__metadata__` under `bridge.`, and what it must be.
_OURS = {
    "paths": lambda value: isinstance(value, dict) and all(map(_is_path, value.values())),
    "numbers": _is_path,  # names
    "strings": _is_marks,
    "empty": lambda value: _is_marks(value) and all(mark in ("None", "Dict", "List", "Tuple") for _, mark in value),
    "sequences": lambda value: isinstance(value, list) and all(map(_is_path, value)),
    "metadata": lambda value: isinstance(value, dict),
}


def _paths(file: FilePath, names: list[str], ours: Mapping[str, Any], separator: str | None) -> dict[str, Path]:
    if "paths" not in ours:
        return stored.split_names(names, separator)
    paths = {name: tuple(path) for name, path in ours["paths"].items()}
    if paths.keys() != set(names) or len(set(paths.values())) != len(names):
        raise stored.damaged(file, expected="a path for each array in bridge.paths", found="others")
    return {name: paths[name] for name in names}


# --- sink ---------------------------------------------------------------------------------------------------


class SafetensorsSink(FileSink):
    """Writes a safetensors file, leaf by leaf in any order, each at its place.

    Arrays stand by size of their number type, so that each is aligned; Python's numbers are scalars in it.
    """

    format = "safetensors"

    def _require_storable(self, leaf: Leaf) -> None:
        super()._require_storable(leaf)
        if leaf.dtype != "str" and leaf.dtype not in _NAMES:
            raise CheckpointWriteError(
                "safetensors has no such number type",
                self.path,
                expected=", ".join(_NAMES),
                found=f"{show_path(leaf.path)}: {leaf.dtype}{list(leaf.shape)}",
                hint="Cast it by a rule, or write msgpack or Orbax.",
            )

    def _lay_out(self) -> None:
        super()._lay_out()
        self._leaves = list(self.tree.leaves)
        self._index = {path: index for index, path in enumerate(self._leaves)}
        arrays = [leaf for leaf in self.tree.leaves.values() if leaf.dtype != "str"]
        self._names = _names([leaf.path for leaf in arrays])
        self._offsets, size = {}, 0
        for leaf in sorted(arrays, key=lambda leaf: -np.dtype(leaf.dtype).itemsize):
            self._offsets[leaf.path] = size
            size += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        self._end_of_arrays = size
        self._strings: dict[Path, str] = {}
        self._numbers: set[Path] = set()
        try:  # before the records: where the arrays begin must not depend on how far an earlier run came
            room = len(self._header({})) + _ROOM + _ROOM_OF_LEAF * len(self._leaves)
        except UnicodeEncodeError as error:
            raise self._unstorable("keys that are text", str(error)) from error
        # a string as JSON in JSON: a control character is one byte, and seven then
        room += sum(7 * leaf.nbytes + 8 for leaf in self.tree.leaves.values() if leaf.dtype == "str")
        self._start = 8 + math.ceil(room / 8) * 8

    def _needed_bytes(self) -> int:
        return self._start + self._end_of_arrays

    def _put_leaves(self, leaves: Mapping[Path, Any]) -> Record:
        strings, numbers = {}, []
        for path, value in leaves.items():
            if isinstance(value, str):
                strings[str(self._index[path])] = value
                continue
            if not hasattr(value, "dtype"):
                numbers.append(self._index[path])
            array = np.asarray(value, self.tree.leaves[path].dtype)
            self.put_array(self._start + self._offsets[path], array)
        return {"done": [self._index[path] for path in leaves], "strings": strings, "numbers": numbers}

    def _take_leaves(self, record: Record) -> Iterable[Path]:
        self._strings |= {self._leaves[int(index)]: text for index, text in record["strings"].items()}
        self._numbers |= {self._leaves[index] for index in record["numbers"]}
        return [self._leaves[index] for index in record["done"]]

    def _complete(self, metadata: Mapping[str, Any]) -> FilePath:
        header = self._header(metadata)
        room = self._start - 8
        padded = header.ljust(room if len(header) <= room else math.ceil(len(header) / 8) * 8)
        if len(padded) > _LONGEST_HEADER:
            raise self._unstorable(
                f"a header of at most {_LONGEST_HEADER} bytes", f"{len(padded)} bytes with its metadata"
            )
        head = len(padded).to_bytes(8, "little") + padded
        if len(head) > self._start:
            return self.with_head(head, self._start)
        self.put(0, head)
        return self.whole(self._needed_bytes())

    def _header(self, metadata: Mapping[str, Any]) -> bytes:
        rows: dict[str, Any] = {}
        for path, name in self._names.items():
            leaf, begin = self.tree.leaves[path], self._offsets[path]
            end = begin + math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            rows[name] = {"dtype": _NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [begin, end]}
        plain = stored.split_names(rows) == {name: path for path, name in self._names.items()}
        ours: dict[str, Any] = {
            "paths": None if plain else {name: list(path) for path, name in self._names.items()},
            "numbers": [self._names[path] for path in self.tree.leaves if path in self._numbers],
            "strings": list(self._strings.items()),
            "empty": list(self.tree.empty.items()),
            "sequences": sorted(self.tree.sequences),
            "metadata": dict(metadata),
        }
        said = {_PREFIX + key: json.dumps(value) for key, value in ours.items() if value}
        return json.dumps({**({_METADATA: said} if said else {}), **rows}, ensure_ascii=False).encode()


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each leaf: its keys joined by dots, made different where two would be the same."""
    names: dict[Path, str] = {}
    taken = {_METADATA}
    for path in paths:
        name = ".".join(path)
        while name in taken:
            name += "~"
        taken.add(name)
        names[path] = name
    return names
