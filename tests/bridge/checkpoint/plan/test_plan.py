"""Plans: what is made of what, what is dropped, what is refused before anything is read."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
)
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.options import ConversionOptions
from bridge.checkpoint.plan.note import NOTE
from bridge.checkpoint.plan.places import CollectionClashError, UnknownCollectionsError
from bridge.checkpoint.plan.plan import make_plan, plan_of
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.tree.canonical import Form, Key, Role, take_apart
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.tree.layout import Kind, Layout
from tests.support.checkpoint_trees import clean, converted, on_disk
from tests.support.plan_trees import STACK, Net, layers, matrices, net_tree, state_tree
from tests.tolerance import assert_trees_equal

# ---- layouts ----------------------------------------------------------------------------------------------------


def test_params_only_become_a_bare_state_and_params_only_again():
    tree = on_disk(layers("Dense_0"))
    there, _, metadata = converted(tree, "nnx")
    assert there == {"Dense_0": {name: {"value": x} for name, x in tree["Dense_0"].items()}}
    back, _, _ = converted(there, "linen", metadata=metadata)
    assert_trees_equal(back, tree)
    assert converted(there, "linen")[0].keys() == {"params"}


@pytest.mark.parametrize("to", ["linen", "nnx"])
def test_to_the_layout_it_has_is_the_identity(to):
    tree = state_tree(layers("Dense_0"), optax.adamw(0.1), batch_stats={"Norm": {"mean": jnp.ones(1)}}, empty={})
    if to == "nnx":
        tree = net_tree(tx=optax.masked(optax.adam(0.1), matrices))
    assert_trees_equal(converted(tree, to, rng="keep")[0], tree)


def test_a_pair_of_model_and_optimizer():
    model = Net()
    pair = (model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param))
    live = of_object(pair)
    there, _, metadata = converted(live, "linen", known=live.known)
    assert set(there) == {"step", "params", "opt_state", "batch_stats"}
    back, _, _ = converted(there, "nnx", metadata=metadata)
    assert back.keys() == {"0", "1"}
    assert_trees_equal(back["1"], on_disk(pair[1]))


def test_an_optimizer_that_holds_its_model():
    model = Net()
    optimizer = nnx.ModelAndOptimizer(model, optax.adam(0.1))
    live = of_object(optimizer)
    assert live.layout.kind is Kind.NNX_TRAINING
    there, _, _ = converted(live, "linen", known=live.known)
    assert set(there) == {"step", "params", "opt_state", "batch_stats"}
    assert there["opt_state"][0]["mu"]["a"]["kernel"].shape == (4, 4)


def test_a_pure_dict_has_no_value_level():
    tree = on_disk(nnx.to_pure_dict(nnx.state(Net(), nnx.Param)))
    live = of_object(tree)
    kind = Layout(Kind.NNX_STATE, "as asked for")
    plan = make_plan(live.tree, layout=kind, to="linen")
    assert ("params", "a", "kernel") in plan.made
    assert ("a", "kernel", "value") in make_plan(live.tree, layout=kind, to="nnx").made


def test_an_unknown_layout_is_refused():
    tree = on_disk({"loss": jnp.ones(2)})
    with pytest.raises(CheckpointLayoutError, match=r"(?s)layout of the checkpoint is not known.*loss.*layout="):
        converted(tree, "nnx")
    with pytest.raises(ValueError, match=r"expected 'nnx' or 'linen'"):
        converted(tree, "torch")


def test_two_layers_in_a_list_are_no_model_and_optimizer():
    live = of_object(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))]))
    assert live.layout.kind is Kind.NNX_STATE
    assert converted(live, "linen", known=live.known)[0]["params"]["1"]["bias"].shape == (2,)


def test_nested_on_request():
    tree = state_tree(layers("a"), batch_stats={"n": {"mean": jnp.ones(1)}})
    there, plan, _ = converted(tree, "linen", nested=True)
    assert plan.target_layout is Kind.LINEN_NESTED_TRAIN_STATE
    assert there["params"].keys() == {"params", "batch_stats"}
    assert_trees_equal(converted(there, "linen", nested=False)[0], tree)


def test_slots_of_other_variables_need_their_collections():
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=(nnx.Param, nnx.BatchStat))
    live = of_object({"model": model, "optimizer": optimizer})
    with pytest.raises(CheckpointLayoutError, match=r"(?s)opt_state/0/trace/norm/mean.*nested=True"):
        converted(live, "linen", known=live.known)
    there, _, metadata = converted(live, "linen", known=live.known, nested=True)
    assert there["opt_state"][0]["trace"]["batch_stats"]["norm"]["mean"].shape == (4,)
    assert_trees_equal(converted(there, "nnx", metadata=metadata)[0]["optimizer"], on_disk(optimizer))


def test_what_linen_writes_for_msgpack():
    tree = state_tree(layers("a"), optax.chain(optax.clip(1.0), optax.masked(optax.adam(0.1), {"a": False})))
    _, plan, _ = converted(tree, "linen", empty="Dict")
    assert set(plan.target.empty.values()) == {"Dict"}
    back, _, _ = converted(converted(tree, "linen", empty="Dict")[0], "linen", empty="None")
    assert_trees_equal(back, tree)


# ---- collections ------------------------------------------------------------------------------------------------


def test_nobody_guesses_the_collection_of_a_mean():
    tree = net_tree(tx=optax.adam(0.1))
    with pytest.raises(UnknownCollectionsError, match=r'(?s)norm/mean\n  norm/var\n.*from = "\?/norm/mean"') as caught:
        converted(tree, "linen")
    assert caught.value.paths == [("norm", "mean"), ("norm", "var")]
    rules = Rules([Rule(["\\?", "norm", "(mean|var)"], ["batch_stats", "norm", "\\1"])])
    there, plan, _ = converted(tree, "linen", rules=rules)
    assert there["batch_stats"]["norm"].keys() == {"mean", "var"}
    assert any("taken to be params" in note for note in plan.notes)
    assert converted(tree, "linen", target={"params": None, **abstract_linen()})[0]["batch_stats"].keys() == {"norm"}


def abstract_linen():
    model = Net()
    live = of_object(model)
    tree, _, _ = converted(live, "linen", known=live.known)
    return jax.eval_shape(lambda: tree)


def test_many_unknown_collections_are_cut_short():
    tree = {f"m{i}": {"u": {"value": jnp.ones(1)}} for i in range(30)}
    with pytest.raises(UnknownCollectionsError, match="and 10 more"):
        converted(tree, "linen")


def test_two_collections_with_one_path_clash():
    tree = on_disk({"params": {"d": {"w": jnp.ones(1)}}, "batch_stats": {"d": {"w": jnp.zeros(1)}}})
    with pytest.raises(
        CollectionClashError, match=r'(?s)params/d/w\n  batch_stats/d/w.*to = "batch_stats/d/w_batch_stats"'
    ):
        converted(tree, "nnx")
    inside = on_disk({"params": {"d": {"w": jnp.ones(1)}}, "batch_stats": {"d": {"w": {"x": jnp.zeros(1)}}}})
    with pytest.raises(CollectionClashError, match=r"(?s)params/d/w\n  batch_stats/d/w/x"):
        converted(inside, "nnx")
    rules = Rules([Rule("batch_stats/d/w", "batch_stats/d/w_batch_stats")])
    there, _, metadata = converted(tree, "nnx", rules=rules)
    assert_trees_equal(converted(there, "linen", rules=rules.inverse(), metadata=metadata)[0], tree)


def test_custom_collections_come_back():
    tree = state_tree(
        layers("a"), optax.adam(0.1), stats={"a": {"seen": jnp.ones(2)}}, cache={"a": {"key": jnp.ones(1)}}
    )
    there, _, metadata = converted(tree, "nnx")
    assert metadata[NOTE]["collections"] == {"stats": [["a", "seen"]], "cache": [["a", "key"]]}
    assert_trees_equal(converted(there, "linen", metadata=metadata)[0], tree)


def test_a_variable_called_value():
    model = nnx.Dict(scale=nnx.Dict(value=nnx.Param(jnp.ones(2))))
    live = of_object(model)
    there, _, metadata = converted(live, "linen", known=live.known)
    assert set(there["params"]["scale"]) == {"value"}
    assert_trees_equal(converted(there, "nnx", metadata=metadata)[0], on_disk(model))
    _, plan, _ = converted(there, "nnx")
    assert any("taken to be boxes" in note and "scale" in note for note in plan.notes)
    assert_trees_equal(converted(there, "nnx", target=model)[0], on_disk(model))


# ---- what the note carries --------------------------------------------------------------------------------------


def test_without_a_note_the_end_of_a_chain_is_not_known():
    tree = state_tree(layers("a"), optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale(-0.1)))
    there, _, _ = converted(tree, "nnx")
    back, plan, _ = converted(there, "linen")
    assert back["opt_state"][0] is None
    assert len(back["opt_state"]) == 2
    assert len(tree["opt_state"]) == 3
    assert any("optax states without content" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    "note",
    [5, {}, {"version": 2}, {"version": 1, "layout": "x"}, {"version": 1, "layout": "nnx.State", "collections": [1]}],
)
def test_a_damaged_note_is_an_error(note):
    with pytest.raises(CheckpointCorruptError, match=r"(?s)metadata of the checkpoint is damaged.*linen_nnx_bridge"):
        converted(on_disk(Net()), "nnx", metadata={NOTE: note})
    converted(on_disk(Net()), "nnx", metadata={"other": note})


def test_a_note_with_paths_that_are_none():
    _, _, metadata = converted(state_tree(layers("a"), optax.adam(0.1)), "nnx")
    metadata[NOTE]["linen"]["boxed"] = ["params/a"]
    with pytest.raises(CheckpointCorruptError, match="'params/a' is no path"):
        converted(state_tree(layers("a")), "nnx", metadata=metadata)


# ---- what a plan tells ------------------------------------------------------------------------------------------


def test_rows_and_report_are_json():
    tree = state_tree(layers("layers_0", "layers_1"), optax.adam(0.1))
    _, plan, _ = converted(tree, "nnx", rules=STACK, tx=optax.adam(0.1))
    row = next(row for row in plan.rows() if row["target"] == ["model", "layers", "kernel", "value"])
    assert row == {
        "target": ["model", "layers", "kernel", "value"],
        "sources": [["params", "layers_0", "kernel"], ["params", "layers_1", "kernel"]],
        "shape": [2, 4, 4],
        "dtype": "float32",
        "nbytes": 128,
        "op": "stack along 0 of params/layers_0/kernel, params/layers_1/kernel",
    }
    report = plan.report()
    assert json.loads(json.dumps(asdict(report)))["rows"] == plan.rows()
    assert report.nbytes == plan.target.nbytes == sum(row["nbytes"] for row in plan.rows())
    assert plan.summary() == (
        f"Linen TrainState -> NNX model and optimizer: 8 leaves, {report.nbytes} bytes: "
        "1 copied as they are, 7 changed on the way (cast, stack), 0 dropped"
    )
    assert "stack along 0 of params/layers_0/bias, params/layers_1/bias -> model/layers/bias/value" in str(report)


def test_planning_tells_its_steps():
    told = []
    tree = of_object(state_tree(layers("layers_0"), optax.adam(0.1))).tree
    plan_of(tree, ConversionOptions(to="nnx"), progress=lambda *each: told.append(each))
    assert told == [("planning", done, 5) for done in (1, 2, 3, 4, 5)]


def test_the_order_is_that_of_a_train_state():
    model = Net()
    live = of_object({"model": model, "optimizer": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)})
    _, plan, _ = converted(live, "linen", known=live.known)
    assert list(dict.fromkeys(path[0] for path in plan.made)) == ["step", "params", "opt_state", "batch_stats"]


def test_every_key_has_the_path_it_was_taken_from():
    """The law of `canonical`: taking apart and `Form.path` are inverse."""
    trees = [
        state_tree(layers("a"), optax.adamw(0.1), ema_params=layers("a"), batch_stats={"a": {"mean": jnp.ones(1)}}),
        on_disk({"params": {"a": nn.Partitioned(jnp.ones(1), ("x",))}, "step": jnp.int32(0)}),
        net_tree(tx=optax.sm3(0.1)),
        net_tree(),
        on_disk(layers("a")),
    ]
    for tree in trees:
        live = of_object(tree)
        parts = take_apart(live.tree, live.layout)
        assert set(parts.leaves.values()) == set(live.tree.leaves)
        assert {key: parts.form.path(key) for key in parts.leaves} == dict(parts.leaves)


def test_forms():
    key = Key(Role.EXTRA, ("ema_params",), ("params", "a"))
    assert Form(Kind.LINEN_TRAIN_STATE).path(key) == ("ema_params", "a")
    assert Form(Kind.NNX_TRAINING, ("model",)).path(key) == ("ema_params", "a", "value")


# ---- derived rules ----------------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.first(x))


def test_derived_rules_know_the_collections():
    x = jnp.ones((2, 3))
    derived = derive(LinenNet(), NnxNet, x)
    variables = LinenNet().init(jax.random.key(0), x)
    tree = state_tree(variables["params"], optax.adam(0.1), batch_stats=variables["batch_stats"])
    there, plan, _ = converted(tree, "nnx", rules=derived, tx=optax.adam(0.1))
    assert clean(plan)
    assert there["optimizer"]["opt_state"]["0"]["mu"]["first"]["kernel"]["value"].shape == (3, 4)
    back, _, _ = converted(there, "linen", rules=derived.inverse(), tx=optax.adam(0.1))
    assert_trees_equal(back, tree)
