"""Every usual layout of a training checkpoint converts whole, there and back, and is inspected fully."""

import json
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state

from bridge._errors import CheckpointLayoutError
from bridge.checkpoint import Kind, OptionError, convert, diff, open_conversion, open_source

PARAMS = {"Dense_0": {"kernel": (3, 2), "bias": (2,)}, "BatchNorm_0": {"scale": (2,), "bias": (2,)}}
STATS = {"BatchNorm_0": {"mean": (2,), "var": (2,)}}
LABELS = {"Dense_0": "a", "BatchNorm_0": "b"}


class State(train_state.TrainState):
    batch_stats: Any


class WithAverages(State):
    ema_params: Any


class WithKey(State):
    key: Any


def values(shapes, seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=is_shape)


def state_of(cls=State, tx=None, dtype="float32", **fields):
    """A TrainState in the middle of a run: every number is its own."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 20)
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = cls.create(
        apply_fn=None, params=values(PARAMS, 0, dtype), tx=tx, batch_stats=values(STATS, 1, dtype), **fields
    )
    counted = iter(range(3, 10_000))
    opt_state = jax.tree.map(lambda x: (x + next(counted)).astype(x.dtype), state.opt_state)
    return state.replace(step=jnp.int32(3), opt_state=opt_state)


def save_tree(path, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)


def save_steps(path, steps, make):
    with ocp.CheckpointManager(path) as manager:
        for step in steps:
            manager.save(step, args=make(step))
        manager.wait_until_finished()


def save_managers(root, state):
    tree = ocp.args.StandardSave
    save_steps(root / "manager", (1, 2, 3), lambda step: tree(state.replace(step=jnp.int32(step))))
    metadata, iterator = ocp.args.JsonSave({"git": "abc"}), tree({"pos": jnp.int32(7), "order": jnp.arange(5)})
    items = {"state": tree(state), "metadata": metadata, "data_iter": iterator}
    save_steps(root / "manager composite", [3], lambda step: ocp.args.Composite(**items))
    parts = {name: tree(getattr(state, name)) for name in ("params", "opt_state", "batch_stats")}
    save_steps(root / "manager_split", [3], lambda step: ocp.args.Composite(**parts))


def save_msgpack(root, state):
    (root / "steps").mkdir()
    for step in (3, 10):  # as flax.training.checkpoints without Orbax calls its files
        (root / "steps" / f"checkpoint_{step}").write_bytes(serialization.to_bytes(state))
    (root / "bytes.msgpack").write_bytes(serialization.to_bytes(state))
    (root / "params.msgpack").write_bytes(serialization.to_bytes(state.params))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A folder of checkpoints, one a layout."""
    root, state = tmp_path_factory.mktemp("layouts"), state_of()
    save_managers(root, state)
    save_msgpack(root, state)
    with ocp.PyTreeCheckpointer() as saver:
        saver.save(root / "extra", {"state": state, "epoch": 4, "best_acc": 0.5, "name": "run1"})
        saver.save(root / "deep", {"runs": [{"variables": {"params": state.params, "batch_stats": state.batch_stats}}]})
    several = optax.multi_transform({"a": optax.adamw(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, LABELS)
    save_tree(root / "multi", state_of(tx=several))
    save_tree(root / "ema", state_of(WithAverages, ema_params=values(PARAMS, 2)))
    save_tree(root / "old_key", state_of(WithKey, key=jax.random.PRNGKey(3)))
    save_tree(root / "new_key", state_of(WithKey, key=jax.random.key(3)))
    save_tree(root / "bf16", state_of(dtype="bfloat16"))
    (root / "bf16.msgpack").write_bytes(serialization.to_bytes(state_of(dtype="bfloat16")))
    return root


LAYOUTS = {
    "manager": {},
    "manager composite": {"item": "state"},
    "manager_split": {},
    "steps": {},
    "bytes.msgpack": {},
    "params.msgpack": {},
    "extra": {},
    "deep": {},
    "multi": {},
    "ema": {},
    "old_key": {},
    "new_key": {},
    "bf16": {},
    "bf16.msgpack": {},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_nothing_differs_and_nothing_is_lost(name, layouts, tmp_path):
    source, options = layouts / name, LAYOUTS[name]
    there = convert(source, tmp_path / "nnx", to="nnx", **options)
    back = convert(tmp_path / "nnx", tmp_path / "linen", to="linen")
    for report in (there, back):
        assert report.verified
        assert not report.plan.lost
        assert all(item.asked for item in report.plan.left_out)
    assert diff(source, tmp_path / "nnx").differences == ()
    compared = diff(source, tmp_path / "linen")
    assert compared.differences == ()
    with closing(open_source(source, **options)) as first:
        assert compared.compared == len(first.tree.leaves)


def test_what_is_outside_of_a_state_comes_along_unchanged(layouts, tmp_path, run):
    code, out, _ = run("inspect", layouts / "extra")
    assert "training state at state: Linen TrainState" in out
    assert json.loads(run("inspect", layouts / "extra", "--json")[1])["states"] == [["state"]]
    report = convert(layouts / "extra", tmp_path / "nnx", to="nnx")
    assert "the training state is at state; what is outside of it is carried unchanged: 3 leaves" in report.plan.notes
    with closing(open_source(tmp_path / "nnx")) as there:
        outside = {path: there.read(path) for path in there.tree.leaves if path[0] != "state"}
        assert outside == {("epoch",): 4, ("best_acc",): 0.5, ("name",): "run1"}
        assert ("state", "model", "Dense_0", "kernel", "value") in there.tree.leaves
    assert code == 0


def test_a_state_at_a_place_that_is_given_and_alone(layouts, tmp_path, run):
    with open_conversion(layouts / "extra", to="nnx", at="state", outside="drop") as conversion:
        assert conversion.losses == []
        assert len(conversion.plan.dropped) == 3
    with open_conversion(layouts / "extra", to="nnx", outside="drop") as conversion:
        assert "epoch has no place: it is outside of state" in conversion.losses
    words = ("convert", layouts / "extra", tmp_path / "alone", "--to", "nnx", "--at", "state", "--drop-outside")
    assert run(*words)[0] == 0
    assert run("diff", tmp_path / "alone", layouts / "bytes.msgpack")[0] == 0
    assert run("convert", tmp_path / "alone", tmp_path / "linen", "--to", "linen")[0] == 0
    assert run("diff", tmp_path / "linen", layouts / "bytes.msgpack")[0] == 0


def test_a_place_where_nothing_is_and_a_layout_that_it_is_not(layouts, run):
    found = r"(?s)nothing is at that place.*expected: leaves below stat\n.*found: state\n.*--at PATH"
    with pytest.raises(CheckpointLayoutError, match=found):
        open_conversion(layouts / "extra", to="nnx", at="stat")
    with pytest.raises(CheckpointLayoutError, match=r"(?s)is no Linen TrainState.*the key 'params'.*--at PATH"):
        open_conversion(layouts / "extra", to="nnx", at="", kind=Kind.LINEN_TRAIN_STATE)
    for wrong in ({"at": 3}, {"at": ("a", 1)}):
        with pytest.raises(OptionError, match="the option at has no such value"):
            open_conversion(layouts / "extra", to="nnx", **wrong)
    with pytest.raises(OptionError, match=r"(?s)the option outside.*'keep' or 'drop'"):
        open_conversion(layouts / "extra", to="nnx", outside="lose")


def test_of_several_states_one_has_to_be_chosen(tmp_path):
    both = {"generator": state_of(), "critic": state_of()}
    save_tree(tmp_path / "gan", both)
    with pytest.raises(CheckpointLayoutError, match=r"(?s)several training states.*found: .*generator.*--at \w+\)"):
        open_conversion(tmp_path / "gan", to="nnx")
    convert(tmp_path / "gan", tmp_path / "half", to="nnx", at="generator")
    convert(tmp_path / "half", tmp_path / "nnx", to="nnx", at="critic")
    with closing(open_source(tmp_path / "nnx")) as there:
        kernels = [
            ("critic", "model", "Dense_0", "kernel", "value"),
            ("generator", "model", "Dense_0", "kernel", "value"),
        ]
        assert there.tree.leaves.keys() >= set(kernels)


def test_a_state_and_another_item_are_kept_side_by_side(layouts, tmp_path):
    convert(layouts / "manager composite", tmp_path / "nnx", to="nnx", item=["state", "data_iter"])
    convert(tmp_path / "nnx", tmp_path / "linen", to="linen")
    with closing(open_source(tmp_path / "linen")) as back:
        assert back.read(("data_iter", "pos")) == 7
        assert back.metadata["json_items"] == {"metadata": {"git": "abc"}}
        assert ("state", "params", "Dense_0", "kernel") in back.tree.leaves
