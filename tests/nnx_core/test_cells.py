"""Plain arrays on objects are cells as Variables are: carried, donated, shared, watched and checked by the same rules.

The oracle is the same program without any transform (law 2), or a Python loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import TraceError
from tests.support.arrays import ones, ramp
from tests.tolerance import assert_trees_equal


class Table(nnx.Module):
    """Every place where an array may stand, with a Variable of equal shape beside each."""

    def __init__(self):
        self.a_array = ones(3)
        self.b_weight = nnx.Param(ones(3) * 2)
        self.c_array = ones(3) * 3
        self.items = nnx.data([ones(3) * 4, (ones(3) * 5, {"x": ones(3) * 6})])
        self.named = nnx.data({"k": ones(3) * 7, "still": "a string"})
        self.pair = nnx.data((ones(3) * 9, ones(2)))
        self.z_weight = nnx.Param(ones(3) * 8)
        self.count = nnx.data(0)


def portrait(m):
    """All that is in a Table."""
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(m)))


def by_attribute(m):
    m.a_array = m.a_array + 1


def by_item(m):
    m.items[0] = m.items[0] * 2
    m.named["k"] = m.named["k"] - 1


def by_new_containers(m):
    m.items = [m.items[0] + 1, (m.items[1][0] * 3, {"x": m.items[1][1]["x"]})]
    m.named = {"k": m.named["k"] + 10, "still": "a string"}


def by_new_tuple(m):
    m.pair = (m.pair[0] + 1, m.pair[1])


def by_update(m):
    nnx.update(m, {"c_array": m.c_array * 5})


def by_number(m):
    m.count = m.count + 1


def nothing(m):
    pass


def all_of_it(m):
    for write in (by_attribute, by_item, by_new_containers, by_new_tuple, by_update, by_number):
        write(m)
    m.b_weight[...] = m.b_weight[...] + m.a_array


WRITES = [nothing, by_attribute, by_item, by_new_containers, by_new_tuple, by_update, by_number, all_of_it]
writes = pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)


def repeated(write, times):
    m = Table()
    for _ in range(times):
        write(m)
    return m


def calling(wrap):
    """`wrap(write)` made once, and called again and again."""

    def run(write, times):
        m, f = Table(), wrap(write)
        for _ in range(times):
            f(m)
        return m

    return run


def in_grad(write, times):
    m = Table()

    def loss(m):
        write(m)
        return m.b_weight[...].sum()

    for _ in range(times):
        nnx.grad(loss)(m)
    return m


def in_cond(write, times):
    m = Table()
    for _ in range(times):
        nnx.cond(True, write, nothing, m)
        nnx.cond(False, write, nothing, m)
    return m


def in_switch(write, times):
    m = Table()
    for _ in range(times):
        nnx.switch(1, (by_attribute, write, by_number), m)
    return m


def in_scan_carry(write, times):
    m = Table()

    def step(m, x):
        write(m)
        return m, x

    nnx.scan(step)(m, jnp.arange(times))
    return m


def in_scan_none(write, times):
    m = Table()

    def step(c, m, x):
        write(m)
        return c, x

    nnx.scan(step, in_axes=(nnx.Carry, None, 0))(0.0, m, jnp.arange(times))
    return m


def in_fori_loop(write, times):
    m = Table()

    def body(_, m):
        write(m)
        return m

    nnx.fori_loop(0, times, body, m)
    return m


def in_while_loop(write, times):
    m = Table()

    def body(carry):
        i, m = carry
        write(m)
        return i + 1, m

    nnx.while_loop(lambda carry: carry[0] < times, body, (jnp.int32(0), m))
    return m


def in_jit_of_scan(write, times):
    m = Table()

    def step(m, x):
        write(m)
        return m, x

    nnx.jit(lambda m: nnx.scan(step)(m, jnp.arange(times)))(m)
    return m


TRANSFORMS = {
    "jit": calling(nnx.jit),
    "donating jit": calling(nnx.jit(donate_argnums=0)),
    "remat": calling(nnx.remat),
    "grad": in_grad,
    "cond": in_cond,
    "switch": in_switch,
    "scan, Carry": in_scan_carry,
    "scan, None": in_scan_none,
    "fori_loop": in_fori_loop,
    "while_loop": in_while_loop,
    "jit of scan": in_jit_of_scan,
}


@writes
@pytest.mark.parametrize("run", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_write_under_a_transform_is_the_write(run, write):
    assert_trees_equal(portrait(run(write, 2)), portrait(repeated(write, 2)))


def test_under_vmap_an_array_has_an_axis_as_a_variable_has():
    make = nnx.vmap(lambda x: Pair(x))
    pairs = make(ramp(4, 3))

    @nnx.vmap
    def f(pair, x):
        pair.array = pair.array + x
        pair.weight[...] = pair.weight[...] + x

    f(pairs, ramp(4))
    expected = ramp(4, 3) + ramp(4)[:, None]
    assert_trees_equal((pairs.array, pairs.weight[...]), (expected, expected))


class Pair(nnx.Module):
    def __init__(self, x):
        self.weight = nnx.Param(x)
        self.array = x


def test_an_array_in_scanned_layers_is_a_slice_a_step():
    pairs = nnx.vmap(Pair)(ramp(4, 3))

    def step(c, pair):
        pair.array = pair.array + c
        return c + 1, pair.array

    _, ys = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(0.0, pairs)
    expected = ramp(4, 3) + ramp(4)[:, None]
    assert_trees_equal((ys, pairs.array), (expected, expected))


def test_what_one_branch_writes_another_leaves():
    def first(m):
        m.a_array = m.a_array * 10

    def second(m):
        m.items[0] = m.items[0] * 10
        m.b_weight[...] = m.b_weight[...] * 10

    for index, write in enumerate((first, second)):
        m, expected = Table(), Table()
        write(expected)
        nnx.switch(index, (first, second), m)
        assert_trees_equal(portrait(m), portrait(expected))


def test_update_of_an_outer_array_is_refused_as_that_of_a_variable():
    m = Table()
    with pytest.raises(TraceError, match=r"attribute 'a_array' of Table"):
        nnx.jit(lambda x: nnx.update(m, {"a_array": x}))(ones(3))
    assert_trees_equal(m.a_array, ones(3))


def test_a_failed_call_writes_no_array():
    m = Table()

    def f(m):
        all_of_it(m)
        raise RuntimeError("after the writes")

    for run in (nnx.jit(f), nnx.remat(f), lambda m: nnx.cond(True, f, nothing, m)):
        with pytest.raises(RuntimeError, match="after the writes"):
            run(m)
    assert_trees_equal(portrait(m), portrait(Table()))


def test_lists_keep_their_identity_or_lose_it_as_without_a_transform():
    for write, is_kept in ((by_item, True), (by_new_containers, False)):
        m = Table()
        items = m.items
        nnx.jit(write)(m)
        assert (m.items is items) == is_kept
        if not is_kept:
            assert_trees_equal(items[0], ones(3) * 4)  # who holds the old list sees nothing of it


def test_a_steady_call_does_not_walk_a_model_with_arrays(monkeypatch):
    def write(m):
        by_attribute(m)
        by_item(m)
        m.b_weight[...] = m.b_weight[...] + m.a_array

    m, f, g = Table(), nnx.jit(write), nnx.jit(by_attribute)
    f(m)
    f(m)

    def walked(*_):
        raise AssertionError("walked")

    monkeypatch.setattr("nnx_core.graph.pack.Packer.pack", walked)
    f(m)
    assert_trees_equal(portrait_of_arrays(m), portrait_of_arrays(repeated(write, 3)))
    with pytest.raises(AssertionError, match="walked"):
        g(m)  # which has no plan yet


def portrait_of_arrays(m):
    return m.a_array, m.items[0], m.named["k"], m.b_weight[...]


def test_plans_keep_no_array_alive():
    import gc
    import weakref

    m = Table()
    f = nnx.jit(by_item)
    f(m)
    f(m)
    old = weakref.ref(m.items[0])
    gc.disable()
    try:
        f(m)
        f(m)
        assert old() is None
    finally:
        gc.enable()


def test_a_state_on_an_object_is_a_container_of_cells():
    class Holder(nnx.Module):
        def __init__(self):
            self.moments = nnx.State({"m": ones(2), "n": {"v": nnx.Param(ones(2))}})

    def write(h):
        h.moments["m"] = h.moments["m"] + 1
        h.moments["n"]["v"][...] = h.moments["n"]["v"][...] * 2

    h = Holder()
    nnx.fori_loop(0, 3, lambda _, h: (write(h), h)[1], h)
    assert_trees_equal((h.moments["m"], h.moments["n"]["v"][...]), (ones(2) * 4, ones(2) * 8))
    raw = h.moments.raw_mapping
    nnx.jit(write)(h)
    raw["m"] = ones(2) * 100  # past the State's own methods
    nnx.jit(write)(h)
    assert_trees_equal(h.moments["m"], ones(2) * 101)


class Moments(NamedTuple):
    count: jax.Array
    moments: object


# How an object may hold `level`, a mapping that is written to through another name.
HELD = {
    "itself": lambda level: level,
    "in a list": lambda level: [level],
    "in a dict": lambda level: {"k": level},
    "in a tuple": lambda level: (ones(1), level),
    "in tuples in a namedtuple": lambda level: Moments(ones(1), ((level,), ())),
    "in a list in a tuple": lambda level: ([level],),
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
@pytest.mark.parametrize("kind", ["dict", "State", "level of a State"])
def test_what_is_added_to_a_held_mapping_from_outside_is_seen(kind, hold):
    contents = {"a": ones(2)}
    outer = nnx.State({"level": contents})
    level = {"dict": contents, "State": nnx.State(contents), "level of a State": outer["level"]}[kind]
    other_name = outer["level"] if kind == "level of a State" else level

    class Holder(nnx.Module):
        def __init__(self):
            self.held = nnx.data(hold(level))

    def total(h):
        return sum(x.sum() for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(h))))

    h, f = Holder(), nnx.jit(total)
    for key, size in (("b", 3), ("c", 4)):
        assert_trees_equal(f(h), total(h))
        other_name[key] = ones(size)
    assert_trees_equal(f(h), total(h))
    del other_name["a"]
    assert_trees_equal(f(h), total(h))
