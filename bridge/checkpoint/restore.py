"""A Linen training checkpoint into a model, and its optimizer state into an NNX Optimizer.

Law: everything is read and checked before the first value is written; a mismatch changes nothing. The optimizer
state crosses by the structure-driven rule (`opt_state`), under the same renaming as the weights.
Knows models, optimizers and plain trees; knows nothing of file formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp

import nnx_core as nnx
from bridge._errors import CheckpointLayoutError
from bridge.checkpoint import layout, opt_state
from bridge.checkpoint.layout import Kind, Path
from bridge.checkpoint.orbax import read_train_state
from bridge.checkpoint.train_state import LinenTrainState
from bridge.load import LoadReport, Rename, load_variables, renaming


@dataclass(frozen=True)
class RestoreReport:
    """What `load_train_state` did.

    Attributes:
      variables: what went into the model.
      opt_state: paths in the optimizer state that were written; empty without an optimizer.
      step: the step of the checkpoint, or None.
      not_loaded: fields of the checkpoint that have no place here, by name (`opt_state` without an optimizer,
        `ema_params`, ...).
    """

    variables: LoadReport
    opt_state: tuple[Path, ...] = ()
    step: int | None = None
    not_loaded: tuple[str, ...] = ()


def load_train_state(
    path: str | FilePath,
    model: nnx.Object,
    optimizer: nnx.Optimizer | None = None,
    *,
    rename: Rename | None = None,
    step: int | None = None,
    item: str | None = None,
) -> RestoreReport:
    """Read the Linen training state in the Orbax checkpoint at `path` into `model` and `optimizer`, in place.

    Args:
      path: a checkpoint folder, or the folder of a CheckpointManager (`step`, `item` choose in it).
      model: a ToNNX after `lazy_init`, or a native module.
      optimizer: an Optimizer made for `model` with the optax transformation that the checkpoint was trained with.
      rename: Linen names -> names in the model, as for `bridge.load_variables`.

    Raises:
      VariablesMismatchError: listing all that does not fit, in the model or in the optimizer state.
      CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError: as for `read_train_state`; the last
        also if there is an `optimizer` and no optimizer state.
      In every case nothing has been written to `model` or `optimizer`.

    Example::

        model = Net(rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
        bridge.checkpoint.load_train_state("run/ckpt", model, optimizer, rename={"Dense_0": "hidden"})
    """
    saved = read_train_state(path, step=step, item=item)
    nested = saved.layout is Kind.LINEN_NESTED_TRAIN_STATE
    prefix = ("params",) if nested else ()
    variables = {
        name: layout.unbox(tree, saved.boxed, (*prefix, name)) for name, tree in saved.variables.items() if tree
    }
    targets = {} if optimizer is None else _opt_targets(optimizer)
    news = {} if optimizer is None else _opt_values(saved, variables["params"], rename, prefix, path)
    if optimizer is not None:
        expected = {p: v.get_raw_value() for p, v in targets.items()}
        layout.require_match(
            layout.nest(expected), layout.nest(news), source=f"the checkpoint {path}", target="the optimizer state"
        )
    report = load_variables(model, variables, rename=rename)
    for at, variable in targets.items():
        if not layout.is_empty(news.get(at)):
            variable.set_raw_value(jnp.asarray(news[at], variable.get_raw_value().dtype))
    number = None if saved.step is None else int(saved.step)
    if optimizer is not None and number is not None:
        optimizer.step.set_value(jnp.asarray(number, optimizer.step.dtype))
    left = (*saved.extras, *(["opt_state"] if optimizer is None and saved.opt_state is not None else []))
    return RestoreReport(report, tuple(targets), number, left)


def _opt_targets(optimizer: nnx.Optimizer) -> dict[Path, nnx.Variable[Any]]:
    """Path below `opt_state`, keys as strings -> Variable."""
    state = nnx.state(optimizer, nnx.OptState)
    return {tuple(map(str, at[1:])): v for at, v in nnx.to_flat_state(state) if at[0] == "opt_state"}


def _opt_values(
    saved: LinenTrainState, params: Mapping[str, Any], rename: Rename | None, prefix: Path, path: object
) -> dict[Path, Any]:
    """Path below `opt_state` -> value, under the names of the model."""
    if saved.opt_state is None:
        raise CheckpointLayoutError(
            "the checkpoint has no optimizer state",
            path,
            expected="opt_state, because an optimizer was given",
            found="step and params only" if saved.step is not None else "params only",
            hint="Leave the optimizer out to load the weights alone.",
        )
    raw = layout.unbox(saved.opt_state, saved.boxed, ("opt_state",))
    shapes = opt_state.param_shapes(params)
    old = {(*prefix, *at): shape for at, shape in shapes.items()}
    new_name = renaming(rename)
    renamed = opt_state.rename_params(raw, old, lambda at: new_name(at[len(prefix) :]))
    new = {new_name(at): shape for at, shape in shapes.items()}
    return layout.flatten(opt_state.to_nnx_layout(renamed, new))
