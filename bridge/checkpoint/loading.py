"""A checkpoint straight into a model and its optimizer, each shard onto its own device.

Law: all of it fits before the first array is read, and every value is there before the first Variable is written. A
process reads what its own devices hold, once, and nothing else; it holds two leaves on the host, not a model.
Knows plans, shardings and Variables; knows nothing of file formats or layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from bridge._errors import BridgeError, CheckpointLayoutError, VariablesMismatchError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.conversion import Conversion
from bridge.checkpoint.formats.protocol import Items
from bridge.checkpoint.options import ConversionOptions, LeafRules, OptionError
from bridge.checkpoint.plan.plan import ConversionReport
from bridge.checkpoint.plan.target import is_own
from bridge.checkpoint.stream import by_source
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.canonical import VALUE
from bridge.checkpoint.tree.from_objects import Live, notes_on_extras, of_training, raw_value, write
from bridge.checkpoint.tree.layout import Kind
from bridge.checkpoint.tree.ops import Op, Reader, Region

#: (start, stop) for each axis.
_Bounds = tuple[tuple[int, int], ...]
_NUMBERS = (bool, int, float, complex)


class ShardingError(BridgeError, ValueError):
    """A Variable's sharding does not fit its shape, or has a mesh without devices. `path` is in the model."""

    def __init__(self, path: Path, sharding: Sharding, expected: str, found: object, hint: str):
        self.path, self.sharding = path, sharding
        super().__init__(
            f"{show_path(path)} cannot be sharded as it is to be: {sharding}\n"
            f"  expected: {expected}\n  found: {found}\n{hint} Nothing was changed."
        )


def load_into(
    model: Any,
    path: str | FilePath,
    rules: LeafRules | None = None,
    *,
    optimizer: Any = None,
    extras: Mapping[str, Any] | None = None,
    step: int | None = None,
    item: Items | None = None,
    at: str | Path | None = None,
    format: str | None = None,
    kind: Kind | None = None,
    rng: str | int = "keep",
    unproven: bool = False,
) -> ConversionReport:
    """Read the checkpoint at `path`, in Linen's layout or NNX's, into a model and its optimizer, in place.

    Each value goes to the sharding that its Variable has, by `jax.make_array_from_callback`: no device and no host
    ever holds a whole model that is spread over several. In a `jax.distributed` job every process calls this with the
    same arguments, and reads its own shards. Variables keep identity, ties and metadata.

    Memory: the new shards and, until all of them are there, those that they replace; on the host two leaves. An
    abstract model holds nothing that is replaced.

    Args:
      model: an NNX module, of nnx_core or flax.nnx; a ToNNX after `lazy_init`. Abstract (`nnx.eval_shape`, with
        shardings `nnx.as_abstract`, or merged from `nnx.get_abstract_model`) or with values. A value without a sharding
        goes to the default device.
      path: whatever `open_source` opens.
      rules: the checkpoint's locations -> those of the model; see `make_plan`. Slots of the optimizer follow.
      optimizer: an Optimizer made for `model`, abstract or not. Without it the optimizer's state and the step of the
        checkpoint are left out, and the report says so.
      extras: more fields of the checkpoint -> models or States to write them into, by the rules of the params:
        `{"ema_params": ema_model}`. What of such a model no param is (statistics, random streams) keeps its value. A
        field like this that the checkpoint has and nobody asks for is left out with a warning in the report.
      step, item, format: as for `open_source`.
      at: where in the checkpoint the training state is, as for `convert`; what is outside of it is dropped, and the
        report says so.
      kind: the checkpoint's layout, instead of the detected one.
      rng: random streams: 'keep', those of the checkpoint if it has them, and else the model's own; 'drop', the model's
        own; or a seed for fresh ones, which an abstract model needs for what the checkpoint lacks.
      unproven: take derived rules that are not proven; the report says so.

    Returns:
      What went where, and what the model has no place for.

    Raises:
      VariablesMismatchError: all that is missing, unexpected, or of another shape or dtype.
      CheckpointLayoutError: an abstract model would keep a placeholder, as the checkpoint has no value for it.
      UnprovenRulesError: the rules were derived and are not proven, without `unproven`.
      OptionError: an extra is called `model` or `optimizer`.
      ShardingError: a sharding does not divide its Variable, or its mesh has no devices.
      RulesError, SlotError, OptStateOrderError, CollectionClashError: as for `make_plan`.
      CheckpointNotFoundError, CheckpointCorruptError, MissingDependencyError: as for `open_source`; a damaged array is
        found when it is read.
      TraceError: the model belongs to another trace.
      In every case nothing has been written to `model` or `optimizer` of this process.

    >>> import tempfile, numpy as np, safetensors.numpy
    >>> import nnx_core as nnx
    >>> file = tempfile.mkdtemp() + "/linen.safetensors"
    >>> dense = {"params/Dense_0/kernel": np.ones((2, 3), "float32"), "params/Dense_0/bias": np.zeros(3, "float32")}
    >>> safetensors.numpy.save_file(dense, file)
    >>> from bridge.checkpoint.rules.apply import Rules
    >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    >>> report = load_into(model, file, Rules.from_rename({"Dense_0": "layers/0"}))
    >>> len(report.rows), float(model.layers[0].kernel.sum())
    (2, 6.0)
    """
    if extras and extras.keys() & {"model", "optimizer"}:
        raise OptionError("extras", "fields beside model and optimizer, such as ema_params", sorted(extras))
    wanted = of_training(model, optimizer, extras)
    options = ConversionOptions(
        to="nnx",
        rules=rules,
        target=wanted,
        source_format=format,
        step=step,
        item=item,
        at=at,
        outside="drop",
        kind=kind,
        rng=rng,
        unproven=unproven,
    )
    with _explained(wanted), Conversion.open(path, options) as conversion:
        plan = conversion.plan
        made = {path: op for path, op in plan.made.items() if not is_own(op, wanted.values[path])}
        _require_values(wanted, made, conversion.source.path)
        _require_writable(wanted)
        shardings = {path: _sharding(path, wanted.values[path], op) for path, op in made.items()}
        values = _gathered(made, shardings, conversion.source.read)
        conversion.source.require_unchanged()
    for path, variable in wanted.variables.items():
        _replace(variable, (*path, VALUE), wanted, values)
    report = plan.report()
    report.notes.extend(notes_on_extras(extras or {}))
    return report


# ---- checks, before an array is read --------------------------------------------------------------------------


@contextmanager
def _explained(wanted: Live) -> Iterator[None]:
    """Says of a mismatch that it comes of an optimizer for which the checkpoint has nothing."""
    try:
        yield
    except VariablesMismatchError as error:
        slots = [path for path in wanted.values if path[:2] == ("optimizer", "opt_state")]
        missing = [path for path in error.missing if path[0] == "opt_state"]
        unexpected = [path for path in error.unexpected if path[0] == "opt_state"]
        if slots and len(missing) == len(slots) and not unexpected:
            error.add_note("The checkpoint has no optimizer state: leave the optimizer out to load the weights alone.")
        raise


def _require_values(wanted: Live, made: Mapping[Path, Op], source: object) -> None:
    """Sown values and the like are not in checkpoints: an abstract model that has some would keep a placeholder."""
    for at, value in wanted.values.items():
        if at not in made and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(value)):
            raise CheckpointLayoutError(
                "the checkpoint has no value for a Variable of an abstract model",
                source,
                expected=f"a value for {show_path(at)}",
                found=str(value),
                hint="Give a model that has values, or pop this Variable from it before.",
            )


def _require_writable(wanted: Live) -> None:
    for variable in wanted.variables.values():
        write(variable, raw_value(variable))  # raises if it belongs to another trace


def _sharding(at: Path, own: Any, op: Op) -> Sharding | None:
    """Where the value at `at` goes; None for the default device."""
    sharding = getattr(own, "sharding", None)
    if sharding is None or (isinstance(own, jax.Array) and not own.committed):
        return None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = _on_devices(at, sharding)
    try:
        sharding.shard_shape(op.shape)
    except ValueError as error:
        raise ShardingError(
            at,
            sharding,
            expected=f"shards of one size, of shape {op.shape}",
            found=" ".join(str(error).split()),
            hint="Change its axis names, the logical rules or the mesh.",
        ) from error
    return sharding


def _on_devices(at: Path, sharding: NamedSharding) -> NamedSharding:
    """What was traced under `jax.set_mesh` knows the axes only; the devices are those of the mesh that is set."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        raise ShardingError(
            at,
            sharding,
            expected="a mesh of devices",
            found="the mesh's axes, without devices",
            hint="Call load_into under `with jax.set_mesh(mesh):`, with the mesh that the model was made under.",
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


# ---- values ---------------------------------------------------------------------------------------------------


def _gathered(made: Mapping[Path, Op], shardings: Mapping[Path, Sharding | None], read: Reader) -> dict[Path, Any]:
    """Every value, on its devices. A leaf is read while the one before it is on its way."""
    values: dict[Path, Any] = {}
    last = None
    for at, op in by_source(made).items():
        value = _read_onto(shardings[at], op, read)
        jax.block_until_ready(last)
        values[at] = last = value
    jax.block_until_ready(last)
    return values


def _read_onto(sharding: Sharding | None, op: Op, read: Reader) -> jax.Array:
    if sharding is None:
        return jnp.asarray(_in_memory(op.value(read)))
    return jax.make_array_from_callback(op.shape, sharding, _shard_reader(op, sharding, read))


def _shard_reader(op: Op, sharding: Sharding, read: Reader) -> Callable[[Any], Any]:
    """Gives each shard of this process. Shards that fill a block are cut out of that; it is read once."""
    indices = sharding.addressable_devices_indices_map(op.shape)
    regions = {_bounds(index, op.shape) for index in indices.values()}
    block = tuple(map(_hull, zip(*regions, strict=True)))
    if sum(map(_size, regions)) != _size(block):
        parts = {region: _in_memory(op.value(read, _slices(region))) for region in regions}
        return lambda index: parts[_bounds(index, op.shape)]
    is_all = block == _bounds((), op.shape)
    value = _in_memory(op.value(read, None if is_all else _slices(block)))

    def shard(index: Any) -> Any:
        inside = zip(_bounds(index, op.shape), block, strict=True)
        return value[tuple(slice(start - first, stop - first) for (start, stop), (first, _) in inside)]

    return shard


def _bounds(index: Any, shape: Shape) -> _Bounds:
    """The bounds on every axis; an index of JAX may be None, or say nothing of the last axes."""
    slices = () if index is None else index
    every = (*slices, *[slice(None)] * (len(shape) - len(slices)))
    return tuple(axis.indices(size)[:2] for axis, size in zip(every, shape, strict=True))


def _hull(bounds: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The smallest bounds on one axis that hold all of these."""
    starts, stops = zip(*bounds, strict=True)
    return min(starts), max(stops)


def _slices(bounds: _Bounds) -> Region:
    return tuple(slice(start, stop) for start, stop in bounds)


def _size(bounds: _Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def _in_memory(value: Any) -> Any:
    """An array that no file can change: JAX may use aligned memory as it is, and a view of a file is read-only."""
    if isinstance(value, jax.Array):
        return value
    array = np.asarray(value)
    return array if array.flags.writeable else array.copy()


def _replace(variable: Any, at: Path, wanted: Live, values: Mapping[Path, Any]) -> None:
    """Write what was read for a Variable; it may be some of the leaves of a tree."""

    def new(path: Path, own: Any) -> Any:
        value = values.get((*at, *path), own)
        return value.item() if isinstance(own, _NUMBERS) and hasattr(value, "item") else value

    if at in values:
        write(variable, new((), wanted.values[at]))
        return
    tree = raw_value(variable)
    if at not in wanted.values and any((*at, *path) in values for path in layout.flatten(tree)):
        write(variable, layout.map_leaves(new, tree))
