"""pack and unpack: the only walk that knows identity.

Everything that crosses a JAX boundary takes four steps, under one set of indices (`Refs`):

  pack     outside   walk the arguments once: a hashable structure, and leaves in groups
  unpack   inside    rebuild fresh objects under the same indices             } the user's function runs
  collect  inside    what changed in them, and the result, as an `After`      } between these two
  apply    outside   write what changed into the objects that own the indices

The first two are here, the others in `effects`. A *group* says how JAX must treat a leaf: an axis, a sharding,
Carry, Diff. Which leaf goes into which group is the business of a `spec`: a group, a `ByFilter`, or a prefix of
tuples, lists and dicts of these.

Law: unpack(pack(x)) is isomorphic to x, sharing and cycles included; one Variable has one treatment in a call.
Knows nothing of transforms.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from nnx_core._changes import track
from nnx_core._depth import ROOM
from nnx_core._errors import AliasError, DepthError, NotAGraphError, Path, SharedReferenceError, SpecError, show_path
from nnx_core._statics import Fixed
from nnx_core._trace import Handed, current_trace
from nnx_core.graph.cells import ArrayCell, Cell, Way
from nnx_core.graph.classify import (
    ARRAY,
    DICT,
    NUMBER,
    OBJECT,
    PYTREE,
    STATE,
    STATIC,
    VARIABLE,
    can_change,
    children,
    contents,
    kind_of,
    one_level,
    plain_containers,
    same_things,
)
from nnx_core.graph.objects import Object, create, is_array
from nnx_core.graph.structure import (
    ArrayDef,
    Element,
    GraphDef,
    Leaf,
    LeafDef,
    LeafPlace,
    Node,
    Ref,
    Static,
    Template,
    VariableDef,
    static,
    template_of,
)
from nnx_core.state import State, sorted_keys
from nnx_core.variables import Variable, freeze_metadata, new_variable, set_metadata_dict, thaw_metadata

Group = Hashable
Spec = Any
#: What a transform does to a Variable's metadata on its way through: (Variable, group) -> metadata.
Describe = Callable[[Variable[Any], Group], dict[str, Any]]
#: One group on its way through JAX: values of Variables and of arrays that objects own, then loose leaves.
Leaves = tuple[list[Any], list[Any]]


class _AsStatic:
    """The spec of what is part of the structure, whatever it is."""

    def __repr__(self) -> str:
        return "static"


AS_STATIC = _AsStatic()


def reader(leaves: Leaves) -> Callable[[LeafDef | LeafPlace], Any]:
    """What gives the value of each leaf of one group, if it is asked for all of them in walking order."""
    values, loose = map(iter, leaves)
    return lambda d: next(values if d.owned else loose)


def in_order(graphdef: GraphDef, leaves: Leaves) -> list[Any]:
    """The leaves of a graph in walking order, where there is one group."""
    if graphdef.owns_all:
        return leaves[0]
    read = reader(leaves)
    return [read(leaf) for leaf in graphdef.layout]


def apart(graphdef: GraphDef, ordered: Iterable[Any]) -> Leaves:
    """The inverse of `in_order`."""
    if graphdef.owns_all:
        return list(ordered), []
    values: list[Any] = []
    loose: list[Any] = []
    for leaf, x in zip(graphdef.layout, ordered, strict=True):
        if leaf.owned:
            values.append(x)
        else:
            loose.append(x)
    return values, loose


class ByFilter:
    """A spec that chooses the group of each leaf of an object by path (below that object) and value."""

    def group(self, path: Path, value: Any) -> Group:
        """The group of the leaf `value` at `path`."""
        raise NotImplementedError


class Place(NamedTuple):
    """Where something was first reached and how it is treated; `base` is the length of its root's path."""

    path: Path
    spec: Spec
    base: int

    def below(self, key: Hashable) -> "Place":
        """The same treatment, one level down."""
        return Place((*self.path, key), self.spec, self.base)


class OwnedBy(NamedTuple):
    """Where a leaf belongs that is no Variable: the object that holds it, and the way from there to the leaf."""

    owner: Object
    way: Way

    def below(self, key: Hashable) -> "OwnedBy":
        """The same, one level down."""
        return OwnedBy(self.owner, (*self.way, key))


Owner = OwnedBy | None


class Refs:
    """Object <-> index, and where each was first reached, for the length of one call.

    The arrays that objects hold have an index too, that of an `ArrayCell`; being no objects, they are never met again.
    """

    __slots__ = ("indices", "objects", "places")

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.indices: dict[int, int] = {}
        self.places: list[Place | None] = []  # None where nobody asks for it

    def append(self, obj: Any) -> int:
        """Give `obj` the next index; nobody will ask for its place, or for the index of an object."""
        self.objects.append(obj)
        return len(self.objects) - 1

    def add(self, obj: Any, place: Place | None) -> int:
        """Give `obj`, which is reached at `place`, the next index."""
        index = len(self.objects)
        self.objects.append(obj)
        self.indices[id(obj)] = index
        self.places.append(place)
        return index

    def add_cell(self, cell: ArrayCell | None, place: Place | None) -> int:
        """Give the array at `cell`, which is reached at `place`, the next index."""
        self.objects.append(cell)
        self.places.append(place)
        return len(self.objects) - 1

    def path(self, index: int) -> Path:
        """Where the thing under `index` was first reached, if that was asked for."""
        place = self.places[index]
        assert place is not None
        return place.path


class Packer:
    """One walk over some arguments. Afterwards: `leaves` by group, and what was met on the way."""

    def __init__(
        self,
        groups: tuple[Group, ...],
        refs: Refs,
        *,
        allow_sharing: bool = True,
        strict: bool = True,
        first_decides: bool = False,
        trace_numbers: bool = True,
        describe: Describe | None = None,
    ):
        self.groups = groups
        self.group_index = {group: i for i, group in enumerate(groups)}
        self.leaves: list[Leaves] = [([], []) for _ in groups]
        #: For each value the cell it lives in; for each loose leaf its group.
        self.cells: list[list[Cell]] = [[] for _ in groups]
        self.loose_groups: list[int] = []
        #: (object, key, contents) of each plain container that an object holds.
        self.containers: list[tuple[Object, Hashable, list[Any]]] = []
        #: Objects and Variables with their versions, taken before they were read: another thread may change them.
        self.versions: list[tuple[Object | Variable[Any], int]] = []
        #: Configuration that can be changed in place.
        self.fixed: list[Fixed] = []
        self.refs = refs
        self.allow_sharing = allow_sharing
        self.strict = strict
        self.first_decides = first_decides  # of the paths of one thing below one spec; else they must agree
        self.trace_numbers = trace_numbers
        self.describe = describe  # what to do to a Variable's metadata before it leaves

    def pack(self, x: Any, place: Place) -> Element:
        """The structure of `x`, which may be deep; its leaves go into `self.leaves`.

        Raises:
          DepthError: if it has no end, as a list that holds itself.
        """
        with ROOM:
            try:
                return self.walk(x, place)
            except RecursionError:
                raise DepthError(place.path, type(x).__name__) from None

    def static(self, x: Any) -> Static:
        """`x` as configuration, which may be changed in place."""
        element = static(x)
        if type(element.key) is Fixed and element.key.content is not x:
            self.fixed.append(element.key)
        return element

    def walk(self, x: Any, place: Place, owner: Owner = None) -> Element:
        """As `pack`, from within a walk."""
        if place.spec is AS_STATIC:
            return self.static(x)
        kind = kind_of(x)
        if kind == VARIABLE:
            return self._variable(x, place)
        if kind == OBJECT:
            return self._object(x, place)
        if kind == STATIC:
            return self.static(x)
        if kind in (ARRAY, NUMBER):
            return self._leaf(x, place, owner, kind)
        if kind == PYTREE:
            return self._pytree(x, place, owner)
        node_kind = type(x)
        if kind in (DICT, STATE):
            if kind == STATE:
                x = x._mapping
            keys = sorted_keys(x)
            children = self._children(node_kind, keys, [x[key] for key in keys], place, owner)
            is_sorted = kind == STATE or list(x) == keys  # a State has no order of its own
            return Node(node_kind, None, tuple(keys), children, None if is_sorted else tuple(x), None)
        children = self._children(node_kind, range(len(x)), x, place, owner)
        return Node(node_kind, None, tuple(range(len(x))), children, None, None)

    def _children(
        self, kind: type, keys: Sequence[Hashable], values: Sequence[Any], place: Place, owner: Owner
    ) -> tuple[Element, ...]:
        children: list[Element] = []
        steps = keys if kind in _FOUND_BY_KEY or issubclass(kind, State) else range(len(keys))
        for step, value, below in zip(steps, values, _places_below(place, keys, kind), strict=True):
            owner_below = None if owner is None else owner.below(step)
            children.append(self.walk(value, below, owner_below))
        return tuple(children)

    def _pytree(self, x: Any, place: Place, owner: Owner) -> Element:
        keys, values, treedef = one_level(x)
        children = self._children(type(x), keys, values, place, owner)
        return Node(type(x), None, tuple(keys), children, None, treedef)

    def _leaf(self, x: Any, place: Place, owner: Owner, kind: int) -> Element:
        if owner is None and kind == NUMBER and not self.trace_numbers:
            return static(x)
        if owner is None:
            group = self._group(place, x)
            self.leaves[group][1].append(x)
            self.loose_groups.append(group)
            return Leaf(group)
        if kind == NUMBER and owner.owner._nnx_mark(owner.way[0]) != "data":
            return static(x)  # as in NNX, a number stored on an object is configuration
        group = self._group(place, x)
        cell = ArrayCell(*owner)
        self.leaves[group][0].append(x)
        self.cells[group].append(cell)
        return ArrayDef(self.refs.add_cell(cell, Place(place.path, self.groups[group], place.base)), group)

    def _group(self, place: Place, x: Any) -> int:
        path, spec, base = place
        group = spec.group(path[base:], x) if isinstance(spec, ByFilter) else spec
        try:
            return self.group_index[group]
        except (KeyError, TypeError):
            raise SpecError(f"{show_path(path)}: {group!r} is none of the treatments {self.groups}.") from None

    def _reached_again(self, index: int, place: Place, treatment: Spec) -> Ref:
        first = self.refs.places[index]
        assert first is not None  # what has an index by identity has a place
        name = type(self.refs.objects[index]).__name__
        if not self.allow_sharing:
            raise SharedReferenceError(name, first.path, place.path)
        # Identity first: it is the usual case, and == runs through all filters of a StateAxes.
        if self.strict and first.spec is not treatment and first.spec != treatment:
            is_decided = self.first_decides and first.path[: first.base] == place.path[: place.base]
            if not is_decided and not self._treated_alike(self.refs.objects[index], first, place):
                raise AliasError(name, (first.path, show(first.spec)), (place.path, show(treatment)))
        return Ref(index)

    def _treated_alike(self, x: Any, first: Place, second: Place) -> bool:
        """Whether two specs, spelled differently, say the same of each leaf of the object `x`."""
        if not isinstance(x, Object) or not any(isinstance(at.spec, ByFilter) for at in (first, second)):
            return False  # a treatment is a group, and these differ
        for path, leaf in _leaves_of(x):
            groups = [self._group(Place((*at.path, *path), at.spec, at.base), leaf) for at in (first, second)]
            if groups[0] != groups[1]:
                return False
        return True

    def _variable(self, v: Variable[Any], place: Place) -> Element:
        group = self._group(place, v)
        index = self.refs.indices.get(id(v))
        if index is not None:
            return self._reached_again(index, place, self.groups[group])
        index = self.refs.add(v, Place(place.path, self.groups[group], place.base))
        self.versions.append((v, track(v)))
        value, metadata = v._raw_value, v._var_metadata
        self.leaves[group][0].append(value)
        self.cells[group].append(v)
        if self.describe is not None:
            metadata = self.describe(v, self.groups[group])
        return VariableDef(type(v), index, freeze_metadata(metadata), group)

    def _object(self, obj: Object, place: Place) -> Element:
        path, spec, _ = place
        index = self.refs.indices.get(id(obj))
        if index is not None:
            return self._reached_again(index, place, spec)
        if type(spec) in _PREFIXES:
            raise SpecError(
                f"{show_path(path)} is a {type(obj).__name__}, expected one treatment for it (or StateAxes,"
                f" StateSharding, ...), found {spec!r}."
            )
        index = self.refs.add(obj, place)
        self.versions.append((obj, track(obj)))
        items = obj._nnx_items()
        order = tuple(items)
        keys = tuple(sorted_keys(order))
        children = tuple([self.attribute(obj, key, items[key], place) for key in keys])
        marks = tuple(sorted(obj._nnx_marks.items()))
        return Node(type(obj), index, keys, children, None if order == keys else order, marks)

    def attribute(self, obj: Object, key: Hashable, value: Any, place: Place) -> Element:
        """The structure of one attribute (or item) of `obj`, which is at `place`."""
        if obj._nnx_mark(key) == "static":
            return self.static(value)
        kind = kind_of(value)
        if kind == STATIC or (kind == NUMBER and obj._nnx_mark(key) is None):
            return self.static(value)
        if can_change(value):
            self.containers.append((obj, key, list(contents(value))))
        return self.walk(value, place.below(key), OwnedBy(obj, (key,)))


def _leaves_of(obj: Object) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of the Variables and arrays of an object, each Variable once."""
    seen: dict[int, Any] = {}
    pending: list[tuple[Path, Any]] = [((), obj)]
    while pending:
        path, x = pending.pop()
        if kind_of(x) in (VARIABLE, ARRAY):
            yield path, x
        if id(x) not in seen:
            seen[id(x)] = x
            pending.extend(((*path, key), child) for key, child in children(x))


_PREFIXES = (tuple, list, dict)
#: Containers whose children are found again by their keys (States too); those of other pytrees by position.
_FOUND_BY_KEY = (tuple, list, dict)


def _places_below(place: Place, keys: Sequence[Hashable], kind: type) -> list[Place]:
    """The places of the children of a container of type `kind` at `place`."""
    path, spec, _ = place
    if type(spec) in _PREFIXES or type(spec) is kind:
        specs = prefix_of(spec, keys, kind, path)
        base = len(path) + 1  # each child is the root of its own spec
        return [Place((*path, key), spec, base) for key, spec in zip(keys, specs, strict=True)]
    return [place.below(key) for key in keys]


def prefix_of(spec: Spec, keys: Sequence[Hashable], kind: type, path: Path) -> list[Spec]:
    """The spec of each child, where `spec` is a prefix: a container of the same form.

    Raises:
      SpecError: if it has another form.
    """
    if isinstance(spec, State):
        spec = spec._mapping
    if isinstance(spec, dict):
        if len(spec) == len(keys) and all(key in spec for key in keys):
            return [spec[key] for key in keys]
    elif isinstance(spec, list | tuple) and len(spec) == len(keys):
        return list(spec)
    raise SpecError(
        f"{show_path(path)} is a {kind.__name__} with {len(keys)} items; the treatment given for it has another"
        f" form: {spec!r}."
    )


def show(treatment: Spec) -> str:
    """A treatment in words, for errors."""
    if treatment is None:
        return "not mapped"
    return f"axis {treatment}" if type(treatment) is int else str(treatment)


def require_graph(x: Any, function: str) -> None:
    """Raise NotAGraphError unless there can be something to walk in `x`."""
    if kind_of(x) in (STATIC, NUMBER, ARRAY) and x is not None:
        raise NotAGraphError(f"nnx.{function} needs a module, Variable or pytree, found {type(x).__name__}.")


# ---- unpack ----


class Watch:
    """What `unpack` built, as it was, so that `collect` can tell what changed.

    Each entry begins with the index of the object or Variable it belongs to, and ends with what it was like.
    """

    __slots__ = ("cells", "containers", "objects")

    def __init__(self) -> None:
        #: (index, cell, value before, metadata before, group), in walking order; an array has no metadata
        self.cells: list[tuple[int, Cell, Any, dict[str, Any] | None, int]] = []
        #: (index, object, version before, items before)
        self.objects: list[tuple[int, Object, int, dict[Any, Any]]] = []
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
        if type(d) is Static:
            return d.value
        if type(d) is VariableDef:
            return self._variable(d, place)
        if type(d) is Leaf:
            return next(self.loose[d.group])
        if type(d) is ArrayDef:
            return self._array(d, place, owner)
        if type(d) is Ref:
            return self.refs.objects[d.id]
        assert type(d) is Node  # there is nothing else
        return self._node(d, place, owner) if d.id is None else self._object(d, place)

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
        value = next(self.values[d.group])
        if d.id in self.adopted:
            v = self.adopted[d.id]
        else:
            v = new_variable(d.kind, value, thaw_metadata(d.metadata) if d.metadata else {}, self.trace)
        if place is None:
            self.refs.objects.append(v)  # nobody will ask for its place, or for its index
            return v
        if self.groups is not None:
            place = Place(place.path, self.groups[d.group], place.base)
            if self.describe is not None:
                set_metadata_dict(v, self.describe(v, place.spec))
        index = self.refs.add(v, place)
        if self.watch is not None:
            self.watch.cells.append((index, v, snapshot(value), v._var_metadata, d.group))
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
            places = _places_below(place, d.keys, d.kind)
        steps = d.keys if d.kind in _FOUND_BY_KEY or issubclass(d.kind, State) else range(len(d.keys))
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
            self.watch.objects.append((index, obj, track(obj), items.copy()))
            for key, value in items.items():
                if can_change(value):
                    held = list(plain_containers(value))
                    self.watch.containers.append((index, obj, key, list(contents(value)), held))
        return obj
