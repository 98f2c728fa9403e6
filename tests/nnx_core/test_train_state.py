"""TrainState: a pytree for functional loops; flax.nnx, flax.linen's TrainState and bare optax as oracles."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx as flax_nnx
from flax.training.train_state import TrainState as LinenTrainState

import nnx_core as nnx
from tests.strategies import portrait
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(4, 3, over=12)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))


def with_stats(library):
    class State(library.TrainState):
        stats: library.State
        note: str = dataclasses.field(default="a", metadata={"pytree_node": False})

    return State


def make(library, tx=TX):
    """BatchNorm has the same initial values and the same arithmetic in both."""
    model = library.BatchNorm(3, rngs=library.Rngs(0))
    graphdef, params, stats = library.split(model, library.Param, ...)
    return with_stats(library).create(graphdef, params=params, tx=tx, stats=stats)


def train_step(library):
    def step(state):
        def loss(params):
            # flax.nnx writes to the Variables it is given, which belong to the trace outside of grad
            stats = "stats" if library is nnx else jax.tree.map(lambda x: x, state.stats)
            y, (_, new) = state.apply(params, stats)(X)
            return ((y - X) ** 2).mean(), library.filter_state(new, library.BatchStat)

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads, stats=stats), value

    return jax.jit(step)


def pure(state, library=nnx):
    return {name: library.to_pure_dict(getattr(state, name)) for name in ("params", "stats")}


def test_three_compiled_steps_equal_flax_nnx():
    ours, theirs = make(nnx), make(flax_nnx)
    step, flax_step = train_step(nnx), train_step(flax_nnx)
    for _ in range(3):
        (ours, loss), (theirs, want) = step(ours), flax_step(theirs)
        assert_trees_close(loss, want)
    assert_trees_close(pure(ours), pure(theirs, flax_nnx))
    assert int(ours.step) == 3


def test_three_compiled_steps_equal_the_train_state_of_linen_bit_for_bit():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    start = nnx.to_pure_dict(params)
    ours = nnx.TrainState.create(graphdef, params=params, tx=TX)

    def apply_fn(params, x):
        return x @ params["kernel"] + params["bias"]

    linen = LinenTrainState.create(apply_fn=apply_fn, params=start, tx=TX)

    @jax.jit
    def step(state):
        return state.apply_gradients(jax.grad(lambda p: (state.apply(p)(X)[0] ** 2).mean())(state.params))

    @jax.jit
    def linen_step(state):
        return state.apply_gradients(grads=jax.grad(lambda p: (state.apply_fn(p, X) ** 2).mean())(state.params))

    for _ in range(3):
        ours, linen = step(ours), linen_step(linen)
        assert_trees_equal(nnx.to_pure_dict(ours.params), linen.params)
    assert int(ours.step) == int(linen.step) == 3
    got = [x.tobytes() for x in map(jax.device_get, jax.tree.leaves(ours.opt_state))]
    assert got == [x.tobytes() for x in map(jax.device_get, jax.tree.leaves(linen.opt_state))]


def test_it_is_a_pytree_with_the_paths_of_flax():
    def paths(state):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]

    assert paths(make(nnx)) == paths(make(flax_nnx))


def test_it_passes_through_every_kind_of_jit_without_a_new_trace():
    traces = []

    def step(state):
        traces.append(1)
        return state.apply_gradients(jax.tree.map(jnp.ones_like, state.params))

    for jit in (jax.jit, nnx.jit):
        del traces[:]
        compiled, state = jit(step), make(nnx).replace(step=jnp.array(0))
        for _ in range(3):
            state = compiled(state)
        assert len(traces) == 1
        assert int(state.step) == 3
        assert type(state.params.scale) is nnx.Param
        assert state.note == "a"


def test_created_inside_jit():
    graphdef, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    state = jax.jit(lambda p: nnx.TrainState.create(graphdef, params=p, tx=TX, step=4))(params)
    assert int(state.step) == 4
    assert state.graphdef == graphdef


class Counter(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.w * x

    def twice(self, x):
        return self(self(x))


def test_apply_calls_methods_and_writes_nothing_given():
    model = Counter()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = with_stats(nnx).create(graphdef, params=params, tx=TX, stats=rest)
    before = portrait(model)
    y, (same, new) = state.apply("params", "stats").twice(3.0)
    assert_trees_equal(y, jnp.full(2, 3.0))
    assert same == graphdef
    assert int(new["calls"][...]) == 2
    assert portrait(model) == before
    assert int(state.stats["calls"][...]) == 0
    assert_trees_equal(state.apply(params, rest)(2.0)[0], jnp.full(2, 2.0))


def test_gradients_change_nothing_that_was_there():
    state = make(nnx, optax.sgd(0.1))
    before = pure(state)
    grads = jax.tree.map(jnp.ones_like, state.params)
    new = state.apply_gradients(grads=grads)
    assert_trees_equal(pure(state), before)
    assert int(state.step) == 0
    assert new.params.scale is not state.params.scale
    assert_trees_equal(
        nnx.to_pure_dict(new.params), {"scale": jnp.ones(3) - 0.1 * jnp.ones(3), "bias": -0.1 * jnp.ones(3)}
    )
    of_arrays = state.replace(params=nnx.pure(state.params), opt_state=TX.init(nnx.pure(state.params)), tx=TX)
    stepped = of_arrays.apply_gradients(nnx.pure(grads))
    assert_trees_close(dict(stepped.params), nnx.to_pure_dict(make(nnx).apply_gradients(grads).params))
    of_dicts = nnx.TrainState.create(state.graphdef, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
    assert_trees_equal(of_dicts.apply_gradients({"w": jnp.ones(2)}).params, {"w": jnp.full(2, 0.5)})


def test_it_is_frozen_and_replaced():
    state = make(nnx)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 3
    assert state.replace(note="b").note == "b"
    assert state.note == "a"
    with pytest.raises(TypeError, match="nosuch"):
        state.replace(nosuch=1)
    assert jax.tree.structure(state.replace(note="b")) != jax.tree.structure(state)
    assert nnx.TrainState[nnx.Linear] is not None

    class KeywordOnly(nnx.TrainState, kw_only=True):
        extra: int

    with pytest.raises(TypeError, match="extra"):
        KeywordOnly.create(state.graphdef, params=state.params, tx=TX)


def test_errors_name_the_paths():
    state = make(nnx)
    with pytest.raises(ValueError, match=r"(?s)No gradient for:\n  bias\n  scale.*no such Variable in the model:\n  x"):
        state.apply_gradients(nnx.State({"x": jnp.ones(1)}))
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\), found shape \(2,\)"):
        state.apply_gradients(jax.tree.map(lambda x: jnp.ones(2), state.params))
    with pytest.raises(TypeError, match=r"Expected State\.step to be a State, got ArrayImpl"):
        state.apply("step")
    with pytest.raises(AttributeError, match="nosuch"):
        state.apply("nosuch")
    with pytest.raises(ValueError, match=r"Missing from the state:\n  mean\n  var"):
        state.apply("params")(X)


@pytest.mark.parametrize("method", ["__init__", "create", "apply", "apply_gradients", "replace"])
def test_signatures_are_those_of_flax(method):
    def parameters(library):
        signature = inspect.signature(getattr(library.TrainState, method))
        return [(p.name, p.kind, p.default is p.empty) for p in signature.parameters.values()]

    assert parameters(nnx) == parameters(flax_nnx)
    assert [f.name for f in dataclasses.fields(nnx.TrainState)] == [
        f.name for f in dataclasses.fields(flax_nnx.TrainState)
    ]
