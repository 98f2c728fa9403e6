"""`python -m benchmarks NAME`: run a benchmark, print a table, write JSON.

Law: the exit code says whether the benchmark ran, never whether it was fast.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from benchmarks import accelerator as accelerator_benchmark
from benchmarks import bridge as bridge_benchmark
from benchmarks import checkpoint as checkpoint_benchmark
from benchmarks import core as core_benchmark
from benchmarks import dispatch as dispatch_benchmark
from benchmarks import scale as scale_benchmark
from benchmarks import summary
from benchmarks import training as training_benchmark
from benchmarks.figures import busy, report, write_json
from benchmarks.small_models import small_models
from benchmarks.timing import Step, Timing, Timings, interleaved, machine
from tests.tolerance import assert_trees_close

STEPS_COMPARED = 5

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _benchmarks() -> None:
    """Ratios against flax.nnx, Linen and bare JAX, each in one process, interleaved."""


@app.command()
def dispatch(
    layers: Annotated[str, typer.Option(help="Depths to measure, with commas between.")] = "10,50,200,1000",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times every variant once.")] = 40,
    calls: Annotated[int, typer.Option(min=1, help="Training steps timed together in a round.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Host time of one training step: nnx_core, flax.nnx, Linen, next to a bare jax.jit; how it grows with the layers.

    Beyond 200 layers only nnx_core, flax.nnx and bare jax.jit. The last rows are of a model with plain arrays.
    """
    console = Console()
    try:
        depths = dispatch_benchmark.parse_layers(layers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from None
    about = machine()
    with dispatch_benchmark.full_precision():
        losses, measured = _measure(console, depths, repeats, calls)
        arrays = dispatch_benchmark.measure_arrays(rounds=repeats, calls=calls)
    goals = dispatch_benchmark.goals(measured)
    by_depth = {str(depth): timings for depth, timings in measured.items()}
    console.print(_table({**by_depth, f"{dispatch_benchmark.PLAIN_ARRAYS} arrays": arrays}, "layers"))
    for row in goals:
        console.print(_goal_line(row), highlight=False)
    if (warning := busy(about)) is not None:
        console.print(warning, style="yellow", highlight=False)
    if json_file is not None:
        rows: dict[str, Any] = {}
        for depth, timings in measured.items():
            rows[str(depth)] = {"losses": losses[depth], "variants": _as_json(timings)}
        content = {"benchmark": "dispatch", "repeats": repeats, "calls": calls, "machine": about, "goals": goals}
        content |= {"layers": rows, "plain_arrays": _as_json(arrays)}
        write_json(json_file, content)
        console.print(f"Written: {json_file}", highlight=False)


@app.command()
def core(
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times every variant once.")] = 15,
    layers: Annotated[int, typer.Option(min=1, help="Depth of the model.")] = core_benchmark.LAYERS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """nnx_core's own operations next to flax.nnx's and plain JAX: graph, tracing, retraces, memory, import."""
    console, about = Console(), machine()
    with dispatch_benchmark.full_precision():
        figures = [
            *core_benchmark.training_step(repeats, layers),
            *core_benchmark.graph_operations(repeats, layers),
            *core_benchmark.plain_arrays(repeats),
            core_benchmark.tracing(max(repeats // 3, 1), layers),
            core_benchmark.recompilations(),
            core_benchmark.donation(layers),
            core_benchmark.importing(max(repeats // 3, 1)),
        ]
    content = {"benchmark": "core", "layers": layers, "repeats": repeats, "machine": about}
    report(console, f"nnx_core, {layers} layers", figures, content, json_file)


@app.command()
def bridge(
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times every variant once.")] = 30,
    layers: Annotated[int, typer.Option(min=1, help="Depth of the network.")] = bridge_benchmark.LAYERS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """What a wrapper costs next to what it wraps, for bridge and for flax.nnx.bridge: calls, training, tracing."""
    console, about = Console(), machine()
    with dispatch_benchmark.full_precision():
        figures = bridge_benchmark.figures(repeats, layers)
    title = f"bridge, {layers} layers; host time, and wall beside it; tracing: trace and lower"
    content = {"benchmark": "bridge", "layers": layers, "repeats": repeats, "machine": about}
    report(console, title, figures, content, json_file)


@app.command()
def scale(
    leaves: Annotated[str, typer.Option(help="Numbers of leaves, with commas between.")] = "1000,10000,100000",
    large: Annotated[int, typer.Option(min=1, help="MiB of the one large leaf.")] = 4096,
    memory: Annotated[int, typer.Option(min=1, help="MiB that a conversion may hold: --max-memory.")] = 256,
    processes: Annotated[str, typer.Option(help="Numbers of processes, with commas between.")] = "1,2,4",
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoints go; a temporary folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """How a conversion on disk grows: with the number of leaves, with one leaf, and by several processes."""
    console, about = Console(), machine()
    counts, jobs = ([int(word) for word in words.split(",") if word] for words in (leaves, processes))
    figures, runs = scale_benchmark.figures(counts, large << 20, memory << 20, jobs, folder)
    content = {"benchmark": "scale", "large": large << 20, "max_memory": memory << 20, "machine": about, "runs": runs}
    report(console, f"checkpoints at scale, --max-memory {memory} MiB", figures, content, json_file)


@app.command()
def checkpoint(
    size: Annotated[int, typer.Option(min=1, help="MiB of the checkpoint.")] = 2048,
    leaves: Annotated[int, typer.Option(min=4, help="Leaves of the checkpoint.")] = 200,
    memory: Annotated[int, typer.Option(min=1, help="MiB that a conversion may hold: --max-memory.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every variant once.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoints go; a temporary folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Converting a checkpoint on disk: time next to an Orbax restore and save, and peak memory; in memory: copies."""
    console, about = Console(), machine()
    figures, runs = checkpoint_benchmark.figures(size << 20, leaves, memory << 20, repeats, folder)
    content = {"benchmark": "checkpoint", "bytes": size << 20, "leaves": leaves, "max_memory": memory << 20}
    content |= {"repeats": repeats, "machine": about, "runs": runs}
    title = f"checkpoint: {size} MiB, {leaves} leaves, --max-memory {memory} MiB"
    report(console, title, figures, content, json_file)


@app.command()
def training(
    size: Annotated[int, typer.Option(min=4, help="Width of the models; a multiple of 4.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times every variant once.")] = 15,
    calls: Annotated[int, typer.Option(min=1, help="Training steps timed together in a round.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """A training step of an MLP, a ResNet and a Transformer: Linen, both NNX and both wrappers, next to bare JAX."""
    if size % training_benchmark.HEADS:
        raise typer.BadParameter(f"expected a multiple of {training_benchmark.HEADS}", param_hint="--size")
    console, about = Console(), machine()
    measured: dict[str, dict[str, Timings]] = {}
    with dispatch_benchmark.full_precision():
        for name, build in training_benchmark.MODELS.items():
            variants = training_benchmark.variants(build(size, batch))
            _agreeing_losses(variants)
            measured[name] = training_benchmark.measure(variants, rounds=repeats, calls=calls)
    console.print(_table(measured, "model"))
    if (warning := busy(about)) is not None:
        console.print(warning, style="yellow", highlight=False)
    if json_file is not None:
        content = {"benchmark": "training", "size": size, "batch": batch, "repeats": repeats, "calls": calls}
        content |= {"machine": about, "models": {name: _as_json(timings) for name, timings in measured.items()}}
        write_json(json_file, content)
        console.print(f"Written: {json_file}", highlight=False)


@app.command("all")
def everything(
    folder: Annotated[Path, typer.Argument(help="Where JSON, the table and the plots go: one folder a run.")],
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, a minute or two: to see that it runs.")] = False,
    only: Annotated[str, typer.Option(help=f"Of {', '.join(summary.RUNS)}: names with commas between.")] = "",
) -> None:
    """Every benchmark, each in a process of its own: JSON, README.md and plots in FOLDER.

    Exit code 1: a benchmark failed; the others are there.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or list(summary.RUNS)
    if unknown := [name for name in names if name not in summary.RUNS]:
        known = ", ".join(summary.RUNS)
        raise typer.BadParameter(f"no benchmark {', '.join(unknown)}; there are {known}", param_hint="--only")
    console, failed = Console(), []
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names, 1):
        full, small = summary.RUNS[name]
        console.rule(f"{i} of {len(names)}: {name}")
        call = [sys.executable, "-m", "benchmarks", name, *(small if quick else full)]
        if subprocess.run([*call, "--json", str(folder / f"{name}.json")]).returncode != 0:
            failed.append(name)
    contents = summary.read(folder)
    page = summary.markdown(contents, summary.plot(contents, folder))
    (folder / "README.md").write_text(page)
    console.print(f"Written: {folder / 'README.md'}", highlight=False)
    if failed:
        console.print(f"Failed: {', '.join(failed)}", style="red", highlight=False)
        raise typer.Exit(1)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(exists=True, help="A folder that `all` wrote, or one JSON file.")],
    new: Annotated[Path, typer.Argument(exists=True, help="Another.")],
    threshold: Annotated[float, typer.Option(min=1, help="Changes beyond this factor are marked.")] = 1.1,
) -> None:
    """Two runs side by side: each figure, and by what factor it changed."""
    try:
        before, after = summary.read(old), summary.read(new)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("figure", overflow="fold")
    for heading in ("old", "new", "new / old"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary.compare(before, after):
        values = ["-" if value is None else f"{value:.3f}" for value in row[1:]]
        change, style = row.change, None
        if change is not None and not 1 / threshold < change < threshold:
            style = "red" if change > 1 else "green"
        table.add_row(row.figure, *values, "" if change is None else f"{change:.2f}", style=style)
    console.print(table)
    for caution in summary.cautions(before, after):
        console.print(caution, style="yellow", highlight=False)


@app.command()
def accelerator(
    minutes: Annotated[float, typer.Option(min=0, help="No part starts later than this.")] = 8.0,
    size: Annotated[int, typer.Option(min=1, help="MiB of the checkpoint.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each times every variant once.")] = 10,
    layers: Annotated[int, typer.Option(min=1, help="Depth of the network that is timed.")] = 20,
    only: Annotated[str, typer.Option(help="Layers of the matrix to compare, with commas between; else all.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoints go; a temporary folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Equivalence, dispatch, wrappers and conversion on the backend at hand, in one JSON.

    Exit code 3: something differs, or was not compared.
    """
    # The runs of a conversion are processes beside this one, which must leave them memory on the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = _layer_rows(only)
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def save(result: dict[str, Any]) -> None:
        if json_file is not None:
            write_json(json_file, result)

    options = accelerator_benchmark.Options(60 * minutes, size << 20, repeats, layers, folder)
    result = accelerator_benchmark.run(small_models(), chosen, options, say, save)
    say(f"{result['backend']}, {result['device']}: {_equality(result)}; {len(result['not_run'])} not run")
    if not result["equal"] or any(row["part"] in accelerator_benchmark.COMPARISONS for row in result["not_run"]):
        raise typer.Exit(3)


def _layer_rows(only: str) -> list[Any]:
    """Rows of the one table of layers, which the tests keep."""
    from tests.layers import LAYERS  # late: it imports every layer of both libraries

    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {layer.name: layer for layer in LAYERS}
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no layer {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--only")
    return [known[name] for name in names] or list(LAYERS)


def _equality(result: dict[str, Any]) -> str:
    rows = [row for part in accelerator_benchmark.COMPARISONS for row in result[part]]
    different = [row["name"] for row in rows if not row["equal"]]
    return f"{len(rows)} compared, " + (f"DIFFERENT: {', '.join(different)}" if different else "all equal")


def _agreeing_losses(variants: Mapping[str, Step]) -> list[float]:
    """The losses of the first steps; AssertionError names the variant that does not share them."""
    losses = dispatch_benchmark.losses(variants, STEPS_COMPARED)
    expected = losses[dispatch_benchmark.BARE]
    found = {name: np.float32(each) for name, each in losses.items()}
    assert_trees_close(found, dict.fromkeys(found, np.float32(expected)))
    return expected


def _measure(
    console: Console, depths: Sequence[int], repeats: int, calls: int
) -> tuple[dict[int, list[float]], dict[int, dict[str, Timings]]]:
    """(losses, timings) by depth; both of the same variants, which are compiled once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    losses, measured = {}, {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for depth in depths:
            bar = progress.add_task(f"{depth} layers", total=repeats)
            variants = dispatch_benchmark.start(dispatch_benchmark.problem(depth))
            losses[depth] = _agreeing_losses(variants)
            measured[depth] = interleaved(
                variants,
                rounds=repeats,
                calls=dispatch_benchmark.calls_at(depth, calls),
                on_round=lambda bar=bar: progress.advance(bar),
            )
    return losses, measured


def _table(groups: Mapping[str, dict[str, Timings]], of_group: str) -> Table:
    title = "One training step, medians. wall: a user's wait; host: this thread's work"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in (of_group, "variant", "wall ms", "±", "ratio", "host ms", "ratio"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for label, timings in groups.items():
        base = timings[dispatch_benchmark.BARE]
        for name, timing in timings.items():
            low, high = timing.wall.quartiles
            wall = (f"{1e3 * timing.wall.median:.2f}", f"{1e3 * (high - low) / 2:.2f}")
            ratios = [f"{timing.wall.ratio_to(base.wall):.2f}", f"{timing.host.ratio_to(base.host):.2f}"]
            table.add_row(label, name, *wall, ratios[0], f"{1e3 * timing.host.median:.2f}", ratios[1])
        table.add_section()
    return table


def _goal_line(row: dict[str, Any]) -> str:
    start = f"{row['goal']}, {row['layers']} layers: "
    if row["met"] is None:
        return start + "not measured"
    verdict = "[green]met[/green]" if row["met"] else "[red]missed[/red]"
    return f"{start}{verdict}, host {row['host_ratio']:.2f} (wall {row['ratio']:.2f})"


def _as_json(timings: dict[str, Timings]) -> dict[str, Any]:
    """Seconds per step by both clocks: medians, quartiles, ratios to bare."""

    def clock(timing: Timing, base: Timing) -> dict[str, Any]:
        ratio = timing.ratio_to(base)
        return {"median_s": timing.median, "quartiles_s": timing.quartiles, "ratio_to_bare": ratio}

    base = timings[dispatch_benchmark.BARE]
    variants = {}
    for name, timing in timings.items():
        variants[name] = {"wall": clock(timing.wall, base.wall), "host": clock(timing.host, base.host)}
    return variants


if __name__ == "__main__":
    sys.exit(app())
