"""The benchmark of whole models runs, and all variants compute the same; times are not tested."""

import json

import pytest

from benchmarks import training
from benchmarks.__main__ import app


@pytest.mark.slow
def test_the_command_compares_losses_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MODELS", {"MLP": training.mlp})
    out = tmp_path / "training.json"
    app(
        ["training", "--size", "4", "--batch", "2", "--repeats", "1", "--calls", "1", "--json", str(out)],
        standalone_mode=False,
    )
    (variants,) = json.loads(out.read_text())["models"].values()
    assert len(variants) == 6
    assert all(clock["median_s"] > 0 for clocks in variants.values() for clock in clocks.values())


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("name", ["ResNet", "Transformer"])
def test_all_variants_of_a_model_compute_the_same_losses(name):
    from benchmarks.__main__ import _agreeing_losses

    losses = _agreeing_losses(training.variants(training.MODELS[name](4, 2)))
    assert losses[-1] < losses[0]
