"""The first-generation API: training in its style, references by index, round trips, messages."""

import copy
import pickle
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core
from nnx_core import legacy as nnx
from nnx_core._errors import FilterError, NnxError, StateMismatchError, TraceError
from nnx_core.legacy import _errors
from tests.strategies import LAW, graphs, is_identity, portrait, reachable
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(4, 3, over=10)
Y = jax.device_put(np.stack([np.asarray(X).sum(1), np.full(4, -0.1, np.float32)], axis=1))


class Dense(nnx.Module):
    def __init__(self, din, dout, *, ctx):
        self.w = nnx.param(jax.random.uniform(ctx.make_rng("params"), (din, dout)))
        self.b = nnx.param(jnp.zeros((dout,)))
        self.sizes = (din, dout)

    def __call__(self, x):
        return x @ self.w + self.b


class BatchNorm(nnx.Module):
    def __init__(self, size):
        self.scale, self.bias = nnx.param(jnp.ones(size)), nnx.param(jnp.zeros(size))
        self.mean, self.var = nnx.var("batch_stats", jnp.zeros(size)), nnx.var("batch_stats", jnp.ones(size))

    def __call__(self, x, *, ctx):
        mean, var = self.mean, self.var
        if ctx.get_flag("train"):
            mean, var = x.mean(0), x.var(0)
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.var = 0.9 * self.var + 0.1 * var
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale + self.bias


def dropout(x, rate, *, ctx):
    if not ctx.get_flag("train"):
        return x
    keep = jax.random.bernoulli(ctx.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0.0)


class MLP(nnx.Module):
    def __init__(self, din, dmid, dout, *, ctx):
        self.layers = nnx.Seq([nnx.Linear(din, dmid, ctx=ctx), Dense(dmid, dout, ctx=ctx)])
        self.norm = BatchNorm(dmid)
        self.count = nnx.var("counts", jnp.zeros((), jnp.int32))

    def __call__(self, x, *, ctx):
        self.count[...] += 1
        x = jax.nn.relu(self.norm(self.layers[0](x), ctx=ctx))
        return self.layers[1](dropout(x, 0.1, ctx=ctx))

    def hidden(self, x):
        return self.layers[0](x)


def mlp(seed=0):
    return MLP(3, 16, 2, ctx=nnx.Context(jax.random.key(seed)))


def evaluate(state, moduledef):
    pred, _ = moduledef.apply(state)(X, ctx=nnx.Context(flags={"train": False}))
    return float(jnp.mean((pred - Y) ** 2))


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_with_batch_stats_and_dropout():
    params, rest, moduledef = mlp().split("params", ...)

    @jax.jit
    def train_step(params, rest, key):
        def loss_fn(params):
            ctx = nnx.Context(dropout=key, flags={"train": True})
            pred, (state, _) = moduledef.apply(params, rest)(X, ctx=ctx)
            return jnp.mean((pred - Y) ** 2), state.filter(lambda path, x: nnx.collection_of(x) != "params")

        grads, rest = jax.grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rest

    before, first = evaluate(nnx.State.merge(params, rest), moduledef), params
    for key in jax.random.split(jax.random.key(1), 60):
        params, rest = train_step(params, rest, key)
    assert evaluate(params | rest, moduledef) < before / 5
    assert int(rest["count"].value) == 60
    assert list(rest) == [("count",), ("norm", "mean"), ("norm", "var")]
    assert train_step._cache_size() == 1
    assert not bool(jnp.all(rest["norm", "mean"] == 0))
    assert first == mlp().filter("params")  # a State is a value


def test_sgd_equals_pure_jax():
    params, moduledef = Dense(3, 2, ctx=nnx.Context(0)).split()
    pure = {path[0]: v.value for path, v in params.items()}

    def loss(params):
        pred, _ = moduledef.apply(params)(X)
        return jnp.mean((pred - Y) ** 2)

    def pure_loss(p):
        return jnp.mean((X @ p["w"] + p["b"] - Y) ** 2)

    step = jax.jit(lambda f, p: jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(f)(p)), static_argnums=0)
    for _ in range(5):
        params, pure = step(loss, params), step(pure_loss, pure)
    assert_trees_close({path[0]: v.value for path, v in params.items()}, pure)


def test_the_moduledef_is_an_argument_and_a_result_of_jit():
    state, moduledef = mlp().split()
    traces = []

    @jax.jit
    def call(state, moduledef, ctx):
        traces.append(1)
        return moduledef.apply(state)(X, ctx=ctx)

    for key in range(3):
        _, (state, moduledef) = call(state, moduledef, nnx.Context(key, flags={"train": True}))
    assert len(traces) == 1
    assert int(state["count"].value) == 3
    assert moduledef == mlp().split()[1]


def test_optax_and_update_state():
    model = mlp()
    params, rest, moduledef = model.split("params", ...)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: moduledef.apply(p, rest)(X, ctx=nnx.Context())[0].sum())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    new, _ = step(params, optimizer.init(params))
    kernel = model.layers[0].kernel
    model.update_state(new)
    assert model.layers[0].kernel is kernel
    assert model.filter("params") == new != params
    assert int(model.count.value) == 0


def test_gradients_of_merge_and_vmap_over_states():
    state, moduledef = Dense(3, 2, ctx=nnx.Context(0)).split()
    grads = jax.jit(jax.grad(lambda s: moduledef.merge(s)(X).sum()))(state)
    assert_trees_close(grads["w"].value, jnp.broadcast_to(X.sum(0)[:, None], (3, 2)))
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), state)
    out = jax.vmap(lambda s: moduledef.merge(s)(X))(both)
    assert_trees_close(out[1], 2 * out[0])


def test_nnx_core_transforms_take_legacy_modules():
    model, ctx = mlp(), nnx.Context(1, flags={"train": True})

    @nnx_core.jit
    def step(model, ctx):
        return nnx_core.grad(lambda m, c: m(X, ctx=c).sum())(model, ctx)

    grads = step(model, ctx)
    assert int(model.count.value) == 1
    assert int(ctx.rngs.default.count.get_value()) == 1
    assert sorted(nnx.State(grads)) == sorted(model.filter("params"))


# ---- variables and collections -------------------------------------------------------------------------------------


def test_collections_are_variable_types():
    assert type(nnx.param(X)) is nnx_core.Param
    assert type(nnx.var("batch_stats", X)) is nnx_core.BatchStat
    losses = nnx.var("legacy losses", X)
    assert type(losses) is nnx_core.variable_type_from_name("legacy losses")
    assert type(nnx.Variable("legacy losses", X)) is type(losses)
    assert [nnx.collection_of(v) for v in (nnx_core.Param(X), losses, X)] == ["params", "legacy losses", None]


def test_the_collection_of_types_without_a_name():
    class Scale(nnx_core.Param):
        pass

    class Own(nnx_core.Variable):
        pass

    assert [nnx.collection_of(kind(X)) for kind in (Scale, Own, nnx_core.Variable)] == ["params", "Own", "Variable"]


def test_every_variable_is_an_instance():
    assert isinstance(nnx_core.Cache(X), nnx.Variable)
    assert not isinstance(X, nnx.Variable)
    state, _ = Dense(3, 2, ctx=nnx.Context(0)).split()
    names = jax.tree.map(nnx.collection_of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert set(names.values()) == {"params"}


@pytest.mark.parametrize("make", [lambda **k: nnx.param(X, **k), lambda **k: nnx.var("cache", X, **k)])
def test_sharding_names_the_axes(make):
    assert make(sharding=["in", None]).sharding_names == ("in", None)
    assert not make().has_metadata("sharding")


def test_arithmetic():
    w, b = nnx.param(jnp.ones((3, 2))), nnx.param(jnp.ones(2))
    assert_trees_equal(X @ w + b, X @ jnp.ones((3, 2)) + 1)
    assert_trees_equal(1 - 2 * w, jnp.full((3, 2), -1.0))
    assert_trees_equal(jnp.sum(w * w), jnp.float32(6))


def test_a_raw_value_is_written_into_the_variable():
    model = nnx.Map(seq=nnx.Seq([nnx.param(1.0), "s"]), w=nnx.param(X))
    w, item = model.w, model.seq[0]
    model.w = X + 1
    model["w"] = model.w * 2
    model.seq[0] = 5
    assert model.w is w
    assert model.seq[0] is item
    assert_trees_equal(w.value, (X + 1) * 2)
    assert item.value == 5


def test_a_variable_or_none_replaces_the_variable():
    model = Dense(3, 2, ctx=nnx.Context(0))
    model.w, model.b, model.sizes = nnx.var("cache", X), None, 3
    state, moduledef = model.split()
    assert [(path, type(v)) for path, v in state.items()] == [(("w",), nnx_core.Cache)]
    assert moduledef.static_fields == (("b", None), ("sizes", 3))


# ---- State ---------------------------------------------------------------------------------------------------------


def test_filter_by_collection_is_keyed_by_paths():
    state, _ = mlp().split()
    assert list(state.filter("batch_stats")) == [("norm", "mean"), ("norm", "var")]
    assert list(state.filter("params"))[:2] == [("layers", 0, "bias"), ("layers", 0, "kernel")]
    params, two, rest = state.filter("params", ["batch_stats", "counts"], ...)
    assert len(params) + len(two) == len(state)
    assert len(rest) == 0
    assert state.filter("nobody") == nnx.State()
    assert state.filter(nnx_core.Param) == params


def test_a_collection_is_not_that_of_its_subclass():
    state, _ = nnx.Map(a=nnx.var("intermediates", 1.0), b=nnx.var("perturbations", 2.0)).split()
    assert list(state.filter("intermediates")) == [("a",)]
    assert list(state.filter(nnx_core.Intermediate)) == [("a",), ("b",)]


def test_state_is_a_mapping():
    state = nnx.State({("b", 0): nnx.param(1.0), "a": nnx.param(2.0)})
    assert isinstance(state, Mapping)
    assert list(state) == [("a",), ("b", 0)]
    assert state["a"] is state["a",]
    assert ("b", 0) in state
    assert ("b", 1) not in state
    assert len(state) == 2
    fields = "Variable(\n      collection='params',\n      value={},\n      sharding=None\n  )"
    assert repr(state) == f"State({{\n  ('a',): {fields.format(2.0)},\n  ('b', '0'): {fields.format(1.0)}\n}})"
    assert repr(nnx.State()) == "State({})"
    assert state != {("a",): 1}
    assert nnx.State(nnx_core.State({"a": nnx_core.Param(2.0), "b": {0: nnx_core.Param(1.0)}})) == state


def test_merge_of_states_lets_later_ones_win():
    one, two = nnx.State({"a": nnx.param(1.0), "b": nnx.param(1.0)}), nnx.State({"b": nnx.param(2.0)})
    assert {path: v.value for path, v in (one | two).items()} == {("a",): 1.0, ("b",): 2.0}


def test_state_is_a_pytree():
    state, _ = mlp().split()
    leaves, treedef = jax.tree.flatten(state)
    assert jax.tree.unflatten(treedef, leaves) == state
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert paths[1] == "[('layers', 0, 'bias')].value"
    assert pickle.loads(pickle.dumps(state)) == state == copy.copy(state)


def test_a_state_shares_nothing_with_its_module():
    model = nnx.Map(w=nnx.param(X), seen=nnx.var("intermediates", {"x": 1}))
    state, moduledef = model.split()
    kept = moduledef.merge(state)
    model.w = X + 1
    model.seen.value["x"] = 2
    assert_trees_equal(state["w"].value, X)
    assert state["seen"].value == kept["seen"].value == {"x": 1}


# ---- split, partition, pop, update_state -----------------------------------------------------------------------------


def test_split_and_partition_give_the_same_parts():
    model = mlp()
    state, moduledef = model.split()
    params, stats, rest, by_split = model.split("params", "batch_stats", ...)
    (p, s, r), by_partition = model.partition("params", "batch_stats", ...)
    assert (params, stats, rest) == (p, s, r) == state.partition("params", "batch_stats", ...)
    assert model.partition() == (state, moduledef) == model.split(...) == model.partition(...)
    assert moduledef == by_split == by_partition
    assert model.filter("params", "batch_stats") == (p, s)


def test_pop_removes_a_collection_everywhere():
    model = mlp()
    model.layers.append(nnx.Map(mean=nnx.var("batch_stats", X)))
    stats = model.pop("batch_stats")
    assert list(stats) == [("layers", 2, "mean"), ("norm", "mean"), ("norm", "var")]
    assert not hasattr(model.norm, "mean")
    assert model.pop("batch_stats", "counts")[0] == nnx.State()
    assert {nnx.collection_of(v) for v in model.split()[0].values()} == {"params"}


def test_update_state_takes_states_modules_and_nested_mappings():
    a, b = mlp(0), mlp(1)
    a.update_state(b)
    assert a.split() == b.split()
    a.update_state(mlp(2).filter("params"), nnx.State({"count": nnx.var("counts", jnp.int32(7))}))
    assert a.filter("params") == mlp(2).filter("params")
    assert int(a.count.value) == 7
    a.update_state({"count": jnp.int32(8)})
    assert int(a.count.value) == 8


# ---- ModuleDef -----------------------------------------------------------------------------------------------------


class Self(nnx.Module):
    def __init__(self):
        self.w = nnx.param(X)
        self.me = self
        self.name = "self"


def test_shared_and_self_references_are_indices():
    shared = nnx.Map(w=nnx.param(X))
    model = nnx.Map(a=shared, b=nnx.Seq([shared, Self()]), c=shared)
    state, moduledef = model.split()
    assert list(state) == [("a", "w"), ("b", 1, "w")]
    a, b, c = (value for _, value in moduledef.submodules)
    assert [(d.type, d.index) for d in (moduledef, a, b)] == [(nnx.Map, 0), (nnx.Map, 1), (nnx.Seq, 2)]
    assert c == 1
    assert b.submodules[0] == (0, 1)
    cycle = b.submodules[1][1]
    assert (cycle.type, cycle.index, cycle.submodules) == (Self, 3, (("me", 3),))
    assert cycle.static_fields == (("name", "self"),)
    twin = moduledef.merge(state)
    assert twin["a"] is twin["b"][0] is twin["c"] is not shared
    assert twin["b"][1].me is twin["b"][1]
    assert portrait(twin) == portrait(model)


def test_a_shared_module_is_updated_once_by_apply():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = MLP(3, 4, 3, ctx=nnx.Context(0))
            self.b = self.a

        def __call__(self, x, *, ctx):
            return self.b(self.a(x, ctx=ctx), ctx=ctx)

    state, moduledef = Twice().split()
    _, (new, after) = moduledef.apply(state)(X, ctx=nnx.Context(1))
    assert int(new["a", "count"].value) == 2
    assert int(state["a", "count"].value) == 0
    assert after == moduledef


def test_static_fields_are_configuration():
    model = Dense(3, 2, ctx=nnx.Context(0))
    model.options, model.act, model.parts = {"a": (1, "s")}, jax.nn.relu, [nnx.param(1.0)]
    _, moduledef = model.split()
    assert moduledef.static_fields == (("sizes", (3, 2)), ("options", {"a": (1, "s")}), ("act", jax.nn.relu))
    [(name, parts)] = moduledef.submodules
    assert (name, parts.type, parts.index, parts.submodules) == ("parts", list, None, ())


def test_moduledefs_compare_by_content():
    (_, a), (_, b), (_, c) = (Dense(3, n, ctx=nnx.Context(n)).split() for n in (2, 2, 4))
    assert a == b != c
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert jax.tree.leaves(a) == []
    assert jax.tree.structure(a) == jax.tree.structure(b) != jax.tree.structure(c)


def test_repr_shows_the_four_parts():
    _, moduledef = nnx.Map(a=nnx.Map(), n=3).split()
    inner = "ModuleDef(\n    type=Map,\n    index=1,\n    submodules=(),\n    static_fields=()\n  )"
    fields = ["type=Map", "index=0", f"submodules=(('a', {inner}),)", "static_fields=(('n', 3),)"]
    assert repr(moduledef) == "ModuleDef(\n  " + ",\n  ".join(fields) + "\n)"


def test_apply_reaches_methods_and_submodules():
    model = mlp()
    state, moduledef = model.split()
    out, (after, same) = moduledef.apply(state).hidden(X)
    assert_trees_equal(out, model.hidden(X))
    assert (after, same) == (state, moduledef)
    assert_trees_equal(moduledef.apply(state).layers[0](X)[0], model.hidden(X))


def test_apply_reports_changes_of_structure():
    class Grow(nnx.Module):
        def __call__(self, x):
            self.seen = nnx.var("intermediates", x)
            return x

    state, moduledef = Grow().split()
    _, (new, after) = jax.jit(lambda s: moduledef.apply(s)(X))(state)
    assert list(new.filter("intermediates")) == [("seen",)]
    assert after != moduledef
    assert_trees_equal(after.merge(new).seen.value, X)


# ---- round trip ----------------------------------------------------------------------------------------------------


@given(graph=graphs(), filters=st.sampled_from([(), (...,), ("params", ...), ("batch_stats", "cache", ...)]))
@LAW
def test_merge_inverts_split(graph, filters):
    model = nnx.Map(graph=graph, again=graph)
    before, old = portrait(model), {id(x) for x in reachable(model) if is_identity(x)}
    *states, moduledef = model.split(*filters)
    twin = moduledef.merge(*states)
    assert portrait(twin) == before == portrait(model)
    assert not old & {id(x) for x in reachable(twin) if is_identity(x)}
    assert not old & {id(v) for state in states for v in state.values()}
    assert twin.split()[1] == moduledef


@given(graph=graphs())
@LAW
def test_update_state_inverts_filter(graph):
    model = nnx.Map(graph=graph)
    before = portrait(model)
    model.update_state(*model.filter("params", ...))
    assert portrait(model) == before


# ---- Map, Seq, Linear, Context -----------------------------------------------------------------------------------


def test_map_and_seq_are_containers():
    m, s = nnx.Map({"a": 1}, b=2), nnx.Seq(range(3))
    m["c"] = 3
    del m["a"], s[0]
    s.append(9)
    s[:1] = [7, 8]
    assert (dict(m), list(s), len(m), len(s)) == ({"b": 2, "c": 3}, [7, 8, 2, 9], 2, 4)
    m.clear(), s.clear()
    assert (list(m), list(s)) == ([], [])


def test_linear_is_nnx_core_linear():
    ours = nnx.Linear(3, 4, ctx=nnx.Context(7), use_bias=False)
    theirs = nnx_core.Linear(3, 4, rngs=nnx_core.Rngs(7), use_bias=False)
    assert_trees_equal(ours(X), theirs(X))
    assert list(ours.filter("params")) == [("kernel",)]


def test_context_draws_the_keys_of_rngs():
    ctx, rngs = nnx.Context(0, dropout=jax.random.key(1)), nnx_core.Rngs(0, dropout=1)
    for name in ("params", "dropout", "params"):
        assert_trees_equal(ctx.make_rng(name), rngs[name]())
    assert_trees_equal(ctx.fork().make_rng("dropout"), rngs.fork().dropout())
    assert_trees_equal(nnx.Context(jax.random.PRNGKey(3)).make_rng("a"), nnx.Context({"a": 3}).make_rng("a"))


def test_forks_differ_and_keep_flags():
    ctx = nnx.Context(0, flags={"train": True, "depth": 2})
    forks = [ctx.fork() for _ in range(3)]
    keys = {np.asarray(jax.random.key_data(c.make_rng("x"))).tobytes() for c in (ctx, *forks)}
    assert len(keys) == 4
    assert all(fork.flags == ctx.flags == {"train": True, "depth": 2} for fork in forks)


def test_flags_and_streams_can_be_asked_for():
    ctx = nnx.Context(dropout=0, flags={"train": False})
    assert (ctx.has_rng("dropout"), ctx.has_rng("params")) == (True, False)
    assert (ctx.has_flag("train"), ctx.has_flag("debug")) == (True, False)
    assert (ctx.get_flag("train"), ctx.get_flag("debug"), ctx.get_flag("debug", 3)) == (False, None, 3)


def test_a_context_crosses_jit():
    draw = jax.jit(lambda ctx: (ctx.make_rng("a"), ctx.fork(), ctx.get_flag("train")))
    ctx = nnx.Context(0, flags={"train": 1})
    key, fork, flag = draw(ctx)
    assert_trees_equal(key, nnx.Context(0).make_rng("a"))
    assert fork.get_flag("train") == int(flag) == 1
    assert int(ctx.rngs.default.count.get_value()) == 0  # jax.jit works on a copy


# ---- messages ------------------------------------------------------------------------------------------------------


def split_dense():
    return Dense(3, 2, ctx=nnx.Context(0)).split()


ERRORS = {
    "collection that is no name": (
        lambda: nnx.var(X, "params"),
        _errors.CollectionError,
        r"^A collection is named by a string, .*; found ArrayImpl\.\n.*nnx\.var\('batch_stats', value\)",
    ),
    "update_state of a pair": (
        lambda: mlp().update_state(mlp().split()),
        _errors.NotAStateError,
        r"^update_state expects States, found tuple\.\nPass them one by one, without the ModuleDef",
    ),
    "merge of an array": (
        lambda: split_dense()[1].merge(X),
        _errors.NotAStateError,
        r"^moduledef\.merge expects States, found ArrayImpl\.",
    ),
    "merge of a submodule's ModuleDef": (
        lambda: nnx.Map(a=nnx.Seq([Self()])).split()[1].submodules[0][1].submodules[0][1].merge(nnx.State()),
        _errors.SubmoduleDefError,
        r"^This ModuleDef describes a\[0\] \(Self\) as a part of a whole.*= module\.a\[0\]\.split\(\)\.$",
    ),
    "no such stream": (
        lambda: nnx.Context(params=0).make_rng("dropout"),
        _errors.MissingStreamError,
        r"^This Context has no stream 'dropout' and no default one; found \['params'\]\.\nCreate it with"
        r" nnx\.Context\(\.\.\., dropout=key\), or nnx\.Context\(key\)",
    ),
    "key instead of a Context": (
        lambda: nnx.Linear(2, 3, ctx=jax.random.key(0)),
        _errors.ContextError,
        r"^Linear\(\.\.\., ctx=\.\.\.\) expects a Context, found PRNGKeyArray\.\nPass ctx=nnx\.Context\(key\)\.",
    ),
    "protocol of Applied": (
        lambda: split_dense()[1].apply(nnx.State()).__array__,
        AttributeError,
        r"^__array__$",
    ),
    "state with a missing path": (
        lambda: split_dense()[1].apply(split_dense()[0].filter(nnx_core.PathContains("w")))(X),
        StateMismatchError,
        r"Missing from the state:\n  b\n",
    ),
    "filters that leave something": (
        lambda: mlp().split("params"),
        FilterError,
        r"^Non-exhaustive filters: count .*Use `\.\.\.`",
    ),
}


BUILTINS = {
    _errors.CollectionError: (TypeError,),
    _errors.NotAStateError: (TypeError,),
    _errors.SubmoduleDefError: (ValueError,),
    _errors.MissingStreamError: (ValueError, KeyError, AttributeError),
    _errors.ContextError: (TypeError,),
}


@pytest.mark.parametrize(("act", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_error(act, kind, text):
    with pytest.raises(kind, match=f"(?s){text}") as caught:
        act()
    assert type(caught.value) is kind
    assert all(issubclass(kind, b) for b in (*BUILTINS.get(kind, ()), NnxError)) or kind is AttributeError


def test_every_error_class_has_a_case():
    own = {c for c in vars(_errors).values() if isinstance(c, type) and c.__module__ == _errors.__name__}
    assert own == set(BUILTINS) == own & {kind for _, kind, _ in ERRORS.values()}


def test_a_context_of_another_trace_is_refused():
    ctx = nnx.Context(0)
    with pytest.raises(TraceError, match=r"Cannot write RngCount.*created outside"):
        jax.jit(lambda: ctx.make_rng("params"))()
