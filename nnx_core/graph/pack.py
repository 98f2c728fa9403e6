"""pack: the only walk that knows identity.

Everything that crosses a JAX boundary takes four steps, under one set of indices (`Refs`):

  pack     outside   walk the arguments once: a hashable structure, and leaves in groups
  unpack   inside    rebuild fresh objects under the same indices             } the user's function runs
  collect  inside    what changed in them, and the result, as an `After`      } between these two
  apply    outside   write what changed into the objects that own the indices

The first is here, the second in `unpack`, the others in `effects`. A *group* says how JAX must treat a leaf: an
axis, a sharding, Carry, Diff. Which leaf goes into which group is the business of a `spec`: a group, a `ByFilter`, or
a prefix of tuples, lists and dicts of these.

Law: unpack(pack(x)) is isomorphic to x, sharing and cycles included; one Variable has one treatment in a call.
Knows nothing of transforms.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from nnx_core._changes import track
from nnx_core._depth import ROOM
from nnx_core._errors import (
    AliasError,
    DepthError,
    NotAGraphError,
    Path,
    SharedReferenceError,
    SpecError,
    StructureError,
    show_path,
)
from nnx_core._foreign import ForeignObjectError
from nnx_core._statics import Fixed, freeze_metadata
from nnx_core.graph.cells import ArrayCell, Cell, Way
from nnx_core.graph.classify import (
    ARRAY,
    DICT,
    FOREIGN,
    NUMBER,
    OBJECT,
    PYTREE,
    STATE,
    STATIC,
    VARIABLE,
    children,
    contents,
    counting_states,
    kind_of,
    one_level,
)
from nnx_core.graph.objects import Object, holds_data
from nnx_core.graph.structure import (
    REF_LEAF,
    REF_VARIABLE,
    ArrayDef,
    Element,
    GraphDef,
    Leaf,
    LeafDef,
    LeafPlace,
    Node,
    Ref,
    Static,
    VariableDef,
    static,
)
from nnx_core.state import State, sorted_keys
from nnx_core.variables import Variable, is_ref

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
        refs_in: frozenset[int] | None = None,
    ):
        self.groups = groups
        self.group_index = {group: i for i, group in enumerate(groups)}
        self.leaves: list[Leaves] = [([], []) for _ in groups]
        #: For each value the cell it lives in; for each loose leaf its group.
        self.cells: list[list[Cell]] = [[] for _ in groups]
        self.loose_groups: list[int] = []
        #: (object, key, contents) of each container that an object holds and nothing counts the changes of.
        self.containers: list[tuple[Object, Hashable, list[Any]]] = []
        #: What counts its changes, with its version, taken before it was read: another thread may change it.
        self.versions: list[tuple[Object | Variable[Any] | State, int]] = []
        #: Configuration that can be changed in place.
        self.fixed: list[Fixed] = []
        self.refs = refs
        self.allow_sharing = allow_sharing
        self.strict = strict
        self.first_decides = first_decides  # of the paths of one thing below one spec; else they must agree
        self.trace_numbers = trace_numbers
        self.refs_in = refs_in  # at the end of a trace: ids of the `jax.Ref`s that came in, which do not go out
        self._refs_out: dict[int, Path] = {}
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
            require_configuration(x, place.path)
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
        if kind == FOREIGN:
            raise ForeignObjectError(place.path, type(x))
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
        steps = keys if kind in FOUND_BY_KEY or issubclass(kind, State) else range(len(keys))
        for step, value, below in zip(steps, values, places_below(place, keys, kind), strict=True):
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
            value = self._outward(x, place.path)
            self.leaves[group][1].append(value)
            self.loose_groups.append(group)
            return Leaf(group) if value is x else Leaf(group, REF_LEAF)
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
        metadata = v._var_metadata
        value = self._outward(v._raw_value, place.path)
        self.leaves[group][0].append(value)
        self.cells[group].append(v)
        if self.describe is not None:
            metadata = self.describe(v, self.groups[group])
        tag = "variable" if value is v._raw_value else REF_VARIABLE
        return VariableDef(type(v), index, freeze_metadata(metadata), group, tag)

    def _outward(self, value: Any, path: Path) -> Any:
        """`value`; at the end of a trace, what is in it if it is a `jax.Ref` that was made there.

        Raises:
          StructureError: if that Ref goes out at two places, which would hold two Refs outside.
        """
        if self.refs_in is None or not is_ref(value) or id(value) in self.refs_in:
            return value
        if not isinstance(value, jax.core.Tracer):
            return value  # made outside of the trace; JAX says what is wrong with returning it
        if id(value) in self._refs_out:
            raise StructureError(
                f"{show_path(self._refs_out[id(value)])} and {show_path(path)} hold one jax.Ref that was made inside of"
                " the transform. Expected a Ref at one place only; make it outside, or keep both in one Variable."
            )
        self._refs_out[id(value)] = path
        return value[...]

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
        states = counting_states(value)
        if states is None:
            self.containers.append((obj, key, list(contents(value, deep=False))))
        else:
            self.versions.extend((state, track(state)) for state in states)
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
FOUND_BY_KEY = (tuple, list, dict)


def places_below(place: Place, keys: Sequence[Hashable], kind: type) -> list[Place]:
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


def require_configuration(x: Any, path: Path) -> None:
    """Raise SpecError if `x`, a static argument, is or holds data: it would be seen as it was at the first call."""
    if holds_data(x):
        raise SpecError(
            f"{show_path(path)}, a static argument, is or holds arrays, Variables or modules: found a"
            f" {type(x).__name__}. Expected configuration. Pass it as an argument that is not static."
        )


def require_graph(x: Any, function: str) -> None:
    """Raise NotAGraphError unless there can be something to walk in `x`."""
    if kind_of(x) in (STATIC, NUMBER, ARRAY) and x is not None:
        raise NotAGraphError(f"nnx.{function} needs a module, Variable or pytree, found {type(x).__name__}.")
