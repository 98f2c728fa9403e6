"""Linen variables into a model, in place, and out of one.

Law: loading is strict unless asked otherwise: missing, unexpected, wrong shape and wrong dtype are one error that
lists all paths, and nothing is written then. What is written goes into the Variables that are there: they keep
identity, ties and metadata. `variables_of(model)` is what `load_variables` takes.
Knows trees, paths and Variables; knows nothing of how the model is made: wrapped Linen or native NNX.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import nnx_core as nnx
from bridge._errors import RenameClashError, VariablesMismatchError
from bridge._types import Location, Path
from bridge.variables.kinds import variable_type
from bridge.variables.mapping import EMPTY, leaves, locations, tree_of
from bridge.variables.metadata import to_linen_value, to_nnx_variable
from nnx_core._errors import TraceError
from nnx_core._trace import current_trace

#: Path prefixes in Linen -> path prefixes in the model, the longest that fits wins; or a function of the path.
#: A prefix is a tuple of names, or names with `/` between them. The collection is no part of a path.
Rename = Mapping[str | tuple[Hashable, ...], str | tuple[Hashable, ...]] | Callable[[Path], tuple[Hashable, ...]]


@dataclass(frozen=True)
class LoadReport:
    """What `load_variables` did. Locations are a collection and the names below it, as the error lists them.

    Attributes:
      loaded: what was written.
      missing: what the model has and the variables lack; left as it was.
      unexpected: what the variables have and the model lacks.
      wrong_shape, wrong_dtype: `(location, expected, found)` of what does not fit; left as it was.
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
    plan = _Plan(_targets(model))
    values = ((at, value) for at, value in leaves(variables) if value is not EMPTY)
    renamed = _renamed(values, renaming(rename))
    for at, (path, value) in renamed.items():
        plan.match(at, (at[0], *path), value)
    report = plan.report()
    if strict and not report.complete:
        empty = not any(_is_required(v) for _, v in plan.targets)
        target = "the model (it has no variables yet: lazy_init makes them)" if empty else "the model"
        raise VariablesMismatchError(
            report.missing, report.unexpected, report.wrong_shape, report.wrong_dtype, target=target
        )
    plan.write()
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
    found = [(at, v) for at, v in _targets(model) if not isinstance(v, nnx.RngState | nnx.Intermediate)]
    renamed = _renamed(found, renaming(back))
    return tree_of(((at[0], *path), to_linen_value(v)) for at, (path, v) in renamed.items())


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
        for n in lengths:
            if path[:n] in rules and n <= len(path):
                return (*rules[path[:n]], *path[n:])
        return path

    return apply


def _path(keys: str | tuple[Hashable, ...]) -> Path:
    if isinstance(keys, str):
        return tuple(keys.split("/")) if keys else ()
    return tuple(map(str, keys))


def _inverse(rename: Mapping[Any, Any]) -> dict[Path, Path]:
    back: dict[Path, Path] = {}
    for old, new in rename.items():
        if _path(new) in back:
            raise RenameClashError(back[_path(new)], _path(new), _path(old), _path(new))
        back[_path(new)] = _path(old)
    return back


def _renamed(pairs: Any, rename: Callable[[Path], Path]) -> dict[Location, tuple[Path, Any]]:
    found: dict[Location, tuple[Path, Any]] = {}
    owners: dict[Location, Location] = {}
    for at, value in pairs:
        at = (at[0], *map(str, at[1:]))
        new = rename(at[1:])
        first = owners.setdefault((at[0], *new), at)
        if first != at:
            raise RenameClashError(first, (at[0], *new), at, (at[0], *new))
        found[at] = new, value
    for at, first in owners.items():
        for inner in (at[:n] for n in range(2, len(at)) if at[:n] in owners):
            raise RenameClashError(owners[inner], inner, first, at)
    return found


# ---- matching ----------------------------------------------------------------------------------------------


def _targets(model: Any) -> list[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of every Variable, keys as strings."""
    state = nnx.variables(model)
    return list(locations(state.raw_mapping))


def _is_required(variable: nnx.Variable[Any]) -> bool:
    return not isinstance(variable, nnx.RngState | nnx.Intermediate)


@dataclass
class _Plan:
    """Which value goes into which Variable, and what does not fit."""

    targets: list[tuple[Location, nnx.Variable[Any]]]
    writes: dict[Location, tuple[nnx.Variable[Any], nnx.Variable[Any]]] = field(default_factory=dict)
    unexpected: list[Location] = field(default_factory=list)
    wrong_shape: list[tuple[Location, Any, Any]] = field(default_factory=list)
    wrong_dtype: list[tuple[Location, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = dict(self.targets)
        self._at: dict[Path, list[tuple[Location, nnx.Variable[Any]]]] = {}
        for at, variable in self.targets:
            self._at.setdefault(at[1:], []).append((at, variable))
        self._met: set[Location] = set()

    def match(self, source: Location, at: Location, value: Any) -> None:
        """Find the Variable for the `value` that is at `source` in Linen and belongs at `at` in the model."""
        target = self._find(at)
        if target is None and len(at) > 2 and at[-1] == "value":  # a Linen box, saved and restored as a dict
            target = self._find(at[:-1])
        if target is None or target[0] in self._met:
            self.unexpected.append(source)
            return
        at, variable = target
        self._met.add(at)
        new = to_nnx_variable(source[0], value)
        old_form, new_form = _form(variable.get_raw_value()), _form(new.get_raw_value())
        if old_form.shape != new_form.shape:
            self.wrong_shape.append((source, old_form.shape, new_form.shape))
        elif old_form.dtype != new_form.dtype:
            self.wrong_dtype.append((source, old_form.dtype, new_form.dtype))
        else:
            self.writes[source] = variable, new

    def _find(self, at: Location) -> tuple[Location, nnx.Variable[Any]] | None:
        if at in self._exact:
            return at, self._exact[at]
        kind = variable_type(at[0])
        return next(((a, v) for a, v in self._at.get(at[1:], ()) if isinstance(v, kind)), None)

    def report(self) -> LoadReport:
        missing = [at for at, v in self.targets if at not in self._met and _is_required(v)]
        return LoadReport(
            tuple(self.writes),
            tuple(missing),
            tuple(self.unexpected),
            tuple(self.wrong_shape),
            tuple(self.wrong_dtype),
        )

    def write(self) -> None:
        for at, (variable, _) in self.writes.items():
            if variable._trace_state != current_trace():
                raise TraceError(f"{type(variable).__name__} at {'/'.join(at)}")
        for variable, new in self.writes.values():
            variable.overwrite(_placed(new.get_raw_value(), variable.get_raw_value()))
            news = {k: x for k, x in new.get_metadata().items() if not variable.has_metadata(k)}
            if news:
                variable.set_metadata(**news)


@dataclass(frozen=True)
class _Form:
    """Shape and dtype, as an error shows them; of a pytree, its structure with those of its leaves."""

    shape: Any
    dtype: Any


def _form(value: Any) -> _Form:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _Form(tuple(value.shape), str(value.dtype))
    leaves, treedef = jax.tree.flatten(value)
    if treedef.num_nodes == 1 and leaves:  # a number
        return _Form((), str(jnp.result_type(value)))
    shapes = treedef.unflatten([jnp.shape(x) for x in leaves])
    return _Form(str(shapes), str(treedef.unflatten([str(jnp.result_type(x)) for x in leaves])))


def _placed(value: Any, target: Any) -> Any:
    """`value` as jax arrays, each where its place in `target` says: array, Ref or ShapeDtypeStruct."""
    leaves, treedef = jax.tree.flatten(value)
    return treedef.unflatten(map(place, leaves, jax.tree.leaves(target)))


def place(x: Any, target: Any) -> Any:
    """`x` as a JAX array, on the devices that `target` is sharded to; the very same array if it is there already."""
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        return x
    sharding = getattr(target, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        if getattr(x, "sharding", None) == sharding:
            return x
        return jax.device_put(x, sharding)  # from the host straight to each device: never whole on one of them
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
