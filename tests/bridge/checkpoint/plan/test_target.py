"""A target: what does not fit it is one error; random streams and the step as it has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from bridge._errors import (
    CheckpointLayoutError,
    VariablesMismatchError,
)
from bridge.checkpoint.plan.plan import make_plan
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.tree import Tree
from tests.support.checkpoint_trees import converted, on_disk
from tests.support.plan_trees import Net, layers, matrices, net_tree, state_tree
from tests.tolerance import assert_trees_equal


def linen_net(tx=None, width=4):
    live = of_object(
        {"model": (model := Net(width=width)), **({"optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)} if tx else {})}
    )
    tree, _, _ = converted(
        live if tx else of_object(model), "linen", known=live.known if tx else of_object(model).known, tx=tx
    )
    return tree


def test_everything_that_does_not_fit_is_one_error():
    tree = linen_net()
    tree["params"]["a"]["bias"] = jnp.ones(5)
    tree["params"]["a"]["kernel"] = jnp.ones((4, 4), jnp.bfloat16)
    tree["params"]["extra"] = {"w": jnp.ones(1)}
    del tree["batch_stats"]["norm"]["mean"]
    with pytest.raises(VariablesMismatchError) as caught:
        converted(tree, "nnx", target=Net())
    error = caught.value
    assert error.missing == [("batch_stats", "norm", "mean")]
    assert error.unexpected == [("params", "extra", "w")]
    assert error.wrong_shape == [(("params", "a", "bias"), (4,), (5,))]
    assert error.wrong_dtype == [(("params", "a", "kernel"), "float32", "bfloat16")]


def test_a_target_of_another_optimizer():
    model = Net()
    target = {"model": model, "optimizer": nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)}
    with pytest.raises(
        VariablesMismatchError, match=r"(?s)missing.*opt_state/0/trace/a/bias.*unexpected.*opt_state/0/mu"
    ):
        converted(linen_net(optax.adam(0.1)), "nnx", target=target)
    with pytest.raises(VariablesMismatchError, match=r"(?s)the state of tx.*opt_state/0/trace"):
        converted(linen_net(optax.adam(0.1)), "nnx", tx=optax.sgd(0.1, 0.9))
    tree = linen_net(optax.adam(0.1))
    tree["opt_state"][0]["mu"]["a"]["bias"] = jnp.ones(4, jnp.bfloat16)
    with pytest.raises(VariablesMismatchError, match=r"mu/a/bias: expected float32, found bfloat16"):
        converted(tree, "nnx", tx=optax.adam(0.1))


def test_a_param_that_the_target_masks():
    tx = optax.masked(optax.adam(0.1), matrices)
    model = Net()
    target = {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}
    tree = linen_net(optax.masked(optax.adam(0.1), lambda params: jax.tree.map(lambda x: True, params)))
    with pytest.raises(VariablesMismatchError, match=r"(?s)unexpected.*inner_state/0/mu/a/bias"):
        converted(tree, "nnx", target=target)


def test_a_model_alone_leaves_the_optimizer_behind():
    _, plan, _ = converted(linen_net(optax.adam(0.1)), "nnx", target=Net())
    assert ("step",) in plan.lost
    assert "the target has no place for optimizer state" in plan.lost[("opt_state", "0", "mu", "a", "bias")]


def test_a_narrower_type_takes_what_linen_calls_params():
    class Special(nnx.Param):
        pass

    model = nnx.Dict(a=nnx.Dict(w=Special(jnp.zeros(2))))
    there, _, _ = converted({"params": {"a": {"w": jnp.ones(2)}}}, "nnx", target=model)
    assert_trees_equal(there["a"]["w"]["value"], jnp.ones(2))


def test_python_numbers_take_any_scalar_of_their_kind():
    tree = linen_net(optax.adam(0.1))
    target = {**jax.tree.map(lambda x: x, tree), "step": 0}
    there, _, _ = converted(tree, "linen", target=target)
    assert there["step"] is tree["step"]
    with pytest.raises(VariablesMismatchError, match="step: expected float"):
        converted(tree, "linen", target={**target, "step": 0.5})


# ---- random streams ---------------------------------------------------------------------------------------------


def test_random_streams_are_dropped_kept_or_made_anew():
    live = of_object(Net(seed=7))
    _, plan, _ = converted(live, "linen", known=live.known)
    assert plan.dropped.keys() == {("drop", "rngs", "key", "value"), ("drop", "rngs", "count", "value")}
    assert not plan.lost
    kept, _, metadata = converted(live, "linen", known=live.known, rng="keep")
    assert kept["nnx_rngs"]["drop"]["rngs"].keys() == {"key", "count"}
    back, _, _ = converted(kept, "nnx", metadata=metadata, rng="keep")
    assert_trees_equal(back, on_disk(Net(seed=7)))
    one, two, other = (converted(live, "nnx", known=live.known, rng=seed)[0]["drop"]["rngs"] for seed in (0, 0, 1))
    assert_trees_equal(one, two)
    with pytest.raises(AssertionError):
        assert_trees_equal(one["key"], other["key"])
    assert one["key"]["value"].dtype == live.values[("drop", "rngs", "key", "value")].dtype
    assert int(one["count"]["value"]) == 0


def test_random_streams_are_found_by_their_dtype_on_disk():
    plan = make_plan(of_object(net_tree()).tree, to="nnx")
    assert plan.dropped.keys() == {("drop", "rngs", "key", "value"), ("drop", "rngs", "count", "value")}


def test_random_streams_come_from_the_target():
    tree = linen_net()
    model = Net(seed=3)
    there, plan, _ = converted(tree, "nnx", target=model)
    assert there["drop"]["rngs"]["key"]["value"] is model.drop.rngs.key.get_raw_value()
    assert any("drop/rngs/key" in note for note in plan.notes)
    abstract = nnx.eval_shape(Net)
    with pytest.raises(CheckpointLayoutError, match=r"(?s)has to come from the target.*drop/rngs.*rng=SEED"):
        converted(tree, "nnx", target=abstract)
    seeded, _, _ = converted(tree, "nnx", target=abstract, rng=5)
    assert_trees_equal(seeded["drop"]["rngs"], converted(tree, "nnx", target=model, rng=5)[0]["drop"]["rngs"])


def test_streams_of_several_keys_and_of_raw_ones():
    leaves = {
        ("rngs", "a", "key", "value"): Leaf(("rngs", "a", "key", "value"), (3,), "key<fry>", 24),
        ("rngs", "a", "count", "value"): Leaf(("rngs", "a", "count", "value"), (3,), "uint32", 12),
        ("rngs", "b", "key", "value"): Leaf(("rngs", "b", "key", "value"), (2,), "uint32", 8),
        ("rngs", "b", "count", "value"): Leaf(("rngs", "b", "count", "value"), (), "uint32", 4),
    }
    plan = make_plan(Tree(leaves), to="nnx", rng=1)
    assert {path: (op.shape, op.dtype) for path, op in plan.made.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()
    }


# ---- step -------------------------------------------------------------------------------------------------------


def test_the_step_counts_in_uint32_in_nnx_and_in_int32_in_linen():
    tree = state_tree(layers("a"), optax.adam(0.1))
    there, _, metadata = converted(tree, "nnx")
    assert there["optimizer"]["step"]["value"].dtype == jnp.uint32
    assert converted(there, "linen")[0]["step"].dtype == jnp.int32
    python = {**tree, "step": 3}
    there, _, metadata = converted(python, "nnx")
    assert_trees_equal(there["optimizer"]["step"]["value"], np.uint32(3))
    assert converted(there, "linen", metadata=metadata)[0]["step"] == 3


def test_an_optimizer_state_without_a_step():
    tree = state_tree(layers("a"), optax.adam(0.1))
    del tree["step"]
    there, plan, _ = converted(tree, "nnx")
    assert_trees_equal(there["optimizer"]["step"]["value"], np.uint32(0))
    assert any("no step" in warning for warning in plan.warnings)
