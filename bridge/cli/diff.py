"""`linen-nnx diff` and `linen-nnx verify`: whether checkpoints hold what they should.

Law: reads only. `diff` exits with 1 if anything differs, `verify` with 3 if the checkpoint is not as it was written.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge._errors import show_path
from bridge.cli.show import Json, Quiet, console, human_bytes, plain, print_json, print_table, progress_bar
from bridge.cli.words import ITEM_HELP, parse_bytes, parse_items, parse_tolerance

if TYPE_CHECKING:
    from bridge.checkpoint.comparison import Difference, DiffReport

_DIFFERENT = 1
_MaxMemory = Annotated[int, typer.Option(parser=parse_bytes, metavar="SIZE", help="Leaves in memory at once.")]
_Atol = Annotated[
    float, typer.Option(parser=parse_tolerance, metavar="NUMBER", help="How far floating point numbers may be apart.")
]
_Rtol = Annotated[
    float, typer.Option(parser=parse_tolerance, metavar="NUMBER", help="The same, relative to B's number.")
]
_Rules = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="TOML: from Linen's names to NNX's.")
]


def diff(
    a: Annotated[Path, typer.Argument(help="One checkpoint, of any format and layout.")],
    b: Annotated[Path, typer.Argument(help="The other.")],
    atol: _Atol = "0",  # type: ignore[assignment]  # typer parses it
    rtol: _Rtol = "0",  # type: ignore[assignment]  # typer parses it
    raw: Annotated[bool, typer.Option("--raw", help="Compare the paths as they are stored.")] = False,
    rules: _Rules = None,
    max_memory: _MaxMemory = "2GiB",  # type: ignore[assignment]  # typer parses it
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints leaf by leaf. A Linen checkpoint and its NNX conversion compare equal.

    Exit codes: 0 no difference, 1 a difference or an error, 2 wrong usage.
    """
    from bridge.checkpoint.comparison import diff as compare
    from bridge.checkpoint.rules.apply import read_rules
    from bridge.checkpoint.stream import share_freed_memory

    if raw and rules is not None:
        raise typer.BadParameter("--rules has no use with --raw, which compares the paths as they are stored")
    share_freed_memory()
    read = None if rules is None else read_rules(rules)
    with progress_bar(quiet=quiet or as_json) as progress:
        report = compare(a, b, atol=atol, rtol=rtol, raw=raw, rules=read, max_memory=max_memory, progress=progress)
    if as_json:
        print_json(_diff_document(report))
    else:
        _print_diff(report)
    raise typer.Exit(0 if report.same else _DIFFERENT)


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that `linen-nnx convert` wrote.")],
    step: Annotated[int | None, typer.Option(help="The step; the latest by default.")] = None,
    item: Annotated[list[str], typer.Option(metavar="NAME", help=ITEM_HELP)] = [],  # noqa: B006
    max_memory: _MaxMemory = "2GiB",  # type: ignore[assignment]  # typer parses it
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read every leaf again and compare it with the hash that was stored when it was written.

    Exit codes: 0 all as it was written, 1 an error, 2 wrong usage, 3 not as it was written.
    """
    from bridge.checkpoint.stream import share_freed_memory
    from bridge.checkpoint.verification import verify as check

    share_freed_memory()
    with progress_bar(quiet=quiet or as_json) as progress:
        report = check(checkpoint, step=step, item=parse_items(item), max_memory=max_memory, progress=progress)
    if as_json:
        found = {"path": report.path, "format": report.format, "leaves": report.leaves, "nbytes": report.nbytes}
        print_json(found | {"verified": True, "exit_code": 0})
    else:
        typer.echo(f"verified: {report.leaves} leaves, {human_bytes(report.nbytes)}, as they were written")


# --- differences --------------------------------------------------------------------------------------------


def _print_diff(report: DiffReport) -> None:
    screen = console()
    screen.print(plain(f"a: {report.a}\nb: {report.b}\ncompared {report.how}"), soft_wrap=True)
    if report.differences:
        headings = ("path", "what", "a", "b", "elements", "max abs", "first")
        print_table(screen, headings, map(_diff_row, report.differences), right=("elements", "max abs"))
    for name in report.left_out:
        screen.print(plain(f"an item that is not compared: {name}"), soft_wrap=True)
    verdict = f"{len(report.differences)} differences" if report.differences else "no difference"
    screen.print(f"{verdict}; {report.compared} leaves in both, {human_bytes(report.nbytes)}")
    if hint := _hint(report):
        screen.print(hint, soft_wrap=True)


def _hint(report: DiffReport) -> str:
    if {"only in a", "only in b"} <= {row.what for row in report.differences}:
        return "If one names things otherwise: --rules FILE (convert --save-rules FILE writes derived ones)."
    return ""


def _diff_row(row: Difference) -> tuple[object, ...]:
    if row.what != "values":
        return show_path(row.path), row.what, row.a, row.b, "", "", ""
    first = "" if row.first is None else list(row.first)
    return show_path(row.path), row.what, row.a, row.b, row.count, f"{row.max_abs:.3g}", first


def _diff_document(report: DiffReport) -> dict[str, Any]:
    rows = [
        {
            "path": list(row.path),
            "what": row.what,
            "a": row.a,
            "b": row.b,
            "count": row.count,
            "max_abs": row.max_abs if math.isfinite(row.max_abs) else None,  # JSON has no infinity
            "first": None if row.first is None else list(row.first),
        }
        for row in report.differences
    ]
    return {
        "a": report.a,
        "b": report.b,
        "how": report.how,
        "same": report.same,
        "compared": report.compared,
        "nbytes": report.nbytes,
        "left_out": list(report.left_out),
        "differences": rows,
        "hint": _hint(report),
        "exit_code": 0 if report.same else _DIFFERENT,
    }
