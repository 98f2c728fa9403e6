"""Every transform inside every other: results, writes, new state, sharing and gradients as without them.

A row below is a transform that, on functions which work element by element, means nothing but the function. So any
two of them nested must give what the plain function gives. The frequent pairs are compiled and run. The others are
traced, and the structure and the forms that they leave are compared; to run them too is the grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import assert_no_tracer, portrait, reachable
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close

X = ramp(4, 4, over=16)


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


def by_cond(f):
    """The branch that is taken; the other one writes nothing."""
    return lambda m, x: nnx.cond(jnp.all(x < 9), f, lambda m, x: jnp.zeros_like(x), m, x)


def by_switch(f):
    """One of three branches."""
    idle = [lambda m, x: jnp.zeros_like(x), lambda m, x: jnp.ones_like(x)]
    return lambda m, x: nnx.switch(jnp.int32(1), [idle[0], f, idle[1]], m, x)


def by_while_loop(f):
    """One step of a loop that carries the module."""

    def body(carry):
        m, x, _, i = carry
        return m, x, f(m, x), i + 1

    start = jnp.zeros_like
    return lambda m, x: nnx.while_loop(lambda carry: carry[3] < 1, body, (m, x, start(x), jnp.int32(0)))[2]


def by_fori_loop(f):
    """One step of a loop with Python bounds, which can be differentiated."""

    def body(_, carry):
        m, x, _ = carry
        return m, x, f(m, x)

    return lambda m, x: nnx.fori_loop(0, 1, body, (m, x, jnp.zeros_like(x)))[2]


def by_vjp(f):
    """The value beside the pullback."""
    return lambda m, x: nnx.vjp(f, m, x)[0]


def by_jvp(f):
    """The value beside a tangent of zero."""
    return lambda m, x: nnx.jvp(f, (m, x), (None, None))[0]


def by_custom_vjp(f):
    """f with the rule that it has anyway."""
    g = nnx.custom_vjp(lambda m, x: f(m, x))

    def bwd(res, cotangents):
        _, pull = nnx.vjp(f, *res)
        return pull(cotangents[1])

    g.defvjp(lambda m, x: (g(m, x), (m, x)), bwd)
    return g


def by_shard_map(f):
    """Rows on four devices."""
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("rows",))
    rows = jax.sharding.PartitionSpec("rows")
    return nnx.shard_map(f, mesh=mesh, in_specs=(rows, rows), out_specs=rows)


def by_pmap(f):
    """A row on each of four devices."""
    return nnx.pmap(f, devices=jax.devices()[:4])


def by_checkify(f):
    """The result beside the error."""

    def call(m, x):
        error, y = nnx.checkify(f)(m, x)
        assert error.get() is None or isinstance(x, jax.core.Tracer)
        return y

    return call


def by_eval_shape(f):
    """f, after its shape was asked for: which must have changed nothing."""

    def call(m, x):
        before = portrait(m, values=False)
        want = nnx.eval_shape(f, m, x)
        assert portrait(m, values=False) == before
        y = f(m, x)
        assert (y.shape, y.dtype) == (want.shape, want.dtype)
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
    "cond": by_cond,
    "switch": by_switch,
    "while_loop": by_while_loop,
    "fori_loop": by_fori_loop,
    "vjp": by_vjp,
    "jvp": by_jvp,
    "custom_vjp": by_custom_vjp,
    "shard_map": by_shard_map,
    "pmap": by_pmap,
    "checkify": by_checkify,
    "eval_shape": by_eval_shape,
}
# a loop, a branch beside another one and an update cannot add state
KEEPS_STRUCTURE = {
    "scan over rows", "scan with carry", "jax.jit", "cond", "switch", "while_loop", "fori_loop",
}  # fmt: skip
IMPOSSIBLE = {  # what JAX has not
    *itertools.product(["shard_map", "pmap"], ["shard_map", "pmap"]),  # a mesh inside of the same mesh
    ("value_and_grad", "while_loop"),  # the reverse derivative of a loop without a fixed number of steps
    ("jvp", "custom_vjp"),  # the forward derivative of a function with a reverse rule
}
PAIRS = [pair for pair in itertools.product(TRANSFORMS, TRANSFORMS) if pair not in IMPOSSIBLE]
FIRST = set(list(TRANSFORMS)[:7])
OFTEN = [p for p in PAIRS if FIRST.issuperset(p) or "jit" in p]  # and each of the others with jit, in both orders

SELDOM = [pair for pair in PAIRS if pair not in OFTEN]
RUN = [*OFTEN, *(pytest.param(*pair, marks=pytest.mark.grid) for pair in SELDOM)]


def without(names):
    """The pairs of which neither is among `names`."""
    return [p for p in OFTEN if not names & set(p)]


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


def nested(outer, inner):
    """One transform of the other one's call of a module."""
    return TRANSFORMS[outer](lambda m, x: TRANSFORMS[inner](lambda m, x: m(x))(m, x))


def abstract(f, m):
    """What a trace of `f` with `m` shows: the module's portrait after it; forms of the result and of all state."""
    portraits = []
    graphdef, state = nnx.split(m)

    def pure(state, x):
        inner = nnx.merge(graphdef, state)
        old, total = reachable(inner), inner.total.get_raw_value()
        y = f(inner, x)
        assert inner.total.get_raw_value() is not total  # a portrait without values would not show a lost write
        portraits.append(portrait(inner, origin=old, values=False))
        return y, nnx.to_pure_dict(nnx.state(inner))

    forms = jax.eval_shape(pure, state, X)
    return portraits[0], jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), forms)


@functools.cache
def of_none():
    """What the call alone shows."""
    return abstract(lambda m, x: m(x), Wave())


@pytest.mark.parametrize(("outer", "inner"), SELDOM)
def test_two_transforms_trace_as_none(outer, inner):
    m = Wave()
    before = portrait(m)
    assert abstract(nested(outer, inner), m) == of_none()
    assert portrait(m) == before


@pytest.mark.sample(24)
@pytest.mark.parametrize(("outer", "inner"), RUN)
def test_two_transforms_equal_none(outer, inner):
    m, twin = Wave(), Wave()
    old, old_twin = reachable(m), reachable(twin)
    scale = m.scale.get_value()
    f = nested(outer, inner)
    for _ in range(2 if (outer, inner) in OFTEN else 1):
        assert_trees_close(f(m, X), twin(X))
        assert_trees_close(m.total.get_value(), twin.total.get_value())
        assert_trees_close(m.scale.get_value(), scale)
    assert portrait(m, origin=old, values=False) == portrait(twin, origin=old_twin, values=False)
    assert_no_tracer(m)


@pytest.mark.parametrize(("outer", "inner"), without(KEEPS_STRUCTURE))
def test_new_state_leaves_two_transforms(outer, inner):
    m, twin = Growing(), Growing()
    old, old_twin = reachable(m), reachable(twin)
    f = nested(outer, inner)
    for _ in range(2):
        assert_trees_close(f(m, X), twin(X))
    assert_trees_close(m.seen.get_value(), X * 2)
    assert m.note == "seen"
    assert portrait(m, origin=old, values=False) == portrait(twin, origin=old_twin, values=False)
    assert_no_tracer(m)


@pytest.mark.sample(24)
@pytest.mark.parametrize(("outer", "inner"), without({"while_loop"}))
def test_gradients_go_through_two_transforms(outer, inner):
    m = Wave()
    f = nested(outer, inner)
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
