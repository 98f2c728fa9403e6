"""`linen-nnx inspect` as its users meet it: words in, text and an exit code out."""

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from bridge._errors import CheckpointNotFoundError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with ocp.CheckpointManager(path) as manager:
        for step in (3, 12):
            tree = {
                "step": jnp.int32(step),
                "params": {"Dense_0": {"kernel": jnp.ones((300, 4)), "[bold]b/c": jnp.ones(step)}},
                "batch_stats": {"BatchNorm_0": {"mean": jnp.ones(4)}},
                "opt_state": [{"mu": {"Dense_0": {"kernel": jnp.ones((300, 4))}}}, None],
            }
            manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        manager.wait_until_finished()
    return path


def test_tables(saved, run):
    code, out, err = run("inspect", saved)
    rows = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["params/Dense_0/kernel", "(300,", "4)", "float32", "4.7", "KiB", "params"] in rows
    assert ["params/Dense_0/'[bold]b/c'", "(12,)", "float32", "48", "B", "params"] in rows
    assert ["opt_state/0/mu/Dense_0/kernel", "(300,", "4)", "float32", "4.7", "KiB", "opt_state"] in rows
    assert ["step", "()", "int32", "4", "B", "step"] in rows
    assert ["params", "2", "4.7", "KiB"] in rows
    assert ["batch_stats", "1", "16", "B"] in rows
    assert ["total", "5", "9.4", "KiB"] in rows
    assert "layout: Linen TrainState (the top-level keys are batch_stats, opt_state, params, step)" in out
    assert f"checkpoint: {saved}/12/default" in out
    assert "step: 12" in out


def test_json(saved, run):
    code, out, _ = run("inspect", saved, "--step", "3", "--item", "default", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["step"], found["item"], found["layout"]) == (3, "default", "Linen TrainState")
    assert {
        "path": ["params", "Dense_0", "[bold]b/c"],
        "shape": [3],
        "dtype": "float32",
        "nbytes": 12,
        "collection": "params",
    } in found["leaves"]
    assert found["empty"] == [["opt_state", "1"]]
    assert found["collections"]["params"] == {"leaves": 2, "nbytes": 4812}
    assert found["nbytes"] == sum(leaf["nbytes"] for leaf in found["leaves"])


def test_long_paths_are_not_cut_in_a_pipe(tmp_path, run):
    name = "a_very_long_module_name_" * 12
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ck", {"params": {name: {"kernel": jnp.ones(2)}}})
    _, out, _ = run("inspect", tmp_path / "ck")
    assert f"params/{name}/kernel " in out


def test_boxes_are_mentioned(tmp_path, run):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ck", {"params": {"D": {"kernel": {"value": jnp.ones(2)}, "bias": jnp.ones(1)}}})
    assert "boxes: 1 paths end in a lone 'value'" in run("inspect", tmp_path / "ck")[1]


def test_errors_are_text_and_exit_code_1(saved, tmp_path, run):
    code, out, err = run("inspect", tmp_path / "nothing")
    assert (code, out) == (1, "")
    assert err.startswith("error: no checkpoint: ")
    assert "expected: a checkpoint\n  found: nothing at this path" in err
    assert "Traceback" not in err
    code, _, err = run("inspect", saved, "--step", "4")
    assert code == 1
    assert "found: 3, 12" in err


def test_a_truncated_checkpoint_is_one_clean_error(saved, tmp_path, run):
    import shutil

    copy = shutil.copytree(saved / "12" / "default", tmp_path / "copy")
    (file,) = (copy / "d").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    code, out, err = run("inspect", copy)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: the checkpoint is damaged: {copy}\n  expected: the array ")
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(
    "words", [(), ("inspect",), ("inspect", "x", "--step", "one"), ("inspect", "x", "--no"), ("no",)]
)
def test_wrong_usage_is_exit_code_2(words, run):
    code, out, err = run(*words)
    assert code == 2
    assert "Usage: linen-nnx" in out + err


def fake_demo(monkeypatch, function):
    module = types.ModuleType("bridge.demo.run")
    module.main = function
    package = types.ModuleType("bridge.demo")
    package.run = module
    monkeypatch.setitem(sys.modules, "bridge.demo", package)
    monkeypatch.setitem(sys.modules, "bridge.demo.run", module)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_demo_passes_options_on_and_its_exit_code_back(result, code, monkeypatch, run, tmp_path):
    calls = []
    fake_demo(monkeypatch, lambda **options: calls.append(options) or result)
    assert run("demo", "--out", tmp_path, "--seed", "7", "--quiet")[0] == code
    assert run("demo")[0] == code
    assert calls[0] == {"out": tmp_path, "seed": 7, "quiet": True}
    assert str(calls[1]["out"]) == "linen-nnx-demo"
    assert (calls[1]["seed"], calls[1]["quiet"]) == (0, False)


def test_demo_shows_bridge_errors_as_text(monkeypatch, run):
    def fail(**options):
        raise CheckpointNotFoundError("gone", "/x", expected="a", found="b")

    fake_demo(monkeypatch, fail)
    code, _, err = run("demo")
    assert (code, err) == (1, "error: gone: /x\n  expected: a\n  found: b\n")


def test_demo_without_its_extra_says_what_to_install(monkeypatch, run):
    class Gone(types.ModuleType):
        def __getattr__(self, name):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setitem(sys.modules, "bridge.demo", Gone("bridge.demo"))
    code, _, err = run("demo")
    assert code == 1
    assert "pip install 'linen-nnx-bridge[demo]'" in err


@pytest.mark.slow
def test_inspect_imports_no_more_than_it_needs(saved):
    """The package `bridge` may import flax by itself; the command adds neither orbax nor scikit-learn."""
    code = (
        "import sys; from bridge import cli\n"
        "try: cli.main(['inspect', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "print(*[name for name in ('orbax.checkpoint', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
