"""How the command line shows things: bytes, tables that a pipe does not cut, progress on a terminal only.

Law: what is for programs goes to stdout, what is for eyes (progress, errors) to stderr; keys are never markup.
Knows rich; knows nothing of checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


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


def plain(value: object) -> Text:
    """Text as it is: keys may hold [brackets], which rich would take for markup."""
    from rich.text import Text

    return Text(str(value))


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2))


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """What `convert(progress=...)` takes: a bar with bytes a second on stderr; None when quiet or not on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=screen, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total)
            bars.update(tasks[doing], completed=done)

        yield tell


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
