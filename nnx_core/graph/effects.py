"""collect and apply: what a function did to the objects it was given, and the same done to the caller's.

  collect  inside    what was written to the objects that `unpack` made, and the result, as an `After`
  apply    outside   the same writes, on the objects that own the indices

Law: only what was written is in an `After`, so reading writes nothing; either all of it may be written
(`check_writes`) or nothing is. Knows nothing of transforms.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from nnx_core._borrowed import Borrowing
from nnx_core._errors import Path, TraceError, show_path
from nnx_core._trace import current_trace, show_site
from nnx_core.graph.classify import can_change, contents, same_things
from nnx_core.graph.objects import is_array
from nnx_core.graph.pack import Leaves, OwnedBy, Packer, Place, Refs, Spec, Unpacker, Watch, is_unchanged
from nnx_core.graph.structure import Element, GraphDef
from nnx_core.variables import freeze_metadata, set_metadata_dict, set_raw, thaw_metadata

_ABSENT: Any = object()


class VariableWrite(NamedTuple):
    """What was written to the Variable `id`: metadata (None: nothing), and a value that travels in `group`, or none."""

    id: int
    metadata: tuple[tuple[str, Any], ...] | None
    group: int | None


class ObjectChange(NamedTuple):
    """Attributes of the object `id` that were set or removed, and the marks it has now."""

    id: int
    set: tuple[tuple[Hashable, Element], ...]
    removed: tuple[Hashable, ...]
    marks: tuple[tuple[str, str], ...]

    @property
    def keys(self) -> list[Hashable]:
        """The attributes that were set or removed."""
        return [*dict(self.set), *self.removed]


@jax.tree_util.register_static
@dataclass(frozen=True)
class After:
    """What a function did: which Variables, arrays and attributes it wrote, and the structure of its result.

    The values travel beside it, group by group, in this order: Variables, arrays, then what is new.
    """

    variables: tuple[VariableWrite, ...]
    arrays: tuple[tuple[int, Path, int], ...]  # index of the owner, keys, group
    objects: tuple[ObjectChange, ...]
    result: GraphDef
    idle: frozenset[int] = frozenset()  # Variables whose values travel (a loop carries them) but were not written

    @property
    def travelling(self) -> frozenset[int]:
        """The Variables whose values come back."""
        return frozenset(write.id for write in self.variables if write.group is not None)

    @property
    def changed_keys(self) -> list[Hashable]:
        """The attributes that were set or removed, of all objects."""
        return [key for change in self.objects for key in change.keys]


class Forced(NamedTuple):
    """What travels back although nobody wrote it, as numbers of groups and indices of Variables.

    groups, variables: count as written (a donated buffer is gone; another branch of a cond writes it).
    carried: only travel, because a loop passes them on.
    """

    groups: frozenset[int] = frozenset()
    carried: frozenset[int] = frozenset()
    variables: frozenset[int] = frozenset()


def collect(packer: Packer, watch: Watch, result: Any, spec: Spec, forced: Forced) -> tuple[After, list[Leaves]]:
    """What changed in the objects under `watch`, together with `result`; see `After`."""
    writes, idle = _variable_writes(packer, watch, forced)
    changed = _changed_keys(watch)
    arrays = _array_writes(packer, watch, changed)
    objects = tuple(_object_change(packer, index, keys) for index, keys in changed.items())
    root = packer.walk(result, Place(("result",), spec, 1))
    return After(tuple(writes), tuple(arrays), objects, GraphDef(root), frozenset(idle)), packer.leaves


def _variable_writes(packer: Packer, watch: Watch, forced: Forced) -> tuple[list[VariableWrite], set[int]]:
    """The writes, whose values go to `packer`; and the Variables among them that nobody wrote."""
    writes: list[VariableWrite] = []
    idle: set[int] = set()
    for index, v, before, metadata_before, group in watch.variables:
        is_written = group in forced.groups or index in forced.variables or not is_unchanged(v._raw_value, before)
        travels = is_written or group in forced.carried
        metadata = v._var_metadata
        frozen = None
        if metadata is not metadata_before:  # every change of metadata puts a new dict in the place of the old
            if packer.describe is not None:
                metadata = packer.describe(v, packer.groups[group])
            frozen = freeze_metadata(metadata)
        if travels:
            packer.leaves[group][0].append(v._raw_value)
            if not is_written:
                idle.add(index)
        if travels or frozen is not None:
            writes.append(VariableWrite(index, frozen, group if travels else None))
    return writes, idle


#: A set of keys that keeps their order, so that equal changes make equal structures.
_Keys = dict[Hashable, None]


def _changed_keys(watch: Watch) -> dict[int, _Keys]:
    """For each object that changed, the keys that are new, gone, or hold something else."""
    changed: dict[int, _Keys] = {}
    for index, obj, version, items in watch.objects:
        if obj._nnx_version != version:
            changed[index] = _changed_attributes(items, obj._nnx_items())
    for index, obj, key, contents_before in watch.containers:
        value = obj._nnx_items().get(key)
        if can_change(value) and not same_things(contents(value), contents_before):
            changed.setdefault(index, {})[key] = None
    for index, key, state, version in watch.states:
        if state._nnx_version != version:
            changed.setdefault(index, {})[key] = None
    return {index: keys for index, keys in changed.items() if keys}


def _changed_attributes(before: dict[Any, Any], now: dict[Any, Any]) -> _Keys:
    """The keys that are new, gone, or hold another thing; an array over an array is a change of value, no more."""
    changed: _Keys = {}
    for key in {**before, **now}:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if new is not old and not (is_array(new) and is_array(old)):
            changed[key] = None
    return changed


def _array_writes(packer: Packer, watch: Watch, changed: dict[int, _Keys]) -> list[tuple[int, Path, int]]:
    """The arrays that stand where another one stood; their values go to `packer`."""
    writes: list[tuple[int, Path, int]] = []
    for index, obj, keys, before, group in watch.arrays:
        value = obj._nnx_items().get(keys[0], before)
        if keys[0] not in changed.get(index, ()) and value is not before and is_array(value):
            packer.leaves[group][0].append(value)
            writes.append((index, keys, group))
    return writes


def _object_change(packer: Packer, index: int, keys: _Keys) -> ObjectChange:
    obj, place = packer.refs.objects[index], packer.refs.places[index]
    items = obj._nnx_items()
    assert place is not None  # objects under a Watch have one
    elements: list[tuple[Hashable, Element]] = []
    removed: list[Hashable] = []
    for key in keys:
        if key in items:
            elements.append((key, packer.attribute(index, obj, key, items[key], place)))
        else:
            removed.append(key)
    return ObjectChange(index, tuple(elements), tuple(removed), tuple(sorted(obj._nnx_marks.items())))


def check_writes(after: After, refs: Refs) -> None:
    """Raise TraceError if something that `after` writes belongs to another trace; before anything is written."""
    trace = current_trace()
    for write in after.variables:
        if write.id in after.idle:
            continue
        v = refs.objects[write.id]
        if v._trace_state != trace:
            site = getattr(v, "_site", None)
            raise TraceError(type(v).__name__, show_path(refs.path(write.id)), show_site(site))
        if type(v._trace_state) is Borrowing:
            v._trace_state.wrote(v, type(v).__name__)
    changed = [change.id for change in after.objects]
    changed += [index for index, _, _ in after.arrays]
    for index in changed:
        obj = refs.objects[index]
        if obj._nnx_trace != trace:
            raise TraceError(type(obj).__name__, show_path(refs.path(index)))


def apply(after: After, leaves: list[Leaves], refs: Refs) -> Any:
    """Write what `after` says into the objects of `refs`; return the result."""
    unpacker = Unpacker(tuple(leaves), refs, templates=after.result.templates)
    for index, metadata, group in after.variables:
        v = refs.objects[index]
        if group is not None:
            value = next(unpacker.values[group])
            if index not in after.idle:
                set_raw(v, value)
        if metadata is not None:
            set_metadata_dict(v, thaw_metadata(metadata))
    for index, keys, group in after.arrays:
        refs.objects[index]._nnx_storage()[keys[0]] = next(unpacker.values[group])
    for change in after.objects:
        obj = refs.objects[change.id]
        new = {key: unpacker.build(d, None, OwnedBy(change.id, (key,))) for key, d in change.set}
        obj._nnx_assign(new, change.removed)
        if change.marks:
            object.__setattr__(obj, "_nnx_marks", dict(change.marks))
    return unpacker.build(after.result.root, None)
