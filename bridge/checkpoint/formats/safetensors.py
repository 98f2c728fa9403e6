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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._errors import CheckpointCorruptError, CheckpointWriteError, show_path
from bridge._types import Path
from bridge.checkpoint.formats import stored
from bridge.checkpoint.formats.journal import Record
from bridge.checkpoint.formats.one_file import FileSink, Run
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
    numbers: dict[Path, Callable[[np.ndarray], Any]] = {}
    for name in ours.get("numbers", []):
        if name not in names or spans[name].shape:
            raise stored.damaged(file, expected="scalars as Python's numbers", found="others in bridge.numbers")
        numbers[names[name]] = np.ndarray.item
    strings = _marks(ours, "strings")
    kinds = stored.kinds_of(content, strings)
    if len(kinds) != len(content) + len(strings):
        raise stored.damaged(file, expected="each path once", found="a string where an array is")
    return FileSource(
        path=file,
        format="safetensors",
        reason=reason,
        tree=stored.make_tree(file, kinds, _marks(ours, "empty"), map(tuple, ours.get("sequences", []))),
        stored=content,
        values=strings,
        finish=numbers,
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
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return table


def _spans(file: ArrayFile, header: Mapping[str, Any], start: int) -> dict[str, Stored]:
    """Where each array is. Any that lies elsewhere than right behind its predecessor is an error."""
    arrays = {name: _span(file, name, row, start) for name, row in header.items()}
    end = start
    for name, array in sorted(arrays.items(), key=lambda item: item[1].spans[0]):
        offset, size = array.spans[0]
        if offset != end:
            raise _bad_row(file, name, f"to begin at {end - start}, behind the one before", offset - start)
        end += size
    if end != file.size:
        raise stored.damaged(file.path, expected=f"{end} bytes, as the header says", found=f"{file.size}")
    return arrays


def _span(file: ArrayFile, name: str, row: Any, start: int) -> Stored:
    """The array of one row; `start` is where the first array begins."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad_row(file, name, "dtype, shape and data_offsets", row)
    type_name, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(type_name, str) or type_name not in _DTYPES:
        raise _bad_row(file, name, f"a dtype of {', '.join(_DTYPES)}", type_name)
    dtype = np.dtype(_DTYPES[type_name])
    size = stored.array_bytes(shape, dtype) if isinstance(shape, list) else None
    if size is None:
        raise _bad_row(file, name, "a shape", shape)
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise _bad_row(file, name, "where it begins and ends", offsets)
    begin, end = offsets
    if end - begin != size or begin < 0:
        raise _bad_row(file, name, f"{size} bytes for {type_name}{shape}", offsets)
    return Stored(file, ((start + begin, size),), tuple(shape), dtype)


def _bad_row(file: ArrayFile, name: str, expected: str, found: object) -> CheckpointCorruptError:
    return stored.damaged(file.path, expected=f"{name:.80}: {expected}", found=f"{found!r}"[:200])


def _read_ours(file: FilePath, metadata: Any) -> dict[str, Any]:
    """What `SafetensorsSink` wrote into `__metadata__`, and all else in it as `metadata`."""
    if not isinstance(metadata, dict) or not _are_texts(metadata.values()):
        raise stored.damaged(file, expected=f"texts in {_METADATA}", found=f"{metadata!r}"[:200])
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for name, text in metadata.items():
        key = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and key in _OURS:
            ours[key] = _read_entry(file, key, text)
        else:
            theirs[name] = text
    return {**ours, "metadata": {**theirs, **ours.get("metadata", {})}}


def _read_entry(file: FilePath, key: str, text: str) -> Any:
    """One entry of ours: JSON of the form that `_OURS` tells."""
    try:
        value = json.loads(text)
        whole = _OURS[key](value)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise stored.damaged(file, expected=f"{_PREFIX}{key} as it was written", found=text[:200])
    return value


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and _are_texts(value)


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_path, value))


def _are_marks(value: Any) -> bool:
    """Rows of a path and a text."""
    if not isinstance(value, list):
        return False
    for row in value:
        if not isinstance(row, list) or len(row) != 2 or not _is_path(row[0]) or not isinstance(row[1], str):
            return False
    return True


def _are_empty_marks(value: Any) -> bool:
    return _are_marks(value) and {mark for _, mark in value} <= {"None", "Dict", "List", "Tuple"}


#: What stands in `__metadata__` under `bridge.`, and what it must be.
_OURS: dict[str, Callable[[Any], bool]] = {
    "paths": lambda value: isinstance(value, dict) and _are_paths([*value.values()]),
    "numbers": _is_path,  # names
    "strings": _are_marks,
    "empty": _are_empty_marks,
    "sequences": _are_paths,
    "metadata": lambda value: isinstance(value, dict),
}


def _marks(ours: Mapping[str, Any], key: str) -> dict[Path, str]:
    return {tuple(path): text for path, text in ours.get(key, [])}


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
        self._spans: dict[Path, tuple[int, int]] = {}
        self._end_of_arrays = 0
        for leaf in sorted(arrays, key=lambda leaf: -np.dtype(leaf.dtype).itemsize):
            begin, nbytes = self._end_of_arrays, math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            self._end_of_arrays = begin + nbytes
            self._spans[leaf.path] = (begin, self._end_of_arrays)
        self._strings: dict[Path, str] = {}
        self._numbers: set[Path] = set()
        try:  # before the records: where the arrays begin must not depend on how far an earlier run came
            room = len(self._header({})) + _ROOM + _ROOM_OF_LEAF * len(self._leaves)
        except UnicodeEncodeError as error:
            raise self._unstorable("keys that are text", str(error)) from error
        for leaf in self.tree.leaves.values():
            if leaf.dtype == "str":  # as JSON in JSON: a control character is one byte, and seven then
                room += 7 * leaf.nbytes + 8
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
            begin, _ = self._spans[path]
            self.put_array(self._start + begin, array)
        return {"done": [self._index[path] for path in leaves], "strings": strings, "numbers": numbers}

    def _begin_blocks(self, leaf: Leaf, first: Any) -> Run:
        begin, _ = self._spans[leaf.path]
        return Run(self, self._start + begin, {"done": [self._index[leaf.path]], "strings": {}, "numbers": []})

    def _take_leaves(self, record: Record) -> Iterable[Path]:
        for index, text in record["strings"].items():
            self._strings[self._leaves[int(index)]] = text
        for index in record["numbers"]:
            self._numbers.add(self._leaves[index])
        return [self._leaves[index] for index in record["done"]]

    def _complete(self, metadata: Mapping[str, Any]) -> FilePath:
        header = self._header(metadata)
        room = self._start - 8
        if len(header) > room:
            room = math.ceil(len(header) / 8) * 8
        padded = header.ljust(room)
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
            leaf, span = self.tree.leaves[path], self._spans[path]
            rows[name] = {"dtype": _NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": list(span)}
        ours: dict[str, Any] = {
            "paths": self._paths_by_name(),
            "numbers": [self._names[path] for path in self.tree.leaves if path in self._numbers],
            "strings": list(self._strings.items()),
            "empty": list(self.tree.empty.items()),
            "sequences": sorted(self.tree.sequences),
            "metadata": dict(metadata),
        }
        entries = {_PREFIX + key: json.dumps(value) for key, value in ours.items() if value}
        table = {_METADATA: entries, **rows} if entries else rows
        return json.dumps(table, ensure_ascii=False).encode()

    def _paths_by_name(self) -> dict[str, list[str]]:
        """The path of each array; nothing if splitting the names, as a reader does, tells them."""
        by_name = {name: path for path, name in self._names.items()}
        if stored.split_names(by_name) == by_name:
            return {}
        return {name: list(path) for name, path in by_name.items()}


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
