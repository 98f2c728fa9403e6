"""ToNNX under the transforms of nnx_core: the numbers of pure Linen under JAX's own, in the same Variables."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from nnx_core.transforms import programs
from tests.support.jaxprs import scans
from tests.support.linen_models import (
    CNN,
    DROPOUT,
    KEY,
    Block,
    Decoder,
    Setup,
    X,
    both,
    counts,
    equal,
    models,
    mutable,
    same,
    variables_in,
)
from tests.tolerance import assert_trees_close, assert_trees_equal


@models
def test_jit_is_the_jitted_apply(make):
    model, module, variables = both(make)

    @jax.jit
    def linen(variables):
        return module.apply(variables, X, train=True, mutable=mutable(variables), rngs={"dropout": DROPOUT})

    expected, updates = linen(variables)
    assert_trees_equal(nnx.jit(lambda m: m(X, train=True))(model), expected)
    assert_trees_equal(variables_of(model), {**variables, **updates})


@models
def test_remat_is_the_call(make):
    model, _, _ = both(make)
    twin = nnx.clone(model)
    expected = nnx.jit(lambda m: m(X, train=True))(twin)
    assert_trees_equal(nnx.jit(nnx.remat(lambda m: m(X, train=True)))(model), expected)
    assert_trees_equal(variables_of(model), variables_of(twin))


def test_scan_carries_statistics():
    model, twin = (ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X) for _ in range(2))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model, x):
        return model, model(x, train=True)

    xs = jnp.stack([X, X + 1, X * 2])
    model, ys = run(model, xs)
    one = nnx.jit(lambda m, x: m(x, train=True))
    assert_trees_close(ys, jnp.stack([one(twin, x) for x in xs]))
    assert_trees_close(variables_of(model), variables_of(twin))


def test_control_flow_keeps_statistics_in_place_row3():
    model, twin = (ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X) for _ in range(2))
    model.set_attributes(train=True)
    mean = model.norm.mean

    def body(_, model):
        model(X)
        return model

    assert nnx.cond(True, lambda m: m(X), lambda m: m(X) * 0, model).shape == (4, 5)
    nnx.fori_loop(0, 2, body, model)
    nnx.while_loop(lambda c: c[1] < 2, lambda c: (body(0, c[0]), c[1] + 1), (model, 0))
    for _ in range(5):
        twin(X, train=True)
    assert model.norm.mean is mean
    assert_trees_close(variables_of(model), variables_of(twin))


def test_captured_intermediates_under_jit():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    scope, kernel = model.Dense_0, model.Dense_0.kernel
    nnx.jit(lambda m: m(X, mutable=["intermediates"], capture_intermediates=True))(model)
    assert model.Dense_0 is scope
    assert scope.kernel is kernel
    captured = nnx.pop(model, nnx.Intermediate)
    assert captured["Dense_0"]["__call__"].get_value()[0].shape == (4, 3)
    assert list(scope) == ["kernel", "bias"]


# ---- each transform against pure Linen under its twin of JAX -----------------------------------------------


def step(variables, n, x=X):
    """Pure Linen: the n-th training call of a Block, -> output, variables, n + 1."""
    rngs = {"params": jax.random.fold_in(KEY, 1), "dropout": jax.random.fold_in(DROPOUT, n)}
    y, updates = Block().apply(variables, x, mutable=["batch_stats"], rngs=rngs)
    return y, {**variables, **updates}, n + 1


def block():
    return ToNNX(Block(), {"params": KEY, "dropout": DROPOUT}).lazy_init(X)  # keys, so that they are not forked


def twin_cond(v, n):
    return jax.lax.cond(n < 5, step, lambda v, n: (X, v, n), v, n)


def twin_switch(v, n):
    return jax.lax.switch(n, [lambda v, n: (X, v, n), step], v, n)


def twin_scan(v, n):
    def body(carry, x):
        y, v, n = step(*carry, x)
        return (v, n), y

    (v, n), ys = jax.lax.scan(body, (v, n), jnp.stack([X, X + 1]))
    return ys, v, n


def nnx_scan(m):
    scan = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return scan(m, jnp.stack([X, X + 1]))[1]


def twin_fori(v, n):
    def body(_, carry):
        x, v, n = carry
        return step(v, n, x)

    return jax.lax.fori_loop(0, 2, body, (X, v, n))


def nnx_fori(m):
    return nnx.fori_loop(0, 2, lambda _, carry: (carry[0], carry[0](carry[1])), (m, X))[1]


def twin_while(v, n):
    return jax.lax.while_loop(lambda c: c[2] < 3, lambda c: step(c[1], c[2], c[0]), (X, v, n))


def nnx_while(m):
    def body(carry):
        m, x, i = carry
        return m, m(x), i + 1

    return nnx.while_loop(lambda c: c[2] < 2, body, (m, X, 0))[1]


def twin_value_and_grad(v, n):
    def loss(params):
        y, new, m = step({**v, "params": params}, n)
        return (y**2).sum(), (new, m)

    (value, (v, n)), grads = jax.value_and_grad(loss, has_aux=True)(v["params"])
    return (value, grads), v, n


def nnx_value_and_grad(m):
    value, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).sum())(m)
    return value, nnx.to_pure_dict(grads)


def plain(f):
    return lambda v, n: f(lambda v, n: step(v, n))(v, n)


TWINS = {
    "jit": (lambda m: nnx.jit(lambda m: m(X))(m), plain(jax.jit)),
    "remat": (lambda m: nnx.remat(lambda m: m(X))(m), plain(jax.checkpoint)),
    "cond": (lambda m: nnx.cond(m.rngs.dropout.count[...] < 5, lambda m: m(X), lambda m: X, m), twin_cond),
    "switch": (lambda m: nnx.switch(m.rngs.dropout.count[...], [lambda m: X, lambda m: m(X)], m), twin_switch),
    "scan": (nnx_scan, twin_scan),
    "fori_loop": (nnx_fori, twin_fori),
    "while_loop": (nnx_while, twin_while),
    "value_and_grad": (nnx_value_and_grad, twin_value_and_grad),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_training_call_under_a_transform_is_linens_rows_3_32(name):
    ours, twin = TWINS[name]
    model = block()
    before = variables_in(model)
    y, variables, n = jax.jit(twin)(variables_of(model), jnp.uint32(1))  # lazy_init drew the mask with number 0
    equal(nnx.jit(ours)(model), y)
    equal(variables_of(model), variables)
    assert int(model.rngs.dropout.count[...]) == int(n) > 1
    assert same(before, model)


KEYS = jax.random.split(KEY, 3)


def stacked():
    """Three blocks in one, each with keys of its own."""
    return nnx.vmap(lambda key: ToNNX(Block(), {"params": key, "dropout": key}).lazy_init(X))(KEYS)


def layer(variables, key, x):
    """Pure Linen: a training call of one of `stacked`, after its lazy_init."""
    rngs = {"params": jax.random.fold_in(key, 1), "dropout": jax.random.fold_in(key, 1)}
    y, updates = Block().apply(variables, x, mutable=["batch_stats"], rngs=rngs)
    return y, {**variables, **updates}


@pytest.mark.slow
def test_vmap_over_models_is_linens():
    model = stacked()
    before, variables = variables_in(model), variables_of(model)
    init = jax.vmap(lambda key: Block().init({"params": jax.random.fold_in(key, 0)}, X))
    assert_trees_close(variables, init(KEYS))
    expected, variables = jax.jit(jax.vmap(layer, in_axes=(0, 0, None)))(variables, KEYS, X)
    equal(nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))(model, X), expected)
    equal(variables_of(model), variables)
    assert same(before, model)


def test_vmap_over_inputs_is_linens():
    model, xs = block(), jnp.stack([X, X + 1])
    model.eval()
    expected = jax.jit(jax.vmap(lambda v, x: Block().apply(v, x, train=False), in_axes=(None, 0)))
    equal(nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(model, xs), expected(variables_of(model), xs))


def test_scan_over_layers_is_linens():
    model = stacked()
    before = variables_in(model)

    @jax.jit
    def linen(variables, x):
        def body(x, over):
            y, new = layer(*over, x)
            return y, new

        return jax.lax.scan(body, x, (variables, KEYS))

    expected, variables = linen(variables_of(model), X)
    scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    equal(nnx.jit(lambda m, x: scan(x, m))(model, X), expected)
    equal(variables_of(model), variables)
    assert same(before, model)


def test_scan_over_layers_returns_only_what_was_written_row_47():
    graphdef, state = nnx.split(stacked())

    def run(state, x):
        model = nnx.merge(graphdef, state)
        scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, model), nnx.state(model)

    [scan] = scans(jax.make_jaxpr(run)(state, X).jaxpr)
    assert (3, 6, 6) in {v.aval.shape for v in scan.invars}  # the kernels go in
    assert sorted(v.aval.shape for v in scan.outvars) == [(3,), (3, 6), (3, 6), X.shape]  # counts, mean, var; x


def test_a_decode_cache_under_scan_and_while_is_linens_row_3():
    tokens = jax.random.normal(KEY, (4, 2, 1, 6))
    model = ToNNX(Decoder(), KEY, parity=True).lazy_init(jnp.ones((2, 4, 6)))
    start, before = variables_of(model), variables_in(model)

    @jax.jit
    def linen(variables):
        def body(cache, token):
            y, updates = Decoder().apply({**variables, "cache": cache}, token, mutable=["cache"])
            return updates["cache"], y

        return jax.lax.scan(body, variables["cache"], tokens)

    cache, expected = linen(start)
    scan = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    equal(nnx.jit(lambda m: scan(m, tokens)[1])(model), expected)
    equal(variables_of(model)["cache"], cache)
    assert same(before, model)

    bridge.load_variables(model, start)

    @nnx.jit
    def decode(model):
        def body(carry):
            model, ys, i = carry
            return model, ys.at[i].set(model(tokens[i])), i + 1

        return nnx.while_loop(lambda carry: carry[2] < 4, body, (model, jnp.zeros_like(tokens), 0))[1]

    assert_trees_close(decode(model), expected)
    assert_trees_close(variables_of(model)["cache"], cache)
    assert same(before, model)


def test_split_keys_give_each_lane_its_own_mask():
    model = ToNNX(nn.Dropout(0.5, deterministic=False), {"dropout": DROPOUT})
    x = jnp.ones((3, 64))
    lanes = nnx.split_rngs(splits=3)(
        nnx.vmap(lambda m, x: m(x), in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), 0))
    )
    ys = lanes(model, x)
    keys = jax.random.split(jax.random.fold_in(DROPOUT, 0), 3)
    apply = jax.vmap(lambda key, x: model.module.apply({}, x, rngs={"dropout": jax.random.fold_in(key, 0)}))
    assert_trees_equal(ys, apply(keys, x))
    assert counts(model) == {"dropout": 1}


def test_calls_do_not_retrace_row_46():
    traces = []

    def loss(model, x):
        traces.append("grad")
        return (model(x, mutable=["batch_stats", "intermediates"]) ** 2).sum()

    @nnx.jit
    def step(model, x):
        traces.append("jit")
        nnx.cond(x.sum() > 0, lambda m: m(x), lambda m: x, model)
        return nnx.value_and_grad(loss)(model, x)[0]

    model = block()
    for _ in range(3):
        step(model, X)
    step(nnx.clone(model), X)
    assert traces == ["jit", "grad"]
    f = nnx.cached_partial(step, model)
    f(X)
    f(X)
    assert traces == ["jit", "grad"]
    branch = [lambda m: m(X), lambda m: X]  # outside of jit traced at each call, and compiled once
    nnx.cond(True, *branch, model)
    known = set(programs._programs)
    nnx.cond(True, *branch, model)
    nnx.cond(False, *branch, model)
    assert known
    assert set(programs._programs) == known


def test_cached_partial_keeps_what_was_sown_row_46():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    f = nnx.cached_partial(nnx.jit(lambda m, x: m(x, mutable=["intermediates"])), model)
    f(X)
    f(X)
    assert len(model.features.get_value()) == 2
