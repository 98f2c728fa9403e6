"""Graphs in pure functions: flatten and unflatten, call, map, values without Variables, other kinds of Variables.

Law: `unflatten(*flatten(g))` is isomorphic to g, and several graphs that share objects still do if they are
flattened under one `ref_index` and unflattened under one `index_ref`. Nothing here changes its argument.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax

from nnx_core import filters as filterlib
from nnx_core._errors import NotAGraphError, Path
from nnx_core._statics import freeze_metadata, thaw_metadata
from nnx_core.graph._errors import DuplicateVariableError, IndexSpaceError, StaticDataError
from nnx_core.graph.api import (
    ABSENT,
    BARE,
    by_path,
    graphdef,
    is_bare,
    merge,
    raw_value_of,
    split,
    update,
    variables_by_index,
)
from nnx_core.graph.objects import Object, is_data
from nnx_core.graph.pack import Leaves, OwnedBy, Packer, Place, Refs, apart, in_order
from nnx_core.graph.structure import GraphDef, Node, Ref, Template, VariableDef, call_with, nodes
from nnx_core.graph.unpack import Unpacker
from nnx_core.graph.walk import find_duplicates, recursive_map
from nnx_core.modes import sharing_allowed
from nnx_core.state import FlatState, State
from nnx_core.variables import Variable, set_metadata_dict, set_raw

A = TypeVar("A")
Index = int
#: (GraphDef, State), as `nnx.split(node)` returns it.
PureState = tuple[GraphDef[A], State]  # type: ignore[type-arg]  # generic when it runs, for annotations alone


# ---- flatten and unflatten ----


@jax.tree_util.register_static
class UpdateDef(GraphDef):
    """A structure that also says which of its objects are objects the caller has: pairs (index, the caller's)."""

    __slots__ = ("outer",)

    def __init__(self, root: Any, outer: tuple[tuple[Index, Index], ...]):
        super().__init__(root)
        self.outer = outer

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.outer))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateDef) and self.outer == other.outer and self.root == other.root

    def __reduce__(self) -> tuple[Any, ...]:
        return UpdateDef, (self.root, self.outer)


def flatten(
    node: Any,
    /,
    *,
    with_paths: bool = True,
    ref_index: Refs | None = None,
    ref_outer_index: Refs | None = None,
    graph: bool | None = None,
) -> tuple[GraphDef, Any]:
    """The structure of `node` and its leaves.

    Args:
      node: a module, or any pytree of modules, Variables and arrays.
      with_paths: a FlatState of paths and Variables; False: a list of raw values, in the same order.
      ref_index: `graphlib.RefMap()`, the same one for several graphs that share objects: what an earlier one
        introduced is only referred to.
      ref_outer_index: objects the caller has already, by index; see `UpdateDef`.
      graph: False forbids shared references.

    Raises:
      SharedReferenceError: with `graph=False`, if something is reached twice.

    Example:
      >>> import nnx_core as nnx
      >>> structure, leaves = flatten(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> leaves.paths
      (('bias',), ('kernel',))
      >>> [x.shape for x in flatten(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), with_paths=False)[1]]
      [(3,), (2, 3)]
    """
    packer = Packer((None,), Refs() if ref_index is None else ref_index, allow_sharing=sharing_allowed(graph))
    return flatten_with(packer, node, with_paths, ref_outer_index)


def flatten_with(
    packer: Packer, node: Any, with_paths: bool, outer: Refs | None, at: Path = ()
) -> tuple[GraphDef, Any]:
    """`flatten`, by a Packer with one group; errors say where by `at`, the path of `node`."""
    if is_bare(node):
        return BARE, FlatState([((), node)], sort=False) if with_paths else [node]
    packer.trace_numbers = False
    root = packer.pack(node, Place(at, packer.groups[0], len(at)))
    structure = GraphDef(root) if outer is None else UpdateDef(root, _known_outside(packer.refs, outer))
    [leaves] = packer.leaves
    values = in_order(structure, leaves)
    if not with_paths:
        return structure, list(values)
    pairs: list[tuple[Path, Any]] = []
    for (path, index, _), value in zip(structure.layout, values, strict=True):
        pairs.append((path, value if index is None else packer.refs.objects[index]))
    return structure, FlatState(pairs, sort=False)


def _known_outside(inner: Refs, outer: Refs) -> tuple[tuple[Index, Index], ...]:
    """(index inside, index outside) of the objects that both have; found by identity."""
    outside = outer.indices
    return tuple((i, outside[id(x)]) for i, x in enumerate(inner.objects) if id(x) in outside)


class _Reusing(Unpacker):
    """An Unpacker that fills objects and Variables that are there already.

    Args:
      reuse: by index, what to fill instead of making it new.
      variables: by index, those the values come from; what they say of type and metadata is newer than the structure.
      adopted: those of them that become part of the result themselves.
      recreate: make Variables of values that come without one; False leaves such a value as it is.
    """

    def __init__(
        self,
        leaves: tuple[Leaves, ...],
        refs: Refs,
        templates: dict[int, Template],
        reuse: dict[Index, Any],
        variables: dict[Index, Variable[Any]],
        adopted: dict[Index, Variable[Any]],
        recreate: bool,
    ):
        super().__init__(leaves, refs, templates=templates, adopted=adopted)
        self.reuse, self.variables, self.recreate = reuse, variables, recreate

    def _variable(self, d: VariableDef, place: Place | None) -> Any:
        old, leaf = self.reuse.get(d.id), self.variables.get(d.id)
        if old is None and d.id in self.adopted:
            return super()._variable(d, place)
        if old is None and leaf is None and not self.recreate:
            value = next(self.values[d.group])
            self.refs.add(value, place)
            return value
        if old is None:
            old = super()._variable(d if leaf is None else d._replace(kind=type(leaf)), place)
        else:
            self.refs.add(old, place)
            value = next(self.values[d.group])
            if old._raw_value is not value:
                old._check_can_write()
                set_raw(old, value)
        metadata = d.metadata if leaf is None else freeze_metadata(leaf._var_metadata)
        if freeze_metadata(old._var_metadata) != metadata:
            set_metadata_dict(old, thaw_metadata(metadata))
        return old

    def _object(self, d: Node, place: Place | None) -> Object:
        old: Object | None = self.reuse.get(d.id)  # type: ignore[arg-type]  # objects have an index
        if old is None:
            return super()._object(d, place)
        self.refs.add(old, place)
        before = dict(old._nnx_items())
        now: dict[Any, Any] = {}
        for key, child in zip(d.keys, d.children, strict=True):
            below = None if place is None else place.below(key)
            now[key] = self.build(child, below, OwnedBy(old, (key,)))
        # By identity: a Variable or object that was filled is what it was.
        changed = {key: now[key] for key in d.order or d.keys if key not in before or before[key] is not now[key]}
        gone = tuple(key for key in before if key not in now)
        if changed or gone:
            first_key = next(iter((*changed, *gone)))
            old._nnx_check_can_write(str(first_key))
            old._nnx_assign(changed, gone)
        if tuple(sorted(old._nnx_marks.items())) != d.extra:
            object.__setattr__(old, "_nnx_marks", dict(d.extra))
        return old


def unflatten(
    graphdef: GraphDef,
    state: Any,
    /,
    *,
    index_ref: Refs | None = None,
    outer_index_outer_ref: Refs | None = None,
    copy_variables: bool = False,
    recreate_variables: bool = True,
) -> Any:
    """The inverse of `flatten`: new objects around the leaves.

    Args:
      graphdef: the structure.
      state: its leaves: a State, a FlatState, or a list of values.
      index_ref: `graphlib.IndexMap()`, the same one for several structures of one index space.
      outer_index_outer_ref: objects to fill instead of making new ones, for those that an `UpdateDef` names.
      copy_variables: new Variables. Otherwise the Variables in `state` themselves become part of the result.
      recreate_variables: False leaves a raw value in the place of a Variable as it is, without one around it.

    Raises:
      StateMismatchError: listing all paths that are missing, or that the structure has not.
      LeafCountError: if a list has the wrong length.
      IndexSpaceError: if the structure refers to an object that `index_ref` does not have.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> unflatten(*flatten(model)).kernel is model.kernel
      True
    """
    if not isinstance(graphdef, GraphDef):
        raise TypeError(f"nnx.unflatten needs a GraphDef first, found {type(graphdef).__name__}.")
    refs = Refs() if index_ref is None else index_ref
    _require_known(graphdef, len(refs.objects))
    reuse: dict[Index, Any] = {}
    if outer_index_outer_ref is not None and isinstance(graphdef, UpdateDef):
        reuse = {i: outer_index_outer_ref.objects[o] for i, o in graphdef.outer}
    leaves = by_path(graphdef.paths, (list(state) if isinstance(state, tuple) else state,), require_all=True)
    variables = variables_by_index(graphdef, leaves)
    values = apart(graphdef, [raw_value_of(leaf) for leaf in leaves])
    unpacker = _Reusing(
        (values,),
        refs,
        graphdef.templates,
        reuse,
        variables,
        adopted={} if copy_variables else variables,
        recreate=recreate_variables,
    )
    # With a place, objects can be found again by identity: later structures and step (3) of a context need that.
    return unpacker.unpack(graphdef.root, None if index_ref is None else Place((), None, 0))


def _require_known(structure: GraphDef, known: int) -> None:
    new = {d.id for _, d in nodes(structure.root) if isinstance(d, Node | VariableDef)}
    for _, d in nodes(structure.root):
        if type(d) is Ref and d.id >= known and d.id not in new:
            raise IndexSpaceError(d.id, known)


# ---- calls and maps ----


class _Call:
    """Waits for a call; attributes and items on the way lead to what is called."""

    __slots__ = ("_pair", "_steps")

    def __init__(self, pair: Any, steps: tuple[Callable[[Any], Any], ...] = ()):
        self._pair, self._steps = pair, steps

    def __getattr__(self, name: str) -> "_Call":
        if name.startswith("__"):
            raise AttributeError(name)  # protocols of Python and its tools
        return _Call(self._pair, (*self._steps, lambda x: getattr(x, name)))

    def __getitem__(self, key: Hashable) -> "_Call":
        return _Call(self._pair, (*self._steps, lambda x: x[key]))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, PureState]:
        node = target = merge(*self._pair)
        for step in self._steps:
            target = step(target)
        return target(*args, **kwargs), split(node)


def call(graphdef_state: tuple[Any, ...], /) -> Any:
    """Call a method of the graph that a (GraphDef, State) stands for: `merge`, the method, `split`.

    Args:
      graphdef_state: (graphdef, state, ...), as `nnx.split` returns it.

    Returns:
      A stand-in: calling it, or something reached from it by attributes and items, returns
      (result, (graphdef, state)).

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> pair = nnx.split({"head": nnx.Linear(2, 3, rngs=nnx.Rngs(0))})
      >>> forward = jax.jit(lambda pair, x: call(pair)["head"](x))
      >>> y, pair = forward(pair, jnp.ones((1, 2)))
      >>> y.shape
      (1, 3)
    """
    if not isinstance(graphdef_state, tuple) or not graphdef_state or not isinstance(graphdef_state[0], GraphDef):
        raise TypeError(
            f"nnx.call needs the tuple (graphdef, state) that nnx.split returns, found {type(graphdef_state).__name__}."
        )
    return _Call(graphdef_state)


call_with(call)


def map(f: Callable[[Path, Any], Any], node: A, /, *, graph: bool | None = None, recreate_variables: bool = True) -> A:
    """A copy of `node` in which each Variable and array is f(path, leaf); sharing is kept.

    Args:
      f: returns a Variable, which may be of another type, or the value of one.
      node: a module, or any pytree of modules, Variables and arrays.
      graph: False forbids shared references.
      recreate_variables: False puts what f returns into the result itself, Variable or not; otherwise the result
        has new Variables.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> zeros = map(lambda path, v: v.replace(v * 0), model)
      >>> float(abs(zeros.kernel).sum()), zeros.kernel is model.kernel
      (0.0, False)
    """
    structure, leaves = flatten(node, graph=graph)
    mapped = FlatState([(path, f(path, leaf)) for path, leaf in leaves], sort=False)
    return unflatten(structure, mapped, copy_variables=recreate_variables, recreate_variables=recreate_variables)


def as_pure(tree: A) -> A:
    """A copy of `tree` with the raw value of each Variable in its place.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> jax.tree.map(jnp.shape, as_pure(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
      State({'bias': (3,), 'kernel': (2, 3)})
    """
    return recursive_map(lambda _, x: raw_value_of(x), tree, graph=True)


pure = as_pure


# ---- kinds of Variables ----


def with_vars(
    node: A,
    /,
    *,
    hijax: bool | None = None,
    ref: bool | None = None,
    mutable: bool | None = None,
    only: filterlib.Filter = ...,
    allow_duplicates: bool = False,
) -> A:
    """A copy of `node` whose Variables hold their values in a `jax.Ref` (`ref=True`) or do not (`ref=False`).

    Args:
      node: a module, or any pytree of modules and Variables.
      hijax: accepted for flax.nnx's callers; there is one kind of Variable here.
      ref: None leaves it as it is.
      mutable: an older name of `ref`.
      only: the Variables that are replaced; the copy shares all others with `node`.
      allow_duplicates: let a Variable that is reached twice stay shared.

    Raises:
      DuplicateVariableError: listing the paths of each Variable that is reached twice.

    Example:
      >>> import nnx_core as nnx
      >>> model = with_vars(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ref=True)
      >>> model.kernel.has_ref, with_vars(model, ref=False).kernel.has_ref
      (True, False)
    """
    ref = mutable if ref is None else ref
    chosen = filterlib.All(Variable, filterlib.to_predicate(only))
    if not allow_duplicates and (found := find_duplicates(node, only=chosen)):
        raise DuplicateVariableError(found)

    def convert(path: Path, x: Any) -> Any:
        if not chosen(path, x):
            return x
        value = x._raw_value
        if ref is not None and ref != x.has_ref:
            value = jax.new_ref(value) if ref else value[...]
        return x.replace(value)

    return recursive_map(convert, node, graph=True)


vars_as = with_vars


# ---- checks ----


def blank(node: Any, *states: Any) -> None:
    """Let go of the values in `node` that `states` have too: a scalar takes their place.

    Raises:
      StateMismatchError: listing all paths of `states` that `node` has not.
    """
    paths = graphdef(node).paths
    leaves = by_path(paths, states, require_all=False)
    empty = jax.numpy.zeros(())
    update(node, State([(path, empty) for path, leaf in zip(paths, leaves, strict=True) if leaf is not ABSENT]))


def check_pytree(pytree: Any) -> None:
    """Check that the attributes of an object are marked as what they are.

    Raises:
      NotAGraphError: if `pytree` is no nnx.Pytree.
      StaticDataError: if an attribute that is marked static holds arrays, Variables or objects.

    Example:
      >>> import nnx_core as nnx
      >>> check_pytree(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    """
    if not isinstance(pytree, Object):
        raise NotAGraphError(f"Expected a Pytree, got {type(pytree).__name__}.")
    for key, value in pytree._nnx_items().items():
        if pytree._nnx_mark(key) == "static" and is_data(value):
            raise StaticDataError(type(pytree).__name__, (key,), type(value).__name__)
