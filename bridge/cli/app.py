"""The command `linen-nnx`: arguments in, functions of `bridge` called, tables out.

Law: a BridgeError is shown as its text, without a traceback; exit codes are 0 done, 1 an error of `bridge` or something
would be lost, 2 wrong usage, 3 verification failed or models differ, 130 Ctrl-C; nothing that was read is changed.
Knows which commands there are; what they do is in the rooms below, imported when one runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bridge._errors import BridgeError, MissingDependencyError
from bridge.cli.compare import compare
from bridge.cli.convert import convert
from bridge.cli.diff import diff, verify
from bridge.cli.inspect import inspect
from bridge.cli.show import print_json

_EXIT_ERROR, _EXIT_UNVERIFIED = 1, 3

app = typer.Typer(
    name="linen-nnx",
    help="Move Flax models and their checkpoints between Linen and NNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (inspect, convert, compare, diff, verify):
    app.command()(command)


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
    """Run the command line and exit; with `--json`, an error of `bridge` is a JSON document on stdout too.

    Args:
        arguments: the words after the program's name; those of the process by default.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=words, prog_name="linen-nnx")
    except BridgeError as error:
        from bridge.checkpoint.verification import VerificationError

        code = _EXIT_UNVERIFIED if isinstance(error, VerificationError) else _EXIT_ERROR
        if "--json" in words:
            print_json({"error": type(error).__name__, "message": str(error), "exit_code": code})
        typer.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        raise SystemExit(code) from None
