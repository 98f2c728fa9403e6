"""A composite step is one checkpoint: its items are joined, carried beside the leaves, or named as left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bridge._errors import CheckpointLayoutError, CheckpointNotFoundError
from bridge.checkpoint import Kind, LossyConversionError, convert, open_conversion, open_source, read_tree
from tests.tolerance import assert_trees_equal

PARAMS = {"Dense_0": {"kernel": np.arange(6.0, dtype="float32").reshape(2, 3), "bias": np.ones(3, "float32")}}
OPT_STATE = [{"count": np.int32(4), "mu": PARAMS, "nu": PARAMS}, None]
STATE = {"step": np.int32(4), "params": PARAMS, "opt_state": OPT_STATE}
ITERATOR = {"pos": np.int32(7), "order": np.arange(5)}


def tree(content):
    return ocp.args.StandardSave(jax.tree.map(jnp.asarray, content))


def save(folder, number=4, /, **items):
    """A step of a CheckpointManager with these items."""
    custom = items.pop("custom_metadata", None)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(number, args=ocp.args.Composite(**items), custom_metadata=custom)
        manager.wait_until_finished()
    return folder


def value_of(source):
    return {path: source.read(path) for path in source.tree.leaves}


def test_the_parts_of_a_state_are_joined_under_their_names(tmp_path):
    stats = {"BatchNorm_0": {"mean": np.ones(3, "float32")}}
    parts = {"params": PARAMS, "opt_state": OPT_STATE, "batch_stats": stats, "ema_params": PARAMS}
    items = {name: tree(content) for name, content in parts.items()}
    save(tmp_path / "run", 12, **items)
    source = open_source(tmp_path / "run")
    assert (source.step, source.item, source.tree.layout.kind) == (12, None, Kind.LINEN_TRAIN_STATE)
    assert source.path == tmp_path / "run" / "12"
    assert source.around.items == dict.fromkeys(sorted(parts), "arrays")
    assert source.around.left_out == ()
    values = value_of(source)
    assert values.pop(("step",)) == 12
    assert len(values) == 2 + 5 + 1 + 2
    assert_trees_equal(values["ema_params", "Dense_0", "kernel"], PARAMS["Dense_0"]["kernel"])
    assert_trees_equal(values["opt_state", "0", "count"], np.int32(4))
    assert ("opt_state",) in source.tree.sequences
    assert source.tree.empty == {("opt_state", "1"): "None"}
    assert source.read(("params", "Dense_0", "kernel"), (slice(1, 2), slice(0, 2))).tolist() == [[3.0, 4.0]]
    assert any("taken from the name of the folder, 12" in note for note in source.around.notes)
    with pytest.raises(CheckpointLayoutError, match=r"(?s)no such leaf: .*12.*expected: params/b\n.*parts batch_stats"):
        source.read(("params", "b"))
    source.close()


def test_a_step_that_is_an_item_of_one_array_is_the_step(tmp_path):
    save(tmp_path / "run", 9, params=tree(PARAMS), opt_state=tree(OPT_STATE), step=ocp.args.ArraySave(jnp.int32(70)))
    source = open_source(tmp_path / "run")
    assert source.read(("step",)) == 70
    assert source.tree.leaves["step",].shape == ()
    source.require_unchanged()


def test_the_parts_of_an_nnx_state_are_joined(tmp_path):
    model = {"kernel": {"value": np.ones((2, 3), "float32")}}
    optimizer = {"step": {"value": np.uint32(3)}, "opt_state": {"0": {"mu": model}}}
    save(tmp_path / "run", 3, model=tree(model), optimizer=tree(optimizer))
    source = open_source(tmp_path / "run")
    assert source.tree.layout.kind is Kind.NNX_TRAINING
    assert ("step",) not in source.tree.leaves  # the optimizer has one


def test_beside_a_whole_state_other_items_are_left_out_by_name(tmp_path):
    save(tmp_path / "run", state=tree(STATE), data_iter=tree(ITERATOR), notes=ocp.args.JsonSave({"git": "abc"}))
    with open_conversion(tmp_path / "run", to="nnx") as conversion:
        assert conversion.source.item == "state"
        assert conversion.losses == ["data_iter is left out: an item with arrays; the state is state"]
        assert conversion.plan.report().left_out == [
            {"name": "data_iter", "why": "an item with arrays; the state is state", "asked": False}
        ]
        assert "1 left out" in conversion.plan.summary()
        assert "data_iter is left out: " in str(conversion.plan.report())
        with pytest.raises(LossyConversionError, match=r"(?s)data_iter is left out.*item=\.\.\. \(--item NAME\)"):
            conversion.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = convert(tmp_path / "run", tmp_path / "out", to="nnx", item="state")
    assert [(item.name, item.asked) for item in report.plan.left_out] == [("data_iter", True)]
    assert (report.step, report.steps) == (4, (4,))
    assert convert(tmp_path / "run", tmp_path / "lossy", to="nnx", lossy=True).verified


def test_what_is_neither_arrays_nor_json_is_left_out_by_name(tmp_path):
    key = ocp.args.JaxRandomKeySave(jax.random.key(0))
    save(tmp_path / "run", state=tree(STATE), rng=key)
    source = open_source(tmp_path / "run")
    assert [item.name for item in source.around.left_out] == ["rng"]
    assert "neither a tree of arrays nor JSON (JaxRandomKeyCheckpointHandler)" in source.around.left_out[0].why
    with pytest.raises(LossyConversionError, match="rng is left out"):
        convert(tmp_path / "run", tmp_path / "out", to="nnx")


def test_several_are_chosen_and_called_otherwise(tmp_path):
    save(tmp_path / "run", weights=tree(PARAMS), slots=tree(OPT_STATE), other=tree(ITERATOR))
    source = open_source(tmp_path / "run", item={"params": "weights", "opt_state": "slots"})
    assert source.tree.layout.kind is Kind.LINEN_TRAIN_STATE
    assert [(item.name, item.asked) for item in source.around.left_out] == [("other", True)]
    both = open_source(tmp_path / "run", item=["weights", "other"])
    assert {path[0] for path in both.tree.leaves} == {"weights", "other"}
    assert ("Dense_0", "bias") in open_source(tmp_path / "run", item={"state": "weights"}).tree.leaves
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no item 'slot'.*found: other, slots, weights"):
        open_source(tmp_path / "run", item=["weights", "slot"])


@pytest.mark.parametrize("names", [("one", "two"), ("state", "default"), ("opt_state", "batch_stats")])
def test_what_nothing_tells_is_an_error_that_lists_the_items(names, tmp_path):
    save(tmp_path / "run", **{name: tree(PARAMS) for name in names})
    listed = ", ".join(sorted(names))
    with pytest.raises(CheckpointLayoutError, match=rf"(?s)several items: .*found: {listed}\n.*--item NAME"):
        open_source(tmp_path / "run")


def test_what_reads_one_item_refuses_several(tmp_path):
    save(tmp_path / "run", params=tree(PARAMS), opt_state=tree(OPT_STATE))
    with pytest.raises(CheckpointLayoutError, match=r"(?s)which are one state.*found: opt_state, params.*open_source"):
        read_tree(tmp_path / "run")
    assert_trees_equal(read_tree(tmp_path / "run", item="params"), PARAMS)


def test_json_and_custom_metadata_come_along_and_back(tmp_path):
    config, custom = {"git": "abc", "cfg": {"w": 8}}, {"lr": 0.1, "names": ["a"]}
    save(tmp_path / "run", state=tree(STATE), cfg=ocp.args.JsonSave(config), custom_metadata=custom)
    for target, to, source in (("nnx", "nnx", "run"), ("1", "linen", "nnx"), ("back.msgpack", "nnx", "1")):
        target_format = "msgpack" if target.endswith("msgpack") else "orbax"
        convert(tmp_path / source, tmp_path / target, to=to, target_format=target_format)
        opened = open_source(tmp_path / target)
        items = dict(opened.around.json_items) or opened.metadata["json_items"]
        assert items == {"cfg": config}
        assert {name: opened.metadata[name] for name in custom} == custom
        opened.close()
    assert set(open_source(tmp_path / "1").around.items) == {"default", "cfg"}


def test_metadata_of_a_name_that_is_ours_is_named(tmp_path):
    save(tmp_path / "run", state=tree(STATE), custom_metadata={"hashes": "mine", "lr": 1})
    with open_conversion(tmp_path / "run", to="nnx") as conversion:
        assert conversion.losses == ["hashes is left out: metadata of a name that the converter uses itself"]


def test_a_comparison_names_the_items_that_it_leaves_out(tmp_path, run):
    save(tmp_path / "run", state=tree(STATE), data_iter=tree(ITERATOR))
    code, out, _ = run("diff", tmp_path / "run", tmp_path / "run" / "4" / "state")
    assert code == 0
    assert f"an item that is not compared: {tmp_path / 'run' / '4' / 'state'}: data_iter" in out
    _, out, _ = run("diff", tmp_path / "run", tmp_path / "run" / "4" / "state", "--json")
    assert json.loads(out)["left_out"] == [f"{tmp_path / 'run' / '4' / 'state'}: data_iter"]


def test_the_command_lists_steps_and_items_and_fails_for_what_is_left_out(tmp_path, run):
    notes = ocp.args.JsonSave({"git": "abc"})
    for step in (2, 4):
        save(tmp_path / "run", step, state=tree(STATE), data_iter=tree(ITERATOR), notes=notes)
    code, out, _ = run("inspect", tmp_path / "run")
    assert code == 0
    assert "step: 4\nsteps: 2, 4 (the latest)\n" in out
    assert "item data_iter: arrays; left out: an item with arrays; the state is state" in out
    assert "item notes: JSON" in out
    shown = json.loads(run("inspect", tmp_path / "run", "--step", "2", "--json")[1])
    assert (shown["step"], shown["steps"], shown["item"]) == (2, [2, 4], "state")
    assert shown["items"] == {"data_iter": "arrays", "state": "arrays", "notes": "JSON"}
    assert shown["json_items"] == {"notes": {"git": "abc"}}
    words = ("convert", tmp_path / "run", tmp_path / "out", "--to", "nnx", "--json")
    code, out, _ = run(*words, "--dry-run")
    assert code == 1
    assert json.loads(out)["losses"] == ["data_iter is left out: an item with arrays; the state is state"]
    assert run(*words)[0] == 1
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*words, "--item", "state")
    assert code == 0
    assert [item["asked"] for item in json.loads(out)["left_out"]] == [True]
    assert run("inspect", tmp_path / "run", "--item", "x=", "--item", "b")[0] == 2
