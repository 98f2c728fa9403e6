"""Slots and averages follow their param through renames, stacks and casts, or the plan says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from bridge._errors import (
    OptStateOrderError,
)
from bridge.checkpoint.plan.slots import SlotError
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.tree.layout import Kind
from tests.support.checkpoint_trees import clean, converted, on_disk
from tests.support.plan_trees import F32, STACK, layers, matrices, state_tree
from tests.tolerance import assert_trees_equal


def test_averages_and_slots_follow_their_params():
    params = layers("Dense_0", "Dense_1")
    ema = jax.tree.map(lambda x: x + 1, params)
    tree = state_tree(params, optax.adam(0.1), ema_params=ema, dropout_rng=jax.random.key(3))
    rules = Rules.from_rename({"Dense_0": "hidden", "Dense_1": "layers/0"})
    there, plan, metadata = converted(tree, "nnx", rules=rules)
    assert clean(plan)
    assert there["ema_params"]["layers"]["0"]["kernel"]["value"] is ema["Dense_1"]["kernel"]
    assert there["optimizer"]["opt_state"]["0"]["nu"]["hidden"]["bias"]["value"].shape == (4,)
    back, _, _ = converted(there, "linen", rules=rules.inverse(), metadata=metadata)
    assert_trees_equal(back, tree)


def test_averages_without_an_optimizer_keep_the_layout_recognisable():
    tree = {"params": layers("a"), "ema_params": layers("a")}
    there, plan, metadata = converted(on_disk(tree), "nnx")
    assert there["optimizer"] == {}
    assert of_object(there).layout.kind is Kind.NNX_TRAINING
    assert plan.target_layout is Kind.NNX_TRAINING
    assert_trees_equal(converted(there, "linen", metadata=metadata)[0], on_disk(tree))


def test_a_dropped_param_takes_its_slots_along():
    tree = state_tree(layers("a", "b"), optax.adam(0.1))
    there, plan, _ = converted(tree, "nnx", rules=Rules([Rule("params/b/**", drop=True)]))
    assert "b" not in there["model"]
    assert "b" not in there["optimizer"]["opt_state"]["0"]["mu"]
    assert plan.dropped[("opt_state", "0", "mu", "b", "kernel")] == "its param params/b/kernel is dropped"
    assert len(plan.dropped) == 6
    assert not plan.lost


def test_layers_are_stacked_with_their_slots():
    params = layers("layers_0", "layers_1", "layers_2")
    tree = state_tree(params, optax.adamw(0.1))
    there, plan, metadata = converted(tree, "nnx", rules=STACK)
    assert any("Give tx=" in warning for warning in plan.warnings)
    mu = there["optimizer"]["opt_state"]["0"]["mu"]["layers"]["kernel"]["value"]
    assert_trees_equal(mu, jnp.stack([tree["opt_state"][0]["mu"][f"layers_{i}"]["kernel"] for i in range(3)]))
    assert clean(converted(tree, "nnx", rules=STACK, tx=optax.adamw(0.1))[1])
    back, _, _ = converted(there, "linen", rules=STACK.inverse(), metadata=metadata)
    assert_trees_equal(back, tree)


def test_an_optimizer_that_does_not_commute_with_stacking():
    tree = state_tree(layers("layers_0", "layers_1"), optax.lamb(0.1))
    _, plan, _ = converted(tree, "nnx", rules=STACK, tx=optax.lamb(0.1))
    assert any("the next update of this optimizer is another one" in warning for warning in plan.warnings)
    tree = state_tree(layers("layers_0", "layers_1"), optax.novograd(0.1))
    with pytest.raises(SlotError, match=r"(?s)opt_state/0/nu/layers_0/bias.*expected: shape \(4,\).*fresh"):
        converted(tree, "nnx", rules=STACK)


def test_params_that_are_masked_in_part_cannot_be_stacked():
    tx = optax.masked(optax.adam(0.1), {"layers_0": True, "layers_1": False})
    tree = state_tree(layers("layers_0", "layers_1"), tx)
    with pytest.raises(SlotError, match=r"(?s)an entry for each param.*none for params/layers_1"):
        converted(tree, "nnx", rules=STACK)
    tx = optax.masked(optax.adam(0.1), {"layers_0": False, "layers_1": False})
    tree = state_tree(layers("layers_0", "layers_1"), tx)  # a mask over whole modules
    there, _, metadata = converted(tree, "nnx", rules=STACK)
    assert there["optimizer"]["opt_state"]["inner_state"]["0"].keys() == {"count"}
    assert_trees_equal(converted(there, "linen", rules=STACK.inverse(), metadata=metadata)[0], tree)
    tree = state_tree(layers("layers_0", "layers_1"), optax.masked(optax.adam(0.1), matrices))
    there, _, _ = converted(tree, "nnx", rules=STACK)
    assert there["optimizer"]["opt_state"]["inner_state"]["0"]["mu"]["layers"]["bias"] == {"value": None}


def test_slots_of_other_dtypes_cannot_be_joined():
    params = {"layers_0": {"kernel": np.ones(2, F32)}, "layers_1": {"kernel": np.ones(2, F32)}}
    tree = state_tree(params, optax.adam(0.1))
    tree["opt_state"][0]["mu"]["layers_1"]["kernel"] = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(SlotError, match=r"(?s)opt_state/0/mu/layers_0/kernel.*put together.*bfloat16"):
        converted(tree, "nnx", rules=STACK)


def test_a_cast_is_for_slots_of_the_dtype_of_the_params():
    tree = state_tree(layers("a"), optax.adam(0.1, mu_dtype=jnp.float16))
    there, _, _ = converted(tree, "nnx", rules=Rules([Rule("params/**", keep=True, cast="bfloat16")]))
    slots = there["optimizer"]["opt_state"]["0"]
    assert slots["mu"]["a"]["bias"]["value"].dtype == jnp.float16
    assert slots["nu"]["a"]["bias"]["value"].dtype == jnp.bfloat16
    assert slots["count"]["value"].dtype == jnp.int32


def test_a_new_param_starts_with_zeros_or_as_in_the_target():
    tx = optax.adam(0.1)
    new = {"value": 1.0, "shape": [4], "dtype": "float32"}
    tree = state_tree(layers("a"), tx)
    there, plan, _ = converted(tree, "nnx", rules=Rules([Rule(target="params/a/scale", new=new)]))
    assert_trees_equal(there["optimizer"]["opt_state"]["0"]["mu"]["a"]["scale"]["value"], np.zeros(4, F32))
    assert any("zeros: params/a/scale" in warning for warning in plan.warnings)
    model = nnx.Dict(
        a=nnx.Dict(kernel=nnx.Param(jnp.ones((4, 4))), bias=nnx.Param(jnp.ones(4)), scale=nnx.Param(jnp.full(4, 7.0)))
    )
    target = {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}
    rules = Rules([Rule(target="params/a/scale", new="target")])
    there, plan, _ = converted(tree, "nnx", rules=rules, target=target)
    assert there["model"]["a"]["scale"]["value"] is model["a"]["scale"].get_raw_value()
    assert_trees_equal(there["optimizer"]["opt_state"]["0"]["mu"]["a"]["scale"]["value"], jnp.zeros(4))
    assert any("taken from the target" in note for note in plan.notes)


def test_vectors_over_all_params_are_refused_once_the_order_changes():
    tx = optax.flatten(optax.adam(0.1))
    tree = state_tree(layers("a", "b"), tx)
    with pytest.raises(OptStateOrderError, match="opt_state/0/mu"):
        converted(tree, "nnx", rules=Rules.from_rename({"a": "z"}))
    converted(tree, "nnx", rules=Rules.from_rename({"a": "aa"}))
    tree = state_tree(layers("a", "b"), optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1, 0.9)))
    _, plan, _ = converted(tree, "nnx", rules=Rules.from_rename({"a": "z"}))
    assert any("draws noise in the order of the names" in warning for warning in plan.warnings)
