"""save_as_linen: what Linen code restores from it is what a real TrainState would have been, to the last bit."""

import json
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
import nnx_core as nnx
from bridge._errors import (
    CheckpointExistsError,
    CheckpointLayoutError,
    CheckpointWriteError,
    VariablesMismatchError,
)
from bridge.checkpoint.formats.open import SINK_FORMATS
from bridge.checkpoint.in_memory import train_state_to_nnx
from bridge.checkpoint.loading import load_into
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.rules.rule import RulesError
from bridge.checkpoint.save import save_as_linen
from tests.support.placed_models import Scanned, mesh
from tests.support.training import (
    OPTIMIZERS,
    RULES,
    STEPS,
    linen_state,
    linen_step,
    native,
    native_step,
    on_host,
    saved,
)
from tests.tolerance import assert_trees_equal


def restored(path, target):
    """What the old code gets."""
    with ocp.StandardCheckpointer() as saver:
        return saver.restore(path, target=target)


def plain(state):
    """On the host; the step as a number, which it is before the first step under jit."""
    return on_host(state.replace(step=int(state.step), tx=None, apply_fn=None))


def in_nnx(state, make):
    model, optimizer = native(make())
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    return model, optimizer


def adam():
    return optax.adam(1e-2)


# ---- the old code goes on ----------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_old_code_goes_on_to_the_last_bit(tmp_path, make):
    model, optimizer = in_nnx(linen_state(make(), STEPS), make)
    for _ in range(STEPS):
        native_step(model, optimizer)
    save_as_linen(model, optimizer, tmp_path / "linen", rules=RULES)
    state = restored(tmp_path / "linen", linen_state(make()))
    assert int(state.step) == 2 * STEPS
    assert_trees_equal(plain(state), plain(linen_state(make(), 2 * STEPS)))
    state, _ = linen_step(state)
    assert_trees_equal(plain(state), plain(linen_state(make(), 2 * STEPS + 1)))


def table(path):
    """Orbax's table of the tree: keys, kinds of nodes and of leaves, entries without content."""
    return json.loads((path / "_METADATA").read_text())["tree_metadata"]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_disk_it_is_what_a_train_state_is(tmp_path, make):
    state = linen_state(make(), 1)
    save_as_linen(*in_nnx(state, make), tmp_path / "ours", rules=RULES)
    assert table(tmp_path / "ours") == table(saved(tmp_path / "real", state))


def test_from_shards(tmp_path):
    state = linen_state(adam(), 1)
    model, optimizer = in_nnx(state, adam)
    over = NamedSharding(mesh(), P(None, "model"))
    for variable in (model.first.kernel, nnx.state(optimizer)["opt_state"][0]["mu"]["first"]["kernel"]):
        variable.set_raw_value(jax.device_put(variable.get_raw_value(), over))
    save_as_linen(model, optimizer, tmp_path / "linen", rules=RULES)
    assert_trees_equal(plain(restored(tmp_path / "linen", linen_state(adam()))), plain(state))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(3, kernel_init=init)(x)


def test_a_wrapped_module_with_boxes(tmp_path):
    """ToNNX has Linen's paths, and its Variables Linen's axis names: nothing need be said."""
    x = jnp.ones((2, 5))
    model = bridge.lazy_init(bridge.ToNNX(Boxed(), rngs=nnx.Rngs(0)), x)
    optimizer = nnx.Optimizer(model, adam(), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(x).sum())(model)
    optimizer.update(model, grads)
    save_as_linen(model, optimizer, tmp_path / "linen")
    params = Boxed().init(jax.random.key(4), x)["params"]
    fresh = TrainState.create(apply_fn=Boxed().apply, params=params, tx=adam())
    real = fresh.apply_gradients(grads=params)
    assert table(tmp_path / "linen").keys() == table(saved(tmp_path / "real", real)).keys()
    state = restored(tmp_path / "linen", fresh)
    assert isinstance(state.params["Dense_0"]["kernel"], nn.Partitioned)
    assert_trees_equal(state.apply_fn({"params": state.params}, x), model(x))
    assert_trees_equal(
        np.asarray(state.opt_state[0].mu["Dense_0"]["kernel"].value),
        np.asarray(nnx.state(optimizer)["opt_state"][0]["mu"]["Dense_0"]["kernel"][...]),
    )


@pytest.mark.slow
def test_axis_names_without_boxes(tmp_path):
    """A native model may have axis names that the Linen code has not: `like` says so."""
    model = Scanned(nnx.Rngs(0))
    params = {f"Dense_{i}": {"kernel": jnp.full((8, 8), i + 0.5), "bias": jnp.full((8,), i + 0.0)} for i in range(4)}
    state = TrainState.create(apply_fn=None, params=params, tx=adam()).apply_gradients(grads=params)
    optimizer = nnx.Optimizer(model, adam(), wrt=nnx.Param)
    rules = Rules([Rule(r"params/Dense_(\d+)/*", "params/*", stack=0)])
    train_state_to_nnx(state, model, optimizer, rules=rules)
    save_as_linen(model, optimizer, tmp_path / "linen", rules=rules, like=jax.eval_shape(lambda: state))
    assert_trees_equal(plain(restored(tmp_path / "linen", state)), plain(state))


def test_rules_for_the_way_back(tmp_path):
    model = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    rules = Rules([Rule("params/*", keep=True, cast="bfloat16")])
    with pytest.raises(RulesError, match="inverted"):
        save_as_linen(model, optimizer, tmp_path / "linen", rules=rules)
    assert not (tmp_path / "linen").exists()
    back = Rules([Rule("params/*", keep=True, cast="float32")])
    save_as_linen(model, optimizer, tmp_path / "linen", rules=rules, back=back)
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    state = restored(tmp_path / "linen", TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)))
    assert_trees_equal(np.asarray(state.params["kernel"]), np.asarray(model.kernel[...]).astype("float32"))


def test_a_transformation_that_goes_by_names(tmp_path):
    """The optimizer's own one knows NNX's names; Linen's code has one for its own."""

    def labelled(first):
        return lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "slow" if path[0].key == first else "fast", params
        )

    def make(first):
        return optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)}, labelled(first))

    state = linen_state(make("hidden"), 2)
    model, optimizer = native(make("first"))
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    with pytest.raises(VariablesMismatchError, match="opt_state"):
        save_as_linen(model, optimizer, tmp_path / "linen", rules=RULES)
    save_as_linen(model, optimizer, tmp_path / "linen", rules=RULES, tx=make("hidden"))
    assert_trees_equal(plain(restored(tmp_path / "linen", linen_state(make("hidden")))), plain(state))


class WithMore(TrainState):
    batch_stats: Any
    ema_params: Any
    dropout_rng: Any


def test_more_fields(tmp_path):
    state = linen_state(adam(), 2)
    model, optimizer = in_nnx(state, adam)
    average = nnx.state(model, nnx.Param).map(lambda path, v: v.replace(v[...] * 0.5))
    key = jax.random.key(3)
    more = {"ema_params": average, "dropout_rng": key}
    want = WithMore(
        **{name: getattr(state, name) for name in ("step", "apply_fn", "params", "tx", "opt_state", "batch_stats")},
        ema_params=jax.tree.map(lambda x: x * 0.5, state.params),
        dropout_rng=key,
    )
    for name, like in (("alone", None), ("like", want.replace(dropout_rng=jax.random.key(0)))):
        save_as_linen(model, optimizer, tmp_path / name, rules=RULES, extras=more, like=like)
        found = restored(
            tmp_path / name, jax.tree.map(jnp.zeros_like, want.replace(dropout_rng=None)).replace(dropout_rng=key)
        )
        data = jax.random.key_data
        assert_trees_equal(
            plain(found.replace(dropout_rng=data(found.dropout_rng))), plain(want.replace(dropout_rng=data(key)))
        )


def test_variables_alone(tmp_path):
    state = linen_state(adam(), 1)
    model, _ = in_nnx(state, adam)
    report = save_as_linen(model, None, tmp_path / "variables", rules=RULES)
    found = restored(tmp_path / "variables", {"params": state.params, "batch_stats": state.batch_stats})
    assert_trees_equal(on_host(found), on_host({"params": state.params, "batch_stats": state.batch_stats}))
    assert report.target_layout == "Linen variables"


def test_a_model_of_flax_nnx(tmp_path):
    model = flax_nnx.Linear(4, 3, rngs=flax_nnx.Rngs(0))
    optimizer = flax_nnx.Optimizer(model, adam(), wrt=flax_nnx.Param)
    optimizer.update(model, flax_nnx.grad(lambda model: model(jnp.ones((1, 4))).sum())(model))
    save_as_linen(model, optimizer, tmp_path / "linen")
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    state = restored(tmp_path / "linen", TrainState.create(apply_fn=None, params=params, tx=adam()))
    assert int(state.step) == 1
    assert_trees_equal(*on_host((state.params["kernel"], model.kernel[...])))
    assert_trees_equal(
        *on_host((state.opt_state[0].nu["bias"], flax_nnx.state(optimizer)["opt_state"][0]["nu"]["bias"][...]))
    )


# ---- other formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SINK_FORMATS)
def test_formats(tmp_path, format):
    state = linen_state(adam(), 2)
    model, optimizer = in_nnx(state, adam)
    save_as_linen(model, optimizer, tmp_path / "linen", rules=RULES, format=format)
    again, other = native(adam(), seed=3)
    load_into(again, tmp_path / "linen", RULES, optimizer=other, format=format)
    for ours, theirs in ((again, model), (other, optimizer)):
        assert_trees_equal(*(on_host(nnx.to_pure_dict(nnx.state(x))) for x in (ours, theirs)))


def test_msgpack_is_what_flax_reads(tmp_path):
    state = linen_state(adam(), 2)
    save_as_linen(*in_nnx(state, adam), tmp_path / "linen", rules=RULES, format="msgpack")
    found = flax.serialization.from_bytes(linen_state(adam()), (tmp_path / "linen").read_bytes())
    assert_trees_equal(plain(found), plain(state))


# ---- what cannot be written --------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    return in_nnx(linen_state(adam(), 1), adam)


def test_nothing_is_overwritten(tmp_path, trained):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(CheckpointExistsError, match=r"(?s)something is at the path.*expected: nothing"):
        save_as_linen(*trained, tmp_path / "there", rules=RULES)
    assert (tmp_path / "there").read_text() == "mine"


def test_no_such_format(tmp_path, trained):
    with pytest.raises(CheckpointLayoutError, match=r"(?s)no such format is written.*msgpack.*found: 'npz'"):
        save_as_linen(*trained, tmp_path / "new", rules=RULES, format="npz")


def test_variables_alone_have_no_more_fields(tmp_path, trained):
    for more in ({"like": linen_state(adam())}, {"extras": {"dropout_rng": jax.random.key(0)}}):
        with pytest.raises(CheckpointLayoutError, match="variables alone have no other fields"):
            save_as_linen(trained[0], None, tmp_path / "new", rules=RULES, **more)


def test_what_does_not_fit_like(tmp_path, trained):
    like = linen_state(optax.sgd(1e-2, 0.9))
    with pytest.raises(VariablesMismatchError, match="opt_state/0/trace"):
        save_as_linen(*trained, tmp_path / "new", rules=RULES, like=like)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"(?s)could not be written.*expected: room, permission"):
        save_as_linen(*trained, tmp_path / "file" / "new", rules=RULES)


def test_several_processes_write_with_orbax_only(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointWriteError, match=r"(?s)several processes.*expected: format='orbax'.*2 processes"):
        save_as_linen(*trained, tmp_path / "new", rules=RULES, format="msgpack")
