"""Does an optimizer commute with a change of layout: is training with stacked layers what it was with single ones?

LAMB takes the norm of each tensor, Adafactor factors matrices, a mask of `ndim > 1` calls a stack of biases a matrix:
once layers are stacked, joined or taken apart their state does not fit, or fits and the next update is another one.
`probe` asks the optimizer itself, first for the form of its state, then for two steps on small random trees.

Law: no warning means that the state of a step in the old layout, converted, gives the same next update as before, up to
rounding, on small random params. An optimizer that works elementwise never gets a warning.
Knows expressions and optax's protocol; knows no optimizer by name, no files and no models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bridge._errors import show_path
from bridge._types import Location, Path, Shape
from bridge.checkpoint.plan.slots import SlotError, follow, is_new
from bridge.checkpoint.tree import layout, opt_state
from bridge.checkpoint.tree.canonical import Key, Role
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Add, Block, Cast, Fill, Join, Op, OpError, Pick, Read, Region, Reshape, Transpose
from bridge.checkpoint.tree.tree import read_of

# Updates in float64 that differ by more than this part of the largest one differ by more than rounding: states that an
# optimizer keeps in float32 whatever its params are move them by 1e-7, a weight decay of 1e-5 by more than this.
_ROUNDING = 1e-6
_PARAM_SCALE = 10.0  # large params make a decay visible beside the update
_MOST_ELEMENTS = 1 << 23


def stacks(ops: Iterable[Op]) -> bool:
    """Whether any leaf is put together, cut out, reshaped or moved by a constant: what optimizers may not commute with.

    >>> kernel = Read(("kernel",), (3, 4), "float32")
    >>> stacks([kernel, Transpose(kernel, (1, 0))]), stacks([kernel, Pick(kernel, 0, 1)])
    (False, True)
    """
    parts = itertools.chain.from_iterable(map(_walk, ops))
    return any(isinstance(part, Add | Join | Pick | Block | Reshape) for part in parts)


def warning_without_tx() -> str:
    """What to tell when params are stacked and have an optimizer state, and nobody gives the optimizer.

    >>> "tx=" in warning_without_tx()
    True
    """
    return (
        "params are stacked, joined, cut or shifted, and the optimizer state with them. Optimizers that treat each "
        "tensor as a whole (adafactor, lamb, lars, fromage, sm3, novograd, muon; masks that ask for ndim), or ask how "
        "large a shifted param is (weight decay), go on otherwise than before, and elementwise ones (sgd, adam, adamw, "
        "lion, ...) do not. Give tx=... to have yours tried."
    )


def probe(tx: Any, params: Mapping[Path, Shape], ops: Mapping[Path, Op]) -> list[str]:
    """Try whether an optimizer's state can follow its params into another layout, and trains on as before.

    Args:
        tx: an `optax.GradientTransformation`, able to start on both layouts (labels that are functions, not trees).
        params: path -> shape of what it was initialised with, as it sees them: without the collection.
        ops: new path -> how the param is made, from `Read`s of old paths.

    Returns:
        Warnings; none if it commutes. Nothing is raised for an optimizer that fails: that is a warning too.

    >>> layers = {(f"layers_{n}", "bias"): (4,) for n in range(3)}
    >>> stack = Join(tuple(Read(path, shape, "float32") for path, shape in layers.items()), axis=0, stack=True)
    >>> probe(optax.adam(1e-3), layers, {("layers", "bias"): stack})
    []
    >>> print(*probe(optax.lamb(1e-3), layers, {("layers", "bias"): stack}))  # doctest: +ELLIPSIS
    the next update of this optimizer is another one once ...
    """
    try:
        shapes = {("params", *path): tuple(shape) for path, shape in params.items()}
        reads = {location[1:]: Read(location, shape, "float32") for location, shape in shapes.items()}
        located: dict[Location, Op] = {}
        for path, op in ops.items():
            located["params", *path] = _rebuilt(op.on(reads.__getitem__), lambda size: size)
        misfits = _misfits(tx, shapes, located)
        if misfits:
            more = f" (and {len(misfits) - 3} more)" if len(misfits) > 3 else ""
            return [
                "this optimizer keeps another state once params are stacked, joined or cut: "
                f"{'; '.join(misfits[:3])}{more}. Start with a fresh optimizer state, or keep the layers as they are."
            ]
        return _try_steps(tx, *_small(shapes, located))
    except Exception as error:  # noqa: BLE001  an optimizer is anybody's code, and a probe must not end a conversion
        return [f"whether this optimizer commutes with stacking could not be tried: {type(error).__name__}: {error}"]


def _walk(op: Op) -> Iterator[Op]:
    """An expression and all that it is made of."""
    yield op
    for part in op._parts():
        yield from _walk(part)


def _tree(flat: Mapping[Location, Any]) -> Any:
    """The params as an optimizer sees them."""
    return layout.nest({location[1:]: leaf for location, leaf in flat.items()})


# --- the form of the state ----------------------------------------------------------------------------------


def _carry(
    state: Any, shapes: Mapping[Location, Shape], ops: Mapping[Location, Op]
) -> tuple[dict[Path, Op], set[Path]]:
    """A state under the new names, as a conversion carries it over: how each leaf is made, and masked params."""
    forms: dict[Path, Leaf] = {}
    for path, leaf in layout.flatten(state).items():
        if not layout.is_empty(leaf):
            forms[path] = _leaf(path, *layout.describe(leaf))
    leaves: dict[Key, Path] = {}
    masked: dict[Key, Path] = {}
    made: dict[Path, Op] = {}
    for path, place in opt_state.places(state, _without_collection(shapes)).items():
        if place.param is None:
            if path in forms:
                made[path] = read_of(forms[path])
            continue
        key = Key(Role.OPTIMIZER, place.prefix, ("params", *place.param), place.tail)
        if path in forms:
            leaves[key] = path
        else:
            masked[key] = path
    variable_forms = {location: _leaf(location, shape, "float32") for location, shape in shapes.items()}
    followed = follow(leaves, masked, forms, ops, variable_forms)
    for key, op in followed.made.items():
        made[_path(key)] = op
    return made, set(map(_path, followed.masked))


def _leaf(path: Path, shape: Shape, dtype: str) -> Leaf:
    return Leaf(path, shape, dtype, 0)


def _path(key: Key) -> Path:
    return (*key.prefix, *(key.location or ())[1:], *key.tail)


def _misfits(tx: Any, shapes: Mapping[Location, Shape], ops: Mapping[Location, Op]) -> list[str]:
    """Where the state that is carried over is none that the optimizer would make."""
    new_shapes = {location: op.shape for location, op in ops.items()}
    new_state = _abstract_state(tx, new_shapes)
    try:
        made, masked = _carry(_abstract_state(tx, shapes), shapes, ops)
    except SlotError as error:
        return [" ".join(str(error).splitlines()[0].split()).rstrip(":")]
    places = opt_state.places(new_state, _without_collection(new_shapes))
    fresh = {location[1:] for location, op in ops.items() if is_new(op)}
    wanted: dict[Path, Shape] = {}
    empty: set[Path] = set()
    for path, leaf in layout.flatten(new_state).items():
        if places[path].param in fresh:
            continue
        if not layout.is_empty(leaf):
            wanted[path] = layout.describe(leaf)[0]
        elif places[path].param is not None:
            empty.add(path)
    carried = {path: op.shape for path, op in made.items() if not is_new(op)}
    halves = (wanted.keys() & masked) | (carried.keys() & empty)
    unmade = (wanted.keys() | empty) - carried.keys() - masked
    homeless = (carried.keys() | masked) - wanted.keys() - empty
    rows = [f"{show_path(path)} is masked in one of the layouts" for path in halves]
    rows += [f"{show_path(path)} has nothing to be made of" for path in unmade]
    rows += [f"{show_path(path)} has no place" for path in homeless]
    for path, shape in wanted.items():
        if carried.get(path, shape) != shape:
            rows.append(f"{show_path(path)} becomes {carried[path]} and should be {shape}")
    return sorted(rows)


def _abstract_state(tx: Any, shapes: Mapping[Location, Shape]) -> Any:
    params = {location: jax.ShapeDtypeStruct(shape, jnp.float32) for location, shape in shapes.items()}
    return jax.eval_shape(tx.init, _tree(params))


def _without_collection(shapes: Mapping[Location, Shape]) -> dict[Path, Shape]:
    return {location[1:]: shape for location, shape in shapes.items()}


# --- the next update ----------------------------------------------------------------------------------------


def _try_steps(tx: Any, shapes: Mapping[Location, Shape], ops: Mapping[Location, Op]) -> list[str]:
    """One step in the old layout, then the next one in both."""
    elements = sum(map(math.prod, shapes.values()))
    if elements > _MOST_ELEMENTS:
        return [f"whether this optimizer commutes with stacking was not tried: {elements} numbers are needed for it"]
    with jax.enable_x64(True):
        off = _distances(tx, shapes, ops)
    worst = max(off, key=lambda location: off[location], default=None)
    if worst is None or off[worst] <= _ROUNDING:
        return []
    return [
        "the next update of this optimizer is another one once params are stacked, joined or cut: "
        f"{show_path(worst[1:])} differs by {off[worst]:.0e} of it in a trial on small random params. "
        "Its state fits; training goes on otherwise than before."
    ]


def _distances(tx: Any, shapes: Mapping[Location, Shape], ops: Mapping[Location, Op]) -> dict[Location, float]:
    """How far apart the second updates are, of each param that comes from old ones."""
    draw = np.random.default_rng(0)

    def random_tree() -> dict[Location, jax.Array]:
        return {location: jnp.asarray(draw.normal(size=shape)) for location, shape in shapes.items()}

    first_grads, second_grads = random_tree(), random_tree()
    params = {location: leaf * _PARAM_SCALE for location, leaf in random_tree().items()}
    updates, state = _step(tx, first_grads, tx.init(_tree(params)), params)
    params = {location: leaf + updates[location] for location, leaf in params.items()}
    new_params = _values(ops, params)
    carried = _values(_carry(state, shapes, ops)[0], layout.flatten(state))
    fresh_state = tx.init(_tree(new_params))
    new_state = layout.map_leaves(lambda path, leaf: carried.get(path, leaf), fresh_state)
    wanted = _values(ops, _step(tx, second_grads, state, params)[0])
    found, _ = _step(tx, _values(ops, second_grads), new_state, new_params)
    distances: dict[Location, float] = {}
    for location, op in ops.items():
        if not is_new(op):
            distances[location] = _distance(found[location], wanted[location], params=new_params[location])
    return distances


def _step(
    tx: Any, grads: Mapping[Location, Any], state: Any, params: Mapping[Location, Any]
) -> tuple[dict[Location, Any], Any]:
    """Updates, and the next state. Line searches ask for a function; it is the same one in every layout."""

    def value_fn(tree: Any) -> jax.Array:
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
        return sum(squares, jnp.float64(0)) / 2

    tree = _tree(params)
    extra = {"value": value_fn(tree), "grad": _tree(grads), "value_fn": value_fn}
    updates, state = optax.with_extra_args_support(tx).update(_tree(grads), state, tree, **extra)
    return {("params", *path): leaf for path, leaf in layout.flatten(updates).items()}, state


def _values(ops: Mapping[Path, Op], flat: Mapping[Path, Any]) -> dict[Path, Any]:
    def read(path: Path, region: Region | None) -> Any:
        return flat[path] if region is None else flat[path][region]

    return {path: op.value(read) for path, op in ops.items()}


def _distance(found: Any, wanted: Any, *, params: Any) -> float:
    """The largest difference, as a part of the largest update; differences within the rounding of params are none."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    rounding = 16 * np.finfo(np.float64).eps * float(np.max(np.abs(params), initial=0))
    difference = float(np.max(np.abs(found - wanted), initial=0))
    if math.isnan(difference):
        return 0.0 if np.array_equal(found, wanted, equal_nan=True) else math.inf
    if difference <= rounding:
        return 0.0
    return difference / max(float(np.max(np.abs(wanted), initial=0)), rounding)


# --- smaller params -----------------------------------------------------------------------------------------


def _small(
    shapes: Mapping[Location, Shape], ops: Mapping[Location, Op]
) -> tuple[Mapping[Location, Shape], Mapping[Location, Op]]:
    """The same tree with sizes of 3 at most, where nothing is counted along them; as it is where that cannot be."""
    counted: set[int] = set()
    cuts: dict[int, set[int]] = {}
    for part in itertools.chain.from_iterable(map(_walk, ops.values())):
        match part:
            case Pick():
                counted.add(part.of.shape[part.axis])
            case Reshape():
                counted.update(part.of.shape, part.shape)
            case Block():
                cuts.setdefault(part.of.shape[part.axis], set()).update((part.start, part.stop))

    def size(n: int) -> int:
        if not n or n in counted:
            return n
        unit = math.gcd(n, *cuts[n]) if n in cuts else n
        return n // unit * min(unit, 3)

    try:
        small_ops = {location: _rebuilt(op, size) for location, op in ops.items()}
    except OpError:
        return shapes, ops
    small_shapes = {location: tuple(map(size, shape)) for location, shape in shapes.items()}
    return small_shapes, small_ops


def _rebuilt(op: Op, size: Callable[[int], int]) -> Op:
    """The same expression over locations of other sizes. Casts go: rounding is not what is looked for."""
    match op:
        case Read():
            return Read(op.path, tuple(map(size, op.shape)), "float32")
        case Fill():
            return Fill(np.broadcast_to(np.float32(0.5), tuple(map(size, op.shape))))
        case Cast():
            return _rebuilt(op.of, size)
        case Add():
            return Add(_rebuilt(op.of, size), op.amount)
        case Join():
            return Join(tuple(_rebuilt(part, size) for part in op.parts), op.axis, op.stack)
        case Transpose():
            return Transpose(_rebuilt(op.of, size), op.axes)
        case Reshape():
            return Reshape(_rebuilt(op.of, size), op.shape)
        case Pick():
            return Pick(_rebuilt(op.of, size), op.axis, op.index)
        case Block():
            of, old = _rebuilt(op.of, size), op.of.shape[op.axis]
            start, stop = (cut * of.shape[op.axis] // old for cut in (op.start, op.stop))
            return Block(of, op.axis, start, stop)
    raise TypeError(f"{type(op).__name__}: no such operation")
