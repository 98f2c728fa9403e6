"""Module paths of flax.nnx.bridge that its users reach for, as aliases: `bridge.variables`, `bridge.wrappers`.

Law: nothing is implemented here but two names' signatures; every name is the object that its own room defines.
Importing this file makes `import bridge.variables` and `from bridge.wrappers import ToNNX` work. One place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from flax.core import meta

import nnx_core as nnx
from bridge.context import current_linen_module
from bridge.functional import Functional, functional
from bridge.kinds import collection_of
from bridge.mapping import linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars
from bridge.metadata import BOX, LinenBox, NNXMeta, to_linen_value, to_nnx_variable
from bridge.to_linen import ToLinen, to_linen, to_linen_class
from bridge.to_nnx import ToNNX, lazy_init

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


def linen_rngs_dict(linen_module: Any, add_default: bool = False) -> dict[str, Any]:
    """A key from each random stream of a bound Linen module, by name; `default` only if asked for."""
    names = [name for name in linen_module.scope.rngs if add_default or name != "default"]
    return {name: linen_module.make_rng(name) for name in names}


def sort_variable_types(types: Any) -> list[type]:
    """Variable types, subclasses before their bases, so that the first that fits is the closest."""
    return sorted(types, key=lambda kind: (-len(kind.__mro__), collection_of(kind)))


def _alias(name: str, **names: Any) -> ModuleType:
    made = ModuleType(f"bridge.{name}", f"flax.nnx.bridge's path `{name}`; see bridge/_compat_paths.py.")
    vars(made).update(names)
    sys.modules[made.__name__] = made
    return made


variables = _alias(
    "variables",
    NNXMeta=NNXMeta,
    get_col_name=get_col_name,
    is_vanilla_variable=is_vanilla_variable,
    linen_vars_to_nnx_attrs=linen_vars_to_nnx_attrs,
    nnx_attrs_to_linen_vars=nnx_attrs_to_linen_vars,
    sort_variable_types=sort_variable_types,
    to_linen_var=to_linen_var,
    to_nnx_var=to_nnx_var,
    with_partitioning=with_partitioning,
)
wrappers = _alias(
    "wrappers",
    Functional=Functional,
    ToLinen=ToLinen,
    ToNNX=ToNNX,
    current_linen_module=current_linen_module,
    functional=functional,
    lazy_init=lazy_init,
    linen_rngs_dict=linen_rngs_dict,
    to_linen=to_linen,
    to_linen_class=to_linen_class,
)
initializers = nnx.initializers
