"""Every transform inside every other: results, writes, new state, sharing and gradients as without them.

A row below is a transform that, on functions which work element by element, means nothing but itself. So any
two of them nested must give what the plain function gives.
"""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import assert_no_tracer, portrait, reachable
from tests.tolerance import assert_trees_close

X = jnp.arange(16.0).reshape(4, 4) / 16


def by_value_and_grad(f):
    """f as the auxiliary output of a loss that is differentiated."""

    def loss(m, x):
        y = f(m, x)
        return y.sum(), y

    return lambda m, x: nnx.value_and_grad(loss, has_aux=True)(m, x)[0][1]


def by_carry(f):
    """One step of a scan that carries the module."""

    def step(m, x):
        return m, f(m, x)

    return lambda m, x: nnx.scan(step)(m, x[None])[1][0]


def by_jax_jit(f):
    """jax.jit around the functional form of the module, and an update: how users of jax.jit do it."""

    def call(m, x):
        graphdef, state = nnx.split(m)

        @jax.jit
        def pure(state, x):
            inner = nnx.merge(graphdef, state)
            y = f(inner, x)
            return y, nnx.state(inner)

        y, state = pure(state, x)
        nnx.update(m, state)
        return y

    return call


TRANSFORMS = {
    "jit": nnx.jit,
    "remat": nnx.remat,
    "vmap": nnx.vmap,
    "scan over rows": nnx.scan(in_axes=(0, 0), out_axes=0),
    "scan with carry": by_carry,
    "value_and_grad": by_value_and_grad,
    "jax.jit": by_jax_jit,
}
KEEPS_STRUCTURE = ("scan over rows", "scan with carry", "jax.jit")  # a loop, and an update, cannot add state


class Wave(nnx.Module):
    """sin(scale * x), with a running total of x, a shared name and a child that shares it too."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full((4, 4), 0.5))
        self.total = nnx.BatchStat(jnp.zeros((4, 4)))
        self.alias = self.scale
        self.parts = nnx.List([nnx.Dict(total=self.total)])

    def __call__(self, x):
        assert self.alias is self.scale
        assert self.parts[0]["total"] is self.total
        self.total[...] += x
        return jnp.sin(self.alias * x)


class Growing(Wave):
    def __call__(self, x):
        self.seen = nnx.Cache(x * 2)
        self.note = "seen"
        return super().__call__(x)


@pytest.mark.parametrize("outer", TRANSFORMS)
@pytest.mark.parametrize("inner", TRANSFORMS)
def test_two_transforms_equal_none(outer, inner):
    m, twin = Wave(), Wave()
    old, old_twin = reachable(m), reachable(twin)
    scale = m.scale.get_value()
    f = TRANSFORMS[outer](lambda m, x: TRANSFORMS[inner](lambda m, x: m(x))(m, x))
    for _ in range(2):
        assert_trees_close(f(m, X), twin(X))
        assert_trees_close(m.total.get_value(), twin.total.get_value())
        assert_trees_close(m.scale.get_value(), scale)
    assert portrait(m, origin=old, values=False) == portrait(twin, origin=old_twin, values=False)
    assert_no_tracer(m)


@pytest.mark.parametrize("outer", [t for t in TRANSFORMS if t not in KEEPS_STRUCTURE])
@pytest.mark.parametrize("inner", [t for t in TRANSFORMS if t not in KEEPS_STRUCTURE])
def test_new_state_leaves_two_transforms(outer, inner):
    m, twin = Growing(), Growing()
    old, old_twin = reachable(m), reachable(twin)
    f = TRANSFORMS[outer](lambda m, x: TRANSFORMS[inner](lambda m, x: m(x))(m, x))
    for _ in range(2):
        assert_trees_close(f(m, X), twin(X))
    assert_trees_close(m.seen.get_value(), X * 2)
    assert m.note == "seen"
    assert portrait(m, origin=old, values=False) == portrait(twin, origin=old_twin, values=False)
    assert_no_tracer(m)


@pytest.mark.parametrize("outer", TRANSFORMS)
@pytest.mark.parametrize("inner", TRANSFORMS)
def test_gradients_go_through_two_transforms(outer, inner):
    m = Wave()
    f = TRANSFORMS[outer](lambda m, x: TRANSFORMS[inner](lambda m, x: m(x))(m, x))
    if "jax.jit" in (outer, inner):
        grads = nnx.grad(lambda m: f(nnx.clone(m), X).sum())(m)  # its update would write parameters too
    else:
        grads = nnx.grad(lambda m: f(m, X).sum())(m)
        assert_trees_close(m.total.get_value(), X)
    assert nnx.to_flat_state(grads).paths == (("alias",),)
    assert_trees_close(grads["alias"].get_value(), X * jnp.cos(0.5 * X))


@pytest.mark.parametrize("outer", ["jit", "remat", "vmap", "scan with carry", "value_and_grad"])
def test_rngs_under_a_transform_draw_what_eager_draws(outer):
    class Noisy(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(1.0))
            self.rngs = nnx.Rngs(0)

        def __call__(self, x):
            return self.w * x + self.rngs.noise.normal(())

    m, twin = Noisy(), Noisy()
    if outer == "vmap":
        f = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    else:
        f = TRANSFORMS[outer](lambda m, x: m(x))
    for _ in range(3):
        assert_trees_close(f(m, X), twin(X))
    assert int(m.rngs.default.count[...]) == 3
