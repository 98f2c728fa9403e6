"""vmap.

Law: `vmap(f)` on leaves stacked along their axes equals stacking what f gives for each; a Variable that is not
mapped may be read, and written only with what does not depend on the mapped ones. Axis names in metadata lose
the mapped axis inside and get it back outside; an axis without a name is None.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from nnx_core._errors import MetadataError, StructureError, show_paths
from nnx_core.graph.effects import After
from nnx_core.graph.structure import GraphDef, VariableDef, leaf_defs
from nnx_core.transforms.groups import distinct
from nnx_core.transforms.lift import (
    Form,
    Lifted,
    Modes,
    by_count,
    by_position,
    dressed,
    name_of,
    optional_decorator,
    unbound,
)
from nnx_core.transforms.prefix import without_objects
from nnx_core.variables import AXIS_NAMES, Variable, new_variable

PARTITION_NAME = "partition_name"


class AxisMetadata:
    """Takes the mapped axis out of Variables' metadata on the way in, and puts it back on the way out."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.named = PARTITION_NAME in metadata
        self.name = metadata.get(PARTITION_NAME)

    def enter(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        """Metadata of `v`, whose value has lost its axis already."""
        if type(axis) is not int:
            return v._var_metadata
        index = axis if axis >= 0 else axis + _rank(v) + 1
        names = v._var_metadata.get(AXIS_NAMES)
        if self.named and names and index < len(names) and names[index] not in (None, self.name):
            raise MetadataError(
                f"Axis {index} of a {type(v).__name__} with axis names {tuple(names)} is mapped under the name"
                f" {self.name!r}, found {names[index]!r}. Give transform_metadata the name the axis has."
            )
        return _after(v, "remove_axis", index, self.name)

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        """Metadata of `v` for outside, where its value gets the axis."""
        if type(axis) is not int:
            return v._var_metadata
        return _after(v, "add_axis", axis if axis >= 0 else axis + _rank(v) + 1, self.name)


@optional_decorator
def transform_metadata(
    f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0, partition: str, graph: bool | None = None
) -> Callable[..., Any]:
    """f, whose mapped axis is called `partition` in the Variables' axis names under vmap, pmap and scan.

    The same as the keyword `transform_metadata={nnx.PARTITION_NAME: partition}` of these; the axes are theirs
    (`in_axes` and `out_axes` are accepted for flax.nnx's callers, who say them twice).
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    call = dressed(call, f)
    call._nnx_partition = partition  # type: ignore[attr-defined]  # read by `axis_options`
    return call


def axis_options(f: Callable[..., Any], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What the caller of a transform said of the mapped axis, or else what `transform_metadata` did."""
    if given:
        return given
    name = getattr(f, "_nnx_partition", None)
    return {} if name is None else {PARTITION_NAME: name}


def axes_of_arguments(in_axes: Any, count: int, own: int) -> tuple[Any, ...]:
    """The axis of each of `count` arguments, of which the first `own` are no business of the user's: not mapped."""
    axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * (count - own)
    return (None,) * own + axes


def _rank(v: Variable[Any]) -> int:
    return max((jax.numpy.ndim(x) for x in jax.tree.leaves(v._raw_value)), default=0)


def _after(v: Variable[Any], method: str, index: int, name: Any) -> dict[str, Any]:
    """The metadata of `v` after `add_axis` or `remove_axis`; on a copy, for these run the user's hooks."""
    if not v._var_metadata and not hasattr(type(v), f"on_{method}"):
        return v._var_metadata
    copy = new_variable(type(v), v._raw_value, dict(v._var_metadata))
    getattr(copy, method)(index, name)
    return copy._var_metadata


def _run(lifted: Lifted, options: dict[str, Any], *packed: Any) -> Any:
    """`lifted.pure` under `jax.vmap`."""
    afters: list[After] = []  # of the one trace that there is

    def pure(*packed: Any) -> Any:
        after, *written = lifted.pure(*packed)
        afters.append(after)
        return after, *written

    groups: Any = lifted.groups
    try:
        return jax.vmap(pure, (None, *groups), (None, *groups), **options)(*packed)
    except ValueError as error:
        # JAX says this (in words of its own: there is no class for it) of an output number, which says nothing to
        # users. We know which Variables may be meant.
        if afters and "output was batched" in str(error):
            graphdef, *_ = packed
            raise _batched_error(lifted, graphdef, afters[0], error) from error
        raise


def _batched_error(lifted: Lifted, graphdef: GraphDef, after: After, error: ValueError) -> Exception:
    paths = []
    for path, d in leaf_defs(graphdef.root):
        if type(d) is VariableDef and d.id in after.travelling and lifted.groups[d.group] is None:
            is_keyword, *rest = path
            paths.append(("kwargs" if is_keyword else "args", *rest))
    if not paths:
        return error
    return StructureError(
        f"vmap: {name_of(lifted.f)} wrote a value that depends on a mapped axis to a Variable that is not mapped"
        f" (axis None), one of:{show_paths(paths)}\n"
        "Map the Variable (nnx.StateAxes), or reduce the value over the axis first."
    )


@optional_decorator
def vmap(
    f: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    transform_metadata: Mapping[str, Any] = MappingProxyType({}),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.vmap` for functions of modules.

    Args:
      in_axes: an axis, or one for each positional argument: int, None, StateAxes, or a prefix of these.
        Arguments passed by keyword have the axis of their position; keyword-only ones axis 0, as in JAX.
      out_axes: likewise for the result.
      transform_metadata: {nnx.PARTITION_NAME: name} names the mapped axis in the Variables' axis names.

    Raises:
      AliasError: if one Variable is reached under two axes; it names both paths.

    Example:
      >>> import nnx_core as nnx, jax
      >>> @nnx.vmap
      ... def make(key):
      ...     return nnx.Linear(2, 3, rngs=nnx.Rngs(key))
      >>> models = make(jax.random.split(jax.random.key(0), 5))
      >>> models.kernel.shape
      (5, 2, 3)
    """
    function, owner = unbound(f)
    metadata = AxisMetadata(axis_options(f, transform_metadata))
    options = {"axis_name": axis_name, "axis_size": axis_size, "spmd_axis_name": spmd_axis_name}
    modes = Modes.of(graph, graph_updates)
    axes_in = without_objects(in_axes, "in_axes", modes.sharing, 0)
    axes_out = without_objects(out_axes, "out_axes", modes.sharing, 0)

    def make(count: int) -> Form:
        inputs = axes_of_arguments(axes_in, count, len(owner))
        lifted = Lifted(
            function,
            distinct(0, inputs, axes_out),
            inputs,
            axes_out,
            keywords=0,
            enter=metadata.enter,
            leave=metadata.leave,
            strict=True,
            modes=modes,
        )
        return Form(lifted, functools.partial(_run, lifted, options))

    return by_count(f, make, by_position)
