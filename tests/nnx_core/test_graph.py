"""Graphs: split, merge, update, state, pop, clone, graphdef and the walks."""

import typing

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Count, Node, Tied, portrait, reachable
from tests.support.arrays import ones
from tests.tolerance import assert_trees_equal


class Ring(nnx.Module):
    """Three Variables, a cycle, a shared child, a list, a static and a plain array."""

    def __init__(self):
        self.me = self
        self.left = Affine()
        self.right = self.left
        self.items = nnx.List([self.left.kernel, nnx.BatchStat(jnp.zeros(2), tag="t")])
        self.table = jnp.arange(2)
        self.size = 7


PATHS = (("items", 0), ("items", 1), ("left", "calls"), ("table",))


@pytest.fixture
def ring():
    return Ring()


# ---- state and split -------------------------------------------------------------------------------------------


def test_state_visits_attributes_in_sorted_order_and_each_variable_once(ring):
    assert nnx.to_flat_state(nnx.state(ring)).paths == PATHS


def test_state_and_split_return_the_live_variables(ring):
    assert nnx.state(ring)["items"][0] is ring.left.kernel
    _, state = nnx.split(ring)
    assert state["left"]["calls"] is ring.left.calls
    assert state["table"] is ring.table


def test_state_by_filters(ring):
    params, rest = nnx.state(ring, nnx.Param, Count)
    assert nnx.to_flat_state(params).paths == (("items", 0),)
    assert nnx.to_flat_state(rest).paths == (("left", "calls"),)


def test_variables_is_another_name_of_state(ring):
    assert nnx.to_flat_state(nnx.variables(ring)).paths == PATHS
    assert nnx.variables(ring, nnx.Param)["items"][0] is ring.left.kernel


def test_split_by_filters_and_merge(ring):
    graphdef, params, stats, rest = nnx.split(ring, nnx.Param, nnx.BatchStat, ...)
    assert nnx.to_flat_state(stats).paths == (("items", 1),)
    assert portrait(nnx.merge(graphdef, params, stats, rest)) == portrait(ring)
    assert portrait(nnx.merge(graphdef, rest, params, stats)) == portrait(ring)  # any order


def test_split_must_be_exhaustive(ring):
    with pytest.raises(ValueError, match=r"(?s)[Nn]on-exhaustive filters.*`\.\.\.`"):
        nnx.split(ring, nnx.Param)


def test_split_leaves_the_graph_untouched(ring):
    before, members = portrait(ring), reachable(ring)
    nnx.split(ring, nnx.Param, ...)
    nnx.state(ring)
    nnx.graphdef(ring)
    assert portrait(ring, origin=members) == portrait(ring, origin=reachable(ring))
    assert portrait(ring) == before


def test_split_of_plain_containers():
    a = Affine()
    tree = {"a": a, "b": [a.kernel, jnp.ones(1)], "c": "text"}
    graphdef, state = nnx.split(tree)
    assert nnx.to_flat_state(state).paths == (("a", "calls"), ("a", "kernel"), ("b", 1))
    out = nnx.merge(graphdef, state)
    assert out["b"][0] is out["a"].kernel
    assert out["c"] == "text"


def test_numbers_in_plain_containers_come_back():
    assert nnx.merge(*nnx.split({"a": Affine(), "n": 3}))["n"] == 3


# ---- merge -----------------------------------------------------------------------------------------------------


def test_merge_inverts_split(ring):
    twin = nnx.merge(*nnx.split(ring))
    assert portrait(twin) == portrait(ring)
    assert twin is not ring
    assert twin.me is twin
    assert twin.left is twin.right
    assert twin.items[0] is twin.left.kernel
    assert twin.items[1].tag == "t"


def test_rows45_66_merge_copies_the_variables_it_is_given(ring):
    graphdef, state = nnx.split(ring)
    twin = nnx.merge(graphdef, state)
    assert twin.left.kernel is not ring.left.kernel
    twin.left.kernel[...] = jnp.zeros((3, 3))
    twin.left.kernel.set_metadata(tag="twin")
    assert float(jnp.abs(ring.left.kernel[...]).sum()) > 0
    assert not ring.left.kernel.has_metadata("tag")


def test_rows45_66_merge_inside_grad_may_write_what_it_merged():
    m = Affine()
    graphdef, params, rest = nnx.split(m, nnx.Param, ...)

    def loss(params):
        twin = nnx.merge(graphdef, params, rest)
        return twin(jnp.ones((1, 3))).sum()  # counts the call

    jax.grad(loss)(params)
    assert int(m.calls[...]) == 0


def test_merge_from_pure_values(ring):
    graphdef, state = nnx.split(ring)
    twin = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, state))
    assert_trees_equal(twin.left.kernel.get_value(), jnp.zeros((3, 3)))


def test_merge_does_not_call_init():
    class Once(nnx.Module):
        made = 0

        def __init__(self):
            Once.made += 1
            self.w = nnx.Param(jnp.ones(1))

    nnx.merge(*nnx.split(Once()))
    assert Once.made == 1


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_row50_a_state_that_does_not_fit_is_named_by_path(ring, change):
    graphdef, state = nnx.split(ring)
    if change == "missing":
        del state["left"]["calls"]
        path = r"left\.calls"
    else:
        state["left"]["nosuch"] = nnx.Param(jnp.ones(1))
        path = r"left\.nosuch"
    with pytest.raises(ValueError, match=path):
        nnx.merge(graphdef, state)


# ---- update ----------------------------------------------------------------------------------------------------


def test_update_writes_into_the_same_variables(ring):
    members = reachable(ring)
    other = Ring()
    other.left.kernel[...] = jnp.zeros((3, 3))
    nnx.update(ring, nnx.state(other))
    assert_trees_equal(ring.left.kernel.get_value(), jnp.zeros((3, 3)))
    assert portrait(ring, origin=members)[1] == 0
    assert [id(x) for x in reachable(ring)] == [id(x) for x in members]


def test_update_takes_several_states_and_parts(ring):
    nnx.update(ring, {"items": {1: jnp.ones(2)}}, nnx.State({"left": {"calls": Count(jnp.int32(4))}}))
    assert_trees_equal(ring.items[1].get_value(), jnp.ones(2))
    assert int(ring.left.calls[...]) == 4


def test_update_replaces_plain_arrays(ring):
    nnx.update(ring, {"table": jnp.array([5, 6])})
    assert_trees_equal(ring.table, jnp.array([5, 6]))


def test_update_with_the_own_state_changes_nothing(ring):
    before = portrait(ring)
    nnx.update(ring, nnx.state(ring))
    assert portrait(ring) == before


def test_row11_update_lists_every_path_that_the_graph_has_not(ring):
    before = portrait(ring)
    wrong = {"nosuch": jnp.ones(1), "left": {"calls": jnp.int32(1), "kernl": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"(?s)left\.kernl.*nosuch"):
        nnx.update(ring, wrong)
    assert portrait(ring) == before  # nothing was written


def test_row11_a_strict_update_lists_every_path_of_another_shape_or_dtype(ring):
    before = portrait(ring)
    state = nnx.to_pure_dict(nnx.state(ring))
    state["left"]["calls"] = jnp.ones(7, jnp.int32)
    state["items"] = {0: jnp.ones((9, 9)), 1: jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match=r"(?s)items\[0\].*3.*9.*items\[1\].*float32.*int32.*left\.calls.*7"):
        nnx.update(ring, state, strict=True)
    assert portrait(ring) == before  # nothing was written


def test_row11_a_strict_update_lists_every_missing_path(ring):
    with pytest.raises(ValueError, match=r"(?s)items\[1\].*left\.calls"):
        nnx.update(ring, {"items": {0: jnp.ones((3, 3))}, "table": jnp.arange(2)}, strict=True)


def test_update_may_cast(ring):
    nnx.update(ring, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(ring, nnx.Param)))
    assert ring.left.kernel.dtype == jnp.bfloat16


# ---- pop, clone, graphdef ---------------------------------------------------------------------------------------


def test_pop_removes_and_returns(ring):
    stat = ring.items[1]
    ring.note = nnx.Intermediate(jnp.ones(1))
    assert nnx.to_flat_state(nnx.pop(ring, nnx.Intermediate)).paths == (("note",),)
    assert not hasattr(ring, "note")
    assert nnx.to_flat_state(nnx.pop(ring, nnx.Intermediate)).paths == ()
    assert ring.items[1] is stat


def test_pop_of_a_shared_variable_removes_every_reference():
    m = Node()
    m.a = nnx.Cache(jnp.ones(1))
    m.b = m.a
    m.c = nnx.Param(jnp.ones(1))
    popped = nnx.pop(m, nnx.Cache)
    assert nnx.to_flat_state(popped).paths == (("a",),)
    assert not hasattr(m, "a")
    assert not hasattr(m, "b")
    assert hasattr(m, "c")


def test_pop_by_several_filters_and_none(ring):
    m = Affine()
    params, counts = nnx.pop(m, nnx.Param, Count)
    assert (list(params), list(counts)) == (["kernel"], ["calls"])
    with pytest.raises(ValueError, match="at least one filter"):
        nnx.pop(m)


def test_clone_is_equal_and_separate(ring):
    twin = nnx.clone(ring)
    assert portrait(twin) == portrait(ring)
    assert not {id(x) for x in reachable(twin)} & {id(x) for x in reachable(ring)}
    twin.left.kernel[...] = jnp.zeros((3, 3))
    assert portrait(twin) != portrait(ring)


def test_clone_may_keep_the_variables(ring):
    twin = nnx.clone(ring, variables=False)
    assert twin is not ring
    assert twin.left.kernel is ring.left.kernel


def test_graphdefs_are_equal_iff_structures_are(ring):
    graphdef = nnx.graphdef(ring)
    assert graphdef == nnx.split(ring)[0] == nnx.graphdef(Ring())
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(ring)))


CHANGES = {
    "static": lambda m: setattr(m, "size", 8),
    "new attribute": lambda m: setattr(m, "extra", nnx.Param(jnp.ones(1))),
    "deleted attribute": lambda m: delattr(m, "size"),
    "list item": lambda m: m.items.append(nnx.Param(jnp.ones(1))),
    "metadata": lambda m: m.items[1].set_metadata(tag="u"),
    "sharing": lambda m: setattr(m, "right", Affine()),
    "kind": lambda m: setattr(m.left, "calls", nnx.Cache(m.left.calls[...])),
    "nested static": lambda m: setattr(m.left, "n_in", 9),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_graphdef_sees_every_structural_change(ring, change):
    before = nnx.graphdef(ring)
    assert nnx.graphdef(ring) == before  # the second look may come from a cache
    change(ring)
    assert nnx.graphdef(ring) != before
    assert nnx.graphdef(ring) == nnx.graphdef(nnx.clone(ring))


def test_graphdef_does_not_see_values(ring):
    before = nnx.graphdef(ring)
    ring.left.kernel[...] = jnp.zeros((3, 3))
    assert nnx.graphdef(ring) == before


def test_graphdef_is_a_static_argument_of_jax_jit():
    traces = []

    @jax.jit
    def f(graphdef, state, x):
        traces.append(1)
        return nnx.merge(graphdef, state)(x)

    f(*nnx.split(Affine()), jnp.ones((1, 3)))
    f(*nnx.split(Affine(seed=1)), jnp.ones((1, 3)))
    assert len(traces) == 1


# ---- walks -----------------------------------------------------------------------------------------------------


def user_paths(pairs):
    """Without flax.nnx's private members."""
    return [path for path, _ in pairs if not any(isinstance(k, str) and k.startswith("_") for k in path)]


def test_iter_graph_visits_every_node_once_children_first(ring):
    paths = user_paths(nnx.iter_graph(ring))
    assert paths[-1] == ()
    assert [p for p in paths if p in (("items",), ("items", 0), ("left",), ("right",), ("me",))] == [
        ("items", 0),
        ("items",),
        ("left",),
    ]
    assert ("size",) in paths


def test_iter_graph_gives_the_objects_themselves(ring):
    found = dict(nnx.iter_graph(ring))
    assert found["left",] is ring.left
    assert found["items", 0] is ring.left.kernel
    assert found["size",] == 7
    assert found[()] is ring


def test_iter_modules_gives_modules_only():
    m = Tied()
    found = dict(nnx.iter_modules(m))
    assert found["decode",] is m.decode
    assert found["layers", 1] is m.layers[1]
    assert found[()] is m
    assert ("encode",) not in found  # seen already, as decode
    assert all(isinstance(x, nnx.Module) for x in found.values())


def test_iter_children_is_one_level():
    m = Tied()
    assert [name for name, _ in nnx.iter_children(m)] == ["decode", "encode", "layers"]
    assert [name for name, _ in nnx.iter_children(m.encode)] == ["calls", "kernel"]


def test_find_duplicates_lists_the_paths_of_shared_objects():
    duplicates = nnx.find_duplicates(Tied())
    assert [sorted(map(str, group)) for group in duplicates] == [
        sorted(map(str, [("decode",), ("encode",), ("layers", 0)]))
    ]


def test_find_duplicates_of_cycles_and_by_filter():
    m = Tied()
    m.own = m.layers[0].kernel
    m.me = m
    groups = [[("decode",), ("encode",), ("layers", 0)], [("decode", "kernel"), ("own",)], [(), ("me",)]]
    assert sorted(map(sorted, nnx.find_duplicates(m))) == sorted(map(sorted, groups))
    assert nnx.find_duplicates(m, only=nnx.Param) == [[("decode", "kernel"), ("own",)]]
    # What a filter does not match where it is reached first counts from where it does.
    later = nnx.find_duplicates(m, only=lambda path, x: path[-1:] in [("encode",), ("me",)])
    assert later == [[("encode",), ("layers", 0)]]


def test_recursive_map_rebuilds_with_sharing():
    m = Tied()

    def zero(path, node):
        return node.replace(jnp.zeros_like(node)) if isinstance(node, nnx.Param) else node

    twin = nnx.recursive_map(zero, m)
    assert_trees_equal(twin.encode.kernel.get_value(), jnp.zeros((3, 3)))
    assert twin.encode is twin.decode is twin.layers[0]


@pytest.mark.parametrize("graph", [3, ones(1), "text", object()])
def test_not_a_graph(graph):
    with pytest.raises((TypeError, ValueError, IndexError), match=r".+"):
        nnx.pop(graph, nnx.Param)


def test_a_lone_variable_is_its_own_state():
    v = nnx.Param(jnp.ones(2), tag="a")
    graphdef, state = nnx.split(v)
    assert state is v
    assert nnx.state(v) is v
    copy = nnx.merge(graphdef, state)
    assert copy is not v
    assert (type(copy), copy.tag) == (nnx.Param, "a")
    assert typing.get_origin(nnx.GraphDef["Model"]) is nnx.GraphDef
