"""jit, grad, remat, vmap, scan, the branches and the loops: each program gives what it gives with flax.nnx."""

import functools

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


@functools.cache
def block(lib):
    """A module class: dense, batch statistics, noise, a count of its calls."""

    class Count(lib.Variable):
        pass

    class Block(lib.Module):
        def __init__(self, n_in, n_out, *, rngs):
            self.linear = lib.Linear(n_in, n_out, rngs=rngs)
            self.norm = lib.BatchNorm(n_out, rngs=rngs)
            self.dropout = lib.Dropout(0.5, rngs=rngs)
            self.calls = Count(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.dropout(self.norm(self.linear(x)))

    return Block


def make(lib, n_out=3):
    """A Block with parameters and noise from fixed seeds."""
    return block(lib)(3, n_out, rngs=lib.Rngs(0, dropout=1))


def loss(m, x):
    """Scalar."""
    return (m(x) ** 2).sum()


def by_keys(lib, depth):
    """Some keys: one stack of `depth`."""
    return jax.random.split(jax.random.key(7), depth)


# ---- jit -----------------------------------------------------------------------------------------------------------


@program
def jit_of_a_training_step(lib):
    m = make(lib)

    @lib.jit
    def step(m, x):
        value, grads = lib.value_and_grad(loss)(m, x)
        params = lib.state(m, lib.Param)
        lib.update(m, jax.tree.map(lambda p, g: p - 0.25 * g, params, grads))
        return value

    return [step(m, X), step(m, X)], m


@program
def jit_that_changes_structure(lib):
    m = make(lib)

    @lib.jit
    def f(m, x):
        m.seen = lib.Cache(x.sum())
        m.twin = m.linear
        m.extra = lib.List([lib.Param(x * 2)])
        del m.dropout
        return m.linear

    out = f(m, X)
    return out is m.linear, m.twin is m.linear, hasattr(m, "dropout"), m


@program
def jit_of_a_constructor_and_shared_arguments(lib):
    m = lib.jit(lambda: make(lib))()

    @lib.jit(static_argnames="times")
    def f(a, b, x, times):
        for _ in range(times):
            x = a(x) + b["again"].linear(x)
        return x, a

    y, again = f(m, {"again": m}, X, times=2)
    return y, again is m, m


@program
def jit_with_static_and_donated_arguments(lib):
    m = make(lib)
    f = lib.jit(lambda scale, m, x: m(x) * scale, static_argnums=0, donate_argnums=1)
    return f(2, m, X), f(3, m, X), m


@program
def jit_with_states_as_arguments(lib):
    graphdef, params, rest = lib.split(make(lib), lib.Param, ...)

    @lib.jit
    def f(params, rest, x):
        m = lib.merge(graphdef, params, rest, copy=True)  # the default of flax.nnx writes to `rest`, row 66
        y = m(x)
        return y, lib.state(m, lib.Not(lib.Param))

    return f(params, rest, X), params, rest


@program
def jit_lowered_and_compiled(lib):
    m = make(lib)
    compiled = lib.jit(lambda m, x: m(x)).lower(m, X).compile()
    return compiled(m, X), compiled(m, X), m


@program
def jit_with_a_variable_and_a_list_of_them(lib):
    a, b = lib.Param(jnp.ones(2)), lib.BatchStat(jnp.zeros(2))

    @lib.jit
    def f(pair, table):
        pair[1][...] += pair[0] * 2
        table["a"][...] *= 3

    f([a, b], {"a": a})
    return a, b


@program
def jit_partial_and_cached_partial(lib):
    m, other = make(lib), make(lib)
    f = lib.cached_partial(lib.jit(lambda m, x: m(x)), m)
    g = lib.jit_partial(lambda m, x: m(x), other, graph=False)
    return f(X), f(X), g(X), m, other


# ---- gradients -----------------------------------------------------------------------------------------------------


@program
def grad_of_the_parameters(lib):
    m = make(lib)
    return lib.grad(loss)(m, X), lib.value_and_grad(loss)(m, X), m


@program
def grad_with_aux_and_several_arguments(lib):
    m, other = make(lib), make(lib)

    def f(a, x, b):
        y = a(x) + b(x)
        return (y**2).sum(), {"y": y}

    grads, aux = lib.grad(f, argnums=(0, 1, 2), has_aux=True)(m, X, other)
    (value, aux2), one = lib.value_and_grad(f, argnums=2, has_aux=True)(m, X, other)
    return grads, aux, value, aux2, one, m, other


@program
def grad_by_diff_state(lib):
    m = make(lib)
    kernels = lib.DiffState(0, lib.PathContains("kernel"))
    both = lib.DiffState(0, lib.Any(lib.BatchStat, "bias"))
    stats = lib.grad(lambda m, x: (m.norm.mean * m.linear(x)).sum(), argnums=lib.DiffState(0, lib.BatchStat))
    twice = lib.grad(loss, argnums=(kernels, 1))
    return lib.grad(loss, argnums=kernels)(m, X), lib.grad(loss, argnums=both)(m, X), stats(m, X), twice(m, X), m


@program
def grad_of_states_variables_and_trees(lib):
    graphdef, params, rest = lib.split(make(lib), lib.Param, ...)
    of_state = lib.grad(lambda params: loss(lib.merge(graphdef, params, rest, copy=True), X))(params)
    of_variable = lib.grad(lambda v: (v**3).sum())(lib.Param(X))
    of_tree = lib.grad(lambda t: (t["a"] * t["b"][0]).sum())({"a": X, "b": [X * 2]})
    return of_state, of_variable, of_tree


@program
def grad_of_a_shared_parameter(lib):
    m = make(lib)
    m.twin = m.linear
    return lib.grad(lambda m: (m.twin(m.linear(X)) ** 2).sum())(m)


@program
def remat_of_a_block(lib):
    m = make(lib)
    saved = jax.checkpoint_policies.dots_saveable
    plain = lib.grad(lambda m, x: lib.remat(loss)(m, x))(m, X)
    kept = lib.grad(lib.remat(loss, policy=saved, prevent_cse=False))(m, X)
    fixed = lib.remat(lambda m, x, n: m(x) * n, static_argnums=2)(m, X, 3)
    return plain, kept, fixed, m


# ---- vmap ----------------------------------------------------------------------------------------------------------


def stack(lib, depth=2):
    """`depth` Blocks in one."""

    @lib.vmap
    def create(key):
        return block(lib)(3, 3, rngs=lib.Rngs(key, dropout=key))

    return create(by_keys(lib, depth))


@program
def vmap_makes_and_calls_a_stack(lib):
    m = stack(lib)
    return lib.vmap(lambda m, x: m(x), in_axes=(0, None))(m, X), m


@program
def vmap_by_state_axes(lib):
    m = stack(lib)
    axes = lib.StateAxes({(lib.Param, lib.RngState): 0, ...: 0})
    return lib.vmap(lambda m, x: m(x), in_axes=(axes, 0), out_axes=1)(m, jnp.stack([X, X + 1])), m


@program
def vmap_broadcasts_parameters(lib):
    m = make(lib)

    @lib.split_rngs(splits=4)
    @lib.vmap(in_axes=(lib.StateAxes({lib.RngState: 0, ...: None}), 0), axis_size=4)
    def f(m, x):
        return m.dropout(m.linear(x))

    return f(m, X), f(m, X), m


@program
def vmap_changes_the_axis_of_what_it_returns(lib):
    create = lib.vmap(
        lambda key: lib.Linear(3, 2, rngs=lib.Rngs(key)),
        out_axes=lib.StateAxes({lib.PathContains("kernel"): 1, ...: 0}),
    )
    m = create(by_keys(lib, 5))
    f = lib.vmap(lambda m, x: m(x), in_axes=(lib.StateAxes({lib.PathContains("kernel"): 1, ...: 0}), None))
    return m, f(m, X)


@program
def vmap_with_a_named_axis(lib):
    m = make(lib)

    @lib.vmap(in_axes=(None, 0), axis_name="batch")
    def f(m, x):
        total = jax.lax.psum(m.linear(x), "batch")
        m.calls[...] += 1
        return total

    return f(m, X), m


@program
def vmap_over_states_and_variables(lib):
    graphdef, params, rest = lib.split(stack(lib), lib.Param, ...)
    y = lib.vmap(lambda p, r, x: lib.merge(graphdef, p, r, copy=True)(x), in_axes=(0, 0, None))(params, rest, X)
    v = lib.Variable(jnp.zeros(4))

    @lib.vmap
    def write(v, x):
        v[...] = x.sum()
        return v + 1

    return y, write(v, X), v


@program
def vmap_and_scan_name_the_axis(lib):
    init = lib.with_partitioning(lib.initializers.lecun_normal(), ("in", "out"))

    @lib.vmap(transform_metadata={lib.PARTITION_NAME: "layers"})
    def create(key):
        return lib.Linear(3, 3, kernel_init=init, rngs=lib.Rngs(key))

    m = create(by_keys(lib, 2))
    seen = []

    @lib.scan(in_axes=(lib.Carry, 0), out_axes=lib.Carry, transform_metadata={lib.PARTITION_NAME: "layers"})
    def f(x, m):
        seen.append(m.kernel.get_metadata()["out_sharding"])
        return m(x)

    return f(X, m), m, seen[0]


# ---- scan ----------------------------------------------------------------------------------------------------------


@program
def scan_over_layers(lib):
    m = stack(lib, 3)
    f = lib.scan(lambda x, m: m(x), in_axes=(lib.Carry, 0), out_axes=lib.Carry)
    return f(X, m), m


@program
def scan_over_time_with_a_carried_module(lib):
    m = make(lib)

    @lib.scan(in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 1))
    def f(m, x):
        return m, m(x[None])[0]

    again, ys = f(m, X)
    return again is m, ys, m


@program
def scan_by_state_axes(lib):
    m = stack(lib, 3)
    m.calls = type(m.calls)(jnp.int32(0))
    axes = lib.StateAxes({type(m.calls): lib.Carry, ...: 0})
    f = lib.scan(lambda x, m: (m(x), x.sum()), in_axes=(lib.Carry, axes), out_axes=(lib.Carry, 0))
    return f(X, m), m


@program
def scan_in_reverse_unrolled_with_broadcasts(lib):
    m = make(lib)

    def f(c, x, m, scale):
        c = c + m.linear(x) * scale
        return c, (c.sum(), x)

    axes = (lib.Carry, 0, None, None)
    out = lib.scan(f, in_axes=axes, reverse=True, unroll=2)(jnp.zeros(3), X, m, 0.5)
    return out, lib.scan(lambda c: (c * 2, c), length=3, in_axes=lib.Carry)(jnp.ones(2))


@program
def scan_without_carry_splits_rngs(lib):
    rngs = lib.Rngs(0)

    @lib.split_rngs(splits=4)
    @lib.scan(in_axes=(lib.StateAxes({lib.RngState: 0}), 0), out_axes=0)
    def f(rngs, x):
        return x + jax.random.normal(rngs(), x.shape)

    return f(rngs, X), f(rngs, X), rngs


@program
def scan_with_gradient_and_remat(lib):
    m = stack(lib, 3)

    def f(m, x):
        body = lib.remat(lambda x, m: m(x))
        return (lib.scan(body, in_axes=(lib.Carry, 0), out_axes=lib.Carry)(x, m) ** 2).sum()

    return lib.jit(lib.value_and_grad(f))(m, X), m


# ---- branches and loops --------------------------------------------------------------------------------------------


@program
def cond_that_writes(lib):
    m = make(lib)

    def train(m, x):
        return m(x)

    def count(m, x):
        m.calls[...] += 10
        return x

    return lib.cond(True, train, count, m, X), lib.cond(jnp.array(False), train, count, m, X), m


@program
def switch_of_three(lib):
    m = make(lib)
    branches = [lambda m, x, n=n: (m(x) * n, m.calls + n) for n in range(3)]
    return [lib.switch(i, branches, m, X) for i in (0, 1, 5, -1)], m


@program
def cond_in_jit_in_grad(lib):
    m = make(lib)

    @lib.jit
    def f(m, x, flag):
        return lib.cond(flag, lambda m: (m(x) ** 2).sum(), lambda m: m.linear.kernel.sum(), m)

    return [lib.value_and_grad(f)(m, X, flag) for flag in (True, False)], m


@program
def while_loop_until_the_count(lib):
    m = make(lib)

    def body(carry):
        m, x = carry
        return m, m(x)

    again, x = lib.while_loop(lambda carry: carry[0].calls[...] < 3, body, (m, X))
    return again is m, x, m


@program
def fori_loop_with_a_module(lib):
    m = make(lib)

    def body(i, carry):
        m, x = carry
        return m, m(x) + i

    again, x = lib.fori_loop(0, 3, body, (m, X))
    return again is m, x, lib.fori_loop(jnp.int32(1), jnp.int32(3), body, (m, X))[1], m


# ---- streams, shapes -----------------------------------------------------------------------------------------------


@program
def split_streams_come_back(lib):
    rngs, m = lib.Rngs(0, params=1, noise=2), make(lib)
    with lib.split_rngs(m, splits=3, only="dropout"):
        inside = lib.state(lib.clone(m))
    backups = lib.split_rngs(rngs, splits=1, squeeze=True)
    squeezed = lib.state(lib.clone(rngs))
    lib.restore_rngs(backups)
    return inside, m, squeezed, rngs, rngs.normal((2,)), rngs.noise.uniform((2,)), rngs.params.randint((3,), 0, 9)


@program
def forks_splits_and_broadcasts_are_new_streams(lib):
    by_filter = {"params": 3, "noise": None}
    every = {"params": 3, ...: (2, 2)}
    calls = [
        lambda rngs: rngs.fork(),
        lambda rngs: rngs.split(2),
        lambda rngs: rngs.split(by_filter),
        lambda rngs: rngs.split(every),
        lambda rngs: rngs.broadcast(2),
        lambda rngs: rngs.broadcast(by_filter),
        lambda rngs: rngs.noise.fork(),
        lambda rngs: rngs.noise.split(2),
        lambda rngs: rngs.noise.broadcast((2, 2)),
    ]
    return [(call(rngs), rngs) for call in calls for rngs in [lib.Rngs(0, params=1, noise=2)]]


@program
def split_and_forked_copies(lib):
    m = make(lib)
    split = lib.split_rngs(m, splits=2, only="dropout", graph_updates=False)
    tree = lib.split_rngs(m, splits=(2, 3), graph=False)
    fork = lib.fork_rngs(m, graph_updates=False)
    both = lib.fork_rngs(m, graph=False, graph_updates=False)

    @lib.split_rngs(splits=2, graph_updates=False)
    def inside(m):
        return lib.state(m, lib.RngState)

    return split is m, split, tree, fork, both, inside(m), m


@program
def reseeded_streams(lib):
    m = make(lib)
    y = m(X)
    lib.reseed(m, dropout=5)
    return y, m(X), m


@program
def eval_shape_of_a_constructor_and_a_call(lib):
    m = lib.eval_shape(lambda: make(lib))
    return m, lib.eval_shape(lambda m, x: m(x), make(lib), X)


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_it_gives_with_flax(name):
    same(PROGRAMS[name])
