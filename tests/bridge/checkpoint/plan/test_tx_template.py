"""Optimizers whose labels and masks are trees, and what optimizers keep of params that are new: optax is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from bridge.checkpoint.plan.tx_template import TransformationError
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.opt_state import restore_into_structure
from tests.support.checkpoint_trees import clean, converted, on_disk
from tests.support.plan_trees import layers, state_tree
from tests.tolerance import assert_trees_equal

RULES = Rules(
    [Rule(r"params/Dense_0/(.*)", r"params/first/\1"), Rule(r"params/Dense_(\d+)/(.*)", r"params/blocks/\1/\2")]
)
LINEN_LABELS = {"Dense_0": {"kernel": "slow", "bias": "fast"}, "Dense_1": {"kernel": "fast", "bias": "slow"}}
NNX_LABELS = {"first": LINEN_LABELS["Dense_0"], "blocks": {1: LINEN_LABELS["Dense_1"]}}
PARTS = {"slow": optax.sgd(0.1, momentum=0.9), "fast": optax.adam(0.1)}


def is_slow(labels):
    return jax.tree.map(lambda label: label == "slow", labels)


OF_TREES = {
    "multi_transform": lambda labels: optax.multi_transform(PARTS, labels),
    "masked": lambda labels: optax.masked(optax.adam(0.1), is_slow(labels)),
    "adamw(mask)": lambda labels: optax.adamw(0.1, weight_decay=0.2, mask=is_slow(labels)),
}


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.blocks = nnx.Dict({1: nnx.Linear(4, 4, rngs=nnx.Rngs(1))})


def step_in_linen(tx, tree):
    """One step more, of plain dicts."""
    state = restore_into_structure(tx.init(tree["params"]), tree["opt_state"])
    updates, state = tx.update(tree["params"], state, tree["params"])
    return optax.apply_updates(tree["params"], updates), on_disk(state)


def step_in_nnx(tx, tree):
    """The same step of an Optimizer whose labels have NNX's names; gradients are the params."""
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for live, saved in ((model, tree["model"]), (optimizer, tree["optimizer"])):
        flat = layout.flatten_full(saved)
        state = nnx.state(live)
        assert {tuple(map(str, path)) for path in dict(nnx.to_flat_state(state))} == {path[:-1] for path in flat}
        nnx.update(live, state.map(lambda path, x, flat=flat: x.replace(flat[(*map(str, path), "value")])))
    optimizer.update(model, nnx.state(model, nnx.Param))
    return on_disk(model), on_disk(optimizer)["opt_state"]


@pytest.mark.parametrize("make", OF_TREES.values(), ids=OF_TREES)
def test_trees_of_labels_go_with_their_params_there_and_back(make):
    tree = state_tree(layers("Dense_0", "Dense_1"), make(LINEN_LABELS))
    there, plan, metadata = converted(tree, "nnx", rules=RULES, tx=make(LINEN_LABELS))  # by the names of the source
    assert clean(plan)
    for labels in (NNX_LABELS, nnx.State(NNX_LABELS)):  # by those of the result
        assert_trees_equal(converted(tree, "nnx", rules=RULES, tx=make(labels))[0], there)
    for labels in (LINEN_LABELS, NNX_LABELS, nnx.State(NNX_LABELS)):
        back, plan, _ = converted(there, "linen", rules=RULES.inverse(), metadata=metadata, tx=make(labels))
        assert clean(plan)
        assert_trees_equal(back, tree)
        back, _, _ = converted(there, "linen", rules=RULES.inverse(), tx=make(labels))  # nobody has noted anything
        assert_trees_equal(back["opt_state"], tree["opt_state"])

    params, state = step_in_linen(make(LINEN_LABELS), tree)
    after = {"step": tree["step"], "params": params, "opt_state": state}
    wanted, _, _ = converted(after, "nnx", rules=RULES, tx=make(LINEN_LABELS))
    model, opt_state = step_in_nnx(make(NNX_LABELS), there)
    assert_trees_equal(model, wanted["model"])
    ours, theirs = map(layout.flatten_full, (opt_state, wanted["optimizer"]["opt_state"]))
    assert_trees_equal(ours, theirs)


def test_trees_of_other_names_are_an_error_with_both():
    tree = state_tree(layers("Dense_0", "Dense_1"), optax.adam(0.1))
    tx = optax.masked(optax.adam(0.1), {"Dense_7": True})
    said = r"(?s)the optimizer \(tx\).*blocks/1/kernel.*as the source has them.*Dense_0/kernel.*found: .*Mend the trees"
    with pytest.raises(TransformationError, match=said):
        converted(tree, "nnx", rules=RULES, tx=tx)


# ---- params that are new ---------------------------------------------------------------------------------------

NEW = Rules([Rule(target="params/scale/w", new={"value": 2.0, "shape": [3, 2], "dtype": "float32"})])
STARTS = {
    "adagrad": lambda: optax.adagrad(0.1, initial_accumulator_value=0.3),
    "rmsprop": lambda: optax.rmsprop(0.1, initial_scale=0.7, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lookahead-like": lambda: optax.contrib.schedule_free_adamw(0.1),  # keeps the params themselves
    "partition": lambda: optax.multi_transform(
        {"w": optax.adagrad(0.1, initial_accumulator_value=0.3), "other": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda x: "w" if x.shape == (3, 2) else "other", params),
    ),
}


@pytest.mark.parametrize("make", STARTS.values(), ids=STARTS)
def test_new_params_start_as_the_optimizers_init_starts_them(make):
    tree = state_tree(layers("Dense_0"), make())
    there, plan, _ = converted(tree, "linen", rules=NEW, tx=make())
    params = {**tree["params"], "scale": {"w": jnp.full((3, 2), 2.0)}}
    fresh = layout.flatten_full(on_disk(make().init(params)))
    converted_state, before = layout.flatten_full(there["opt_state"]), layout.flatten_full(tree["opt_state"])
    assert converted_state.keys() == fresh.keys()
    for path, value in converted_state.items():
        wanted = fresh[path] if "scale" in path else before[path]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(wanted), err_msg="/".join(path))
    assert not plan.warnings
    assert any("new params start with what the optimizer's init keeps" in note for note in plan.notes)


def test_without_tx_new_slots_are_zeros_and_that_is_a_warning_that_says_what_to_do():
    tree = state_tree(layers("Dense_0"), optax.adagrad(0.1, initial_accumulator_value=0.3))
    there, plan, _ = converted(tree, "linen", rules=NEW)
    assert not np.any(there["opt_state"][0]["sum_of_squares"]["scale"]["w"])
    assert any("state of zeros: params/scale/w" in text and "--tx" in text for text in plan.warnings)
