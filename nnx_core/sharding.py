"""From axis names to shardings: what a Variable's metadata says of where its value lives.

Law: a PartitionSpec is computed from metadata and logical rules alone; no value is read and no mesh
is needed. A mesh enters where shardings are made (`get_named_sharding`, `get_abstract_model`,
`as_abstract`), and where a Variable is made, whose value goes where its names say on the mesh that
there is (`place_eagerly`). The trees that come out have the structure of those that went in, so JAX
takes them as `in_shardings` and `out_shardings` of these. Knows Variables, States and graphs; knows
no transforms.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental.layout import Format, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from nnx_core._axis_names import axis_names, sharding_of
from nnx_core._errors import MetadataError, Path, show_path
from nnx_core._foreign import is_foreign, require_own
from nnx_core.graph.api import split
from nnx_core.graph.classify import plain_key
from nnx_core.graph.structure import GraphDef
from nnx_core.graph.walk import iter_graph, recursive_map
from nnx_core.kinds import OptVariable
from nnx_core.logical_rules import (
    LogicalRules as LogicalRules,
)
from nnx_core.logical_rules import (
    get_logical_axis_rules as get_logical_axis_rules,
)
from nnx_core.logical_rules import (
    keep_rules_in as keep_rules_in,
)
from nnx_core.logical_rules import (
    logical_axis_rules as logical_axis_rules,
)
from nnx_core.logical_rules import (
    rules_for,
    translated,
)
from nnx_core.logical_rules import (
    set_logical_axis_rules as set_logical_axis_rules,
)
from nnx_core.modes import use_eager_sharding as use_eager_sharding
from nnx_core.state import State
from nnx_core.variables import (
    AXIS_NAMES,
    EAGER_SHARDING,
    Variable,
    VariableMetadata,
    new_variable,
    place_new_values_with,
    set_raw,
    with_metadata,
)

A = TypeVar("A")
AnyMesh: TypeAlias = Mesh | AbstractMesh

MESH = "mesh"  # metadata key: a mesh of one Variable's own


# ---- axis names in metadata ----


def with_partitioning(
    initializer: Callable[..., Any],
    sharding: tuple[str | tuple[str, ...] | None, ...],
    mesh: AnyMesh | None = None,
    **metadata: Any,
) -> Callable[..., VariableMetadata[Any]]:
    """An initializer whose result names its axes: `with_metadata` with `out_sharding=sharding`.

    Args:
      initializer: as of `jax.nn.initializers`.
      sharding: the names of the first axes of the value; None for an axis without one.
      mesh: kept as metadata, for `as_abstract` and for placing the value; without it they take the
        ambient mesh.
      **metadata: more metadata and hooks; `sharding_rules` are logical rules of this Variable's own.

    Example:
      >>> import nnx_core as nnx
      >>> from nnx_core import sharding
      >>> init = sharding.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
      >>> nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0)).kernel.out_sharding
      ('embed', 'mlp')
    """
    return with_metadata(initializer, out_sharding=sharding, mesh=mesh, **metadata)


def _names_of(metadata: Mapping[str, Any]) -> Any:
    """The axis names as they are stored; None if there are none."""
    return metadata.get(AXIS_NAMES)


# ---- specs: metadata alone ----


def get_var_pspec(v: Variable[Any]) -> PartitionSpec | None:
    """The PartitionSpec that the metadata of `v` says, names translated by the logical rules.

    Returns:
      One entry for each name; axes beyond the last name have none. Without names P(), or None if the value is no
      array (a number, a pytree: nothing is known of its leaves). State of an optimizer that has not the shape of
      its parameter, such as the rows and columns of adafactor, is not split over axes it has not got.

    Raises:
      MetadataError: if the Variable's own `sharding_rules` contradict the ambient ones.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core import sharding
      >>> sharding.get_var_pspec(nnx.Param(jnp.ones((2, 4, 3)), out_sharding=("data", None)))
      P('data', None)
    """
    return _pspec(v, ())


def _pspec(v: Variable[Any], path: Path) -> PartitionSpec | None:
    names = _names_of(v._var_metadata)
    shape = getattr(v._raw_value, "shape", None)
    if not names:
        return None if shape is None else PartitionSpec()
    rules = rules_for(v._var_metadata, _place(v, path))
    axes = [translated(name, rules) for name in axis_names(names)]
    if isinstance(v, OptVariable) and shape is not None:
        axes = _left_of(axes, shape)
    return PartitionSpec(*axes)


def _left_of(axes: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """The axes of a parameter that optimizer state of this shape has too: of (1,), adafactor's placeholder, none."""
    if len(axes) > len(shape):
        return []
    return [None if size == 1 else axis for axis, size in zip(axes, shape, strict=False)]


def _place(v: Variable[Any], path: Path) -> str:
    where = f" at {show_path(path)}" if path else ""
    return f"{type(v).__name__}{where} with axis names {_names_of(v._var_metadata)!r}"


def get_partition_spec(tree: A) -> A:
    """`tree` with PartitionSpecs for values: of Variables what `get_var_pspec` says, P() for other arrays, else None.

    Args:
      tree: a State, a module, a Variable, or any pytree of them; abstract values will do.

    Raises:
      MetadataError: if a Variable's own `sharding_rules` contradict the ambient ones.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core import sharding
      >>> init = sharding.with_partitioning(nnx.initializers.ones, ("embed", "mlp"))
      >>> specs = sharding.get_partition_spec(nnx.state(nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0))))
      >>> specs["kernel"].get_value(), specs["bias"].get_value()
      (P('embed', 'mlp'), P())
    """
    return _described(tree, lambda v, path: _pspec(v, path), PartitionSpec())


def get_named_sharding(tree: A, mesh: AnyMesh) -> A:
    """`tree` with NamedShardings on `mesh` for values; what `get_partition_spec` leaves None stays None.

    The result fits `jax.jit(..., out_shardings=)`, `jax.device_put` and `nnx.jit`'s `StateSharding`.

    Raises:
      MetadataError: if names and `mesh`, or names and the rank of a value, do not fit; it names the path.

    Example:
      >>> import nnx_core as nnx, jax
      >>> from nnx_core import sharding
      >>> def init():
      ...     names = sharding.with_partitioning(nnx.initializers.ones, (None, "model"))
      ...     return nnx.state(nnx.Linear(2, 4, kernel_init=names, rngs=nnx.Rngs(0)))
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> shardings = sharding.get_named_sharding(jax.eval_shape(init), mesh)
      >>> state = jax.jit(init, out_shardings=shardings)()  # no value was ever on one device alone
      >>> state["kernel"].get_value().sharding.spec
      P(None, 'model')
    """

    def named(v: Variable[Any], path: Path) -> NamedSharding | None:
        spec = _pspec(v, path)
        return None if spec is None else _named(mesh, spec, v._raw_value, _place(v, path))

    return _described(tree, named, NamedSharding(mesh, PartitionSpec()))


def _described(tree: A, of_variable: Callable[[Variable[Any], Path], Any], of_array: Any) -> A:
    """`tree` with of_variable(v, path) as the value of every Variable v, and `of_array` for every array beside them."""

    def leaf(keys: Any, x: Any) -> Any:
        require_own(x, tuple(map(plain_key, keys)))
        if isinstance(x, Variable):
            return new_variable(type(x), of_variable(x, tuple(map(plain_key, keys))), dict(x._var_metadata))
        return of_array if hasattr(x, "shape") else None

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda x: _is_variable(x) or is_foreign(type(x)))


def _is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def _named(mesh: AnyMesh, spec: PartitionSpec, value: Any, place: str) -> NamedSharding:
    rank = len(value.shape) if hasattr(value, "shape") else len(spec)
    if len(spec) > rank:
        raise MetadataError(f"{place} has more names than axes: its shape is {tuple(value.shape)}. Remove names.")
    axes = list(_mesh_axes(spec))
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown or len(set(axes)) < len(axes):
        found = f"no axis {unknown[0]!r}" if unknown else "one axis for two of them"
        raise MetadataError(
            f"{place} stands for {spec}: {found} on a mesh with axes {tuple(mesh.axis_names)}.\n"
            "Say which mesh axis each name means: nnx.logical_axis_rules([(name, mesh axis or None), ...])."
        )
    return NamedSharding(mesh, spec)


def _mesh_axes(spec: Iterable[Any]) -> Iterator[Any]:
    """The mesh axes a spec uses, as often as it does."""
    for entry in spec:
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None and axis is not PartitionSpec.UNCONSTRAINED:
                yield axis


# ---- abstract values ----


def get_abstract_model(
    init_fn: Callable[[], Any], mesh: AnyMesh, *, graph: bool | None = None
) -> tuple[GraphDef, State]:
    """`nnx.split(init_fn())` without computing anything: the values are ShapeDtypeStructs, sharded over `mesh`.

    What a checkpoint library needs to restore each shard onto its own device.

    Args:
      init_fn: makes a model; it is traced.
      mesh: what the axis names, after logical rules, are axes of.
      graph: False forbids shared references in the model.

    Raises:
      MetadataError: if names and `mesh`, or names and the rank of a value, do not fit; it names the path.

    Example:
      >>> import nnx_core as nnx, jax
      >>> from nnx_core import sharding
      >>> init = sharding.with_partitioning(nnx.initializers.ones, (None, "model"))
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> graphdef, state = sharding.get_abstract_model(
      ...     lambda: nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0)), mesh
      ... )
      >>> state["kernel"].shape, state["kernel"].get_value().sharding.spec
      ((2, 4), P(None, 'model'))
    """
    graphdef, state = jax.eval_shape(lambda: split(init_fn(), graph=graph))

    def sharded(path: Path, x: Any) -> Any:
        if isinstance(x, Variable):
            return x.replace(_abstract_value(x, mesh, path, keep=False))
        return _struct(x, NamedSharding(mesh, PartitionSpec())) if hasattr(x, "shape") else x

    return graphdef, state.map(sharded)


def as_abstract(tree: A, graph: bool | None = None) -> A:
    """`tree` with shardings on its abstract values: those that the axis names say, on the mesh there is.

    The mesh is that of a Variable's metadata (`mesh`), or the ambient one (`jax.set_mesh`). Values that have a
    sharding, such as arrays on devices, stay as they are.

    Args:
      tree: a module or any pytree with Variables, as `nnx.eval_shape` makes it; it is not changed.
      graph: False forbids shared references.

    Raises:
      MetadataError: if a Variable has axis names and there is no mesh, or they do not fit it or the value's rank.

    Example:
      >>> import nnx_core as nnx, jax
      >>> from nnx_core import sharding
      >>> mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> metadata = {"out_sharding": ("a", "b")}
      >>> model = nnx.eval_shape(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0), kernel_metadata=metadata))
      >>> with jax.set_mesh(mesh):
      ...     model = sharding.as_abstract(model)
      >>> model.kernel.get_value().sharding.spec
      P('a', 'b')
    """
    if graph is False:
        split(tree, graph=False)

    def sharded(path: Path, x: Any) -> Any:
        if not isinstance(x, Variable) or all(map(_is_placed, jax.tree.leaves(x._raw_value))):
            return x
        mesh = _mesh_for(x)
        unknown = mesh is None and not any(map(_has_axes, jax.tree.leaves(x._raw_value)))
        if unknown and _names_of(x._var_metadata):
            raise MetadataError(
                f"{_place(x, path)} needs a mesh to be sharded, found none. Call as_abstract under"
                " `with jax.set_mesh(mesh):`, or give the Variable one: with_partitioning(init, names, mesh)."
            )
        return x if mesh is None else x.replace(_abstract_value(x, mesh, path, keep=True))

    return recursive_map(sharded, tree)


def abstract_with_sharding(tree: A, graph: bool | None = None) -> A:
    """The older name of `as_abstract`.

    Example:
      >>> import warnings
      >>> from nnx_core import sharding
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     sharding.abstract_with_sharding({})
      {}
      >>> str(caught[0].message)
      'abstract_with_sharding is deprecated. Use as_abstract instead.'
    """
    warnings.warn("abstract_with_sharding is deprecated. Use as_abstract instead.", DeprecationWarning, stacklevel=2)
    return as_abstract(tree, graph=graph)


def _abstract_value(v: Variable[Any], mesh: AnyMesh, path: Path, *, keep: bool) -> Any:
    """The value of `v`, its arrays as ShapeDtypeStructs sharded by its names; `keep` those that are placed."""
    spec, place = _pspec(v, path) or PartitionSpec(), _place(v, path)
    whole = hasattr(v._raw_value, "shape")

    def leaf(x: Any) -> Any:
        if (keep and _is_placed(x)) or not hasattr(x, "shape"):
            return x
        if keep and _has_axes(x) and x.sharding.mesh.shape == mesh.shape:
            return _struct(x, NamedSharding(mesh, x.sharding.spec))
        # In a pytree the names are those of its largest arrays: a scale beside a kernel has fewer axes.
        fits = whole or len(spec) <= len(x.shape)
        return _struct(x, _named(mesh, spec if fits else PartitionSpec(), x, place))

    return jax.tree.map(leaf, v._raw_value)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=getattr(x, "weak_type", False))


def _is_placed(x: Any) -> bool:
    """Whether `x` has a sharding already, or can have none."""
    if not hasattr(x, "shape"):
        return True
    sharding = getattr(x, "sharding", None)
    if not isinstance(x, jax.ShapeDtypeStruct) or not isinstance(sharding, NamedSharding):
        return sharding is not None
    # What is traced under a mesh of explicit axes comes out on that mesh, without its devices.
    return not isinstance(sharding.mesh, AbstractMesh)


def _has_axes(x: Any) -> bool:
    """Whether a trace gave `x` axes of a mesh: "replicated" is what it says of everything else."""
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and any(True for _ in _mesh_axes(sharding.spec))


def place_abstractly(tree: A) -> A:
    """`tree`, fresh from a trace; under a mesh its abstract values get the shardings of real ones."""
    mesh = _ambient_mesh()
    if mesh is None or not using_eager_sharding():
        return tree

    def leaf(traced: Any, named: Any) -> Any:
        if _has_axes(traced):  # by its names, or by what the program did with it
            return named if _entries(named) == _entries(traced) else traced
        return named if _is_placed(named) else _struct(named, NamedSharding(mesh, PartitionSpec()))

    for _, v in iter_graph(tree):
        if isinstance(v, Variable):
            set_raw(v, jax.tree.map(leaf, v._raw_value, place_eagerly(v, v._raw_value)))
    return tree


def _entries(x: Any) -> tuple[Any, ...]:
    """What the spec of an abstract value says of each of its axes."""
    spec = tuple(x.sharding.spec)
    return (*spec, *[None] * (len(x.shape) - len(spec)))


# ---- meshes, and where a new value goes ----


def _mesh_for(v: Variable[Any]) -> AnyMesh | None:
    """The mesh of the metadata, or else the ambient one."""
    mesh = v._var_metadata.get(MESH)
    names = _names_of(v._var_metadata)
    if mesh is None:
        mesh = getattr(sharding_of(names), "mesh", None)
    return _ambient_mesh() if mesh is None else mesh


def _ambient_mesh() -> AnyMesh | None:
    """The mesh of `jax.set_mesh`: with its devices, but in a trace without. None if there is none."""
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside jax.jit there are no devices
        return abstract
    return abstract if mesh.empty else mesh


def using_eager_sharding() -> bool:
    """Whether new Variables move their values to where their axis names say.

    Example:
      >>> from nnx_core import sharding
      >>> sharding.using_eager_sharding()
      True
    """
    return use_eager_sharding.current_value()


def place_eagerly(variable: Variable[Any], value: Any, asked: bool | None = None) -> Any:
    """`value` where the axis names of `variable` say; without a mesh of such axes as it is.

    The mesh is that of the metadata (`mesh`, or of a NamedSharding or Format in the place of names),
    or the ambient one (`jax.set_mesh`). A name that it does not have leaves the whole value where it
    is; so does `shard_map`, where it is one shard already. State of an optimizer that is not divisible
    is left alone.

    Args:
      variable: a new Variable, for its metadata.
      value: what it shall hold: an array or a pytree, of which only what has all the named axes is
        placed; concrete ones move, traced ones are constrained.
      asked: goes before `Variable(..., eager_sharding=...)`, and that before `use_eager_sharding`.

    Raises:
      MetadataError: if there are more names than axes, two for one mesh axis, or an axis that is not
        divisible.
    """
    metadata = variable._var_metadata
    if not _names_of(metadata):
        return value
    asked = metadata.get(EAGER_SHARDING) if asked is None else asked
    if not (use_eager_sharding.current_value() if asked is None else asked):
        return value
    target = _target(variable)
    if target is None:
        return value
    whole, place = isinstance(value, _ARRAYS), _place(variable, ())
    return jax.tree.map(lambda x: _placed(x, target, place, whole, type(variable)), value)


_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def _target(v: Variable[Any]) -> Sharding | Format | None:
    """Where the metadata of `v` sends it; None if nowhere that exists."""
    names, mesh = _names_of(v._var_metadata), _mesh_for(v)
    if isinstance(names, Sharding | Format) and not isinstance(sharding_of(names), NamedSharding):
        return names  # of one device, say: it has no axes
    spec = _pspec(v, ()) or PartitionSpec()
    if isinstance(mesh, AbstractMesh):
        ambient = _ambient_mesh()  # of the same axes it has the devices
        mesh = ambient if ambient is not None and ambient.shape == mesh.shape else None
    if mesh is None or not set(_mesh_axes(spec)) <= set(mesh.axis_names):
        return None
    if isinstance(names, Sharding | Format) and mesh is sharding_of(names).mesh:
        return names
    return _named(mesh, spec, None, _place(v, ()))


def _placed(x: Any, target: Any, place: str, whole: bool, kind: type) -> Any:
    """`x` at `target`, if that is possible; raises MetadataError if the user should have known."""
    if not isinstance(x, _ARRAYS):
        return x
    sharding = sharding_of(target)
    if isinstance(sharding, NamedSharding):
        if issubclass(kind, OptVariable) and not any(True for _ in _mesh_axes(sharding.spec)):
            return x  # nothing is known of this moment: it stays where its computation put it
        if _is_one_shard(sharding):
            return x
        if not whole and len(sharding.spec) > len(x.shape):
            return x  # in a pytree the names are those of its largest arrays
        _named(sharding.mesh, sharding.spec, x, place)
        uneven = _uneven_axis(x.shape, sharding)
        if uneven is not None and issubclass(kind, OptVariable):
            return x
        if uneven is not None:
            raise MetadataError(
                f"{place} stands for {sharding.spec}: axis {uneven} of shape {tuple(x.shape)} cannot be divided evenly"
                f" over a mesh of {dict(sharding.mesh.shape)}. Give that axis None, or another size."
            )
    return _moved(x, target)


def _is_one_shard(sharding: NamedSharding) -> bool:
    """Whether this runs inside a `shard_map` or `pmap`, of these axes or of another mesh."""
    ambient = jax.sharding.get_abstract_mesh()
    manual = set(ambient.manual_axes)
    here = sharding.mesh.axis_names == ambient.axis_names
    return bool(manual) and (not here or not manual.isdisjoint(_mesh_axes(sharding.spec)))


def _uneven_axis(shape: tuple[int, ...], sharding: NamedSharding) -> int | None:
    for number, (size, entry) in enumerate(zip(shape, sharding.spec, strict=False)):
        if size % math.prod(sharding.mesh.shape[axis] for axis in _mesh_axes([entry])):
            return number
    return None


def _moved(x: Any, target: Any) -> Any:
    sharding = sharding_of(target)
    if isinstance(x, jax.ShapeDtypeStruct):
        return _struct(x, target)
    traced = isinstance(x, jax.core.Tracer)
    if not isinstance(sharding, NamedSharding):
        return x if traced else jax.device_put(x, target)  # one device: not from within a program
    if not traced and isinstance(sharding.mesh, Mesh):
        return jax.device_put(x, target)
    return _constrained(x, target)


def _constrained(x: Any, target: Any) -> Any:
    """A traced `x` at `target`: explicit axes are part of its type, the others a wish."""
    sharding = sharding_of(target)
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {axis for axis, kind in kinds.items() if kind == AxisType.Explicit}
    wished = {axis for axis, kind in kinds.items() if kind == AxisType.Auto}
    if explicit:
        x = jax.sharding.reshard(x, NamedSharding(mesh, _restricted(sharding.spec, explicit, None)))
    if wished:
        free = PartitionSpec.UNCONSTRAINED if explicit else None
        spec = _restricted(sharding.spec, wished, free)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    if isinstance(target, Format):
        x = with_layout_constraint(x, target.layout)
    return x


def _restricted(spec: PartitionSpec, axes: set[Any], otherwise: Any) -> PartitionSpec:
    """`spec` of these mesh axes alone."""

    def entry(names: Any) -> Any:
        kept = tuple(axis for axis in _mesh_axes([names]) if axis in axes)
        return kept if kept else (names if names is PartitionSpec.UNCONSTRAINED else otherwise)

    return PartitionSpec(*map(entry, spec))


place_new_values_with(place_eagerly)
