"""ToNNX in plain JAX transforms: right where nothing is written; a write that nothing hands back is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX, variables_of
from nnx_core._errors import TraceError
from tests.support.freed import collect
from tests.support.linen_models import DROPOUT, KEY, MLP, Block, Decoder, Setup, X, counts, equal, same, variables_in
from tests.tolerance import assert_trees_close, assert_trees_equal


def call(m, x=X):
    return m(x)


@pytest.fixture(scope="module")
def evaluated():
    """A trained-like Block in evaluation, where nothing is written."""
    model = ToNNX(Block(), {"params": KEY, "dropout": DROPOUT}).lazy_init(X)
    model.eval()
    return model


def linen(variables, x=X):
    return Block().apply(variables, x, train=False)


XS = jnp.asarray(np.stack([X, X + 1]))
PLAIN = {
    "jit": (lambda m: jax.jit(call)(m, X), lambda v: jax.jit(linen)(v, X)),
    "vmap over inputs": (
        lambda m: jax.vmap(call, in_axes=(None, 0))(m, XS),
        lambda v: jax.vmap(linen, in_axes=(None, 0))(v, XS),
    ),
    "vmap over models": (
        lambda m: jax.vmap(call)(jax.tree.map(lambda x: jnp.stack([x, x]), m), XS),
        lambda v: jax.vmap(linen)(jax.tree.map(lambda x: jnp.stack([x, x]), v), XS),
    ),
    "checkpoint": (lambda m: jax.checkpoint(call)(m, X), lambda v: jax.checkpoint(linen)(v, X)),
    "scan": (
        lambda m: jax.lax.scan(lambda m, x: (m, m(x)), m, XS)[1],
        lambda v: jax.lax.scan(lambda v, x: (v, linen(v, x)), v, XS)[1],
    ),
    "cond": (
        lambda m: jax.lax.cond(True, call, lambda m: X, m),
        lambda v: jax.lax.cond(True, linen, lambda v: X, v),
    ),
    "eval_shape": (lambda m: str(jax.eval_shape(call, m)), lambda v: str(jax.eval_shape(linen, v))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_as_an_argument_where_nothing_is_written_row_4(evaluated, name):
    ours, theirs = PLAIN[name]
    before, raw = variables_in(evaluated), [v.get_raw_value() for v in variables_in(evaluated)]
    equal(ours(evaluated), theirs(variables_of(evaluated)))
    collect()  # a LostWriteWarning would come now, and is an error here
    assert same(before, evaluated)
    assert all(a is v.get_raw_value() for a, v in zip(raw, before, strict=True))


def test_gradients_of_a_state_are_linens(evaluated):
    graphdef, params, rest = nnx.split(evaluated, nnx.Param, ...)
    ours = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(X) ** 2).sum()))(params)
    variables = variables_of(evaluated)
    theirs = jax.jit(jax.grad(lambda p: (linen({**variables, "params": p}) ** 2).sum()))(variables["params"])
    equal(nnx.to_pure_dict(ours), theirs)


def test_gradients_of_a_model_are_linens(evaluated):
    ours = jax.jit(jax.grad(lambda m: (m(X) ** 2).sum(), allow_int=True))(evaluated)
    variables = variables_of(evaluated)
    theirs = jax.jit(jax.grad(lambda v: (linen(v) ** 2).sum()))(variables)
    equal(variables_of(ours), theirs)


def test_a_model_that_is_returned_brings_its_writes_row_43():
    model = ToNNX(Block(), {"params": KEY, "dropout": DROPOUT}).lazy_init(X)
    twin = nnx.clone(model)
    expected = nnx.jit(call)(twin, X)
    before = variables_of(model)
    y, model_after = jax.jit(lambda m: (m(X), m))(model)
    collect()
    equal(y, expected)
    equal(variables_of(model_after), variables_of(twin))
    assert_trees_equal(variables_of(model), before)


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "seen", x)
        return nn.Dense(3)(x)


TOKEN = jnp.asarray(np.ones((4, 1, 6), "float32"))
LOSES = {
    "statistics": (lambda: ToNNX(Block(), nnx.Rngs(0)).lazy_init(X), X, {}, r"BatchStat.* at ToNNX\.BatchNorm_0.*mean"),
    "a count of keys": (lambda: ToNNX(nn.Dropout(0.5, deterministic=False), nnx.Rngs(dropout=0)), X, {}, "RngCount"),
    "a cache": (lambda: ToNNX(Decoder(), nnx.Rngs(0)).lazy_init(jnp.ones((4, 3, 6))), TOKEN, {}, "Cache.*cache_index"),
    "a new variable": (
        lambda: ToNNX(Sows(), nnx.Rngs(0)).lazy_init(X), X, {"mutable": ["intermediates"]}, "attribute 'seen' of ToNNX",
    ),
    "a field": (lambda: ToNNX(MLP(), nnx.Rngs(0)).lazy_init(X), X, None, "attribute 'widths' of ToNNX"),
}  # fmt: skip


@pytest.mark.parametrize("what", LOSES)
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_a_write_that_nothing_hands_back_is_named_row_43(what, transform):
    make, x, keywords, message = LOSES[what]
    model = make()

    def run(m, x):
        if keywords is None:
            m.widths = [4, 3]
            return x
        return m(x, **keywords)

    with pytest.warns(nnx.LostWriteWarning, match=rf"(?s){message}.*Use the transform of the same name in nnx_core"):
        (transform(run)(model, x), collect())


def test_a_write_to_a_model_of_outside_names_path_and_creation_row_45():
    model = ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(TraceError, match=r"BatchStat at batch_stats/norm/mean.*outside this JAX transform"):
        jax.grad(lambda x: model(x, train=True).sum())(X)
    sows = ToNNX(Sows(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(TraceError, match=r"attribute 'seen' of ToNNX"):
        jax.jit(lambda x: sows(x, mutable=["intermediates"]))(X)
    assert not isinstance(model.norm.mean.get_value(), jax.core.Tracer)
    assert not hasattr(sows, "seen")


def test_merge_and_grad_with_dropout_and_statistics_row_45():
    model = ToNNX(Block(), {"params": KEY, "dropout": DROPOUT}).lazy_init(X)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        merged = nnx.merge(graphdef, params, rest)
        y = merged(X)
        return (y**2).sum(), nnx.state(merged, nnx.Not(nnx.Param))

    raw = [x.get_raw_value() for _, x in nnx.to_flat_state(rest)]
    grads, new = jax.grad(loss, has_aux=True)(params, rest)
    # row 66: what was given to merge is as it was
    assert all(x.get_raw_value() is old for (_, x), old in zip(nnx.to_flat_state(rest), raw, strict=True))
    twin = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
    stats = {path: x.get_value() for path, x in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))}
    assert_trees_close({path: x.get_value() for path, x in nnx.to_flat_state(new) if path in stats}, stats)
    assert_trees_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(twin))


def test_statistics_under_eval_shape_row_45():
    model = ToNNX(Block(), nnx.Rngs(0)).lazy_init(X)
    before = variables_of(model)
    assert nnx.eval_shape(lambda m: m(X), model).shape == X.shape
    assert_trees_equal(variables_of(model), before)
    assert counts(model) == {"default": 1}


def test_what_merge_was_given_is_not_written_row_66():
    model = ToNNX(Block(), nnx.Rngs(0)).lazy_init(X)
    graphdef, state = nnx.split(model)
    before = variables_of(model)
    merged = nnx.merge(graphdef, state)
    merged(X)
    assert_trees_equal(variables_of(model), before)
    assert_trees_equal(variables_of(nnx.merge(graphdef, state)), before)
    assert not np.array_equal(merged.BatchNorm_0.mean[...], model.BatchNorm_0.mean[...])
