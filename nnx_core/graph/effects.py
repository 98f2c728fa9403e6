"""collect and apply: what a function did to the objects it was given, and the same done to the caller's.

  collect  inside    what was written to the objects that `unpack` made, and the result, as an `After`
  apply    outside   the same writes, on the objects that own the indices

Law: only what was written is in an `After`, so reading writes nothing; either all of it may be written
(`check_writes`) or nothing is. Knows nothing of transforms.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from nnx_core._borrowed import Borrowing
from nnx_core._errors import TraceError, show_path
from nnx_core._statics import freeze_metadata, thaw_metadata
from nnx_core._trace import current_trace, show_site
from nnx_core.graph.cells import ArrayCell, write_cell
from nnx_core.graph.classify import (
    NUMBER,
    copied_containers,
    holds_still,
    kind_of,
    plain_containers,
    same_things,
)
from nnx_core.graph.objects import Object, is_array
from nnx_core.graph.pack import Leaves, OwnedBy, Packer, Place, Refs, Spec
from nnx_core.graph.structure import Element, GraphDef
from nnx_core.graph.unpack import Unpacker, Watch, is_unchanged
from nnx_core.variables import Variable, set_metadata_dict

_ABSENT: Any = object()


class CellWrite(NamedTuple):
    """What was written to the cell `id`: metadata (None: nothing), and a value that travels in `group`, or none."""

    id: int
    metadata: tuple[tuple[str, Any], ...] | None
    group: int | None


class ObjectChange(NamedTuple):
    """Attributes of the object `id` that were set or removed, and the marks it has now.

    `order` lists all its keys where setting and removing alone would leave them in another order.
    """

    id: int
    set: tuple[tuple[Hashable, Element], ...]
    removed: tuple[Hashable, ...]
    marks: tuple[tuple[str, str], ...]
    order: tuple[Hashable, ...] | None = None

    @property
    def keys(self) -> list[Hashable]:
        """The attributes that were set or removed."""
        return [*dict(self.set), *self.removed]


@jax.tree_util.register_static
@dataclass(frozen=True)
class After:
    """What a function did: which cells and attributes it wrote, and the structure of its result.

    The values travel beside it, group by group: those of the cells, in the order in which the walk met these, then
    what is new.
    """

    cells: tuple[CellWrite, ...]
    objects: tuple[ObjectChange, ...]
    result: GraphDef
    idle: frozenset[int] = frozenset()  # cells whose values travel (a loop carries them) but were not written
    renewed: tuple[tuple[int, Hashable], ...] = ()  # attributes of objects: containers replaced by others like them

    @property
    def travelling(self) -> frozenset[int]:
        """The cells whose values come back."""
        return frozenset(write.id for write in self.cells if write.group is not None)

    @property
    def changed_keys(self) -> list[Hashable]:
        """The attributes that were set or removed, of all objects."""
        return [key for change in self.objects for key in change.keys]


class Forced(NamedTuple):
    """What travels back although nobody wrote it, as numbers of groups and indices of cells.

    groups, cells: count as written (a donated buffer is gone; another branch of a cond writes it).
    carried: only travel, because a loop passes them on.
    """

    groups: frozenset[int] = frozenset()
    carried: frozenset[int] = frozenset()
    cells: frozenset[int] = frozenset()


def collect(packer: Packer, watch: Watch, result: Any, spec: Spec, forced: Forced) -> tuple[After, list[Leaves]]:
    """What changed in the objects under `watch`, together with `result`; see `After`."""
    changed, renewed = _changed_keys(watch)
    writes, idle = _cell_writes(packer, watch, changed, forced)
    before = {index: items for index, _, _, items, _ in watch.objects}
    objects = tuple(_object_change(packer, index, keys, before[index]) for index, keys in changed.items())
    root = packer.pack(result, Place(("result",), spec, 1))
    return After(tuple(writes), objects, GraphDef(root), frozenset(idle), tuple(renewed)), packer.leaves


#: A set of keys that keeps their order, so that equal changes make equal structures.
_Keys = dict[Hashable, None]


def _cell_writes(
    packer: Packer, watch: Watch, changed: dict[int, _Keys], forced: Forced
) -> tuple[list[CellWrite], set[int]]:
    """The writes, whose values go to `packer`; and the cells among them that nobody wrote."""
    writes: list[CellWrite] = []
    idle: set[int] = set()
    for index, cell, before, metadata_before, group in watch.cells:
        frozen = None
        if isinstance(cell, ArrayCell):
            owner = packer.refs.indices[id(cell.owner)]
            if cell.way[0] in changed.get(owner, ()):
                continue  # what stands there now is no array in its old place: it travels with the attribute
        elif cell._var_metadata is not metadata_before:  # every change of metadata puts a new dict in place of the old
            metadata = cell._var_metadata
            if packer.describe is not None:
                metadata = packer.describe(cell, packer.groups[group])
            frozen = freeze_metadata(metadata)
        value = cell._raw_value
        is_written = group in forced.groups or index in forced.cells or not is_unchanged(value, before)
        travels = is_written or group in forced.carried
        if travels:
            packer.leaves[group][0].append(value)
            if not is_written:
                idle.add(index)
        if travels or frozen is not None:
            writes.append(CellWrite(index, frozen, group if travels else None))
    return writes, idle


def _changed_keys(watch: Watch) -> tuple[dict[int, _Keys], list[tuple[int, Hashable]]]:
    """For each object that changed, the keys that are new, gone, or hold something else; and `After.renewed`."""
    changed: dict[int, _Keys] = {}
    renewed: list[tuple[int, Hashable]] = []
    alike: set[tuple[int, Hashable]] = set()
    for index, obj, key, contents_before, containers_before in watch.containers:
        value = obj._nnx_items().get(key)
        if not holds_still(value, contents_before):
            changed.setdefault(index, {})[key] = None
            continue
        alike.add((index, key))
        if not same_things(list(plain_containers(value)), containers_before):
            renewed.append((index, key))
    for index, obj, version, items, marks in watch.objects:
        if obj._nnx_marks != marks:
            changed.setdefault(index, {})  # it may be all that changed
        if obj._nnx_version != version:
            for key in _changed_attributes(obj, items):
                if (index, key) not in alike:
                    changed.setdefault(index, {})[key] = None
            if _order_left(items, changed.get(index, {}), obj) != list(obj._nnx_items()):
                changed.setdefault(index, {})
    return changed, renewed


def _changed_attributes(obj: Object, before: dict[Any, Any]) -> Iterator[Hashable]:
    """The keys that are new, gone, or hold another thing; a value in the place of a value is no other thing."""
    now = obj._nnx_items()
    for key in {**before, **now}:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if new is not old and not (_is_value(obj, key, new) and _is_value(obj, key, old)):
            yield key


def _is_value(obj: Object, key: Hashable, x: Any) -> bool:
    """Whether `x` is what an `ArrayCell` holds: an array, or a number where the attribute is data."""
    return is_array(x) or (kind_of(x) == NUMBER and obj._nnx_mark(key) == "data")


def _order_left(before: dict[Any, Any], keys: _Keys, obj: Object) -> list[Hashable]:
    """The order in which the keys of an object stand when `keys` are removed from what was there, or set."""
    now = obj._nnx_items()
    return [key for key in before if key in now] + [key for key in keys if key in now and key not in before]


def _object_change(packer: Packer, index: int, keys: _Keys, before: dict[Any, Any]) -> ObjectChange:
    obj, place = packer.refs.objects[index], packer.refs.places[index]
    items = obj._nnx_items()
    assert place is not None  # objects under a Watch have one
    elements: list[tuple[Hashable, Element]] = []
    removed: list[Hashable] = []
    for key in keys:
        if key in items:
            elements.append((key, packer.attribute(obj, key, items[key], place)))
        else:
            removed.append(key)
    order = None if _order_left(before, keys, obj) == list(items) else tuple(items)
    return ObjectChange(index, tuple(elements), tuple(removed), tuple(sorted(obj._nnx_marks.items())), order)


def check_writes(after: After, refs: Refs) -> None:
    """Raise TraceError if something that `after` writes belongs to another trace; before anything is written."""
    trace = current_trace()
    changed = [change.id for change in after.objects]
    changed += [index for index, _ in after.renewed]
    for write in after.cells:
        cell = refs.objects[write.id]
        if write.id in after.idle:
            continue
        if isinstance(cell, ArrayCell):
            _check_owner(cell.owner, write.id, refs, trace)
        else:
            _check_variable(cell, write.id, refs, trace)
    for index in changed:
        _check_owner(refs.objects[index], index, refs, trace)


def _check_variable(v: Variable[Any], index: int, refs: Refs, trace: object) -> None:
    if v._trace_state != trace:
        site = getattr(v, "_site", None)
        raise TraceError(type(v).__name__, show_path(refs.path(index)), show_site(site))
    if type(v._trace_state) is Borrowing:
        v._trace_state.wrote(v, type(v).__name__)


def _check_owner(obj: Object, index: int, refs: Refs, trace: object) -> None:
    if obj._nnx_trace != trace:
        raise TraceError(type(obj).__name__, show_path(refs.path(index)))
    if type(obj._nnx_trace) is Borrowing:
        obj._nnx_trace.wrote(obj, type(obj).__name__)


def _reorder(items: dict[Any, Any], order: tuple[Hashable, ...]) -> None:
    ordered = {key: items[key] for key in order}
    items.clear()
    items.update(ordered)


def apply(after: After, leaves: list[Leaves], refs: Refs) -> Any:
    """Write what `after` says into the objects of `refs`; return the result."""
    unpacker = Unpacker(tuple(leaves), refs, templates=after.result.templates)
    for index, key in after.renewed:
        storage = refs.objects[index]._nnx_storage()
        storage[key] = copied_containers(storage[key])
    for index, metadata, group in after.cells:
        cell = refs.objects[index]
        if group is not None:
            value = next(unpacker.values[group])
            if index not in after.idle:
                write_cell(cell, value)
        if metadata is not None:
            set_metadata_dict(cell, thaw_metadata(metadata))
    for change in after.objects:
        obj = refs.objects[change.id]
        new = {key: unpacker.unpack(d, None, OwnedBy(obj, (key,))) for key, d in change.set}
        obj._nnx_assign(new, change.removed)
        if change.order is not None:
            _reorder(obj._nnx_items(), change.order)
        object.__setattr__(obj, "_nnx_marks", dict(change.marks))
    return unpacker.unpack(after.result.root, None)
