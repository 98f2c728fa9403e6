"""Training goes on to the last bit after moving, in memory: k steps of Linen and k of NNX are 2k of either."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.core import freeze

import bridge
import nnx_core as nnx
from bridge.checkpoint.in_memory import nnx_to_train_state, train_state_to_nnx, variables_to_state
from tests.support.training import (
    NAMES,
    NET,
    OPTIMIZERS,
    RULES,
    STEPS,
    Net,
    State,
    X,
    is_kernel,
    linen_state,
    linen_step,
    native,
    native_step,
)
from tests.tolerance import assert_trees_equal

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# What a FrozenDict changes is the tree's class, whatever the optimizer: one of them outside the grid.
DICTS = [pytest.param(make, dict, id=name) for name, make in OPTIMIZERS.items()]
FROZEN = [
    pytest.param(make, freeze, id=f"{name}-FrozenDict", marks=pytest.mark.grid if index else [])
    for index, (name, make) in enumerate(OPTIMIZERS.items())
]


@pytest.mark.parametrize(("make", "wrap"), [*DICTS, *FROZEN])
def test_linen_then_nnx(make, wrap):
    tx = make()
    state = linen_state(tx, STEPS, wrap)
    model, optimizer = native(tx)
    report = train_state_to_nnx(state, model, optimizer, rules=RULES)
    assert not report.dropped
    for _ in range(STEPS):
        state, want = linen_step(state)
        assert_trees_equal(native_step(model, optimizer), want)
    back, _ = nnx_to_train_state(model, optimizer, like=state, rules=RULES.inverse())
    assert_trees_equal(back, state)
    assert int(optimizer.step[...]) == 2 * STEPS


@each_optimizer
def test_nnx_then_linen(make):
    tx = make()
    model, optimizer = native(tx)
    start, _ = variables_to_state(Net().init(jax.random.key(1), X), rules=RULES, target=model)
    nnx.update(model, start)
    for _ in range(STEPS):
        native_step(model, optimizer)
    state, report = nnx_to_train_state(model, optimizer, tx=tx, apply_fn=NET.apply, cls=State, rules=RULES.inverse())
    assert not report.dropped
    assert int(state.step) == STEPS
    for _ in range(STEPS):
        state, loss = linen_step(state)
        assert_trees_equal(loss, native_step(model, optimizer))
    assert_trees_equal(state, linen_state(tx, 2 * STEPS).replace(apply_fn=state.apply_fn))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert_trees_equal(bridge.variables_of(model, NAMES), variables)


@each_optimizer
def test_there_and_back_is_the_same_state(make):
    state = linen_state(make(), 2)
    model, optimizer = native(state.tx)
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    back, _ = nnx_to_train_state(
        model, optimizer, tx=state.tx, apply_fn=state.apply_fn, cls=State, rules=RULES.inverse()
    )
    assert_trees_equal(back, state)


def test_a_wrapped_model_goes_on():
    tx = optax.adamw(1e-2)
    state = linen_state(tx, STEPS)
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_state_to_nnx(state, model, optimizer)
    for _ in range(STEPS):
        state, want = linen_step(state)
        assert_trees_equal(native_step(model, optimizer), want)


def test_flax_nnx_goes_on():
    """flax's own NNX: its Variables and optimizer are read and written as well."""
    from flax import nnx as flax_nnx

    class Theirs(flax_nnx.Module):
        def __init__(self, rngs):
            self.first = flax_nnx.Linear(5, 4, rngs=rngs)
            self.bn = flax_nnx.BatchNorm(4, rngs=rngs)
            self.last = flax_nnx.Linear(4, 3, rngs=rngs)

    tx = optax.masked(optax.adam(1e-2), is_kernel)
    state = linen_state(tx, STEPS)
    model = Theirs(flax_nnx.Rngs(0))
    optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    assert_trees_equal(model.bn.mean.get_value(), state.batch_stats["norm"]["mean"])
    back, _ = nnx_to_train_state(model, optimizer, tx=tx, apply_fn=state.apply_fn, cls=State, rules=RULES.inverse())
    assert_trees_equal(back, state)


def test_nothing_is_copied():
    state = linen_state(optax.adamw(1e-2), 1)
    model, optimizer = native(state.tx)
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    assert model.first.kernel.get_raw_value() is state.params["hidden"]["kernel"]
    assert optimizer.opt_state[0].mu["first"]["kernel"].get_raw_value() is state.opt_state[0].mu["hidden"]["kernel"]
    back, _ = nnx_to_train_state(model, optimizer, like=state, rules=RULES.inverse())
    pointers = [
        {path: x.unsafe_buffer_pointer() for path, x in jax.tree_util.tree_leaves_with_path(tree) if x.ndim}
        for tree in (state, back)
    ]
    assert pointers[0] == pointers[1]
    assert back.params["hidden"]["kernel"] is state.params["hidden"]["kernel"]
    assert jnp.issubdtype(optimizer.step.dtype, jnp.unsignedinteger)
