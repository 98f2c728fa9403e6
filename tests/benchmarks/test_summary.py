"""Runs of benchmarks are read, put into a page and compared; what makes two hard to compare is said."""

import copy
import json

import pytest
from typer.testing import CliRunner

from benchmarks import summary
from benchmarks.__main__ import app

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "load_average": [0.1, 0.1, 0.1],
    "backend": "cpu",
    "python": "3.11.7",
    "versions": {"jax": "0.10.2"},
}


def clocks(seconds, ratio):
    return {name: {"median_s": seconds, "quartiles_s": [seconds, seconds], "ratio_to_bare": ratio} for name in CLOCKS}


CLOCKS = ("wall", "host")
VARIANTS = {"bare jax.jit": clocks(1e-3, 1.0), "nnx_core.jit": clocks(1.05e-3, 1.05)}
CONTENTS = {
    "core": {
        "benchmark": "core",
        "machine": MACHINE,
        "figures": [
            {"figure": "split / flax.nnx", "found": 0.02, "goal": 0.15, "met": True},
            {"figure": "  its floor", "found": 0.01, "goal": None, "met": None},
        ],
    },
    "dispatch": {
        "benchmark": "dispatch",
        "machine": MACHINE,
        "layers": {"3": {"variants": VARIANTS}, "50": {"variants": VARIANTS}},
        "plain_arrays": VARIANTS,
    },
    "training": {"benchmark": "training", "machine": MACHINE, "models": {"MLP": VARIANTS, "ResNet": VARIANTS}},
    "scale": {
        "benchmark": "scale",
        "machine": MACHINE,
        "figures": [
            {"figure": "100 leaves, seconds", "found": 2.0, "goal": None, "met": None},
            {"figure": "  peak memory", "found": 3.0, "goal": 1.5, "met": False},
            {"figure": "1000 leaves, seconds", "found": 9.0, "goal": None, "met": None},
            {"figure": "  peak memory", "found": 1.0, "goal": 1.5, "met": True},
        ],
        "runs": [{"what": "leaves", "count": 100, "seconds": 2.0}, {"what": "one leaf", "count": 9, "seconds": 1.0}],
    },
}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "old", CONTENTS)


def write(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_page_has_every_figure_its_goal_and_the_machine(folder):
    contents = summary.read(folder)
    page = summary.markdown(contents, summary.plot(contents, folder))
    assert "- a processor, 2 cores, cpu; Python 3.11.7, jax 0.10.2\n" in page
    assert page.count("a processor") == 1
    assert "| split / flax.nnx | 0.020 | 0.15 |" in page
    assert "| nnx_core.jit / bare jax.jit, 50 layers | 1.050 |  |" in page
    assert "| 100 leaves, seconds, peak memory | 3.000 | 1.5 (missed) |" in page
    assert "| 1000 leaves, seconds, peak memory | 1.000 | 1.5 |" in page
    for name in ("dispatch", "training", "leaves"):
        assert f"]({name}.svg)" in page
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_two_runs_are_laid_side_by_side(folder, tmp_path):
    contents = copy.deepcopy(CONTENTS)
    contents["core"]["figures"][0]["found"] = 0.03
    contents["core"]["figures"].pop()
    contents["training"]["models"]["Transformer"] = VARIANTS
    contents["dispatch"]["machine"] = {**MACHINE, "load_average": [7.0, 7.0, 7.0], "processor": "another"}
    new = write(tmp_path / "new", contents)
    rows = {row.figure: row for row in summary.compare(summary.read(folder), summary.read(new))}
    assert rows["core: split / flax.nnx"].change == pytest.approx(1.5)
    assert rows["core: split / flax.nnx, its floor"][1:] == (0.01, None)
    assert rows["training: nnx_core.jit / bare jax.jit, Transformer"].old is None

    result = CliRunner().invoke(app, ["compare", str(folder), str(new)], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "1.50" in result.output
    assert "Not the same machine" in result.output
    assert "new, dispatch: Busy machine, load 7.0" in result.output


def test_what_no_benchmark_wrote_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no JSON file of a benchmark"):
        summary.read(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: expected what `python -m benchmarks NAME --json FILE` writes"):
        summary.read(tmp_path)
    assert CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)]).exit_code == 2


def test_a_benchmark_that_fails_is_named_and_the_others_are_there(folder, monkeypatch):
    monkeypatch.setitem(summary.RUNS, "core", ((), ("--layers", "none")))
    result = CliRunner().invoke(app, ["all", str(folder), "--quick", "--only", "core"])
    assert result.exit_code == 1
    assert "Failed: core" in result.output
    assert (folder / "README.md").exists()
    assert CliRunner().invoke(app, ["all", str(folder), "--only", "sleep"]).exit_code == 2
