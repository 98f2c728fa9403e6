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
from nnx_core.graph.structure import GraphDef, VariableDef, nodes
from nnx_core.transforms.groups import distinct
from nnx_core.transforms.lift import Lifted, Modes, by_position, dressed, name_of, optional_decorator, unbound
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
        return _changed(v, "remove_axis", index, self.name)

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        """Metadata of `v` for outside, where its value gets the axis."""
        if type(axis) is not int:
            return v._var_metadata
        return _changed(v, "add_axis", axis if axis >= 0 else axis + _rank(v) + 1, self.name)


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
    name = getattr(f, "_nnx_partition", None)
    return given or ({} if name is None else {PARTITION_NAME: name})


def _rank(v: Variable[Any]) -> int:
    return max((jax.numpy.ndim(x) for x in jax.tree.leaves(v._raw_value)), default=0)


def _changed(v: Variable[Any], method: str, index: int, name: Any) -> dict[str, Any]:
    if not v._var_metadata and not hasattr(type(v), f"on_{method}"):
        return v._var_metadata
    copy = new_variable(type(v), v._raw_value, dict(v._var_metadata))
    getattr(copy, method)(index, name)
    return copy._var_metadata


def _run(lifted: Lifted, options: dict[str, Any], *packed: Any) -> Any:
    done: list[After] = []

    def pure(*packed: Any) -> Any:
        out = lifted.pure(*packed)
        done.append(out[0])
        return out

    groups: Any = lifted.groups
    try:
        return jax.vmap(pure, (None, *groups), (None, *groups), **options)(*packed)
    except ValueError as error:
        if done and "output was batched" in str(error):
            raise _batched_error(lifted, packed[0], done[0], error) from error
        raise


def _batched_error(lifted: Lifted, graphdef: GraphDef, after: After, error: ValueError) -> Exception:
    shared = [i for i, _, group in after.variables if group is not None and lifted.groups[group] is None]
    paths = [path for path, d in nodes(graphdef.root) if type(d) is VariableDef and d.id in shared]
    if not paths:
        return error
    places = [("kwargs" if path[0] else "args", *path[1:]) for path in paths]
    return StructureError(
        f"vmap: {name_of(lifted.f)} wrote a value that depends on a mapped axis to a Variable that is not mapped"
        f" (axis None), one of:{show_paths(places)}\n"
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
    forms: dict[int, tuple[Lifted, Any]] = {}

    def make(count: int) -> tuple[Lifted, Any]:
        axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * (count - len(owner))
        inputs = (*(None for _ in owner), *axes)
        groups = distinct(0, inputs, out_axes)
        lifted = Lifted(
            function, groups, inputs, out_axes, 0, enter=metadata.enter, leave=metadata.leave, strict=True, modes=modes
        )
        return lifted, functools.partial(_run, lifted, options)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = by_position(function, args, kwargs)
        if len(args) not in forms:
            forms[len(args)] = make(len(args))
        lifted, run = forms[len(args)]
        return lifted.call(run, args, kwargs)

    return dressed(call, f, owner)
