"""vmap.

Law: `vmap(f)` on leaves stacked along their axes equals stacking what f gives for each; a Variable that is not
mapped may be read, and written only with what does not depend on the mapped ones. Axis names in metadata lose
the mapped axis inside and get it back outside; an axis without a name is None.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from nnx_core._axis_names import axis_names, insert_name, remove_name
from nnx_core._errors import MetadataError, Path, SpecError, StructureError, show_path, show_paths
from nnx_core.graph.effects import After
from nnx_core.graph.pack import Leaves, reader
from nnx_core.graph.structure import GraphDef, Leaf, VariableDef, leaf_defs
from nnx_core.transforms.groups import distinct
from nnx_core.transforms.lift import (
    Form,
    Lifted,
    Modes,
    by_count,
    by_position,
    name_of,
    optional_decorator,
    unbound,
)
from nnx_core.transforms.prefix import without_objects
from nnx_core.variables import AXIS_NAMES, Variable, new_variable

PARTITION_NAME = "partition_name"


class AxisMetadata:
    """Takes the mapped axis out of Variables' metadata on the way in, and puts it back on the way out.

    Beside the axis names these are the tuples under the other keys of `metadata`, which name axes in their own way.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self.named = PARTITION_NAME in metadata
        self.name = metadata.get(PARTITION_NAME)
        self.others = {key: name for key, name in metadata.items() if key != PARTITION_NAME}

    def enter(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        """Metadata of `v`, whose value has lost its axis already."""
        if type(axis) is not int:
            return v._var_metadata
        index = axis if axis >= 0 else axis + self.rank(v, entering=True)
        if self.named:
            self.check_name(v, AXIS_NAMES, index, self.name)
        metadata = _after(v, "remove_axis", index, self.name)
        for key, name in self.others.items():
            if _names_axes(metadata, key):
                self.check_name(v, key, index, name)
                metadata = {**metadata, key: remove_name(metadata[key], index)}
        return metadata

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        """Metadata of `v` for outside, where its value gets the axis."""
        if type(axis) is not int:
            return v._var_metadata
        index = axis if axis >= 0 else axis + self.rank(v, entering=False)
        metadata = _after(v, "add_axis", index, self.name)
        for key, name in self.others.items():
            if _names_axes(metadata, key):
                metadata = {**metadata, key: insert_name(metadata[key], index, name)}
        return metadata

    def rank(self, v: Variable[Any], *, entering: bool) -> int:
        """How many axes `v` has with the mapped one; its value is without."""
        return _rank(v) + 1

    def check_name(self, v: Variable[Any], key: str, index: int, name: Any) -> None:
        """Raise MetadataError if the axis that is mapped as `name` is called something else."""
        names = axis_names(v._var_metadata.get(key) or ())
        if index < len(names) and names[index] not in (None, name):
            what = "axis names" if key == AXIS_NAMES else key
            raise MetadataError(
                f"Axis {index} of a {type(v).__name__} with {what} {names} is mapped under the name"
                f" {name!r}, found {names[index]!r}. Give transform_metadata the name the axis has."
            )


def _names_axes(metadata: Mapping[str, Any], key: str) -> bool:
    return type(metadata.get(key)) is tuple and bool(metadata[key])


class _AroundAny(AxisMetadata):
    """The same where any transform maps, inside of f or around: the value may have the axis, the names tell."""

    def rank(self, v: Variable[Any], *, entering: bool) -> int:
        names = axis_names(v._var_metadata.get(AXIS_NAMES) or ())
        if not names:
            return super().rank(v, entering=entering)
        return len(names) if entering else len(names) + 1


class _AroundOurs(AxisMetadata):
    """The same around a transform of ours, which takes the axis out and puts it back: only its name is missing."""

    def enter(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        return v._var_metadata

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        names = axis_names(v._var_metadata.get(AXIS_NAMES) or ())
        if type(axis) is not int or not names or names[axis] is not None:
            return v._var_metadata
        index = axis % len(names)
        return {**v._var_metadata, AXIS_NAMES: insert_name(remove_name(names, index), index, self.name)}


@optional_decorator
def transform_metadata(
    f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0, partition: str | None, graph: bool | None = None
) -> Callable[..., Any]:
    """f, whose mapped axis is called `partition` in the Variables' axis names.

    Directly under vmap, pmap or scan it is the keyword `transform_metadata={nnx.PARTITION_NAME: partition}` of these,
    and the axes are theirs. Anywhere else, such as around `jax.vmap` or under it, the axis that `in_axes` says is taken
    out of the names of the arguments while f runs, and the one that `out_axes` says is put into those of the result.

    Args:
      in_axes, out_axes: as in `nnx.vmap`.
      partition: the name of the axis.
      graph: False forbids shared references.

    Raises:
      MetadataError: if an axis has another name.

    Example:
      >>> import nnx_core as nnx, jax
      >>> init = nnx.with_partitioning(nnx.initializers.ones, ("in", "out"))
      >>> @jax.vmap
      ... @nnx.transform_metadata(partition="layers")
      ... def make(key):
      ...     return nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(key))
      >>> make(jax.random.split(jax.random.key(0), 4)).kernel.out_sharding
      ('layers', 'in', 'out')
    """
    function, owner = unbound(f)
    names = (_AroundOurs if hasattr(f, "_nnx_maps") else _AroundAny)({PARTITION_NAME: partition})
    modes = Modes.of(graph, None)

    def make(count: int) -> Form:
        inputs = axes_of_arguments(in_axes, count, len(owner))
        lifted = _over_axes(function, inputs, out_axes, names, modes, strict=False)
        return Form(lifted, lifted.pure)

    call: Any = by_count(f, make, by_position)
    call._nnx_named = f, partition  # read by `with_axis_options`
    return call


def with_axis_options(
    f: Callable[..., Any], given: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """f, and what is said of its mapped axis: by the caller of a transform, or else by `transform_metadata` of f."""
    plain, name = getattr(f, "_nnx_named", (f, None))
    if plain is f:
        return f, given or {}
    return plain, given or {PARTITION_NAME: name}


def mapping(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which maps an axis: `transform_metadata` around it only names it."""
    call._nnx_maps = True  # type: ignore[attr-defined]  # functions have attributes
    return call


def axes_of_arguments(in_axes: Any, count: int, own: int) -> tuple[Any, ...]:
    """The axis of each of `count` arguments, of which the first `own` are no business of the user's: not mapped."""
    axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * (count - own)
    return (None,) * own + axes


def _over_axes(
    f: Callable[..., Any], inputs: Any, outputs: Any, metadata: AxisMetadata, modes: Modes, *, strict: bool
) -> Lifted:
    """f, whose groups are the axes in `inputs` and `outputs`; keyword arguments have axis 0."""
    return Lifted(
        f,
        distinct(0, inputs, outputs),
        inputs,
        outputs,
        keywords=0,
        enter=metadata.enter,
        leave=metadata.leave,
        strict=strict,
        modes=modes,
    )


def _rank(v: Variable[Any]) -> int:
    return max((jax.numpy.ndim(x) for x in jax.tree.leaves(v._raw_value)), default=0)


def _after(v: Variable[Any], method: str, index: int, name: Any) -> dict[str, Any]:
    """The metadata of `v` after `add_axis` or `remove_axis`; on a copy, for these run the user's hooks."""
    kind = type(v)
    is_plain = getattr(kind, method) is getattr(Variable, method) and not hasattr(kind, f"on_{method}")
    if not v._var_metadata and is_plain:
        return v._var_metadata
    copy = new_variable(kind, v._raw_value, dict(v._var_metadata))
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
        if not afters:  # nothing has been called yet, or f raised
            check_axes("vmap", lifted.f, groups, *packed)
        # JAX says this (in words of its own: there is no class for it) of an output number, which says nothing to
        # users. We know which Variables may be meant.
        if afters and "output was batched" in str(error):
            graphdef, *_ = packed
            raise _batched_error(lifted, graphdef, afters[0], error) from error
        raise


def check_axes(transform: str, f: Callable[..., Any], axes: Sequence[Any], graphdef: GraphDef, *packed: Leaves) -> None:
    """Raise SpecError unless each leaf has the axis it is mapped over, with the size that the others have.

    To be called where JAX refuses, or is about to: it knows leaves by numbers.
    """
    reads = [reader(leaves) for leaves in packed]
    first: dict[int, Path] = {}
    for path, d in leaf_defs(graphdef.root):
        axis = axes[d.group]
        for x in jax.tree.leaves(reads[d.group](d)):
            if type(axis) is not int:
                continue
            shape = jax.numpy.shape(x)
            if not -len(shape) <= axis < len(shape):
                kind = d.kind.__name__ if type(d) is VariableDef else "leaf"
                raise SpecError(
                    f"{transform} of {name_of(f)}: the {kind} at {show_path(as_users_know(path))} is mapped over axis"
                    f" {axis}, and has the shape {shape}.\n"
                    "Give it the axis None (nnx.StateAxes({filter: None, ...: 0})), or a value for each step."
                )
            first.setdefault(shape[axis], as_users_know(path))
    if len(first) > 1:
        rows = "".join(f"\n  {show_path(path)}: {size}" for size, path in first.items())
        raise SpecError(
            f"{transform} of {name_of(f)}: expected one size, found inconsistent sizes of the mapped axes{rows}\n"
            "Give all that is mapped as many slices, and the rest the axis None."
        )


def as_users_know(path: Path) -> Path:
    """A path in what `Lifted.pack` makes, which is a pair, as one in the arguments."""
    is_keyword, *rest = path
    return ("kwargs" if is_keyword else "args", *rest)


def _batched_error(lifted: Lifted, graphdef: GraphDef, after: After, error: ValueError) -> Exception:
    paths = []
    for path, d in leaf_defs(graphdef.root):
        if not isinstance(d, Leaf) and d.id in after.travelling and lifted.groups[d.group] is None:
            paths.append(as_users_know(path))
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
      SpecError: if a leaf has not the axis it is mapped over, or the axes differ in size.

    Example:
      >>> import nnx_core as nnx, jax
      >>> @nnx.vmap
      ... def make(key):
      ...     return nnx.Linear(2, 3, rngs=nnx.Rngs(key))
      >>> models = make(jax.random.split(jax.random.key(0), 5))
      >>> models.kernel.shape
      (5, 2, 3)
    """
    f, named = with_axis_options(f, transform_metadata)
    function, owner = unbound(f)
    metadata = AxisMetadata(named)
    options = {"axis_name": axis_name, "axis_size": axis_size, "spmd_axis_name": spmd_axis_name}
    modes = Modes.of(graph, graph_updates)
    axes_in = without_objects(in_axes, "in_axes", modes.sharing, 0)
    axes_out = without_objects(out_axes, "out_axes", modes.sharing, 0)

    def make(count: int) -> Form:
        inputs = axes_of_arguments(axes_in, count, len(owner))
        lifted = _over_axes(function, inputs, axes_out, metadata, modes, strict=True)
        return Form(lifted, functools.partial(_run, lifted, options))

    return mapping(by_count(f, make, by_position))
