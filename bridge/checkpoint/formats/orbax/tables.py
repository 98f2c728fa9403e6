"""The tables that Orbax keeps beside the arrays of a checkpoint, as JSON.

Law: for the same tree they say what Orbax's own would: name and type of each key, type of each leaf, generators of
random keys, texts. Tests hold them equal.
Knows rows and trees; writes nothing.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from bridge._errors import CheckpointWriteError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats.journal import Record
from bridge.checkpoint.formats.orbax.files import first_clash, name_of, points_out
from bridge.checkpoint.formats.protocol import JSON_ITEMS
from bridge.checkpoint.tree.tree import Tree

HANDLERS = {
    "v0": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
    "v1": "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler",
}
_JSON = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"
# Arrays are stored in chunks of at most this size, along their first axes: each is compressed by itself, and a reader
# of one layer of a stack reads that layer.
_CHUNK = 8 << 20
# Restored by Orbax as jax.Arrays, these would become 32 bits wide unless x64 is on.
_WIDE = ("int64", "uint64", "float64", "complex128")
_SEQUENCE, _DICT = 1, 2  # Orbax's key_type


@dataclass(frozen=True)
class Row:
    """What the tables say of one leaf on disk: a line of the journal.

    `kind` is Orbax's name of the type; `impl` the generator of typed random keys; `text` the content of a string.
    """

    path: Path
    kind: str
    shape: Shape = ()
    chunk: Shape = ()
    impl: str | None = None
    text: str | None = None

    @property
    def name(self) -> str:
        """Orbax's name of the array: the keys joined by dots."""
        return name_of(self.path)


def row_of(path: Path, value: Any, shape: Shape | None = None) -> Row:
    """The row of a leaf: array, typed random keys, Python or numpy number, string.

    Args:
      shape: of the array that `value` is a block of; by default `value` is all of it.
    """
    if isinstance(value, str):
        return Row(path, "string", text=value)
    if isinstance(value, bool | int | float | complex | np.generic):
        return Row(path, "scalar")
    impl = None
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl, value = str(jax.random.key_impl(value)), jax.random.key_data(value)
    kind = "jax.Array"
    if value.dtype.name in _WIDE and not isinstance(value, jax.Array):
        kind = "np.ndarray"
    shape = tuple(value.shape) if shape is None else shape
    return Row(path, kind, shape, chunk_of(shape, value.dtype.itemsize), impl)


def record_of(row: Row) -> Record:
    """The row as a line of a journal."""
    return asdict(row)


def row_of_record(record: Record) -> Row:
    """The row that `record_of` made the record from, which may have been JSON meanwhile."""
    as_tuples = {name: tuple(record[name]) for name in ("path", "shape", "chunk")}
    return Row(**{**record, **as_tuples})


def check_names(path: FilePath, tree: Tree) -> None:
    """Orbax joins keys with dots: of `a.b` and `a`/`b` only one would be on disk, and the other lost.

    Raises CheckpointWriteError, which names `path`.
    """
    if clash := first_clash(tree.leaves):
        first, second = map(show_path, clash)
        raise CheckpointWriteError(
            "Orbax cannot tell two leaves apart",
            path,
            expected="one name for each leaf, its keys joined by dots",
            found=f"{first} and {second} are both {name_of(clash[0])!r}",
            hint="Rename one of them with a rule.",
        )
    for leaf in tree.leaves:
        name = name_of(leaf)
        if not name or points_out(name):
            raise CheckpointWriteError(
                "Orbax cannot store a leaf of this name",
                path,
                expected="at least one key, and none that points out of the checkpoint",
                found=repr(leaf),
                hint="Rename it with a rule.",
            )


def take_json_items(metadata: Mapping[str, Any], besides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items that hold JSON, and the metadata without them; what cannot be the name of a folder stays there."""
    rest = dict(metadata)
    stored = rest.get(JSON_ITEMS)
    if not isinstance(stored, dict):
        return {}, rest
    items = {name: content for name, content in stored.items() if name != besides and _is_folder_name(name)}
    kept = {name: content for name, content in stored.items() if name not in items}
    del rest[JSON_ITEMS]
    return items, ({**rest, JSON_ITEMS: kept} if kept else rest)


def _is_folder_name(name: str) -> bool:
    """Orbax takes folders with `_` or `.` in front for its own."""
    return bool(name) and not name.startswith((".", "_")) and not set("/\0") & set(name)


def save_tables(
    path: FilePath,
    version: str,
    item: str | None,
    metadata: dict[str, Any],
    started: int,
    json_items: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The files in the checkpoint's folder that tell of the save, by name.

    Args:
        path: where the checkpoint will be.
        version, item: as for `OrbaxSink`.
        metadata: JSON types, Orbax's custom metadata.
        started: when the save began, in nanoseconds since 1970.
        json_items: name -> content of items that hold JSON.
    """
    json_items = json_items or {}
    saved = {
        "item_handlers": {item: HANDLERS[version], **dict.fromkeys(json_items, _JSON)} if item else HANDLERS[version],
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": metadata,
    }
    files = {
        "_CHECKPOINT_METADATA": json.dumps(saved),
        "commit_success.txt": f"Checkpoint commit was successful to {path}",
    }
    if version == "v1":
        files["orbax.checkpoint"] = ""
    for name, content in json_items.items():
        # What a CheckpointManager calls the file of its own item, and JsonSave that of any other.
        file = "metrics" if name == "metrics" else "metadata"
        files[f"{name}/{file}"] = json.dumps(content)
        files[f"{name}/commit_success.txt"] = files["commit_success.txt"]
    return files


def item_tables(tree: Tree, rows: Sequence[Row], version: str) -> dict[str, str]:
    """The files beside the arrays, by name; `rows` are those of all leaves of `tree`."""
    table = {
        "tree_metadata": dict(_entries(tree, rows)),
        "use_ocdbt": True,
        "use_zarr3": version == "v1",
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    device = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(jax.local_devices()[0])})
    shardings, arrays, texts = {}, [], {}
    for row in rows:
        if row.kind == "jax.Array":
            shardings[base64.b64encode(row.name.encode()).decode()] = device
            arrays.append(_array(row))
        elif row.text is not None:
            texts[row.name] = row.text
    files = {
        "_METADATA": json.dumps(table),
        "_sharding": json.dumps(shardings),
        "array_metadatas/process_0": json.dumps({"array_metadatas": arrays}),
    }
    if texts:
        files["_strings.json"] = json.dumps(_by_pointer(texts))
    return files


def _entries(tree: Tree, rows: Iterable[Row]) -> Iterable[tuple[str, dict[str, Any]]]:
    for row in rows:
        value: dict[str, Any] = {"value_type": row.kind, "skip_deserialize": False}
        if row.kind == "jax.Array":
            value["write_shape"] = row.shape
        yield str(row.path), {"key_metadata": _keys(tree, row.path), "value_metadata": value}
    for path, kind in tree.empty.items():
        value = {"value_type": kind, "skip_deserialize": True}
        yield str(path), {"key_metadata": _keys(tree, path), "value_metadata": value}


def _keys(tree: Tree, path: Path) -> list[dict[str, Any]]:
    keys = []
    for depth, key in enumerate(path):
        kind = _SEQUENCE if path[:depth] in tree.sequences else _DICT
        keys.append({"key": key, "key_type": kind})
    return keys


def chunk_of(shape: Shape, itemsize: int) -> Shape:
    """The shape of a chunk: the whole array, or as much of its first axes as fits into _CHUNK."""
    chunk = list(shape)
    for axis in range(len(shape)):
        rest = math.prod(chunk[axis + 1 :]) * itemsize
        chunk[axis] = max(1, min(shape[axis], _CHUNK // max(rest, 1)))
        if chunk[axis] * rest <= _CHUNK and chunk[axis] > 1:
            break
    return tuple(chunk)


def _array(row: Row) -> dict[str, Any]:
    extra = {"random_key_impl": row.impl} if row.impl else None
    return {
        "array_metadata": {
            "param_name": row.name,
            "write_shape": row.shape,
            "chunk_shape": row.chunk,
            "ext_metadata": extra,
        }
    }


def _by_pointer(texts: Mapping[str, str]) -> dict[str, Any]:
    """Texts by name as Orbax stores them: the name is a JSON pointer, which `/` splits."""
    table: dict[str, Any] = {}
    for name, text in texts.items():
        *folders, last = name.split("/")
        node = table
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = text
    return table
