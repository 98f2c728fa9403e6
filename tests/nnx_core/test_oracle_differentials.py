"""vjp, jvp and custom_vjp: each program gives what it gives with flax.nnx (whose vjp and jvp need graph=False)."""

import jax
import jax.numpy as jnp
import pytest

from tests.oracle import same
from tests.support.arrays import ramp

X = ramp(4, 3, over=12)
PROGRAMS = {}


def program(f):
    """Into the table, under its name."""
    PROGRAMS[f.__name__] = f
    return f


def make(lib):
    """Dense, and statistics that are written."""

    class Net(lib.Module):
        def __init__(self, rngs):
            self.linear = lib.Linear(3, 2, rngs=rngs)
            self.mean = lib.BatchStat(jnp.zeros(2))

        def __call__(self, x):
            y = jnp.tanh(self.linear(x))
            self.mean[...] = 0.5 * self.mean + y.mean(0)
            return y

    return Net(lib.Rngs(0))


@program
def vjp_of_a_module_and_an_array(lib):
    m = make(lib)
    y, pull = lib.vjp(lambda m, x: m(x), m, X, graph=False)
    m_grad, x_grad = pull(jnp.ones_like(y))
    return y, m_grad, x_grad, m


@program
def vjp_with_aux_as_a_decorator(lib):
    m = make(lib)

    @lib.vjp(has_aux=True, graph=False)
    def f(m, x):
        y = m(x)
        return y, y.sum()

    y, pull, aux = f(m, X)
    return y, pull(y * 2), aux, m


@program
def vjp_in_jit(lib):
    m = make(lib)

    @lib.jit
    def f(m, x):
        y, pull = lib.vjp(lambda m, x: m(x), m, x, graph=False)
        return y, pull(y)[1]

    return f(m, X), f(m, X), m


@program
def vjp_of_states_and_trees(lib):
    graphdef, params, rest = lib.split(make(lib), lib.Param, ...)
    y, pull = lib.vjp(
        lambda p, t: lib.merge(graphdef, p, rest, copy=True).linear(t["x"]), params, {"x": X}, graph=False
    )
    return y, pull(jnp.ones_like(y))


@program
def jvp_of_a_module(lib):
    m = make(lib)
    tangents = jax.tree.map(jnp.ones_like, lib.clone(m))
    y, tangent = lib.jvp(lambda m, x: m(x), (m, X), (tangents, X * 2), graph=False)
    return y, tangent, m


@program
def jvp_with_aux_as_a_decorator(lib):
    m = make(lib)

    @lib.jvp(has_aux=True, graph=False)
    def f(m, x):
        y = m.linear(x)
        return y, {"sum": y.sum()}

    return f((m, X), (jax.tree.map(jnp.zeros_like, lib.clone(m)), jnp.ones_like(X))), m


@program
def custom_vjp_of_a_module(lib):
    m = make(lib)

    @lib.custom_vjp
    def f(m, x):
        return m(x)

    def fwd(m, x):
        return f(m, x), (m, x)

    def bwd(res, g):
        (m_g, _), out_g = g
        m, x = res
        m_g["linear"]["kernel"][...] = 3 * x.T @ out_g
        return m_g, out_g @ m.linear.kernel.T

    f.defvjp(fwd, bwd)
    value, grads = lib.value_and_grad(lambda m, x: f(m, x).sum(), argnums=(0, 1))(m, X)
    return value, grads, f(m, X), m


@program
def custom_vjp_by_diff_state_and_static(lib):
    m = make(lib)

    @lib.custom_vjp(nondiff_argnums=(lib.DiffState(0, lib.PathContains("kernel")), 2))
    def f(m, x, scale):
        return m.linear(x) * scale

    def fwd(m, x, scale):
        return f(m, x, scale), (m, x)

    def bwd(scale, res, g):
        (m_g, _), out_g = g
        m, x = res
        m_g["linear"]["kernel"][...] = scale * x.T @ out_g
        return lib.filter_state(m_g, lib.PathContains("kernel")), scale * out_g @ m.linear.kernel.T

    f.defvjp(fwd, bwd)

    def loss(m, x):
        return f(m, x, 2.0).sum()

    kernels = lib.DiffState(0, lib.PathContains("kernel"))
    return lib.grad(loss, argnums=(kernels, 1))(m, X), m


@program
def custom_vjp_of_arrays(lib):
    @lib.custom_vjp
    def f(x, y):
        return jnp.sin(x) * y

    def fwd(x, y):
        return f(x, y), (jnp.cos(x), jnp.sin(x), y)

    def bwd(res, g):
        _, out_g = g
        cos, sin, y = res
        return 7 * cos * out_g * y, sin * out_g

    f.defvjp(fwd, bwd)
    return f(X, X + 1), lib.grad(lambda x, y: f(x, y).sum(), argnums=(0, 1))(X, X + 1)


@program
def gradient_through_a_gradient(lib):
    m = make(lib)

    def inner(m, x):
        return lib.grad(lambda m, x: (m.linear(x) ** 3).sum(), argnums=1)(m, x)

    return lib.grad(lambda m, x: (inner(m, x) ** 2).sum())(m, X), m


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_it_gives_with_flax(name):
    same(PROGRAMS[name])
