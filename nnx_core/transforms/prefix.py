"""prefix: how each leaf of a graph is treated, computed from its path and value.

Law: the result has the form of the arguments with a `StateAxes` for each object and a treatment for each other
leaf; so it can be given as `in_axes`, and two places of one object get equal treatments.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from nnx_core import filters as filterlib
from nnx_core._errors import FilterError, Path, show_path
from nnx_core.graph.api import graphdef
from nnx_core.graph.classify import one_level
from nnx_core.graph.functional import flatten
from nnx_core.graph.objects import Object
from nnx_core.graph.structure import Ref, VariableDef, nodes
from nnx_core.modes import sharing_allowed
from nnx_core.transforms.groups import StateAxes
from nnx_core.variables import Variable

Choose = Callable[[Path, Any], Hashable]


def prefix(node: Any, filter_map: Mapping[Any, Hashable] | Choose, /, *, graph: bool | None = None) -> Any:
    """`node` with a treatment in the place of each leaf, for `in_axes` and the like.

    Args:
      node: a module, or any pytree of modules, Variables and arrays.
      filter_map: (path, leaf) -> treatment, or {filter: treatment}, of which the first that matches counts.
      graph: False forbids shared references.

    Raises:
      FilterError: naming the path, if no filter matches a leaf.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> d = {"a": nnx.Param(jnp.array(2)), "b": nnx.BatchStat(jnp.arange(5))}
      >>> axes = prefix(d, {nnx.Param: None, nnx.BatchStat: 0})
      >>> axes
      {'a': None, 'b': 0}
      >>> nnx.vmap(lambda d: d["a"] * d["b"], in_axes=(axes,))(d)
      Array([0, 2, 4, 6, 8], dtype=int32)
    """
    choose = _by_filters(filter_map) if isinstance(filter_map, Mapping) else filter_map
    if not sharing_allowed(graph):
        graphdef(node, graph=False)  # raises if something is shared
    return _prefix(node, (), choose)


def _by_filters(rules: Mapping[Any, Hashable]) -> Choose:
    predicates = filterlib.to_predicates(tuple(rules))

    def choose(path: Path, leaf: Any) -> Hashable:
        i = filterlib.first_match(predicates, path, leaf)
        if i is None:
            raise FilterError(
                f"No filter of {list(rules)} matches {show_path(path)} ({type(leaf).__name__}). End with `...`."
            )
        return list(rules.values())[i]

    return choose


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
    return StateAxes((filterlib.PathIn(*below), treatment) for treatment, below in paths.items())
