"""The benchmark of conversions runs whole, and in memory nothing is copied; times are not tested."""

import json
import types

import numpy as np
import pytest

from benchmarks import checkpoint
from benchmarks.__main__ import app
from benchmarks.figures import Figure, busy
from tests.support.forked import run_forked

MODULE = "import runpy; runpy.run_module('benchmarks.checkpoint', run_name='__main__')"


@pytest.mark.parametrize("forks", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_the_command_prints_every_figure_and_writes_json(tmp_path, forks, monkeypatch, capsys):
    if forks:  # its runs are processes of their own here too, but share what importing costs
        run = types.SimpleNamespace(run=lambda command, **_: run_forked(MODULE, *command[3:]))
        monkeypatch.setattr(checkpoint, "subprocess", run)
    out = tmp_path / "new" / "checkpoint.json"
    small = ["--size", "4", "--leaves", "14", "--memory", "1", "--repeats", "1", "--folder", str(tmp_path)]
    app(["checkpoint", *small, "--json", str(out)], standalone_mode=False)
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    figures = {row["figure"]: row for row in written["figures"]}
    assert {name: row["goal"] for name, row in figures.items() if row["goal"] is not None} == {
        "Linen -> NNX, time / Orbax restore + save": 1.3,
        "Linen -> NNX, peak memory / --max-memory": 1.5,
        "NNX -> Linen, time / Orbax restore + save": 1.3,
        "NNX -> Linen, peak memory / --max-memory": 1.5,
        "leaves copied by a conversion in memory": 0,
    }
    assert figures["leaves copied by a conversion in memory"]["met"]
    assert all(name in printed for name in figures)
    assert [run["variant"] for run in written["runs"]] == ["orbax", *["to_nnx", "to_linen"] * 2, "in_memory"]
    assert all(run["seconds"] > 0 for run in written["runs"][:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.slow
def test_a_failing_run_says_what_failed(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)to_nnx.*failed:.*no checkpoint"):
        checkpoint._run("to_nnx", tmp_path / "no", tmp_path / "out", 1 << 20, 0)


def test_peak_memory_is_that_of_the_work():
    found = checkpoint.measured(lambda: np.ones(64 << 20, np.uint8).sum())
    assert 60 << 20 <= found["peak"] < 80 << 20
    assert found["seconds"] > 0


def test_a_busy_machine_is_said_to_be():
    assert busy({"load_average": (0.5, 0, 0), "cores": 2}) is None
    assert "load 2.5 on 2 cores" in busy({"load_average": (2.5, 0, 0), "cores": 2})


def test_goals_are_upper_bounds():
    assert [Figure("a", 1.0, goal).met for goal in (None, 0.9, 1.0)] == [None, False, True]
