"""Averages and other trees of the shape of the params go where the user says, by the rules of the params."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge._errors import VariablesMismatchError
from bridge.checkpoint import OptionError, Rules, load_into, save_as_linen
from tests.tolerance import assert_trees_equal

RULES = Rules.from_rename({"Dense_0": "linear", "BatchNorm_0": "norm"})


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Averaged(TrainState):
    batch_stats: Any
    ema_params: Any


def linen_state():
    rng = np.random.default_rng(0)

    def params():
        dense = {"kernel": rng.standard_normal((2, 3)), "bias": rng.standard_normal(3)}
        norm = {"scale": rng.standard_normal(3), "bias": rng.standard_normal(3)}
        return jax.tree.map(jnp.float32, {"Dense_0": dense, "BatchNorm_0": norm})

    stats = {"BatchNorm_0": {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 3.0)}}
    return Averaged.create(
        apply_fn=None, params=params(), tx=optax.adam(0.1), batch_stats=stats, ema_params=params()
    ).replace(step=jnp.int32(3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path, state = tmp_path_factory.mktemp("extras") / "ck", linen_state()
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, state)
    return path, state


def weights(model):
    """The params of the model in Linen's names."""
    dense = {"kernel": model.linear.kernel[...], "bias": model.linear.bias[...]}
    return {"Dense_0": dense, "BatchNorm_0": {"scale": model.norm.scale[...], "bias": model.norm.bias[...]}}


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_averages_go_into_a_model_of_their_own(saved, with_optimizer):
    path, state = saved
    model, ema = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param) if with_optimizer else None
    kernel, key = ema.linear.kernel, ema.drop.rngs.key[...]
    report = load_into(model, path, RULES, optimizer=optimizer, extras={"ema_params": ema})
    assert_trees_equal(weights(model), state.params)
    assert_trees_equal(weights(ema), state.ema_params)
    assert ema.linear.kernel is kernel
    assert ema.drop.rngs.key[...] == key
    assert ema.norm.mean[...].tolist() == [0.0, 0.0, 0.0]  # its own: there are no averages of statistics
    assert model.norm.mean[...].tolist() == [2.0, 2.0, 2.0]
    assert not any(row["source"][0] == "ema_params" for row in report.dropped)
    assert report.warnings == []
    assert any("ema_params is of params: these variables of it are left as they are" in note for note in report.notes)


def test_an_abstract_model_of_params_alone(saved):
    path, state = saved
    model, ema = Net(nnx.Rngs(0)), nnx.eval_shape(lambda: nnx.state(Net(nnx.Rngs(1)), nnx.Param))
    load_into(model, path, RULES, extras={"ema_params": ema})
    assert_trees_equal(ema["linear"]["kernel"][...], state.ema_params["Dense_0"]["kernel"])


def test_averages_that_nobody_asks_for_are_a_warning(saved):
    path, _ = saved
    report = load_into(Net(nnx.Rngs(0)), path, RULES)
    assert any("no place in the target: ema_params (load_into: extras=...)" in text for text in report.warnings)
    assert {row["source"][0] for row in report.dropped} == {"ema_params", "opt_state", "step"}


def test_averages_that_are_not_there_or_of_another_shape_change_nothing(saved):
    path, _ = saved
    model, ema = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    before = weights(model)
    with pytest.raises(VariablesMismatchError, match="average/linear/kernel"):
        load_into(model, path, RULES, extras={"average": ema})
    ema.linear = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    with pytest.raises(VariablesMismatchError, match="ema_params/linear/kernel"):
        load_into(model, path, RULES, extras={"ema_params": ema})
    assert_trees_equal(weights(model), before)
    with pytest.raises(OptionError, match=r"(?s)the option extras.*beside model and optimizer"):
        load_into(model, path, RULES, extras={"optimizer": ema})


def test_and_back(saved, tmp_path):
    path, state = saved
    model, ema = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    load_into(model, path, RULES, optimizer=optimizer, extras={"ema_params": ema})
    report = save_as_linen(model, optimizer, tmp_path / "back", rules=RULES, extras={"ema_params": ema})
    assert any("ema_params is of params" in note and "norm/mean" in note for note in report.notes)
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "back", jax.eval_shape(lambda: state))
    assert_trees_equal(restored.ema_params, state.ema_params)
    assert_trees_equal(restored.params, state.params)
    assert_trees_equal(restored.opt_state, state.opt_state)


def test_a_state_inside_a_larger_tree_is_loaded(saved, tmp_path):
    _, state = saved
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "ck", {"state": state, "epoch": jnp.int32(4)})
    for options in ({}, {"at": "state"}):
        model, ema = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        report = load_into(model, tmp_path / "ck", RULES, optimizer=optimizer, extras={"ema_params": ema}, **options)
        assert_trees_equal(weights(model), state.params)
        assert_trees_equal(weights(ema), state.ema_params)
        assert int(optimizer.step[...]) == 3
        left = [row for row in report.dropped if row["source"] == ["epoch"]]
        assert left == [{"source": ["epoch"], "why": "it is outside of state", "asked": bool(options)}]
