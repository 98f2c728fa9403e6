"""`traced_anew`: equals the function, compiles once for one program, and never takes two programs for one."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_core.transforms import programs
from nnx_core.transforms.programs import traced_anew
from tests.support.arrays import key, noise, ones, ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(3, 3, over=9)


@jax.custom_vjp
def tripled(x):
    return x * 2


tripled.defvjp(lambda x: (tripled(x), x), lambda _, g: (g * 3,))

PROGRAMS = {
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + y.sum(), jnp.tanh(y)), 0.0, x),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x),
    "while": lambda x: jax.lax.while_loop(lambda x: x.sum() < 50, lambda x: x + 1, x),
    "custom rules": lambda x: jax.nn.relu(x) + jax.nn.gelu(x) + tripled(x) + jax.grad(lambda x: tripled(x).sum())(x),
    "custom rules in a scan": lambda x: jax.lax.scan(lambda c, y: (c, jax.nn.softmax(y) * tripled(y)), 0.0, x)[1],
    "random": lambda x: jax.random.normal(key(1), x.shape) + jax.random.bernoulli(key(2), 0.5, x.shape),
    "linear algebra": lambda x: jnp.linalg.inv(x + 9 * jnp.eye(3)) + jnp.sort(x)[::-1],
    "constants": lambda x: x + np.arange(9.0, dtype=np.float32).reshape(3, 3) * 2.5,
    "trees": lambda x: {"a": [x, (x * 2, None)], "b": x[0]},
    "no leaves": lambda x: (),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_the_function_and_is_remembered(name):
    f = PROGRAMS[name]
    assert_trees_close(traced_anew(f, X), f(X))
    known = len(programs._programs)
    assert_trees_close(traced_anew(lambda x: f(x), X * 2), f(X * 2))  # another function, the same program
    assert len(programs._programs) == known


DIFFERENT = {
    "a constant": [lambda x: x * 2.0, lambda x: x * 2.0000002],
    "a constant's sign": [lambda x: x * 0.0, lambda x: x * -0.0],
    "a constant's type": [lambda x: x + np.float32(1), lambda x: x + np.int32(1)],
    "a constant array": [lambda x: x + np.arange(3.0), lambda x: x + np.arange(1.0, 4.0)],
    "an operation": [jnp.sin, jnp.cos],
    "an operand": [lambda x: x - x.T, lambda x: x.T - x],
    "the order of results": [lambda x: (x, x * 2), lambda x: (x * 2, x)],
    "a result twice": [lambda x: (x, x), lambda x: (x, x + 0)],
    "an axis": [lambda x: x.sum(0), lambda x: x.sum(1)],
    "a step inside": [
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x),
        lambda x: jax.lax.scan(lambda c, y: (c - y, c), x[0], x),
    ],
    "a direction": [
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x),
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x, reverse=True),
    ],
    "a branch": [
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x.sum() > 0, jnp.cos, jnp.sin, x),
    ],
    "an argument": [lambda x: x, lambda x: x.astype(jnp.bfloat16)],
    "precision": [
        lambda x: jnp.dot(x, x, precision="highest"),
        lambda x: jnp.dot(x, x, preferred_element_type=jnp.bfloat16),
    ],
    "a callback": [
        lambda x: jax.pure_callback(lambda x: x, x, x),
        lambda x: jax.pure_callback(lambda x: x + 1, x, x),
    ],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_programs_are_told_apart(name):
    first, second = DIFFERENT[name]
    for f in (first, second, first):
        assert_trees_equal(traced_anew(f, X), f(X))


def test_shapes_dtypes_and_weak_types_are_part_of_a_program():
    for x in (X, X[0], X.astype(jnp.bfloat16), 2.0, 2, np.float32(2), X[:1]):
        result, expected = traced_anew(lambda x: x * 3, x), jnp.asarray(x * 3)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert_trees_equal(result, expected)
    assert traced_anew(lambda x: x * 3, 2.0).weak_type


def test_what_is_closed_over_is_an_argument():
    for table in (ones(3), noise(0, 3), noise(1, 3)):
        assert_trees_equal(traced_anew(lambda x, t=table: x + t, X), X + table)
    known = len(programs._programs)
    traced_anew(lambda x: x + noise(2, 3), X)
    assert len(programs._programs) == known


@pytest.mark.slow
def test_nothing_that_is_closed_over_is_kept():
    def use(table):
        @jax.custom_vjp
        def f(x):
            return x + table

        f.defvjp(lambda x: (f(x), table), lambda r, g: (g * r,))
        return traced_anew(lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0.0, x)[1], X)

    table = noise(3, 3)
    ref = weakref.ref(table)
    use(table)
    del table
    gc.collect()  # of JAX's own cycles
    assert ref() is None


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 3)
    for i in range(6):
        assert_trees_equal(traced_anew(lambda x, i=i: x + np.float32(i), X), X + i)
    assert len(programs._programs) <= 3


def test_under_a_transform_and_without_jit_it_is_only_a_call():
    known = len(programs._programs)
    assert_trees_close(jax.jit(lambda x: traced_anew(jnp.sin, x))(X), jnp.sin(X))
    assert_trees_close(jax.vmap(lambda x: traced_anew(jnp.sin, x))(X), jnp.sin(X))
    assert_trees_close(jax.grad(lambda x: traced_anew(tripled, x).sum())(X), ones(3, 3) * 3)
    seen = []
    with jax.disable_jit():
        traced_anew(lambda x: seen.append(float(x.sum())), X)
    assert seen == [float(X.sum())]
    assert len(programs._programs) == known


def test_a_first_question_inside_of_a_transform_spoils_nothing():
    programs._outside.cache_clear()
    assert_trees_close(jax.jit(lambda x: traced_anew(jnp.sinh, x))(X), jnp.sinh(X))
    known = len(programs._programs)
    assert_trees_close(traced_anew(jnp.sinh, X), jnp.sinh(X))
    assert len(programs._programs) == known + 1


def test_on_the_device_of_the_argument():
    for device in jax.devices()[:2]:
        x = jax.device_put(X, device)
        assert traced_anew(lambda x: x * 7, x).devices() == {device}
