"""prefix: how each leaf of a graph is treated, computed from its path and value.

Law: the result has the form of the arguments, so that it can be given as `in_axes`, and two places of one object get
equal treatments. There are two forms: a `StateAxes` for each object, which knows sharing and what is added later; and,
where sharing is forbidden, the objects themselves with a treatment in the place of each leaf, which `jax.vmap` takes.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from nnx_core import filters as filterlib
from nnx_core._errors import Path, SpecError, show_path
from nnx_core.graph.classify import one_level, plain_key
from nnx_core.graph.functional import flatten
from nnx_core.graph.objects import Object, is_array
from nnx_core.graph.structure import Ref, VariableDef, nodes
from nnx_core.graph.walk import require_unshared
from nnx_core.modes import sharing_allowed
from nnx_core.transforms.groups import FilterGroups, StateAxes
from nnx_core.variables import Variable

Choose = Callable[[Path, Any], Hashable]


def prefix(node: Any, filter_map: Mapping[Any, Hashable] | Choose, /, *, graph: bool | None = None) -> Any:
    """`node` with a treatment in the place of each leaf, for `in_axes` and the like.

    Args:
      node: a module, or any pytree of modules, Variables and arrays.
      filter_map: (path, leaf) -> treatment, or {filter: treatment}, of which the first that matches counts.
      graph: False forbids shared references, and gives copies of the objects themselves.

    Returns:
      For each object a `StateAxes`, in which what `node` gets later has the treatment that `filter_map` says; with
      `graph=False` an object of its type, with its attributes, whose leaves are treatments: a prefix for `jax.vmap`,
      and for transforms of nnx under `graph=False`.

    Raises:
      FilterError: naming the path, if no filter matches a leaf.
      SharedReferenceError: with `graph=False`, if something is reached twice.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> d = {"a": nnx.Param(jnp.array(2)), "b": nnx.BatchStat(jnp.arange(5))}
      >>> axes = prefix(d, {nnx.Param: None, nnx.BatchStat: 0})
      >>> axes
      {'a': None, 'b': 0}
      >>> nnx.vmap(lambda d: d["a"] * d["b"], in_axes=(axes,))(d)
      Array([0, 2, 4, 6, 8], dtype=int32)
      >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> prefix(layer, {"bias": None, ...: 0}, graph=False).kernel
      0
    """
    choose: Choose = _ByFilters(filter_map) if isinstance(filter_map, Mapping) else filter_map
    if sharing_allowed(graph):
        return _prefix(node, (), choose)
    require_unshared(node)

    def treatment(path: tuple[Any, ...], leaf: Any) -> Hashable:
        return choose(tuple(map(plain_key, path)), leaf)

    return jax.tree_util.tree_map_with_path(treatment, node, is_leaf=lambda x: isinstance(x, Variable))


class _ByFilters(FilterGroups):
    """The treatment of the first filter that matches; a value, so that two prefixes of one mapping are equal."""

    __call__ = FilterGroups.group

    def __repr__(self) -> str:
        return repr([predicate for predicate, _ in self.rules])


@dataclass(frozen=True)
class _Later:
    """What an object got after the prefix was computed: the leaves for which `choose` says `treatment`.

    `base` is the path of the object, which does not count: objects are reached by several.
    """

    choose: Choose
    treatment: Hashable
    base: Path = field(compare=False)

    @property
    def is_pure(self) -> bool:
        """See `filters.is_pure`."""
        return isinstance(self.choose, _ByFilters) and self.choose.is_pure

    def __call__(self, path: Path, leaf: Any) -> bool:
        return self.choose((*self.base, *path), leaf) == self.treatment


def _prefix(x: Any, path: Path, choose: Choose) -> Any:
    if isinstance(x, Object):
        return _of_object(x, path, choose)
    if isinstance(x, Variable) or jax.tree_util.all_leaves([x]):
        return choose(path, x)
    keys, children, treedef = one_level(x)
    treatments = [_prefix(child, (*path, key), choose) for key, child in zip(keys, children, strict=True)]
    return treedef.unflatten(treatments)


def _of_object(x: Object, path: Path, choose: Choose) -> StateAxes:
    structure, flat_state = flatten(x)
    leaves: dict[Path, Any] = dict(flat_state)
    variables: dict[int, Any] = {}
    for path_below, d in nodes(structure.root):
        if type(d) is VariableDef:
            variables[d.id] = leaves[path_below]
        elif type(d) is Ref and d.id in variables:  # reached a second time, which the State does not say
            leaves[path_below] = variables[d.id]
    paths: dict[Hashable, list[Path]] = {}
    for path_below, leaf in leaves.items():
        treatment = choose((*path, *path_below), leaf)
        paths.setdefault(treatment, []).append(path_below)
    now = [(filterlib.PathIn(*below), treatment) for treatment, below in paths.items()]
    treatments = {**dict.fromkeys(choose.groups), **paths} if isinstance(choose, _ByFilters) else paths
    return StateAxes([*now, *((_Later(choose, treatment, path), treatment) for treatment in treatments)])


# ---- objects where treatments are expected -----------------------------------------------------------------------


def without_objects(spec: Any, option: str, sharing: bool, later: Hashable) -> Any:
    """`spec` with a StateAxes in the place of each object of treatments, as `prefix(graph=False)` makes them.

    Args:
      spec: what the user gave for `option`.
      sharing: whether shared references are allowed: there an object says nothing, for leaves have several paths.
      later: how to treat what is added to the object by the call.

    Raises:
      SpecError: if there is an object and sharing is allowed, or if it holds arrays: a model instead of a prefix.
    """
    return _without_objects(spec, (option,), sharing, later)


def _without_objects(spec: Any, path: Path, sharing: bool, later: Hashable) -> Any:
    if type(spec) in (tuple, list):
        return type(spec)([_without_objects(x, (*path, i), sharing, later) for i, x in enumerate(spec)])
    if type(spec) is dict:
        return {key: _without_objects(x, (*path, key), sharing, later) for key, x in spec.items()}
    if not isinstance(spec, Object | Variable):
        return spec
    if sharing:
        raise SpecError(
            f"{show_path(path)} is a {type(spec).__name__}, expected a treatment of it.\n"
            "Give one for the whole, nnx.StateAxes or nnx.StateSharding by filter, or nnx.prefix(model, {...},"
            " graph=True). With graph=False a transform takes what nnx.prefix(model, {...}, graph=False) gives."
        )
    return _axes_of(spec, path, later)


def _axes_of(spec: Any, path: Path, later: Hashable) -> StateAxes:
    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, Variable)

    paths: dict[Hashable, list[Path]] = {}
    for entries, treatment in jax.tree_util.tree_flatten_with_path(spec, is_leaf=is_leaf)[0]:
        below = tuple(map(plain_key, entries))
        if isinstance(treatment, Variable) or is_array(treatment):
            raise SpecError(
                f"{show_path((*path, *below))}: expected a treatment, found a {type(treatment).__name__}.\n"
                f"Give nnx.prefix(model, {{...}}, graph=False), and not the {type(spec).__name__} itself."
            )
        paths.setdefault(treatment, []).append(below)
    now = [(_Below(frozenset(starts)), treatment) for treatment, starts in paths.items()]
    return StateAxes([*now, (..., later)])


@dataclass(frozen=True)
class _Below:
    """Leaves at one of `starts`, or below it."""

    starts: frozenset[Path]
    is_pure: ClassVar[bool] = True

    def __call__(self, path: Path, leaf: Any) -> bool:
        return any(path[:length] in self.starts for length in range(len(path) + 1))
