"""Every step of a CheckpointManager's folder, into one that a CheckpointManager restores."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bridge._errors import CheckpointExistsError, CheckpointLayoutError
from bridge.checkpoint import LossyConversionError, OptionError, VerificationError, convert_steps, diff
from bridge.checkpoint.formats.orbax.read import read_tree
from tests.tolerance import assert_trees_equal

PARAMS = {"Dense_0": {"kernel": np.arange(6.0, dtype="float32").reshape(2, 3), "bias": np.ones(3, "float32")}}


def state_of(step):
    params = jax.tree.map(lambda x: jnp.asarray(x) * step, PARAMS)
    return {"step": jnp.int32(step), "params": params, "opt_state": [{"count": jnp.int32(step), "mu": params}, None]}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "run"
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2, 10):
            items = {"state": ocp.args.StandardSave(state_of(step)), "notes": ocp.args.JsonSave({"step": step})}
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    return folder


def test_a_checkpoint_manager_restores_what_came_of_all_steps(run_folder, tmp_path):
    report = convert_steps(run_folder, tmp_path / "nnx", to="nnx")
    assert list(report.converted) == [1, 2, 10]
    assert report.skipped == ()
    convert_steps(tmp_path / "nnx", tmp_path / "linen", to="linen")
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        assert sorted(manager.all_steps()) == [1, 2, 10]
        assert manager.latest_step() == 10
        for step in (2, 10):
            abstract = jax.eval_shape(lambda step=step: state_of(step))
            asked = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
            restored = manager.restore(step, args=asked)
            assert_trees_equal(restored["state"], state_of(step))
            assert restored["notes"] == {"step": step}
    with ocp.CheckpointManager(tmp_path / "nnx") as manager:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read_tree(tmp_path / "nnx" / "2"))
        restored = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        assert_trees_equal(restored["state"], read_tree(tmp_path / "nnx" / "2"))
    assert diff(run_folder / "2", tmp_path / "linen" / "2").same


def test_a_manager_with_one_item_restores_without_naming_it(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.StandardSave(state_of(3)))
        manager.wait_until_finished()
    convert_steps(tmp_path / "run", tmp_path / "linen", to="linen")
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        abstract = jax.eval_shape(lambda: state_of(3))
        assert_trees_equal(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract)), state_of(3))


def test_parts_come_back_as_one_item(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        parts = {name: ocp.args.StandardSave(state_of(3)[name]) for name in ("params", "opt_state")}
        manager.save(3, args=ocp.args.Composite(**parts), metrics={"loss": 1.0})
        manager.wait_until_finished()
    convert_steps(tmp_path / "run", tmp_path / "linen", to="linen")
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        abstract = jax.eval_shape(lambda: state_of(3))
        assert_trees_equal(manager.restore(3, args=ocp.args.StandardRestore(abstract)), state_of(3))


def test_steps_with_a_prefix_keep_their_names(tmp_path):
    options = ocp.CheckpointManagerOptions(step_prefix="step")
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        manager.save(3, args=ocp.args.StandardSave(state_of(3)))
        manager.wait_until_finished()
    convert_steps(tmp_path / "run", tmp_path / "linen", to="linen")
    with ocp.CheckpointManager(tmp_path / "linen", options=options) as manager:
        assert manager.latest_step() == 3
        abstract = jax.eval_shape(lambda: state_of(3))
        assert_trees_equal(manager.restore(3, args=ocp.args.StandardRestore(abstract)), state_of(3))


def test_a_second_run_skips_what_is_whole_and_refuses_what_is_not(run_folder, tmp_path):
    convert_steps(run_folder, tmp_path / "nnx", to="nnx")
    with pytest.raises(CheckpointExistsError, match=r"(?s)steps are in the way.*found: 1, 2, 10.*--resume"):
        convert_steps(run_folder, tmp_path / "nnx", to="nnx")
    shutil.rmtree(tmp_path / "nnx" / "10")
    report = convert_steps(run_folder, tmp_path / "nnx", to="nnx", resume=True)
    assert (report.skipped, list(report.converted)) == ((1, 2), [10])
    with pytest.raises(
        CheckpointExistsError, match=r"(?s)made of another checkpoint.*found: one of .*run.*move it away"
    ):
        convert_steps(run_folder, tmp_path / "nnx", to="linen", resume=True)
    for file in (tmp_path / "nnx" / "2" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(bytes(content))
    with pytest.raises(VerificationError):
        convert_steps(run_folder, tmp_path / "nnx", to="nnx", resume=True)


def test_what_an_interrupt_leaves_is_whole_steps_and_one_that_goes_on(run_folder, tmp_path):
    calls = []

    def interrupt(doing, done, total):
        calls.append(doing)
        if calls.count("converting") == 2:  # the second step
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_steps(run_folder, tmp_path / "nnx", to="nnx", progress=interrupt)
    with ocp.CheckpointManager(tmp_path / "nnx") as manager:
        assert list(manager.all_steps()) == [1]
    report = convert_steps(run_folder, tmp_path / "nnx", to="nnx", resume=True)
    assert (report.skipped, list(report.converted)) == ((1,), [2, 10])
    assert diff(run_folder / "2", tmp_path / "nnx" / "2").same


def test_what_is_no_folder_of_steps_and_options_that_do_not_go_with_it(run_folder, tmp_path):
    with pytest.raises(CheckpointLayoutError, match=r"(?s)there are no steps.*--all-steps"):
        convert_steps(run_folder / "1" / "state", tmp_path / "a", to="nnx")
    with pytest.raises(OptionError, match=r"(?s)the option step .*where all steps"):
        convert_steps(run_folder, tmp_path / "a", to="nnx", step=1)
    with pytest.raises(OptionError, match=r"(?s)the option target_format .*where all steps"):
        convert_steps(run_folder, tmp_path / "a", to="nnx", target_format="msgpack")
    with pytest.raises(OptionError, match=r"(?s)the option target_item .*have items"):
        convert_steps(run_folder, tmp_path / "a", to="nnx", target_format="msgpack", target_item="default")
    with pytest.raises(CheckpointExistsError, match="the target is inside the source"):
        convert_steps(run_folder, run_folder / "nnx", to="nnx")


def test_a_step_that_would_lose_something_stops_all(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            items = {"state": ocp.args.StandardSave(state_of(step))}
            if step == 2:
                items["data_iter"] = ocp.args.StandardSave({"pos": jnp.int32(1)})
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    with pytest.raises(LossyConversionError, match="step 2: data_iter is left out"):
        convert_steps(tmp_path / "run", tmp_path / "nnx", to="nnx")
    assert not (tmp_path / "nnx").exists()


def test_the_command(run_folder, tmp_path, run):
    words = ("convert", run_folder, tmp_path / "nnx", "--to", "nnx", "--all-steps")
    code, out, _ = run(*words, "--dry-run")
    assert (code, out.splitlines()) == (0, ["step 1: planned", "step 2: planned", "step 10: planned"])
    code, out, _ = run(*words, "--json")
    shown = json.loads(out)
    assert code == 0
    assert [(row["step"], row["verified"]) for row in shown["steps"]] == [(1, True), (2, True), (10, True)]
    code, out, _ = run(*words, "--resume")
    assert (code, out.splitlines()[0]) == (0, "step 1: there already, and verified")
    assert run(*words)[0] == 1
