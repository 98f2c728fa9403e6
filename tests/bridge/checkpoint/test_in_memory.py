"""In memory: variables and States, TrainStates and models; strict, and without a copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bridge
import nnx_core as nnx
from bridge._errors import CheckpointLayoutError, VariablesMismatchError
from bridge.checkpoint.in_memory import (
    nnx_to_train_state,
    state_to_variables,
    train_state_to_nnx,
    train_state_to_states,
    variables_to_state,
)
from bridge.checkpoint.plan.places import CollectionClashError
from bridge.checkpoint.rules.apply import Rule, Rules
from tests.tolerance import assert_trees_equal

X = np.ones((2, 4), "float32")
INIT = nn.initializers.lecun_normal()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, kernel_init=nn.with_partitioning(INIT, ("in", "out")), name="a")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(3, name="out_1")(x)


class Native(nnx.Module):
    def __init__(self, seed=0, width=4):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.out = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)])


class State(TrainState):
    batch_stats: dict
    ema_params: dict
    dropout_rng: jax.Array


RULES = Rules.from_rename({"out_1": "out/1"})


@functools.cache
def linen_variables():
    """The same arrays each time: some tests ask whether they were copied."""
    return Linen().init(jax.random.key(0), X)


def linen_state(tx, wrap=lambda tree: tree):
    params = wrap(linen_variables()["params"])
    ema = jax.tree.map(lambda x: x + 1, params)
    state = State.create(
        apply_fn=None,
        params=params,
        tx=tx,
        batch_stats=wrap(linen_variables()["batch_stats"]),
        ema_params=ema,
        dropout_rng=jax.random.key(3),
    )
    return state.apply_gradients(grads=jax.tree.map(jnp.cos, params))


def native(tx, **options):
    model = Native(**options)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def snapshot(*objects):
    return [(v, v.get_raw_value(), dict(v.get_metadata())) for x in objects for _, v in nnx.to_flat_state(nnx.state(x))]


def unchanged(before, *objects):
    after = snapshot(*objects)
    return all(a[0] is b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(before, after, strict=True))


# ---- variables and States ---------------------------------------------------------------------------------------


def test_a_state_for_a_model_has_its_types_keys_and_streams():
    model = Native(seed=7)
    state, report = variables_to_state(linen_variables(), rules=RULES, target=model)
    assert isinstance(state["norm"]["mean"], nnx.BatchStat)
    assert state["out"][1]["kernel"].get_raw_value() is linen_variables()["params"]["out_1"]["kernel"]
    assert state["out"][0]["rngs"]["key"].get_raw_value() is model.out[0].rngs.key.get_raw_value()
    assert state["a"]["kernel"].out_sharding == ("in", "out")
    assert len(report.rows) == 10
    nnx.update(model, state)
    assert_trees_equal(bridge.variables_of(model, {"out_1": "out/1"})["batch_stats"], linen_variables()["batch_stats"])
    abstract, _ = variables_to_state(linen_variables(), rules=RULES, target=nnx.state(model, nnx.Not(nnx.RngState)))
    assert abstract["a"]["bias"].get_raw_value() is linen_variables()["params"]["a"]["bias"]


def test_a_state_without_a_target():
    state, _ = variables_to_state(freeze(linen_variables()), rules=RULES)
    assert state["out"][1]["bias"].get_raw_value() is linen_variables()["params"]["out_1"]["bias"]
    assert type(state["norm"]["var"]) is nnx.BatchStat
    back, _ = state_to_variables(state, rules=RULES.inverse())
    assert_trees_equal(back, linen_variables())
    other, _ = variables_to_state({"params": {"07": {"w": 1.0}}, "mine": {"a": jnp.ones(1)}, "empty": {}})
    assert set(other) == {"07", "a"}
    assert type(other["a"]).__name__ == "mine"


def test_models_with_attributes_called_model_and_optimizer():
    inner = nnx.Dict(model=nnx.Dict(w=nnx.Param(jnp.ones(1))), optimizer=nnx.Dict(step=nnx.Param(jnp.ones(2))))
    variables, _ = state_to_variables(inner)
    assert variables["params"]["optimizer"]["step"].shape == (2,)
    state, _ = variables_to_state(variables, target=inner)
    assert_trees_equal(state, nnx.state(inner))


def test_a_wrapped_module_keeps_names_that_two_collections_share():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (2,))
            return w + self.variable("stats", "w", lambda: jnp.zeros(2)).value

    variables = Twice().init(jax.random.key(0), X)
    model = bridge.ToNNX(Twice(), rngs=nnx.Rngs(0)).lazy_init(X)
    got, _ = state_to_variables(model)
    assert_trees_equal(got, jax.tree.map(lambda x: x, variables))
    new = jax.tree.map(lambda x: x + 5, variables)
    state, _ = variables_to_state(new, target=model)
    assert_trees_equal(state_to_variables(state)[0], new)
    with pytest.raises(CollectionClashError, match=r"params/w\n  stats/w"):
        variables_to_state(variables)


def test_values_in_a_ref_are_read():
    variable = nnx.Param(jnp.ones(2), use_ref=True)
    variables, _ = state_to_variables(nnx.Dict(w=variable))
    assert_trees_equal(variables["params"]["w"].unbox(), jnp.ones(2))


def test_axis_names_do_not_stay_where_axes_change():
    flip = Rules([Rule("params/a/kernel", keep=True, transpose=[1, 0])])
    state, report = variables_to_state(linen_variables(), rules=flip)
    assert state["a"]["kernel"].get_metadata() == {}
    assert any("axis names" in warning and "params/a/kernel" in warning for warning in report.warnings)
    state, _ = variables_to_state(linen_variables())
    back, report = state_to_variables(state, rules=flip)
    assert not isinstance(back["params"]["a"]["kernel"], nn.Partitioned)
    assert any("a/kernel/value" in warning for warning in report.warnings)
    cast = Rules([Rule("params/a/kernel", keep=True, cast="bfloat16")])
    assert state_to_variables(state, rules=cast)[0]["params"]["a"]["kernel"].names == ("in", "out")
    assert variables_to_state(linen_variables(), rules=cast)[0]["a"]["kernel"].out_sharding == ("in", "out")


def test_variables_that_do_not_fit_are_one_error():
    with pytest.raises(VariablesMismatchError, match=r"(?s)2 missing, 2 unexpected.*params/out/1/bias.*out_1"):
        variables_to_state(linen_variables(), target=Native())


# ---- TrainStates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda tree: tree, freeze], ids=["dict", "FrozenDict"])
def test_a_train_state_with_boxes_averages_and_a_key(wrap):
    tx = optax.adamw(1e-2)
    state = linen_state(tx, wrap)
    model, optimizer = native(tx)
    report = train_state_to_nnx(state, model, optimizer, rules=RULES)
    assert {row["source"][0] for row in report.dropped} == {"ema_params", "dropout_rng"}
    assert model.a.kernel.out_sharding == ("in", "out")
    ema = nnx.EMA(nnx.state(model, nnx.Param), decay=0.9).params
    back, report = nnx_to_train_state(model, optimizer, like=state, rules=RULES.inverse(), ema_params=ema)
    wanted = state.replace(ema_params=state.params)
    assert_trees_equal(back, wanted)
    assert back.params["a"]["kernel"].names == ("in", "out")
    assert back.params["a"]["kernel"].value is state.params["a"]["kernel"].value
    assert back.opt_state[0].mu["a"]["kernel"].value is state.opt_state[0].mu["a"]["kernel"].value
    assert any("made anew: dropout_rng" in note for note in report.notes)


def test_a_train_state_of_tx_alone():
    tx = optax.adamw(1e-2)

    class Plain(TrainState):
        batch_stats: dict

    model, optimizer = native(tx)
    state, _ = nnx_to_train_state(model, optimizer, tx=tx, apply_fn=print, cls=Plain, rules=RULES.inverse())
    assert (state.apply_fn, state.tx) == (print, tx)
    assert_trees_equal(state.step, jnp.int32(0))
    assert type(state.opt_state) is type(tx.init(state.params))
    assert state.params["out_1"]["kernel"] is model.out[1].kernel.get_raw_value()
    with pytest.raises(CheckpointLayoutError, match=r"(?s)without a field.*TrainState.*'batch_stats'.*cls="):
        nnx_to_train_state(model, optimizer, tx=tx)
    with pytest.raises(CheckpointLayoutError, match="neither tx nor like"):
        nnx_to_train_state(model, optimizer)
    with pytest.raises(VariablesMismatchError, match=r"(?s)opt_state/0/trace"):
        nnx_to_train_state(model, optimizer, tx=optax.sgd(0.1, 0.9), cls=Plain)


def test_a_python_step_stays_one():
    tx = optax.sgd(0.1)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    like = TrainState.create(apply_fn=None, params=nnx.to_pure_dict(nnx.state(model)), tx=tx)
    state, _ = nnx_to_train_state(model, optimizer, like=like)
    assert type(state.step) is int
    train_state_to_nnx(state.replace(step=7), model, optimizer)
    assert_trees_equal(optimizer.step.get_raw_value(), jnp.uint32(7))


def test_states_change_nothing():
    tx = optax.adam(1e-2)
    model, optimizer = native(tx)
    before = snapshot(model, optimizer)
    model_state, optimizer_state, _ = train_state_to_states(linen_state(tx), model, optimizer, rules=RULES)
    assert unchanged(before, model, optimizer)
    nnx.update(model, model_state)
    nnx.update(optimizer, optimizer_state)
    assert_trees_equal(
        state_to_variables(model, rules=RULES.inverse())[0]["batch_stats"], linen_variables()["batch_stats"]
    )
    only, none, report = train_state_to_states(linen_state(tx), model, rules=RULES)
    assert none is None
    assert_trees_equal(only, model_state)
    assert any(row["source"][0] == "opt_state" for row in report.dropped)


def test_per_axis_vectors_of_one_param():
    """SM3 keeps a list of arrays for each param: one Variable with several leaves."""
    tx = optax.sm3(0.1)
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.cos, params))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_state_to_nnx(state, model, optimizer)
    back, _ = nnx_to_train_state(model, optimizer, like=state)
    assert_trees_equal(back, state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.replace(params={**s.params, "more": {"w": X}}), "unexpected"),
        (lambda s: s.replace(batch_stats={}), r"(?s)missing.*batch_stats/norm/mean"),
        (lambda s: s.replace(opt_state=optax.sgd(0.1, 0.9).init(s.params)), r"opt_state/0/mu"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, match):
    tx = optax.adam(1e-2)
    model, optimizer = native(tx)
    before = snapshot(model, optimizer)
    with pytest.raises(VariablesMismatchError, match=match):
        train_state_to_nnx(change(linen_state(tx)), model, optimizer, rules=RULES)
    assert unchanged(before, model, optimizer)


def test_no_optimizer_state_for_an_optimizer():
    model, optimizer = native(optax.adam(1e-2))
    with pytest.raises(CheckpointLayoutError, match=r"(?s)no optimizer state: dict.*because an optimizer was given"):
        train_state_to_nnx({"params": linen_variables()["params"]}, model, optimizer, rules=RULES)


def test_values_go_where_the_model_is_sharded():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...] = jax.device_put(model.kernel[...], sharding)
    params = {"kernel": np.arange(12, dtype=np.float32).reshape(4, 3), "bias": np.ones(3, np.float32)}
    train_state_to_nnx({"params": params}, model)
    assert model.kernel.get_raw_value().sharding == sharding
    assert_trees_equal(model.kernel.get_raw_value(), params["kernel"])
    state, _ = variables_to_state({"params": {**params, "kernel": model.kernel[...]}}, target=model)
    assert state["kernel"].get_raw_value() is model.kernel.get_raw_value()


def test_a_rule_may_make_a_value():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = {"kernel": jnp.ones((2, 3))}
    new = Rule(target="params/bias", new={"value": 7.0, "shape": [3], "dtype": "float32"})
    train_state_to_nnx({"params": params}, model, rules=Rules([new]))
    assert_trees_equal(model.bias[...], jnp.full(3, 7.0))


def test_a_field_that_follows_no_param_without_like():
    class State(TrainState):
        dropout_rng: jax.Array

    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    key = jax.random.key(3)
    state, _ = nnx_to_train_state(model, optimizer, tx=tx, cls=State, dropout_rng=key)
    assert state.dropout_rng is key
