"""From axis names to shardings: what a Variable's metadata says of where its value lives.

Law: a PartitionSpec is computed from metadata and logical rules alone; no value is read and no mesh is needed. A mesh
enters where shardings are made (`get_named_sharding`, `get_abstract_model`, `as_abstract`), and values move only
where eager sharding was asked for. The trees that come out have the structure of those that went in, so JAX takes
them as `in_shardings` and `out_shardings` of these. Knows Variables, States and graphs; knows no transforms.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nnx_core._errors import MetadataError, Path, show_path
from nnx_core.graph.api import split
from nnx_core.graph.classify import plain_key
from nnx_core.graph.structure import GraphDef
from nnx_core.graph.walk import recursive_map
from nnx_core.kinds import OptVariable
from nnx_core.state import State
from nnx_core.variables import (
    AXIS_NAMES,
    Variable,
    VariableMetadata,
    new_variable,
    place_new_values_with,
    with_metadata,
)

A = TypeVar("A")
AnyMesh: TypeAlias = Mesh | AbstractMesh
#: (logical name, mesh axis or several or None for replicated) pairs; of two for one name the later counts.
LogicalRules: TypeAlias = Sequence[tuple[str, str | tuple[str, ...] | None]]

MESH, RULES = "mesh", "sharding_rules"  # metadata keys: a mesh and logical rules of one Variable's own
_ABSENT: Any = object()

# Both are per context, as jax's own: a thread that was not told anything starts with the defaults.
_rules: ContextVar[LogicalRules] = ContextVar("logical_axis_rules", default=())
_store: tuple[Callable[[], Any], Callable[[Any], Any]] = (_rules.get, _rules.set)  # where the rules are kept
_eager: ContextVar[bool] = ContextVar("eager_sharding", default=False)


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
      mesh: kept as metadata, for `as_abstract` and eager sharding; without it they take the ambient mesh.
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


# ---- logical rules ----


def get_logical_axis_rules() -> LogicalRules:
    """The logical rules that hold here."""
    return _checked(_store[0]())


def set_logical_axis_rules(rules: LogicalRules | None) -> None:
    """Let `rules` hold from here on, in this thread; `logical_axis_rules` does so for a block.

    Raises:
      MetadataError: if a rule is not a pair of a name and a mesh axis, several, or None.
    """
    _store[1](_checked(rules))


def keep_rules_in(get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
    """Keep logical rules where another library keeps its own: what is set in one of the two then holds in both.

    Rules that hold here are handed over. Outside the new place's contexts, what was set here before is gone.
    """
    global _store
    if rules := get_logical_axis_rules():
        set_(rules)
    _store = get, set_


@contextlib.contextmanager
def logical_axis_rules(rules: LogicalRules | None) -> Iterator[None]:
    """Within this block axis names are logical: `rules` say which mesh axis, or axes, each stands for.

    Names that no rule mentions stay as they are. An inner block replaces the rules of the outer one. They are read
    when specs are computed, not when Variables are made.

    Args:
      rules: (logical name, mesh axis | tuple of mesh axes | None) pairs; of two for one name the later counts.

    Raises:
      MetadataError: if a rule is no such pair.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core import sharding
      >>> w = nnx.Param(jnp.ones((2, 4)), out_sharding=("embed", "mlp"))
      >>> with sharding.logical_axis_rules([("embed", None), ("mlp", "model")]):
      ...     sharding.get_var_pspec(w)
      P(None, 'model')
      >>> sharding.get_var_pspec(w)
      P('embed', 'mlp')
    """
    before = get_logical_axis_rules()
    set_logical_axis_rules(rules)
    try:
        yield
    finally:
        set_logical_axis_rules(before)


def _checked(rules: Any) -> LogicalRules:
    pairs = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(rules or ())
    for rule in pairs:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            raise MetadataError(
                f"Logical axis rule {rule!r} is not a pair. Expected (name, mesh axis), (name, (mesh axis, ...)) or"
                " (name, None), such as ('embed', 'model')."
            )
    return pairs


def _rules_for(metadata: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The ambient rules and those of a Variable's own, which may not contradict them."""
    ambient, own = dict(get_logical_axis_rules()), dict(_checked(metadata.get(RULES)))
    for name, axis in own.items():
        if name in ambient and ambient[name] != axis:
            raise MetadataError(
                f"{place}: its own sharding_rules send {name!r} to {axis!r}, logical_axis_rules send it to"
                f" {ambient[name]!r}. Change one of them."
            )
    return {**ambient, **own}


def _translated(name: Any, rules: Mapping[str, Any]) -> Any:
    if isinstance(name, list | tuple):
        axes = [_translated(part, rules) for part in name]
        return tuple(
            axis for part in axes if part is not None for axis in (part if isinstance(part, tuple) else (part,))
        )
    axis = rules.get(name, name) if isinstance(name, str) else name
    return tuple(axis) if isinstance(axis, list) else axis


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
    if isinstance(names, NamedSharding):
        names = names.spec
    rules = _rules_for(v._var_metadata, _place(v, path))
    axes = [_translated(name, rules) for name in ((names,) if isinstance(names, str) else names)]
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
        if isinstance(x, Variable):
            return new_variable(type(x), of_variable(x, tuple(map(plain_key, keys))), dict(x._var_metadata))
        return of_array if hasattr(x, "shape") else None

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=_is_variable)


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


def _mesh_axes(spec: PartitionSpec) -> Iterator[Any]:
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
        if mesh is None and _names_of(x._var_metadata):
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
        # In a pytree the names are those of its largest arrays: a scale beside a kernel has fewer axes.
        fits = whole or len(spec) <= len(x.shape)
        return _struct(x, _named(mesh, spec if fits else PartitionSpec(), x, place))

    return jax.tree.map(leaf, v._raw_value)


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=getattr(x, "weak_type", False))


def _is_placed(x: Any) -> bool:
    """Whether `x` has a sharding already, or can have none."""
    if not hasattr(x, "shape"):
        return True
    sharding = getattr(x, "sharding", None)
    if not isinstance(x, jax.ShapeDtypeStruct) or not isinstance(sharding, NamedSharding):
        return sharding is not None
    # Traced under a mesh of explicit axes everything comes out as "replicated on that abstract mesh".
    return not isinstance(sharding.mesh, AbstractMesh) or any(axis is not None for axis in sharding.spec)


# ---- meshes, eager sharding ----


def _mesh_for(v: Variable[Any]) -> AnyMesh | None:
    """The mesh of the metadata, or else the ambient one."""
    mesh = v._var_metadata.get(MESH)
    names = _names_of(v._var_metadata)
    if mesh is None and isinstance(names, NamedSharding):
        mesh = names.mesh
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


class use_eager_sharding:
    """Say whether new Variables move their values to where their axis names say; for a `with` block or from here on.

    Off by default, and without effect where there is no mesh, neither ambient nor in the Variable's metadata: naming
    axes never needs one. `Variable(..., eager_sharding=...)` decides for one Variable. Holds in this thread.

    Example:
      >>> from nnx_core import sharding
      >>> with sharding.use_eager_sharding(True):
      ...     sharding.using_eager_sharding()
      True
      >>> sharding.using_eager_sharding()
      False
    """

    __slots__ = ("_before",)

    @staticmethod
    def current_value() -> bool:
        """What holds now; the same as `using_eager_sharding()`."""
        return _eager.get()

    def __init__(self, value: bool, /):
        self._before = _eager.get()
        _eager.set(bool(value))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _eager.set(self._before)


def using_eager_sharding() -> bool:
    """Whether new Variables move their values to where their axis names say."""
    return _eager.get()


def place_eagerly(variable: Variable[Any], value: Any, asked: bool | None = None) -> Any:
    """`value` where the axis names of `variable` say, if eager sharding is on and there is a mesh; else as it is.

    Args:
      variable: a new Variable, for its metadata.
      value: what it shall hold: an array or a pytree; concrete ones move, traced ones are constrained.
      asked: `Variable(..., eager_sharding=...)`; None for what `use_eager_sharding` says.

    Raises:
      MetadataError: if the names do not fit the mesh or the value's rank.
    """
    if not (_eager.get() if asked is None else asked) or _names_of(variable._var_metadata) is None:
        return value
    mesh = _mesh_for(variable)
    if mesh is None:
        return value
    spec, place = _pspec(variable, ()) or PartitionSpec(), _place(variable, ())

    def leaf(x: Any) -> Any:
        return _moved(x, _named(mesh, spec, x, place)) if hasattr(x, "shape") else x

    return jax.tree.map(leaf, value)


def _moved(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return _struct(x, sharding)
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    types = {kinds[axis] for axis in _mesh_axes(sharding.spec)}
    if AxisType.Manual in types:  # inside shard_map a value is one shard already
        return x
    if not isinstance(x, jax.core.Tracer) and isinstance(sharding.mesh, Mesh):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


place_new_values_with(place_eagerly)
