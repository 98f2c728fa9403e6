"""unpack: fresh objects under the indices of a structure, and a watch over them.

Law: unpack(pack(x)) is isomorphic to x, sharing and cycles included. With a `Watch`, what is made is handed to a
user's function, and `effects.collect` can tell afterwards what that did. Knows nothing of transforms.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from nnx_core._changes import track
from nnx_core._depth import ROOM
from nnx_core._statics import thaw_metadata
from nnx_core._trace import Handed, current_trace
from nnx_core.graph.cells import ArrayCell, Cell
from nnx_core.graph.classify import contents, is_container, plain_containers, same_things
from nnx_core.graph.objects import Object, create, is_array
from nnx_core.graph.pack import FOUND_BY_KEY, Describe, Group, Leaves, OwnedBy, Owner, Place, Refs, places_below
from nnx_core.graph.structure import (
    REF_LEAF,
    REF_VARIABLE,
    ArrayDef,
    Element,
    Leaf,
    Node,
    Ref,
    Static,
    Template,
    VariableDef,
    template_of,
)
from nnx_core.state import State
from nnx_core.variables import Variable, new_variable, set_metadata_dict


class Watch:
    """What `unpack` built, as it was, so that `collect` can tell what changed.

    Each entry begins with the index of the object or Variable it belongs to, and ends with what it was like.
    """

    __slots__ = ("cells", "containers", "objects")

    def __init__(self) -> None:
        #: (index, cell, value before, metadata before, group), in walking order; an array has no metadata
        self.cells: list[tuple[int, Cell, Any, dict[str, Any] | None, int]] = []
        #: (index, object, version before, items before, marks before)
        self.objects: list[tuple[int, Object, int, dict[Any, Any], dict[Any, str]]] = []
        #: (index of the owner, the owner, key, contents before, the plain containers before)
        self.containers: list[tuple[int, Object, Hashable, list[Any], list[Any]]] = []


def snapshot(value: Any) -> Any:
    """What tells later whether a Variable's value changed: itself, or for a pytree its leaves and structure.

    A dict may be changed in place, so that it is still itself says nothing.
    """
    return value if is_array(value) else jax.tree.flatten(value)


def is_unchanged(value: Any, before: Any) -> bool:
    """Whether `value` is what the snapshot `before` was taken of; compared by identity: == of tracers is a tracer."""
    if value is before:
        return True
    if is_array(value) or type(before) is not tuple:
        return False
    leaves, treedef = jax.tree.flatten(value)
    leaves_before, treedef_before = before
    return bool(treedef == treedef_before) and same_things(leaves, leaves_before)


_NONE_ADOPTED: Mapping[int, Variable[Any]] = MappingProxyType({})


class Unpacker:
    """Rebuilds a structure with fresh objects under the structure's own indices."""

    def __init__(
        self,
        leaves: tuple[Leaves, ...],
        refs: Refs,
        groups: tuple[Group, ...] | None = None,
        watch: Watch | None = None,
        describe: Describe | None = None,
        templates: dict[int, Template] | None = None,
        adopted: Mapping[int, Variable[Any]] = _NONE_ADOPTED,
        makes_cells: bool = False,
    ):
        self.templates = {} if templates is None else templates
        self.adopted = adopted  # by index, Variables that are there already, with their values
        self.groups = groups
        trace = current_trace()
        self.trace = trace if watch is None else Handed(trace)  # with a Watch, what is made is handed to a function
        self.values = [iter(values) for values, _ in leaves]
        self.loose = [iter(loose) for _, loose in leaves]
        self.refs, self.watch, self.describe = refs, watch, describe
        #: Whether somebody will ask for the cells of arrays: a Watch, or who applies an `After` to what is built.
        self.makes_cells = makes_cells or watch is not None

    def unpack(self, d: Element, place: Place | None, owner: Owner = None) -> Any:
        """The object, container or leaf that `d` describes; without `place` nobody asks for paths later."""
        with ROOM:
            return self.build(d, place, owner)

    def build(self, d: Element, place: Place | None, owner: Owner = None) -> Any:
        """As `unpack`, from within a walk."""
        if type(d) is Node:
            return self._node(d, place, owner) if d.id is None else self._object(d, place)
        if type(d) is VariableDef:
            return self._variable(d, place)
        if type(d) is Static:
            return d.value
        if type(d) is Leaf:
            loose = next(self.loose[d.group])
            return jax.new_ref(loose) if d.tag == REF_LEAF else loose
        if type(d) is ArrayDef:
            return self._array(d, place, owner)
        assert type(d) is Ref  # there is nothing else
        return self.refs.objects[d.id]

    def _array(self, d: ArrayDef, place: Place | None, owner: Owner) -> Any:
        value = next(self.values[d.group])
        cell = None if owner is None else ArrayCell(*owner)
        if place is None:
            self.refs.append(cell)  # nobody will ask for its place
            return value
        if self.groups is not None:
            place = Place(place.path, self.groups[d.group], place.base)
        index = self.refs.add_cell(cell, place)
        if self.watch is not None and cell is not None:
            self.watch.cells.append((index, cell, value, None, d.group))
        return value

    def _variable(self, d: VariableDef, place: Place | None) -> Variable[Any]:
        kind, known_id, metadata, group, tag = d  # at once: a large model has thousands of these
        value = next(self.values[group])
        if tag == REF_VARIABLE:
            value = jax.new_ref(value)
        if self.adopted and known_id in self.adopted:
            v = self.adopted[known_id]
        else:
            v = new_variable(kind, value, thaw_metadata(metadata) if metadata else {}, self.trace)
        if place is None:
            self.refs.objects.append(v)  # nobody will ask for its place, or for its index
            return v
        if self.groups is not None:
            place = Place(place.path, self.groups[group], place.base)
            if self.describe is not None:
                set_metadata_dict(v, self.describe(v, place.spec))
        index = self.refs.add(v, place)
        if self.watch is not None:
            self.watch.cells.append((index, v, snapshot(value), v._var_metadata, group))
        return v

    def _node(self, d: Node, place: Place | None, owner: Owner) -> Any:
        if place is None and owner is None:
            # The way of `merge` and `clone`. One comprehension, with Variables made here: a call less for each.
            variable = self._variable
            children = [
                variable(child, None) if type(child) is VariableDef else self.build(child, None) for child in d.children
            ]
        else:
            children = self._children(d, place, owner)
        if d.kind is dict:
            new = dict(zip(d.keys, children, strict=True))
            return new if d.order is None else {key: new[key] for key in d.order}
        if issubclass(d.kind, State):
            return d.kind.over(dict(zip(d.keys, children, strict=True)))
        return d.rebuild(children)

    def _children(self, d: Node, place: Place | None, owner: Owner) -> list[Any]:
        """As the walk met them, each at its own place and with its own owner."""
        places: Iterable[Place | None] = itertools.repeat(None, len(d.keys))
        if place is not None:
            places = places_below(place, d.keys, d.kind)
        steps = d.keys if d.kind in FOUND_BY_KEY or issubclass(d.kind, State) else range(len(d.keys))
        children: list[Any] = []
        for step, child, below in zip(steps, d.children, places, strict=True):
            owner_below = None if owner is None else owner.below(step)
            children.append(self.build(child, below, owner_below))
        return children

    def _object(self, d: Node, place: Place | None) -> Object:
        obj: Object = create(d.kind, self.trace)
        index = self.refs.append(obj) if place is None else self.refs.add(obj, place)
        template, others = template_of(d, self.templates)
        items = template.copy()
        for key, child in others:
            below = None if place is None else place.below(key)
            if type(child) is VariableDef:
                items[key] = self._variable(child, below)
            else:
                owner = OwnedBy(obj, (key,)) if self.makes_cells else None
                items[key] = self.build(child, below, owner)
        obj._nnx_fill(items, d.extra)
        if self.watch is not None:
            self.watch.objects.append((index, obj, track(obj), items.copy(), obj._nnx_marks))
            for key, value in items.items():
                if is_container(value):
                    held = list(plain_containers(value))
                    self.watch.containers.append((index, obj, key, list(contents(value)), held))
        return obj
