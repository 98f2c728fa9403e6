"""Linen in NNX in Linen in NNX, any depth: init, apply and several training steps, bit for bit as in Linen alone.

Law: a tower whose floors alternate between Linen and NNX has the variables of the tower that is all Linen, under the
same paths. Each floor has weights, running statistics, a dropout mask, a cache and something it sows. The masks that
the bridged tower drew (it sows them) are given to the pure one, so that all else must be equal to the last bit.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import bridge
import nnx_core as nnx
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY, RNGS = jax.random.key(0), {"dropout": jax.random.key(1)}
X = jnp.asarray(normal(7, 6, 3) + 1)
TX = optax.adam(1e-2)
STATE = ["batch_stats", "cache"]
KEEP, STEPS = 0.75, 3


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


def dropped(x, mask):
    return jnp.where(mask, x / KEEP, 0.0)


class LinenFloor(nn.Module):
    """One floor; `below`, if there is one, is Linen (`pure`) or NNX."""

    depth: int
    pure: bool = False

    @nn.compact
    def __call__(self, x, masks=None):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3, name="dense")(x))
        given = masks is not None
        mask = masks["mask"][0] if given else jax.random.bernoulli(self.make_rng("dropout"), KEEP, x.shape)
        x = dropped(jnp.tanh(x), mask)
        seen = self.variable("cache", "seen", jnp.zeros, (3,))
        if not self.is_initializing():
            seen.value += jax.lax.stop_gradient(x).sum(0)
        self.sow("intermediates", "mask", mask)
        self.sow("intermediates", "h", x)
        if self.depth == 0:
            return x
        if self.pure:
            return LinenFloor(self.depth - 1, pure=True, name="below")(x, masks["below"] if given else None)
        return bridge.to_linen(NnxFloor, self.depth - 1, name="below")(x)


class NnxFloor(nnx.Module):
    """The same floor; below it is Linen."""

    def __init__(self, depth, *, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros(3))
        self.rngs = rngs
        self.below = bridge.ToNNX(LinenFloor(depth - 1), rngs=rngs) if depth else None

    def __call__(self, x, sowing=False):
        x = self.norm(self.dense(x))
        mask = jax.random.bernoulli(self.rngs.dropout(), KEEP, x.shape)
        x = dropped(jnp.tanh(x), mask)
        self.seen[...] += jax.lax.stop_gradient(x).sum(0)
        self.sow(nnx.Intermediate, "mask", mask)
        self.sow(nnx.Intermediate, "h", x)
        if self.below is None:
            return x
        # Where NNX is outermost nothing around says what may be written.
        return self.below(x, mutable=[*STATE, "intermediates"]) if sowing else self.below(x)


pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


def loss_of(y):
    return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()


def pure_step(depth):
    """(params, state, optimizer state, masks) -> the same after a step of the Linen tower, and what it sowed."""
    tower = LinenFloor(depth, pure=True)

    @jax.jit
    def step(params, state, opt_state, masks):
        def loss_fn(params):
            y, updates = tower.apply({"params": params, **state}, X, masks, mutable=[*STATE, "intermediates"])
            return loss_of(y), (y, updates)

        grads, (y, updates) = jax.grad(loss_fn, has_aux=True)(params)
        sown = updates.pop("intermediates")
        changes, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), updates, opt_state), (y, sown)

    return step


def train_pure(depth, variables, sown_by_steps):
    """The Linen tower's variables, outputs and sown values after each step with these masks."""
    step = pure_step(depth)
    state = variables["params"], {name: variables[name] for name in STATE}, TX.init(variables["params"])
    found = []
    for masks in sown_by_steps:
        state, (y, sown) = step(*state, masks)
        found.append(({"params": state[0], **state[1]}, y, sown))
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_linen_outermost_trains_as_linen_alone(depth):
    tower = LinenFloor(depth)
    variables = tower.init({"params": KEY, **RNGS}, X)
    like = LinenFloor(depth, pure=True).init({"params": KEY, **RNGS}, X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    equal({name: variables[name] for name in STATE}, {name: like[name] for name in STATE})

    @jax.jit
    def step(params, state, opt_state, key):
        def loss_fn(params):
            y, updates = tower.apply(
                {"params": params, **state}, X, rngs={"dropout": key}, mutable=[*STATE, "intermediates"]
            )
            return loss_of(y), (y, updates)

        grads, (y, updates) = jax.grad(loss_fn, has_aux=True)(params)
        sown = updates.pop("intermediates")
        changes, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), updates, opt_state), (y, sown)

    state = variables["params"], {name: variables[name] for name in STATE}, TX.init(variables["params"])
    found = []
    for key in jax.random.split(KEY, STEPS):
        state, (y, sown) = step(*state, key)
        found.append(({"params": state[0], **state[1]}, y, sown))
    check_masks([sown for _, _, sown in found], depth)
    equal(found, train_pure(depth, variables, [sown for _, _, sown in found]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nnx_outermost_trains_as_linen_alone(depth):
    model = NnxFloor(depth, rngs=nnx.Rngs(params=0, dropout=1))
    bridge.lazy_init(model, X)
    variables = jax.tree.map(jnp.copy, bridge.variables_of(model))
    like = LinenFloor(depth, pure=True).init({"params": KEY, **RNGS}, X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    kept = [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)]

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            y = model(X, sowing=True)
            return loss_of(y), y

        grads, y = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        sown = nnx.pop(model, nnx.Intermediate)
        return y, bridge.nnx_attrs_to_linen_vars(sown)["intermediates"]

    found = []
    for _ in range(STEPS):
        y, sown = step(model, optimizer)
        found.append((jax.tree.map(jnp.copy, bridge.variables_of(model)), y, sown))
    check_masks([sown for _, _, sown in found], depth)
    equal(found, train_pure(depth, variables, [sown for _, _, sown in found]))
    now = {id(x) for _, x in nnx.iter_graph(model)}
    assert all(id(x) in now for x in kept), "a Variable was replaced"


def check_masks(sown_by_steps, depth):
    """Every floor sowed once, and no two masks are the same: of two floors, or of two steps."""
    masks = []
    for sown in sown_by_steps:
        flat = flatten_dict(sown)
        assert len(flat) == 2 * (depth + 1)
        assert all(len(values) == 1 for values in flat.values())
        masks += [values[0].tobytes() for path, values in flat.items() if path[-1] == "mask"]
    assert len(set(masks)) == STEPS * (depth + 1)


def test_what_is_not_mutable_outside_is_not_written_inside():
    """Linen's rules hold on every floor: sowing does nothing, a write is Linen's error, whatever is between."""
    tower = LinenFloor(3)
    variables = tower.init({"params": KEY, **RNGS}, X)
    before = jax.tree.map(jnp.copy, variables)
    y, updates = tower.apply(variables, X, rngs=RNGS, mutable=STATE)
    assert set(updates) == set(STATE)
    again, updates = tower.apply(variables, X, rngs=RNGS, mutable=[*STATE, "intermediates"])
    equal(again, y)
    assert {path[:-1] for path in flatten_dict(updates["intermediates"])} == {("below",) * i for i in range(4)}
    for mutable in (["cache"], ["batch_stats"], False):
        with pytest.raises(Exception, match="is immutable") as error:
            tower.apply(variables, X, rngs=RNGS, mutable=mutable)
        assert type(error.value).__name__ == "ModifyScopeVariableError"
    equal(variables, before)


def test_a_cache_that_a_call_makes_four_floors_down():
    """Decoding: the first call creates the cache, the next finds it, as Linen's does."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            there = self.has_variable("cache", "total")
            total = self.variable("cache", "total", jnp.zeros, x.shape)
            if there:
                total.value += x
            return total.value

    class Middle(nnx.Module):
        def __init__(self, rngs):
            self.decoder = bridge.ToNNX(Decoder(), rngs=rngs)

        def __call__(self, x):
            return self.decoder(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bridge.to_linen(Middle, name="middle")(x)

    x = jnp.arange(3.0)
    variables, totals = {}, []
    for i in range(3):
        y, variables = Outer().apply(variables, x + i, mutable=["cache"])
        totals.append(y)
    assert_trees_equal(totals, [jnp.zeros(3), x + 1, 2 * x + 3])
    assert_trees_equal(variables, {"cache": {"middle": {"decoder": {"total": 2 * x + 3}}}})

    model = bridge.ToNNX(Outer(), rngs=nnx.Rngs(0))
    bridge.lazy_init(model, x)
    step = nnx.jit(lambda model, x: model(x))
    assert_trees_equal([step(model, x + i) for i in range(2)], [x, 2 * x + 1])
