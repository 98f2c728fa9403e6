"""What a loop carries: objects as themselves, States and Variables by structure and value.

Oracles: a Python loop, flax.nnx.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core._errors import StructureError
from tests.support.arrays import ones, ramp
from tests.tolerance import assert_trees_close, assert_trees_equal


def in_scan(body, carry, steps=3):
    return nnx.scan(lambda c, x: (body(c), x))(carry, jnp.arange(steps))[0]


def in_fori(body, carry, steps=3):
    return nnx.fori_loop(0, steps, lambda _, c: body(c), carry)


def in_traced_fori(body, carry, steps=3):
    return nnx.fori_loop(jnp.int32(0), jnp.int32(steps), lambda _, c: body(c), carry)


def in_while(body, carry, steps=3):
    return nnx.while_loop(lambda c: c[0] < steps, lambda c: (c[0] + 1, body(c[1])), (jnp.int32(0), carry))[1]


def in_jit(body, carry, steps=3):
    return nnx.jit(lambda c: in_scan(body, c, steps))(carry)


def in_python(body, carry, steps=3):
    for _ in range(steps):
        carry = body(carry)
    return carry


LOOPS = [in_scan, in_fori, in_traced_fori, in_while, in_jit]
loops = pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)


def doubled(tree):
    return jax.tree.map(lambda x: x * 2, tree)


def values(tree):
    """Raw values by path."""
    return jax.tree.map(lambda x: x, nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else nnx.as_pure(tree))


def shared_state():
    v = nnx.Param(ramp(3))
    return nnx.State({"a": v, "b": {"c": nnx.BatchStat(ones(2))}})


CARRIES = {
    "State": shared_state,
    "dict of Variables": lambda: {"a": nnx.Param(ramp(3)), "b": [nnx.BatchStat(ones(2)), ones(1)]},
    "Variable": lambda: nnx.Param(ramp(3), tag="kept"),
    "tuple with arrays": lambda: (nnx.Param(ones(2)), ones(3), {"n": jnp.float32(1)}),
    "optimizer state": lambda: optax.adam(1e-3).init(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))),
}


def rebuilt(tree):
    """All leaves doubled, every Variable a new one."""
    return jax.tree.map(lambda x: x * 2 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


@loops
@pytest.mark.parametrize("name", CARRIES)
def test_what_is_rebuilt_in_each_step_is_carried(name, loop):
    given = CARRIES[name]()
    before = values(given)
    result = loop(rebuilt, given)
    assert_trees_equal(values(result), values(in_python(rebuilt, CARRIES[name]())))
    assert jax.tree.structure(result) == jax.tree.structure(CARRIES[name]())
    assert_trees_equal(values(given), before)  # nobody wrote to what was given


@loops
def test_a_variable_shared_within_the_carry_stays_shared(loop):
    v = nnx.Param(ones(2))

    def body(c):
        new = nnx.Param(c["a"][...] + 1)
        return {"a": new, "b": new}

    result = loop(body, {"a": v, "b": v})
    assert result["a"] is result["b"]
    assert_trees_equal(result["a"][...], ones(2) * 4)
    assert_trees_equal(v[...], ones(2))


@loops
def test_the_same_variable_written_and_returned(loop):
    v = nnx.Param(ones(2))

    def body(c):
        c["v"][...] = c["v"][...] * 3
        return {"v": c["v"], "w": nnx.Param(c["w"][...] + c["v"][...])}

    def run(loop, v):
        return values(loop(body, {"v": v, "w": nnx.Param(ones(2))}))

    result = run(loop, v)
    assert_trees_equal(result, run(in_python, nnx.Param(ones(2))))
    assert_trees_equal(v[...], ones(2) * 27)


@loops
def test_written_and_replaced_is_refused(loop):
    def body(c):
        c[...] = c[...] + 1
        return nnx.Param(c[...])

    v = nnx.Param(ones(2))
    with pytest.raises(StructureError, match=r"wrote to a Variable of its carry and returned another one in its place"):
        loop(body, v)
    assert_trees_equal(v[...], ones(2))


def test_gradient_accumulation_as_users_write_it():
    def losses(lib):
        model = lib.Linear(3, 2, rngs=lib.Rngs(0))
        model.kernel[...] = ramp(3, 2, over=6)
        xs = ramp(4, 5, 3, over=60)

        def step(grads, x):
            new = lib.grad(lambda m: (m(x) ** 2).mean())(model)
            return jax.tree.map(jnp.add, grads, new), None

        zeros = jax.tree.map(jnp.zeros_like, lib.state(model, lib.Param))

        @lib.jit
        def accumulate(zeros, xs):
            return lib.scan(step, in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 0))(zeros, xs)[0]

        total = accumulate(zeros, xs)
        return total["kernel"][...], total["bias"][...]

    expected = sum_of_gradients()
    assert_trees_close(losses(nnx), expected)


def sum_of_gradients():
    """The same with bare JAX."""
    kernel, bias, xs = ramp(3, 2, over=6), jnp.zeros(2), ramp(4, 5, 3, over=60)
    total = (jnp.zeros((3, 2)), jnp.zeros(2))
    for x in xs:
        gradient = jax.grad(lambda p, x=x: ((x @ p[0] + p[1]) ** 2).mean())((kernel, bias))
        total = jax.tree.map(jnp.add, total, gradient)
    return total


def test_errors_tell_apart_what_reads_the_same():
    def renamed(v):
        return nnx.Param(v[...], sharding_names=("x",))

    with pytest.raises(StructureError, match=r"given:    Param with metadata .*\n.*returned: Param with metadata .*x"):
        in_scan(renamed, nnx.Param(ones(2)))

    def another(m):
        return nnx.clone(m)

    m = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(StructureError, match=r"the caller's object\n.*another object"):
        in_scan(another, m)

    def twice(c):
        new = nnx.Param(ones(2))
        return (new, new)

    with pytest.raises(StructureError, match=r"at its first place|carry\[1\]|args\[0\]\[1\]"):
        in_scan(twice, (nnx.Param(ones(2)), nnx.Param(ones(2))))


# ---- what is set anew in an object


class Pair(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(ones(2))
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def new_variable(m):
    m.a = nnx.Param(m.a[...] + 1)
    return m


def new_layer(m):
    old = m.layer.kernel[...]
    m.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    m.layer.kernel[...] = old * 2
    return m


@loops
@pytest.mark.parametrize("body", [new_variable, new_layer], ids=lambda f: f.__name__)
def test_a_variable_or_layer_that_is_set_anew_goes_on(loop, body):
    m, expected = Pair(), in_python(body, Pair())
    result = loop(body, m)
    assert result is m
    assert_trees_equal(values(nnx.state(m)), values(nnx.state(expected)))


@loops
def test_a_shared_variable_that_is_set_anew_at_one_place_only_is_refused(loop):
    m = Pair()
    m.again = m.a
    with pytest.raises(StructureError, match=r"put something new at one place of its carry, .* stood at 2 places"):
        loop(new_variable, m)

    v = nnx.Param(ones(2))
    m = nnx.Dict(v=v)
    with pytest.raises(StructureError, match=r"put something new at one place|differs"):
        loop(lambda c: (nnx.Param(c[0][...] + 1), c[1]), (v, m))
    assert m.v is v


def adds(m):
    m.more = m.a[...] + 1
    return m


def removes(m):
    del m.layer
    return m


def retypes(m):
    m.a = nnx.BatchStat(m.a[...])
    return m


def counts(m):
    m.layer.out_features += 1  # configuration, which the second step would not see
    return m


@loops
@pytest.mark.parametrize("body", [adds, removes, retypes, counts], ids=lambda f: f.__name__)
def test_another_structure_is_refused(loop, body):
    m = Pair()
    with pytest.raises(StructureError, match=r"set or removed the attributes|must return its carry"):
        loop(body, m)
    assert sorted(vars(m)) == ["a", "layer"]


# ---- axis None


def draws(lib, axes):
    rngs = lib.Rngs(dropout=0)

    def step(c, rngs, x):
        return c, jax.random.uniform(rngs.dropout())

    run = lib.scan(step, in_axes=(lib.Carry, axes(lib), 0), out_axes=(lib.Carry, 0))
    _, ys = run(0.0, rngs, jnp.arange(3))
    return ys, jnp.asarray(rngs.dropout.count[...], jnp.int32)


@pytest.mark.parametrize(
    "axes",
    [
        lambda lib: None,
        lambda lib: lib.StateAxes({...: None}),
        lambda lib: lib.StateAxes({lib.RngState: None, ...: None}),
        lambda lib: lib.StateAxes({...: lib.Carry}),
    ],
)
def test_random_state_in_a_scan_is_as_in_flax(axes):
    assert_trees_equal(draws(nnx, axes), draws(flax_nnx, axes))


def test_under_none_every_step_draws_the_same_and_the_stream_goes_on_from_where_it_was():
    ys, count = draws(nnx, lambda lib: None)
    assert len(set(ys.tolist())) == 1
    assert int(count) == 0


def test_other_writes_under_none_go_from_step_to_step():
    class Norm(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    xs = ramp(3, 4, 2)
    scanned, looped = Norm(), Norm()
    nnx.scan(lambda c, m, x: (c, m.drop(m.norm(x))), in_axes=(nnx.Carry, None, 0))(0.0, scanned, xs)
    for x in xs:
        looped.norm(x)
    assert_trees_close(scanned.norm.mean[...], looped.norm.mean[...])
    assert int(scanned.drop.rngs.count[...]) == 0
