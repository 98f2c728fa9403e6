"""Converting on disk: every format, both directions; the result resumes to the last bit; all of it or nothing."""

import hashlib
import importlib.metadata
import os
import shutil
from contextlib import closing
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import nnx_core as nnx
from bridge._errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    VariablesMismatchError,
)
from bridge.checkpoint import conversion
from bridge.checkpoint.conversion import LossyConversionError, convert, open_conversion
from bridge.checkpoint.formats.open import open_source
from bridge.checkpoint.rules.apply import Rules, read_rules
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.verification import VerificationError, verify
from tests.support import checkpoint_run as run
from tests.support.forked import run_forked
from tests.tolerance import assert_trees_equal

SOURCES = ("orbax", "orbax-v1", "manager", "msgpack", "safetensors", "npz")
TARGETS = ("orbax", "orbax-v1", "msgpack", "safetensors")
# What Orbax itself says of any untargeted restore.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    (folder / "forward.toml").write_text(run.RULES)
    (folder / "back.toml").write_text(run.BACK)
    return {"nnx": read_rules(folder / "forward.toml"), "linen": read_rules(folder / "back.toml")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(to, format)`: the path of the run after three steps, in the layout that is converted to `to`."""
    folder, made = tmp_path_factory.mktemp("saved"), {}

    def path(to, format):
        if (to, format) not in made:
            tree = run.linen_state(3) if to == "nnx" else run.native_state(3)
            if to == "linen" and format == "msgpack":
                tree = {name: nnx.to_pure_dict(state) for name, state in tree.items()}
            made[to, format] = run.save(tree, folder / f"{to}-{format}", format)
        return made[to, format]

    return path


def options(to, rules):
    """What the direction needs: names, and on the way to Linen what an NNX checkpoint does not tell."""
    known = {"known": of_object(run.native()[0]).known, "tx": run.adamw()} if to == "linen" else {}
    return {"to": to, "rules": rules[to], **known}


# ---- every format, both directions -------------------------------------------------------------------------


# Reading and writing know nothing of each other: each format is read, and each is written from the first; the grid has
# every pair.
FORMATS = [
    pytest.param(source, target, marks=[] if source == SOURCES[0] or target == TARGETS[i % 4] else pytest.mark.grid)
    for i, source in enumerate(SOURCES)
    for target in TARGETS
]


@pytest.mark.parametrize(("source", "target"), FORMATS)
def test_linen_in_every_format_resumes_in_nnx(source, target, saved, rules, tmp_path):
    report = convert(saved("nnx", source), tmp_path / "out", target_format=target, **options("nnx", rules))
    assert report.verified
    found = run.continued_in_nnx(run.load(tmp_path / "out", target), steps=2)
    assert_trees_equal(found, run.flat(run.native_state(5)))
    assert verify(tmp_path / "out").leaves == report.leaves == len(found)


@pytest.mark.parametrize(("source", "target"), FORMATS)
def test_nnx_in_every_format_resumes_in_linen(source, target, saved, rules, tmp_path):
    convert(saved("linen", source), tmp_path / "out", target_format=target, **options("linen", rules))
    found = run.continued_in_linen(run.load(tmp_path / "out", target), steps=2)
    assert_trees_equal(found, run.flat(run.linen_state(5)))


def test_both_sides_train_alike():
    """The premise of the tests above: what is resumed on the other side can be told from the run that went on."""
    linen, ours = run.flat(run.linen_state(5)), run.flat(run.native_state(5))
    np.testing.assert_array_equal(linen["params", "dense", "kernel"], ours["model", "first", "kernel", "value"])


def test_the_real_tools_restore_into_real_targets(saved, rules, tmp_path):
    convert(saved("nnx", "orbax"), tmp_path / "nnx", **options("nnx", rules))
    target = dict(zip(("model", "optimizer"), map(nnx.state, run.native(seed=1)), strict=True))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "nnx", jax.tree.map(ocp.utils.to_shape_dtype_struct, target))
    assert_trees_equal(run.flat(restored), run.flat(run.native_state(3)))

    convert(saved("linen", "orbax"), tmp_path / "linen", **options("linen", rules))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "linen", run.linen_state(3))
    assert_trees_equal(run.linen_step(restored), run.linen_state(4))

    convert(saved("linen", "orbax"), tmp_path / "linen.msgpack", target_format="msgpack", **options("linen", rules))
    restored = flax.serialization.from_bytes(run.linen_state(0), (tmp_path / "linen.msgpack").read_bytes())
    assert_trees_equal(run.flat(run.linen_step(restored)), run.flat(run.linen_state(4)))


@pytest.mark.parametrize("source", ["msgpack", "safetensors"])
def test_a_linen_run_changes_its_format_alone(source, saved, tmp_path):
    convert(saved("nnx", source), tmp_path / "out", to="linen", tx=run.adamw())
    with ocp.StandardCheckpointer() as checkpointer:
        assert_trees_equal(
            run.linen_step(checkpointer.restore(tmp_path / "out", run.linen_state(3))), run.linen_state(4)
        )


def test_there_and_back_is_the_same_checkpoint(saved, rules, tmp_path):
    convert(saved("nnx", "orbax"), tmp_path / "nnx", **options("nnx", rules))
    convert(tmp_path / "nnx", tmp_path / "back", to="linen", rules=rules["linen"])  # the metadata tells the rest
    with ocp.StandardCheckpointer() as checkpointer:
        before, after = checkpointer.restore(saved("nnx", "orbax")), checkpointer.restore(tmp_path / "back")
    assert_trees_equal(after, before)


# ---- what is checked before, and what is left after an error -----------------------------------------------


def content(folder):
    """The hash of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_would_be_lost_is_refused_and_what_rules_drop_is_not(rules, tmp_path):
    """Random streams go by an option, a leaf by a rule; what nobody spoke of is an error that names it."""
    tree = {"params": {"w": jnp.ones(2)}, "step": jnp.int32(1), "opt_state": [{"mu": {"w": jnp.ones(2)}}]}
    source = run.save(tree, tmp_path / "a", "orbax")
    target = {"params": {"w": jnp.ones(2)}}
    with pytest.raises(LossyConversionError, match=r"(?s)opt_state/0/mu/w has no place.*--lossy"):
        convert(source, tmp_path / "b", to="linen", target=target)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    gone = Rules.from_table({"rule": [{"from": "params/w", "drop": True}, {"to": "params/v", "new": NEW}]})
    plan = convert(source, tmp_path / "c", to="linen", rules=gone, lossy=True).plan
    assert ("params", "w") in plan.asked


NEW = {"value": 0.0, "shape": [1], "dtype": "float32"}


def test_lossy_says_that_it_may(tmp_path):
    stack = {"params": {f"layer_{i}": {"w": jnp.ones(2) * i} for i in range(2)}}
    tx = optax.adam(0.1)
    tree = {**stack, "step": jnp.int32(1), "opt_state": tx.init(stack["params"])}
    source = run.save(tree, tmp_path / "a", "orbax")
    stacked = Rules.from_table({"rule": [{"from": r"params/layer_(\d+)/w", "to": "params/layers/w", "stack": 0}]})
    with pytest.raises(LossyConversionError, match=r"(?s)would lose or change.*found:.*--lossy.*Nothing was written"):
        convert(source, tmp_path / "b", to="nnx", rules=stacked)  # nobody says that adam commutes with stacking
    assert not (tmp_path / "b").exists()
    assert convert(source, tmp_path / "b", to="nnx", rules=stacked, lossy=True).plan.warnings
    assert not convert(source, tmp_path / "c", to="nnx", rules=stacked, tx=tx).plan.warnings


def test_a_model_of_another_size_is_refused_before_anything_is_read(saved, rules, tmp_path, monkeypatch):
    class Wide(run.Native):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.readout = nnx.Linear(4, 7, rngs=rngs)

    model = Wide(rngs=nnx.Rngs(0))
    target = {"model": model, "optimizer": nnx.Optimizer(model, run.adamw(), wrt=nnx.Param)}
    monkeypatch.setattr(conversion, "values", lambda *_: pytest.fail("an array was read"))
    with pytest.raises(VariablesMismatchError, match=r"(?s)readout.*kernel.*\(4, 7\).*\(4, 3\)"):
        convert(saved("nnx", "orbax"), tmp_path / "out", target=target, **options("nnx", rules))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("inside", [".", "new", "default/new"])
def test_the_target_is_never_in_the_source(inside, saved, rules, tmp_path):
    source = saved("nnx", "orbax")
    before = content(source)
    with pytest.raises(CheckpointExistsError, match=r"(?s)inside the source.*expected: a path outside"):
        convert(source, source / inside, **options("nnx", rules))
    assert content(source) == before


def test_what_exists_is_not_written_over(saved, rules, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointExistsError, match="out"):
        convert(saved("nnx", "orbax"), tmp_path / "out", **options("nnx", rules))
    assert os.listdir(tmp_path / "out") == []


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        convert(tmp_path / "no", tmp_path / "out", to="nnx")


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupted_conversion_leaves_nothing_and_resumes(target, saved, rules, tmp_path, monkeypatch):
    """Ctrl-C after the first batches; the second run writes what is left and verifies all of it."""
    source, arguments = saved("nnx", "orbax"), options("nnx", rules)

    def interrupt(doing, done, total):
        if done > total / 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, target_format=target, max_memory=200, progress=interrupt, **arguments)
    assert not out.exists()
    assert any(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"--resume"):
        convert(source, out, target_format=target, **arguments)
    report = convert(source, out, target_format=target, resume=True, verify=False, **arguments)
    assert 0 < report.resumed < report.leaves
    assert report.verified
    assert_trees_equal(run.continued_in_nnx(run.load(out, target), 2), run.flat(run.native_state(5)))
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name or "tmp" in path.name] == []


def test_resuming_from_another_source_is_found_out(saved, rules, tmp_path):
    """The same tree, other numbers: what the first run wrote does not verify, and the target does not keep its name."""

    def interrupt(doing, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    other = run.save(run.linen_state(4), tmp_path / "other", "orbax")
    with pytest.raises(KeyboardInterrupt):
        convert(other, tmp_path / "out", max_memory=200, progress=interrupt, **options("nnx", rules))
    with pytest.raises(VerificationError, match=r"(?s)verification failed.*other bits: model/"):
        convert(saved("nnx", "orbax"), tmp_path / "out", resume=True, verify=False, **options("nnx", rules))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed-verification").exists()


def test_a_bit_that_flips_on_the_way_to_disk_is_found(saved, rules, tmp_path, monkeypatch):
    verified = conversion.verify_source

    def flipped(source, *rest, **options):
        path = Path(source.path)
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 16
        path.write_bytes(raw)
        return verified(source, *rest, **options)

    monkeypatch.setattr(conversion, "verify_source", flipped)
    with pytest.raises(VerificationError, match=r"(?s)other bits: .*Do not use it") as caught:
        convert(saved("nnx", "orbax"), tmp_path / "a.safetensors", target_format="safetensors", **options("nnx", rules))
    assert "failed-verification" in "".join(caught.value.__notes__)
    assert os.listdir(tmp_path) == ["a.safetensors.failed-verification"]
    with pytest.raises(VerificationError, match="other bits"):
        verify(tmp_path / "a.safetensors.failed-verification", format="safetensors")


def test_a_converted_source_is_read_as_it_was_written(saved, rules, tmp_path):
    """Its hashes are compared: what has been written since, or has rotted, is not handed on as verified."""
    first = tmp_path / "a.safetensors"
    convert(saved("nnx", "orbax"), first, target_format="safetensors", **options("nnx", rules))
    raw = bytearray(first.read_bytes())
    raw[-3] ^= 16
    first.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"(?s)a.safetensors\n.*1 other bits"):
        convert(first, tmp_path / "b.safetensors", target_format="safetensors", **options("linen", rules))
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("format", "kind"), [("safetensors", "truncate"), ("safetensors", "rewrite"), ("orbax", "rewrite")]
)
def test_a_source_that_changes_under_way_is_no_result(saved, rules, tmp_path, format, kind):
    source = tmp_path / f"source.{format}"
    given = saved("nnx", format)
    (shutil.copytree if given.is_dir() else shutil.copy)(given, source)

    def interfere(doing, done, total):
        for file in source.rglob("*") if source.is_dir() else [source]:
            if file.is_file():
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2] if kind == "truncate" else content)

    with pytest.raises(CheckpointChangedError, match="changed while it was read"):
        convert(source, tmp_path / "out", max_memory=200, progress=interfere, **options("nnx", rules))
    assert not (tmp_path / "out").exists()


def test_a_checkout_that_is_not_installed_converts(saved, rules, tmp_path, monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    convert(saved("nnx", "orbax"), tmp_path / "out", **options("nnx", rules))
    with closing(open_source(tmp_path / "out")) as source:
        assert source.metadata["converted_by"] == "linen-nnx-bridge unknown"


@pytest.mark.parametrize("format", ["orbax", "orbax-v1", "msgpack", "safetensors", "npz"])
def test_planning_reads_no_array(format, saved, rules, monkeypatch):
    source = type(open_source(saved("nnx", format)))
    monkeypatch.setattr(source, "read", lambda *_: pytest.fail("an array was read"))
    with open_conversion(saved("nnx", format), **options("nnx", rules)) as conversion:
        assert len(conversion.plan.rows()) == 23


# ---- a full disk, a kill -----------------------------------------------------------------------------------

SCRIPT = """
import sys, resource
from pathlib import Path
source, target, rules, format, limit = sys.argv[1:]
from bridge.checkpoint.conversion import convert
from bridge.checkpoint.rules.apply import read_rules
from bridge._errors import CheckpointWriteError
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    convert(source, target, to="nnx", target_format=format)
except CheckpointWriteError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some MiB of random numbers, that no compression makes small."""
    random = np.random.default_rng(0)
    params = {f"Dense_{i}": {"kernel": random.random((256, 256), np.float32)} for i in range(24)}
    return run.save({"params": params, "batch_stats": {}}, tmp_path_factory.mktemp("large") / "ck", "orbax")


@pytest.mark.parametrize("format", TARGETS)
def test_no_room_is_a_clear_error_and_no_target(format, large, tmp_path):
    before = content(large)
    done = run_forked(SCRIPT, large, tmp_path / "out", "-", format, 200_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:"), done.stdout + done.stderr
    assert f"{tmp_path}/out" in done.stdout
    assert "expected:" in done.stdout
    assert "File too large" in done.stdout
    assert not (tmp_path / "out").exists()
    assert content(large) == before
    report = convert(large, tmp_path / "out", to="nnx", target_format=format, resume=True)  # once there is room
    assert report.verified
