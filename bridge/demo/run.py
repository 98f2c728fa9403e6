"""`linen-nnx demo`: train, save, cross, compare, train on.

Law: the exit code is 0 only if every figure holds, and 1 if one is off: each such figure is named. A demo
that cannot run raises a BridgeError, which the command line turns into text and an exit code.
Knows the order of the stages; each stage is elsewhere.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge._errors import MissingDependencyError

if TYPE_CHECKING:
    from rich.console import Console

    from bridge.demo.linen_model import TrainState
    from bridge.demo.task import Digits
    from bridge.demo.verdict import Comparison

EPOCHS = 12
BATCH_SIZE = 64
STEPS_AFTER = 20
_EXTRAS = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "rich": "rich",
}


def main(out: Path, seed: int = 0, quiet: bool = False, *, epochs: int = EPOCHS) -> int:
    """Run the demo and write checkpoint, figure and record into `out`; returns the exit code.

    `quiet` prints the verdict alone. Fewer `epochs` than the default may stay below the accuracy demanded.
    """
    _need_extras()
    return _run(out, seed, quiet, epochs)


def _need_extras() -> None:
    """Raise MissingDependencyError for the first package of the extra `demo` that is not there."""
    for module, package in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError("the demo", package, "demo")


def _run(out: Path, seed: int, quiet: bool, epochs: int) -> int:
    """All stages, on the CPU: GPUs tune kernels per compilation, so equal bits cannot be demanded there."""
    import jax
    from rich.console import Console

    from bridge.demo import cross, outdir, report, task, verdict

    console, loud = Console(), Console(quiet=quiet)
    outdir.prepare(out)
    start = time.perf_counter()
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        losses, comparison = _compute(loud, task.load(), out, seed, epochs)
    all_checks = verdict.checks(comparison)
    report.draw(out / outdir.FIGURE, losses, comparison)
    comparison.reports[cross.NATIVE].save_html(out / outdir.PAGE)
    off = [str(check) for check in all_checks if not check.holds]
    figures = {check.name: check.found for check in all_checks}
    outdir.record(out, {"seed": seed, "epochs": epochs, "figures": figures, "off": off})
    report.show(loud, comparison)
    loud.print(
        f"Written to {out}: {outdir.CHECKPOINT}/, {outdir.FIGURE}, {outdir.PAGE}, {outdir.RECORD}",
        markup=False,
        highlight=False,
    )
    loud.print(f"{time.perf_counter() - start:.0f} s in all.", highlight=False)
    report.show_verdict(console, all_checks)
    return 1 if off else 0


def _compute(console: Console, digits: Digits, out: Path, seed: int, epochs: int) -> tuple[list[float], Comparison]:
    """Train in Linen, save, read back every way, train on; returns the training losses and all figures."""
    from bridge.demo import cross, linen_model, outdir, task
    from bridge.demo.verdict import Comparison

    directory = out / outdir.CHECKPOINT
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    tx = linen_model.adamw(steps)
    trained, losses = _train(console, linen_model.fresh_state(tx, seed=seed), digits, steps, seed)
    linen_model.save(trained, directory)
    outdir.record(out, {"seed": seed, "epochs": epochs})

    def in_memory(dropout_rate: float) -> tuple[linen_model.Cnn, dict[str, Any]]:
        return linen_model.Cnn(dropout_rate), {"params": trained.params, "batch_stats": trained.batch_stats}

    with console.status("reading the checkpoint three ways"):
        linen = cross.measure_linen("Linen", in_memory, digits)
        others = (
            cross.measure_nnx(cross.TO_NNX, lambda rate: cross.wrapped(directory, rate), digits),
            cross.measure_nnx(cross.NATIVE, lambda rate: cross.native(directory, rate), digits, cross.RENAME),
            cross.measure_linen(
                cross.TO_LINEN, lambda rate: cross.native_in_linen(directory, rate), digits, cross.RENAME
            ),
        )
    with console.status("comparing them layer by layer"):
        ways = {
            cross.TO_NNX: (cross.wrapped(directory, 0.0), None),
            cross.NATIVE: (cross.native(directory, 0.0), cross.RULES),
            cross.TO_LINEN: (cross.native_in_linen(directory, 0.0), None),
        }
        reports = cross.compare_layers(in_memory(0.0), ways, digits.test_images[:BATCH_SIZE])
    with console.status(f"training on for {STEPS_AFTER} steps, in Linen and in NNX"):
        more = list(task.batches(digits, size=BATCH_SIZE, steps=STEPS_AFTER, seed=seed + 1))
        restored = linen_model.restore(directory, trained)
        linen_continued = cross.continue_linen(restored, more)
        native_continued = cross.continue_native(directory, tx, more)
    return losses, Comparison(digits.test_labels, linen, others, linen_continued, native_continued, reports)


def _train(
    console: Console, state: TrainState, digits: Digits, steps: int, seed: int
) -> tuple[TrainState, list[float]]:
    """Train in Linen with a progress bar, which only a terminal sees; returns the state and the losses."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bridge.demo import linen_model, task

    text, loss = TextColumn("training in Linen"), TextColumn("loss {task.fields[loss]:.4f}")
    columns = (text, BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console.quiet or not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps, loss=float("nan"))
        return linen_model.train(
            state,
            task.batches(digits, size=BATCH_SIZE, steps=steps, seed=seed),
            seed=seed,
            on_step=lambda loss: progress.update(bar, advance=1, loss=loss),
        )
