"""`linen-nnx demo`: a Linen model is trained, carried across to NNX, and every number compared.

Law: the exit code is that of the demo; with `--json` stdout holds its record alone.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge._errors import MissingDependencyError
from bridge.cli.show import Json, print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, figure and record.")] = Path("linen-nnx-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the batch order, the weights and the dropout.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict alone.")] = False,
    as_json: Json = False,
) -> None:
    """Train a Linen CNN on handwritten digits, carry it across to NNX, and compare every number.

    Exit codes: 0 every figure holds, 1 one is off or an error, 2 wrong usage.
    """
    run = _demo()
    if as_json:
        with redirect_stdout(sys.stderr):
            code = run.main(out=out, seed=seed, quiet=quiet) or 0
        print_json({**_record(out), "out": str(out), "exit_code": code})
    else:
        code = run.main(out=out, seed=seed, quiet=quiet) or 0
    raise typer.Exit(code)


def _demo() -> Any:
    """The room, or MissingDependencyError for what its extra would bring."""
    try:
        from bridge.demo import run
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name in ("bridge", "nnx_core", "jax", "flax", "numpy", "optax", "rich"):
            raise  # a broken install, not an extra that was left out
        raise MissingDependencyError("The demo", name, "demo") from error
    return run


def _record(out: Path) -> dict[str, Any]:
    """What the demo has written down: its figures, which of them are off, and its files."""
    from bridge.demo.outdir import RECORD

    record: dict[str, Any] = json.loads((out / RECORD).read_text())
    return record
