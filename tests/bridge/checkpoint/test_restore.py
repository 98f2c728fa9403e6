"""load_into with a Linen training checkpoint: into models and optimizers, all of it or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bridge
import nnx_core as nnx
from bridge import checkpoint
from bridge._errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    VariablesMismatchError,
)
from tests.support.training import (
    NAMES,
    RULES,
    Native,
    Net,
    X,
    by_rank,
    is_kernel,
    linen_state,
    linen_step,
    native_step,
    saved,
)
from tests.tolerance import assert_trees_equal

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "chain, schedule": lambda: optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 20))),
    "masked": lambda: optax.adamw(1e-2, mask=is_kernel),
    "masked, inner": lambda: optax.masked(optax.adam(1e-2), is_kernel),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2, 0.9)}, by_rank
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def fingerprint(*objects):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(objects, nnx.Not(nnx.RngState))))]


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_to_the_last_bit(make, tmp_path):
    tx = make()
    state = linen_state(tx, 3)
    saved(tmp_path / "ckpt", state)
    model = Native(rngs=nnx.Rngs(9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    report = checkpoint.load_into(model, tmp_path / "ckpt", RULES, optimizer=optimizer)
    assert (int(optimizer.step[...]), report.dropped, report.warnings) == (3, [], [])
    for _ in range(4):
        state, want = linen_step(state)
        assert_trees_equal(native_step(model, optimizer), want)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert_trees_equal(bridge.variables_of(model, NAMES), variables)
    assert int(optimizer.step[...]) == 7


def test_into_a_wrapped_model(tmp_path):
    state = linen_state(optax.adam(1e-2), 2)
    saved(tmp_path / "ckpt", state)
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    report = checkpoint.load_into(model, tmp_path / "ckpt")
    assert {row["source"][0] for row in report.dropped} == {"opt_state", "step"}
    assert_trees_equal(bridge.variables_of(model), {"params": state.params, "batch_stats": state.batch_stats})


def test_a_wrapped_model_trains_on_with_its_optimizer(tmp_path):
    tx = optax.adamw(1e-2)
    state = linen_state(tx, 3)
    saved(tmp_path / "ckpt", state)
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    checkpoint.load_into(model, tmp_path / "ckpt", optimizer=optimizer)
    for _ in range(3):
        state, want = linen_step(state)
        assert_trees_equal(native_step(model, optimizer), want)


def test_variables_keep_their_identity(tmp_path):
    saved(tmp_path / "ckpt", linen_state(optax.adam(1e-2), 1))
    model = Native(rngs=nnx.Rngs(0))
    model.tied = model.first
    kernel = model.first.kernel
    checkpoint.load_into(model, tmp_path / "ckpt", checkpoint.Rules.from_rename({**NAMES, "hidden": "first"}))
    assert model.first.kernel is kernel
    assert model.tied is model.first


# ---- what does not fit changes nothing ---------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    return saved(tmp_path / "ckpt", linen_state(optax.adam(1e-2), 1))


def files(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def refused(path, model, optimizer, error, match):
    before, on_disk = fingerprint(model, optimizer), files(path) if path.exists() else {}
    with pytest.raises(error, match=match) as caught:
        checkpoint.load_into(model, path, RULES, optimizer=optimizer)
    assert_trees_equal(fingerprint(model, optimizer), before)
    assert (files(path) if path.exists() else {}) == on_disk
    return getattr(caught.value, "__notes__", [])


def pair(width=4, tx=None):
    model = Native(width, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx or optax.adam(1e-2), wrt=nnx.Param)


def test_a_checkpoint_of_another_model(trained):
    class Other(nnx.Module):
        def __init__(self):
            self.only = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    model = Other()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    refused(trained, model, optimizer, VariablesMismatchError, r"(?s)missing.*only/kernel.*unexpected.*first/kernel")


def test_a_missing_checkpoint(tmp_path):
    refused(tmp_path / "nothing", *pair(), CheckpointNotFoundError, r"(?s)nothing.*expected.*found")


def test_a_wrong_shape(trained):
    refused(
        trained, *pair(width=6), VariablesMismatchError, r"(?s)wrong shape.*kernel: expected \(5, 6\), found \(5, 4\)"
    )
    model, _ = pair(width=6)
    with pytest.raises(VariablesMismatchError, match=r"params/first/kernel: expected \(5, 6\), found \(5, 4\)"):
        checkpoint.load_into(model, trained, RULES)


def test_another_optimizer(trained):
    match = r"(?s)missing.*opt_state/0/trace/.*unexpected.*opt_state/0/mu/"
    assert refused(trained, *pair(tx=optax.sgd(1e-2, 0.9)), VariablesMismatchError, match) == []


def test_a_wrong_dtype(trained):
    model, optimizer = pair()
    model.last.bias.set_value(model.last.bias.astype(jnp.bfloat16))
    refused(trained, model, optimizer, VariablesMismatchError, r"params/last/bias: expected bfloat16, found float32")


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_truncated_checkpoint(trained, damage):
    data = max((p for p in (trained / "d").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "delete":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    refused(trained, *pair(), CheckpointCorruptError, r"(?s)ckpt.*expected.*found")


def test_no_optimizer_state_in_the_checkpoint(tmp_path):
    saved(tmp_path / "ckpt", Net().init(jax.random.key(1), X))
    [note] = refused(tmp_path / "ckpt", *pair(), VariablesMismatchError, r"(?s)missing.*opt_state/0/mu/")
    assert "leave the optimizer out" in note
    model, _ = pair()
    assert checkpoint.load_into(model, tmp_path / "ckpt", RULES).dropped == []
