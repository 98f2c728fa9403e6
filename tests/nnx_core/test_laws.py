"""Laws 1 to 5 of DESIGN.md over random object graphs, with sharing, cycles, containers and random effects."""

import collections
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core as nnx
from tests.strategies import (
    COMPILED_LAW,
    CORE,
    LAW,
    Affine,
    Tied,
    apply_all,
    assert_no_tracer,
    effects,
    fingerprint,
    graphs,
    members,
    objects_of,
    portrait,
    reachable,
    recipes,
    variables_of,
)
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3)


# ---- law 1: merge inverts split ------------------------------------------------------------------------------------

FILTERS = {
    "none": (),
    "rest": (...,),
    "params first": (nnx.Param, ...),
    "three": (nnx.Param, nnx.BatchStat, ...),
    "by path": (nnx.PathContains("a"), ...),
    "nothing first": (None, ...),
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@given(graph=graphs())
@LAW
def test_law1_merge_inverts_split(graph, filters):
    before, old = portrait(graph), reachable(graph)
    twin = nnx.merge(*nnx.split(graph, *filters))
    assert portrait(twin) == before
    assert portrait(graph) == before
    assert not {id(x) for x in reachable(twin)} & {id(x) for x in old}


@given(graphs())
@LAW
def test_law1_clone_is_merge_of_split(graph):
    assert portrait(nnx.clone(graph)) == portrait(nnx.merge(*nnx.split(graph))) == portrait(graph)


@given(graphs())
@LAW
def test_law1_order_is_kept(graph):
    twin = nnx.merge(*nnx.split(graph))
    paths = [path for path, _ in nnx.iter_graph(graph)]
    assert [path for path, _ in nnx.iter_graph(twin)] == paths
    for a, b in zip(objects_of(graph), objects_of(twin), strict=True):
        if isinstance(a, nnx.Dict):
            assert list(a) == list(b)


@given(graphs(), graphs())
@LAW
def test_law1_graphdefs_are_equal_iff_skeletons_are(a, b):
    skeletons = [portrait(graph, values=False, shapes=False) for graph in (a, b)]
    same = skeletons[0] == skeletons[1]
    assert nnx.graphdef(a) == nnx.graphdef(nnx.clone(a))
    assert (nnx.graphdef(a) == nnx.graphdef(b)) is same
    assert not same or hash(nnx.graphdef(a)) == hash(nnx.graphdef(b))


@given(recipes())
@LAW
def test_law1_graphdefs_leave_out_shapes_dtypes_and_numbers(drawn):
    others = [dataclasses.replace(v, shape=(5, *v.shape), dtype="float16", start=v.start + 1) for v in drawn.cells]
    a, b = drawn.build(CORE), dataclasses.replace(drawn, cells=tuple(others)).build(CORE)
    assert portrait(a, values=False, shapes=False) == portrait(b, values=False, shapes=False)
    assert nnx.graphdef(a) == nnx.graphdef(b)
    assert hash(nnx.graphdef(a)) == hash(nnx.graphdef(b))


@given(graphs())
@LAW
def test_law1_update_with_the_own_state_is_nothing(graph):
    before, old = portrait(graph), reachable(graph)
    nnx.update(graph, nnx.state(graph))
    assert portrait(graph) == before
    assert [id(x) for x in reachable(graph)] == [id(x) for x in old]


@given(recipes())
@LAW
def test_law1_update_carries_a_state_over(drawn):
    source, target = drawn.build(CORE), drawn.build(CORE)
    for v in variables_of(source):
        v[...] = v[...] * 2
    nnx.update(target, nnx.state(source))
    assert portrait(target) == portrait(source)
    assert not {id(x) for x in variables_of(target)} & {id(x) for x in variables_of(source)}


@given(graphs())
@LAW
def test_law1_a_state_flattens_and_nests(graph):
    state = nnx.state(graph)
    flat = nnx.to_flat_state(state)
    again = nnx.to_flat_state(nnx.from_flat_state(flat))
    assert again.paths == flat.paths
    assert all(a is b for a, b in zip(again.leaves, flat.leaves, strict=True))
    assert {id(v) for v in flat.leaves if isinstance(v, nnx.Variable)} == {id(v) for v in variables_of(graph)}


# ---- law 2: a transform of anything is the thing itself ------------------------------------------------------------


def jitted(f, graph):
    return nnx.jit(f)(graph)


def rematted(f, graph):
    return nnx.remat(f)(graph)


def jitted_remat(f, graph):
    return nnx.jit(nnx.remat(f))(graph)


def by_grad(f, graph):
    def loss(graph):
        return jnp.float32(0.0), f(graph)

    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Nothing()), has_aux=True)(graph)[1]


TRANSFORMS = {"jit": jitted, "remat": rematted, "jit of remat": jitted_remat, "grad by nothing": by_grad}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@given(drawn=recipes(), todo=effects())
@COMPILED_LAW
def test_law2_a_transform_is_the_thing_itself(drawn, todo, transform):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    old, old_twin = reachable(graph), reachable(twin)

    def f(graph):
        apply_all(todo, graph)

    transform(f, graph)
    f(twin)
    # With `origin`, this is law 3 as well: the same old objects are at the same places.
    assert portrait(graph, origin=old) == portrait(twin, origin=old_twin)
    assert_no_tracer(graph)


def give_axis(graph):
    """Every array gets a leading axis of one."""
    for v in variables_of(graph):
        v.set_value(v[...][None])
    for x in objects_of(graph):
        for name, value in members(x):
            if isinstance(value, jax.Array | np.ndarray):
                x.__setitem__(name, value[None]) if isinstance(x, nnx.List | nnx.Dict) else setattr(
                    x, name, value[None]
                )


@given(drawn=recipes(containers=()), todo=effects())
@COMPILED_LAW
def test_law2_vmap_over_an_axis_of_one(drawn, todo):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    give_axis(graph)
    old, old_twin = reachable(graph), reachable(twin)
    nnx.vmap(lambda g: apply_all(todo, g), axis_size=1, out_axes=None)(graph)
    apply_all(todo, twin)
    give_axis(twin)
    assert portrait(graph, origin=old) == portrait(twin, origin=old_twin)
    assert_no_tracer(graph)


@given(drawn=recipes(containers=()), todo=effects(names=("write", "retag", "note")))
@COMPILED_LAW
def test_law2_scan_of_one_step(drawn, todo):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    give_axis(graph)
    old, old_twin = reachable(graph), reachable(twin)
    nnx.scan(lambda g: apply_all(todo, g), in_axes=0, out_axes=None, length=1)(graph)
    apply_all(todo, twin)
    give_axis(twin)
    assert portrait(graph, origin=old) == portrait(twin, origin=old_twin)


@given(drawn=recipes(), todo=effects(), i=st.integers(0, 7))
@COMPILED_LAW
def test_law2_results_are_those_of_the_thing_itself(drawn, todo, i):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    old, old_twin = reachable(graph), reachable(twin)

    def f(graph):
        apply_all(todo, graph)
        found = reachable(graph)
        return {"one": found[i % len(found)], "all": [graph, nnx.Param(jnp.ones(1)), jnp.arange(2)]}

    got, want = nnx.jit(f)(graph), f(twin)
    assert portrait([graph, got], origin=old) == portrait([twin, want], origin=old_twin)


# ---- law 3: same object in, same object out ------------------------------------------------------------------------


@given(graphs())
@COMPILED_LAW
def test_law3_no_op_keeps_every_object(graph):
    before, old = portrait(graph), reachable(graph)
    out = nnx.jit(lambda g: g)(graph)
    assert out is graph
    assert portrait(graph) == before
    assert [id(x) for x in reachable(graph)] == [id(x) for x in old]


@given(graphs(), st.integers(0, 7), st.integers(0, 7))
@COMPILED_LAW
def test_law3_parts_of_one_graph_as_several_arguments(graph, i, j):
    found = reachable(graph)
    a, b = found[i % len(found)], found[j % len(found)]

    def f(a, tree, *, b):
        inner = reachable([a, tree["g"], b])
        assert len(inner) == len(reachable(graph))
        return b, a, tree["g"]

    assert all(x is y for x, y in zip(nnx.jit(f)(a, {"g": graph}, b=b), (b, a, graph), strict=True))


# ---- law 4: only what was written leaves the trace -----------------------------------------------------------------


@given(drawn=recipes(), todo=effects())
@COMPILED_LAW
def test_law4_what_was_not_written_keeps_its_array(drawn, todo):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    variables = variables_of(graph)
    arrays = [v.get_raw_value() for v in variables]
    twins = variables_of(twin)
    before = [v.get_raw_value() for v in twins]
    nnx.jit(lambda g: apply_all(todo, g))(graph)
    apply_all(todo, twin)
    for v, array, w, old in zip(variables, arrays, twins, before, strict=True):
        if w.get_raw_value() is old:
            assert v.get_raw_value() is array
        else:
            assert_trees_equal(v.get_raw_value(), w.get_raw_value())


@pytest.mark.slow
@given(graphs())
@COMPILED_LAW
def test_law4_reading_everything_changes_nothing(graph):
    arrays = [v.get_raw_value() for v in variables_of(graph)]
    plain = [(x, name, value) for x in objects_of(graph) for name, value in members(x) if isinstance(value, jax.Array)]

    def read(g):
        return sum(v.sum().astype(jnp.float32) for v in variables_of(g))

    for _ in range(2):
        nnx.jit(read)(graph)
        nnx.remat(read)(graph)
    assert all(v.get_raw_value() is a for v, a in zip(variables_of(graph), arrays, strict=True))
    assert all(dict(members(x))[name] is value for x, name, value in plain)


# ---- law 5: no stale plan, no tracer left --------------------------------------------------------------------------


def summary(graph):
    """What a stale plan would get wrong: all numbers, and the structure as a constant of the trace."""
    numbers = [v[...].astype(jnp.float32).sum() for v in variables_of(graph)]
    return jnp.int32(fingerprint(graph)), sum(numbers, jnp.float32(0.0))


def eager(graph):
    return jax.tree.map(jnp.asarray, summary(graph))


@given(drawn=recipes(), rounds=st.lists(effects(max_size=2), min_size=1, max_size=4))
@COMPILED_LAW
def test_law5_every_call_sees_the_graph_as_it_is(drawn, rounds):
    graph = drawn.build(CORE)
    f = nnx.jit(summary)
    for todo in rounds:
        for _ in range(2):
            assert_trees_equal(f(graph)[0], eager(graph)[0])
        apply_all(todo, graph)
    assert_trees_equal(f(graph)[0], eager(graph)[0])


@given(drawn=recipes(), rounds=st.lists(effects(max_size=2), min_size=1, max_size=3))
@COMPILED_LAW
def test_law5_split_and_state_see_the_graph_as_it_is(drawn, rounds):
    graph = drawn.build(CORE)
    for todo in rounds:
        assert portrait(nnx.merge(*nnx.split(graph))) == portrait(graph)
        apply_all(todo, graph)
        assert portrait(nnx.merge(*nnx.split(graph))) == portrait(graph)
        assert {id(v) for _, v in nnx.to_flat_state(nnx.state(graph, nnx.Variable))} == {
            id(v) for v in variables_of(graph)
        }


@given(drawn=recipes(), rounds=st.lists(effects(max_size=2), min_size=1, max_size=3))
@COMPILED_LAW
def test_law5_effects_of_repeated_calls_equal_repeated_effects(drawn, rounds):
    graph, twin = drawn.build(CORE), drawn.build(CORE)
    old, old_twin = reachable(graph), reachable(twin)
    steps = [nnx.jit(lambda g, todo=todo: apply_all(todo, g)) for todo in rounds]
    for _ in range(2):
        for step, todo in zip(steps, rounds, strict=True):
            step(graph)
            apply_all(todo, twin)
            assert portrait(graph, origin=old) == portrait(twin, origin=old_twin)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@given(drawn=recipes(), todo=effects())
@COMPILED_LAW
def test_law5_a_failure_leaves_everything_as_it_was(drawn, todo, transform):
    graph = drawn.build(CORE)
    before, old = portrait(graph), reachable(graph)

    def broken(graph):
        apply_all(todo, graph)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        transform(broken, graph)
    assert portrait(graph) == before
    assert [id(x) for x in reachable(graph)] == [id(x) for x in old]
    assert_no_tracer(graph)
    nnx.jit(lambda g: None)(graph)
    assert portrait(graph) == before


# ---- law 5 by example: every way to change a module between calls, failures, threads -------------------------------


def total(m):
    """Everything a plan could get wrong, in one number."""
    scale = m.scale if m.tagged.tag == "a" else -m.scale
    variables = [*m.items, m.tagged, m.child.kernel, *m.plain, *m.ordered.values(), *m.nested["a"]]
    variables += [v for _, v in nnx.to_flat_state(m.state)]
    return scale * sum(v.sum() for v in variables)


class Changing(nnx.Module):
    def __init__(self):
        self.scale = 2
        self.items = nnx.List([nnx.Param(jnp.ones(2)), nnx.Param(jnp.full(2, 2.0))])
        self.tagged = nnx.Cache(jnp.ones(3), tag="a")
        self.child = Affine(2, 2)
        self.plain = [nnx.Param(jnp.ones(1))]
        self.ordered = collections.OrderedDict(a=nnx.Param(jnp.ones(1)))
        self.nested = {"a": [nnx.Param(jnp.ones(1))]}
        self.state = nnx.State({"a": {"b": nnx.Param(jnp.ones(1))}})


BETWEEN = {
    "static attribute": lambda m: setattr(m, "scale", 5),
    "list item": lambda m: m.items.__setitem__(0, nnx.Param(jnp.full(3, 7.0))),
    "list append": lambda m: m.items.append(nnx.Param(jnp.full(2, 9.0))),
    "list pop": lambda m: m.items.pop(),
    "metadata": lambda m: m.tagged.set_metadata(tag="b"),
    "new variable": lambda m: setattr(m, "tagged", nnx.Cache(jnp.full(3, 4.0), tag="a")),
    "new child": lambda m: setattr(m, "child", Affine(2, 2, seed=5)),
    "grandchild": lambda m: setattr(m.child, "kernel", nnx.Param(jnp.ones((2, 2)))),
    "shared": lambda m: m.items.__setitem__(1, m.items[0]),
    "value": lambda m: m.items[0].set_value(jnp.full(2, 3.0)),
    "copy_from": lambda m: m.tagged.copy_from(nnx.Cache(jnp.full(3, 6.0), tag="c")),
    "update": lambda m: nnx.update(m, {"child": {"kernel": jnp.zeros((2, 2))}}),
    "pop": lambda m: nnx.pop(m.items, lambda path, x: path == (1,)),
    "plain list append": lambda m: m.plain.append(nnx.Param(jnp.full(1, 8.0))),
    "ordered dict": lambda m: m.ordered.__setitem__("b", nnx.Param(jnp.full(1, 8.0))),
    "list in a dict": lambda m: m.nested["a"].append(nnx.Param(jnp.full(1, 8.0))),
    "state": lambda m: m.state.__setitem__("c", nnx.Param(jnp.full(1, 8.0))),
    "nested state": lambda m: m.state["a"].__setitem__("c", nnx.Param(jnp.full(1, 8.0))),
    "plain list item": lambda m: m.plain.__setitem__(0, nnx.Param(jnp.full(1, 8.0))),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_law5_the_next_call_sees_a_change_made_between(change):
    m = Changing()
    f = nnx.jit(total)
    for _ in range(2):  # the second call may run from a plan
        assert_trees_close(f(m), total(m))
    change(m)
    for _ in range(2):
        assert_trees_close(f(m), total(m))


def test_law5_a_change_inside_another_call_is_seen():
    m = Changing()
    f = nnx.jit(total)
    f(m)

    @nnx.jit
    def grow(m):
        m.items.append(nnx.Param(jnp.full(2, 9.0)))

    for _ in range(3):
        grow(m)
        assert_trees_close(f(m), total(m))


def test_law5_changes_inside_the_call_itself():
    @nnx.jit
    def f(m):
        m.items.append(nnx.Param(m.items[-1] * 2))
        return len(m.items)

    m = Changing()
    assert [int(f(m)) for _ in range(3)] == [3, 4, 5]
    assert_trees_equal(m.items[-1].get_value(), jnp.full(2, 16.0))


def test_law5_an_exception_leaves_the_arguments_as_they_were():
    m = Tied()
    before, members = portrait(m), reachable(m)

    @nnx.jit
    def broken(m, x):
        m(x)
        m.extra = nnx.Param(x)
        del m.layers
        m.encode.kernel.set_metadata(seen=1)
        raise RuntimeError("on purpose")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            broken(m, X)
        assert portrait(m) == before
        assert [id(x) for x in reachable(m)] == [id(x) for x in members]
        assert_no_tracer(m)
    nnx.jit(lambda m, x: m(x))(m, X)
    assert int(m.encode.calls[...]) == 2


def test_law5_an_exception_after_a_good_call():
    m = Affine()
    f = nnx.jit(lambda m, x: m(x) @ x)
    f(m, jnp.ones((3, 3)))
    with pytest.raises(TypeError, match=r"dot_general|contract|shape"):
        f(m, jnp.ones((2, 3)))
    f(m, jnp.ones((3, 3)))
    assert int(m.calls[...]) == 2
    assert_no_tracer(m)


def test_law5_another_thread_sees_no_tracer_during_a_trace():
    m = Affine()
    inside, go_on = threading.Event(), threading.Event()

    @nnx.jit
    def slow(m, x):
        y = m(x)
        inside.set()
        assert go_on.wait(30)
        return y

    thread = threading.Thread(target=slow, args=(m, X))
    thread.start()
    try:
        assert inside.wait(30)
        assert_no_tracer(m)
        assert int(m.calls[...]) == 0
        assert_trees_close(nnx.jit(lambda m, x: x @ m.kernel[...])(m, X), X @ m.kernel[...])
    finally:
        go_on.set()
        thread.join()
    assert int(m.calls[...]) == 1


def test_law5_threads_that_trace_the_same_function():
    @nnx.jit
    def f(m, x):
        return m(x)

    modules = [Affine(seed=i) for i in range(4)]
    results: dict[int, jax.Array] = {}
    start = threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(5):
            results[i] = f(modules[i], X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, m in enumerate(modules):
        assert_trees_close(results[i], X @ m.kernel[...])
        assert int(m.calls[...]) == 5
        assert_no_tracer(m)


# ---- the judge -----------------------------------------------------------------------------------------------------


@given(graphs())
@LAW
def test_the_portrait_itself_sees_a_change(graph):
    """The judge is judged: a write, a new member and a lost alias all show."""
    before = portrait(graph)
    CORE.attach(graph, "zz", nnx.Param(jnp.ones(1)))
    assert portrait(graph) != before
