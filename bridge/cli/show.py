"""How the command line shows things: bytes, tables that a pipe does not cut, progress on a terminal only.

Law: what is for programs goes to stdout, what is for eyes (progress, errors) to stderr; keys are never markup.
Knows rich; knows nothing of checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

#: The options that commands share.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result: no progress bar.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def console(widest: int = 0) -> Console:
    """Where tables go. A pipe has no width; 80 columns would cut paths that the next program wants to read."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(120, 80 + widest))


def table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; text that is too long folds and is never cut; the columns named in `right` are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(*headings, box=box.SIMPLE_HEAD)
    for column, heading in zip(made.columns, headings, strict=True):
        column.overflow, column.justify = "fold", "right" if heading in right else "left"
    return made


def print_table(
    screen: Console,
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: tuple[str, ...] = (),
    bad: Collection[int] = (),
) -> None:
    """A table if each of its rows fits a line of the screen; else each row as lines of its own, its first cell first.

    Args:
      screen: where it goes.
      headings: of the columns.
      rows: cells; shown as text.
      right: the columns that are numbers.
      bad: the numbers of the rows that show what is wrong, from 0.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    shown = table(*headings, right=right)
    styles = ["red" if number in bad else "" for number in range(len(cells))]
    for row, style in zip(cells, styles, strict=True):
        shown.add_row(*map(plain, row), style=style)
    natural = _natural_width(headings, cells)
    if not screen.is_terminal:
        screen.width = max(screen.width, natural)
    if natural <= screen.width:
        screen.print(shown)
        return
    for row, style in zip(cells, styles, strict=True):
        for line in _stacked(headings, row, screen.width):
            # A terminal folds it, and what is copied from there is whole.
            screen.print(plain(line), style=style, soft_wrap=True)


def _natural_width(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the screen that a table takes whose cells are not folded."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    return sum(widths) + 3 * len(widths) + 1  # a space on either side of each cell, and lines between and around them


def _stacked(headings: Sequence[str], row: Sequence[str], width: int) -> Iterator[str]:
    """The first cell, and below it the others with their headings, as many to a line as fit."""
    yield row[0]
    line = " "
    for heading, cell in zip(headings[1:], row[1:], strict=True):
        if not cell:
            continue
        labelled = f" {heading}: {cell}"
        if line.strip() and len(line) + 1 + len(labelled) > width:
            yield line
            line = " "
        line += labelled if not line.strip() else f" {labelled}"
    if line.strip():
        yield line


def plain(value: object) -> Text:
    """Text as it is: keys may hold [brackets], which rich would take for markup."""
    from rich.text import Text

    return Text(str(value))


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2))


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """What `convert(progress=...)` takes: a bar on stderr, with rate and time left; None if quiet or not on a terminal.

    Of 'planning' the numbers are steps, of all else bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total, amount="")
            bars.update(tasks[doing], completed=done, total=total)
            speed = next(task.speed for task in bars.tasks if task.id == tasks[doing])
            bars.update(tasks[doing], amount=amount(doing, done, total, speed))

        yield tell


def amount(doing: str, done: int, total: int, speed: float | None) -> str:
    """How much is done, of how much, and how fast: bytes, but steps of planning.

    >>> amount("converting", 512, 2048, 1024.0), amount("planning", 2, 5, 1.5), amount("verifying", 0, 9, None)
    ('512 B of 2.0 KiB, 1.0 KiB/s', 'step 2 of 5, 1.5/s', '0 B of 9 B')
    """
    if doing == "planning":
        rate = "" if speed is None else f", {speed:.1f}/s"
        return f"step {done} of {total}{rate}"
    rate = "" if speed is None else f", {human_bytes(int(speed))}/s"
    return f"{human_bytes(done)} of {human_bytes(total)}{rate}"


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
