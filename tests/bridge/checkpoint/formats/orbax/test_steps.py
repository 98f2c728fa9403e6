"""Which folder is read: steps of a CheckpointManager, items of a composite checkpoint."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bridge._errors import CheckpointLayoutError, CheckpointNotFoundError
from bridge.checkpoint import read_metadata, read_tree


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def test_latest_step_by_default_and_any_on_request(tmp_path):
    root = tmp_path / "run"
    with ocp.CheckpointManager(root) as manager:
        for step in (3, 12, 9):
            manager.save(step, args=ocp.args.StandardSave({"params": {"w": jnp.full(1, step)}}), force=True)
        manager.wait_until_finished()
    assert read_metadata(root).step == 12
    assert read_metadata(root).item == "default"
    assert read_tree(root)["params"]["w"] == 12
    assert read_tree(root, step=3)["params"]["w"] == 3
    assert read_tree(root / "9")["params"]["w"] == 9
    assert read_tree(root / "9" / "default")["params"]["w"] == 9
    with pytest.raises(
        CheckpointNotFoundError, match=r"(?s)no step 4: .*run.*expected: a folder for step 4.*found: 3, 9, 12"
    ):
        read_tree(root, step=4)


def test_steps_with_a_prefix_and_an_unfinished_one(tmp_path):
    for step in (1, 10, 2):
        save(tmp_path / "run" / f"checkpoint_{step}", {"params": {"w": jnp.full(1, step)}})
    (tmp_path / "run" / "checkpoint_99.orbax-checkpoint-tmp-1").mkdir()
    assert read_metadata(tmp_path / "run").step == 10
    assert read_tree(tmp_path / "run", step=2)["params"]["w"] == 2


def test_items_are_chosen_by_name(tmp_path):
    root = tmp_path / "run"
    with ocp.CheckpointManager(root) as manager:
        manager.save(
            1,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"params": {"w": jnp.ones(1)}}),
                ema=ocp.args.StandardSave({"w": jnp.zeros(1)}),
                notes=ocp.args.JsonSave({"a": 1}),
            ),
        )
        manager.wait_until_finished()
    assert read_metadata(root).item == "state"
    assert read_tree(root, item="ema") == {"w": np.zeros(1)}
    assert read_tree(root, step=1, item="ema") == {"w": np.zeros(1)}
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no item 'notes'.*found: ema, state"):
        read_tree(root, item="notes")


def test_items_without_a_usual_name_have_to_be_chosen(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / "run" / name, {"params": {"w": jnp.ones(1)}})
    with pytest.raises(CheckpointLayoutError, match=r"(?s)several items: .*run.*found: one, two.*--item"):
        read_metadata(tmp_path / "run")
    assert read_metadata(tmp_path / "run", item="two").item == "two"


def test_a_single_checkpoint_has_no_steps(tmp_path):
    saved = save(tmp_path / "ck", {"params": {"w": jnp.ones(1)}})
    with pytest.raises(CheckpointNotFoundError, match="found: no step folders"):
        read_metadata(saved, step=1)
    with pytest.raises(CheckpointNotFoundError, match="found: a checkpoint without items"):
        read_metadata(saved, item="state")
