"""The accelerator run: every part is in its result, or said not to be; a difference is one. Times are not tested."""

import json
import types
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer

import nnx_core as nnx
from benchmarks import __main__ as command
from benchmarks import accelerator, checkpoint
from benchmarks.figures import Figure
from benchmarks.small_models import small_models
from tests.support.forked import run_forked
from tests.tolerance import assert_trees_close

CONVERSION = "import runpy; runpy.run_module('benchmarks.checkpoint', run_name='__main__')"
PARTS = ("models", "wrappers", "layers", "dispatch", "checkpoint", "bridge")
SMALL = accelerator.Options(limit=3600, size=1 << 20, repeats=1, depth=2)
NO_TIME = accelerator.Options(limit=-1, size=1 << 20, repeats=1, depth=2)


@dataclass
class Scaled:
    """A layer that multiplies, by another number than its twin if it is told so."""

    name: str
    factor: float = 2.0
    twin_factor: float = 2.0
    modes: dict = field(default_factory=lambda: {True: {}, False: {}})

    def variables(self):
        return {"scale": jnp.arange(1.0, 4.0)}

    def example(self):
        return jnp.ones((2, 3))

    def functional(self, *, train):
        return lambda values, x: (self.factor * values["scale"] * x, values)

    def functional_twin(self, *, train):
        return lambda values, x: (self.twin_factor * values["scale"] * x, values)


@pytest.fixture
def quick(monkeypatch):
    """Figures of other benchmarks, which have their own tests."""
    figures = [Figure("a / b", 0.5, 1.0, wall=0.6)]
    monkeypatch.setattr(accelerator.core_benchmark, "training_step", lambda *_: figures)
    monkeypatch.setattr(accelerator.bridge_benchmark, "figures", lambda *_: figures)
    monkeypatch.setattr(accelerator.checkpoint_benchmark, "figures", lambda *_: (figures, []))


@pytest.mark.parametrize("model", small_models(), ids=lambda model: model.name)
def test_the_small_models_are_the_same_twice(model):
    variables = model.variables()
    x = jnp.ones(model.shape.shape, model.shape.dtype)
    expected, written = model.linen.apply(variables, x, mutable=["batch_stats"])
    native = model.in_nnx(variables)
    wrapped = model.wrapped(variables)
    assert_trees_close({"native": native(x), "wrapped": wrapped(x)}, dict.fromkeys(("native", "wrapped"), expected))
    statistics = nnx.state(native, nnx.BatchStat).to_pure_dict()
    assert_trees_close(statistics, dict(written.get("batch_stats", {})))


def test_every_part_is_in_the_result_and_is_saved_at_once(quick):
    saved = []
    layers = [Scaled("one mode"), Scaled("two", modes={True: {"train": True}, False: {}})]
    result = accelerator.run([], layers, SMALL, lambda _: None, lambda result: saved.append(json.dumps(result)))
    assert set(PARTS) < set(result)
    assert [row["name"] for row in result["layers"]] == ["one mode", "two, training", "two, evaluation"]
    assert all(row["equal"] and row["bit_equal"] for row in result["layers"])
    assert result["layers"][0]["worst"]["gradient"]["ratio"] == 0.0
    assert (result["equal"], result["not_run"]) == (True, [])
    assert [sum(part in json.loads(text) for part in PARTS) for text in saved] == [1, 2, 3, 4, 5, 6]
    assert result["dispatch"] == [{"figure": "a / b", "found": 0.5, "goal": 1.0, "met": True, "wall": 0.6}]
    assert "smaller than the 2 GiB" in result["checkpoint"]["note"]
    backend = jax.default_backend()
    assert result["backend"] == backend
    assert result["tolerances"]["float32"]["measured"] == (backend == "cpu")


def test_what_differs_is_said(quick):
    result = accelerator.run([], [Scaled("right"), Scaled("wrong", twin_factor=2.01)], SMALL, lambda _: None)
    right, wrong = result["layers"]
    assert (right["equal"], wrong["equal"], result["equal"]) == (True, False, False)
    assert wrong["worst"]["output"]["ratio"] > 1
    assert wrong["parts_at"]["cause"] == "computation"


def test_what_fails_or_comes_too_late_is_said(quick, monkeypatch):
    said = []
    late = accelerator.run([], [Scaled("a")], NO_TIME, said.append)
    assert [row["part"] for row in late["not_run"]] == ["layers", "dispatch", "checkpoint", "bridge"]
    assert all(row["reason"].startswith("time: ") for row in late["not_run"])
    assert not late["equal"], "nothing was compared"
    assert len(said) == 4

    monkeypatch.setattr(accelerator.bridge_benchmark, "figures", lambda *_: 1 / 0)
    result = accelerator.run([], [Scaled("a")], SMALL, said.append)
    reason = "ZeroDivisionError: division by zero"
    assert result["not_run"] == [{"part": "bridge", "name": "bridge", "reason": reason}]
    assert result["equal"]
    assert reason in said[-1]


@pytest.mark.parametrize(("twin_factor", "minutes", "code"), [(2.0, "9", 0), (2.01, "9", 3), (2.0, "0", 3)])
def test_the_exit_code_says_whether_all_was_equal(quick, monkeypatch, tmp_path, capsys, twin_factor, minutes, code):
    monkeypatch.setattr(command, "_layer_rows", lambda _: [Scaled("a", twin_factor=twin_factor)])
    monkeypatch.setattr(command, "small_models", list)
    out = tmp_path / "new" / "accelerator.json"
    words = ["accelerator", "--minutes", minutes, "--size", "1", "--json", str(out)]
    assert (command.app(words, standalone_mode=False) or 0) == code
    printed = capsys.readouterr().out
    assert json.loads(out.read_text())["equal"] == (code == 0)
    assert ("DIFFERENT: a" in printed) == (twin_factor == 2.01)
    assert ("NOT RUN" in printed) == (minutes == "0")


def test_layers_are_chosen_by_name():
    assert [layer.name for layer in command._layer_rows("Linear, Conv")] == ["Linear", "Conv"]
    assert len(command._layer_rows("")) > 30
    with pytest.raises(typer.BadParameter, match="no layer Liner; there are Linear, Conv"):
        command._layer_rows("Liner")


@pytest.mark.slow
def test_a_small_run_of_all_that_is_real(tmp_path, monkeypatch):
    run = types.SimpleNamespace(run=lambda words, **_: run_forked(CONVERSION, *words[3:]))
    monkeypatch.setattr(checkpoint, "subprocess", run)
    monkeypatch.setattr(command, "small_models", lambda: small_models()[:1])
    out = tmp_path / "accelerator.json"
    words = ["--minutes", "60", "--size", "4", "--repeats", "1", "--layers", "2", "--only", "BatchNorm"]
    code = command.app(["accelerator", *words, "--folder", str(tmp_path), "--json", str(out)], standalone_mode=False)
    assert not code
    written = json.loads(out.read_text())
    assert written["not_run"] == []
    assert [len(written[part]) for part in ("models", "wrappers", "layers")] == [1, 2, 2]
    kinds = {"output", "gradient", "state", "parameter", "loss", "trained parameter", "optimizer state"}
    assert set(written["models"][0]["worst"]) == kinds
    figures = [*written["dispatch"], *written["bridge"], *written["checkpoint"]["figures"]]
    assert len(figures) > 20
    assert all(np.isfinite(row["found"]) for row in figures)
