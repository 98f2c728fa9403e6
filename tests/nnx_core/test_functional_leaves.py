"""Bare leaves, graph=False in the functions that walk, update of what is no Variable, map and clone: as flax.nnx."""

import jax
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core._errors import NotAGraphError, SharedReferenceError, StateMismatchError, TraceError
from nnx_core.graph._errors import LeafCountError, ReadOnlyError
from tests.strategies import Affine, Tied, portrait
from tests.support.arrays import ones
from tests.tolerance import assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


# ---- bare leaves -------------------------------------------------------------------------------------------------

LEAVES = {
    "array": lambda: ones(2),
    "numpy array": lambda: np.ones(2, np.float32),
    "numpy number": lambda: np.float32(2.0),
    "float": lambda: 3.0,
    "int": lambda: 3,
    "ref": lambda: jax.new_ref(ones(2)),
    "key": lambda: jax.random.key(0),
}
WAYS = {
    "merge of split": lambda n, x: n.merge(*n.split(x)),
    "merge of split with a filter": lambda n, x: n.merge(*n.split(x, ...)),
    "merge of flatten": lambda n, x: n.merge(*n.flatten(x)),
    "merge of values": lambda n, x: n.merge(*n.flatten(x, with_paths=False)),
    "unflatten of flatten": lambda n, x: n.unflatten(*n.flatten(x)),
    "unflatten of values": lambda n, x: n.unflatten(*n.flatten(x, with_paths=False)),
    "graph=False": lambda n, x: n.merge(*n.split(x, graph=False)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_a_bare_leaf_comes_back_as_in_flax_nnx(make, way):
    leaf = make()
    assert way(nnx, leaf) is leaf
    assert way(flax_nnx, leaf) is leaf


def test_the_state_of_a_bare_leaf_is_the_leaf_as_in_flax_nnx():
    for n in (nnx, flax_nnx):
        x = ones(2)
        assert n.split(x)[1] is x
        assert list(n.flatten(x)[1]) == [((), x)]
        assert n.map(lambda path, leaf: (path, leaf), 3.0) == ((), 3.0)
        assert n.clone(3.0) == 3.0


def test_structures_of_bare_leaves_are_equal():
    assert nnx.graphdef(ones(2)) == nnx.graphdef(3)
    assert nnx.graphdef(3) != nnx.graphdef([3])


def test_a_clone_of_a_ref_is_another_ref():
    ref = jax.new_ref(ones(2))
    copy = nnx.clone(ref)
    copy[...] = 5 * ones(2)
    assert_trees_equal(ref[...], ones(2))


def test_merge_takes_what_flatten_gives_as_in_flax_nnx():
    for n in (nnx, flax_nnx):
        model = {"layer": n.Linear(2, 3, rngs=n.Rngs(0)), "x": ones(2), "n": 3}
        for with_paths in (True, False):
            merged = n.merge(*n.flatten(model, with_paths=with_paths))
            assert_trees_equal(merged["layer"].kernel[...], model["layer"].kernel[...])
            assert (merged["x"] is model["x"], merged["n"]) == (True, 3)
        structure, values = n.flatten(model, with_paths=False)
        with pytest.raises(ValueError, match=r"(?i)number of leaves.*expected 3"):
            n.merge(structure, values[:1])


def test_leaf_count_names_both_numbers():
    with pytest.raises(LeafCountError, match=r"expected 2, found 1\.\nPass the list that nnx\.flatten"):
        nnx.merge(nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), [ones(2)])


def test_state_and_update_of_a_bare_leaf_say_what_is_needed():
    with pytest.raises(NotAGraphError, match=r"nnx\.update needs a module, Variable or pytree, found ArrayImpl"):
        nnx.update(ones(2), ones(2))
    with pytest.raises(NotAGraphError, match=r"nnx\.split needs .* found str"):
        nnx.split("text")


# ---- graph=False -------------------------------------------------------------------------------------------------

FORBIDDING = {
    "split": lambda x: nnx.split(x, graph=False),
    "state": lambda x: nnx.state(x, graph=False),
    "variables": lambda x: nnx.variables(x, graph=False),
    "graphdef": lambda x: nnx.graphdef(x, graph=False),
    "unpack": lambda x: nnx.unpack(x, graph=False),
    "flatten": lambda x: nnx.flatten(x, graph=False),
    "map": lambda x: nnx.map(lambda path, v: v, x, graph=False),
    "clone": lambda x: nnx.clone(x, graph=False),
    "clone that keeps Variables": lambda x: nnx.clone(x, variables=False, graph=False),
    "iter_graph": lambda x: list(nnx.iter_graph(x, graph=False)),
    "iter_modules": lambda x: list(nnx.iter_modules(x, graph=False)),
    "recursive_map": lambda x: nnx.recursive_map(lambda path, v: v, x, graph=False),
    "as_abstract": lambda x: nnx.as_abstract(x, graph=False),
    "prefix": lambda x: nnx.prefix(x, {...: 0}, graph=False),
    "view": lambda x: nnx.view(x, graph=False),
    "view_info": lambda x: nnx.view_info(x, graph=False),
    "with_attributes": lambda x: nnx.with_attributes(x, graph=False, raise_if_not_found=False),
    "reseed": lambda x: nnx.reseed(x, graph=False, params=0),
    "split_rngs": lambda x: nnx.split_rngs(x, splits=2, graph=False),
    "fork_rngs": lambda x: nnx.fork_rngs(x, graph=False),
    "set_attributes": lambda x: nnx.Dict(a=x).set_attributes(graph=False, raise_if_not_found=False),
    "jit": lambda x: nnx.jit(lambda y: None, graph=False)(x),
    "eval_shape": lambda x: nnx.eval_shape(lambda y: None, x, graph=False),
}


@pytest.mark.parametrize("call", FORBIDDING.values(), ids=FORBIDDING)
def test_graph_false_forbids_what_is_reached_twice(call):
    param = nnx.Param(ones(2))
    ring = nnx.Dict()
    ring["me"] = ring
    for shared in (Tied(), nnx.List([param, param]), ring):
        before = portrait(shared)
        with pytest.raises(SharedReferenceError, match=r"(?s)shared (Affine|Param|Dict) where graph=False"):
            call(shared)
        assert portrait(shared) == before
    call(nnx.List([Affine(), Affine(), nnx.Rngs(0)]))


def test_iter_graph_forbids_what_flax_nnx_forbids():
    for n in (nnx, flax_nnx):
        param = n.Param(ones(2))
        for walk in (n.iter_graph, n.iter_modules):
            with pytest.raises(ValueError, match=r"(?i)(duplicate|shared)"):
                list(walk(n.List([param, param]), graph=False))
        with pytest.raises(ValueError, match=r"(?i)(duplicate|shared)"):
            n.recursive_map(lambda path, v: v, [param, param], graph=False)


def test_nothing_was_visited_when_sharing_raises():
    visited = []
    with pytest.raises(SharedReferenceError, match="forbids sharing"):
        nnx.recursive_map(lambda path, v: visited.append(path), Tied(), graph=False)
    assert not visited


# ---- children ----------------------------------------------------------------------------------------------------


def test_iter_children_gives_objects_and_variables_as_flax_nnx():
    def names(n):
        class Block(n.Module):
            def __init__(self):
                self.layer = n.Linear(2, 2, rngs=n.Rngs(0))
                self.layers = n.List([n.Linear(2, 2, rngs=n.Rngs(0))])
                self.heads = n.Dict(a=n.Linear(2, 2, rngs=n.Rngs(0)))
                self.gain = n.Param(ones(2))
                self.table = ones(3)
                self.plain = n.data({"x": n.Param(ones(2))})
                self.label = "block"
                self.rngs = n.Rngs(0)

        block = Block()
        rows = [list(n.iter_children(block)), list(n.iter_children({"a": block, "b": [block]}))]
        return [[(key, type(child).__name__) for key, child in row] for row in rows]

    assert names(nnx) == names(flax_nnx)


# ---- update of what is no Variable -------------------------------------------------------------------------------


class Numbers(nnx.Module):
    def __init__(self):
        self.count = 1
        self.table = ones(2)
        self.kept = nnx.data({"k": 1.0})
        self.items = nnx.List([1.0])
        self.gain = nnx.Param(ones(2))


def test_update_of_numbers_in_containers_as_flax_nnx():
    for n in (nnx, flax_nnx):
        tree = {"a": 1.0, "b": {"c": 2, "w": n.Param(ones(2))}, "l": [1.0, 2.0]}
        n.update(tree, {"a": 5.0, "b": {"c": 7, "w": 3 * ones(2)}, "l": {1: 8.0}})
        assert (tree["a"], tree["b"]["c"], tree["l"]) == (5.0, 7, [1.0, 8.0])
        assert_trees_equal(tree["b"]["w"][...], 3 * ones(2))


def test_update_of_numbers_on_a_module():
    m = Numbers()
    nnx.update(m, {"count": 2, "items": {0: 4.0}, "kept": {"k": 3.0}, "table": 2 * ones(2)})
    assert (m.count, m.items[0], m.kept["k"]) == (2, 4.0, 3.0)
    assert_trees_equal(m.table, 2 * ones(2))
    assert nnx.graphdef(m) != nnx.graphdef(Numbers())


def test_update_stays_strict_about_paths():
    m = Numbers()
    before = portrait(m)
    with pytest.raises(StateMismatchError, match=r"(?s)not in the graph:\n  kept\.z"):
        nnx.update(m, {"count": 2, "kept": {"z": 1.0}})
    with pytest.raises(StateMismatchError, match=r"(?s)Missing.*gain"):
        nnx.update(m, {"count": 2}, strict=True)
    with pytest.raises(TypeError, match=r"nnx\.update needs States or mappings, found 1 list"):
        nnx.update([nnx.Param(1.0)], [2.0])
    assert portrait(m) == before


def test_what_cannot_be_written_in_place_raises():
    v = nnx.Param(ones(2))
    tree = (v, ones(2), {"x": ones(2)})
    nnx.update(tree, {2: {"x": 2 * ones(2)}, 0: 3 * ones(2)})
    assert_trees_equal(tree[2]["x"], 2 * ones(2))
    with pytest.raises(
        ReadOnlyError, match=r"^\[1\] cannot be written in place: it is in a tuple.*\nExpected a module"
    ):
        nnx.update(tree, {0: ones(2), 1: 5 * ones(2)})
    assert_trees_equal(v[...], 3 * ones(2))  # nothing was written


def test_update_of_a_plain_array_from_another_trace():
    m = Numbers()

    @jax.jit
    def write(x):
        nnx.update(m, {"table": x})
        return x

    with pytest.raises(TraceError, match="table"):
        write(3 * ones(2))
    assert_trees_equal(m.table, ones(2))


# ---- map and clone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recreate", [True, False])
def test_map_gives_what_f_returns_as_flax_nnx(recreate):
    def types(n):
        m = n.Linear(2, 2, rngs=n.Rngs(0))
        fs = (lambda path, v: v[...], lambda path, v: n.BatchStat(v[...]), lambda path, v: v.replace(2 * v))
        maps = [n.map(f, m, recreate_variables=recreate).kernel for f in fs]
        return ["array" if isinstance(x, jax.Array) else type(x).__name__ for x in maps]

    assert types(nnx) == types(flax_nnx)


def test_map_without_new_variables_hands_out_those_of_f():
    m = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert nnx.map(lambda path, v: v, m, recreate_variables=False).kernel is m.kernel
    assert nnx.map(lambda path, v: v, m).kernel is not m.kernel


def test_unflatten_without_new_variables_as_flax_nnx():
    for n in (nnx, flax_nnx):
        m = n.Linear(2, 2, rngs=n.Rngs(0))
        tied = n.List([m, m])
        structure, values = n.flatten(tied, with_paths=False)
        raw = n.unflatten(structure, values, recreate_variables=False)
        assert isinstance(raw[0].kernel, jax.Array)
        assert raw[0] is raw[1]


def test_clone_shares_buffers_unless_it_copies_them():
    m = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    step = jax.jit(lambda x: 2 * x, donate_argnums=0)

    for option in ("arrays", "copy_arrays"):
        copy = nnx.clone(m, **{option: True})
        step(copy.kernel.get_raw_value())
        assert_trees_equal(m.kernel[...], nnx.Linear(2, 2, rngs=nnx.Rngs(0)).kernel[...])
    clone = nnx.clone(m)
    assert clone.kernel.get_raw_value() is m.kernel.get_raw_value()
    with pytest.raises(ValueError, match=r"copy_arrays=True with variables=False asks for new arrays"):
        nnx.clone(m, variables=False, copy_arrays=True)
    with pytest.raises(ValueError, match="variables"):
        flax_nnx.clone(flax_nnx.Linear(2, 2, rngs=flax_nnx.Rngs(0)), variables=False, arrays=True)
