"""A second call on the same structure: nothing is compiled, nothing kept alive, nothing torn.

Outside of any jit a function that is given to a loop, a branch or the like is traced at each call, since what it
closes over may have changed (`test_closures`); only jit and pmap keep a trace. Inside of a jit nothing is traced again
whatever the transform.
"""

import threading
import weakref

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Tied, assert_no_tracer, portrait, stack_of_affine
from tests.support.arrays import ramp
from tests.support.freed import collect
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(3, 3, over=9)
MESH = jax.sharding.Mesh(jax.devices()[:1], ("data",))
P = jax.sharding.PartitionSpec
KEPT = {}  # functions that a loop or a branch gets: the same ones in every call, as in a program


def loss(m, x):
    return (m(x) ** 2).sum()


def keep(name, f):
    """The first `f` of this name."""
    return KEPT.setdefault(name, f)


def custom(f):
    g = nnx.custom_vjp(f)
    g.defvjp(lambda m, x: (g(m, x), (m, x)), lambda res, gs: nnx.vjp(f, *res)[1](gs[1]))
    return g


# name -> (makes the transform of a call (m, x) -> y, makes what it is called with)
FORMS = {
    "jit": lambda f: nnx.jit(f),
    "jit, donated": lambda f: nnx.jit(f, donate_argnums=0),
    "jit_partial": lambda f: lambda m, x: keep(("partial", id(m)), nnx.jit_partial(f, m))(x),
    "grad": lambda f: nnx.grad(lambda m, x: f(m, x).sum()),
    "value_and_grad": lambda f: nnx.value_and_grad(lambda m, x: f(m, x).sum()),
    "remat": lambda f: nnx.remat(f),
    "vmap": lambda f: nnx.vmap(f, in_axes=(None, 0)),
    "vjp": lambda f: lambda m, x: nnx.vjp(f, m, x)[0],
    "jvp": lambda f: lambda m, x: nnx.jvp(f, (m, x), (None, x))[1],
    "custom_vjp": custom,
    "scan": lambda f: nnx.scan(lambda m, x: (m, f(m, x))),
    "cond": lambda f: lambda m, x: nnx.cond(True, f, keep("idle", lambda m, x: x), m, x),
    "switch": lambda f: lambda m, x: nnx.switch(1, [keep("idle", lambda m, x: x), f], m, x),
    "shard_map": lambda f: nnx.shard_map(f, mesh=MESH, in_specs=(P(), P()), out_specs=P()),
    "pmap": lambda f: nnx.pmap(f, in_axes=(None, 0), devices=jax.devices()[:3]),
    "checkify": lambda f: nnx.checkify(f),
    "eval_shape": lambda f: lambda m, x: nnx.eval_shape(f, m, x),
}
TRACED_ONCE = {"jit", "jit, donated", "jit_partial", "pmap"}


@pytest.fixture
def compilations(no_compile_cache):
    """The names of what XLA compiled since this list was cleared."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def counted(traces):
    def f(m, x):
        traces.append(1)
        return m(x)

    return f


@pytest.mark.parametrize("name", FORMS)
def test_a_second_call_compiles_nothing(name, compilations):
    traces = []
    call, m = FORMS[name](counted(traces)), Affine()
    call(m, X)
    call(m, X + 1)  # some of JAX's own helpers are compiled for the first write
    traces.clear()
    compilations.clear()
    call(m, X + 2)
    assert compilations == []
    if name in TRACED_ONCE:
        assert traces == []
    assert_no_tracer(m)


@pytest.mark.parametrize("name", [n for n in FORMS if n != "jit, donated"])
def test_inside_of_a_jit_nothing_is_traced_again(name, compilations):
    traces = []
    call, m = FORMS[name](counted(traces)), Affine()

    @nnx.jit
    def outer(m, x):
        return jax.tree.map(jnp.zeros_like, call(m, x))

    outer(m, X)
    outer(m, X)  # shard_map has moved what it wrote to its mesh, and JAX traces anew for that
    other, x = Affine(seed=1), X + 1  # made before, since JAX compiles what makes them too
    traces.clear()
    compilations.clear()
    outer(m, x)
    outer(other, X)
    assert (traces, compilations) == ([], [])
    assert_no_tracer(m)


def test_the_loops_are_compiled_once(compilations):
    def condition(carry):
        return carry[0].calls[...] % 3 != 0

    def body(carry):
        m, x = carry
        return m, m(x)

    def step(_, carry):
        return body(carry)

    m = Affine()
    for _ in range(2):
        m.calls[...] = jnp.int32(1)
        nnx.while_loop(condition, body, (m, X))
        nnx.fori_loop(0, 2, step, (m, X))
        nnx.fori_loop(jnp.int32(0), jnp.int32(2), step, (m, X))
    m.calls[...] = jnp.int32(1)
    compilations.clear()
    nnx.while_loop(condition, body, (m, X))
    nnx.fori_loop(0, 2, step, (m, X))
    nnx.fori_loop(jnp.int32(1), jnp.int32(2), step, (m, X))
    assert compilations == []


def test_a_step_of_everything_is_traced_once(compilations):
    """jit of a gradient of remat of a scan over layers, with a branch inside."""
    traces = []
    stack, head = stack_of_affine(3), Affine()

    def layer(x, m):
        traces.append(1)
        return nnx.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(-x), m, x)

    @nnx.jit
    def step(stack, head, x):
        def f(stack, head):
            y = nnx.scan(nnx.remat(layer), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)
            return loss(head, y)

        value, grads = nnx.value_and_grad(f, argnums=(0, 1))(stack, head)
        for m, g in zip((stack, head), grads, strict=True):
            nnx.update(m, jax.tree.map(lambda p, g: p - 1e-4 * g, nnx.state(m, nnx.Param), g))
        return value

    first = step(stack, head, X)
    traces.clear()
    compilations.clear()
    assert float(step(stack, head, X)) < float(first)
    assert (traces, compilations) == ([], [])
    assert_trees_equal(stack.calls[...], jnp.full(3, 2, jnp.int32))
    assert int(head.calls[...]) == 2


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FORMS if n != "jit_partial"])  # which holds what it was given
def test_a_dropped_module_is_freed_while_the_function_lives(name):
    call = FORMS[name](lambda m, x: m(x))
    m = Affine()
    call(m, X)
    call(m, X)
    gone = [weakref.ref(x) for x in (m, m.kernel, m.kernel.get_value())]
    del m
    collect()
    assert [ref() for ref in gone] == [None] * 3
    m = Affine(seed=1)
    call(m, X)
    assert_no_tracer(m)


def test_donated_buffers_are_given_away_and_the_module_goes_on():
    m, twin = Tied(), Tied()
    f = nnx.jit(lambda m, x: m(x), donate_argnums=0)
    for i in range(3):
        old = [v.get_value() for v in (m.encode.kernel, m.encode.calls, m.layers[1].kernel)]
        assert_trees_close(f(m, X + i), twin(X + i))
        assert [x.is_deleted() for x in old] == [True] * 3
    assert m.encode is m.decode is m.layers[0]
    assert_trees_equal(np.asarray(m.layers[1].kernel), np.asarray(twin.layers[1].kernel))
    assert portrait(nnx.clone(m), values=False) == portrait(twin, values=False)


# ---- exceptions and threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("jit, donated", "jit_partial")])
def test_a_call_that_raises_changes_nothing_and_the_next_one_works(name):
    fail = [True]

    def f(m, x):
        y = m(x)
        m.note = "written"
        if fail[0]:
            raise RuntimeError("in the middle")
        del m.note
        return y

    call, m = FORMS[name](f), Affine()
    before = portrait(m)
    with pytest.raises(RuntimeError, match="in the middle"):
        call(m, X)
    assert portrait(m) == before
    fail[0] = False
    call(m, X)
    assert_no_tracer(m)
    assert int(m.calls[...]) == (0 if name == "eval_shape" else 3 if name == "scan" else 1)


@pytest.mark.parametrize("name", ["jit", "scan", "cond", "grad", "shard_map", "checkify"])
def test_threads_share_one_function(name):
    call = FORMS[name](lambda m, x: m(x))
    modules = [Affine(seed=i) for i in range(4)]
    want = [m(X) for m in modules]
    start, failures = threading.Barrier(4), []

    def work(m, y):
        try:
            start.wait()
            for _ in range(3):
                out = call(m, X)
            if name in ("jit", "cond", "shard_map"):
                assert_trees_close(out, y)
        except Exception as error:  # noqa: BLE001  # shown below: an exception in a thread is lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(modules, want, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    steps = 3 * len(X) if name == "scan" else 3
    assert [int(m.calls[...]) for m in modules] == [1 + steps] * 4
    for m in modules:
        assert_no_tracer(m)
