"""What a function closes over is what it is now, at every call: law 2 holds for closures too.

Also: `sees_arrays`, by which pmap tells whether it may compile once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.sharding import PartitionSpec

import nnx_core as nnx
from nnx_core.transforms.closures import sees_arrays
from tests.support.arrays import ones

ONE, THREE = ones(), ones(3)


class Scale(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(ones(3))
        self.table = ones(3)
        self.factor = 1.0

    def __call__(self, x):
        return (self.weight[...] * self.table).sum() * self.factor * x


def custom(f):
    g = nnx.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (f(x), ()), lambda _, cotangent: (cotangent,))
    return lambda: g(ONE)


def shard_mapped(f):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    g = nnx.shard_map(lambda x: f(x), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return lambda: g(ONE)


def scanned(f):
    g = nnx.scan(lambda c, x: (c + f(x), x))
    return lambda: g(jnp.float32(0), THREE)[0] / 3


def in_while(f):
    def more(carry):
        return carry[0] < 3

    def body(carry):
        return carry[0] + 1, carry[1] + f(1.0)

    return lambda: nnx.while_loop(more, body, (jnp.int32(0), jnp.float32(0)))[1] / 3


def in_fori(f):
    def body(_, total):
        return total + f(1.0)

    return lambda: nnx.fori_loop(0, 3, body, jnp.float32(0)) / 3


def in_cond(f):
    def other(x):
        return x * 0.0

    return lambda: nnx.cond(True, f, other, ONE)


def in_switch(f):
    def other(x):
        return x * 0.0

    return lambda: nnx.switch(1, (other, f), ONE)


def on(transform, x, result=lambda y: y):
    """The transform made once, called on `x` again and again."""

    def make(f):
        g = transform(f)
        return lambda: result(g(x))

    return make


TRANSFORMS = {
    "cond": in_cond,
    "switch": in_switch,
    "while_loop": in_while,
    "fori_loop": in_fori,
    "scan": scanned,
    "remat": on(nnx.remat, ONE),
    "vmap": on(nnx.vmap, THREE, lambda y: y[0]),
    "pmap": on(nnx.pmap, ones(1), lambda y: y[0]),
    "grad": on(nnx.grad, ONE),
    "checkify": on(nnx.checkify, ONE, lambda pair: pair[1]),
    "shard_map": shard_mapped,
    "custom_vjp": custom,
    "vjp": on(lambda f: lambda x: nnx.vjp(f, x)[0], ONE),
    "jvp": on(lambda f: lambda x: nnx.jvp(f, (x,), (x,))[0], ONE),
}


def changes(m):
    """Each kind of thing that a closure may hold, changed."""
    yield "Variable", lambda: m.weight.set_value(m.weight[...] + 1)
    yield "array", lambda: setattr(m, "table", m.table * 2)
    yield "number", lambda: setattr(m, "factor", m.factor + 3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_second_call_sees_what_is_there_now(name):
    m = Scale()
    run = TRANSFORMS[name](lambda x: m(x))
    assert float(run()) == float(m(1.0))
    for what, change in changes(m):
        change()
        assert float(run()) == float(m(1.0)), what


MODEL = Scale()


def read_global(x):
    return MODEL(x)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_globals_are_closures_too(name):
    MODEL.factor = 1.0
    run = TRANSFORMS[name](read_global)
    run()
    MODEL.factor = 5.0
    assert float(run()) == float(MODEL(1.0))


@pytest.mark.parametrize("name", ["cond", "while_loop", "fori_loop", "shard_map", "checkify"])
def test_as_flax_does_it(name):
    def values(lib):
        weight = lib.Param(ones(3))
        nonlocal_transforms = {
            "cond": lambda f: lambda: lib.cond(True, f, lambda x: x, ONE),
            "while_loop": lambda f: (
                lambda: lib.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (jnp.int32(0), ONE))[1]
            ),
            "fori_loop": lambda f: lambda: lib.fori_loop(0, 3, lambda _, c: f(c), ONE),
            "checkify": lambda f: on(lib.checkify, ONE, lambda pair: pair[1])(f),
            "shard_map": lambda f: on(functools.partial(_sharded, lib), ONE)(f),
        }
        run = nonlocal_transforms[name](lambda x: x + weight[...].sum())
        first = float(run())
        weight[...] = weight[...] * 4
        return first, float(run())

    assert values(nnx) == values(flax_nnx)


def _sharded(lib, f):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    return lib.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())


def test_pmap_of_what_sees_no_arrays_compiles_once():
    traces = []

    def f(x):
        traces.append(None)
        return x * 2

    g = nnx.pmap(f)
    for _ in range(3):
        g(ones(1))
    assert len(traces) == 1


@pytest.mark.slow
def test_what_is_closed_over_is_let_go():
    import gc
    import weakref

    def make():
        table = jax.device_put(np.ones(3, np.float32))
        nnx.cond(True, lambda x: x + table.sum(), lambda x: x, ONE)
        nnx.scan(lambda c, x: (c + table.sum(), x))(jnp.float32(0), THREE)
        return weakref.ref(table)

    ref = make()
    gc.collect()  # of JAX's own cycles; ours hold no arrays
    assert ref() is None


# ---- sees_arrays


def plain(x):
    return x + 1


def calls_global(x):
    return read_global(x)


class Config:
    def __init__(self, table=None):
        self.table = table


def closed_over(thing):
    return lambda x: (thing, x)[1]


ARRAY = ones(2)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (plain, False),
        (read_global, True),
        (calls_global, True),
        (closed_over(3), False),
        (closed_over(ARRAY), True),
        (closed_over([{"k": ARRAY}]), True),
        (closed_over(Config()), False),
        (closed_over(Config(ARRAY)), True),
        (closed_over(MODEL), True),
        (closed_over(MODEL.__call__), True),
        (closed_over(np.ones(2)), True),
        (closed_over(closed_over(ARRAY)), True),
        (closed_over(functools.partial(plain, x=ARRAY)), True),
        (functools.partial(lambda a, x: x, ARRAY), True),
        (lambda x, table=ARRAY: x, True),
        (lambda x, *, table=ARRAY: x, True),
        (lambda x: (lambda: ARRAY)(), True),
        (jax.jit(closed_over(ARRAY)), True),
        (lambda x: jnp.tanh(x) + np.pi, False),
        (lambda x: nnx.relu(x), False),
    ],
)
def test_sees_arrays(f, expected):
    assert sees_arrays(f) is expected
