"""A model and its optimizer as the checkpoint that their Linen code would have saved.

Law: the tree on disk is that of a real TrainState, entries without content and boxes included: code that restores one
reads it unchanged, with every bit of the values. Nothing of the model is changed, nothing half-written looks finished.
Knows models, rules and Orbax's saver; knows nothing of how a leaf is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
from flax import serialization
from flax.training.train_state import TrainState

from bridge._errors import CheckpointExistsError, CheckpointLayoutError, CheckpointWriteError, MissingDependencyError
from bridge.checkpoint.derivation.derive import Derived
from bridge.checkpoint.formats.door import local_path
from bridge.checkpoint.formats.open import SINK_FORMATS, open_sink
from bridge.checkpoint.formats.orbax.files import ERRORS, first_words
from bridge.checkpoint.in_memory import nnx_to_train_state, state_to_variables
from bridge.checkpoint.options import LeafRules
from bridge.checkpoint.plan.plan import ConversionReport
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.tree.from_objects import notes_on_extras, of_object, params_of


def save_as_linen(
    model: Any,
    optimizer: Any,
    path: str | FilePath,
    *,
    rules: Rules | Derived | None = None,
    back: LeafRules | None = None,
    tx: Any = None,
    like: Any = None,
    extras: Mapping[str, Any] | None = None,
    format: str = "orbax",
    unproven: bool = False,
) -> ConversionReport:
    """Write what Linen code reads: `{"step": ..., "params": ..., "opt_state": ..., "batch_stats": ..., ...}` at `path`.

    For a team on its way to NNX: the new run keeps the layout that the old code restores, with
    `StandardCheckpointer().restore(path, target=train_state)` for Orbax or `flax.serialization.from_bytes` for msgpack.
    Arrays are not copied, but for those that rules rework (a fused gate, a stack of layers).

    Args:
      model: an NNX module, of nnx_core or flax.nnx, or a ToNNX, whose paths are Linen's.
      optimizer: its Optimizer; None writes the variables alone.
      path: where nothing is yet. In a `jax.distributed` job every process calls this with the same arguments, and
        Orbax has each write its own shards.
      rules: those that lead from Linen to this model, as `load_into` takes them (`read_rules(file)`, `derive(...)`, a
        `Rules`): they are inverted here, so that one file serves both ways.
      back: rules from the model to Linen, where `rules` have no inverse (a cast, a leaf that is dropped).
      tx: the optax transformation of the Linen code, for the exact structure of its state; the optimizer's own by
        default, which will do unless it goes by the names of the params.
      like: the TrainState that the Linen code restores into, concrete or abstract (`jax.eval_shape`): checked before
        anything is written, and tells what NNX does not: params that are all variables, and boxes. Without it just the
        Variables with axis names are in boxes, as `nn.with_partitioning` has them.
      extras: more fields. Of models and States (`{"ema_params": ema_model}`) the params are laid out as the model's,
        others (a dropout key) are written as they are.
      format: 'orbax', written by Orbax's own saver; or another of 'orbax-v1', 'msgpack', 'safetensors', by one process.
      unproven: take derived rules that are not proven; the report says so.

    Returns:
      What went where. Random streams of the model have no place in a TrainState and stand in `dropped`.

    Raises:
      VariablesMismatchError: the optimizer's state is not that of `tx`, or something does not fit `like`.
      RulesError: the rules do not fit, or have no inverse.
      UnprovenRulesError: the rules were derived and are not proven, without `unproven`.
      CheckpointExistsError: something is at `path`.
      CheckpointLayoutError: no such format; or variables alone, with `like` or extras.
      CheckpointWriteError: disk full, no permission, several processes and another format than 'orbax', ...
      MissingDependencyError: the package for that format is not installed.

    >>> import tempfile, optax
    >>> import nnx_core as nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> path = tempfile.mkdtemp() + "/7"
    >>> report = save_as_linen(model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param), path)
    >>> from bridge.checkpoint import read_train_state
    >>> saved = read_train_state(path)
    >>> int(saved.step), saved.params["kernel"].shape, saved.opt_state[1]
    (0, (2, 3), None)
    """
    path = local_path(path)
    _require_place(path, format)
    direction = back if back is not None or rules is None else rules.inverse()
    if optimizer is None:
        _require_plain(path, like, extras)
        tree, report = state_to_variables(model, rules=direction, unproven=unproven)
    else:
        tree, report = _train_state(model, optimizer, direction, tx, like, dict(extras or {}), unproven)
    if format == "orbax":
        _save_with_orbax(path, tree)
    else:
        _save_with_sink(path, tree, format)
    return report


def _train_state(
    model: Any, optimizer: Any, rules: LeafRules | None, tx: Any, like: Any, extras: dict[str, Any], unproven: bool
) -> tuple[Any, ConversionReport]:
    followers = {name: params_of(field)[0] for name, field in extras.items() if of_object(field).variables}
    others = {name: field for name, field in extras.items() if name not in followers}
    notes = notes_on_extras({name: extras[name] for name in followers})
    tx = tx if tx is not None else optimizer.tx
    if like is not None:
        like = like.replace(**others)
        state, report = nnx_to_train_state(
            model, optimizer, tx=tx, like=like, rules=rules, unproven=unproven, **followers
        )
    else:
        collections = state_to_variables(model, rules=rules, unproven=unproven)[0].keys() - {"params"}
        cls = _class_with([*collections, *followers], list(others))
        state, report = nnx_to_train_state(
            model, optimizer, tx=tx, cls=cls, rules=rules, unproven=unproven, **followers
        )
    report.notes.extend(notes)
    return state.replace(**others), report


def _class_with(fields: list[str], optional: list[str]) -> type[TrainState]:
    """A TrainState with more fields, as the Linen code has one: on disk only their names count."""
    annotations = dict.fromkeys([*sorted(fields), *optional], Any)
    return type("TrainState", (TrainState,), {"__annotations__": annotations, **dict.fromkeys(optional)})


def _require_place(path: FilePath, format: str) -> None:
    if format not in SINK_FORMATS:
        raise CheckpointLayoutError(
            "no such format is written", path, expected=", ".join(SINK_FORMATS), found=repr(format)
        )
    if path.exists():
        raise CheckpointExistsError(
            "something is at the path of the checkpoint", path, expected="nothing", found="a file or a folder"
        )
    if format != "orbax" and jax.process_count() > 1:
        raise CheckpointWriteError(
            f"several processes cannot write one {format} checkpoint",
            path,
            expected="format='orbax', or one process",
            found=f"{jax.process_count()} processes",
        )


def _require_plain(path: FilePath, like: Any, extras: Any) -> None:
    if like is not None or extras:
        raise CheckpointLayoutError(
            "variables alone have no other fields",
            path,
            expected="an optimizer, beside like or extras",
            found="optimizer=None",
        )


def _save_with_orbax(path: FilePath, tree: Any) -> None:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        if error.name != "orbax":
            raise
        raise MissingDependencyError("Writing an Orbax checkpoint", "orbax-checkpoint", "orbax") from error
    # Not StandardCheckpointer, which saves in the background: where it cannot write, its threads wait for minutes.
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as saver:
            saver.save(path, args=ocp.args.StandardSave(tree))
    except ERRORS as error:
        raise CheckpointWriteError(
            "the checkpoint could not be written",
            path,
            expected="room, permission and arrays that Orbax can save",
            found=first_words(error),
        ) from error


def _save_with_sink(path: FilePath, tree: Any, format: str) -> None:
    live = of_object(serialization.to_state_dict(tree) if format == "msgpack" else tree)
    with open_sink(path, format, live.tree) as sink:
        for at in live.tree.order:
            sink.write({at: live.values[at]})
        sink.finish({})
