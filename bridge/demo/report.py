"""What the demo shows: tables, a figure, a verdict.

Law: every number shown is one that `verdict` judges; nothing is rounded to zero: `0.0` is every bit equal.
Knows rich and matplotlib; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bridge.demo.verdict import Check, Comparison, shown, worst
from bridge.equivalence.numbers import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME_ARITHMETIC = (
    "Demanded is exactly 0.0, every bit equal: all four are the same layers in the same order, each compiled "
    "whole by XLA for the CPU, matrix products in full float32. No difference has a reason, so any is off."
)
STEP_DTYPE = "The step alone is compared as a number: Linen counts in int32, NNX in uint32."
_ONE_ULP = float(np.finfo(np.float32).eps)


def show(console: Console, comparison: Comparison) -> None:
    """Print every figure of the comparison."""
    console.print(_crossing(comparison))
    console.print(_gradients(comparison))
    console.print(SAME_ARITHMETIC, style="dim", highlight=False)
    console.print(_layers(comparison))
    console.print(_training_on(comparison))
    console.print(STEP_DTYPE, style="dim", highlight=False)


def show_verdict(console: Console, all_checks: Sequence[Check]) -> None:
    """Say whether every figure holds, and name each that does not."""
    off = [check for check in all_checks if not check.holds]
    if not off:
        console.print(f"All {len(all_checks)} figures hold.", style="bold green")
        return
    console.print(f"{len(off)} of {len(all_checks)} figures are off:", style="bold red")
    for check in off:
        console.print(f"  {check}", style="red", markup=False, soft_wrap=True)


def _mark(gap: Difference) -> str:
    color = "green" if gap.bit_equal else "bold red"
    return f"[{color}]{escape(shown(gap))}[/]"


def _table(title: str) -> Table:
    """A table narrow enough for 80 columns."""
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, collapse_padding=True)


def _crossing(comparison: Comparison) -> Table:
    table = _table("The trained model, read from disk, against Linen in memory")
    for heading in ("model", "test accuracy", "logits max|diff|", "gradients max|diff|"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row(comparison.linen.name, f"{comparison.accuracy(comparison.linen):.2%}", "", "")
    for side in comparison.others:
        gradients = worst(comparison.gradients(side).values())
        table.add_row(side.name, f"{comparison.accuracy(side):.2%}", _mark(comparison.logits(side)), _mark(gradients))
    return table


def _gradients(comparison: Comparison) -> Table:
    table = _table(f"max|diff| of gradients over {len(comparison.labels)} images, train mode, dropout off")
    table.add_column("parameter", no_wrap=True)
    table.add_column("max|grad|", justify="right")
    for side in comparison.others:
        table.add_column(side.name, justify="right")
    columns = [comparison.gradients(side) for side in comparison.others]
    for path, gradient in sorted(comparison.linen.gradients.items()):
        gaps = (_mark(column[path]) for column in columns)
        table.add_row("/".join(path), f"{np.abs(gradient).max():.1e}", *gaps)
    return table


def _layers(comparison: Comparison) -> Table:
    table = _table("Layer by layer against Linen, by bridge.equivalence.compare: train mode, dropout off")
    for heading in ("model", "layers", "verdict"):
        table.add_column(heading, justify="right" if heading == "layers" else "left")
    for name, report in comparison.reports.items():
        color = "green" if report.equal else "bold red"
        table.add_row(name, str(len(report.rows)), f"[{color}]{escape(report.headline)}[/]")
    return table


def _training_on(comparison: Comparison) -> Table:
    ours, theirs = comparison.native_continued, comparison.linen_continued
    table = _table(f"{len(theirs.losses)} more steps from checkpoint and its optimizer state")
    for heading in ("figure", theirs.name, ours.name, "max|diff|"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    told = sorted({0, len(theirs.losses) // 2, len(theirs.losses) - 1})
    for at in told:
        table.add_row(f"loss, step {at + 1}", f"{theirs.losses[at]:.9f}", f"{ours.losses[at]:.9f}", "")
    counts = [str(len(side.losses)) for side in (theirs, ours)]
    table.add_row("losses, all steps", *counts, _mark(comparison.losses()))
    table.add_row("step counter", str(theirs.step), str(ours.step), "")
    for collection, gaps in comparison.states().items():
        counts = [f"{len(getattr(side, collection))} arrays" for side in (theirs, ours)]
        table.add_row(f"final {collection}", *counts, _mark(worst(gaps.values())))
    return table


# --------------------------------------------------------------------------------------------- the figure


def draw(path: Path, training_losses: Sequence[float], comparison: Comparison) -> None:
    """Write a PNG: the loss in training, the steps after the crossing overlaid, the difference per layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    training, onward, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))

    ours, theirs = comparison.native_continued, comparison.linen_continued
    start = len(training_losses)
    before, after = np.arange(start) + 1, np.arange(start, start + len(theirs.losses)) + 1
    training.semilogy(before, training_losses, color="0.6", linewidth=0.8, label="Linen, training")
    for axes in (training, onward):
        axes.semilogy(after, theirs.losses, "tab:blue", linewidth=4, alpha=0.5, label="Linen, dropout off")
        axes.semilogy(after, ours.losses, ".--", color="tab:orange", label=f"{ours.name}, dropout off")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(fontsize="small")
    training.set_title("Training, checkpoint, training on")
    onward.set_title(f"{len(theirs.losses)} steps on: max|diff| {shown(comparison.losses())}")
    onward.xaxis.get_major_locator().set_params(integer=True)
    _draw_layers(layers, comparison)
    figure.savefig(path, dpi=130)


def _draw_layers(axes: Axes, comparison: Comparison) -> None:
    """Largest difference of each parameter on a scale that shows zero, with one float32 ulp for size."""
    paths = sorted(comparison.linen.gradients)
    series = [(f"gradient, {side.name}", comparison.gradients(side)) for side in comparison.others]
    series.append(("parameter after the steps, native", comparison.states()["params"]))
    offsets = np.linspace(-0.24, 0.24, len(series))
    highest = _ONE_ULP
    for (label, gaps), offset, marker in zip(series, offsets, "osD^", strict=True):
        heights = [min(gaps[path].absolute, 1e3) if path in gaps else 1e3 for path in paths]
        highest = max(highest, *heights)
        axes.plot(np.arange(len(paths)) + offset, heights, marker, markersize=5, label=label)
    axes.axhline(_ONE_ULP, color="0.5", linestyle=":", linewidth=1)
    axes.text(len(paths) - 0.5, _ONE_ULP * 1.2, "one float32 ulp at 1.0", ha="right", fontsize="small")
    axes.set_yscale("symlog", linthresh=1e-9)
    axes.set_ylim(-3e-10, highest * 100)
    names = ["/".join(path) for path in paths]
    axes.set_xticks(np.arange(len(paths)), names, rotation=50, ha="right", fontsize="small")
    axes.set(ylabel="max |difference| from Linen", title="Difference per layer")
    axes.legend(fontsize="small", loc="upper left")
