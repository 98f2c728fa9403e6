"""cond, switch, while_loop and fori_loop: every effect on the arguments, no second trace."""

import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.strategies import Affine
from tests.support.arrays import ones
from tests.support.freed import collect
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ones(2, 3)
WRAPS = {"eager": lambda f: f, "jit": nnx.jit}


def bump(m):
    m.calls[...] += 1


def scale(m):
    m.kernel[...] *= 2


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("pred", [True, False])
def test_cond_does_what_the_branch_does(wrap, pred):
    m, kernel = Affine(), Affine().kernel[...]
    old = m.kernel
    wrap(lambda p, m: nnx.cond(p, bump, scale, m))(pred, m)
    assert m.kernel is old
    assert int(m.calls[...]) == int(pred)
    assert_trees_equal(m.kernel[...], kernel if pred else kernel * 2)


def test_cond_returns_the_result_of_the_branch():
    m = Affine()
    assert_trees_equal(nnx.cond(True, lambda m, x: x + 1, lambda m, x: x, m, X), X + 1)
    assert nnx.cond(False, lambda m: m, lambda m: m, m) is m


def test_a_variable_can_be_the_predicate():
    flag = nnx.Variable(jnp.array(True))
    assert float(nnx.cond(flag, lambda: 1.0, lambda: 2.0)) == 1.0
    assert float(nnx.switch(nnx.Variable(jnp.array(1)), [lambda: 1.0, lambda: 2.0])) == 2.0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch(index):
    m = Affine()
    nnx.switch(index, [lambda m: None, bump, lambda m: [bump(m), None][1]], m)
    assert int(m.calls[...]) == min(index, 1)


def test_bound_methods_are_branches():
    class Two(Affine):
        def first(self):
            self.calls[...] += 1

        def second(self):
            self.calls[...] += 10

    m, other = Two(), Two()
    nnx.cond(False, m.first, m.second)
    assert int(m.calls[...]) == 10
    with pytest.raises(nnx.NnxError, match="created outside"):
        nnx.cond(True, m.first, other.second)


@pytest.mark.parametrize("pred", [True, False])
def test_a_bound_method_beside_a_function_keeps_its_arguments(pred):
    class Scaled(Affine):
        def scaled(self, x):
            return x * self.kernel[0, 0]

    m = Scaled()
    expected = X + 1 if pred else X * m.kernel[0, 0]
    assert_trees_equal(nnx.cond(pred, lambda x: x + 1, m.scaled, X), expected)
    assert_trees_equal(nnx.cond(not pred, m.scaled, lambda x: x + 1, X), expected)


def test_branches_that_leave_different_structures_are_an_error():
    def grow(m):
        m.extra = nnx.Param(jnp.ones(1))

    with pytest.raises(
        nnx.NnxError, match=r"(?s)same structure.*lambda> changed:  nothing.*grow changed:  the attributes \['extra'\]"
    ):
        nnx.cond(True, grow, lambda m: None, Affine())
    with pytest.raises(nnx.NnxError, match=r"(?s)same structure.*returned.*returned"):
        nnx.cond(True, lambda m: 1.0, lambda m: (1.0, 2.0), Affine())


def test_both_branches_may_grow_alike():
    def grow(value):
        def f(m):
            m.extra = nnx.Param(jnp.full(1, value))

        return f

    m = Affine()
    nnx.cond(False, grow(1.0), grow(2.0), m)
    assert_trees_equal(m.extra[...], jnp.full(1, 2.0))


def test_cond_traces_each_branch_once_more_where_only_one_writes():
    traces = []

    def branch(m):
        traces.append(1)
        bump(m)

    def other(m):
        traces.append(1)

    nnx.cond(True, branch, other, Affine())
    assert len(traces) == 4  # twice a branch: the first trace found that only one of them writes
    traces.clear()
    nnx.cond(True, branch, branch, Affine())
    assert len(traces) == 2


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_while_loop(wrap):
    m = Affine()

    def body(state):
        m, x = state
        m.calls[...] += 1
        return m, x * 2

    out, x = wrap(lambda m: nnx.while_loop(lambda s: s[0].calls[...] < 4, body, (m, jnp.ones(2))))(m)
    assert out is m
    assert int(m.calls[...]) == 4
    assert_trees_equal(x, jnp.full(2, 16.0))


def test_while_loop_traces_its_body_once_a_call():
    traces = []

    def body(m):
        traces.append(1)
        bump(m)
        return m

    def below(m):
        return m.calls[...] < 3

    for m in (Affine(), Affine(), Affine()):
        traces.clear()
        nnx.while_loop(below, body, m)
        assert int(m.calls[...]) == 3
        assert len(traces) <= 2  # once; twice where JAX traces again for weak types


def test_a_carry_of_another_structure_is_an_error():
    with pytest.raises(nnx.NnxError, match=r"(?s)carry.*differs.*given.*returned"):
        nnx.while_loop(lambda s: s[1] < 3, lambda s: (Affine(), s[1] + 1), (Affine(), jnp.array(0)))

    def grow(m):
        m.extra = 1
        return m

    with pytest.raises(nnx.NnxError, match=r"(?s)'extra'.*Variable"):
        nnx.while_loop(lambda m: m.calls[...] < 3, grow, Affine())


def test_a_condition_that_writes_is_an_error():
    def writes(m):
        m.calls[...] += 1
        return m.calls[...] < 3

    with pytest.raises(nnx.NnxError, match=r"condition.*must not write"):
        nnx.while_loop(writes, lambda m: m, Affine())


@pytest.mark.parametrize("upper", [5, jax.device_put(np.int32(5))], ids=["static", "traced"])
def test_fori_loop(upper):
    total = nnx.Variable(jnp.array(0))

    def body(i, total):
        total[...] += i
        return total

    assert nnx.fori_loop(0, upper, body, total) is total
    assert int(total[...]) == 10
    nnx.fori_loop(3, 3, body, total)
    assert int(total[...]) == 10


def test_fori_loop_unroll_needs_static_bounds():
    with pytest.raises(ValueError, match="unrolled only if"):
        nnx.fori_loop(0, jnp.array(3), lambda i, x: x, jnp.ones(1), unroll=2)


def test_gradients_through_fori_loop_and_cond():
    m = Affine()

    def loss(m, x):
        x = nnx.fori_loop(0, 3, lambda i, x: nnx.cond(i < 2, lambda m, x: x @ m.kernel, lambda m, x: x, m, x), x)
        return (x**2).sum()

    grads = nnx.grad(loss)(m, X)
    want = jax.grad(lambda k: ((X @ k @ k) ** 2).sum())(m.kernel[...])
    assert_trees_close(grads["kernel"][...], want)


@pytest.mark.parametrize("run", ["cond", "while_loop", "fori_loop", "traced fori_loop"])
def test_what_a_function_closes_over_dies_with_it(run):
    class Big:
        pass

    big = Big()
    alive = weakref.ref(big)

    def call(big):
        def step(*args):
            assert big is not None
            return args[-1]

        m = Affine()
        if run == "cond":
            nnx.cond(True, step, lambda m: m, m)
        elif run == "while_loop":
            nnx.while_loop(lambda m: m.calls[...] < 0, step, m)
        else:
            nnx.fori_loop(0, 2 if run == "fori_loop" else jnp.array(2), step, m)

    call(big)
    del big
    collect()
    assert alive() is None


def test_a_function_without_attributes_still_works():
    assert_trees_equal(nnx.cond(True, jnp.negative, jnp.abs, X), -X)
    assert_trees_equal(nnx.switch(1, [functools.partial(jnp.add, 1), functools.partial(jnp.add, 2)], X), X + 2)
