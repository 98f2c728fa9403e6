"""prefix in its two forms, and objects where treatments are expected: as flax.nnx, or an error that says what to do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import nnx_core as nnx
from nnx_core._errors import AliasError, FilterError, SharedReferenceError, SpecError
from tests.strategies import Tied
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")
X = ramp(2, 2)


def model_class(n):
    class Model(n.Module):
        def __init__(self, rngs):
            self.linear = n.Linear(2, 3, rngs=rngs)
            self.norm = n.BatchNorm(3, rngs=rngs)
            self.table = 2 * jnp.ones(3)
            self.gains = n.List([n.Param(jnp.ones(3))])
            self.label = "model"

        def __call__(self, x):
            return self.norm(self.linear(x) * self.table) * self.gains[0]

    return Model


def stack_of(n, size=4):
    cls = model_class(n)
    return n.vmap(lambda key: cls(n.Rngs(key)))(jax.random.split(jax.random.key(0), size))


MAPS = {
    "all": lambda n: {...: 0},
    "by type": lambda n: {n.Param: 0, ...: 0},
    "a function": lambda n: lambda path, leaf: 0,
}


# ---- the tree of treatments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MAPS.values(), ids=MAPS)
def test_a_tree_of_axes_under_both_vmaps_as_flax_nnx(axes):
    def story(n):
        stack = stack_of(n)
        tree = n.prefix(stack, axes(n), graph=False)
        assert type(tree) is type(stack)
        assert (tree.label, tree.linear.kernel, tree.table, tree.gains[0]) == ("model", 0, 0, 0)
        assert jax.tree.leaves(tree) == [0] * 8
        plain = jax.vmap(lambda m, x: m.linear(x) + m.table, in_axes=(tree, None))(stack, X)
        mapped = n.vmap(lambda m, x: m(x), in_axes=(tree, None), graph=False)(stack, X)
        return plain, mapped, stack.norm.mean[...]

    assert_trees_close(story(nnx), story(flax_nnx))


def test_a_tree_with_none_and_axes_as_flax_nnx():
    def story(n):
        mixed = model_class(n)(n.Rngs(0))
        mixed.linear = stack_of(n).linear
        tree = n.prefix(mixed, {n.PathContains("linear"): 0, ...: None}, graph=False)
        assert tree.norm.mean is None
        plain = jax.vmap(lambda m, x: m.linear(x) + m.table, in_axes=(tree, None))(mixed, X)
        outward = jax.vmap(lambda m: m, in_axes=(tree,), out_axes=tree)(mixed)
        mapped = n.vmap(lambda m, x: m.linear(x).sum(), in_axes=(tree, None), graph=False)(mixed, X)
        scanned, _ = n.scan(
            lambda c, m: (c + m.linear(X).sum(), None), in_axes=(n.Carry, tree), out_axes=(n.Carry, 0), graph=False
        )(0.0, mixed)
        return plain, mapped, scanned, outward.linear.kernel[...], outward.table

    assert_trees_close(story(nnx), story(flax_nnx))


def test_a_tree_of_shardings_as_flax_nnx():
    sharding = NamedSharding(jax.make_mesh((1,), ("a",)), PartitionSpec())

    def story(n):
        stack = stack_of(n)
        tree = n.prefix(stack, lambda path, leaf: sharding, graph=False)
        inward = n.jit(lambda m: m.linear.kernel.sum(), in_shardings=(tree,), graph=False)(stack)
        outward = n.jit(lambda m: n.clone(m), out_shardings=tree, graph=False)(stack)
        return inward, jax.jit(lambda m: m.linear.bias[...], in_shardings=(tree,))(stack), outward.linear.kernel[...]

    assert_trees_close(story(nnx), story(flax_nnx))


def test_the_paths_and_leaves_are_those_of_flax_nnx():
    def story(n):
        seen = []

        def axis(path, leaf):
            seen.append((path, type(leaf).__name__ if isinstance(leaf, n.Variable) else "leaf"))
            return 0

        n.prefix({"m": model_class(n)(n.Rngs(0)), "x": X, "n": 3}, axis, graph=False)
        return sorted(seen, key=str)

    assert story(nnx) == story(flax_nnx)


def test_a_whole_branch_may_have_one_treatment():
    stack = stack_of(nnx)
    tree = nnx.prefix(stack, {...: None}, graph=False)
    tree.linear = 0
    y = nnx.vmap(lambda m, x: m.linear(x), in_axes=(tree, None), graph=False)(stack, X)
    assert y.shape == (4, 2, 3)


def test_sharing_raises():
    with pytest.raises(SharedReferenceError, match=r"(?s)Affine where graph=False forbids.*decode\n.*encode"):
        nnx.prefix(Tied(), {...: 0}, graph=False)


def test_no_filter_matches():
    with pytest.raises(FilterError, match=r"matches linear\.|matches norm\.mean \(BatchStat\)\. End with"):
        nnx.prefix(model_class(nnx)(nnx.Rngs(0)), {nnx.Param: 0}, graph=False)


# ---- what comes later --------------------------------------------------------------------------------------------


def grow(m, x):
    m.sown = nnx.Intermediate(x * m.linear.kernel.sum())
    m.gains.append(nnx.Param(jnp.ones(3)))
    return x


@pytest.mark.parametrize("graph", [True, False])
def test_what_is_sown_later_has_the_treatment_of_the_rest(graph):
    stack = stack_of(nnx)
    axes = nnx.prefix(stack, {nnx.Param: 0, ...: 0}, graph=graph)
    nnx.vmap(grow, in_axes=(axes, None), graph=graph)(stack, X)
    assert (stack.sown.shape, stack.gains[1].shape) == ((4, 2, 2), (4, 3))


def test_what_comes_later_goes_by_its_own_filter():
    mixed = model_class(nnx)(nnx.Rngs(0))
    mixed.linear = stack_of(nnx).linear
    axes = nnx.prefix({"m": mixed}, {nnx.All(nnx.Param, nnx.Not(nnx.PathContains("linear"))): None, ...: 0})
    mixed.norm, mixed.table = None, None
    nnx.vmap(lambda d, x: grow(d["m"], x), in_axes=(axes, None))({"m": mixed}, X)
    assert (mixed.sown.shape, mixed.gains[1].shape) == ((4, 2, 2), (3,))


def test_two_prefixes_of_one_mapping_are_equal():
    stack = stack_of(nnx)
    first, second = (nnx.prefix(stack, {nnx.Param: 0, ...: 0}) for _ in range(2))
    assert (first, hash(first)) == (second, hash(second))
    one, other = nnx.prefix((stack, [stack]), {nnx.PathContains("linear"): 0, ...: 0})
    same = nnx.vmap(lambda a, b: (a is b[0]) * a.linear.kernel.sum(), in_axes=(one, other))(stack, [stack])
    assert_trees_close(same, stack.linear.kernel[...].sum((1, 2)))
    one, other = nnx.prefix((stack, stack), {nnx.PathContains(1): None, ...: 0})
    with pytest.raises(AliasError, match=r"(?s)args\[0\].*args\[1\]"):
        nnx.vmap(lambda a, b: 0, in_axes=(one, other), axis_size=4)(stack, stack)


def test_what_may_be_remembered():
    stack = stack_of(nnx)
    by_type = nnx.prefix(stack, {nnx.Param: 0, ...: 0})
    by_function = nnx.prefix(stack, lambda path, leaf: 0)
    assert all(nnx.filterlib.is_pure(predicate) for predicate, _ in by_type.rules)
    assert not all(nnx.filterlib.is_pure(predicate) for predicate, _ in by_function.rules)


# ---- objects where treatments are expected -----------------------------------------------------------------------

_MESH = jax.make_mesh((1,), ("a",))
TRANSFORMS = {
    "vmap in": (lambda n, m, kw: n.vmap(lambda m: None, in_axes=(m,), **kw), r"in_axes\[0\]"),
    "vmap nested": (lambda n, m, kw: n.vmap(lambda m: None, in_axes=({"a": m},), **kw), r"in_axes\[0\]\.a"),
    "vmap out": (lambda n, m, kw: n.vmap(lambda m: m, out_axes=m, **kw), r"out_axes"),
    "scan in": (lambda n, m, kw: n.scan(lambda c, m: (c, m), in_axes=(n.Carry, m), **kw), r"in_axes\[1\]"),
    "scan out": (lambda n, m, kw: n.scan(lambda c, m: (c, m), out_axes=(n.Carry, m), **kw), r"out_axes\[1\]"),
    "pmap in": (lambda n, m, kw: n.pmap(lambda m: None, in_axes=(m,), **kw), r"in_axes\[0\]"),
    "jit in": (lambda n, m, kw: n.jit(lambda m: None, in_shardings=(m,), **kw), r"in_shardings\[0\]"),
    "jit out": (lambda n, m, kw: n.jit(lambda m: m, out_shardings=m, **kw), r"out_shardings"),
    "shard_map in": (
        lambda n, m, kw: n.shard_map(lambda m: None, mesh=_MESH, in_specs=(m,), out_specs=PartitionSpec(), **kw),
        r"in_specs\[0\]",
    ),
}


@pytest.mark.parametrize(("transform", "where"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_object_is_no_treatment_where_sharing_is_allowed_as_in_flax_nnx(transform, where):
    with pytest.raises(SpecError, match=rf"^{where} is a Model, expected a treatment of it\.\n.*nnx\.prefix\("):
        transform(nnx, stack_of(nnx), {})
    with pytest.raises(ValueError, match="Graph nodes are not allowed as prefixes"):
        transform(flax_nnx, stack_of(flax_nnx), {})(stack_of(flax_nnx))


@pytest.mark.parametrize(("transform", "where"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_model_is_no_tree_of_treatments(transform, where):
    message = rf"^{where}\.gains\[0\]: expected a treatment, found a Param\.\nGive nnx\.prefix\(model"
    with pytest.raises(SpecError, match=message):
        transform(nnx, stack_of(nnx), {"graph": False})


# ---- what JAX puts in the place of leaves ------------------------------------------------------------------------


def test_a_child_stays_a_child_whatever_takes_its_place():
    model = model_class(nnx)(nnx.Rngs(0))
    assert jax.tree.structure(jax.tree.map(lambda x: 0, model)) == jax.tree.structure(model)
    shapes = jax.tree.map(lambda x: x.shape, model)
    full = jax.tree.map(lambda x, shape: jnp.full(shape, 2.0), model, shapes)
    assert_trees_equal(full.table, jnp.full(3, 2.0))
    emptied = jax.tree.map(lambda x: None, model)
    assert emptied.table is None
    refilled = jax.tree.map(lambda x, _: x, model, jax.tree.map(lambda x: "text", model))
    assert jax.tree.structure(refilled) == jax.tree.structure(model)
    # JAX fills the axes of a whole argument in this way, over plain arrays too
    assert jax.vmap(lambda m: m.table.sum(), in_axes=0)(stack_of(nnx)).shape == (4,)


def test_marks_of_the_users_outlive_jax():
    class Marked(nnx.Module):
        def __init__(self):
            self.rate = nnx.data(2.0)
            self.size = 3

    marked = jax.tree.map(lambda x: 2 * x, Marked())
    assert (marked.rate, marked.size) == (4.0, 3)
    assert nnx.graphdef(marked) == nnx.graphdef(Marked())
