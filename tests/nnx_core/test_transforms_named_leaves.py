"""Errors of maps that name the Variable; what jit and jit_partial give beside the call, as flax.nnx has it."""

import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import SpecError
from tests.tolerance import assert_trees_close

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


class Counting(nnx.Module):
    def __init__(self, shape=()):
        self.w = nnx.Param(jnp.ones((3, 2)))
        self.count = nnx.BatchStat(jnp.ones(shape))


MAPS = {
    "scan": lambda axis: nnx.scan(lambda c, m: (c, m.w.sum()), in_axes=(nnx.Carry, axis)),
    "vmap": lambda axis: lambda c, m: nnx.vmap(lambda c, m: m.w.sum(), in_axes=(None, axis))(c, m),
    "pmap": lambda axis: lambda c, m: nnx.pmap(lambda c, m: m.w.sum(), in_axes=(None, axis))(c, m),
}


@pytest.mark.parametrize(("name", "mapped"), MAPS.items(), ids=MAPS)
def test_a_scalar_variable_under_an_axis_is_named(name, mapped):
    message = (
        rf"{name} of .*: the BatchStat at args\[1\]\.count is mapped over axis 0, and has the shape \(\)\.\nGive it"
    )
    with pytest.raises(SpecError, match=message):
        mapped(0)(0.0, Counting())
    with pytest.raises(
        SpecError, match=r"BatchStat at args\[1\]\.count is mapped over axis 1, and has the shape \(4,\)"
    ):
        mapped(1)(0.0, Counting((4,)))


@pytest.mark.parametrize(("name", "mapped"), MAPS.items(), ids=MAPS)
def test_sizes_that_differ_are_named(name, mapped):
    message = rf"(?s){name} of .*inconsistent sizes.*\n  args\[1\]\.count: 4\n  args\[1\]\.w: 3\n"
    with pytest.raises(SpecError, match=message):
        mapped(0)(0.0, Counting((4,)))


def test_keywords_and_arrays_are_named():
    with pytest.raises(SpecError, match=r"the leaf at kwargs\.x is mapped over axis 0"):
        nnx.vmap(lambda *, x: x)(x=jnp.ones(()))


def test_what_f_raises_is_what_the_caller_sees():
    def fail(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        nnx.vmap(fail)(jnp.ones(3))


# ---- jit ---------------------------------------------------------------------------------------------------------


def test_the_count_of_compiled_programs_as_flax_nnx():
    def counts(n):
        jitted = n.jit(lambda m, x: m(x))
        m, sizes = n.Linear(2, 3, rngs=n.Rngs(0)), []
        for batch in (1, 2, 2):
            jitted(m, jnp.ones((batch, 2)))
            sizes.append(jitted.jitted_fn._cache_size())
        jitted.jitted_fn.clear_cache()
        donating = n.jit(lambda x: 2 * x, donate_argnums=0)
        sizes += [jitted.jitted_fn._cache_size(), donating.jitted_fn._cache_size()]
        donating(jnp.ones(2))
        return [*sizes, donating.jitted_fn._cache_size()]

    assert counts(nnx) == counts(flax_nnx) == [1, 2, 2, 0, 0, 1]


def test_the_count_of_a_jitted_method():
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

        @nnx.jit
        def total(self):
            return self.w.sum()

    Layer().total()
    assert Layer.total.jitted_fn._cache_size() == 1
    assert Layer().total.jitted_fn._cache_size() == 1


def test_stages_of_a_partial_function_as_flax_nnx():
    def story(n):
        m, x = n.Linear(2, 3, rngs=n.Rngs(0)), jnp.ones((1, 2))
        partial = n.jit_partial(lambda m, x: m(x), m, graph_updates=False)
        compiled = partial.lower(x).compile()
        traced = partial.trace(x).lower().compile()
        m.kernel[...] = 2 * m.kernel[...]
        assert partial.jitted_fn._cache_size() == 0
        return compiled(x), traced(x), partial(x), partial.eval_shape(x).shape

    assert_trees_close(story(nnx), story(flax_nnx))


def test_stages_of_a_partial_method_write():
    class Counter(nnx.Module):
        def __init__(self):
            self.n = nnx.Variable(jnp.array(0))

        def add(self, by, x):
            self.n[...] += by
            return self.n[...] + x

    counter = Counter()
    compiled = nnx.jit_partial(counter.add, jnp.array(2)).lower(jnp.array(1)).compile()
    assert [int(compiled(jnp.array(1))) for _ in range(2)] == [3, 5]
    assert int(counter.n[...]) == 4


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_that_public_programs_reach_for():
    from nnx_core.spmd import PARTITION_NAME

    from nnx_core.graph import Key

    assert PARTITION_NAME == nnx.spmd.PARTITION_NAME == flax_nnx.spmd.PARTITION_NAME
    assert nnx.graph.Key is Key
    assert isinstance("kernel", Key)
