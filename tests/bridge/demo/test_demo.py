"""The demo: that it holds, that it notices when it does not, and that it harms nobody's files."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bridge import cli
from bridge._errors import MissingDependencyError
from bridge.demo import linen_model, outdir, report, run, verdict
from bridge.equivalence.numbers import difference
from bridge.equivalence.report import Parting

REPOSITORY = Path(__file__).parents[3]
EPOCHS = 3  # enough for 95 %, a quarter of the demo's own


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def _off(comparison):
    return [check.name for check in verdict.checks(comparison) if not check.holds]


@dataclasses.dataclass
class Demo:
    """What a short demo printed, and what it computed on the way."""

    out: Path
    status: int = -1
    printed: str = ""
    trained: Any = None  # the TrainState and the losses that led to it
    computed: Any = None  # the same losses, and all figures


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The command, once for all that looks at it."""
    ran = Demo(tmp_path_factory.mktemp("demo") / "out")

    def kept(name, f):
        def call(*arguments, **options):
            setattr(ran, name, f(*arguments, **options))
            return getattr(ran, name)

        return call

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(run, "main", functools.partial(run.main, epochs=EPOCHS))
        patch.setattr(run, "_compute", kept("computed", run._compute))
        patch.setattr(linen_model, "train", kept("trained", linen_model.train))
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", "--out", str(ran.out)])
    ran.status, ran.printed = ended.value.code or 0, printed.getvalue()
    return ran


@pytest.fixture
def computed(demo):
    """Its folder, its training losses, its figures."""
    return demo.out, *demo.computed


@pytest.mark.slow
def test_the_command(demo):
    assert_main_job(demo.out, demo.status, demo.printed)


@pytest.mark.grid
def test_the_command_runs_the_main_job(tmp_path):
    """The README's command as a user types it, at full length; the gate runs it so from the wheel."""
    out = tmp_path / "demo"
    ran = subprocess.run(
        [sys.executable, "-m", "bridge", "demo", "--out", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_main_job(out, ran.returncode, ran.stdout + ran.stderr)


def assert_main_job(out, status, printed):
    assert status == 0, printed
    assert "ToNNX(Linen)" in printed
    assert "native nnx_core" in printed
    assert "ToLinen(native)" in printed
    assert "All 84 figures hold." in printed
    assert "training in Linen" not in printed, "a progress bar without a terminal"
    assert _pixels(out / "demo.png").shape[1] > 1000
    written = json.loads((out / "demo.json").read_text())
    assert written["off"] == []
    assert len(written["figures"]) == 84
    assert float(written["figures"]["Linen: test accuracy"].rstrip("%")) > 95
    assert (out / "checkpoint").is_dir()
    page = (out / "compare.html").read_text()
    assert "<svg" in page
    assert "conv1" in page


def test_every_figure_holds(computed):
    _, losses, comparison = computed
    assert _off(comparison) == []
    assert comparison.losses().bit_equal
    assert comparison.native_continued.step == len(losses) + run.STEPS_AFTER
    assert [len(gaps) for gaps in comparison.states().values()] == [11, 4, 24]
    assert all(np.abs(g).max() > 0 for g in comparison.linen.gradients.values()), "a gradient that says nothing"


def _nudged(tensors, path):
    """The same arrays, one element of one of them moved by one unit in the last place."""
    array = tensors[path].copy()
    array.flat[0] = np.nextafter(array.flat[0], np.float32(np.inf))
    return {**tensors, path: array}


def test_one_ulp_in_any_figure_is_off_and_named(computed):
    _, _, good = computed
    native = good.others[1]
    logits = native.logits.copy()
    logits[7, 3] = np.nextafter(logits[7, 3], np.float32(np.inf))
    kernel = ("Conv_1", "kernel")
    gradients = _nudged(native.gradients, kernel)
    for name, broken in {
        "native nnx_core: logits": dataclasses.replace(native, logits=logits),
        "native nnx_core: gradient of Conv_1/kernel": dataclasses.replace(native, gradients=gradients),
    }.items():
        sides = (good.others[0], broken, good.others[2])
        assert _off(dataclasses.replace(good, others=sides)) == [f"{name}: max |difference| from Linen"]

    ours = good.native_continued
    losses = ours.losses.copy()
    losses[19] = np.nextafter(losses[19], np.float32(np.inf))
    mu = ("0", "mu", "Dense_1", "bias")
    for name, broken in {
        "losses of 20 more steps": {"losses": losses},
        "params/Conv_1/kernel after 20 more steps": {"params": _nudged(ours.params, kernel)},
        "batch_stats/BatchNorm_0/mean after 20 more steps": {
            "batch_stats": _nudged(ours.batch_stats, ("BatchNorm_0", "mean"))
        },
        "opt_state/0/mu/Dense_1/bias after 20 more steps": {"opt_state": _nudged(ours.opt_state, mu)},
    }.items():
        found = _off(dataclasses.replace(good, native_continued=dataclasses.replace(ours, **broken)))
        assert found == [f"native nnx_core: {name}: max |difference| from Linen"]
    late = dataclasses.replace(good, native_continued=dataclasses.replace(ours, step=ours.step + 1))
    assert _off(late) == ["native nnx_core: step after 20 more steps"]


def test_every_way_was_compared_layer_by_layer(computed):
    _, _, comparison = computed
    assert list(comparison.reports) == ["ToNNX(Linen)", "native nnx_core", "ToLinen(native)"]
    for compared in comparison.reports.values():
        kinds = {finding.what for finding in compared.findings}
        assert kinds >= {"output", "gradient", "parameter", "state"}
        assert len(compared.rows) >= 7
        assert {row.verdict for row in compared.rows} == {"equal"}


def test_a_layer_that_is_off_is_named(computed):
    _, _, good = computed
    native = good.reports["native nnx_core"]
    findings = (dataclasses.replace(native.findings[0], equal=False), *native.findings[1:])
    first = Parting("Conv_1", "conv2", "computation", "strides")
    bad = dataclasses.replace(
        good, reports={"native nnx_core": dataclasses.replace(native, findings=findings, first=first)}
    )
    assert _off(bad) == ["native nnx_core: layer by layer"]
    (said,) = [str(check) for check in verdict.checks(bad) if not check.holds]
    assert "first at Conv_1 | conv2: computation, demanded equal, nothing left out" in said


def test_what_was_left_out_is_off(computed):
    _, _, good = computed
    native = dataclasses.replace(good.reports["native nnx_core"], not_compared=("gradients: none",))
    bad = dataclasses.replace(good, reports={"native nnx_core": native})
    (said,) = [str(check) for check in verdict.checks(bad) if not check.holds]
    assert "1 left out, demanded equal, nothing left out" in said


def test_a_missing_gradient_is_off(computed):
    _, _, good = computed
    wrapped = good.others[0]
    fewer = {path: g for path, g in wrapped.gradients.items() if path != ("Dense_1", "bias")}
    sides = (dataclasses.replace(wrapped, gradients=fewer), *good.others[1:])
    assert _off(dataclasses.replace(good, others=sides)) == [
        "ToNNX(Linen): gradient of Dense_1/bias: max |difference| from Linen"
    ]


def test_a_model_that_learned_nothing_is_off(computed):
    _, _, good = computed
    flat = dataclasses.replace(good.linen, logits=np.zeros_like(good.linen.logits))
    names = _off(dataclasses.replace(good, linen=flat))
    assert names[0] == "Linen: test accuracy"


@pytest.mark.slow
def test_a_perturbed_weight_on_disk_makes_the_exit_code_1_and_is_named(demo, tmp_path, monkeypatch, capsys):
    save = linen_model.save

    def save_perturbed(state, directory):
        bias = state.params["Dense_1"]["bias"].at[0].add(1e-3)
        params = {**state.params, "Dense_1": {**state.params["Dense_1"], "bias": bias}}
        save(state.replace(params=params), directory)

    monkeypatch.setattr(linen_model, "train", lambda *_, **__: demo.trained)  # as it was trained before
    monkeypatch.setattr(linen_model, "save", save_perturbed)
    assert run.main(tmp_path / "out", seed=0, quiet=True, epochs=EPOCHS) == 1
    said = capsys.readouterr().out
    for side in ("ToNNX(Linen)", "native nnx_core", "ToLinen(native)"):
        assert f"{side}: logits: max |difference| from Linen: found 1.0e-03, demanded exactly 0.0" in said
        assert f"{side}: gradient of Dense_1/kernel: max |difference| from Linen: found" in said
    assert "All" not in said
    off = json.loads((tmp_path / "out" / "demo.json").read_text())["off"]
    assert any(line.startswith("native nnx_core: logits") for line in off)


@pytest.mark.slow
def test_the_figure_and_tables_show_a_difference(computed, tmp_path):
    _, losses, good = computed
    native = good.others[1]
    shifted = dataclasses.replace(native, gradients={p: g + np.float32(0.5) for p, g in native.gradients.items()})
    bad = dataclasses.replace(good, others=(good.others[0], shifted, good.others[2]))
    report.draw(tmp_path / "good.png", losses, good)
    report.draw(tmp_path / "bad.png", losses, bad)
    assert (_pixels(tmp_path / "good.png") != _pixels(tmp_path / "bad.png")).any()
    text = io.StringIO()
    report.show(Console(file=text, width=100), bad)
    assert "5.0e-01" in text.getvalue()
    assert "0.0" in text.getvalue()


@pytest.mark.parametrize(
    ("found", "expected", "shown"),
    [
        (np.float32([1, 2]), np.float32([1, 2]), "0.0"),
        (np.float32([1, 2.5]), np.float32([1, 2]), "5.0e-01"),
        (np.float32([0.0]), np.float32([-0.0]), "0.0e+00"),
        (np.float32([np.nan]), np.float32([1]), "inf"),
        (np.float32([1, 2]), np.float32([[1, 2]]), "float32[2], expected float32[1, 2]"),
        (np.float32([1]), np.float64([1]), "float32[1], expected float64[1]"),
        (np.uint32([3]), np.uint32([4]), "1.0e+00"),
    ],
)
def test_difference_is_zero_only_if_every_bit_is_equal(found, expected, shown):
    gap = difference(found, expected)
    assert (verdict.shown(gap), gap.bit_equal) == (shown, shown == "0.0")


class TestOutDir:
    def write_demo(self, out):
        outdir.prepare(out)
        (out / "checkpoint" / "d").mkdir(parents=True)
        (out / "checkpoint" / "d" / "data").write_text("1")
        (out / "demo.png").write_text("png")
        (out / "compare.html").write_text("page")
        outdir.record(out, {"seed": 0})

    def test_a_second_run_replaces_what_the_first_wrote_and_nothing_else(self, tmp_path):
        self.write_demo(tmp_path)
        (tmp_path / "mine.txt").write_text("mine")
        outdir.prepare(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("name", ["checkpoint/d/mine", "checkpoint/mine/deep"])
    def test_a_foreign_file_among_ours_stops_it_before_anything_is_removed(self, tmp_path, name):
        self.write_demo(tmp_path)
        foreign = tmp_path / name
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(outdir.OutDirError, match=rf"(?s){foreign}.*no earlier demo recorded.*--out"):
            outdir.prepare(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("name", ["checkpoint/x", "demo.png", "compare.html"])
    def test_names_of_ours_that_are_not_ours(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(outdir.OutDirError, match="no earlier demo recorded"):
            outdir.prepare(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"by": "someone"}'])
    def test_a_record_of_something_else(self, tmp_path, text):
        (tmp_path / "demo.json").write_text(text)
        with pytest.raises(outdir.OutDirError, match="no record of a demo"):
            outdir.prepare(tmp_path)
        assert (tmp_path / "demo.json").read_text() == text

    def test_a_record_cannot_name_files_elsewhere(self, tmp_path):
        outside = tmp_path / "outside.txt"
        outside.write_text("mine")
        out = tmp_path / "out"
        out.mkdir()
        files = ["../outside.txt", "checkpoint/../../outside.txt", str(outside), "notes.txt", "demo.json"]
        (out / "demo.json").write_text(json.dumps({"by": "linen-nnx demo", "files": files}))
        (out / "notes.txt").write_text("mine")
        outdir.prepare(out)
        assert outside.exists()
        assert (out / "notes.txt").exists()
        assert not (out / "demo.json").exists()

    def test_links_are_not_followed(self, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "weights").write_text("mine")
        out = tmp_path / "out"
        out.mkdir()
        (out / "checkpoint").symlink_to(elsewhere)
        with pytest.raises(outdir.OutDirError, match="no earlier demo recorded"):
            outdir.prepare(out)
        assert (elsewhere / "weights").exists()

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(outdir.OutDirError, match="found: a file"):
            run.main(tmp_path / "out")


def test_missing_extras_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    hint = r"(?s)scikit-learn.*pip install 'linen-nnx-bridge\[demo\]'"
    with pytest.raises(MissingDependencyError, match=hint):
        run.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
