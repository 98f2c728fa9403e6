"""What `tx.init` says about an optimizer state: its slots, and where Linen keeps entries without content.

Law: a state that fits has the template's leaves and no others, shapes and dtypes included; nothing is computed but what
an optimizer keeps of params that are new.
Knows optax's interface and keys; knows nothing of files or conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nnx_core
from bridge._errors import BridgeError, VariablesMismatchError, cut_short, show_path
from bridge._types import Location, Path, Shape
from bridge.checkpoint.plan.target import show
from bridge.checkpoint.tree import layout, opt_state
from bridge.checkpoint.tree.canonical import Form, Key, Role
from bridge.checkpoint.tree.from_objects import Live, of_object
from bridge.checkpoint.tree.ops import Op

_MOST_SHOWN = 20
# What pytrees that differ raise, and functions of params that find other names or containers.
_OF_TREES = (ValueError, TypeError, KeyError, AssertionError)


class TransformationError(BridgeError, ValueError):
    """An optax transformation does not take the params: labels or masks that it has as trees are of other paths."""

    def __init__(self, names: Collection[Path], old_names: Collection[Path], found: str):
        self.paths = list(names)
        shown = cut_short([f"    {show_path(path)}" for path in names], _MOST_SHOWN, "    ")
        if set(old_names) - set(names):
            shown += ["  or, as the source has them:"]
            shown += cut_short([f"    {show_path(path)}" for path in old_names], _MOST_SHOWN, "    ")
        super().__init__(
            "the optimizer (tx) does not take the params\n  expected: labels and masks that are trees of these paths:\n"
            + "\n".join(shown)
            + f"\n  found: {found}\nMend the trees, or give functions of the params in their place."
        )


@dataclass(frozen=True)
class _Names:
    """Params as an optimizer is given them: under these names, in these containers."""

    locations: Mapping[Path, Location]
    container: Callable[[Any], Any]

    def tree(self, params: Mapping[Location, Any]) -> Any:
        return self.container(layout.nest({path: params[location] for path, location in self.locations.items()}))

    def keys(self, live: Live, shapes: Mapping[Location, Shape]) -> dict[Path, Key]:
        """What each leaf and each entry without content of a state is."""
        state = layout.nest({**live.values, **dict.fromkeys(live.tree.empty)})
        of_path = {path: shapes[location] for path, location in self.locations.items()}
        keys: dict[Path, Key] = {}
        for path, place in opt_state.places(state, of_path).items():
            location = self.locations[place.param] if place.param else None
            keys[path] = Key(Role.OPTIMIZER, place.prefix, location, place.tail)
        return keys


@dataclass(frozen=True)
class TxTemplate:
    """An abstract optimizer state.

    Attributes:
      forms: key -> (shape, dtype).
      masked: keys of params that the optimizer leaves out.
      empty, sequences: entries without content, but for masked params, and lists: paths in a Linen tree.
      tx, names: what it is the state of, and how that is given its params.
    """

    forms: Mapping[Key, tuple[Shape, str]]
    masked: frozenset[Key]
    empty: Mapping[Path, str]
    sequences: frozenset[Path]
    tx: optax.GradientTransformation
    names: _Names

    def initial(self, params: Mapping[Location, Op], new: Collection[Location]) -> dict[Key, Any]:
        """What `tx.init` keeps of the `new` ones of these params, whose ops read nothing.

        Computed under `jit`, where nothing is made of the others: they are zeros that no result depends on.
        """
        keys = [key for key in self.forms if key.location in new]
        shapes = {location: op.shape for location, op in params.items()}
        values = [jnp.asarray(params[location].value(_no_leaf)) for location in new]

        def run(values: list[Any]) -> list[Any]:
            leaves = dict(zip(new, values, strict=True))
            for location, op in params.items():
                if location not in leaves:
                    leaves[location] = jnp.zeros(op.shape, op.dtype)
            live = of_object(self.tx.init(self.names.tree(leaves)))
            by_key = {key: live.values.get(path) for path, key in self.names.keys(live, shapes).items()}
            return [by_key[key] for key in keys]

        return dict(zip(keys, jax.jit(run)(values), strict=True))

    def require(self, made: Mapping[Key, Op]) -> None:
        """Raise VariablesMismatchError unless the optimizer state that is made is this one."""
        missing: list[Path] = []
        shapes: list[tuple[Path, Shape, Shape]] = []
        dtypes: list[tuple[Path, str, str]] = []
        for key, (shape, dtype) in self.forms.items():
            op = made.get(key)
            if op is None:
                missing.append(show(key))
                continue
            if op.shape != shape:
                shapes.append((show(key), shape, op.shape))
            if op.dtype != dtype:
                dtypes.append((show(key), dtype, op.dtype))
        unexpected = [show(key) for key in made if key.role is Role.OPTIMIZER and key not in self.forms]
        if missing or unexpected or shapes or dtypes:
            raise VariablesMismatchError(
                missing, unexpected, shapes, dtypes, source="the converted optimizer state", target="the state of tx"
            )


def _no_leaf(*_: Any) -> Any:
    raise AssertionError("a param that is new was made of a leaf of the source")


def template_of(
    tx: optax.GradientTransformation,
    params: Mapping[Location, Op],
    form: Form,
    before: Mapping[Location, Path] | None = None,
) -> TxTemplate:
    """The state of an optax transformation for these params.

    Labels and masks that `tx` has as trees have the names that `form` has for the params, or those they had before.

    Args:
      tx: the transformation.
      params: how each of the params that it is for is made.
      form: where the result keeps things.
      before: what the source's optimizer calls each of them, if each is one of its params.

    Raises:
      TransformationError: `tx` takes the params under none of these names.

    >>> import optax
    >>> from bridge.checkpoint.tree.ops import Read
    >>> read = Read(("w",), (3,), "float32")
    >>> template = template_of(optax.adam(0.1), {("params", "w"): read}, Form(layout.Kind.LINEN_TRAIN_STATE))
    >>> sorted(show(key) for key in template.forms), dict(template.empty)
    ([('opt_state', '0', 'count'), ('opt_state', '0', 'mu', 'w'), ('opt_state', '0', 'nu', 'w')], \
{('opt_state', '1'): 'None'})
    """
    shapes = {location: op.shape for location, op in params.items()}
    abstract = {location: jax.ShapeDtypeStruct(op.shape, op.dtype) for location, op in params.items()}
    names, live = _started(tx, abstract, {form.variable(location): location for location in params}, before)
    forms: dict[Key, tuple[Shape, str]] = {}
    empty: dict[Path, str] = {}
    masked: set[Key] = set()
    for path, key in names.keys(live, shapes).items():
        if path in live.values:
            forms[key] = layout.describe(live.values[path])
        elif key.location is None:
            empty[("opt_state", *path)] = live.tree.empty[path]
        else:
            masked.add(key)
    sequences = frozenset(("opt_state", *path) for path in live.tree.sequences)
    return TxTemplate(forms, frozenset(masked), empty, sequences, tx, names)


def _started(
    tx: optax.GradientTransformation,
    params: Mapping[Location, jax.ShapeDtypeStruct],
    names: Mapping[Path, Location],
    before: Mapping[Location, Path] | None,
) -> tuple[_Names, Live]:
    """The abstract state, with the names under which `tx` takes the params."""
    old_names = {path: location for location, path in (before or {}).items()}
    first = ""
    for way in _ways(names, old_names):
        try:
            return way, of_object(jax.eval_shape(tx.init, way.tree(params)))
        except _OF_TREES as error:
            first = first or f"{type(error).__name__}: {error}"
    raise TransformationError(names, old_names, first)


def _ways(names: Mapping[Path, Location], old_names: Mapping[Path, Location]) -> Iterator[_Names]:
    """Names of the result, then those of the source; as Linen has them, then as NNX does: with numbers, in a State."""
    for locations in (names, old_names):
        if locations:
            for container in (dict, _numbered, _as_state):
                yield _Names(locations, container)


def _numbered(tree: Any) -> Any:
    """With a number for each key that is written as one."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdecimal() else key: _numbered(below) for key, below in tree.items()}


def _as_state(tree: Any) -> Any:
    return nnx_core.State(_numbered(tree))
