"""States that belong to the same Variables: parameters, their gradients, their averages.

Law: what does not fit is reported before anything is written, all paths at once. Knows Variables and
paths; knows nothing of optax.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from nnx_core import filters as filterlib
from nnx_core._errors import OptimizerError, Path
from nnx_core.graph.api import state as state_of
from nnx_core.optim._errors import GradientMismatchError, Mismatch
from nnx_core.state import State, to_flat_state
from nnx_core.variables import Variable, new_variable


def is_variable(x: Any) -> bool:
    """Whether `x` is a Variable, for `is_leaf`."""
    return isinstance(x, Variable)


def raw(x: Any) -> Any:
    """The value of a Variable without hooks, read out of its `jax.Ref` if it lives in one; other things as they are."""
    if not isinstance(x, Variable):
        return x
    return x._raw_value[...] if x.has_ref else x._raw_value


def write(v: Variable[Any], value: Any) -> None:
    """Write a value without hooks, into the `jax.Ref` if there is one."""
    if v.has_ref:
        v._raw_value[...] = value
    else:
        v.set_raw_value(value)


def require_writable(variables: Iterable[Variable[Any]]) -> None:
    """Raise TraceError unless all of them may be written here."""
    for v in variables:
        if not v.has_ref:
            v._check_can_write()


def selected(node: Any, filter: filterlib.Filter, graph: bool | None = None) -> State:
    """The Variables of `node` that the filter matches.

    Raises:
      OptimizerError: if `node` is a lone Variable or array, which has no path.
    """
    found = state_of(node, filter, graph=graph)
    if not isinstance(found, State):
        raise OptimizerError(
            f"Expected a module or another container of Variables, found a single {type(found).__name__}, which has no"
            ' path. Put it into a module, or into a dict: {"w": variable}.'
        )
    return found


def by_path(tree: Any) -> dict[Path, Any]:
    """Leaf by path of a State, or of a module or container that holds Variables or States."""
    return dict(to_flat_state(tree if isinstance(tree, State) else selected(tree, ...)))


def rewrapped(params: State, leaves: Mapping[Path, Any]) -> State:
    """The raw values of `leaves`, as Variables like those of `params`: optax compares types and metadata."""

    def like(path: Path, x: Any) -> Any:
        value = raw(leaves[path])
        return new_variable(type(x), value, dict(x._var_metadata)) if is_variable(x) else value

    return params.map(like)


def nested(tree: Any) -> Any:
    """A State as dicts in dicts, with the same leaves; other things as they are."""
    if not isinstance(tree, State):
        return tree
    return {key: nested(x) for key, x in tree.items()}


def fitted(params: State, grads: Any, elsewhere: Callable[[], Iterable[Path]] = tuple) -> State:
    """`grads` as Variables like those of `params`.

    Raises:
      GradientMismatchError: they do not fit; `elsewhere` as in `misfits`.
    """
    gradients = by_path(grads)
    problems = misfits(by_path(params), gradients, elsewhere)
    if any(problems):
        raise GradientMismatchError(*problems)
    return rewrapped(params, gradients)


def misfits(
    wanted: Mapping[Path, Any], found: Mapping[Path, Any], elsewhere: Callable[[], Iterable[Path]] = tuple
) -> tuple[list[Path], list[Path], list[Mismatch]]:
    """(missing, unexpected, mismatched) of `found`; shapes are compared, dtypes are not.

    Args:
      wanted, found: leaf by path.
      elsewhere: more paths that `found` may have; only asked if there are some too many.
    """
    missing = [p for p in wanted if p not in found]
    unexpected = [p for p in found if p not in wanted]
    if unexpected:
        known = set(elsewhere())
        unexpected = [p for p in unexpected if p not in known]
    shapes = [(p, _shapes(raw(wanted[p])), _shapes(raw(found[p]))) for p in wanted if p in found]
    return missing, unexpected, [(p, _show(a), _show(b)) for p, a, b in shapes if a != b]


def _shapes(value: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jax.tree.flatten(value)
    return treedef, [tuple(getattr(x, "shape", ())) for x in leaves]


def _show(shapes: tuple[Any, list[tuple[int, ...]]]) -> str:
    treedef, each = shapes
    lone = jax.tree_util.treedef_is_leaf(treedef)
    return f"shape {each[0]}" if lone else f"{treedef} of shapes {each}"
