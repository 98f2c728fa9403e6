"""All steps of a folder into a folder of steps with the same names, which a CheckpointManager restores.

Law: every step is planned before the first is written; each is converted, verified and given its name by itself, so
that what a kill leaves is whole steps and one that resumes; a step that is there is skipped only if it verifies.
Knows conversions and step folders; knows nothing of leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import CheckpointExistsError, CheckpointLayoutError
from bridge.checkpoint.conversion import Conversion, ConvertReport, LossyConversionError, require_apart
from bridge.checkpoint.formats.door import local_path
from bridge.checkpoint.formats.open import open_source, steps_at
from bridge.checkpoint.options import ConversionOptions, OptionError
from bridge.checkpoint.verification import verify

_ORBAX = ("orbax", "orbax-v1")


@dataclass(frozen=True)
class StepsReport:
    """What a conversion of all steps did.

    Attributes:
      source, target: the folders of steps.
      converted: step -> what was done, in this run.
      skipped: steps that an earlier run had converted; they were verified.
    """

    source: str
    target: str
    converted: Mapping[int, ConvertReport] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()


def convert_steps(source: str | FilePath, target_path: str | FilePath, **options: Any) -> StepsReport:
    """Convert each step of the folder `source` into a step of the same name in the folder `target_path`.

    The state of a step is the item that it was; where several were joined `default`, or `state` beside items that hold
    JSON, which are items again. A CheckpointManager on `target_path` restores each of them.

    Args:
      source: a CheckpointManager's folder, or one of flax.training.checkpoints.
      target_path: the folder of the new steps.
      options: the fields of `ConversionOptions`, `to` at least; for all steps. `resume` skips steps that are there,
        if they were made of the same source and verify.

    Raises:
      OptionError: `step`, or a target format that is no folder.
      CheckpointLayoutError: there are no steps at `source`.
      CheckpointExistsError: a step is at the target already, without `resume`, or made of another checkpoint.
      LossyConversionError: something of a step would be lost, as for `convert`; nothing was written.
      VerificationError: a step does not hold what was written to it. The steps before it are whole.
      The others as for `convert`.

    Example::

        convert_steps("run/linen", "run/nnx", to="nnx").converted.keys()  # dict_keys([100, 200, 300])
    """
    return run_steps(source, target_path, ConversionOptions(**options))


def run_steps(source: str | FilePath, target_path: str | FilePath, options: ConversionOptions) -> StepsReport:
    """As `convert_steps`, with the options as one value."""
    source, target = local_path(source), local_path(target_path)
    converted: dict[int, ConvertReport] = {}
    skipped: list[int] = []
    plans = planned_steps(source, options)
    losses = [f"step {step}: {loss}" for step, losses in plans.items() for loss in losses]
    if losses and not options.lossy:
        raise LossyConversionError(source, losses)
    require_apart(target, source)
    folders = {step: target / place.name for step, place in steps_at(source).items()}
    there = [step for step, folder in folders.items() if folder.exists()]
    if there and not options.resume:
        raise CheckpointExistsError(
            "steps are in the way",
            target,
            expected="none of the source's steps",
            found=", ".join(map(str, there)),
            hint="Go on with what an earlier run left: resume=True (--resume). Or choose another path.",
        )
    for step, folder in folders.items():
        with _open_step(step, source, options) as conversion:
            if step in there:
                _require_same(folder, conversion, options)
                skipped.append(step)
            else:
                converted[step] = conversion.run(folder)
    return StepsReport(str(source), str(target), converted, tuple(skipped))


def planned_steps(source: FilePath, options: ConversionOptions) -> dict[int, list[str]]:
    """What each step would lose, by its number, from metadata only. Errors of its arguments as for `convert_steps`."""
    if options.step is not None:
        raise OptionError("step", "none, where all steps are converted", options.step)
    if options.target_format not in _ORBAX:
        raise OptionError(
            "target_format", "'orbax' or 'orbax-v1', where all steps are converted", options.target_format
        )
    steps = steps_at(source)
    if not steps:
        raise CheckpointLayoutError(
            "there are no steps",
            source,
            expected="a folder of steps, as a CheckpointManager writes it",
            found="a single checkpoint, or none",
            hint="Convert a single one without all_steps (--all-steps).",
        )
    losses: dict[int, list[str]] = {}
    for step in steps:
        with _open_step(step, source, options) as conversion:
            losses[step] = conversion.losses
    return losses


def _open_step(step: int, source: FilePath, options: ConversionOptions) -> Conversion:
    """The conversion of one step: its state is the item that it was, or, joined of several, the one Orbax expects."""
    conversion = Conversion.open(source, replace(options, step=step))
    items, name = conversion.source.around.items, conversion.source.item
    if options.target_item is not None or options.target_format != "orbax" or not items:
        return conversion
    # A CheckpointManager that finds an item `default` takes no names of others, but for its own `metrics`.
    named = any(holds == "JSON" and item != "metrics" for item, holds in items.items())
    item = name or ("state" if named else "default")
    return replace(conversion, options=replace(conversion.options, target_item=item))


def _require_same(folder: FilePath, conversion: Conversion, options: ConversionOptions) -> None:
    """The step at `folder` is this conversion's result, whole."""
    verify(folder, max_memory=options.max_memory, progress=options.progress)
    with closing(open_source(folder)) as opened:
        made_of = opened.metadata.get("converted_from")
        leaves, planned = opened.tree.leaves, conversion.plan.target.leaves
        forms = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
        same = forms == {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in planned.items()}
    if made_of != str(conversion.source.path) or not same:
        raise CheckpointExistsError(
            "the step was made of another checkpoint, or otherwise",
            folder,
            expected=f"this conversion of {conversion.source.path}",
            found=f"one of {made_of}",
            hint="Choose another path, or move it away.",
        )
