"""The benchmark of nnx_core's operations runs, and its counts are right; times are not tested."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import core

REPOSITORY = Path(__file__).parents[2]


def test_the_command_writes_every_figure(tmp_path):
    out = tmp_path / "core.json"
    command = [sys.executable, "-m", "benchmarks", "core", "--repeats", "1", "--layers", "2", "--json", str(out)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = {row["figure"]: row["found"] for row in json.loads(out.read_text())["figures"]}
    assert len(found) == 13
    assert all(value > 0 for name, value in found.items() if not name.startswith("retraces"))


def test_no_transform_traces_twice():
    assert core.retraces().value == 0


def test_a_donated_step_needs_no_more_memory_than_bare_jit():
    assert core.donation(layers=3).met
