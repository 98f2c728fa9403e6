"""What a conversion has to arrive at, when the user has it: a model, an optimizer, a TrainState, concrete or abstract.

Law: whatever does not fit is one error that lists all of it, before anything is read. Random streams and what a rule
takes from the target are the only leaves that do not come from the source.
Knows keys, shapes and dtypes; knows nothing of files, and of values only to pass them on.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bridge._errors import CheckpointLayoutError, VariablesMismatchError
from bridge._types import Location, Path, Shape
from bridge.checkpoint.tree.canonical import UNKNOWN, VALUE, Key, Parts, Role
from bridge.checkpoint.tree.from_objects import Live
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Fill, Op
from bridge.variables.kinds import variable_type

#: Collections that a target has and a checkpoint need not.
_PASSING = frozenset({"intermediates"})
_IMPLEMENTATIONS = {"fry": "threefry2x32"}


@dataclass(frozen=True)
class Target:
    """A target: the object as a tree, and what each leaf of it is."""

    live: Live
    parts: Parts

    @property
    def trains(self) -> bool:
        """Whether it has a place for an optimizer's state."""
        return any(key.role in (Role.OPTIMIZER, Role.STEP) for key in self.parts.leaves)

    def leaf(self, key: Key) -> Leaf:
        """Shape and dtype of what the target has there."""
        return self.live.tree.leaves[self.parts.leaves[key]]

    def is_number(self, key: Key) -> bool:
        """Whether the target has a Python number there, which has no dtype of its own."""
        return isinstance(self.live.values[self.parts.leaves[key]], bool | int | float | complex)


@dataclass
class Fitted:
    """How each leaf of the target is made, and which made leaves it has no place for."""

    made: dict[Key, Op]
    without_place: list[Key]
    filled: list[Key]


def aim(target: Target, variables: Mapping[Location, Op]) -> dict[Location, Op]:
    """`variables` under the locations that the target has for them, where names leave one choice.

    The target may keep a variable in a collection of a narrower type, may know a collection that the source does not,
    and may have a variable called `value` that looked like a box.
    """
    by_path: dict[Path, list[Location]] = {}
    exact: set[Location] = set()
    for key in target.parts.leaves:
        if key.role is Role.MODEL and key.location:
            exact.add(key.location)
            by_path.setdefault(key.location[1:], []).append(key.location)
    return {_aim_one(location, exact, by_path): op for location, op in variables.items()}


def _aim_one(location: Location, exact: Collection[Location], by_path: Mapping[Path, list[Location]]) -> Location:
    if location in exact:
        return location
    collection, *keys = location
    # Where a variable is called `value`, the layout has taken it for the level that each Variable has.
    for path in (tuple(keys), (*keys, VALUE)):
        fits = [place for place in by_path.get(path, ()) if _is_narrower(place[0], collection)]
        if len(fits) == 1:
            return fits[0]
    return location


def _is_narrower(target: str, collection: str) -> bool:
    if target == collection or UNKNOWN in (target, collection):
        return True
    return issubclass(variable_type(target), variable_type(collection))


def fit(target: Target, made: Mapping[Key, Op], new: Collection[Location], seed: int | None) -> Fitted:
    """How every leaf of the target is made.

    Args:
      made: what the source gives.
      new: variables that come from the target, by the rules, and their slots with them.
      seed: for random streams; without one those that the source lacks are the target's own.

    Raises:
      VariablesMismatchError: lists every leaf that is missing, unexpected, or of another shape or dtype.
      CheckpointLayoutError: a value has to come from the target, which is abstract.
    """
    missing: list[Path] = []
    shapes: list[tuple[Path, Shape, Shape]] = []
    dtypes: list[tuple[Path, str, str]] = []
    filled: list[Key] = []
    result: dict[Key, Op] = {}
    for key in target.parts.leaves:
        leaf = target.leaf(key)
        if key in made:
            op = made[key]
            result[key] = op
            if op.shape != leaf.shape:
                shapes.append((show(key), leaf.shape, op.shape))
            elif op.dtype != leaf.dtype and not _takes(target, key, op):
                dtypes.append((show(key), leaf.dtype, op.dtype))
        elif key.role is Role.STREAM or key.location in new or _is_loose_field(target, key):
            result[key] = _from_target(target, key, seed)
            filled.append(key)
        elif not (key.location and key.location[0] in _PASSING):
            missing.append(show(key))
    loose = [key for key in made if key not in target.parts.leaves]
    without_place = [key for key in loose if _may_go(target, key)]
    unexpected = [show(key) for key in loose if not _may_go(target, key)]
    if missing or unexpected or shapes or dtypes:
        raise VariablesMismatchError(
            missing, unexpected, shapes, dtypes, source="the converted checkpoint", target="the target"
        )
    return Fitted(result, without_place, filled)


def _is_loose_field(target: Target, key: Key) -> bool:
    """A field that follows no param, such as a dropout key: the target's own is as good as any."""
    has_value = not isinstance(target.live.values[target.parts.leaves[key]], jax.ShapeDtypeStruct)
    return key.role is Role.EXTRA and key.location is None and has_value


def _may_go(target: Target, key: Key) -> bool:
    return key.role in (Role.STREAM, Role.EXTRA) or (key.role is not Role.MODEL and not target.trains)


def show(key: Key) -> Path:
    """A path for a message, the same in either layout.

    >>> show(Key(Role.OPTIMIZER, ("0", "mu"), ("params", "Dense_0", "kernel")))
    ('opt_state', '0', 'mu', 'Dense_0', 'kernel')
    """
    match key.role:
        case Role.MODEL:
            return (*(key.location or ()), *key.tail)
        case Role.STEP:
            return ("step",)
        case Role.OPTIMIZER:
            return ("opt_state", *key.prefix, *(key.location or ())[1:], *key.tail)
        case _:
            return (*key.prefix, *(key.location or ())[1:], *key.tail)


def _takes(target: Target, key: Key, op: Op) -> bool:
    """A Python number takes any scalar of its kind."""
    value = target.live.values[target.parts.leaves[key]]
    kinds = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating, complex: jnp.complexfloating}
    kind = kinds.get(type(value))
    return kind is not None and op.dtype != "object" and jnp.issubdtype(jnp.dtype(op.dtype), kind)


def _from_target(target: Target, key: Key, seed: int | None) -> Op:
    leaf = target.leaf(key)
    if key.role is Role.STREAM and seed is not None:
        return fresh_stream(key, leaf, seed)
    value = target.live.values[leaf.path]
    if isinstance(value, jax.ShapeDtypeStruct):
        raise CheckpointLayoutError(
            "a value has to come from the target",
            "/".join(show(key)),
            expected="a target with values, or a seed for random streams",
            found="an abstract target",
            hint="Give a model that is initialised, or rng=SEED (--rng seed=N).",
        )
    return Fill(value if hasattr(value, "dtype") else jnp.asarray(value))


def is_own(op: Op, value: Any) -> bool:
    """Whether a plan takes the value that is in the target, its own random streams, say: itself, no equal one."""
    return isinstance(op, Fill) and op.content is value


def fresh_stream(key: Key, leaf: Leaf, seed: int) -> Fill:
    """A new random stream: a counter at zero, or a key of its own for each stream of each seed."""
    if key.prefix[-1] == "count":
        return Fill(jnp.zeros(leaf.shape, leaf.dtype))
    typed = leaf.dtype.startswith("key<")
    name = leaf.dtype[4:-1] if typed else "fry"
    base = jax.random.key(seed, impl=_IMPLEMENTATIONS.get(name, name))
    own = jax.random.fold_in(base, zlib.crc32("\0".join(key.prefix[:-1]).encode(errors="surrogatepass")))
    shape = leaf.shape if typed else leaf.shape[:-1]
    keys = jax.random.split(own, shape) if shape else own
    return Fill(keys if typed else jax.random.key_data(keys).astype(leaf.dtype))
