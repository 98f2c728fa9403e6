"""A page that stands for itself: headings, tables and one plot in one HTML file, to be mailed or kept.

Law: the file needs no network, has no script, and shows text as it is, whatever is in it; nothing is written over.
Owns the optional dependency on matplotlib (extra `plot`). Knows text, tables and series of numbers; knows nothing of
models.
"""

from __future__ import annotations

import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge._errors import BridgeError, MissingDependencyError
from bridge.equivalence.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMES = 60  # more would be written over each other; the table has all of them
_LONGEST_NAME = 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.good { color: #176f2c; } .bad { color: #b3261e; }
pre { white-space: pre-wrap; margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: #fff; } .right { text-align: right; white-space: nowrap; }
tr.bad td { background: #fdecea; } .note { color: #666; } svg { max-width: 100%; height: auto; }
"""


class PageExistsError(BridgeError, FileExistsError):
    """Something is where a page is to be written."""

    __str__ = Exception.__str__  # OSError's own __str__ formats errno and file name

    def __init__(self, path: Path):
        super().__init__(
            f"the page cannot be written: {path}\n  expected: nothing there, as nothing is ever written over\n"
            "  found: a file or a folder\nChoose another name, or move this away."
        )


class PageWriteError(BridgeError, OSError):
    """A page cannot be written where it is to be: no such folder, no permission, no room."""

    __str__ = Exception.__str__

    def __init__(self, path: Path, reason: object):
        super().__init__(
            f"the page cannot be written: {path}\n  expected: a folder that exists and can be written to\n"
            f"  found: {reason}\nMake the folder, or choose another."
        )


@dataclass(frozen=True)
class Plot:
    """Errors, one for each name, on a logarithmic scale that shows zero and infinity too.

    Attributes:
      lines: what is drawn, by its label; None where there is nothing.
      limits: what each may be.
    """

    title: str
    names: tuple[str, ...]
    lines: Mapping[str, tuple[float | None, ...]]
    limits: tuple[float | None, ...]


@dataclass(frozen=True)
class Page:
    """What a page shows, in this order; `paragraphs` have a heading each."""

    title: str
    good: bool
    paragraphs: Mapping[str, Sequence[str]]
    plot: Plot | None
    tables: Sequence[Table] = ()
    footer: Sequence[str] = field(default=())

    def html(self) -> str:
        """The text of the file. Raises MissingDependencyError without matplotlib, if there is a plot."""
        title = html.escape(self.title)
        body = [f'<h1 class="{"good" if self.good else "bad"}">{title}</h1>']
        for heading, lines in self.paragraphs.items():
            body.append(f"<h2>{html.escape(heading)}</h2>")
            body += [f"<pre>{html.escape(line)}</pre>" for line in lines]
        if self.plot is not None:
            body += [f"<h2>{html.escape(self.plot.title)}</h2>", _svg(self.plot)]
        body += [line for table in self.tables for line in _table(table)]
        body += [f'<p class="note">{html.escape(line)}</p>' for line in self.footer]
        return "\n".join([_HEAD.format(title=title, style=_STYLE), *body, "</body></html>", ""])


# The policy makes a browser refuse whatever a name might have smuggled in.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}</style></head><body>"""


def require_place(path: str | Path) -> None:
    """Raise what `save` would, as far as that can be told beforehand: comparing models takes longer than this.

    Raises:
      PageExistsError: something is at `path`.
      PageWriteError: its folder is not there.
      MissingDependencyError: matplotlib is not installed.
    """
    path = Path(path)
    if os.path.lexists(path):  # a link to nothing is something too
        raise PageExistsError(path)
    if not path.parent.is_dir():
        raise PageWriteError(path, f"no folder {path.parent}")
    _matplotlib()


def save(page: Page, path: str | Path) -> None:
    """Write the page to `path`, a file that must not exist.

    Raises:
      PageExistsError, PageWriteError, MissingDependencyError: as for `require_place`. Nothing is written.
    """
    path = Path(path)
    require_place(path)
    text = page.html()
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:  # a name may hold half a surrogate
            file.write(text)
    except FileExistsError:
        raise PageExistsError(path) from None
    except OSError as error:
        raise PageWriteError(path, error) from None


def _table(table: Table) -> list[str]:
    heads = [f"<th{_side(table, heading)}>{html.escape(heading)}</th>" for heading in table.headings]
    lines = [f"<h2>{html.escape(table.title)}</h2>", "<table><thead><tr>", *heads, "</tr></thead><tbody>"]
    for number, row in enumerate(table.rows):
        cells = [
            f"<td{_side(table, heading)}>{html.escape(cell)}</td>"
            for heading, cell in zip(table.headings, row, strict=True)
        ]
        opening = '<tr class="bad">' if number in table.bad else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    return [*lines, f'<p class="note">{html.escape(table.note)}</p>'] if table.note else lines


def _side(table: Table, heading: str) -> str:
    return ' class="right"' if heading in table.right else ""


# ---- the plot ----------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise  # installed, but broken: let the user see it
        raise MissingDependencyError("The page of a report", "matplotlib", "plot") from None
    return matplotlib


def _svg(plot: Plot) -> str:
    """The plot as an `<svg>` element; the same numbers give the same text."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(9, 0.28 * len(plot.names)), 18), 6), layout="constrained")
    FigureCanvasSVG(figure)
    _draw(figure.subplots(), plot)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "linen-nnx", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, plot: Plot) -> None:
    sizes = [x for line in (*plot.lines.values(), plot.limits) for x in line if x and math.isfinite(x)]
    zero, infinite = min(sizes, default=1e-8) / 10, max(sizes, default=1.0) * 10
    places = range(1, len(plot.names) + 1)

    def heights(line: Sequence[float | None]) -> list[float]:
        return [math.nan if x is None else min(max(x, zero), infinite) for x in line]

    for (label, line), marker in zip(plot.lines.items(), "os^Dv", strict=False):
        axes.plot(places, heights(line), marker=marker, markersize=5, linewidth=1, alpha=0.8, label=label)
    axes.step(places, heights(plot.limits), where="mid", color="0.4", linestyle="--", linewidth=1, label="allowed")
    axes.set_yscale("log")
    axes.set_ylim(zero / 2, infinite * 2)
    for height, name in ((zero, "0"), (infinite, "infinite")):
        axes.axhline(height, color="0.85", linewidth=0.8, zorder=0)
        axes.annotate(name, (1, height), xycoords=("axes fraction", "data"), fontsize="small", va="center")
    axes.set(xlabel="layers in the order in which they run", ylabel="error, relative to the largest element")
    if len(plot.names) <= _MOST_NAMES:
        labels = [f"{place}  {_plain(name)}" for place, name in zip(places, plot.names, strict=True)]
        ticks = axes.set_xticks(list(places), labels, rotation=60, ha="right", fontsize="small")
        for tick in ticks:
            tick.label1.set_parse_math(False)  # a name may hold dollars
    axes.figure.legend(loc="outside upper center", ncols=len(plot.lines) + 1, fontsize="small")


def _plain(name: str) -> str:
    """A name in letters that every font has; the end of a long one, which tells more than its start."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return text if len(text) <= _LONGEST_NAME else f"...{text[-_LONGEST_NAME:]}"
