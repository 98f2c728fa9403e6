"""Axis metadata crosses between Linen's boxes and NNX Variables, and survives both directions.

A Linen variable may be boxed: an `AxisMetadata` (Partitioned, LogicallyPartitioned, ...) around the value. An
NNX Variable holds the value and has metadata. `NNXMeta` is the box for metadata that no Linen box can say.

Law: `to_linen_value(to_nnx_variable(c, x)) == x` with the same type of box, and the input is never changed;
`x.add_axis(i, p).remove_axis(i, p) == x`. Metadata is inert: neither reading it nor boxing needs a mesh.

Logical rules that name one axis twice are read differently: in flax.linen the first rule counts whose mesh axes are
free, and an axis without a rule is not split; in flax.nnx the last one counts, and a name without a rule is a mesh
axis. Each side keeps its own reading: a Linen box that of Linen, NNXMeta and Variables that of NNX. A Variable that
came out of a LogicallyPartitioned with rules has `sharding_rules` by which NNX reads what Linen reads. Rules set by
`nn.logical_axis_rules` and by `nnx.logical_axis_rules` are the same rules, as in flax.

Knows values, boxes and Variables; knows nothing of trees or modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import serialization
from flax.core import meta
from flax.linen import summary
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import nnx_core as nnx
from bridge.variables._errors import AxisIndexError, AxisNameError
from bridge.variables.hashable import with_tuples
from bridge.variables.kinds import variable_type
from nnx_core._foreign import require_own
from nnx_core._statics import freeze_metadata, thaw_metadata
from nnx_core.sharding import get_named_sharding, get_var_pspec, keep_rules_in
from nnx_core.variables import current_keys

keep_rules_in(nn.get_logical_axis_rules, nn.set_logical_axis_rules)

NAMES, MESH, RULES = "out_sharding", "mesh", "sharding_rules"
#: Metadata of a Variable that came out of a Linen box: that box, without its value.
BOX = "linen_box"
_PADDING = "linen_axis_padding"
_FIELDS = {NAMES: "names", MESH: "mesh", RULES: "rules"}  # NNX's names of what a Linen box holds


def to_linen_value(variable: nnx.Variable[Any]) -> Any:
    """The value of a Variable as Linen holds it: plain, or boxed if there is metadata.

    A Variable that came out of a Linen box goes back into that type of box, with the axis names it has now;
    metadata that this box cannot hold makes it an NNXMeta.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> to_linen_value(nnx.Param(jnp.ones(2))).shape
    (2,)
    >>> to_linen_value(nnx.Param(jnp.ones((2, 3)), out_sharding=("in", "out"))).metadata
    {'out_sharding': ('in', 'out')}
    """
    value = variable.get_raw_value()
    if variable.has_ref:
        value = value[...]
    metadata = variable.get_metadata()
    if not metadata:
        return value
    box = metadata.get(BOX)
    if isinstance(box, LinenBox) and metadata.keys() <= {BOX, NAMES, MESH, RULES}:
        return box.around(value, metadata)
    return NNXMeta(type(variable), value, metadata)


def to_nnx_variable(collection: str, value: Any) -> nnx.Variable[Any]:
    """A new Variable of the collection's type from a Linen value, whose box becomes metadata.

    Axis names become `out_sharding`, whatever box they come from; `to_linen_value` undoes it.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> to_nnx_variable("params", nn.Partitioned(jnp.ones((2, 3)), ("in", "out"))).out_sharding
    ('in', 'out')
    """
    kind = variable_type(collection)
    require_own(value, (collection,))
    # An NNXMeta with nothing to say, or in a collection of another type, crosses like any other box.
    if isinstance(value, NNXMeta) and value.metadata and value.var_type is kind:
        return value.to_nnx_variable()
    if isinstance(value, meta.AxisMetadata):
        children, treedef = jax.tree.flatten(value, is_leaf=lambda x: x is not value)
        # A box of several arrays, or of a type JAX does not know, stays what it is: the Variable's value.
        if len(children) == 1 and children[0] is not value:
            box = LinenBox(treedef.unflatten([None]))
            return kind.from_metadata(children[0], {**box.shown, BOX: box})
    return kind.from_metadata(value, {})


class LinenBox:
    """A Linen box without its value; hashable, whatever the box holds, since metadata has to be."""

    __slots__ = ("shown", "template", "treedef")
    #: What NNX reads in this box, under NNX's names.
    shown: Mapping[str, Any]

    def __init__(self, template: meta.AxisMetadata[Any]):
        self.template = template
        self.shown = _shown(template)
        self.treedef = _structure(template)

    def around(self, value: Any, metadata: Mapping[str, Any]) -> meta.AxisMetadata[Any]:
        """The box around `value`, with what `metadata` says now where that has changed."""
        changes = {}
        for key, field in _FIELDS.items():
            if metadata.get(key) != self.shown.get(key):
                changes[field] = metadata.get(key)
        if not changes:
            return self.treedef.unflatten([value])  # type: ignore[no-any-return]
        box = self.template.replace(**changes)  # type: ignore[attr-defined]  # only a Partitioned shows anything
        return _structure(box).unflatten([value])  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinenBox):
            return NotImplemented
        return bool(self.treedef == other.treedef)

    def __hash__(self) -> int:
        # The fields of a box need not be hashable: Linen takes lists.
        return hash(type(self.template))

    def __reduce__(self) -> tuple[Any, ...]:
        return LinenBox, (self.template,)

    def __repr__(self) -> str:
        return f"LinenBox({type(self.template).__name__})"


def _structure(box: meta.AxisMetadata[Any]) -> Any:
    return jax.tree.structure(box, is_leaf=lambda x: x is not box)


def _shown(box: meta.AxisMetadata[Any]) -> dict[str, Any]:
    if not isinstance(box, meta.Partitioned):
        return {}
    metadata = {NAMES: box.names, MESH: box.mesh, RULES: _rules_for_nnx(box)}
    return {key: with_tuples(x) for key, x in metadata.items() if x is not None}


def _rules_for_nnx(box: meta.Partitioned[Any]) -> Any:
    """The rules of the box, or where NNX would read other axes in them than Linen, those that say Linen's."""
    rules = getattr(box, "rules", None)
    if not rules or not isinstance(rules, list | tuple):
        return rules
    names = tuple(box.names)
    try:
        axes = nn.logical_to_mesh_axes(names, rules)
    except ValueError:  # one name for two axes: Linen has no reading of that
        return rules
    spec = dict(zip(names, axes or (), strict=True))
    wanted = {name: with_tuples(axis) for name, axis in spec.items() if isinstance(name, str)}
    read = {logical: with_tuples(axis) for logical, axis in rules}
    if all(read.get(name, name) == axis for name, axis in wanted.items()):
        return rules
    first = dict(reversed(rules))
    return tuple({**first, **wanted}.items())


class NNXMeta(meta.AxisMetadata[Any]):
    """The Linen box of an NNX Variable: its type, its value, its metadata.

    A JAX pytree with the value as its only child; flax.serialization sees the value alone.

    Args:
      var_type: the type of the Variable.
      value: its value, an array of any shape or a pytree of arrays.
      metadata: its metadata; `out_sharding` names the axes of the value.

    >>> import nnx_core as nnx, jax, jax.numpy as jnp
    >>> box = NNXMeta(nnx.Param, jnp.ones((4, 2, 3)), {"out_sharding": ("in", "out")})
    >>> stacked = box.add_axis(0, {"partition_name": "layers"})
    >>> stacked.get_partition_spec()
    P('layers', 'in', 'out')
    >>> stacked.remove_axis(0, {"partition_name": "layers"}) == box
    True
    """

    __slots__ = ("metadata", "value", "var_type")
    var_type: type[nnx.Variable[Any]]
    value: Any
    metadata: dict[str, Any]
    __hash__ = None  # type: ignore[assignment]  # holds an array

    def __init__(self, var_type: type[nnx.Variable[Any]], value: Any, metadata: Mapping[str, Any]):
        object.__setattr__(self, "var_type", var_type)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "metadata", current_keys(metadata))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"NNXMeta is immutable; make a new one: box.replace({name}=...).")

    def replace(self, **updates: Any) -> NNXMeta:
        """A new box with other fields."""
        fields = {"var_type": self.var_type, "value": self.value, "metadata": self.metadata}
        return NNXMeta(**{**fields, **updates})

    def unbox(self) -> Any:
        """The value as it is: no sharding constraint, no mesh."""
        return self.value

    def replace_boxed(self, val: Any) -> NNXMeta:
        """This box around another value."""
        return self.replace(value=val)

    def to_nnx_variable(self) -> nnx.Variable[Any]:
        """A new Variable of `var_type` with this value and metadata; hooks do not run."""
        return self.var_type.from_metadata(self.value, dict(self.metadata))

    def get_partition_spec(self) -> PartitionSpec:
        """The PartitionSpec that the metadata says: axis names, translated by the logical rules.

        Rules are its own `sharding_rules` and the ambient ones, of `nn.logical_axis_rules` or
        `nnx.logical_axis_rules`; the last rule for a name counts, and a name without a rule is a mesh axis.

        Raises:
          MetadataError: (nnx_core) if its own rules contradict the ambient ones.
        """
        return get_var_pspec(self.to_nnx_variable()) or PartitionSpec()

    def get_sharding(self, mesh: Mesh | AbstractMesh) -> NamedSharding:
        """The spec on `mesh`, as `nn.get_sharding` asks for it.

        Raises:
          MetadataError: (nnx_core) if the names do not fit the mesh or the rank of the value, or rules contradict.

        >>> import nnx_core as nnx, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> box = NNXMeta(nnx.Param, jnp.ones((2, 3)), {"out_sharding": (None, "model")})
        >>> box.get_sharding(mesh).spec
        P(None, 'model')
        """
        sharding = get_named_sharding(self.to_nnx_variable(), mesh).get_raw_value()
        return NamedSharding(mesh, PartitionSpec()) if sharding is None else sharding

    # ---- axes ----

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> NNXMeta:
        """Metadata for a value that got an axis at `index`, named `params["partition_name"]`.

        Negative indices count from the end of the value that has the axis. `on_add_axis` hooks run.

        Raises:
          AxisNameError: if the value has axis names and the transform gives none.
          AxisIndexError: if no value of this rank has such an axis.
        """
        name = self._axis_name(index, params)
        names = _names(self.metadata.get(NAMES)) or ()
        index = self._normalised(index, max(self._rank(), len(names) + 1))
        padding = index - len(names) if name is not None and index > len(names) else 0
        variable = self._with_names([*names, *[None] * padding]).to_nnx_variable()
        variable.add_axis(index, name)
        stack = variable.get_metadata(_PADDING, ())
        if padding or stack:
            variable.set_metadata(_PADDING, (*stack, padding))
        return self._after(variable)

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> NNXMeta:
        """The exact inverse of `add_axis`. `on_remove_axis` hooks run.

        Raises:
          AxisNameError: if the value has axis names and the transform gives none, or another one.
          AxisIndexError: if the value has no such axis.
        """
        name = self._axis_name(index, params)
        names = _names(self.metadata.get(NAMES)) or ()
        index = self._normalised(index, max(self._rank(), len(names)))
        own_name = names[index] if index < len(names) else None
        if NAMES in self.metadata and own_name != name:
            raise AxisNameError(str(self), index, f"the name {name!r}, as the transform says", f"{own_name!r}")
        variable = self._with_names(names).to_nnx_variable()
        variable.remove_axis(index, name)
        if stack := variable.get_metadata(_PADDING, ()):
            *rest, padding = stack
            if padding:
                variable.set_metadata(NAMES, variable.get_metadata(NAMES)[:-padding])
            variable.set_metadata(_PADDING, tuple(rest))
            if not any(rest):
                variable.del_metadata(_PADDING)
        return self._after(variable)

    def _axis_name(self, index: int, params: Mapping[Any, Any]) -> Any:
        if NAMES in self.metadata and meta.PARTITION_NAME not in params:
            raise AxisNameError(str(self), index, "a name for the stacked axis", f"metadata_params={dict(params)}")
        return params.get(meta.PARTITION_NAME)

    def _rank(self) -> int:
        return max((np.ndim(x) for x in jax.tree.leaves(self.value)), default=0)

    def _normalised(self, index: int, rank: int) -> int:
        # From the end of the value that has the axis: -1 is its last one, where list.insert would put it last
        # but one. There is no upper bound: names may be fewer than axes, as in a PartitionSpec.
        if index < -rank:
            raise AxisIndexError(str(self), index, rank)
        return index + rank if index < 0 else index

    def _with_names(self, names: Any) -> NNXMeta:
        if NAMES not in self.metadata:
            return self
        return self.replace(metadata={**self.metadata, NAMES: tuple(names)})

    def _after(self, variable: nnx.Variable[Any]) -> NNXMeta:
        metadata = variable.get_metadata()
        if NAMES in self.metadata and NAMES in metadata:
            metadata[NAMES] = _like(self.metadata[NAMES], metadata[NAMES])
        return NNXMeta(type(variable), variable.get_raw_value(), metadata)

    # ---- Python protocols ----

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NNXMeta):
            return NotImplemented
        same = self.var_type is other.var_type and self.metadata == other.metadata
        return same and _same_values(self.value, other.value)

    def __str__(self) -> str:
        shape = getattr(self.value, "shape", None)
        names = self.metadata.get(NAMES)
        return f"a {self.var_type.__name__} of shape {shape} with axis names {names}"

    def __repr__(self) -> str:
        return f"NNXMeta({self.var_type.__name__}, {self.value!r}, {self.metadata!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # As a Variable: those find their type again, one that was made for a collection too.
        return _boxed, (self.to_nnx_variable(),)


def _boxed(variable: nnx.Variable[Any]) -> NNXMeta:
    return NNXMeta(type(variable), variable.get_raw_value(), variable.get_metadata())


def _same_values(a: Any, b: Any) -> bool:
    if a is b:
        return True
    leaves, treedef = jax.tree.flatten(a)
    other_leaves, other_treedef = jax.tree.flatten(b)
    return bool(treedef == other_treedef) and all(map(_same_leaf, leaves, other_leaves))


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.ShapeDtypeStruct) or isinstance(b, jax.ShapeDtypeStruct):
        return bool(a == b)
    if not hasattr(a, "dtype"):
        return bool(a == b)
    return bool(a.dtype == b.dtype and np.array_equal(a, b))


def _names(sharding: Any) -> tuple[Any, ...] | None:
    """Axis names out of what `out_sharding` may hold: names, a PartitionSpec, a NamedSharding, nothing."""
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        sharding = sharding.spec
    return (sharding,) if isinstance(sharding, str) else tuple(sharding)


def _like(sharding: Any, names: tuple[Any, ...]) -> Any:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*names), memory_kind=sharding.memory_kind)
    if isinstance(sharding, PartitionSpec):
        return PartitionSpec(*names)
    return list(names) if isinstance(sharding, list) else names


def _flatten(box: NNXMeta) -> tuple[tuple[Any], Any]:
    metadata: dict[str, Any] = {}
    for key, x in box.metadata.items():
        # A list comes back as one (`freeze_metadata` marks it); lists inside become tuples, as names of axes may be.
        metadata[key] = list(map(with_tuples, x)) if type(x) is list else with_tuples(x)
    return (box.value,), (box.var_type, freeze_metadata(metadata))


def _flatten_with_keys(box: NNXMeta) -> tuple[tuple[tuple[Any, Any]], Any]:
    (value,), aux = _flatten(box)
    return ((jax.tree_util.GetAttrKey("value"), value),), aux


def _unflatten(aux: Any, children: Any) -> NNXMeta:
    return NNXMeta(aux[0], children[0], thaw_metadata(aux[1]))


jax.tree_util.register_pytree_with_keys(NNXMeta, _flatten_with_keys, _unflatten, _flatten)


def _in_table(dumper: Any, box: NNXMeta) -> Any:
    """How `nn.tabulate`, which writes YAML, shows a box whose value is a text already: as it shows a Partitioned."""
    names = _names(box.metadata.get(NAMES))
    return dumper.represent_str(str(box.value) if names is None else f"{box.value} [dim]P[/dim]{names}")


summary.yaml.SafeDumper.add_representer(NNXMeta, _in_table)  # the YAML that Linen's tables are written with
serialization.register_serialization_state(
    NNXMeta,
    lambda box: serialization.to_state_dict(box.value),
    lambda box, state: box.replace_boxed(serialization.from_state_dict(box.value, state)),
)
