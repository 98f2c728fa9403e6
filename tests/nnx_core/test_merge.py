"""merge: copies outside of a transform; inside, it adopts what the transform handed in. Oracle: flax.nnx."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from tests.support.arrays import ones, ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(4, 2, over=8)
LIBS = (nnx, flax_nnx)


def net(lib):
    class Net(lib.Module):
        def __init__(self, rngs):
            self.norm = lib.BatchNorm(2, rngs=rngs)
            self.drop = lib.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(x))

    return Net(lib.Rngs(0))


def in_jit(lib, f):
    return lib.jit(f)


def in_remat(lib, f):
    return lib.remat(f)


def in_jit_of_remat(lib, f):
    return lib.jit(lib.remat(f))


def in_cond(lib, f):
    return lambda state, x: lib.cond(True, f, lambda state, x: x, state, x)


TRANSFORMS = [in_jit, in_remat, in_jit_of_remat, in_cond]


def run(lib, transform, calls=2):
    m = net(lib)
    graphdef, state = lib.split(m)
    f = transform(lib, lambda state, x: lib.merge(graphdef, state)(x))
    outputs = [f(state, X) for _ in range(calls)]
    return outputs, m.norm.mean[...], m.norm.var[...], jnp.int32(m.drop.rngs.count[...])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_writes_to_what_was_handed_in_reach_the_caller(transform):
    ours, flax = (run(lib, transform) for lib in LIBS)
    assert_trees_close(ours, flax)
    assert not (ours[0][0] == ours[0][1]).all()  # another mask at each call
    assert int(ours[3]) == 2


def test_under_scan_the_state_is_the_carry():
    m = net(nnx)
    graphdef, state = nnx.split(m)

    def step(state, x):
        y = nnx.merge(graphdef, state)(x)
        return state, y

    _, ys = nnx.scan(step)(state, jnp.stack([X, X]))
    expected = run(nnx, in_jit)
    assert_trees_close((list(ys), m.norm.mean[...]), (expected[0], expected[1]))


def test_outside_of_a_transform_it_copies():
    m = net(nnx)
    graphdef, state = nnx.split(m)
    merged = nnx.merge(graphdef, state)
    merged.norm.mean[...] = ones(2) * 5
    assert_trees_equal(m.norm.mean[...], jnp.zeros(2))
    assert merged.norm.mean is not state["norm"]["mean"]


def test_inside_of_a_plain_jax_transform_it_copies():
    m = net(nnx)
    graphdef, state = nnx.split(m)

    @jax.jit
    def f(state):
        merged = nnx.merge(graphdef, state)
        merged.norm.mean[...] = ones(2) * 5
        return nnx.state(merged)

    assert_trees_equal(f(state)["norm"]["mean"][...], ones(2) * 5)
    assert_trees_equal(m.norm.mean[...], jnp.zeros(2))


def test_what_the_function_made_itself_is_copied():
    def f(x):
        m = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        copy = nnx.merge(*nnx.split(m))
        copy(x)
        return m.mean[...], copy.mean[...]

    first, second = nnx.jit(f)(X)
    assert_trees_equal(first, jnp.zeros(2))
    assert float(second.sum()) != 0


@pytest.mark.parametrize("lib", LIBS, ids=["ours", "flax"])
def test_copy_false_adopts_and_copy_true_copies(lib):
    for copy, expected in ((False, 7.0), (True, 0.0)):
        m = net(lib)
        merged = lib.merge(*lib.split(m), copy=copy)
        merged.norm.mean[...] = ones(2) * 7
        assert float(m.norm.mean[0]) == expected

        graphdef, state = lib.split(m)

        def inside(state, graphdef=graphdef, copy=copy):
            lib.merge(graphdef, state, copy=copy).norm.mean[...] = ones(2) * 9

        lib.jit(inside)(state)
        assert float(state["norm"]["mean"][0]) == (expected if copy else 9.0)


def test_adopted_variables_are_shared_by_all_merges_of_the_call():
    m = net(nnx)
    graphdef, state = nnx.split(m)

    @nnx.jit
    def f(state):
        a, b = nnx.merge(graphdef, state), nnx.merge(graphdef, state)
        return jnp.bool_(a.norm.mean is b.norm.mean)

    assert bool(f(state))


def test_shared_and_cyclic_graphs_adopt_too():
    m = nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    m.b = m.a
    m.root = m
    graphdef, state = nnx.split(m)

    @nnx.jit
    def f(state):
        merged = nnx.merge(graphdef, state)
        merged.root.b.kernel[...] = ones(2, 2) * 3

    f(state)
    assert_trees_equal(m.a.kernel[...], ones(2, 2) * 3)
