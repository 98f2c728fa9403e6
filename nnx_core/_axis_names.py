"""Names of a value's axes, and what becomes of them when the value gets or loses an axis.

Law: `remove_name(insert_name(names, i, name), i) == names`. What says more than names, a NamedSharding
or a Format, keeps the rest. Knows nothing of Variables.
"""

from collections.abc import Callable
from typing import Any

from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding


class PaddedNames(tuple[Any, ...]):
    """Axis names that were too few for a new named axis, filled up with None; knows what they were."""

    before: tuple[Any, ...]
    index: int


def axis_names(sharding: Any) -> tuple[Any, ...]:
    """The names in what `out_sharding` may hold: a name, names, a PartitionSpec, Sharding or Format."""
    sharding = sharding_of(sharding)
    if isinstance(sharding, Sharding):
        sharding = getattr(sharding, "spec", ())
    return (sharding,) if isinstance(sharding, str) else tuple(sharding)


def sharding_of(names: Any) -> Any:
    """What a Format, which says the layout too, says of devices; anything else as it is."""
    return names.sharding if isinstance(names, Format) else names


def insert_name(names: Any, index: int, name: Any) -> Any:
    """Axis names after a new axis `name` appeared at `index` (negative: from the end of the names).

    Axes beyond the last name have none. `remove_name` with the same index is the exact inverse. Of a
    NamedSharding the spec changes, where a name that its mesh has not is None; in a layout the new
    axis is the outermost.
    """
    if isinstance(names, Format):
        return Format(_outermost(names.layout, index), insert_name(names.sharding, index, name))
    if isinstance(names, Sharding):
        mesh_name = name if name in getattr(names, "mesh", _NO_MESH).axis_names else None
        return _respecified(names, lambda spec: insert_name(spec, index, mesh_name))
    names = axis_names(names)
    if index < 0:
        index += len(names) + 1
    if index <= len(names):
        return (*names[:index], name, *names[index:])
    if name is None:
        return names
    padded = PaddedNames((*names, *[None] * (index - len(names)), name))
    padded.before, padded.index = names, index
    return padded


def remove_name(names: Any, index: int) -> Any:
    """Axis names after the axis `index` is gone; the inverse of `insert_name`."""
    if isinstance(names, PaddedNames) and names.index == index:
        return names.before
    if isinstance(names, Format):
        return Format(_without(names.layout, index), remove_name(names.sharding, index))
    if isinstance(names, Sharding):
        return _respecified(names, lambda spec: remove_name(spec, index))
    names = axis_names(names)
    if index < 0:
        index += len(names)
    return (*names[:index], *names[index + 1 :])


_NO_MESH = AbstractMesh((), ())


def _respecified(sharding: Sharding, change: Callable[[tuple[Any, ...]], Any]) -> Sharding:
    """`sharding` with change(its spec) for a spec; one without a spec says nothing of axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*change(tuple(sharding.spec)))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _outermost(layout: Any, index: int) -> Any:
    if not isinstance(layout, Layout):
        return layout
    index = index if index >= 0 else index + len(layout.major_to_minor) + 1
    order = [axis + (axis >= index) for axis in layout.major_to_minor]
    return Layout((index, *order), layout.tiling, layout.sub_byte_element_size_in_bits)


def _without(layout: Any, index: int) -> Any:
    if not isinstance(layout, Layout):
        return layout
    index = index if index >= 0 else index + len(layout.major_to_minor)
    order = tuple(axis - (axis > index) for axis in layout.major_to_minor if axis != index)
    return Layout(order, layout.tiling, layout.sub_byte_element_size_in_bits)
