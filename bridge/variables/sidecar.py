"""Metadata of Linen variables apart from their values: plain arrays for the checkpoint, JSON beside it.

Law: `join_metadata(*split_metadata(v)) == v`, with the same boxes, and the sidecar survives `json.dumps`; nothing is
left out unsaid. The input is never touched.
Knows trees and boxes; knows nothing of files, modules or meshes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec

from bridge._types import Path
from bridge.variables._errors import SidecarError, UnsayableMetadataError
from bridge.variables.kinds import collection_of, variable_type
from bridge.variables.mapping import leaves, tree_of
from bridge.variables.metadata import LinenBox, NNXMeta

_LINEN = {kind.__name__: kind for kind in (nn.Partitioned, nn.LogicallyPartitioned)}
_FIELDS = ("names", "mesh", "rules")


def split_metadata(
    variables: Mapping[str, Any], leave_out: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The values without boxes, and the boxes without values.

    Args:
      variables: {collection: tree} of any Mapping, boxed or not.
      leave_out: metadata that is not to be kept, by name: `mesh`, hooks (`on_add_axis`), ...

    Returns:
      (plain, sidecar): nested dicts of plain values, which Linen and NNX apply as they are, and one entry for each
      box, of what JSON and msgpack can say.

    Raises:
      UnsayableMetadataError: if there is other metadata: a function, a mesh, a box of the user's own type.

    >>> import json, jax.numpy as jnp
    >>> variables = {"params": {"w": nn.Partitioned(jnp.ones((2, 3)), ("in", None))}}
    >>> plain, sidecar = split_metadata(variables)
    >>> plain["params"]["w"].shape, json.dumps(sidecar[0]["boxes"])
    ((2, 3), '[{"box": "Partitioned", "names": {"tuple": ["in", null]}}]')
    >>> join_metadata(plain, sidecar)["params"]["w"].names
    ('in', None)
    """
    plain, sidecar = [], []
    for location, value in leaves(variables):
        value, boxes = _opened(value, location, leave_out)
        plain.append((location, value))
        if boxes:
            sidecar.append({"path": list(location), "boxes": boxes})
    return tree_of(plain), sidecar


def join_metadata(plain: Mapping[str, Any], sidecar: list[dict[str, Any]]) -> dict[str, Any]:
    """The variables that `split_metadata` took apart: boxes of `sidecar` around the values of `plain`.

    Args:
      plain: values, restored or converted; those that Linen saved from its own boxes, `{"value": array}`, will do.
      sidecar: as `split_metadata` made it, also after JSON. A value without an entry stays plain.

    Raises:
      SidecarError: if an entry has no value, or names a box that there is not.
    """
    values = dict(leaves(plain))
    for entry in sidecar:
        location = tuple(entry["path"])
        inside = (*location, "value")  # of a box that Linen saved as a dict
        if location not in values and inside in values:
            values[location] = values.pop(inside)
        if location not in values:
            raise SidecarError(location, "a value", "none")
        for box in entry["boxes"]:
            values[location] = _closed(values[location], box, location)
    return tree_of(values.items())


def _opened(value: Any, location: Path, leave_out: Collection[str]) -> tuple[Any, list[dict[str, Any]]]:
    """What is in all boxes, and the boxes, innermost first."""
    boxes: list[dict[str, Any]] = []
    while isinstance(value, meta.AxisMetadata):
        boxes.insert(0, _said_box(value, location, leave_out))
        value = value.value  # type: ignore[attr-defined]  # of the boxes that can be said
    return value, boxes


def _said_box(box: meta.AxisMetadata[Any], location: Path, leave_out: Collection[str]) -> dict[str, Any]:
    if isinstance(box, NNXMeta):
        metadata = _said_fields(box.metadata, location, leave_out)
        return {"box": "NNXMeta", "type": collection_of(box.var_type), "metadata": metadata}
    if type(box) not in _LINEN.values():
        raise UnsayableMetadataError(location, None, box)
    fields = {name: getattr(box, name, None) for name in _FIELDS}
    set_fields = {name: x for name, x in fields.items() if x is not None}
    return {"box": type(box).__name__, **_said_fields(set_fields, location, leave_out)}


def _said_fields(fields: Mapping[str, Any], location: Path, leave_out: Collection[str]) -> dict[str, Any]:
    return {key: _said(x, location, key, leave_out) for key, x in fields.items() if key not in leave_out}


def _said(x: Any, location: Path, key: str, leave_out: Collection[str]) -> Any:
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, LinenBox):
        return {"inside": _said_box(x.template, location, leave_out)}
    if isinstance(x, list | tuple | PartitionSpec):
        items = [_said(item, location, key, leave_out) for item in x]
        if isinstance(x, list):
            return items
        return {"spec" if isinstance(x, PartitionSpec) else "tuple": items}
    raise UnsayableMetadataError(location, key, x)


def _closed(value: Any, said: Mapping[str, Any], location: Path) -> meta.AxisMetadata[Any]:
    if said["box"] == "NNXMeta":
        metadata = {key: _meant(x, location) for key, x in said["metadata"].items()}
        return NNXMeta(variable_type(said["type"]), value, metadata)
    if said["box"] not in _LINEN:
        raise SidecarError(location, f"a box that is one of {['NNXMeta', *_LINEN]}", repr(said["box"]))
    fields = {key: _meant(x, location) for key, x in said.items() if key != "box"}
    return _LINEN[said["box"]](value, **{"names": (), **fields})


def _meant(x: Any, location: Path) -> Any:
    if isinstance(x, list):
        return [_meant(item, location) for item in x]
    if not isinstance(x, Mapping):
        return x
    [(kind, content)] = x.items()
    if kind == "inside":
        return LinenBox(_closed(None, content, location))
    items = [_meant(item, location) for item in content]
    return PartitionSpec(*items) if kind == "spec" else tuple(items)
