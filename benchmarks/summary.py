"""All benchmarks in one folder: a table and plots of what they wrote, and two such folders compared.

Law: a figure has one name, the same in every run, so that an old run can be laid beside a new one; what only one of
them has is listed, and so is whatever makes them hard to compare (another machine, other versions, a busy one).
Knows the JSON that the benchmarks write; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import busy

#: Benchmark -> (its options in a full run, in a quick one).
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dispatch": (("--layers", "3,10,50,200,1000"), ("--layers", "3,10", "--repeats", "3")),
    "core": ((), ("--layers", "5", "--repeats", "3")),
    "bridge": ((), ("--layers", "3", "--repeats", "3")),
    "training": ((), ("--size", "4", "--batch", "2", "--repeats", "3")),
    "checkpoint": ((), ("--size", "8", "--leaves", "20", "--memory", "8", "--repeats", "1")),
    "scale": (
        ("--leaves", "100,1000,10000,100000"),
        ("--leaves", "100,200", "--large", "8", "--memory", "8", "--processes", "1"),
    ),
}


class Found(NamedTuple):
    """A figure: a ratio, a count or seconds; and the most it may be, where there is a goal."""

    value: float
    goal: float | None = None


def read(where: Path) -> dict[str, dict[str, Any]]:
    """Name -> what a benchmark wrote: of all JSON files of a folder, or of one file.

    Raises:
      ValueError: if there is none, or one that no benchmark wrote.
    """
    files = sorted(where.glob("*.json")) if where.is_dir() else [where]
    if not files:
        raise ValueError(f"{where}: no JSON file of a benchmark there")
    contents: dict[str, dict[str, Any]] = {}
    for file in files:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or not {"benchmark", "machine"} <= content.keys():
            raise ValueError(f"{file}: expected what `python -m benchmarks NAME --json FILE` writes")
        contents[file.stem] = content
    return contents


def figures(name: str, content: Mapping[str, Any]) -> dict[str, Found]:
    """The figures of one run, each under its name."""
    if content["benchmark"] == "dispatch":
        return _of_dispatch(content)
    if content["benchmark"] == "training":
        return _of_training(content)
    found: dict[str, Found] = {}
    above = ""
    for row in content["figures"]:
        figure = row["figure"]
        if figure.startswith(" "):  # it explains the one above, and is called so in each group
            figure = f"{above}, {figure.strip()}"
        else:
            above = figure
        found[f"{name}: {figure}"] = Found(row["found"], row["goal"])
    return found


def _of_dispatch(content: Mapping[str, Any]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    groups = {f"{depth} layers": row["variants"] for depth, row in content["layers"].items()}
    groups["plain arrays"] = content["plain_arrays"]
    for group, variants in groups.items():
        for variant, clocks in variants.items():
            if variant != "bare jax.jit":
                found[f"dispatch: {variant} / bare jax.jit, {group}"] = Found(clocks["host"]["ratio_to_bare"])
    return found


def _of_training(content: Mapping[str, Any]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for model, variants in content["models"].items():
        for variant, clocks in variants.items():
            if variant != "bare jax.jit":
                found[f"training: {variant} / bare jax.jit, {model}"] = Found(clocks["wall"]["ratio_to_bare"])
    return found


# ---- the page ----------------------------------------------------------------------------------------------------


def markdown(contents: Mapping[str, Mapping[str, Any]], plots: Mapping[str, str]) -> str:
    """A page: where and with what, a table a benchmark, its plots (title -> file)."""
    lines = [
        "# What was measured",
        "",
        "Made by `python -m benchmarks all`. Ratios are medians over rounds in which all",
    ]
    lines += ["variants took turns, in one process; lower is better.", ""]
    for about in _machines(contents):
        lines.append(f"- {about}")
    for name, content in contents.items():
        lines += ["", f"## {name}", "", "| figure | found | at most |", "|---|---:|---:|"]
        for figure, (value, goal) in figures(name, content).items():
            shown = "" if goal is None else f"{goal:g}" + ("" if value <= goal else " (missed)")
            lines.append(f"| {figure.removeprefix(f'{name}: ')} | {value:.3f} | {shown} |")
        if (warning := busy(content["machine"])) is not None:
            lines += ["", warning]
    for title, file in plots.items():
        lines += ["", f"![{title}]({file})"]
    return "\n".join(lines) + "\n"


def _machines(contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each machine and set of versions once: usually one."""
    return list(dict.fromkeys(describe(content["machine"]) for content in contents.values()))


def describe(about: Mapping[str, Any]) -> str:
    """A machine and its versions in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['processor']}, {about['cores']} cores, {about['backend']}; Python {about['python']}, {versions}"


# ---- two runs ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One figure in two runs; None where a run has it not."""

    figure: str
    old: float | None
    new: float | None

    @property
    def change(self) -> float | None:
        """new / old."""
        if self.old is None or self.new is None or self.old == 0:
            return None
        return self.new / self.old


def compare(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Every figure of either, in the order of the new run."""
    before = _all(old)
    after = _all(new)
    names = list(dict.fromkeys([*after, *before]))
    return [Row(name, _value(before.get(name)), _value(after.get(name))) for name in names]


def _all(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, content in contents.items():
        found |= figures(name, content)
    return found


def _value(found: Found | None) -> float | None:
    return None if found is None else found.value


def cautions(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes two runs hard to compare."""
    said: list[str] = []
    before, after = _machines(old), _machines(new)
    if before != after:
        said.append(f"Not the same machine and versions.\n  old: {'; '.join(before)}\n  new: {'; '.join(after)}")
    for which, contents in (("old", old), ("new", new)):
        for name, content in contents.items():
            if (warning := busy(content["machine"])) is not None:
                said.append(f"{which}, {name}: {warning}")
    return said


# ---- plots -------------------------------------------------------------------------------------------------------


def plot(contents: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Write the plots that these runs allow, as SVG; title -> file name."""
    plots: dict[str, str] = {}
    if "dispatch" in contents:
        plots["Host time of one training step by depth"] = _plot_depths(contents["dispatch"], folder)
    if "training" in contents:
        plots["A training step of whole models, next to bare JAX"] = _plot_training(contents["training"], folder)
    if "scale" in contents:
        plots["Converting a checkpoint, by its number of leaves"] = _plot_leaves(contents["scale"], folder)
    return plots


def _axes(title: str, x: str, y: str) -> Any:
    from matplotlib.figure import Figure  # late: an extra; and without pyplot no window is ever asked for

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _save(axes: Any, folder: Path, name: str) -> str:
    axes.figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"{name}.svg"


def _plot_depths(content: Mapping[str, Any], folder: Path) -> str:
    axes = _axes("Host time of one training step", "layers", "ms")
    lines: dict[str, list[tuple[int, float]]] = {}
    for depth, row in content["layers"].items():
        for variant, clocks in row["variants"].items():
            lines.setdefault(variant, []).append((int(depth), 1e3 * clocks["host"]["median_s"]))
    for variant, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=variant)
    axes.legend()
    return _save(axes, folder, "dispatch")


def _plot_training(content: Mapping[str, Any], folder: Path) -> str:
    axes = _axes("A training step / the same step in bare jax.jit", "ratio of waiting times", "")
    variants = [name for name in next(iter(content["models"].values())) if name != "bare jax.jit"]
    height = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        places = [row - i * height for row in range(len(content["models"]))]
        ratios = [clocks[variant]["wall"]["ratio_to_bare"] for clocks in content["models"].values()]
        axes.barh(places, ratios, height, label=variant)
    axes.set_yticks([row - 0.4 + height / 2 for row in range(len(content["models"]))], list(content["models"]))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend()
    return _save(axes, folder, "training")


def _plot_leaves(content: Mapping[str, Any], folder: Path) -> str:
    axes = _axes("Converting a checkpoint, verified", "leaves", "seconds")
    points = [(run["count"], run["seconds"]) for run in content["runs"] if run["what"] == "leaves"]
    axes.loglog(*zip(*points, strict=True), marker="o")
    return _save(axes, folder, "leaves")
