"""The command `linen-nnx`: arguments in, functions of `bridge` called, tables out.

Law: a BridgeError is shown as its text, without a traceback, and the exit code is 1; wrong usage is 2;
nothing that was read is changed.
Knows how to show things; all that it shows comes from the rooms below, imported when a command runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge._errors import BridgeError, MissingDependencyError, show_path

if TYPE_CHECKING:
    from bridge.checkpoint import CheckpointInfo

_EXIT_ERROR = 1

app = typer.Typer(
    name="linen-nnx",
    help="Move Flax models and their checkpoints between Linen and NNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Without this, typer would make a single command the whole program."""


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, step folder or folder of steps.")],
    step: Annotated[int | None, typer.Option(help="The step to look at; the latest by default.")] = None,
    item: Annotated[str | None, typer.Option(help="The item of a composite checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show path, shape, dtype, bytes and collection of every leaf of a checkpoint. Reads no array."""
    from bridge.checkpoint import read_metadata

    info = read_metadata(checkpoint, step=step, item=item)
    if as_json:
        typer.echo(json.dumps(_as_json(info), indent=2))
    else:
        _print_tables(info)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, figure and record.")] = Path("linen-nnx-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the batch order, the weights and the dropout.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict alone.")] = False,
) -> None:
    """Train a Linen CNN on handwritten digits, carry it across to NNX, and compare every number."""
    try:
        from bridge.demo import run
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name in ("bridge", "nnx_core", "jax", "flax", "numpy", "optax", "rich"):
            raise  # a broken install, not an extra that was left out
        raise MissingDependencyError("The demo", name, "demo") from error
    raise typer.Exit(run.main(out=out, seed=seed, quiet=quiet) or 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error of `bridge`, 2 wrong usage.

    Args:
        arguments: the words after the program's name; those of the process by default.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="linen-nnx")
    except BridgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(_EXIT_ERROR) from None


# --- showing a checkpoint -----------------------------------------------------------------------------------


def _print_tables(info: CheckpointInfo) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # A pipe has no width; 80 columns would cut paths that the next program in it wants to read.
    width = (
        None if console.is_terminal else max(120, 60 + max((len(show_path(x.path)) for x in info.leaves), default=0))
    )
    console = Console(width=width)
    leaves = Table("path", "shape", "dtype", "bytes", "collection", box=box.SIMPLE_HEAD)
    totals = Table("collection", "leaves", "bytes", box=box.SIMPLE_HEAD)
    for table in (leaves, totals):
        table.columns[0].overflow = "fold"
    for column in (leaves.columns[3], totals.columns[1], totals.columns[2]):
        column.justify = "right"
    for leaf in info.leaves:
        leaves.add_row(
            *map(
                _plain,
                (show_path(leaf.path), leaf.shape, leaf.dtype, human_bytes(leaf.nbytes), leaf.collection),
            )
        )
    for name, (count, size) in _totals(info).items():
        totals.add_row(_plain(name), str(count), human_bytes(size))
    totals.add_row("total", str(len(info.leaves)), human_bytes(info.nbytes))
    console.print(_plain(f"checkpoint: {info.root}"), soft_wrap=True)
    if info.step is not None:
        console.print(f"step: {info.step}")
    console.print(_plain(f"layout: {info.layout.value} ({info.reason})"), soft_wrap=True)
    if info.boxed:
        console.print(f"boxes: {len(info.boxed)} paths end in a lone 'value' (nn.Partitioned or the like)")
    console.print(leaves)
    console.print(totals)


def _plain(value: object) -> Any:
    from rich.text import Text

    return Text(str(value))  # keys may hold [brackets], which rich would take for markup


def _totals(info: CheckpointInfo) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for leaf in info.leaves:
        count, size = totals.get(leaf.collection, (0, 0))
        totals[leaf.collection] = count + 1, size + leaf.nbytes
    return totals


def _as_json(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "root": str(info.root),
        "step": info.step,
        "item": info.item,
        "layout": info.layout.value,
        "reason": info.reason,
        "nbytes": info.nbytes,
        "leaves": [
            {
                "path": list(leaf.path),
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "nbytes": leaf.nbytes,
                "collection": leaf.collection,
            }
            for leaf in info.leaves
        ],
        "empty": [list(path) for path in info.empty],
        "boxed": [list(path) for path in sorted(info.boxed)],
        "collections": {name: {"leaves": n, "nbytes": size} for name, (n, size) in _totals(info).items()},
    }


def human_bytes(size: int) -> str:
    """Bytes with a binary unit, at most four digits.

    >>> human_bytes(0), human_bytes(1023), human_bytes(1536), human_bytes(3 * 2**30)
    ('0 B', '1023 B', '1.5 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size} B"
    value, units = size / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1023.95 and len(units) > 1:
        value, _ = value / 1024, units.pop(0)
    return f"{value:.1f} {units[0]}"
