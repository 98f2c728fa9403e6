"""Nothing that holds arrays is in a reference cycle: they are freed when they are no longer used, not by `gc`."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from nnx_core._changes import track
from tests.support.arrays import ones
from tests.support.live_arrays import left_alive, left_in_cycles


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
        self.plain = {"scale": nnx.Param(jnp.ones(3))}
        self.array = jnp.ones(3)

    def __call__(self, x):
        x = self.dropout(self.norm(self.linear(x)))
        self.sow(nnx.Intermediate, "hidden", x)
        return self.layers[0](x) * self.plain["scale"] + self.array


def net():
    return Net(nnx.Rngs(0))


def x():
    return jnp.ones((2, 3))


def norm():
    return nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def split():
    graphdef, state = nnx.split(net())
    nnx.split(nnx.merge(graphdef, state), nnx.Param, ...)


def state():
    states = nnx.state(net(), nnx.Param, ...)
    level = states[0]["linear"]
    level["kernel"] = level["kernel"].replace(jnp.zeros((3, 3)))
    nnx.to_pure_dict(states[0]), repr(states[0]), states[0] == states[1], states[0].flat_state()


def update():
    model = net()
    nnx.update(model, jax.tree.map(lambda leaf: leaf, nnx.state(model)))


def pop():
    model = net()
    model(x())
    nnx.pop(model, nnx.Intermediate)


def views():
    model = net()
    nnx.view(model, deterministic=True), model.eval(), model.train(), repr(model)


def walks():
    model = net()
    nnx.recursive_map(lambda path, node: node, model), list(nnx.iter_graph(model)), list(nnx.iter_modules(model))


def grad():
    nnx.value_and_grad(lambda m: (m(x()).sum(), x()), has_aux=True)(net())


def vjp():
    out, back = nnx.vjp(lambda m: m(x()), norm())
    back(out)


def scan():
    nnx.scan(lambda m, row: (m, m(row)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(norm(), jnp.ones((4, 2, 3)))


def vmap():
    layers = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))(nnx.Rngs(0).fork(split=3))
    nnx.scan(lambda row, layer: (layer(row), None), in_axes=(nnx.Carry, 0))(x(), layers)


def branches():
    nnx.cond(True, lambda m: m(x()), lambda m: m(x()) * 2, norm())
    nnx.switch(0, [lambda m: m(x()), lambda m: m(x()) * 2], norm())


def loops():
    nnx.while_loop(lambda c: c[1] < 3, lambda c: (c[0], c[1] + 1), (norm(), 0))
    nnx.fori_loop(0, 3, lambda i, m: m, norm())


def remat():
    nnx.grad(lambda m: nnx.remat(lambda m: m(x()))(m).sum())(net())


def jit():
    model = norm()
    step = nnx.jit(lambda m: m(x()))
    step(model), step(model), step(model)


def plain_jax():
    jax.jit(lambda m: m.linear(x()))(net())


def optimizer():
    model = norm()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    nnx.jit(lambda m, o: o.update(m, nnx.grad(lambda m: m(x()).sum())(m)))(model, optimizer)
    optimizer.update(model, nnx.grad(lambda m: m(x()).sum())(model))


def metrics():
    metric, other = (nnx.MultiMetric(a=nnx.metrics.Average("a")) for _ in range(2))
    metric.update(a=x())
    nnx.metrics.merge(metric, other)
    metric.compute()


def recurrent():
    nnx.RNN(nnx.LSTMCell(3, 3, rngs=nnx.Rngs(0)))(jnp.ones((2, 4, 3)))


def tabulate():
    nnx.tabulate(norm(), x(), compute_flops=True)


def weight_norm():
    nnx.WeightNorm(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))(x())


def spectral_norm():
    nnx.SpectralNorm(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))(x(), update_stats=True)


def capture():
    nnx.capture(lambda m: m(x()), nnx.Intermediate)(net())


def written_across(m):
    m.mean[...] = jnp.ones(5)


MISTAKES = {
    "an error in jit": lambda m: nnx.jit(lambda m: [][0])(m),
    "an error in grad": lambda m: nnx.grad(lambda m: m(jnp.ones((1, 7))))(m),
    "an error in scan": lambda m: nnx.scan(lambda m, x: [][0], in_axes=(nnx.Carry, 0))(m, jnp.ones(3)),
    "no such attribute": lambda m: m.nosuch,
    "no such path": lambda m: nnx.update(m, {"nosuch": 1}),
    "a lost write": lambda m: jax.jit(lambda x: m.mean.__setitem__(..., x))(1.0),
    "a write that does not fit": written_across,
}


def mistake(act):
    def once():
        with pytest.raises(Exception, match=r"."):
            act(norm())

    return once


ACTS = {
    act.__name__: act
    for act in (
        split, state, update, pop, views, walks, grad, vjp, scan, vmap, branches, loops, remat, jit, plain_jax,
        optimizer, metrics, recurrent, tabulate, capture,
        weight_norm, spectral_norm,
    )
}  # fmt: skip
ACTS |= {"clone": lambda: nnx.clone(net()), "call": lambda: net()(x())}
ACTS |= {name: mistake(act) for name, act in MISTAKES.items()}


@pytest.mark.sample(10)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_nothing_stays_alive(act):
    assert left_alive(act) == 0


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_nothing_of_ours_is_in_a_cycle(act):
    assert left_in_cycles(act) == []


@pytest.mark.parametrize("array", [np.ones(3), ones(3)], ids=["on the host", "of JAX"])
def test_an_array_in_a_cycle_is_seen(array):
    def act():
        def visit():
            return visit, held

        held = array + 1

    assert left_in_cycles(act) == ["builtins.cell"]


def test_models_that_are_made_again_and_again():
    assert left_alive(lambda: nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), times=500) == 0


@pytest.mark.slow
def test_a_functional_training_loop_holds_one_state_and_the_next():
    graphdef, state = nnx.split(net())
    graphdef_of_loss = graphdef
    count = len(jax.tree.leaves(state))

    def loss(state, x):
        return (nnx.merge(graphdef_of_loss, state).linear(x) ** 2).mean()

    @jax.jit
    def step(state, x):
        grads = jax.grad(loss, allow_int=True)(state, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g if jnp.issubdtype(p.dtype, jnp.floating) else p, state, grads)

    batch = x()
    state = step(state, batch)
    gc.collect()
    gc.disable()
    try:
        before, most = len(jax.live_arrays()), 0
        for _ in range(10):
            state = step(state, batch)
            most = max(most, len(jax.live_arrays()))
    finally:
        gc.enable()
    assert most - before <= count
    assert len(jax.live_arrays()) == before


def test_the_levels_of_a_state_count_as_one():
    state = nnx.state(net())
    level = state["layers"][0]
    version = track(state)
    level["kernel"] = nnx.Param(jnp.zeros((3, 3)))
    assert level._root is state
    assert track(state) != version
