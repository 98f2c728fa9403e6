"""flatten, unflatten, call, map, as_pure, with_vars, to_tree, prefix, replay, modes: against laws and flax.nnx."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import nnx_core as nnx
from nnx_core import modes
from nnx_core._errors import NotAGraphError, SharedReferenceError, StateMismatchError, TraceError
from nnx_core.graph._errors import (
    DuplicateVariableError,
    IndexSpaceError,
    LeafCountError,
    StaticDataError,
)
from nnx_core.graph.functional import as_pure, call, check_pytree, flatten, map, pure, unflatten, with_vars
from nnx_core.graph.pack import Refs
from nnx_core.graph.replay import replay
from nnx_core.graph.tree import NodeStates, from_tree, to_tree
from nnx_core.transforms.prefix import prefix
from tests.strategies import (
    CORE,
    LAW,
    Affine,
    Count,
    Node,
    Tied,
    apply_all,
    effects,
    graphs,
    portrait,
    reachable,
    recipes,
)
from tests.tolerance import assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


# ---- flatten and unflatten -----------------------------------------------------------------------------------


@LAW
@given(graphs())
def test_unflatten_inverts_flatten(graph):
    assert portrait(unflatten(*flatten(graph))) == portrait(graph)
    assert portrait(unflatten(*flatten(graph, with_paths=False))) == portrait(graph)


@LAW
@given(graphs())
def test_unflatten_of_a_state_equals_merge(graph):
    structure, state = nnx.split(graph)
    assert portrait(unflatten(structure, state)) == portrait(nnx.merge(structure, state))


def test_flatten_finds_what_flax_nnx_finds():
    ours, theirs = (n.Linear(2, 3, rngs=n.Rngs(0)) for n in (nnx, flax_nnx))
    assert flatten(ours)[1].paths == tuple(path for path, _ in flax_nnx.flatten(theirs)[1])
    assert_trees_equal(flatten(ours, with_paths=False)[1], flax_nnx.flatten(theirs, with_paths=False)[1])


def test_one_index_space_keeps_sharing_between_graphs():
    layer, refs, made = Affine(), Refs(), Refs()
    first, second = flatten(layer, ref_index=refs), flatten([layer], ref_index=refs)
    assert len(second[1]) == 0
    a, (b,) = unflatten(*first, index_ref=made), unflatten(*second, index_ref=made)
    assert a is b is not layer


def test_unflatten_adopts_or_copies_variables():
    layer = Affine()
    assert unflatten(*flatten(layer)).kernel is layer.kernel
    assert unflatten(*flatten(layer), copy_variables=True).kernel is not layer.kernel


def test_metadata_in_the_state_is_newer():
    structure, state = nnx.split(Affine())
    state["kernel"].set_metadata(note=1)
    assert unflatten(structure, state, copy_variables=True).kernel.note == 1


def test_flatten_forbids_sharing_on_request():
    with pytest.raises(SharedReferenceError, match="graph=False"):
        flatten(Tied(), graph=False)
    with modes.set_graph_mode(False), pytest.raises(SharedReferenceError, match="graph=False"):
        flatten(Tied())


def test_unflatten_says_what_does_not_fit():
    structure, leaves = flatten(Affine(), with_paths=False)
    with pytest.raises(LeafCountError, match=r"expected 2, found 1"):
        unflatten(structure, leaves[:1])
    with pytest.raises(StateMismatchError, match=r"(?s)Missing.*calls.*not in the graph.*nope"):
        unflatten(structure, nnx.FlatState([(("kernel",), 1), (("nope",), 2)]))
    with pytest.raises(StateMismatchError, match=r"(?s)Missing.*calls"):
        unflatten(structure, nnx.State({"kernel": 1}))
    with pytest.raises(TypeError, match="needs a GraphDef first, found int"):
        unflatten(3, leaves)


def test_unflatten_out_of_turn():
    layer, refs = Affine(), Refs()
    flatten(layer, ref_index=refs)
    with pytest.raises(IndexSpaceError, match=r"object 0 of its index space, of which 0 are known"):
        unflatten(*flatten([layer], ref_index=refs))


# ---- call, map, as_pure --------------------------------------------------------------------------------------


def test_call_in_a_pure_function():
    pair = nnx.split({"layer": Affine()})

    @jax.jit
    def forward(pair, x):
        return call(pair)["layer"](x)

    for _ in range(2):
        y, pair = forward(pair, jnp.ones((1, 3)))
    node = nnx.merge(*pair)
    assert int(node["layer"].calls[...]) == 2
    assert_trees_equal(y, jnp.ones((1, 3)) @ node["layer"].kernel[...])


def test_call_of_an_attribute():
    model = nnx.Sequential(Affine())
    _, (graphdef, state) = call(nnx.split(model)).layers[0](jnp.ones((1, 3)))
    assert isinstance(graphdef, nnx.GraphDef)
    assert int(state["layers"][0]["calls"][...]) == 1
    with pytest.raises(AttributeError, match="nope"):
        call(nnx.split(model)).nope()
    with pytest.raises(AttributeError, match="__len__"):
        len.__call__(call(nnx.split(model)).__len__)


def test_call_of_something_else():
    with pytest.raises(TypeError, match=r"\(graphdef, state\) that nnx.split returns, found Affine"):
        call(Affine())


@LAW
@given(graphs())
def test_map_of_the_identity_is_a_copy(graph):
    assert portrait(map(lambda path, x: x, graph)) == portrait(graph)


def test_map_as_flax_nnx_does():
    def seen(n):
        paths = []
        node = [n.Linear(2, 3, rngs=n.Rngs(0)), jnp.ones(2), 3]
        result = n_map(lambda path, v: (paths.append(path), v * 2)[1], node)
        return paths, result[0].kernel[...], result[1], result[2]

    n_map = map
    ours = seen(nnx)
    n_map = flax_nnx.map
    theirs = seen(flax_nnx)
    assert ours[0] == theirs[0]
    assert_trees_equal(ours[1:], theirs[1:])


def test_map_may_share_variables():
    layer = Affine()
    assert map(lambda path, v: v, layer, recreate_variables=False).kernel is layer.kernel
    assert map(lambda path, v: v, layer).kernel is not layer.kernel


def test_map_of_a_lone_variable():
    assert float(map(lambda path, v: v.replace(v + 1), nnx.Param(jnp.array(1.0)))[...]) == 2.0


def test_as_pure():
    layer = Affine()
    bare = as_pure(layer)
    assert isinstance(bare.kernel, jax.Array)
    assert isinstance(layer.kernel, nnx.Param)
    assert as_pure([nnx.Param(1, on_get_value=lambda v, x: x + 1), 2]) == flax_nnx.as_pure([flax_nnx.Param(1), 2])
    assert pure is as_pure


# ---- with_vars -----------------------------------------------------------------------------------------------


def test_with_vars_to_refs_and_back():
    layer = Affine()
    held = with_vars(layer, ref=True)
    assert held.kernel.has_ref
    assert not layer.kernel.has_ref
    held.kernel[...] *= 2
    assert_trees_equal(with_vars(held, mutable=False).kernel[...], layer.kernel[...] * 2)


def test_with_vars_only_some():
    layer = Affine()
    held = with_vars(layer, ref=True, only=nnx.Param)
    assert held.calls is layer.calls
    assert held.kernel.has_ref
    assert with_vars(layer).kernel is not layer.kernel


def test_with_vars_duplicates_as_flax_nnx():
    for n, convert in ((nnx, with_vars), (flax_nnx, flax_nnx.with_vars)):
        v = n.Param(jnp.ones(2))
        with pytest.raises(ValueError, match=r"(?s)duplicate.*at paths.*0.*1"):
            convert([v, v], ref=True)
        a, b = convert([v, v], ref=True, allow_duplicates=True)
        assert a is b
    with pytest.raises(DuplicateVariableError, match="allow_duplicates=True"):
        with_vars([v := nnx.Param(1.0), v], ref=True)


# ---- check_pytree ----------------------------------------------------------------------------------------------


def test_check_pytree():
    node = Node()
    node.a = nnx.static((1, 2))
    check_pytree(node)
    node.b = nnx.static((1, 2))
    vars(node)["b"] = [jnp.ones(2)]  # past the check of an assignment
    with pytest.raises(StaticDataError, match=r"static attribute b of Node: a list"):
        check_pytree(node)
    for n, check in ((nnx, check_pytree), (flax_nnx, flax_nnx.check_pytree)):
        with pytest.raises(TypeError, match="Expected a Pytree, got"):
            check([n.Param(1)])
    with pytest.raises(NotAGraphError, match="got list"):
        check_pytree([1])


# ---- trees -----------------------------------------------------------------------------------------------------


@LAW
@given(graphs())
def test_from_tree_inverts_to_tree(graph):
    tree = (graph, {"again": graph, "three": 3}, jnp.ones(2))
    made = from_tree(to_tree(tree))
    assert portrait(made) == portrait(tree)
    assert made[0] is made[1]["again"] is not graph


def test_to_tree_passes_through_jit():
    layer = Affine()
    made = from_tree(jax.jit(lambda t: t)(to_tree({"layer": layer})))
    assert portrait(made) == portrait({"layer": layer})


def test_to_tree_checks_aliasing_as_flax_nnx():
    for n, convert in ((nnx, to_tree), (flax_nnx, flax_nnx.to_tree)):
        layer = n.Linear(2, 3, rngs=n.Rngs(0))
        with pytest.raises(ValueError, match="0"):
            convert((layer, layer), prefix=(0, 1))
        convert((layer, layer), prefix=(0, 0))
        convert((layer, layer), prefix=(0, 1), check_aliasing=False)
    with pytest.raises(nnx.NnxError, match=r"(?s)Linear is reached twice.*\[0\]: axis 0.*\[1\]\[0\]: not mapped"):
        to_tree((layer := nnx.Linear(2, 3, rngs=nnx.Rngs(0)), [layer]), prefix=(0, None))


def test_to_tree_with_a_split_function():
    def split(ctx, path, treatment, node):
        assert treatment == "all"
        return NodeStates.from_split(*ctx.split(node, nnx.Param, ...), metadata=path)

    tree = to_tree([Affine()], prefix="all", split_fn=split)
    assert tree[0].metadata == (0,)
    assert [list(s) for s in tree[0].states] == [["kernel"], ["calls"]]
    assert list(from_tree(tree)[0].kernel.shape) == [3, 3]


def test_from_tree_with_leaves_of_its_own():
    seen = []
    from_tree({"a": 1}, merge_fn=lambda ctx, path, p, x: seen.append((path, x)), map_non_graph_nodes=True)
    assert seen == [(("a",), 1)]
    with pytest.raises(TypeError, match=r"expected NodeStates at \('a',\), found int"):
        from_tree({"a": 1}, map_non_graph_nodes=True)


def test_node_states():
    state = nnx.State({"a": 1})
    assert NodeStates.from_states(state).state is state
    assert NodeStates.from_prefixes([0, 1]).states == (0, 1)
    assert NodeStates.from_states(state).replace(metadata=1).metadata == 1
    with pytest.raises(ValueError, match="has no GraphDef"):
        _ = NodeStates.from_states(state).graphdef
    with pytest.raises(ValueError, match="has 2 States, expected one"):
        _ = NodeStates.from_states(state, state).state


# ---- prefix ----------------------------------------------------------------------------------------------------


def test_prefix_of_shared_modules_for_vmap():
    def total(n, n_prefix):
        model = n.vmap(lambda rngs: n.Linear(2, 3, rngs=rngs))(n.Rngs(0).fork(split=4))
        a, b = n_prefix((model, model), {n.Param: 0})
        return n.vmap(lambda m, k, x: (m is k) * (m(x) + k(x)), in_axes=(a, b, None))(model, model, jnp.ones(2))

    assert total(nnx, prefix).shape == (4, 3)


def test_prefix_by_a_function_and_shared_variables():
    node = Node()
    node.a = nnx.Param(jnp.ones(2))
    node.b = node.a
    axes = prefix([node, jnp.ones(3)], lambda path, x: 0 if path[0] == 0 else None)
    assert axes[1] is None
    assert axes[0].group(("a",), node.a) == axes[0].group(("b",), node.a) == 0
    nnx.vmap(lambda x: x[0].a + x[0].b, in_axes=(axes,))([node, jnp.ones(3)])


def test_prefix_without_a_match_as_flax_nnx():
    for n, n_prefix in ((nnx, prefix), (flax_nnx, flax_nnx.prefix)):
        with pytest.raises(ValueError, match="No filter"):
            n_prefix({"a": n.Param(1.0), "b": n.BatchStat(1.0)}, {n.Param: 0})
    with pytest.raises(nnx.NnxError, match=r"matches b \(BatchStat\)"):
        prefix({"b": nnx.BatchStat(1.0)}, {nnx.Param: 0})


# ---- replay ------------------------------------------------------------------------------------------------------


@LAW
@given(recipes(), effects())
def test_replay_equals_the_call(drawn, todo):
    mine, twin = drawn.build(CORE), drawn.build(CORE)
    origin, twins = reachable(mine), reachable(twin)
    apply_all(todo, twin)
    assert replay(lambda x: (apply_all(todo, x), x)[1], (mine,), {}) is mine
    assert portrait(mine, origin=origin) == portrait(twin, origin=twins)


def test_replay_gives_no_tracer_away():
    layer = Affine()

    def leak(x):
        replay(lambda m: m.calls.set_value(x), (layer,), {})
        return x

    with pytest.raises(TraceError, match=r"Count at args\[0\]\.calls"):
        jax.jit(leak)(1.0)
    assert int(layer.calls[...]) == 0

    def grow(x):
        replay(lambda m: setattr(m, "new", x), (), {"m": layer})
        return x

    with pytest.raises(TraceError, match=r"Affine at kwargs\.m"):
        jax.jit(grow)(1.0)


def test_a_replay_that_raises_changes_nothing():
    layer = Affine()
    before = portrait(layer)

    def fail(m):
        m.calls[...] += 1
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        replay(fail, (layer,), {})
    assert portrait(layer) == before


# ---- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set_graph_mode", "set_graph_updates"])
def test_modes_hold_where_flax_nnx_lets_them_hold(name):
    def story(mode):
        seen = [mode.current_value()]
        with mode(False):
            seen.append(mode.current_value())
        seen.append(mode.current_value())
        f = mode(False)(mode.current_value)
        seen += [mode.current_value(), f(), mode.current_value()]
        mode(False)
        seen.append(mode.current_value())
        mode(True)
        return seen

    assert story(getattr(modes, name)) == story(getattr(flax_nnx, name))


def test_modes_end_with_an_exception():
    with pytest.raises(RuntimeError, match="no"), modes.set_graph_mode(False):
        raise RuntimeError("no")
    assert modes.sharing_allowed(None)
    assert not modes.sharing_allowed(False)
    assert not modes.updates_allowed(False)


def test_var_defaults_as_flax_nnx():
    def story(n_defaults):
        seen = [dict(n_defaults()), len(n_defaults())]
        with n_defaults(ref=True):
            seen += [n_defaults()["ref"], n_defaults().hijax]
        return [*seen, n_defaults(ref=True)(lambda: n_defaults().ref)(), n_defaults().ref]

    assert story(modes.var_defaults) == story(flax_nnx.var_defaults)


def test_count_is_a_variable_of_our_own():
    assert Count in {type(v) for _, v in flatten(Affine())[1]}
