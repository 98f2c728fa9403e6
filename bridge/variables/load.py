"""Linen variables into a model, in place, and out of one.

Law: loading is strict unless asked otherwise: missing, unexpected, wrong shape and wrong dtype are one error that
lists all paths, and nothing is written then. What is written goes into the Variables that are there: they keep
identity, ties and metadata. `variables_of(model)` is what `load_variables` takes.
Knows trees, paths and Variables; knows nothing of how the model is made: wrapped Linen or native NNX.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import nnx_core as nnx
from bridge._errors import RenameClashError, VariablesMismatchError, cut_short, show_path
from bridge._types import Location, Path
from bridge.variables.kinds import variable_type
from bridge.variables.mapping import EMPTY, leaves, linen_tree, locations
from bridge.variables.metadata import to_linen_value, to_nnx_variable
from nnx_core._errors import TraceError
from nnx_core._trace import current_trace

#: Path prefixes in Linen -> path prefixes in the model, the longest that fits wins; or a function of the path.
#: A prefix is a tuple of names, or names with `/` between them. The collection is no part of a path.
Rename = Mapping[str | tuple[Hashable, ...], str | tuple[Hashable, ...]] | Callable[[Path], tuple[Hashable, ...]]


_MOST_SHOWN = 10  # of each kind, in the text of a report


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What `load_variables` did. Locations are a collection and the names below it, as the error lists them.

    Its text counts each kind and names the first of what does not fit; the attributes hold all.

    Attributes:
      loaded: what was written.
      missing: what the model has and the variables lack; left as it was.
      unexpected: what the variables have and the model lacks.
      wrong_shape, wrong_dtype: `(location, expected, found)` of what does not fit; left as it was.

    >>> LoadReport(loaded=(("params", "kernel"),), missing=(("params", "bias"),))
    LoadReport: 1 loaded, 1 missing, 0 unexpected, 0 of another shape, 0 of another dtype
      missing: params/bias
    """

    loaded: tuple[Location, ...] = ()
    missing: tuple[Location, ...] = ()
    unexpected: tuple[Location, ...] = ()
    wrong_shape: tuple[tuple[Location, Any, Any], ...] = ()
    wrong_dtype: tuple[tuple[Location, Any, Any], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything fitted."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def __repr__(self) -> str:
        other = {"of another shape": self.wrong_shape, "of another dtype": self.wrong_dtype}
        listed: dict[str, list[str]] = {
            "loaded": list(map(show_path, self.loaded)),
            "missing": list(map(show_path, self.missing)),
            "unexpected": list(map(show_path, self.unexpected)),
        }
        for kind, rows in other.items():
            listed[kind] = [f"{show_path(location)}: expected {want}, found {got}" for location, want, got in rows]
        lines = ["LoadReport: " + ", ".join(f"{len(each)} {kind}" for kind, each in listed.items())]
        for kind, each in listed.items():
            if kind != "loaded":
                lines += cut_short([f"  {kind}: {text}" for text in each], _MOST_SHOWN, f"  {kind}: ")
        return "\n".join(lines)


def load_variables(
    model: nnx.Object, variables: Mapping[str, Any], strict: bool = True, rename: Rename | None = None
) -> LoadReport:
    """Write Linen variables into the Variables of `model`.

    A collection goes to the Variables of its type (or a subtype). Random state and intermediates are loaded where
    given, and never missed. Boxes are opened; their metadata goes to Variables that have none under the same name.
    So are those that a checkpoint left of Linen's: `{"kernel": {"value": array}}`.
    Integer keys and their digits are the same key. A value goes where the one that it replaces is sharded to.

    Args:
      model: a ToNNX after `lazy_init`, or any NNX module; it may be abstract (`nnx.eval_shape`), and with shardings
        (`nnx.get_abstract_model`, `nnx.as_abstract`) values on the host go straight to their devices.
      variables: {collection: tree}, of any Mapping; not changed.
      strict: raise unless everything fits; else load what fits.
      rename: see `Rename`.

    Raises:
      VariablesMismatchError: with `strict`, listing all that does not fit; nothing has been written then.
      RenameClashError: if `rename` gives two variables one path.
      TraceError: if `model` belongs to another trace; nothing has been written then.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> report = load_variables(model, {"params": {"Dense_0": dense}}, rename={"Dense_0": "layers/0"})
    >>> len(report.loaded), float(model.layers[0].kernel.sum())
    (2, 6.0)
    """
    matches = _Matches(_targets(model))
    values = ((location, value) for location, value in leaves(variables) if value is not EMPTY)
    renamed = _renamed(values, renaming(rename))
    for location, (path, value) in renamed.items():
        matches.find(location, (location[0], *path), value)
    report = matches.report()
    if strict and not report.complete:
        has_variables = any(_is_required(variable) for _, variable in matches.targets)
        target = "the model" if has_variables else "the model (it has no variables yet: lazy_init makes them)"
        raise VariablesMismatchError(
            report.missing, report.unexpected, report.wrong_shape, report.wrong_dtype, target=target
        )
    matches.write()
    return report


def variables_of(model: nnx.Object, rename: Rename | None = None) -> dict[str, Any]:
    """Linen variables {collection: tree} with the values of `model`: what `load_variables` would take.

    Random state and intermediates are left out. Metadata becomes boxes.

    Args:
      rename: the same mapping as for `load_variables`; a function goes from the model's paths to Linen's.

    Raises:
      RenameClashError: if two Variables get one path.

    >>> import nnx_core as nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> variables_of(model, rename={"Dense_0": "layers/0"})["params"]["Dense_0"]["kernel"].shape
    (2, 3)
    """
    back = rename if callable(rename) else _inverse(rename or {})
    variables = [target for target in _targets(model) if _is_required(target[1])]
    renamed = _renamed(variables, renaming(back))
    return linen_tree({(location[0], *path): variable for location, (path, variable) in renamed.items()})


def load_into(
    targets: Mapping[Location, nnx.Variable[Any]], given: Mapping[Location, nnx.Variable[Any]], name: str
) -> None:
    """Write the values of `given` into the Variables at the same locations.

    Raises:
      VariablesMismatchError: unless everything fits in what is called `name`; nothing has been written then.
    """
    matches = _Matches(list(targets.items()))
    for location, variable in given.items():
        matches.find(location, location, to_linen_value(variable))
    report = matches.report()
    if not report.complete:
        raise VariablesMismatchError(
            report.missing, report.unexpected, report.wrong_shape, report.wrong_dtype, target=name
        )
    matches.write()


# ---- renaming ----------------------------------------------------------------------------------------------


def renaming(rename: Rename | None) -> Callable[[Path], Path]:
    """A function of paths from whatever may say how to rename.

    >>> renaming({"blocks_0": "blocks/0", "blocks_0/Dense_0": ("blocks", 0, "fc")})(("blocks_0", "Dense_0", "bias"))
    ('blocks', '0', 'fc', 'bias')
    """
    if rename is None:
        return lambda path: path
    if callable(rename):
        return lambda path: _path(rename(path))
    rules = {_path(old): _path(new) for old, new in rename.items()}
    lengths = sorted({len(old) for old in rules}, reverse=True)

    def apply(path: Path) -> Path:
        for length in lengths:
            prefix, rest = path[:length], path[length:]
            if len(prefix) == length and prefix in rules:
                return (*rules[prefix], *rest)
        return path

    return apply


def _path(keys: str | tuple[Hashable, ...]) -> Path:
    if isinstance(keys, str):
        return tuple(keys.split("/")) if keys else ()
    return tuple(map(str, keys))


def _inverse(rename: Mapping[Any, Any]) -> dict[Path, Path]:
    back: dict[Path, Path] = {}
    for old, new in rename.items():
        old_path, new_path = _path(old), _path(new)
        if new_path in back:
            raise RenameClashError(back[new_path], new_path, old_path, new_path)
        back[new_path] = old_path
    return back


def _renamed(pairs: Iterable[tuple[Location, Any]], rename: Callable[[Path], Path]) -> dict[Location, tuple[Path, Any]]:
    """location -> (new path, value); RenameClashError if a new path is, or begins with, another one."""
    renamed: dict[Location, tuple[Path, Any]] = {}
    owners: dict[Location, Location] = {}  # new location -> old one
    for location, value in pairs:
        location = (location[0], *map(str, location[1:]))
        new_path = rename(location[1:])
        new = (location[0], *new_path)
        first = owners.setdefault(new, location)
        if first != location:
            raise RenameClashError(first, new, location, new)
        renamed[location] = new_path, value
    for new, old in owners.items():
        for length in range(2, len(new)):
            beginning = new[:length]
            if beginning in owners:
                raise RenameClashError(owners[beginning], beginning, old, new)
    return renamed


# ---- matching ----------------------------------------------------------------------------------------------


def _targets(model: Any) -> list[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of every Variable, keys as strings."""
    state = nnx.variables(model)
    return list(locations(state.raw_mapping))


def _is_required(variable: nnx.Variable[Any]) -> bool:
    return not isinstance(variable, nnx.RngState | nnx.Intermediate)


@dataclass
class _Matches:
    """Which value goes into which Variable, and what does not fit."""

    targets: list[tuple[Location, nnx.Variable[Any]]]
    writes: dict[Location, tuple[nnx.Variable[Any], nnx.Variable[Any]]] = field(default_factory=dict)
    unexpected: list[Location] = field(default_factory=list)
    wrong_shape: list[tuple[Location, Any, Any]] = field(default_factory=list)
    wrong_dtype: list[tuple[Location, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = dict(self.targets)
        self._by_path: dict[Path, list[tuple[Location, nnx.Variable[Any]]]] = {}
        for location, variable in self.targets:
            self._by_path.setdefault(location[1:], []).append((location, variable))
        self._met: set[Location] = set()

    def find(self, source: Location, location: Location, value: Any) -> None:
        """Find the Variable for the `value` that is at `source` in Linen and belongs at `location` in the model."""
        target = self._target_at(location)
        if target is None and len(location) > 2 and location[-1] == "value":
            target = self._target_at(location[:-1])  # a Linen box, saved and restored as a dict
        if target is None or target[0] in self._met:
            self.unexpected.append(source)
            return
        location, variable = target
        self._met.add(location)
        new = to_nnx_variable(source[0], value)
        old_form, new_form = _form(variable.get_raw_value()), _form(new.get_raw_value())
        if old_form.shape != new_form.shape:
            self.wrong_shape.append((source, old_form.shape, new_form.shape))
        elif old_form.dtype != new_form.dtype:
            self.wrong_dtype.append((source, old_form.dtype, new_form.dtype))
        else:
            self.writes[source] = variable, new

    def _target_at(self, location: Location) -> tuple[Location, nnx.Variable[Any]] | None:
        if location in self._exact:
            return location, self._exact[location]
        kind = variable_type(location[0])
        for target in self._by_path.get(location[1:], ()):
            if isinstance(target[1], kind):
                return target
        return None

    def report(self) -> LoadReport:
        required = [location for location, variable in self.targets if _is_required(variable)]
        missing = [location for location in required if location not in self._met]
        return LoadReport(
            tuple(self.writes),
            tuple(missing),
            tuple(self.unexpected),
            tuple(self.wrong_shape),
            tuple(self.wrong_dtype),
        )

    def write(self) -> None:
        for location, (variable, _) in self.writes.items():
            if variable._trace_state != current_trace():
                raise TraceError(f"{type(variable).__name__} at {'/'.join(location)}")
        for variable, new in self.writes.values():
            variable.overwrite(_placed(new.get_raw_value(), variable.get_raw_value()))
            metadata = {key: x for key, x in new.get_metadata().items() if not variable.has_metadata(key)}
            if metadata:
                variable.set_metadata(**metadata)


@dataclass(frozen=True)
class _Form:
    """Shape and dtype, as an error shows them; of a pytree, its structure with those of its leaves."""

    shape: Any
    dtype: Any


def _form(value: Any) -> _Form:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _Form(tuple(value.shape), str(value.dtype))
    treedef = jax.tree.structure(value)
    if treedef.num_nodes == 1 and treedef.num_leaves == 1:  # a number, or what JAX knows nothing of
        return _Form((), _dtype_name(value))
    shapes = jax.tree.map(lambda x: np.shape(x) if _is_numeric(x) else (), value)
    dtypes = jax.tree.map(_dtype_name, value)
    return _Form(str(shapes), str(dtypes))


def _is_numeric(x: Any) -> bool:
    """Whether `x` is an array or a number: a collection may hold anything, a text or a function too."""
    return (hasattr(x, "dtype") and hasattr(x, "shape")) or isinstance(x, bool | int | float | complex)


def _dtype_name(x: Any) -> str:
    if not _is_numeric(x):
        return type(x).__name__
    return str(x.dtype) if hasattr(x, "dtype") else str(jnp.result_type(x))


def _placed(value: Any, target: Any) -> Any:
    """`value` as jax arrays, each where its place in `target` says: array, Ref or ShapeDtypeStruct."""
    # Not jax.tree.map: two trees of equal leaves may be of other types, a State and a dict.
    leaves, treedef = jax.tree.flatten(value)
    return treedef.unflatten(map(place, leaves, jax.tree.leaves(target)))


def place(x: Any, target: Any) -> Any:
    """`x` as a JAX array, on the devices that `target` is sharded to; the very same array if it is there already."""
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) or not _is_numeric(x):
        return x
    sharding = getattr(target, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        if getattr(x, "sharding", None) == sharding:
            return x
        return jax.device_put(x, sharding)  # from the host straight to each device: never whole on one of them
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
