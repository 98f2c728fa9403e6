"""shard_map and pmap: one program on many devices.

Law: inside, each device sees its shard of the leaves, as `jax.shard_map` and `jax.pmap` cut them; what it writes
is put together again under the spec the leaf came with. A Variable has one spec in a call.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nnx_core._errors import SpecError
from nnx_core.graph.pack import AS_STATIC
from nnx_core.transforms.batch import AxisMetadata, axis_options
from nnx_core.transforms.compile import Placement, _placed
from nnx_core.transforms.groups import distinct
from nnx_core.transforms.lift import (
    Lifted,
    Modes,
    by_position,
    dressed,
    name_of,
    optional_decorator,
    positional,
    unbound,
)
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
    forms: dict[int, tuple[Lifted, Any]] = {}

    def make(count: int) -> tuple[Lifted, Any]:
        own = tuple(_REPLICATED for _ in owner)
        inputs = (*own, *_by_argument("in_specs", function, in_specs, count - len(owner)))
        groups = distinct(inputs, out_specs)
        lifted = Lifted(function, groups, inputs, out_specs, modes=modes)
        specs = (_REPLICATED, *(_REPLICATED if g is None else g for g in groups))
        mapped = jax.shard_map(
            lifted.named, mesh=mesh, in_specs=specs, out_specs=specs, axis_names=axis_names, check_vma=check_vma
        )
        # jit, so that a second call outside of any jit traces and compiles nothing; inlined inside of one
        return lifted, jax.jit(mapped, inline=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = by_position(function, (*owner, *args), kwargs)
        args = positional(function, args, kwargs)  # raises if there are any left
        if len(args) not in forms:
            forms[len(args)] = make(len(args))
        lifted, run = forms[len(args)]
        return lifted.call(run, args, {})

    return dressed(call, f)


class _LaneMetadata(AxisMetadata):
    """The same for groups that are an axis, or a Placement of an axis: the axis of a donated argument."""

    def enter(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        return super().enter(v, _axis(axis))

    def leave(self, v: Variable[Any], axis: Hashable) -> dict[str, Any]:
        return super().leave(v, _axis(axis))


def _axis(group: Hashable) -> Any:
    return group.sharding if type(group) is Placement else group


def _positions(f: Callable[..., Any], option: str, given: int | Iterable[int], count: int, offset: int) -> set[int]:
    numbers = (given,) if isinstance(given, int) else tuple(given)
    found = {n + offset if n >= 0 else n + count for n in numbers}
    if bad := [n for n in numbers if not -(count - offset) <= n < count - offset]:
        raise SpecError(
            f"{option} {bad} is out of range: {name_of(f)} was called with {count - offset} arguments."
            f" Expected 0 to {count - offset - 1}."
        )
    return found


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
    function, owner = unbound(f)
    metadata = _LaneMetadata(axis_options(f, transform_metadata))
    options: dict[str, Any] = {"axis_name": axis_name, "devices": devices, "backend": backend, "axis_size": axis_size}
    modes = Modes.of(graph, graph_updates)
    forms: dict[int, tuple[Lifted, Any]] = {}

    def make(count: int) -> tuple[Lifted, Any]:
        own = len(owner)
        static = _positions(function, "static_broadcasted_argnums", static_broadcasted_argnums, count, own)
        donated = _positions(function, "donate_argnums", donate_argnums, count, own)
        axes = (*(None for _ in owner), *_by_argument("in_axes", function, in_axes, count - own))
        inputs = tuple(
            AS_STATIC if i in static else _placed(axis, donated=True) if i in donated else axis
            for i, axis in enumerate(axes)
        )
        groups = tuple(g for g in distinct(0, inputs, out_axes) if g is not AS_STATIC)
        given = [i + 1 for i, g in enumerate(groups) if type(g) is Placement]
        always = frozenset(g for g in groups if type(g) is Placement)
        lifted = Lifted(
            function, groups, inputs, out_axes, 0, always, enter=metadata.enter, leave=metadata.leave, strict=True,
            modes=modes,
        )  # fmt: skip
        # A pair for each group, since jax.pmap gives one plain axis an argument to the wrong leaves where the number
        # of leaves happens to be that of the arguments (as of 0.12, its short cut for arguments that are leaves).
        mapped = (None, *((_axis(g), _axis(g)) for g in groups))
        return lifted, jax.pmap(lifted.named, in_axes=mapped, out_axes=mapped, donate_argnums=given, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = by_position(function, (*owner, *args), kwargs)
        if len(args) not in forms:
            forms[len(args)] = make(len(args))
        lifted, run = forms[len(args)]
        return lifted.call(run, args, kwargs)

    return dressed(call, f)
