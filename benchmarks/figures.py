"""What a benchmark found, next to its goals: one table and one JSON file for all of them.

Law: a column or key is there when any figure has it; whatever was measured is reported, met or missed.
Knows numbers and names; knows nothing of what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_BESIDE = ("wall", "flax")


@dataclass(frozen=True)
class Figure:
    """One ratio or count, and what it must not exceed (None: it explains another).

    `wall` is the ratio of waiting times and `flax` flax's own ratio by the same rule, where there is one.
    """

    name: str
    value: float
    goal: float | None = None
    flax: float | None = None
    wall: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; all goals are upper bounds."""
        return None if self.goal is None else self.value <= self.goal


def report(
    console: Console, title: str, figures: Sequence[Figure], content: dict[str, Any], json_file: Path | None
) -> None:
    """Print the figures as a table, a warning if the machine was busy, and write `content` with them as JSON."""
    columns = _columns(figures)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("figure", "found", "goal", "", *columns):
        table.add_column(heading, justify="left" if heading in ("figure", "") else "right", no_wrap=True)
    for figure in figures:
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[figure.met]
        goal = "" if figure.goal is None else f"<= {figure.goal:g}"
        beside = [_number(getattr(figure, name)) for name in columns]
        table.add_row(figure.name, _number(figure.value), goal, verdict, *beside)
    console.print(table)
    if (warning := busy(content["machine"])) is not None:
        console.print(warning, style="yellow", highlight=False)
    if json_file is not None:
        write_json(json_file, content | {"figures": figure_rows(figures)})


def figure_rows(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON has them."""
    columns = _columns(figures)
    rows: list[dict[str, Any]] = []
    for figure in figures:
        row = {"figure": figure.name, "found": figure.value, "goal": figure.goal, "met": figure.met}
        rows.append(row | {name: getattr(figure, name) for name in columns})
    return rows


def _columns(figures: Sequence[Figure]) -> list[str]:
    """Those of the columns beside that any figure has."""
    return [name for name in _BESIDE if any(getattr(figure, name) is not None for figure in figures)]


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content`, in a new folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def busy(about: dict[str, Any]) -> str | None:
    """A warning if other processes wanted the machine when the benchmark began; None on a quiet one."""
    load = about["load_average"]
    if load is None or load[0] < about["cores"]:
        return None
    return f"Busy machine, load {load[0]:.1f} on {about['cores']} cores: trust host time over wall time."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
