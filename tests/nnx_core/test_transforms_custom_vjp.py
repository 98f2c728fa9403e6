"""custom_vjp over functions of objects: against jax on arrays, and against flax.nnx where documented."""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core.transforms.custom_vjp import NoRuleError, custom_vjp
from tests.strategies import Affine, Node, Tied, assert_no_tracer, portrait
from tests.support.arrays import ramp
from tests.support.counted import counted, pair
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3)


def rule(bwd, f=counted, fwd=None, **options):
    @custom_vjp(**options)
    def g(m, x):
        return f(m, x)

    g.defvjp(fwd or (lambda m, x: (g(m, x), (jnp.cos(m.x), m))), bwd)
    return g


def documented(res, g):
    (m_g, _), out_g = g
    m_g = jax.tree.map(lambda x: x, m_g)
    m_g["x"][...] = res[0] * out_g * res[1].y
    m_g["y"][...] = 10.0
    return m_g, jnp.array(7.0)


def test_custom_vjp_on_arrays_equals_jax():
    def make(transform):
        f = transform(lambda x, y: x * y)
        f.defvjp(lambda x, y: (x * y, (x, y)), lambda res, g: (res[1] * g * 2, res[0] * g * 3))
        return f

    mine = make(lambda f: custom_vjp(f, graph=False))
    for argnum in (0, 1):
        assert_trees_equal(nnx.grad(mine, argnums=argnum)(2.0, 5.0), jax.grad(make(jax.custom_vjp), argnum)(2.0, 5.0))
    assert_trees_equal(jax.jit(jax.grad(mine))(2.0, 5.0), jnp.array(10.0))


@pytest.mark.parametrize("around", ["grad", "jit of grad", "grad of jit"])
def test_custom_vjp_as_documented(around):
    f = rule(documented)
    m = pair()
    assert_trees_close(f(m, 3.0), 6 * jnp.sin(1.0))
    assert_trees_close(f(m, x=3.0), 6 * jnp.sin(1.0))
    grad = nnx.grad(nnx.jit(f) if around == "grad of jit" else f, argnums=(0, 1))
    grads, x_grad = (nnx.jit(grad) if around == "jit of grad" else grad)(m, 3.0)
    assert_trees_close(grads["x"][...], 2 * jnp.cos(1.0))
    assert_trees_equal((grads["y"][...], x_grad), (jnp.array(10.0), jnp.array(7.0)))
    assert (float(m.n[...]), int(m.i[...])) == (3.0, 3)
    assert_no_tracer(m)


def test_custom_vjp_equals_flax():
    def example(n, **options):
        m = n.Dict(x=n.Param(jnp.array(1.0)), y=n.Param(jnp.array(2.0)), n=n.BatchStat(jnp.array(0.0)))
        make = custom_vjp if n is nnx else n.custom_vjp

        @make(**options)
        def f(m, x):
            m.n[...] += 1.0
            return jnp.sin(m.x) * m.y * x

        def bwd(res, g):
            (m_g, x_g), out_g = g
            assert x_g is None
            m_g = jax.tree.map(lambda x: x, m_g)
            m_g["x"][...] = res[0] * out_g + m_g["n"][...]
            m_g["y"][...] = res[1].n * 100.0
            return m_g, out_g

        f.defvjp(lambda m, x: (f(m, x), (jnp.cos(m.x), m)), bwd)
        grads = n.grad(lambda m, x: f(m, x) + 5 * m.n, argnums=(0, 1))(m, jnp.array(3.0))
        return grads[0]["x"][...], grads[0]["y"][...], grads[1], m.n[...]

    assert_trees_close(example(nnx), example(flax.nnx))


def test_custom_vjp_with_diff_state():
    only = nnx.DiffState(0, nnx.PathContains("x"))

    def bwd(res, g):
        (m_g, _), out_g = g
        del m_g["y"]
        m_g["x"][...] = out_g * 10
        return m_g, None

    f = rule(bwd, nondiff_argnums=(only,))
    m = pair()
    grads, x_grad = nnx.grad(f, argnums=(only, 1))(m, 3.0)
    assert list(grads) == ["x"]
    assert (float(grads["x"][...]), float(x_grad)) == (10.0, 0.0)
    assert float(nnx.grad(f)(m, 3.0)["y"][...]) == 0.0


@pytest.mark.parametrize("x", [3.0, jax.device_put(np.float32(3.0)), "three", (1, 2)])
def test_nondiff_argnums_come_first(x):
    def bwd(given, res, g):
        assert given is x or given == x or isinstance(given, jax.Array)
        (updates,), _ = g
        return (updates,)

    f = rule(bwd, lambda m, x: m.x * 2.0, nondiff_argnums=(1,))
    m = pair()
    assert float(nnx.grad(lambda m: f(m, x))(m)["x"][...]) == 0.0
    assert float(nnx.jit(nnx.grad(lambda m: f(m, x)))(m)["x"][...]) == 0.0


@pytest.mark.parametrize("options", [{"graph": False}, {"graph_updates": False}])
def test_without_graph_updates_g_is_the_cotangent_of_the_result(options):
    seen = []

    def bwd(res, g, *, updates_g):
        seen.append((updates_g[0].x, float(updates_g[0].n[...]), updates_g[1], float(g)))
        m_g = nnx.clone(res[1])
        m_g.x[...] = res[0] * g * res[1].y
        return m_g, None

    f = rule(bwd, **options)
    m = pair()
    grads = nnx.grad(lambda m: f(m, 3.0) * 2 + 5 * m.n)(m)
    assert seen == [(None, 5.0, None, 2.0)]
    assert_trees_close(grads["x"][...], 4 * jnp.cos(1.0))
    assert_trees_equal(grads["y"][...], jnp.array(2.0))


def test_what_is_not_written_keeps_its_own_gradient():
    """flax.nnx sends it through `bwd`, where it is lost unless added."""
    f = rule(lambda res, g: (None, None))
    grads = nnx.grad(lambda m: f(m, 3.0) + 5 * m.x)(pair())
    assert float(grads["x"][...]) == 5.0


def test_a_shared_module_has_one_cotangent():
    @custom_vjp
    def f(m):
        return m(X)

    f.defvjp(
        lambda m: (f(m), None),
        lambda res, g: ({"decode": {"kernel": g[1].sum() * jnp.ones((3, 3))}, "layers": {1: None}},),
    )
    m = Tied()
    with pytest.raises(ValueError, match=r"cotangents\[0\]\.decode\.calls is missing"):
        nnx.grad(lambda m: f(m).sum())(m)

    def bwd(res, g):
        (m_g,), out_g = g
        assert isinstance(m_g, nnx.State)
        m_g["decode"]["kernel"][...] = jnp.ones((3, 3)) * out_g.sum()
        return (m_g,)

    f.defvjp(lambda m: (f(m), None), bwd)
    grads = nnx.grad(lambda m: f(m).sum())(m)
    assert_trees_equal(grads["decode"]["kernel"][...], jnp.full((3, 3), 6.0))
    assert int(m.encode.calls[...]) == 2


def test_results_and_residuals_may_be_modules():
    @custom_vjp
    def f(m, x):
        m.new = nnx.Param(m.x * x)
        return {"m": m, "new": m.new, "other": nnx.Param(m.x * 2)}

    def bwd(res, g):
        updates, out_g = g
        assert out_g["other"][...] == 3.0
        updates[0]["x"][...] = out_g["other"][...]
        assert res["same"] is res["m"].x
        return updates[0], None

    f.defvjp(lambda m, x: (f(m, x), {"m": m, "same": m.x}), bwd)
    m = pair()
    grads = nnx.grad(lambda m: f(m, 3.0)["other"] * 3.0)(m)
    assert float(grads["x"][...]) == 3.0
    assert float(m.new[...]) == 3.0
    out = f(m, 4.0)
    assert out["m"] is m
    assert out["new"] is m.new


def test_custom_vjp_of_methods():
    class Layer(Affine):
        @custom_vjp
        def scaled(self, x):
            return self(x)

        def plain(self, x):
            return x @ self.kernel[...]

        def ahead(self, x):
            return self.plain(x), None

    def bwd(_, g):
        (m_g, _), out_g = g
        m_g["kernel"][...] = jnp.full((3, 3), 2.0)
        return m_g, out_g

    Layer.scaled.defvjp(lambda m, x: (m(x), None), bwd)
    m = Layer()
    bound = custom_vjp(m.plain)
    bound.defvjp(m.ahead, bwd)
    grads = nnx.grad(lambda m: m.scaled(X).sum())(m)
    assert_trees_equal(grads["kernel"][...], jnp.full((3, 3), 2.0))
    assert_trees_equal(nnx.grad(lambda x: bound(x).sum())(X), jnp.ones((2, 3)))
    assert int(m.calls[...]) == 1


def test_custom_vjp_under_vmap_and_scan():
    f = rule(lambda res, g: (None, g[1] * 10), lambda m, x: m.x * x)
    m = pair()
    grads = nnx.vmap(lambda m, x: nnx.grad(f, argnums=1)(m, x), in_axes=(None, 0))(m, jnp.arange(3.0))
    assert_trees_equal(grads, jnp.full(3, 10.0))
    loop = nnx.scan(lambda c, x: (c + f(m_in, x), None), in_axes=(nnx.Carry, 0))
    m_in = pair()
    assert_trees_equal(jax.grad(lambda xs: loop(jnp.array(0.0), xs)[0])(jnp.arange(3.0)), jnp.full(3, 10.0))


def test_a_second_call_does_not_trace_again():
    traces = []

    def counting(m, x):
        traces.append(x)
        return counted(m, x)

    f = rule(documented, counting)
    step = nnx.jit(nnx.grad(f))
    m = pair()
    step(m, 3.0)
    first = len(traces)
    step(m, 4.0)
    assert len(traces) == first
    assert portrait(m, values=False) == portrait(pair(), values=False)


def test_cotangent_of_an_array_that_an_object_owns():
    def write(m, x):
        m.table = m.table + x
        return m.x * x

    def bwd(res, g):
        (m_g, _), _ = g
        return m_g, m_g["table"].sum()

    f = rule(bwd, write, lambda m, x: (write(m, x), None))
    m = Node()
    m.x, m.table = nnx.Param(jnp.array(1.0)), jnp.arange(2.0)
    assert float(nnx.grad(lambda m, x: f(m, x) + m.table.sum(), argnums=1)(m, 3.0)) == 2.0
    assert_trees_equal(m.table, jnp.arange(2.0) + 3)


def test_what_custom_vjp_refuses():
    m = pair()
    with pytest.raises(NoRuleError, match=r"has no backward pass yet. Call .*defvjp\(fwd, bwd\)"):
        custom_vjp(lambda x: x)(1.0)
    with pytest.raises(AttributeError, match="no backward pass"):
        custom_vjp()(lambda x: x)(1.0)
    with pytest.raises(NotImplementedError, match="symbolic_zeros is not supported"):
        custom_vjp(lambda x: x).defvjp(None, None, symbolic_zeros=True)
    with pytest.raises(ValueError, match=r"nondiff_argnums 2 is out of range: .* was called with 2 arguments"):
        rule(documented, nondiff_argnums=(2,))(m, 1.0)
    with pytest.raises(ValueError, match=r"(?s)args\[0\] of .* holds a module.*nnx.DiffState\(0, filter\)"):
        rule(documented, nondiff_argnums=(0,))(m, 1.0)
    with pytest.raises(ValueError, match=r"must return \(out, residual\), found float"):
        nnx.grad(rule(documented, fwd=lambda m, x: 1.0))(m, 1.0)
    with pytest.raises(ValueError, match=r"must return a tuple of 2 cotangents.*found a float"):
        nnx.grad(rule(lambda res, g: 1.0))(m, 1.0)
    with pytest.raises(ValueError, match=r"must return a tuple of 2 cotangents.*found 1\."):
        nnx.grad(rule(lambda res, g: (None,)))(m, 1.0)
    with pytest.raises(ValueError, match=r"cotangents\[0\]\.x: expected shape \(\), found \(2,\)"):
        nnx.grad(rule(lambda res, g: ({"x": np.ones(2), "y": 1.0, "n": None, "i": None}, None)))(m, 1.0)
    assert_no_tracer(m)


def test_fwd_that_does_something_else_than_f():
    def more(m, x):
        m.n[...] += 1.0
        return jnp.sin(m.x), None

    f = rule(lambda res, g: (None, None), lambda m, x: jnp.sin(m.x), more)
    m = pair()
    f(m, 1.0)
    with pytest.raises(ValueError, match=r"(?s)more must do what .* does.*effects on the arguments differ.*writes 0"):
        nnx.grad(f)(m, 1.0)
    g = rule(lambda res, g: (None, None), lambda m, x: jnp.sin(m.x), lambda m, x: ({"a": m.x * 1.0}, None))
    g(m, 1.0)
    with pytest.raises(ValueError, match=r"(?s)the result differ"):
        nnx.grad(lambda m: g(m, 1.0))(m)


def test_fwd_may_write_less_than_f():
    """As in flax.nnx, where under a gradient only what fwd writes happens."""
    f = rule(lambda res, g: (None, None), counted, lambda m, x: (jnp.sin(m.x) * m.y * x, None))
    m = pair()
    f(m, 1.0)
    nnx.grad(nnx.jit(f))(m, 1.0)
    assert float(m.n[...]) == 1.0
