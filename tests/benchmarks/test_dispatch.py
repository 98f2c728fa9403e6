"""The dispatch benchmark: that its variants agree and its report is whole. Never how fast anything is."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dispatch, timing
from benchmarks.timing import Timing, Timings
from tests.tolerance import assert_trees_close

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_variants_compute_the_same_losses():
    losses = dispatch.losses(dispatch.start(dispatch.problem(2)), steps=4)
    found = {name: np.float32(each) for name, each in losses.items()}
    assert set(found) == {
        "bare jax.jit",
        "nnx_core.jit",
        "flax.nnx.jit",
        "flax.nnx.jit(graph=False)",
        "Linen TrainState",
    }
    assert_trees_close(found, dict.fromkeys(found, found[dispatch.BARE]))
    assert found[dispatch.BARE][-1] < found[dispatch.BARE][0], "nothing was learned"


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "new" / "dispatch.json"
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "benchmarks",
            "dispatch",
            "--layers",
            "2",
            "--repeats",
            "2",
            "--calls",
            "1",
            "--json",
            str(file),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in dispatch.VARIANTS)
    assert "nnx_core.jit / bare jax.jit <= 1.1, 50 layers: not measured" in ran.stdout
    written = json.loads(file.read_text())
    assert written["machine"]["versions"]["jax"]
    assert written["machine"]["cores"] >= 1
    assert [goal["met"] for goal in written["goals"]] == [None, None]
    depth = written["layers"]["2"]
    assert len(depth["losses"]) == 5
    assert set(depth["variants"]) == set(dispatch.VARIANTS)
    assert set(written["plain_arrays"]) == set(dispatch.IN_GOALS)
    assert ran.stdout.count("100 arrays") == 3
    for variant in (*depth["variants"].values(), *written["plain_arrays"].values()):
        assert set(variant) == {"wall", "host"}
        for clock in variant.values():
            assert clock["median_s"] > 0
            assert clock["ratio_to_bare"] > 0
    assert depth["variants"][dispatch.BARE]["wall"]["ratio_to_bare"] == 1.0


def test_deep_networks_have_fewer_variants_and_calls(monkeypatch):
    monkeypatch.setattr(dispatch, "DEEP", 1)
    assert list(dispatch.start(dispatch.problem(2))) == list(dispatch.IN_GOALS)
    assert [dispatch.calls_at(layers, 10) for layers in (10, 50, 200, 1000)] == [10, 10, 2, 1]


@pytest.mark.parametrize("text", ["", "3,x", "0", "3,-1"])
def test_layers_must_be_positive_numbers(text):
    with pytest.raises(ValueError, match="--layers takes positive numbers with commas between"):
        dispatch.parse_layers(text)


def test_goals_are_met_missed_or_not_measured():
    at_50 = {dispatch.BARE: 1.0, dispatch.CORE: 1.0625, dispatch.FLAX: 8.5}
    measured = {50: {name: Timings(Timing((t,) * 3), Timing((2 * t,))) for name, t in at_50.items()}}
    rows = dispatch.goals(measured)
    assert [(row["met"], row["ratio"], row["host_ratio"]) for row in rows] == [
        (True, 1.0625, 1.0625),
        (False, 8.0, 8.0),
    ]
    assert [row["met"] for row in dispatch.goals({3: measured[50]})] == [None, None]


def test_the_timer_runs_every_variant_in_every_round_with_the_collector_off():
    calls, collector_on = [], []

    def variant(name):
        def step():
            calls.append(name)
            collector_on.append(gc.isenabled())
            return np.zeros(())

        return step

    rounds = []
    timings = timing.interleaved(
        {name: variant(name) for name in "abc"},
        rounds=8,
        calls=2,
        warmup=1,
        on_round=lambda: rounds.append(len(calls)),
    )
    assert calls[:3] == ["a", "b", "c"], "each is warmed up first"
    in_rounds = [calls[3 + 9 * i : 12 + 9 * i] for i in range(8)]  # one call that is not timed, and two that are
    assert all(sorted(names) == list("aaabbbccc") for names in in_rounds)
    assert all(names[i] == names[i + 1] == names[i + 2] for names in in_rounds for i in (0, 3, 6))
    assert len({tuple(names) for names in in_rounds}) > 1, "the order never changed"
    assert rounds == [12 + 9 * i for i in range(8)]
    assert not any(collector_on[3:])
    assert gc.isenabled()
    clocks = [clock for timing in timings.values() for clock in (timing.wall, timing.host)]
    assert all(len(t.seconds) == 8 and t.quartiles[0] <= t.median <= t.quartiles[1] for t in clocks)


def test_the_timer_turns_the_collector_on_again_after_an_error():
    calls = []

    def fails_when_timed():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        timing.interleaved({"a": fails_when_timed}, rounds=1, calls=1, warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize(("rounds", "calls"), [(0, 1), (1, 0)])
def test_the_timer_wants_at_least_one_round_and_call(rounds, calls):
    with pytest.raises(ValueError, match=f"at least 1, got rounds={rounds}, calls={calls}"):
        timing.interleaved({}, rounds=rounds, calls=calls)


def test_ratios_are_paired_by_round():
    """A round that is slow for all does not move the ratio."""
    base, other = Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 2.0))
    assert other.ratio_to(base) == 2.0
