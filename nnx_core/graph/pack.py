"""pack and unpack: the only walk that knows identity.

Everything that crosses a JAX boundary takes four steps, under one set of indices (`Refs`):

  pack     outside   walk the arguments once: a hashable structure, and leaves in groups
  unpack   inside    rebuild fresh objects under the same indices             } the user's function runs
  collect  inside    what changed in them, and the result, as an `After`      } between these two
  apply    outside   write what changed into the objects that own the indices

A *group* says how JAX must treat a leaf: an axis, a sharding, Carry, Diff. Which leaf goes into which group is
the business of a `spec`: a group, a `ByFilter`, or a prefix of tuples, lists and dicts of these.

Law: unpack(pack(x)) is isomorphic to x, sharing and cycles included; only what was written is in an `After`;
one Variable has one treatment in a call. Knows nothing of transforms.
"""

import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from nnx_core._borrowed import Borrowing
from nnx_core._changes import track
from nnx_core._errors import AliasError, NotAGraphError, Path, SharedReferenceError, SpecError, TraceError, show_path
from nnx_core._trace import current_trace, show_site
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
    contents,
    kind_of,
    one_level,
)
from nnx_core.graph.objects import Object, create, is_array
from nnx_core.graph.structure import (
    Element,
    GraphDef,
    Leaf,
    Node,
    Ref,
    Static,
    Template,
    VariableDef,
    static,
    template_of,
)
from nnx_core.state import State, sorted_keys
from nnx_core.variables import Variable, freeze_metadata, new_variable, set_metadata_dict, set_raw, thaw_metadata

Group = Hashable
Spec = Any
AS_STATIC = type("AS_STATIC", (), {"__repr__": lambda self: "static"})()  # a spec: part of the structure
#: One group on its way through JAX: values of Variables and of arrays that objects own, then loose leaves.
Leaves = tuple[list[Any], list[Any]]


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
    """Where a leaf belongs that is no Variable: the index of an object, the keys from it down to the leaf.

    Not `findable` if those keys do not lead to it: inside of a pytree that only JAX can open.
    """

    owner: int
    keys: Path
    findable: bool = True

    def below(self, key: Hashable) -> "OwnedBy":
        """The same, one level down."""
        return OwnedBy(self.owner, (*self.keys, key), self.findable)


Owner = OwnedBy | None


class Refs:
    """Object <-> index, and where each was first reached, for the length of one call."""

    __slots__ = ("indices", "objects", "places")

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.indices: dict[int, int] = {}
        self.places: list[Any] = []  # a Place each; None where nobody asks for it

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


class AttributePlace:
    """An array that an object owns: index of the object, keys from it down to the array."""

    __slots__ = ("findable", "index", "keys")

    def __init__(self, index: int, keys: Path, findable: bool):
        self.index, self.keys, self.findable = index, keys, findable


class Packer:
    """One walk over some arguments. Afterwards: `leaves` by group, and what was met on the way."""

    def __init__(
        self,
        groups: tuple[Group, ...],
        refs: Refs,
        *,
        allow_sharing: bool = True,
        strict: bool = True,
        trace_numbers: bool = True,
        describe: Any = None,
    ):
        self.groups = groups
        self.group_index = {group: i for i, group in enumerate(groups)}
        self.leaves: list[Leaves] = [([], []) for _ in groups]
        #: For each value, the Variable or AttributePlace it came from; for each loose leaf its group.
        self.sources: list[list[Variable[Any] | AttributePlace]] = [[] for _ in groups]
        self.loose_groups: list[int] = []
        self.containers: list[tuple[int, Hashable]] = []
        self.states: list[State] = []
        self.refs = refs
        self.allow_sharing = allow_sharing
        self.strict = strict
        self.trace_numbers = trace_numbers
        self.describe = describe  # what to do to a Variable's metadata before it leaves: (metadata, value, group)

    def walk(self, x: Any, place: Place, owner: Owner = None) -> Element:
        """The structure of `x`; its leaves go into `self.leaves`."""
        if place.spec is AS_STATIC:
            return static(x)
        kind = kind_of(x)
        if kind == VARIABLE:
            return self._variable(x, place)
        if kind == OBJECT:
            return self._object(x, place)
        if kind == STATIC:
            return static(x)
        if kind in (ARRAY, NUMBER):
            return self._leaf(x, place, owner, kind)
        if kind == PYTREE:
            return self._pytree(x, place, owner)
        if kind in (DICT, STATE):
            if kind == STATE:
                self.states.append(x._root)
            items = x if kind == DICT else x._mapping
            keys = sorted_keys(items)
            order = None if kind == STATE or list(items) == keys else tuple(items)
            return self._node(type(x), keys, [items[k] for k in keys], order, None, place, owner)
        return self._node(type(x), list(range(len(x))), x, None, None, place, owner)

    def _node(
        self, kind: type, keys: list[Any], values: Any, order: Any, extra: Hashable, place: Place, owner: Any
    ) -> Node:
        path, spec, _ = place
        if type(spec) in _PREFIXES or type(spec) is kind:
            specs = prefix_of(spec, keys, kind, path)
            below = [Place((*path, key), s, len(path) + 1) for key, s in zip(keys, specs, strict=True)]
        else:
            below = [place.below(key) for key in keys]
        children = tuple(
            self.walk(value, at, owner and owner.below(key)) for key, value, at in zip(keys, values, below, strict=True)
        )
        return Node(kind, None, tuple(keys), children, order, extra)

    def _pytree(self, x: Any, place: Place, owner: Any) -> Element:
        keys, children, treedef = one_level(x)
        if owner is not None and not isinstance(x, tuple):
            owner = owner._replace(findable=False)
        return self._node(type(x), keys, children, None, treedef, place, owner)

    def _leaf(self, x: Any, place: Place, owner: Any, kind: int) -> Element:
        if owner is None and kind == NUMBER and not self.trace_numbers:
            return static(x)
        if owner is None:
            group = self._group(place, x)
            self.leaves[group][1].append(x)
            self.loose_groups.append(group)
            return Leaf(group, owned=False)
        index, keys, findable = owner
        if kind == NUMBER and self.refs.objects[index]._nnx_mark(keys[0]) != "data":
            return static(x)  # as in NNX, a number stored on an object is configuration
        group = self._group(place, x)
        self.leaves[group][0].append(x)
        self.sources[group].append(AttributePlace(index, keys, findable))
        return Leaf(group, owned=True)

    def _group(self, place: Place, x: Any) -> int:
        path, spec, base = place
        group = spec.group(path[base:], x) if isinstance(spec, ByFilter) else spec
        try:
            return self.group_index[group]
        except (KeyError, TypeError):
            raise SpecError(f"{show_path(path)}: {group!r} is none of the treatments {self.groups}.") from None

    def _known(self, index: int, place: Place, treatment: Any) -> Ref:
        first = self.refs.places[index]
        if not self.allow_sharing:
            raise SharedReferenceError(type(self.refs.objects[index]).__name__, first.path, place.path)
        if self.strict and first.spec is not treatment and first.spec != treatment:
            name = type(self.refs.objects[index]).__name__
            raise AliasError(name, (first.path, show(first.spec)), (place.path, show(treatment)))
        return Ref(index)

    def _variable(self, v: Variable[Any], place: Place) -> Element:
        group = self._group(place, v)
        index = self.refs.indices.get(id(v))
        if index is not None:
            return self._known(index, place, self.groups[group])
        index = self.refs.add(v, Place(place.path, self.groups[group], place.base))
        value, metadata = v._raw_value, v._var_metadata
        self.leaves[group][0].append(value)
        self.sources[group].append(v)
        if self.describe is not None:
            metadata = self.describe(v, self.groups[group])
        return VariableDef(type(v), index, freeze_metadata(metadata), group)

    def _object(self, obj: Object, place: Place) -> Element:
        path, spec, _ = place
        index = self.refs.indices.get(id(obj))
        if index is not None:
            return self._known(index, place, spec)
        if type(spec) in _PREFIXES:
            raise SpecError(
                f"{show_path(path)} is a {type(obj).__name__}, expected one treatment for it (or StateAxes,"
                f" StateSharding, ...), found {spec!r}."
            )
        index = self.refs.add(obj, place)
        items = obj._nnx_items()
        order = tuple(items)
        keys = tuple(sorted_keys(order))
        children = tuple(self.attribute(index, obj, key, items[key], place) for key in keys)
        marks = tuple(sorted(obj._nnx_marks.items()))
        return Node(type(obj), index, keys, children, None if order == keys else order, marks)

    def attribute(self, index: int, obj: Object, key: Hashable, value: Any, place: Place) -> Element:
        """The structure of one attribute (or item) of the object under `index`, which is at `place`."""
        if obj._nnx_mark(key) == "static":
            return static(value)
        kind = kind_of(value)
        if kind == STATIC or (kind == NUMBER and obj._nnx_mark(key) is None):
            return static(value)
        if can_change(value):
            self.containers.append((index, key))
        return self.walk(value, place.below(key), OwnedBy(index, (key,)))


_PREFIXES = (tuple, list, dict)


def prefix_of(spec: Any, keys: list[Any], kind: type, path: Path) -> list[Any]:
    """The spec of each child, where `spec` is a prefix: a container of the same form.

    Raises:
      SpecError: if it has another form.
    """
    if isinstance(spec, dict | State):
        spec = spec._mapping if isinstance(spec, State) else spec
        found = [spec.get(key, _ABSENT) for key in keys]
        if len(spec) == len(keys) and _ABSENT not in [f for f in found if f is _ABSENT]:
            return found
    elif isinstance(spec, list | tuple) and len(spec) == len(keys):
        return list(spec)
    raise SpecError(
        f"{show_path(path)} is a {kind.__name__} with {len(keys)} items; the treatment given for it has another"
        f" form: {spec!r}."
    )


_ABSENT: Any = object()


def show(treatment: Any) -> str:
    """A treatment in words, for errors."""
    return "not mapped" if treatment is None else f"axis {treatment}" if type(treatment) is int else str(treatment)


def require_graph(x: Any, function: str) -> None:
    """Raise NotAGraphError unless there can be something to walk in `x`."""
    if kind_of(x) in (STATIC, NUMBER, ARRAY) and x is not None:
        raise NotAGraphError(f"nnx.{function} needs a module, Variable or pytree, found {type(x).__name__}.")


# ---- unpack ----


class Watch:
    """What `unpack` built, as it was, so that `collect` can tell what changed."""

    __slots__ = ("arrays", "containers", "objects", "states", "variables")

    def __init__(self) -> None:
        self.variables: list[tuple[int, Variable[Any], Any, dict[str, Any], int]] = []
        self.objects: list[tuple[int, Object, int, dict[Any, Any]]] = []
        self.arrays: list[tuple[int, Object, Path, Any, int]] = []
        self.containers: list[tuple[int, Object, Hashable, list[Any]]] = []
        self.states: list[tuple[int, Hashable, State, int]] = []


class Unpacker:
    """Rebuilds a structure with fresh objects under the structure's own indices."""

    def __init__(
        self,
        leaves: tuple[Leaves, ...],
        refs: Refs,
        groups: tuple[Group, ...] | None = None,
        watch: Watch | None = None,
        describe: Any = None,
        templates: dict[int, Template] | None = None,
    ):
        self.templates = {} if templates is None else templates
        self.groups = groups
        self.trace = current_trace()
        self.values = [iter(values) for values, _ in leaves]
        self.loose = [iter(loose) for _, loose in leaves]
        self.refs, self.watch, self.describe = refs, watch, describe

    def build(self, d: Element, place: Place | None, owner: Owner = None) -> Any:
        """The object, container or leaf that `d` describes; without `place` nobody asks for paths later."""
        if type(d) is Static:
            return d.value
        if type(d) is VariableDef:
            return self._variable(d, place)
        if type(d) is Leaf:
            return self._leaf(d, owner)
        if type(d) is Ref:
            return self.refs.objects[d.id]
        assert type(d) is Node  # there is nothing else
        return self._node(d, place, owner) if d.id is None else self._object(d, place)

    def _leaf(self, d: Leaf, owner: Any) -> Any:
        if not d.owned:
            return next(self.loose[d.group])
        value = next(self.values[d.group])
        if self.watch is not None and len(owner.keys) == 1:
            self.watch.arrays.append((owner.owner, self.refs.objects[owner.owner], owner.keys, value, d.group))
        return value

    def _variable(self, d: VariableDef, place: Place | None) -> Variable[Any]:
        value = next(self.values[d.group])
        v: Variable[Any] = new_variable(d.kind, value, thaw_metadata(d.metadata) if d.metadata else {}, self.trace)
        if place is None:
            self.refs.objects.append(v)  # nobody will ask for its place, or for its index
            return v
        if self.groups is not None:
            place = Place(place.path, self.groups[d.group], place.base)
            if self.describe is not None:
                set_metadata_dict(v, self.describe(v, place.spec))
        index = self.refs.add(v, place)
        if self.watch is not None:
            self.watch.variables.append((index, v, _snapshot(value), v._var_metadata, d.group))
        return v

    def _node(self, d: Node, place: Place | None, owner: Owner) -> Any:
        if place is None and owner is None:
            variable = self._variable
            children = [
                variable(child, None) if type(child) is VariableDef else self.build(child, None) for child in d.children
            ]
        else:
            children = [
                self.build(child, below, owner and owner.below(key))
                for key, child, below in zip(d.keys, d.children, _places_below(d, place), strict=True)
            ]
        if d.kind is dict:
            new = dict(zip(d.keys, children, strict=True))
            return new if d.order is None else {k: new[k] for k in d.order}
        if issubclass(d.kind, State):
            state = d.kind.over(dict(zip(d.keys, children, strict=True)))
            if self.watch is not None and owner is not None:
                self.watch.states.append((owner.owner, owner.keys[0], state, track(state)))
            return state
        return d.rebuild(children)

    def _object(self, d: Node, place: Place | None) -> Object:
        obj: Object = create(d.kind, self.trace)
        index = self.refs.append(obj) if place is None else self.refs.add(obj, place)
        template, others = template_of(d, self.templates)
        items = template.copy()
        for key, child in others:
            below = place and place.below(key)
            if type(child) is VariableDef:
                items[key] = self._variable(child, below)
            else:  # owners matter to what watches
                items[key] = self.build(child, below, None if self.watch is None else OwnedBy(index, (key,)))
        obj._nnx_fill(items, d.extra)
        if self.watch is not None:
            self.watch.objects.append((index, obj, track(obj), items.copy()))
            for key, value in items.items():
                if can_change(value):
                    self.watch.containers.append((index, obj, key, contents(value)))
        return obj


def _places_below(d: Node, place: Place | None) -> Iterable[Place | None]:
    if place is None:
        return itertools.repeat(None, len(d.keys))
    path, spec, _ = place
    if type(spec) in _PREFIXES or type(spec) is d.kind:
        specs = prefix_of(spec, list(d.keys), d.kind, path)
        return [Place((*path, key), s, len(path) + 1) for key, s in zip(d.keys, specs, strict=True)]
    return [place.below(key) for key in d.keys]


def _snapshot(value: Any) -> Any:
    """`value`, or for a pytree its structure and leaves: a dict may be changed in place."""
    return value if is_array(value) else jax.tree.flatten(value)


def _unchanged(value: Any, before: Any) -> bool:
    if value is before:
        return True
    if is_array(value) or type(before) is not tuple:
        return False
    leaves, treedef = jax.tree.flatten(value)
    return bool(treedef == before[1]) and all(a is b for a, b in zip(leaves, before[0], strict=True))


# ---- collect and apply: what changed ----


class ObjectChange(NamedTuple):
    """Attributes of the object `id` that were set or removed, and the marks it has now."""

    id: int
    set: tuple[tuple[Hashable, Element], ...]
    removed: tuple[Hashable, ...]
    marks: Hashable


@jax.tree_util.register_static
@dataclass(frozen=True)
class After:
    """What a function did: which Variables, arrays and attributes it wrote, and the structure of its result.

    The values travel beside it, group by group, in this order: Variables, arrays, then what is new.
    """

    variables: tuple[tuple[int, Any, int | None], ...]  # index, new metadata or None, group or None if not written
    arrays: tuple[tuple[int, Path, int], ...]  # index of the owner, keys, group
    objects: tuple[ObjectChange, ...]
    result: GraphDef
    idle: frozenset[int] = frozenset()  # Variables whose values travel (a loop carries them) but were not written


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
    leaves = packer.leaves
    variables = []
    idle: set[int] = set()
    for index, v, before, metadata, group in watch.variables:
        written = group in forced.groups or index in forced.variables or not _unchanged(v._raw_value, before)
        news: Any = None if v._var_metadata is metadata else v._var_metadata
        if not written and group in forced.carried:
            idle.add(index)
        travels = written or group in forced.carried
        if travels:
            leaves[group][0].append(v._raw_value)
        if travels or news is not None:
            treatment = packer.groups[group]
            if news is not None:
                news = freeze_metadata(packer.describe(v, treatment) if packer.describe else news)
            variables.append((index, news, group if travels else None))
    changed = _changed_keys(watch)
    arrays = []
    for index, obj, keys, before, group in watch.arrays:
        value = obj._nnx_items().get(keys[0], before)
        if keys[0] not in changed.get(index, ()) and value is not before and is_array(value):
            leaves[group][0].append(value)
            arrays.append((index, keys, group))
    objects = tuple(_object_change(packer, index, keys) for index, keys in changed.items())
    root = packer.walk(result, Place(("result",), spec, 1))
    return After(tuple(variables), tuple(arrays), objects, GraphDef(root), frozenset(idle)), leaves


def _changed_keys(watch: Watch) -> dict[int, dict[Hashable, None]]:
    """For each object that changed, the keys that are new, gone, or hold something else."""
    changed: dict[int, dict[Hashable, None]] = {}
    for index, obj, version, items in watch.objects:
        if obj._nnx_version == version:
            continue
        now = obj._nnx_items()
        arrays = [k for k in now if k in items and is_array(now[k]) and is_array(items[k])]
        keys = [k for k in {**items, **now} if k not in arrays and now.get(k, _ABSENT) is not items.get(k, _ABSENT)]
        changed[index] = dict.fromkeys(keys)
    for index, obj, key, before in watch.containers:
        value = obj._nnx_items().get(key)
        if can_change(value):
            after = contents(value)
            if len(after) != len(before) or not all(a is b for a, b in zip(after, before, strict=True)):
                changed.setdefault(index, {})[key] = None
    for index, key, state, version in watch.states:
        if state._nnx_version != version:
            changed.setdefault(index, {})[key] = None
    return {index: keys for index, keys in changed.items() if keys}


def _object_change(packer: Packer, index: int, keys: dict[Hashable, None]) -> ObjectChange:
    obj, place = packer.refs.objects[index], packer.refs.places[index]
    items = obj._nnx_items()
    new = tuple((k, packer.attribute(index, obj, k, items[k], place)) for k in keys if k in items)
    return ObjectChange(index, new, tuple(k for k in keys if k not in items), tuple(sorted(obj._nnx_marks.items())))


def check_writes(after: After, refs: Refs) -> None:
    """Raise TraceError if something that `after` writes belongs to another trace; before anything is written."""
    trace = current_trace()
    for index, _, _ in after.variables:
        v = refs.objects[index]
        if index in after.idle:
            continue
        if v._trace_state != trace:
            path, site = show_path(refs.places[index].path), getattr(v, "_site", None)
            raise TraceError(type(v).__name__, path, show_site(site))
        if type(v._trace_state) is Borrowing:
            v._trace_state.wrote(v, type(v).__name__)
    for index in [*(change.id for change in after.objects), *(index for index, _, _ in after.arrays)]:
        obj = refs.objects[index]
        if obj._nnx_trace != trace:
            raise TraceError(type(obj).__name__, show_path(refs.places[index].path))


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
        new = {k: unpacker.build(d, None, OwnedBy(change.id, (k,))) for k, d in change.set}
        obj._nnx_assign(new, change.removed)
        if change.marks:
            object.__setattr__(obj, "_nnx_marks", dict(change.marks))  # type: ignore[call-overload]
    return unpacker.build(after.result.root, None)
