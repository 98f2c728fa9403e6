"""Update contexts: identity across JAX transforms that the user calls."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import nnx_core as nnx
from nnx_core._errors import TraceError
from nnx_core.graph._errors import ContextError
from nnx_core.graph.context import (
    current_update_context,
    merge_context,
    split_context,
    update_context,
)
from nnx_core.graph.functional import UpdateDef
from tests.strategies import (
    COMPILED_LAW,
    CORE,
    LAW,
    Affine,
    Node,
    apply_all,
    effects,
    graphs,
    portrait,
    reachable,
    recipes,
)

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


def through_jit(f, *, transform=jax.jit):
    """f on objects, by the four steps."""

    @transform
    def inside(graphdef, state):
        with merge_context("law", inner=True) as ctx:
            node = ctx.merge(graphdef, state)
        f(node)
        with split_context("law") as ctx:
            return ctx.split(node)

    @update_context("law")
    def outside(node):
        with split_context("law") as ctx:
            graphdef, state = ctx.split(node)
        graphdef, state = inside(graphdef, state)
        with merge_context("law", inner=False) as ctx:
            return ctx.merge(graphdef, state)

    return outside


@pytest.mark.slow
@COMPILED_LAW
@given(recipes(containers=("tuple",)), effects())
def test_the_four_steps_equal_the_function(drawn, todo):
    mine, twin = drawn.build(CORE), drawn.build(CORE)
    origin, twins = reachable(mine), reachable(twin)
    apply_all(todo, twin)
    assert through_jit(lambda node: apply_all(todo, node))(mine) is mine
    assert portrait(mine, origin=origin) == portrait(twin, origin=twins)


def story(n, split_context, merge_context, update_context):
    """What flax.nnx's documentation promises, as a list of facts."""

    class Foo(n.Module):
        pass

    m1 = Foo()
    m1.a, m1.b, m1.keep = n.Param(jnp.ones(2)), Foo(), n.Param(jnp.zeros(1))
    a, b = m1.a, m1.b

    @jax.jit
    def f(graphdef, state):
        with merge_context("e", inner=True) as ctx:
            m2 = ctx.merge(graphdef, state)
        m2.a[...] *= 2
        m2.c = m2.b
        del m2.b
        m2.new, m2.ref, m2.flag = n.Param(jnp.ones(3)), m2, 1
        with split_context("e") as ctx:
            return ctx.split([m2, m2.a], n.BatchStat, ...)

    with update_context("e"):
        with split_context("e") as ctx:
            graphdef, state = ctx.split(m1)
        out = f(graphdef, state)
        with merge_context("e", inner=False) as ctx:
            m3 = ctx.merge(*out)
    facts = [m3[0] is m1, m3[1] is a, m1.a is a, m1.c is b, hasattr(m1, "b"), m1.ref is m1, m1.flag, len(out)]
    return facts, m1.a[...].tolist(), m1.new.shape, list(m1.keep[...].tolist())


def test_documented_story_as_flax_nnx():
    ours = story(nnx, split_context, merge_context, update_context)
    assert ours == story(flax_nnx, flax_nnx.split_context, flax_nnx.merge_context, flax_nnx.update_context)
    assert ours[0] == [True, True, True, True, False, True, 1, 3]


def test_a_compiled_function_is_used_again():
    traced = []

    def grow(node):
        traced.append(1)
        node.calls[...] += 1

    step = through_jit(grow)
    layer = Affine()
    kernel = layer.kernel
    for _ in range(3):
        assert step(layer) is layer
    assert int(layer.calls[...]) == 3
    assert layer.kernel is kernel
    assert len(traced) == 1


def test_a_context_around_two_cycles():
    layer = Affine()

    def run(f, node):
        with split_context("twice") as ctx:
            pair = ctx.split(node)

        @jax.jit
        def inside(graphdef, state):
            with merge_context("twice", inner=True) as ctx:
                m = ctx.merge(graphdef, state)
            f(m)
            with split_context("twice") as ctx:
                return ctx.split(m)

        pair = inside(*pair)
        with merge_context("twice", inner=False) as ctx:
            return ctx.merge(*pair)

    with update_context("twice"):
        assert run(lambda m: setattr(m, "x", 1), layer) is layer
        assert run(lambda m: delattr(m, "x"), layer) is layer
    assert not hasattr(layer, "x")


@LAW
@given(graphs())
def test_contexts_without_a_tag_keep_sharing(graph):
    with split_context() as ctx:
        pairs = [ctx.split(graph), ctx.split((graph, graph))]
    with merge_context() as ctx:
        a, (b, c) = [ctx.merge(*pair) for pair in pairs]
    assert a is b is c is not graph
    assert portrait(a) == portrait(graph)


def test_flatten_in_a_context():
    with split_context() as ctx:
        structure, kernel, rest = ctx.flatten(Affine(), nnx.Param, ...)
        other, leaves = ctx.flatten(Affine(), with_paths=False)
        one = ctx.flatten(Affine(), ...)
        with pytest.raises(ContextError, match="Filters need paths"):
            ctx.flatten(Affine(), nnx.Param, with_paths=False)
    assert kernel.paths == (("kernel",),)
    assert len(one) == 2
    with merge_context() as ctx:
        a, b = ctx.unflatten(structure, kernel, rest), ctx.unflatten(other, leaves)
    assert portrait(a) == portrait(b) == portrait(Affine())


def test_current_update_context():
    with update_context("a") as outer, update_context("b") as other, update_context("a") as inner:
        assert current_update_context("a") is inner is not outer
        assert current_update_context("b") is other
    with pytest.raises(ContextError, match=r"No update context found for tag 'a'.*with nnx.update_context\('a'\)"):
        current_update_context("a")


@pytest.mark.parametrize("open_context", [split_context, lambda tag: merge_context(tag, inner=True)])
def test_no_update_context_as_flax_nnx(open_context):
    with pytest.raises(ValueError, match="No update context found for tag 'zz'"), open_context("zz"):
        pass
    with pytest.raises(ValueError, match="No update context found for tag 'zz'"), flax_nnx.split_context("zz"):
        pass


def test_merge_context_needs_to_know_where_it_is():
    with update_context("a"), pytest.raises(ContextError, match="needs inner=True"), merge_context("a"):
        pass


def test_a_context_is_over_when_it_is_over():
    with split_context() as ctx:
        pair = ctx.split(Node())
    with pytest.raises(ContextError, match="This SplitContext was used after its `with` had ended"):
        ctx.split(Node())
    with merge_context() as ctx:
        ctx.merge(*pair)
    with pytest.raises(ContextError, match="This MergeContext was used after its `with` had ended"):
        ctx.merge(*pair)


def test_contexts_keep_nothing_alive():
    with update_context("a") as update:
        with split_context("a") as ctx:
            ctx.split(Node())
        assert update.outer is not None
    assert update.outer is update.inner is None


def test_merging_outside_under_another_trace():
    node = Node()
    node.v = nnx.Param(jnp.ones(2))

    def leak(x):
        with update_context("t"):
            with split_context("t") as ctx:
                pair = ctx.split(node)
            with merge_context("t", inner=True) as ctx:
                m = ctx.merge(*pair)
            m.fresh = x
            with split_context("t") as ctx:
                pair = ctx.split(m)
            with merge_context("t", inner=False) as ctx:
                ctx.merge(*pair)
        return x

    with pytest.raises(TraceError, match="attribute 'fresh' of Node"):
        jax.jit(leak)(1.0)
    assert not hasattr(node, "fresh")


def test_marks_come_back():
    node = Node()

    def mark(m):
        m.count = nnx.data(jnp.zeros(()))

    through_jit(mark)(node)
    assert node._nnx_marks == {"count": "data"}


def test_update_defs_are_values():
    root = nnx.graphdef(Affine()).root
    one, same, other = UpdateDef(root, ((0, 0),)), UpdateDef(root, ((0, 0),)), UpdateDef(root, ((0, 1),))
    assert one == same == pickle.loads(pickle.dumps(one)) == copy.copy(one)
    assert hash(one) == hash(same)
    assert one != other
    assert one != nnx.graphdef(Affine())
