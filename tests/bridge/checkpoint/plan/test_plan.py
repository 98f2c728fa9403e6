"""Plans: what is made of what, what is dropped, what is refused before anything is read."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
    OptStateOrderError,
    VariablesMismatchError,
)
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.plan.note import NOTE
from bridge.checkpoint.plan.places import CollectionClashError, UnknownCollectionsError
from bridge.checkpoint.plan.plan import make_plan
from bridge.checkpoint.plan.slots import SlotError
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.tree.canonical import Form, Key, Role, take_apart
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.tree import Tree
from tests.support.checkpoint_trees import clean, converted, on_disk
from tests.tolerance import assert_trees_equal

F32 = np.float32


def layers(*names, size=4):
    draw = np.random.default_rng(0)
    return {
        name: {"kernel": draw.normal(size=(size, size)).astype(F32), "bias": draw.normal(size=size).astype(F32)}
        for name in names
    }


def state_tree(params, tx=None, **fields):
    tree = {"step": jnp.int32(3), "params": params}
    if tx is not None:
        _, tree["opt_state"] = tx.update(params, tx.init(params), params)
    return on_disk({**tree, **fields})


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


class Net(nnx.Module):
    def __init__(self, seed=0, width=4):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def net_tree(model=None, tx=None):
    model = model or Net()
    tree = {"model": model}
    if tx is not None:
        tree["optimizer"] = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return on_disk(tree if tx is not None else model)


def sources(plan):
    return {target: list(op.sources()) for target, op in plan.made.items()}


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


# ---- rules, slots, averages -------------------------------------------------------------------------------------


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


STACK = Rules([Rule(r"params/layers_(\d+)/(kernel|bias)", r"params/layers/\2", stack=0)])


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


# ---- a target ---------------------------------------------------------------------------------------------------


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
        f"Linen TrainState -> NNX model and optimizer: 8 leaves, {report.nbytes} bytes, 7 of them reworked, 0 dropped"
    )
    assert "stack along 0 of params/layers_0/bias, params/layers_1/bias -> model/layers/bias/value" in str(report)


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
