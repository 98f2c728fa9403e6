"""What a comparison of two models has shown: everything that was compared, layer by layer, and where they part.

Law: what could not be compared stands here too; equal is only what was compared and is equal.
Knows numbers, tables and a page; knows nothing of models.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bridge.equivalence.numbers import Difference
from bridge.equivalence.page import Page, Plot, save
from bridge.equivalence.tables import Table

Cause = Literal[
    "parameters", "computation", "dtype", "shape", "mode", "order", "structure", "random", "state", "training"
]
Verdict = Literal["equal", "wrong", "fed wrong", "unpaired"]
What = Literal[
    "output",
    "gradient",
    "state",
    "parameter",
    "structure",
    "loss",
    "trained parameter",
    "optimizer state",
    "random",
]


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Attributes:
      path: of the output, or of the variable in `a`; "" if there is only one.
      other: the same in `b`.
      difference: the worst of all seeds; None for structure, of which `text` tells.
      seed: which draw it was found with; None where it does not depend on one.
      step: which training step, from 1; None outside of training.
    """

    what: What
    path: str
    other: str
    difference: Difference | None
    equal: bool
    seed: int | None = None
    step: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Row:
    """A pair of layers at one call; rows stand in the order in which `a` runs.

    Attributes:
      a, b: paths of the layers; "" where unpaired.
      kind: of both, as in "Dense/Linear".
      call: 1 for the first call of that layer; repeats and the steps of a scan count up.
      method: that was called.
      input: how far apart is what the two were fed; None if unpaired, or if nothing is comparable.
      output: the same of what they returned.
      alone: of the output of b's layer when it is fed a's input; None where it could not be run so.
      parameters: the worst of its own variables; None if it has none.
      verdict: "wrong" by itself, "fed wrong" numbers, "equal" or "unpaired".
    """

    a: str
    b: str
    kind: str
    call: int
    method: str
    input: Difference | None
    output: Difference | None
    alone: Difference | None
    parameters: Difference | None
    verdict: Verdict
    text: str = ""


@dataclass(frozen=True)
class Parting:
    """Where two models first part, and why.

    Attributes:
      a, b: paths of layers or variables; "" for the whole model.
      text: what was expected, what was found, what to do.
    """

    a: str
    b: str
    cause: Cause
    text: str

    @property
    def place(self) -> str:
        """Both paths, once if they are one, and the cause.

        >>> Parting("Dense_0", "hidden", "dtype", "...").place, Parting("", "", "mode", "...").place
        ('Dense_0 | hidden: dtype', '(whole): mode')
        """
        names = dict.fromkeys((self.a or _WHOLE, self.b or _WHOLE))
        return f"{' | '.join(names)}: {self.cause}"


@dataclass(frozen=True)
class Report:
    """What a comparison has shown.

    Attributes:
      a, b: what was compared, in words.
      first: where they first part; None if they are equal.
      seeds: of the draws that inputs were made of.
      not_compared: what was left out, and why.
      notes: how values were found, and paired where the order of calls, names and numbers do not say the same.
    """

    a: str
    b: str
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    first: Parting | None
    seeds: tuple[int, ...]
    not_compared: tuple[str, ...]
    backend: str
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether something was compared, and all of it is equal."""
        return bool(self.findings) and all(finding.equal for finding in self.findings)

    @property
    def bit_equal(self) -> bool:
        """Whether all that was compared is equal bit by bit."""
        differences = [finding.difference for finding in self.findings if finding.difference is not None]
        return self.equal and all(difference.bit_equal for difference in differences)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        wrong = sum(not finding.equal for finding in self.findings)
        if wrong:
            return f"not equal: {wrong} of {len(self.findings)} differ"
        if not self.findings:
            return "not equal: nothing was compared"
        exactly = "every bit" if self.bit_equal else "to what their dtypes allow"
        left_out = f", {len(self.not_compared)} left out" if self.not_compared else ""
        return f"equal, {exactly}: {len(self.findings)} compared{left_out}"

    @property
    def origin(self) -> str:
        """Of what draws the numbers were made, and where."""
        versions = [f"{name} {version}" for name, version in self.versions.items()]
        return ", ".join([f"seeds {', '.join(map(str, self.seeds)) or 'none'}", self.backend, *versions])

    def tables(self, *, whole: bool = False) -> list[Table]:
        """What was compared, what differs, and the layers; without `whole` only the rows that matter."""
        most = None if whole else _MOST_ROWS
        tables = [_summary(self.findings), _differing(self.findings, most), _layers(self.rows, most)]
        return [table for table in tables if table.rows or table.note]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON types, and what follows from it (`equal`, `bit_equal`, `relative`, `ratio`).

        JSON has no infinity and no NaN: they are the strings "inf" and "nan", which `float` reads.

        >>> import json
        >>> off = Difference(math.inf, 1.0, None, 1e-4, False, "float32[3], expected float32[2]")
        >>> finding = Finding("output", "", "", off, equal=False)
        >>> report = Report("x", "y", (finding,), (), Parting("", "", "shape", "..."), (0,), (), "cpu")
        >>> json.loads(json.dumps(report.as_dict(), allow_nan=False))["findings"][0]["difference"]["absolute"]
        'inf'
        """
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "bit_equal": self.bit_equal,
            "first": None if self.first is None else _document(self.first),
            "findings": [_document(finding) for finding in self.findings],
            "rows": [_document(row) for row in self.rows],
            "seeds": [int(seed) for seed in self.seeds],
            "not_compared": list(self.not_compared),
            "notes": list(self.notes),
            "backend": self.backend,
            "versions": dict(self.versions),
        }

    def save_html(self, path: str | Path) -> None:
        """Write a page: the tables, whole, and a plot of the error by layer, in one file that needs no network.

        Args:
          path: of the file, which must not exist.

        Raises:
          PageExistsError: something is there.
          PageWriteError: its folder is not there, or cannot be written to.
          MissingDependencyError: matplotlib is not installed.
        """
        paragraphs = {"Compared": [f"a: {self.a}", f"b: {self.b}", *self.notes]}
        if self.first is not None:
            paragraphs["Where they first part"] = [self.first.place, self.first.text]
        if self.not_compared:
            paragraphs["Not compared"] = list(self.not_compared)
        whole = Page(self.headline, self.equal, paragraphs, _plot(self.rows), self.tables(whole=True), [self.origin])
        save(whole, path)

    def __str__(self) -> str:
        """The verdict first, where they part, the rows that matter, and what was left out."""
        lines = [self.headline, f"  a: {self.a}", f"  b: {self.b}", *(f"  {note}" for note in self.notes)]
        if self.first is not None:
            lines += [f"they first part at {self.first.place}", textwrap.indent(self.first.text, "  ")]
        lines += map(str, self.tables())
        if self.not_compared:
            lines += ["not compared:", *(f"  {text}" for text in self.not_compared)]
        return "\n".join([*lines, self.origin])


# ---- JSON --------------------------------------------------------------------------------------------------


def _document(part: Finding | Row | Parting) -> dict[str, Any]:
    """The fields of a dataclass as JSON types."""
    document: dict[str, Any] = {}
    for entry in fields(part):
        value = getattr(part, entry.name)
        if isinstance(value, Difference):
            value = _numbers(value)
        document[entry.name] = value.item() if isinstance(value, np.generic) else value
    return document


def _numbers(off: Difference) -> dict[str, Any]:
    names = ("absolute", "relative", "scale", "ulp", "tolerance", "ratio")
    sizes = {name: _json_number(getattr(off, name)) for name in names}
    return {**sizes, "bit_equal": bool(off.bit_equal), "equal": bool(off.equal), "forms": off.forms}


def _json_number(x: float | None) -> float | str | None:
    if x is None:
        return None
    return float(x) if math.isfinite(x) else str(float(x))


# ---- tables ------------------------------------------------------------------------------------------------


def _summary(findings: Sequence[Finding]) -> Table:
    """A row for each kind of thing that was compared, with the worst of them."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.what, []).append(finding)
    rows, bad = [], set()
    for number, (what, alike) in enumerate(kinds.items()):
        off = max((f.difference for f in alike if f.difference is not None), key=_badness, default=None)
        exact = sum(finding.difference is not None and finding.difference.bit_equal for finding in alike)
        wrong = sum(not finding.equal for finding in alike)
        rows.append((what, str(len(alike)), str(wrong), str(exact), *_sizes(off)))
        if wrong:
            bad.add(number)
    headings = ("what", "compared", "differ", "bit equal", *_SIZES)
    note = "the sizes are those of the worst of each row; relative: to the largest element of a" if rows else ""
    return Table("compared", headings, tuple(rows), frozenset(headings[1:]), frozenset(bad), note)


def _differing(findings: Sequence[Finding], most: int | None) -> Table:
    """What differs, the worst first, and beside each how far."""
    wrong = [finding for finding in findings if not finding.equal]
    wrong.sort(key=lambda finding: _badness(finding.difference), reverse=True)  # as they were compared where alike
    rows = []
    for finding in wrong[:most]:
        forms = "" if finding.difference is None else finding.difference.forms
        remark = "; ".join(filter(None, (forms, finding.text, _draw(finding))))
        rows.append(
            (finding.what, finding.path or _WHOLE, finding.other or _WHOLE, *_sizes(finding.difference), remark)
        )
    headings = ("what", "a", "b", *_SIZES, "remark")
    note = f"and {len(wrong) - len(rows)} more" if len(wrong) > len(rows) else ""
    return Table("what differs", headings, tuple(rows), frozenset(_SIZES), frozenset(range(len(rows))), note)


def _layers(layers: Sequence[Row], most: int | None) -> Table:
    """Layers in the order in which they run. Cut, those that are wrong by themselves, and the last before them."""
    numbers = range(len(layers))
    shown = list(numbers if most is None else _that_matter(layers)[:most])
    rows, bad = [], set()
    for number in shown:
        layer = layers[number]
        if layer.verdict in ("wrong", "unpaired"):
            bad.add(len(rows))
        named = layer.kind if layer.method == "__call__" else f"{layer.kind}.{layer.method}"
        place = (str(number + 1), layer.a or "-", layer.b or "-", named, str(layer.call))
        sides = (layer.parameters, layer.input, layer.output, layer.alone)
        rows.append((*place, *map(_relative, sides), layer.verdict, layer.text))
    headings = ("#", "a", "b", "layer", "call", *_SIDES, "verdict", "remark")
    counts = Counter(layer.verdict for layer in layers)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    note = f"{counted}; {len(rows)} of {len(layers)} shown" if len(rows) < len(layers) else counted
    return Table("layers", headings, tuple(rows), frozenset(("#", "call", *_SIDES)), frozenset(bad), note)


def _that_matter(layers: Sequence[Row]) -> list[int]:
    """Those wrong by themselves or without a counterpart; the last before the first of them, and the first it feeds."""
    wrong = [n for n, layer in enumerate(layers) if layer.verdict in ("wrong", "unpaired")]
    fed = [n for n, layer in enumerate(layers) if layer.verdict == "fed wrong"]
    parting = min(wrong or fed, default=0)  # what stands around a wrong layer is fed wrong before that one runs
    after = [n for n in fed if n > parting or not wrong]
    return sorted({*wrong, *after[:1], *range(max(0, parting - 1), parting)})


def _plot(layers: Sequence[Row]) -> Plot | None:
    if not layers:
        return None
    names = [f"{layer.a or '-'} / {layer.b or '-'}" for layer in layers]
    lines = {
        "output, as the models ran": [layer.output for layer in layers],
        "output, fed what a's layer was fed": [layer.alone for layer in layers],
        "parameters": [layer.parameters for layer in layers],
    }
    sizes = {label: tuple(map(_error, line)) for label, line in lines.items()}
    limits = [_limit(layer.output) for layer in layers]
    return Plot("Error by layer", tuple(names), sizes, tuple(limits))


def _error(off: Difference | None) -> float | None:
    return None if off is None else off.relative


def _limit(off: Difference | None) -> float | None:
    return off.tolerance / off.scale if off is not None and off.scale else None


# ---- words -------------------------------------------------------------------------------------------------

_MOST_ROWS = 12
_WHOLE = "(whole)"
_SIZES = ("off by", "relative", "ulp", "allowed")
_SIDES = ("parameters", "input", "output", "alone")


def _draw(finding: Finding) -> str:
    parts = {"seed": finding.seed, "step": finding.step}
    return ", ".join(f"{name} {number}" for name, number in parts.items() if number is not None)


def _badness(off: Difference | None) -> tuple[float, float]:
    """What is not a number of an array is worse than any."""
    return (math.inf, math.inf) if off is None else (off.ratio, off.absolute)


def _sizes(off: Difference | None) -> tuple[str, ...]:
    if off is None:
        return ("",) * len(_SIZES)
    ulp = "" if off.ulp is None else _size(off.ulp)
    apart = ("0", "0", ulp and "0") if off.bit_equal else (_size(off.absolute), _size(off.relative), ulp)
    return *apart, _size(off.tolerance)


def _relative(off: Difference | None) -> str:
    """Of one side of a layer: `0` is every bit equal, `0.0` equal numbers, as those of two dtypes or zeros."""
    if off is None:
        return ""
    return "0" if off.bit_equal else _size(off.relative)


def _size(x: float) -> str:
    return f"{x:.3g}" if x else "0.0"
