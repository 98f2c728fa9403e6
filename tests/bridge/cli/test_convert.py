"""`linen-nnx convert` as its users meet it: words in, tables or JSON and an exit code out."""

import importlib
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.formats.open import FORMATS, SINK_FORMATS
from bridge.checkpoint.formats.orbax.read import OrbaxSource
from bridge.checkpoint.tree.layout import Kind
from bridge.cli.convert import LayoutName, SourceFormat, TargetFormat
from tests.support import checkpoint_run
from tests.support.forked import run_forked
from tests.tolerance import assert_trees_equal

HERE = "tests.support.checkpoint_run"
CONVERT = "bridge.checkpoint.conversion"


class Wider(checkpoint_run.Native):
    """The NNX module of another run."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.first = nnx.Linear(5, 9, rngs=rngs)


class Noisy(nnx.Module):
    """With random streams of its own."""

    def __init__(self, rngs):
        self.first, self.drop = nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


class SwitchedLinen(checkpoint_run.Net):
    """With a flag that has no default, as most have."""

    @nn.compact
    def __call__(self, x, *, train):
        assert train is False
        return super().__call__(x)


class Switched(checkpoint_run.Native):
    """The same in NNX."""

    def __call__(self, x, *, train):
        assert train is False
        return super().__call__(x)


def says_no(source, target):
    return False


def asserts(source, target):
    assert source == target, "they differ"


def breaks(source, target):
    raise KeyError("logits")


def both_are_there(source, target):
    return source.exists() and target.exists()


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    return checkpoint_run.save(checkpoint_run.linen_state(3), tmp_path_factory.mktemp("linen") / "ck", "orbax")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return checkpoint_run.save(checkpoint_run.native_state(3), tmp_path_factory.mktemp("nnx") / "ck", "orbax")


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(checkpoint_run.RULES)
    return file


@pytest.mark.slow
def test_a_conversion_says_what_it_found_and_did(linen, rules, tmp_path, run):
    code, out, err = run("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules)
    assert (code, err) == (0, "")  # no progress bar: this is no terminal
    assert f"checkpoint: {linen}" in out
    assert "format: orbax (_METADATA lists the arrays" in out
    assert "layout: Linen TrainState (the top-level keys are step, params, opt_state, batch_stats)" in out
    assert f"target: {tmp_path / 'out'} (orbax, NNX model and optimizer)" in out
    assert "23 leaves" in out
    assert f"written and verified: {tmp_path / 'out'} in " in out
    found = checkpoint_run.continued_in_nnx(checkpoint_run.load(tmp_path / "out", "orbax"), 2)
    assert_trees_equal(found, checkpoint_run.flat(checkpoint_run.native_state(5)))


def test_rules_are_derived_from_both_models(linen, tmp_path, run):
    words = ("--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5:float32")
    code, _, err = run("convert", linen, tmp_path / "out", "--to", "nnx", *words)
    assert (code, err) == (0, "")
    found = checkpoint_run.continued_in_nnx(checkpoint_run.load(tmp_path / "out", "orbax"), 2)
    assert_trees_equal(found, checkpoint_run.flat(checkpoint_run.native_state(5)))


@pytest.mark.slow
def test_derived_rules_are_kept_and_serve_both_ways(linen, tmp_path, run):
    file, words = tmp_path / "derived.toml", ("--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5")
    assert run("convert", linen, tmp_path / "there", "--to", "nnx", *words, "--save-rules", file, "--quiet")[0] == 0
    assert run("diff", linen, tmp_path / "there", "--rules", file)[0] == 0
    code, out, _ = run("diff", linen, tmp_path / "there")
    assert code == 1
    assert "--save-rules" in out
    back = ("convert", tmp_path / "there", tmp_path / "back", "--to", "linen", "--rules", file, "--inverse", "--quiet")
    assert run(*back) == (0, "", "")
    found = checkpoint_run.continued_in_linen(checkpoint_run.load(tmp_path / "back", "orbax"), 2)
    assert_trees_equal(found, checkpoint_run.flat(checkpoint_run.linen_state(5)))
    assert run("convert", linen, tmp_path / "more", "--to", "nnx", *words, "--save-rules", file)[0] == 2  # is there


def test_models_are_called_with_keywords(linen, tmp_path, run):
    words = ("--linen", f"{HERE}:Net", "--nnx", f"{__name__}:Switched", "--input", "8,5")
    assert run("convert", linen, tmp_path / "out", "--to", "nnx", *words, "--dry-run")[0] == 2
    words = ("--linen", f"{__name__}:SwitchedLinen", *words[2:], "--keyword", "train=false")
    assert run("convert", linen, tmp_path / "out", "--to", "nnx", *words, "--dry-run", "--quiet") == (0, "", "")


def test_rules_are_derived_for_the_way_back_too(ours, tmp_path, run):
    words = ("--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5", "--tx", f"{HERE}:adamw")
    code, _, err = run("convert", ours, tmp_path / "out", "--to", "linen", *words)
    assert (code, err) == (0, "")
    found = checkpoint_run.continued_in_linen(checkpoint_run.load(tmp_path / "out", "orbax"), 2)
    assert_trees_equal(found, checkpoint_run.flat(checkpoint_run.linen_state(5)))


def test_rules_of_the_user_win_over_derived_ones(linen, tmp_path, run):
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nfrom = "params/out/**"\nto = "params/elsewhere/**"\n')
    words = ("--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5", "--rules", file)
    code, out, _ = run("convert", linen, tmp_path / "out", "--to", "nnx", *words, "--json", "--dry-run")
    targets = {"/".join(row["target"]) for row in json.loads(out)["leaves"]}
    assert code == 0
    assert "model/elsewhere/kernel/value" in targets
    assert "model/first/kernel/value" in targets


def test_the_nnx_module_tells_the_collections(ours, tmp_path, run):
    code, _, err = run("convert", ours, tmp_path / "out", "--to", "linen")
    assert code == 1
    assert "does not tell collections" in err
    words = ("--nnx", f"{HERE}:Native", "--tx", f"{HERE}:adamw", "--quiet")
    assert run("convert", ours, tmp_path / "out", "--to", "linen", *words) == (0, "", "")
    assert ("batch_stats", "middle", "mean") in checkpoint_run.load(tmp_path / "out", "orbax")


def test_the_result_must_fit_the_nnx_module(linen, rules, tmp_path, run):
    words = ("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules, "--tx", f"{HERE}:adamw")
    code, _, err = run(*words, "--nnx", f"{__name__}:Wider", "--dry-run")
    assert code == 1
    assert "params/first/kernel: expected (5, 9), found (5, 4)" in err
    assert "opt_state/1/0/mu/first/bias: expected (9,), found (4,)" in err
    assert run(*words, "--nnx", f"{HERE}:Native", "--quiet")[0] == 0
    found = checkpoint_run.continued_in_nnx(checkpoint_run.load(tmp_path / "out", "orbax"), 2)
    assert_trees_equal(found, checkpoint_run.flat(checkpoint_run.native_state(5)))


def test_random_streams_that_linen_has_not_are_made_anew(tmp_path, run):
    params = {"params": {"first": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}}
    source = checkpoint_run.save(params, tmp_path / "in", "orbax")
    words = ("--nnx", f"{__name__}:Noisy", "--rng")
    code, out, _ = run("convert", source, tmp_path / "without", "--to", "nnx", *words, "drop")
    assert code == 0
    assert "random streams of the model are not in the result: " in out
    assert "--rng seed=0 writes new ones" in out
    code, out, _ = run("convert", source, tmp_path / "with", "--to", "nnx", *words, "seed=3")
    assert code == 0
    assert "random streams of the model" not in out
    streams = [path for path in checkpoint_run.load(tmp_path / "with", "orbax") if "rngs" in path]
    assert streams
    assert not any("rngs" in path for path in checkpoint_run.load(tmp_path / "without", "orbax"))


@pytest.mark.parametrize("name", ["says_no", "asserts", "breaks"])
def test_a_check_of_the_users_that_fails_is_exit_code_3(name, linen, rules, tmp_path, run):
    words = (
        "convert",
        linen,
        tmp_path / "out",
        "--to",
        "nnx",
        "--rules",
        rules,
        "--verify-forward",
        f"{__name__}:{name}",
    )
    code, _, err = run(*words)
    assert code == 3
    assert f"the check {__name__}:{name} " in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed-verification").exists()


def test_a_check_of_the_users_that_passes(linen, rules, tmp_path, run):
    words = ("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules)
    assert run(*words, "--verify-forward", f"{__name__}:both_are_there", "--quiet") == (0, "", "")


# ---- dry run and JSON --------------------------------------------------------------------------------------


def test_a_dry_run_is_a_table_and_reads_no_array(linen, rules, tmp_path, run, monkeypatch):
    monkeypatch.setattr(OrbaxSource, "read", lambda *_: pytest.fail("an array was read"))
    code, out, _ = run("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules, "--dry-run")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["params/dense/kernel", "model/first/kernel/value", "(5,", "4)", "float32", "80", "B"] in rows
    assert any(row[:2] == ["step", "optimizer/step/value"] and "cast" in row for row in rows)
    assert not (tmp_path / "out").exists()


def test_json_is_one_document(linen, rules, tmp_path, run):
    words = ("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules, "--json")
    for dry in (True, False):
        code, out, err = run(*words, *(["--dry-run"] if dry else []))
        found = json.loads(out)
        assert (code, err, found["exit_code"], found["dry_run"]) == (0, "", 0, dry)
        assert set(found) == {
            *("source", "target", "dry_run", "leaves", "dropped", "warnings", "notes", "losses", "unproven", "result"),
            "left_out",
            "exit_code",
        }
        assert found["source"]["format"] == "orbax"
        assert found["source"]["layout"] == "Linen TrainState"
        assert found["target"] == {
            "path": str(tmp_path / "out"),
            "format": "orbax",
            "layout": "NNX model and optimizer",
            "nbytes": sum(row["nbytes"] for row in found["leaves"]),
        }
        assert {
            "target": ["model", "first", "kernel", "value"],
            "sources": [["params", "dense", "kernel"]],
            "shape": [5, 4],
            "dtype": "float32",
            "nbytes": 80,
            "op": "",
        } in found["leaves"]
        assert (found["result"] is None) == dry
    assert found["result"]["verified"] is True
    assert found["result"]["resumed"] == 0


def test_an_error_is_json_too(tmp_path, run):
    code, out, err = run("convert", tmp_path / "no", tmp_path / "out", "--to", "nnx", "--json")
    found = json.loads(out)
    assert (code, found["error"], found["exit_code"]) == (1, "CheckpointNotFoundError", 1)
    assert err == f"error: {found['message']}\n"


# ---- exit codes --------------------------------------------------------------------------------------------

STACK = '[[rule]]\nfrom = "params/layer_(\\\\d+)/w"\nto = "params/layers/w"\nstack = 0\n'


def test_what_would_be_lost_is_exit_code_1_unless_allowed(tmp_path, run):
    params = {f"layer_{i}": {"w": jnp.ones(2)} for i in range(2)}
    slots = [{"count": jnp.int32(1), "mu": params, "nu": params}]
    tree = {"params": params, "step": jnp.int32(1), "opt_state": slots}
    source = checkpoint_run.save(tree, tmp_path / "in", "orbax")
    (tmp_path / "stack.toml").write_text(STACK)
    words = ("convert", source, tmp_path / "out", "--to", "nnx", "--rules", tmp_path / "stack.toml")
    code, out, _ = run(*words, "--dry-run")
    assert code == 1
    assert "warning: " in out
    assert "Exit code 1." in out
    code, out, _ = run(*words, "--dry-run", "--json")
    assert (code, json.loads(out)["exit_code"], len(json.loads(out)["losses"])) == (1, 1, 1)
    code, _, err = run(*words)
    assert (code, (tmp_path / "out").exists()) == (1, False)
    assert "error: the conversion would lose or change something" in err
    assert run(*words, "--lossy")[0] == 0
    assert (tmp_path / "out").exists()


def test_random_streams_are_dropped_kept_or_made_anew(tmp_path, run):
    source = checkpoint_run.save(nnx.state(Noisy(nnx.Rngs(0))), tmp_path / "in", "orbax")
    code, out, _ = run("convert", source, tmp_path / "dropped", "--to", "linen")
    assert code == 0
    assert "dropped: drop/rngs" in out
    assert all("rngs" not in path for path in checkpoint_run.load(tmp_path / "dropped", "orbax"))
    assert run("convert", source, tmp_path / "kept", "--to", "nnx", "--rng", "keep")[0] == 0
    assert run("convert", source, tmp_path / "anew", "--to", "nnx", "--rng", "seed=7")[0] == 0
    kept, anew = (checkpoint_run.load(tmp_path / name, "orbax") for name in ("kept", "anew"))
    (key,) = (path for path in kept if "rngs" in path and "key" in path)
    before = checkpoint_run.load(source, "orbax")
    np.testing.assert_array_equal(jax.random.key_data(kept[key]), jax.random.key_data(before[key]))
    assert not np.array_equal(jax.random.key_data(anew[key]), jax.random.key_data(before[key]))


# ---- what no run has proven --------------------------------------------------------------------------------


class Other(checkpoint_run.Native):
    """With another activation: every name and shape fits."""

    def __call__(self, x):
        return self.readout(nnx.tanh(self.middle(self.first(x))))


UNPROVEN = ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{__name__}:Other", "--input", "8,5")


@pytest.mark.slow
def test_a_mapping_that_is_not_proven_is_refused(linen, tmp_path, run):
    code, out, err = run("convert", linen, tmp_path / "out", *UNPROVEN)
    assert (code, out) == (1, "")
    assert err.startswith("error: the mapping is not proven: ")
    assert "--unproven" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run("convert", linen, tmp_path / "out", *UNPROVEN, "--json")
    assert (code, json.loads(out)["error"], json.loads(out)["exit_code"]) == (1, "UnprovenDerivationError", 1)


@pytest.mark.slow
def test_an_unproven_mapping_that_was_asked_for_says_so_everywhere(linen, tmp_path, run):
    words = (*UNPROVEN, "--unproven")
    code, out, err = run("convert", linen, tmp_path / "dry", *words, "--dry-run")
    assert (code, err, (tmp_path / "dry").exists()) == (4, "", False)
    assert "\nNOT PROVEN: the models do not compute the same" in out
    rules = tmp_path / "rules.toml"
    code, out, err = run("convert", linen, tmp_path / "out", *words, "--save-rules", rules)
    assert (code, err) == (4, "")
    assert out.splitlines()[-1].startswith("NOT PROVEN: before you use it, compare both models")
    assert "# not proven: the models do not compute the same" in rules.read_text()
    assert (tmp_path / "out").exists()
    code, out, _ = run("convert", linen, tmp_path / "json", *words, "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["result"]["verified"]) == (4, 4, True)
    assert found["unproven"].startswith("the models do not compute the same")
    assert run("convert", linen, tmp_path / "quiet", *words, "--quiet")[0] == 4


def test_a_proven_mapping_is_exit_code_0_with_unproven_too(linen, tmp_path, run):
    words = ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5", "--unproven")
    code, out, _ = run("convert", linen, tmp_path / "out", *words, "--json")
    assert (code, json.loads(out)["unproven"], json.loads(out)["exit_code"]) == (0, "", 0)


USAGE = {
    "nothing to prove": (("--to", "nnx", "--unproven"), "--unproven is for rules that are derived"),
    "no --to": ((), "--to"),
    "no such layout": (("--to", "torch"), "torch"),
    "no such format": (("--to", "nnx", "--format", "npz"), "npz"),
    "size": (("--to", "nnx", "--max-memory", "many"), "'many' is not a number of bytes"),
    "no memory": (("--to", "nnx", "--max-memory", "0"), "'0' is not a number of bytes"),
    "rng": (("--to", "nnx", "--rng", "seed"), "'seed' is none of drop, keep, seed=N"),
    "half": (("--to", "nnx", "--linen", f"{HERE}:Net"), "--linen needs --nnx and at least one --input"),
    "input": (("--to", "nnx", "--input", "2,3"), "--input and --keyword are for --linen"),
    "inverse": (("--to", "nnx", "--inverse"), "--inverse needs --rules"),
    "nothing derived": (("--to", "nnx", "--save-rules", "x.toml"), "--save-rules needs --linen"),
    "keyword": (
        ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "2,5", "--keyword", "train"),
        "'train' is no keyword argument",
    ),
    "no check": (("--to", "nnx", "--verify-forward", f"{HERE}:RULES"), "is no function of two paths"),
    "shape": (
        ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "2,x"),
        "'2,x' is not an input",
    ),
    "dtype": (
        ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "2:float33"),
        "'2:float33' is not an input",
    ),
    "module": (("--to", "linen", "--nnx", "no_such_module:Net"), "cannot import 'no_such_module'"),
    "attribute": (("--to", "linen", "--nnx", f"{HERE}:Nativ"), "no 'Nativ' in"),
    "form": (("--to", "linen", "--nnx", "Native"), "is not of the form package.module:attribute"),
    "no module": (("--to", "linen", "--nnx", f"{HERE}:RULES"), "is no NNX module"),
    "no linen": (
        ("--to", "nnx", "--linen", f"{HERE}:Native", "--nnx", f"{HERE}:Native", "--input", "2,5"),
        "is no Linen module",
    ),
    "inputs": (
        ("--to", "nnx", "--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,6"),
        "the models cannot be called with these inputs: InputShapeError",
    ),
    "no arguments": (("--to", "nnx", "--tx", "optax:adam"), "'optax:adam' cannot be called without arguments"),
    "no optax": (("--to", "nnx", "--tx", f"{HERE}:RULES"), "is no optax transformation"),
}


def labelled():
    """By Linen's names, as a tree."""
    return optax.masked(optax.adam(0.1), {"dense": True})


def test_labels_of_linens_names_do_not_fit_the_nnx_module(linen, rules, tmp_path, run):
    words = ("--rules", rules, "--nnx", f"{HERE}:Native", "--tx", f"{__name__}:labelled", "--json")
    code, out, _ = run("convert", linen, tmp_path / "out", "--to", "nnx", *words)
    assert code == 2
    assert "--tx does not take the params of --nnx" in json.loads(out)["message"]


@pytest.mark.parametrize(("words", "text"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_exit_code_2(words, text, linen, tmp_path, run):
    code, out, err = run("convert", linen, tmp_path / "out", *words)
    assert code == 2
    assert text in " ".join((out + err).replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_module_that_fails_on_import_is_named(linen, tmp_path, run, monkeypatch):
    (tmp_path / "broken_model.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, _, err = run("convert", linen, tmp_path / "out", "--to", "linen", "--nnx", "broken_model:Net")
    assert code == 2
    assert "ZeroDivisionError: division by zero" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("text", ["not toml", "[[rule]]\nfrom = 3", '[[rule]]\nfrom = "params/nobody"\ndrop = true'])
def test_bad_rules_are_exit_code_1(text, linen, tmp_path, run):
    (tmp_path / "rules.toml").write_text(text)
    code, out, err = run("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", tmp_path / "rules.toml")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "rules.toml" in err


def test_another_model_is_exit_code_1(tmp_path, run):
    """The checkpoint is of a smaller model than those that are given."""
    state = jax.tree.map(lambda x: x[..., :2], checkpoint_run.linen_state(0).params)
    source = checkpoint_run.save({"params": state}, tmp_path / "in", "orbax")
    words = ("--linen", f"{HERE}:Net", "--nnx", f"{HERE}:Native", "--input", "8,5")
    code, out, err = run("convert", source, tmp_path / "out", "--to", "nnx", *words)
    assert (code, out) == (1, "")
    assert "params/dense/kernel: expected (5, 4), found (5, 2)" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cut.msgpack", "cut.safetensors", "cut.npz"])
def test_a_truncated_file_is_exit_code_1(name, tmp_path, run):
    whole = checkpoint_run.save(checkpoint_run.linen_state(0), tmp_path / "whole", name.split(".")[1])
    (tmp_path / name).write_bytes(whole.read_bytes()[:-40])
    code, out, err = run("convert", tmp_path / name, tmp_path / "out", "--to", "nnx")
    assert (code, out) == (1, "")
    assert f"{tmp_path / name}" in err
    assert "expected: " in err
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_never_loaded(tmp_path, run):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "loaded"),)

    for name in ("bomb", "bomb.msgpack", "bomb.npz", "bomb.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"params": Bomb()}))
        assert run("convert", tmp_path / name, tmp_path / "out", "--to", "nnx")[0] == 1
    np.savez(tmp_path / "objects.npz", allow_pickle=True, **{"params/w": np.array([Bomb()], object)})
    assert run("convert", tmp_path / "objects.npz", tmp_path / "out", "--to", "nnx")[0] == 1
    assert not (tmp_path / "loaded").exists()
    assert not (tmp_path / "out").exists()


def test_what_does_not_verify_is_exit_code_3(linen, rules, tmp_path, run, monkeypatch):
    module = importlib.import_module(CONVERT)
    written = module.verify_source

    def flipped(source, expected, **options):
        return written(source, expected | {("model", "first", "kernel", "value"): "0" * 64}, **options)

    monkeypatch.setattr(module, "verify_source", flipped)
    words = ("convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules)
    code, _, err = run(*words)
    assert code == 3
    assert "error: verification failed" in err
    assert "other bits: model/first/kernel/value" in err
    assert "It is now at" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["exit_code"], json.loads(out)["error"]) == (3, 3, "VerificationError")
    assert run(*words, "--no-verify")[0] == 0


def test_the_layout_and_the_step_can_be_chosen(tmp_path, run):
    folder = tmp_path / "run"
    for step in (3, 12):
        checkpoint_run.save({"encoder": {"w": jnp.full(2, step)}}, folder / f"step_{step}", "orbax")
    code, out, _ = run("convert", folder, tmp_path / "a", "--to", "nnx", "--step", 3, "--layout", "params-only")
    assert code == 0
    assert "step: 3\n" in out
    assert "layout: params only (as asked for)" in out
    assert checkpoint_run.load(tmp_path / "a", "orbax")["encoder", "w", "value"].tolist() == [3, 3]
    assert run("convert", folder, tmp_path / "b", "--to", "nnx", "--quiet") == (0, "", "")
    assert checkpoint_run.load(tmp_path / "b", "orbax")["encoder", "w", "value"].tolist() == [12, 12]


def test_words_are_those_of_the_rooms_below():
    assert {name.name for name in LayoutName} == {kind.name for kind in Kind if kind is not Kind.UNKNOWN}
    assert {each.value for each in SourceFormat} == set(FORMATS)
    assert {each.value for each in TargetFormat} == set(SINK_FORMATS)


# ---- Ctrl-C ------------------------------------------------------------------------------------------------

INTERRUPTED = """
import importlib, os, signal, sys
from bridge import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background of a shell
convert = importlib.import_module("bridge.checkpoint.conversion")
made = convert.values
def once(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return made(*arguments)
convert.values = once
cli.main(sys.argv[1:])
"""


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(linen, rules, tmp_path, run):
    words = ["convert", linen, tmp_path / "out", "--to", "nnx", "--rules", rules]
    done = run_forked(INTERRUPTED, *words)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == f"interrupted: nothing at {tmp_path / 'out'}. Go on with the same command and --resume.\n"
    assert not (tmp_path / "out").exists()
    assert run(*words, "--resume")[0] == 0
