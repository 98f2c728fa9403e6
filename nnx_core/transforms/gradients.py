"""Trees of gradients: gradients, tangents and cotangents in the form of the values they belong to.

Law: each leaf of a structure has one gradient, met in walking order; of the type of the leaf, or `float0` for
integers and keys. Knows structures and what users say of them; knows none of JAX's transforms.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core._errors import Path, SpecError, show_path
from nnx_core._statics import thaw_metadata
from nnx_core.filters import Filter
from nnx_core.graph.classify import ARRAY, NUMBER, PYTREE, kind_of, one_level
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import Leaves, reader
from nnx_core.graph.structure import LEAVES, Element, LeafDef, Node, Ref, VariableDef, leaf_defs
from nnx_core.state import State
from nnx_core.transforms.groups import Diff, DiffState, FilterGroups, Rest
from nnx_core.transforms.lift import name_of
from nnx_core.variables import Variable, new_variable

_ABSENT: Any = object()
_FORM = "Give it the form of the value it belongs to; None stands for zero."


# ---- what users say ----


def holds_object(x: Any) -> bool:
    """Whether there is an object in `x`, a pytree."""
    return any(isinstance(leaf, Object) for leaf in jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, Object)))


def position_of(argnum: int | DiffState) -> int:
    """The position of the argument that `argnum` names."""
    return argnum.argnum if isinstance(argnum, DiffState) else argnum


def variables_matching(filter: Filter) -> FilterGroups:
    """The spec of an argument of which the Variables that match are differentiated."""
    return FilterGroups(((filter, Diff), (..., Rest)))


def with_aux(f: Callable[..., Any], out: Any, what: str) -> tuple[Any, Any]:
    """`out`, what f returned, if it is a pair as `has_aux=True` says."""
    if not isinstance(out, tuple) or len(out) != 2:
        raise SpecError(
            f"{name_of(f)} has_aux=True: expected ({what}, aux), found {type(out).__name__}."
            " Return a pair, or leave has_aux out."
        )
    return out


# ---- from leaves to a tree ----


def as_states(d: Element, read: Callable[[LeafDef], Any], wanted: Callable[[LeafDef], bool]) -> Any:
    """Gradients in the form of `d`, with a State for each object, and None where no gradient is wanted.

    Args:
      read: gives the gradient of a wanted leaf; they are asked for in walking order.
    """
    if isinstance(d, LEAVES):
        return _gradient(d, read(d)) if wanted(d) else None
    if type(d) is Ref:
        return State([])  # it has its gradient where it was reached first
    if type(d) is not Node:
        return None
    if d.id is not None or issubclass(d.kind, State):
        leaves = [(path, leaf) for path, leaf in leaf_defs(d) if wanted(leaf)]
        return State([(path, _gradient(leaf, read(leaf))) for path, leaf in leaves])
    children = [as_states(child, read, wanted) for child in d.children]
    return dict(zip(d.keys, children, strict=True)) if d.kind is dict else d.rebuild(children)


def _gradient(d: LeafDef, value: Any) -> Any:
    return new_variable(d.kind, value, thaw_metadata(d.metadata)) if type(d) is VariableDef else value


def no_leaves(groups: int) -> tuple[Any, ...]:
    """Leaves of so many groups that are all None, as many as anybody asks for."""
    return tuple((itertools.repeat(None), itertools.repeat(None)) for _ in range(groups))


# ---- from a tree to leaves ----


def fitted(d: Element, tree: Any, path: Path, primals: Leaves, group: int = 0) -> Leaves:
    """The tangents or cotangents that `tree` has for the leaves of `d` in one group, checked against `primals`."""
    primal_of = reader(primals)
    values: list[Any] = []
    loose: list[Any] = []
    for leaf_path, leaf, gradient in matched(d, tree, path):
        if leaf.group == group:
            (values if leaf.owned else loose).append(fit(leaf_path, primal_of(leaf), gradient))
    return values, loose


def matched(d: Element, tree: Any, path: Path) -> Iterator[tuple[Path, LeafDef, Any]]:
    """(path, leaf, what `tree` has there) for each leaf of `d`; None stands for anything below it."""
    if isinstance(d, LEAVES):
        yield path, d, tree._raw_value if isinstance(tree, Variable) else tree
    elif type(d) is Node:
        for key, child in zip(d.keys, d.children, strict=True):
            yield from matched(child, _member(d, key, tree, path), (*path, key))


def _member(d: Node, key: Hashable, tree: Any, path: Path) -> Any:
    if tree is None or tree is _ABSENT:
        return tree
    if isinstance(tree, Object):
        return tree._nnx_items().get(key, _ABSENT)
    if isinstance(tree, dict | State):
        return tree.get(key, _ABSENT)
    if isinstance(tree, list | tuple) and len(tree) == len(d.keys):
        return tree[d.keys.index(key)]
    if kind_of(tree) == PYTREE and not isinstance(tree, tuple):
        keys, children, _ = one_level(tree)
        return dict(zip(keys, children, strict=True)).get(key, _ABSENT)
    form = f"{len(tree)} items" if isinstance(tree, list | tuple) else f"a {type(tree).__name__}"
    raise SpecError(
        f"{show_path(path)}: expected the form of a {d.kind.__name__} with {len(d.keys)} items, found {form}. {_FORM}"
    )


def fit(path: Path, primal: Any, gradient: Any) -> Any:
    """`gradient` of one leaf, whose value is `primal`: as JAX wants it.

    Raises:
      SpecError: if it has another form or shape; it names `path`.
    """
    if gradient is _ABSENT:
        raise SpecError(f"{show_path(path)} is missing. Give a tangent, or None for zero.")
    treedef: Any  # jax's stubs leave out most of it
    leaves, treedef = jax.tree.flatten(primal)
    try:
        parts = [None] * len(leaves) if gradient is None else treedef.flatten_up_to(gradient)
    except ValueError:
        raise SpecError(
            f"{show_path(path)}: expected the form {treedef}, found {jax.tree.structure(gradient)}. {_FORM}"
        ) from None
    return treedef.unflatten([_fit_array(path, leaf, part) for leaf, part in zip(leaves, parts, strict=True)])


def _fit_array(path: Path, primal: Any, gradient: Any) -> Any:
    shape, dtype = shape_and_dtype(primal)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.zeros(shape, jax.dtypes.float0)
    if gradient is None:
        return jnp.zeros(shape, dtype)
    if kind_of(gradient) not in (ARRAY, NUMBER):
        kind = type(gradient).__name__
        raise SpecError(f"{show_path(path)}: expected an array of shape {shape}, found a {kind}. {_FORM}")
    if jnp.shape(gradient) != shape:
        raise SpecError(f"{show_path(path)}: expected shape {shape}, found {jnp.shape(gradient)}. {_FORM}")
    if getattr(gradient, "dtype", None) == jax.dtypes.float0:
        return jnp.zeros(shape, dtype)
    return gradient if kind_of(gradient) == ARRAY else jnp.asarray(gradient, dtype)


def shape_and_dtype(x: Any) -> tuple[tuple[int, ...], Any]:
    """Of an array or number; the dtype of a random key is its own."""
    return jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x)
