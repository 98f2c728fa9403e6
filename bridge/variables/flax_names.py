"""Functions of flax.nnx's `bridge.variables`, under its names and with its signatures.

Law: each calls what this room defines under a name of its own; nothing is implemented twice.
Knows Variables, boxes and metadata; knows no modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax.core import meta

import nnx_core as nnx
from bridge.variables.kinds import collection_of
from bridge.variables.metadata import BOX, LinenBox, to_linen_value, to_nnx_variable

LogicalNames = tuple[str | None, ...]


def to_linen_var(vs: nnx.Variable[Any]) -> Any:
    """`to_linen_value`, under flax.nnx's name."""
    return to_linen_value(vs)


def to_nnx_var(col: str, x: Any) -> nnx.Variable[Any]:
    """`to_nnx_variable`, under flax.nnx's name."""
    return to_nnx_variable(col, x)


def with_partitioning(fn: Callable[..., Any], names: LogicalNames, mesh: Any = None) -> Callable[..., Any]:
    """An initializer whose result names its axes, and is a `Partitioned` where it is a Linen variable.

    Args:
      fn: an initializer.
      names: a name for each axis, or None.
      mesh: kept with the names.

    >>> import jax
    >>> init = with_partitioning(jax.nn.initializers.ones, ("in", "out"))
    >>> to_linen_var(nnx.Param(init(jax.random.key(0), (2, 3)))).names
    ('in', 'out')
    """
    box = LinenBox(meta.Partitioned(None, names, mesh=mesh))
    if mesh is None:
        return nnx.with_metadata(fn, out_sharding=names, **{BOX: box})
    return nnx.with_partitioning(fn, names, mesh=mesh, **{BOX: box})


def get_col_name(keypath: Sequence[Any]) -> str:
    """The collection of a Linen variable, from its key path in a tree of variables.

    >>> import jax
    >>> get_col_name(jax.tree_util.tree_flatten_with_path({"params": {"w": 1}})[0][0][0])
    'params'
    """
    first = keypath[0]
    return str(getattr(first, "key", getattr(first, "name", first)))


def is_vanilla_variable(vs: nnx.Variable[Any]) -> bool:
    """Whether a Variable has no metadata that a plain value would lose."""
    return not vs.get_metadata()


def sort_variable_types(types: Any) -> list[type]:
    """Variable types, subclasses before their bases, so that the first that fits is the closest."""
    return sorted(types, key=lambda kind: (-len(kind.__mro__), collection_of(kind)))
