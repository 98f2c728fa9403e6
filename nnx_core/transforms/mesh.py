"""shard_map and pmap: one program on many devices.

Law: inside, each device sees its shard of the leaves, as `jax.shard_map` and `jax.pmap` cut them; what it writes
is put together again under the spec the leaf came with. A Variable has one spec in a call.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nnx_core._errors import SpecError
from nnx_core.graph.pack import AS_STATIC
from nnx_core.transforms.batch import AxisMetadata, check_axes, mapping, with_axis_options
from nnx_core.transforms.closures import sees_arrays
from nnx_core.transforms.compile import Placement, placed
from nnx_core.transforms.groups import distinct
from nnx_core.transforms.lift import (
    Args,
    Form,
    Kwargs,
    Lifted,
    Modes,
    by_count,
    by_position,
    name_of,
    optional_decorator,
    positional,
    positions,
    unbound,
)
from nnx_core.transforms.prefix import without_objects
from nnx_core.transforms.programs import traced_anew
from nnx_core.variables import Variable

_REPLICATED = PartitionSpec()


def _by_argument(name: str, f: Callable[..., Any], specs: Any, count: int) -> tuple[Any, ...]:
    if type(specs) not in (tuple, list):  # a PartitionSpec is a tuple in some versions of JAX
        return (specs,) * count
    if len(specs) != count:
        raise SpecError(
            f"{name} has {len(specs)} items, and {name_of(f)} was called with {count} arguments."
            " Give one for each, or one for all that is no tuple."
        )
    return tuple(specs)


def _only_by_position(f: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """By position what can be; raises if there is anything else."""
    args, kwargs = by_position(f, args, kwargs)
    return positional(f, args, kwargs), {}


@optional_decorator
def shard_map(
    f: Callable[..., Any],
    *,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    axis_names: AbstractSet[Hashable] = frozenset(),
    check_vma: bool = True,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.shard_map` for functions of modules.

    Args:
      mesh: the devices, as a `jax.sharding.Mesh`.
      in_specs: a PartitionSpec, or one for each positional argument; for a module also StateSharding, or a State
        of specs. None is replicated. The object of a bound method is replicated.
      out_specs: likewise for the result.
      axis_names: axes of `mesh` over which `f` is manual; all if empty.
      check_vma: whether JAX checks that what `out_specs` calls replicated is.
      graph, graph_updates: False forbids sharing; structure changes.

    Raises:
      AliasError: if one Variable is reached under two specs; it names both paths.
      SpecError: if `in_specs` does not fit the arguments.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from nnx_core.transforms.mesh import shard_map
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> forward = shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
      >>> forward(model, jnp.ones((8, 2))).shape
      (8, 3)
    """
    function, owner = unbound(f)
    modes = Modes.of(graph, graph_updates)
    specs_in = without_objects(in_specs, "in_specs", modes.sharing, _REPLICATED)
    specs_out = without_objects(out_specs, "out_specs", modes.sharing, _REPLICATED)

    def make(count: int) -> Form:
        own = (_REPLICATED,) * len(owner)
        inputs = (*own, *_by_argument("in_specs", function, specs_in, count - len(owner)))
        groups = distinct(inputs, specs_out)
        lifted = Lifted(function, groups, inputs, specs_out, modes=modes)
        specs = (_REPLICATED, *map(_partition_spec, groups))

        def run(*packed: Any) -> Any:
            mapped = jax.shard_map(
                lifted.named, mesh=mesh, in_specs=specs, out_specs=specs, axis_names=axis_names, check_vma=check_vma
            )
            return traced_anew(mapped, *packed)

        return Form(lifted, run)

    return by_count(f, make, _only_by_position)


def _partition_spec(group: Any) -> Any:
    return _REPLICATED if group is None else group


class _LaneMetadata(AxisMetadata):
    """The same for groups that are an axis, or a Placement of an axis: the axis of a donated argument."""

    def enter(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        return super().enter(v, _axis(axis))

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        return super().leave(v, _axis(axis))


def _axis(group: Hashable) -> Any:
    return group.sharding if type(group) is Placement else group


def _positions(
    f: Callable[..., Any], option: str, numbers: int | Iterable[int], count: int, own: int
) -> frozenset[int]:
    """As `positions`; raises SpecError unless they all are positions of arguments."""
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    passed = count - own
    if bad := [n for n in numbers if not -passed <= n < passed]:
        raise SpecError(
            f"{option} {bad} is out of range: {name_of(f)} was called with {passed} arguments."
            f" Expected 0 to {passed - 1}."
        )
    return positions(numbers, count, own)


def _run_lanes(laned: Callable[..., Any], lifted: Lifted, *packed: Any) -> Any:
    try:
        return laned(*packed)
    except (ValueError, IndexError):  # JAX's words for a leaf without the axis, among others
        check_axes("pmap", lifted.f, list(map(_axis, lifted.groups)), *packed)
        raise


@optional_decorator
def pmap(
    f: Callable[..., Any],
    *,
    axis_name: Hashable = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: int | Iterable[int] = (),
    devices: Sequence[Any] | None = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: int | Iterable[int] = (),
    transform_metadata: Mapping[str, Any] = MappingProxyType({}),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.pmap` for functions of modules; new programs are better off with `jit` and shardings, or `shard_map`.

    Args:
      axis_name, static_broadcasted_argnums, devices, backend, axis_size: as in `jax.pmap`.
      in_axes: an axis (not negative), or one for each positional argument: int, None, StateAxes, or a prefix of
        these. Keyword-only arguments have axis 0. The object of a bound method has axis None.
      out_axes: likewise for the result.
      donate_argnums: arguments whose buffers are given away; a donated module keeps its Variables, with new ones.
      transform_metadata: {nnx.PARTITION_NAME: name} names the mapped axis in the Variables' axis names.
      graph, graph_updates: False forbids sharing; structure changes.

    What is written to a Variable with axis None must be the same on every device: JAX keeps that of one.
    Compiled once for each form of the arguments. A function that sees modules or arrays beside its arguments (closes
    over them, names them as globals) is compiled at every call, since they may have changed: pass them as arguments.

    Raises:
      AliasError: if one Variable is reached under two axes; it names both paths.
      SpecError: if `in_axes` or a position does not fit the arguments.

    Example:
      >>> import nnx_core as nnx, jax
      >>> from nnx_core.transforms.mesh import pmap
      >>> make = pmap(lambda key: nnx.Linear(2, 3, rngs=nnx.Rngs(key)))
      >>> make(jax.random.split(jax.random.key(0), 1)).kernel.shape
      (1, 2, 3)
    """
    f, named = with_axis_options(f, transform_metadata)
    function, owner = unbound(f)
    metadata = _LaneMetadata(named)
    options: dict[str, Any] = {"axis_name": axis_name, "devices": devices, "backend": backend, "axis_size": axis_size}
    modes = Modes.of(graph, graph_updates)
    axes_in = without_objects(in_axes, "in_axes", modes.sharing, 0)
    axes_out = without_objects(out_axes, "out_axes", modes.sharing, 0)

    def make(count: int) -> Form:
        own = len(owner)
        static = _positions(function, "static_broadcasted_argnums", static_broadcasted_argnums, count, own)
        donated = _positions(function, "donate_argnums", donate_argnums, count, own)
        inputs = [None] * own + list(_by_argument("in_axes", function, axes_in, count - own))
        for i in donated:
            inputs[i] = placed(inputs[i], donated=True)
        for i in static:
            inputs[i] = AS_STATIC
        groups = tuple(group for group in distinct(0, inputs, axes_out) if group is not AS_STATIC)
        lifted = Lifted(
            function,
            groups,
            tuple(inputs),
            axes_out,
            keywords=0,
            always=frozenset(group for group in groups if type(group) is Placement),
            enter=metadata.enter,
            leave=metadata.leave,
            strict=True,
            modes=modes,
        )
        # The first argument of `pure` is the structure, which is no group.
        numbers = [i for i, group in enumerate(groups, start=1) if type(group) is Placement]
        # A pair for each group, since jax.pmap gives one plain axis an argument to the wrong leaves where the number
        # of leaves happens to be that of the arguments (as of 0.12, its short cut for arguments that are leaves).
        mapped = (None, *((_axis(g), _axis(g)) for g in groups))

        def compiled() -> Callable[..., Any]:
            return jax.pmap(lifted.named, in_axes=mapped, out_axes=mapped, donate_argnums=numbers, **options)

        if sees_arrays(function):
            return Form(lifted, lambda *packed: _run_lanes(compiled(), lifted, *packed))
        return Form(lifted, functools.partial(_run_lanes, compiled(), lifted))

    return mapping(by_count(f, make, by_position))
