"""The benchmark of conversions at scale: what grows is told in proportion; it runs whole, and times are not tested."""

import json

import pytest

from benchmarks import scale
from benchmarks.__main__ import app

MIB = 1 << 20


def run(what, count, seconds, peak):
    return {"what": what, "count": count, "seconds": seconds, "peak": peak, "anon": peak}


def test_growth_is_told_in_proportion():
    runs = [
        run("leaves", 1000, 2.0, 100 * MIB),
        run("leaves", 10_000, 30.0, 500 * MIB),
        run("one leaf", 4096 * MIB, 100.0, 300 * MIB),
        run("processes", 1, 10.0, 128 * MIB),
        run("processes", 2, 6.0, 512 * MIB),
    ]
    found = {figure.name: figure for figure in scale._figures(runs, 256 * MIB)}
    assert found["1000 -> 10000 leaves, time / proportion"].value == 1.5
    assert found["1000 -> 10000 leaves, time / proportion"].met
    assert found["  memory / proportion"].value == 0.5
    assert found["one leaf, 4096 MiB, seconds"].value == 100
    assert found["  peak memory / --max-memory"].value == 300 / 256
    assert found["2 processes, time / that of the first row"].value == 0.6
    assert found["  largest peak memory / --max-memory"].met is False


@pytest.mark.grid
def test_the_command_runs_whole(tmp_path):
    out = tmp_path / "scale.json"
    small = ["--leaves", "6,12", "--large", "1", "--memory", "1", "--processes", "1,2", "--folder", str(tmp_path)]
    app(["scale", *small, "--json", str(out)], standalone_mode=False)
    written = json.loads(out.read_text())
    runs = [(found["what"], found["count"]) for found in written["runs"]]
    assert runs == [
        *[("leaves", 6), ("leaves", 12), ("one leaf", MIB), ("one leaf, transposed", MIB)],
        *[("processes", 1), ("processes", 2)],
    ]
    assert all(found["seconds"] > 0 for found in written["runs"])
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]


def test_a_failing_run_says_what_failed(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)convert.*failed:.*no checkpoint"):
        scale._call("convert", tmp_path / "no", tmp_path / "out", MIB)
