"""ToNNX: a key is drawn when Linen asks for one, and never else."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX, variables_of
from nnx_core._errors import TraceError
from tests.support.linen_models import CNN, DROPOUT, Setup, Stack, X, counts
from tests.tolerance import assert_trees_equal


def test_keys_are_drawn_only_when_linen_asks_row4():
    model = ToNNX(CNN(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    assert counts(model) == {"params": 1, "dropout": 0}
    model(X)
    assert counts(model) == {"params": 1, "dropout": 0}
    first = model(X, train=True)
    assert counts(model) == {"params": 1, "dropout": 1}
    assert not np.array_equal(first, model(X, train=True))
    assert counts(model) == {"params": 1, "dropout": 2}


def test_keys_drawn_under_lifted_transforms_row4():
    model = ToNNX(Stack(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    model(X)
    assert counts(model)["dropout"] == 0
    model(X, train=True)
    assert counts(model)["dropout"] == 1


def test_the_default_stream_is_linens_params_row4():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    assert counts(model) == {"default": 1}
    model(X, train=True)
    assert counts(model) == {"default": 2}


def test_deterministic_calls_in_closures_of_jax_transforms_row4():
    model = ToNNX(nn.Dense(6), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    jitted = jax.jit(lambda x: model(x))(X)
    assert_trees_equal(jitted, jax.jit(lambda x: nn.Dense(6).apply(variables_of(model), x))(X))
    assert jax.vmap(model)(X).shape == expected.shape
    assert jax.eval_shape(model, X).shape == expected.shape
    assert jax.checkpoint(model)(X).shape == expected.shape
    assert jax.lax.scan(lambda c, _: (model(c), None), X, length=2)[0].shape == expected.shape
    assert counts(model) == {"default": 1}


def test_a_write_under_a_foreign_trace_names_the_path_row61():
    model = ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(TraceError, match="BatchStat at batch_stats/norm/mean"):
        jax.jit(lambda x: model(x, train=True))(X)


def test_missing_rng_raises_what_linen_raises_row5():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model.rngs = None
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model(X, train=True)
    model(X)


def test_rngs_of_the_caller_are_forked():
    rngs = nnx.Rngs(0)
    model = ToNNX(CNN(), rngs)
    assert int(rngs.default.count[...]) == 1
    model.lazy_init(X)
    assert int(rngs.default.count[...]) == 1


def test_explicit_streams_of_a_call():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    rngs = nnx.Rngs(dropout=5)
    key = jax.random.fold_in(jax.random.key(5), 0)
    assert_trees_equal(model(X, rngs=rngs), model(X))
    assert int(rngs.dropout.count[...]) == 0
    before = variables_of(model)
    expected, _ = CNN().apply(before, X, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    assert_trees_equal(model(X, train=True, rngs=rngs), expected)
    assert int(rngs.dropout.count[...]) == 1
    assert counts(model) == {"default": 1}


def test_parity_repeats_the_mask_until_reseeded_row32():
    model = ToNNX(nn.Dropout(0.5, deterministic=False), nnx.Rngs(dropout=DROPOUT), parity=True)
    first = model(X)
    assert_trees_equal(model(X), first)
    assert counts(model) == {"dropout": 0}
    nnx.reseed(model, dropout=3)
    assert not np.array_equal(model(X), first)


def test_rng_state_can_be_left_out_row67():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


def test_no_random_operation_runs_where_linen_asks_for_no_key_row4(monkeypatch):
    model = ToNNX(CNN(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    model(X)
    ran, fold_in = [], jax.random.fold_in

    def counting(key, data):
        if not isinstance(key, jax.core.Tracer):
            ran.append(data)
        return fold_in(key, data)

    monkeypatch.setattr(jax.random, "fold_in", counting)
    for _ in range(3):
        model(X)
    assert ran == []
    model(X, train=True)
    assert len(ran) == 1  # Linen's own, of the key that is known
    model(X)
    assert len(ran) == 2  # the next one
    model(X)
    assert len(ran) == 2


def test_keys_follow_the_streams_whatever_changes_them_row4():
    """As `apply` with the key that the stream would give: after draws, reseeding, loading and new streams."""
    drop = nn.Dropout(0.5, deterministic=False)
    model = ToNNX(drop, nnx.Rngs(dropout=1))

    def check():
        stream = model.rngs.dropout
        key = jax.random.fold_in(stream.key[...], stream.count[...])
        assert_trees_equal(model(X), drop.apply({}, X, rngs={"dropout": key}))

    for _ in range(3):
        check()
    nnx.reseed(model, dropout=5)
    check()
    model.rngs.dropout.count[...] = jnp.uint32(9)
    check()
    nnx.update(model, nnx.state(ToNNX(drop, nnx.Rngs(dropout=7))))
    check()
    model.rngs = nnx.Rngs(dropout=8)
    check()
    twin = nnx.clone(model)
    assert_trees_equal(twin(X), model(X))
    nnx.jit(lambda m: m(X))(model)
    check()
