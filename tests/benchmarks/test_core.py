"""The benchmark of nnx_core's operations runs, and its counts are right; times are not tested."""

import json

import pytest

from benchmarks import core
from benchmarks.__main__ import app
from benchmarks.figures import Figure


@pytest.mark.slow
@pytest.mark.parametrize("imports", [False, pytest.param(True, marks=pytest.mark.grid)])
def test_the_command_writes_every_figure(tmp_path, imports, monkeypatch):
    if not imports:  # which compiles all of jax's source, twice
        monkeypatch.setattr(core, "importing", lambda rounds: Figure("import nnx_core / import jax", 1.0, 1.15))
    out = tmp_path / "core.json"
    app(["core", "--repeats", "1", "--layers", "2", "--json", str(out)], standalone_mode=False)
    found = {row["figure"]: row["found"] for row in json.loads(out.read_text())["figures"]}
    assert len(found) == 15
    assert all(value > 0 for name, value in found.items() if not name.startswith("recompilations"))


def test_no_transform_traces_twice():
    assert core.recompilations().value == 0


def test_a_donated_step_needs_no_more_memory_than_bare_jit():
    assert core.donation(layers=3).met
