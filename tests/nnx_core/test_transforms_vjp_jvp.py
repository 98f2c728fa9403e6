"""vjp and jvp over functions of objects: against jax on arrays, and against flax.nnx where documented."""

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core.transforms.vjp_jvp import jvp, vjp
from tests.strategies import Affine, Tied, assert_no_tracer, reachable
from tests.support.arrays import ones, ramp
from tests.support.counted import counted, pair
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3)


# ---- vjp -----------------------------------------------------------------------------------------------------------


def test_vjp_equals_jax_and_writes():
    m = Affine()
    members = reachable(m)
    value, vjp_fn = vjp(lambda m, x: m(x), m, X)
    expected, pullback = jax.vjp(lambda k, x: x @ k, m.kernel[...], X)
    m_grad, x_grad = vjp_fn(jnp.ones((2, 3)))
    assert_trees_close(value, expected)
    assert_trees_close((m_grad.kernel[...], x_grad), pullback(jnp.ones((2, 3))))
    assert type(m_grad) is Affine
    assert m_grad is not m
    assert m_grad.calls.get_value().dtype == jax.dtypes.float0
    assert int(m.calls[...]) == 1
    assert [id(x) for x in reachable(m)] == [id(x) for x in members]
    assert_no_tracer(m)


def test_vjp_of_a_shared_variable_sums_its_terms():
    m = Tied()
    _, vjp_fn = vjp(lambda m: m(X), m)
    (grad,) = vjp_fn(jnp.ones((2, 3)))
    expected = jax.grad(lambda k: (X @ k @ k).sum())(m.encode.kernel[...])
    assert grad.encode is grad.decode
    assert_trees_close(grad.encode.kernel[...], expected)
    assert_trees_equal(grad.layers[1].kernel[...], jnp.zeros((3, 3)))
    assert int(m.encode.calls[...]) == 2


def test_vjp_with_aux_and_as_a_decorator():
    m = pair()
    value, vjp_fn, aux = vjp(lambda m, x: (counted(m, x), {"a": m.x * 2}), m, 3.0, has_aux=True)
    assert_trees_close(value, 3 * 2 * jnp.sin(1.0))
    assert_trees_equal(aux["a"], jnp.array(2.0))
    assert_trees_close(vjp_fn(1.0)[1], 2 * jnp.sin(1.0))

    @vjp(graph=False)
    def f(m, x):
        return counted(m, x)

    for call in (f, vjp(counted)):
        value, vjp_fn = call(m, x=3.0)
        assert_trees_close(vjp_fn(jnp.ones_like(value))[0].x[...], 6 * jnp.cos(1.0))
    assert int(m.i[...]) == 3


def test_vjp_as_documented_by_flax():
    ours, theirs = pair(), flax.nnx.Dict(x=flax.nnx.Param(jnp.array(1.0)), y=flax.nnx.Param(jnp.array(2.0)))

    def f(m, x):
        return jnp.sin(m.x) * m.y * x

    value, pullback = flax.nnx.vjp(f, theirs, jnp.array(3.0), graph=False)
    mine, vjp_fn = vjp(f, ours, jnp.array(3.0), graph=False)
    (a, b), (c, d) = pullback(jnp.ones_like(value)), vjp_fn(jnp.ones_like(mine))
    assert_trees_close((mine, c.x[...], c.y[...], d), (value, a.x[...], a.y[...], b))


def test_vjp_of_a_method_writes_its_object():
    m = Affine()
    for f in (m, m.__call__):
        _, vjp_fn = vjp(f, X)
        (grad,) = vjp_fn(jnp.ones((2, 3)))
        assert_trees_close(grad, jnp.ones((2, 3)) @ m.kernel[...].T)
    assert int(m.calls[...]) == 2


def test_vjp_of_a_result_that_is_an_argument():
    m = pair()
    value, vjp_fn = vjp(lambda m: {"m": m, "v": m.x}, m)
    assert value["m"] is m
    assert value["v"] is m.x
    (grad,) = vjp_fn({"m": {"i": None, "n": 0.0, "x": 2.0, "y": 3.0}, "v": None})
    assert (float(grad.x[...]), float(grad.y[...])) == (2.0, 3.0)


def test_vjp_inside_jit_and_structure_changes():
    m = pair()

    def f(m):
        m.extra = nnx.Param(m.x * 2)
        return m.extra * m.y

    @nnx.jit
    def step(m):
        value, vjp_fn = vjp(f, m)
        return value, vjp_fn(jnp.ones(()))[0]

    value, grad = step(m)
    assert_trees_close((value, grad.x[...], m.extra[...]), (jnp.array(4.0), jnp.array(4.0), jnp.array(2.0)))
    assert_no_tracer(m)
    with pytest.raises(ValueError, match=r"(?s)graph_updates=False.*extra"):
        vjp(f, pair(), graph_updates=False)
    with pytest.raises(ValueError, match=r"(?s)graph=False.*encode"):
        vjp(lambda m: m(X), Tied(), graph=False)


def test_pytree_values_and_random_state():
    v = nnx.Variable({"a": jnp.array(1.0), "b": jnp.array(2.0)})
    _, vjp_fn = vjp(lambda v: v["a"] * v["b"], v)
    assert_trees_equal(vjp_fn(1.0)[0].get_value(), {"a": jnp.array(2.0), "b": jnp.array(1.0)})
    d = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    value, vjp_fn = vjp(lambda d, x: d(x), d, jnp.ones(16))
    assert_trees_equal(vjp_fn(jnp.ones(16))[1], value)


@pytest.mark.parametrize(
    ("cotangent", "text"),
    [
        (ones(3), r"cotangent: expected the form of a tuple with 2 items, found a ArrayImpl"),
        ((1.0,), r"cotangent: expected the form of a tuple with 2 items, found 1 items"),
        ((1.0, {}), r"cotangent\[1\]\.a is missing\. Give a tangent, or None for zero"),
        ((ones(2), {"a": 1.0}), r"cotangent\[0\]: expected shape \(\), found \(2,\)"),
        ((1.0, {"a": "no"}), r"cotangent\[1\]\.a: expected an array of shape \(\), found a str"),
    ],
)
def test_cotangents_of_another_form(cotangent, text):
    _, vjp_fn = vjp(lambda x: (x * 2, {"a": x}), 1.0)
    with pytest.raises(ValueError, match=text):
        vjp_fn(cotangent)


def test_cotangent_of_a_pytree_value_of_another_form():
    _, vjp_fn = vjp(lambda v: v, nnx.Variable({"a": jnp.array(1.0)}))
    with pytest.raises(ValueError, match=r"cotangent: expected the form PyTreeDef\(\{'a'.*found PyTreeDef\(\{'b'"):
        vjp_fn({"b": 1.0})


def test_what_vjp_refuses():
    with pytest.raises(NotImplementedError, match="reduce_axes is deprecated"):
        vjp(jnp.sin, 1.0, reduce_axes=("i",))
    with pytest.raises(ValueError, match=r"has_aux=True: expected \(value, aux\), found float"):
        vjp(lambda x: 1.0, 1.0, has_aux=True)
    m = Affine()
    with pytest.raises(ValueError, match=r"(?s)Param is reached twice.*args\[0\].*args\[1\]"):
        vjp(m.__call__, m.kernel)
    assert_no_tracer(m)


# ---- jvp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "state", "dict"])
def test_jvp_equals_jax_and_writes(form):
    m = Affine()
    t = jnp.full((3, 3), 0.5)
    tangent = jax.tree.map(lambda x: jnp.full_like(x, 0.5), m)
    given = {"module": tangent, "state": nnx.state(tangent), "dict": {"kernel": t, "calls": None}}[form]
    value, out = jvp(lambda m, x: m(x), (m, X), (given, jnp.ones_like(X)))
    expected = jax.jvp(lambda k, x: x @ k, (m.kernel[...], X), (t, jnp.ones_like(X)))
    assert_trees_close((value, out), expected)
    assert int(m.calls[...]) == 1
    assert_no_tracer(m)


def test_jvp_with_aux_none_decorators_and_methods():
    m = pair()
    value, out, aux = jvp(lambda m, x: (counted(m, x), m.x * 2), (m, 3.0), (None, 1.0), has_aux=True)
    assert_trees_close((value, out), (6 * jnp.sin(1.0), 2 * jnp.sin(1.0)))
    assert_trees_equal(aux, jnp.array(2.0))
    for call in (jvp(counted), jvp(graph=False)(counted)):
        assert_trees_close(call((m, 3.0), (None, 1.0))[1], 2 * jnp.sin(1.0))
    affine = Affine()
    assert_trees_close(jvp(affine, (X,), (X,))[1], X @ affine.kernel[...])
    assert int(affine.calls[...]) == 1


def test_jvp_of_a_result_with_modules():
    m = pair()

    def f(m):
        m.n[...] = m.x * m.y
        return {"m": m, "i": m.i}

    value, out = jvp(f, (m,), ({"x": 1.0, "y": None, "n": None, "i": None},))
    assert value["m"] is m
    assert (float(out["m"].x[...]), float(out["m"].n[...])) == (1.0, 2.0)
    assert out["i"].get_value().dtype == jax.dtypes.float0


def test_jvp_as_documented_by_flax():
    theirs = flax.nnx.Dict(x=flax.nnx.Param(jnp.array(1.0)), y=flax.nnx.Param(jnp.array(2.0)))
    ours = nnx.Dict(x=nnx.Param(jnp.array(1.0)), y=nnx.Param(jnp.array(2.0)))

    def f(m, x):
        return jnp.sin(m.x) * m.y * x

    def both(module, m, **options):
        return module((f), (m, jnp.array(3.0)), (jax.tree.map(jnp.ones_like, m), jnp.array(1.0)), **options)

    assert_trees_close(both(jvp, ours, graph=False), both(flax.nnx.jvp, theirs, graph=False))


def test_tangents_of_another_form():
    m = pair()
    with pytest.raises(ValueError, match=r"tangents\[0\]\.y is missing"):
        jvp(counted, (m, 1.0), ({"x": 1.0, "n": 0.0, "i": 0}, 1.0))
    with pytest.raises(ValueError, match=r"tangents: expected the form of a tuple with 2 items, found 1"):
        jvp(counted, (m, 1.0), (None,))
    with pytest.raises(TypeError, match="expected tangents beside the primals"):
        jvp(counted, (m, 1.0))
    assert float(m.n[...]) == 0.0
