"""State: nested mappings from paths to Variables; pure data."""

import copy
import pickle
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import nnx_core as nnx
from tests.strategies import LAW, Affine, graphs
from tests.tolerance import assert_trees_equal


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Affine(2, 3), Affine(3, 4, seed=1)])
        self.mean = nnx.BatchStat(jnp.zeros(3))
        self.table = jnp.arange(2)
        self.width = 3


PATHS = (
    ("layers", 0, "calls"),
    ("layers", 0, "kernel"),
    ("layers", 1, "calls"),
    ("layers", 1, "kernel"),
    ("mean",),
    ("table",),
)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def state(net):
    return nnx.state(net)


# ---- a mapping -------------------------------------------------------------------------------------------------


def test_nested_levels_are_states_with_attributes_and_items(net, state):
    assert isinstance(state, nnx.State)
    assert isinstance(state["layers"], nnx.State)
    assert state["layers"][1]["kernel"] is net.layers[1].kernel
    assert state.layers[1].kernel is net.layers[1].kernel
    assert state["mean"] is state.mean is net.mean


def test_list_items_have_int_keys(state):
    assert list(state["layers"]) == [0, 1]


def test_it_is_a_mapping(state):
    assert sorted(state) == ["layers", "mean", "table"]
    assert len(state) == 3
    assert "mean" in state
    assert state.get("nosuch") is None
    with pytest.raises(KeyError, match="nosuch"):
        state["nosuch"]
    with pytest.raises(AttributeError, match="nosuch"):
        state.nosuch  # noqa: B018


def test_writing_through_a_nested_level_writes_the_state(state):
    state["layers"][0]["kernel"] = nnx.Param(jnp.zeros(1))
    state["extra"] = {"deep": nnx.Cache(jnp.ones(1))}
    del state["mean"]
    assert state["layers"][0]["kernel"].shape == (1,)
    assert isinstance(state["extra"]["deep"], nnx.Cache)
    assert "mean" not in state


def test_writing_a_state_leaves_the_module_alone(net, state):
    kernel = net.layers[0].kernel
    state["layers"][0]["kernel"] = nnx.Param(jnp.zeros(1))
    assert net.layers[0].kernel is kernel


def test_equality_compares_structure_and_values(net):
    assert nnx.state(net) == nnx.state(nnx.clone(net))
    other = nnx.clone(net)
    other.mean[...] = jnp.ones(3)
    assert nnx.state(net) != nnx.state(other)
    assert nnx.State({"a": 1}) == nnx.State({"a": 1})
    assert nnx.State({"a": 1}) != nnx.State({"b": 1})


def test_union_and_difference():
    a, b = nnx.State({"x": {"p": 1, "q": 2}}), nnx.State({"x": {"q": 3}, "y": 4})
    assert (a | b).to_pure_dict() == {"x": {"p": 1, "q": 3}, "y": 4}
    assert (a - b).to_pure_dict() == {"x": {"p": 1}}
    assert a.to_pure_dict() == {"x": {"p": 1, "q": 2}}


def test_construction_copies_the_mapping():
    source = {"a": {"b": 1}}
    state = nnx.State(source)
    state["a"]["b"] = 2
    assert source == {"a": {"b": 1}}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_separate(state, duplicate):
    twin = duplicate(state)
    assert twin == state
    del twin["layers"]
    assert "layers" in state


def test_repr_shows_paths_and_kinds(state):
    text = repr(state)
    assert text.startswith("State")
    assert "Param(" in text
    assert "'mean'" in text


# ---- flat ------------------------------------------------------------------------------------------------------


def test_flat_state_is_sorted_pairs(net, state):
    flat = nnx.to_flat_state(state)
    assert flat.paths == PATHS
    assert flat.leaves[1] is net.layers[0].kernel
    assert [path for path, _ in flat] == list(PATHS)
    assert len(flat) == len(PATHS)
    assert flat[0] == (PATHS[0], net.layers[0].calls)
    assert state.flat_state().paths == PATHS


def test_flat_and_back(state):
    assert nnx.from_flat_state(nnx.to_flat_state(state)) == state
    assert nnx.State.from_flat_path(dict(nnx.to_flat_state(state))) == state
    assert nnx.from_flat_state({("a", "b"): 1}).to_pure_dict() == {"a": {"b": 1}}


def test_more_than_ten_list_items_keep_their_order():
    items = nnx.List([nnx.Param(jnp.float32(i)) for i in range(12)])
    assert [path for path, _ in nnx.to_flat_state(nnx.state(items))] == [(i,) for i in range(12)]
    assert [float(x) for x in nnx.merge(*nnx.split(items))] == list(range(12))


# ---- filter, split, merge --------------------------------------------------------------------------------------


def test_filter_keeps_the_matching_part(state):
    assert list(nnx.to_flat_state(state.filter(nnx.Param)).paths) == [PATHS[1], PATHS[3]]
    params, stats = state.filter(nnx.Param, nnx.BatchStat)
    assert list(stats) == ["mean"]
    assert nnx.filter_state(state, nnx.Param) == params


def test_the_first_matching_filter_wins(state):
    first, second = state.filter(nnx.Param, nnx.Variable)
    assert list(nnx.to_flat_state(first).paths) == [PATHS[1], PATHS[3]]
    assert list(nnx.to_flat_state(second).paths) == [PATHS[0], PATHS[2], PATHS[4]]


def test_split_must_be_exhaustive(state):
    params, rest = state.split(nnx.Param, ...)
    assert nnx.merge_state(params, rest) == state
    assert nnx.State.merge(params, rest) == state
    assert nnx.split_state(state, nnx.Param, ...) == (params, rest)
    with pytest.raises(ValueError, match=r"(?s)[Nn]on-exhaustive filters.*`\.\.\.`"):
        state.split(nnx.Param)


@pytest.mark.parametrize("everything", [..., True])
def test_everything_may_stand_only_at_the_end(state, everything):
    with pytest.raises(ValueError, match=r"can only be used as the last filter"):
        state.split(everything, nnx.Param)


def test_later_states_win_in_a_merge():
    merged = nnx.merge_state(nnx.State({"a": {"x": 1, "y": 2}}), {"a": {"y": 3}}, nnx.State({"b": 4}))
    assert merged.to_pure_dict() == {"a": {"x": 1, "y": 3}, "b": 4}


@given(graphs())
@LAW
def test_merge_inverts_split(graph):
    state = nnx.state(graph)
    for filters in [(...,), (nnx.Param, ...), (nnx.Variable, nnx.Nothing(), ...)]:
        parts = state.split(*filters)
        parts = parts if isinstance(parts, tuple) else (parts,)
        assert nnx.to_flat_state(nnx.merge_state(*parts)).paths == nnx.to_flat_state(state).paths
        assert all(
            a is b
            for a, b in zip(
                nnx.to_flat_state(nnx.merge_state(*parts)).leaves, nnx.to_flat_state(state).leaves, strict=True
            )
        )


def test_map_gets_path_and_value(state):
    shown = nnx.map_state(lambda path, value: ".".join(map(str, path)), state)
    assert shown["layers"][1]["kernel"] == "layers.1.kernel"
    assert state.map(lambda path, value: 0).to_pure_dict()["mean"] == 0


# ---- pure dicts ------------------------------------------------------------------------------------------------


def test_pure_dict_holds_arrays_under_the_same_keys(net, state):
    pure = nnx.to_pure_dict(state)
    assert_trees_equal(pure["layers"][0]["kernel"], net.layers[0].kernel.get_value())
    assert_trees_equal(pure["table"], jnp.arange(2))
    assert type(pure["layers"]) is dict
    assert_trees_equal(pure, state.to_pure_dict())


def test_pure_dict_with_an_extract_function(state):
    kinds = nnx.to_pure_dict(state.filter(nnx.Variable), lambda v: v.type.__name__)
    assert kinds["layers"][0] == {"calls": "Count", "kernel": "Param"}


def test_replace_by_pure_dict_and_back(net, state):
    pure = jax.tree.map(lambda x: x + 1, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    assert_trees_equal(nnx.to_pure_dict(state), pure)
    assert isinstance(state["layers"][0]["kernel"], nnx.Param)
    nnx.update(net, state)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(net)), pure)


def test_replace_by_a_part_of_a_pure_dict(state):
    before = nnx.to_pure_dict(state)
    state.replace_by_pure_dict({"mean": jnp.ones(3)})
    assert_trees_equal(nnx.to_pure_dict(state), {**before, "mean": jnp.ones(3)})


def test_row21_digit_strings_of_a_checkpoint_find_their_layers(state):
    nnx.replace_by_pure_dict(state, {"layers": {"1": {"kernel": jnp.zeros((3, 4))}}})
    assert_trees_equal(state["layers"][1]["kernel"].get_value(), jnp.zeros((3, 4)))
    assert nnx.restore_int_paths({"a": {"0": 1, "b": {"12": 2}}}) == {"a": {0: 1, "b": {12: 2}}}


def test_row11_replacing_unknown_paths_lists_all_of_them(state):
    before = nnx.to_pure_dict(state)
    wrong = {"mean": jnp.ones(3), "nosuch": jnp.ones(1), "layers": {0: {"kernl": jnp.ones(1)}}}
    with pytest.raises(ValueError, match=r"(?s)layers\[0\]\.kernl.*nosuch"):
        nnx.replace_by_pure_dict(state, wrong)
    assert_trees_equal(nnx.to_pure_dict(state), before)  # nothing was written


# ---- as a pytree -----------------------------------------------------------------------------------------------


def test_tree_map_reaches_arrays_and_keeps_variables(net, state):
    doubled = jax.tree.map(lambda x: x * 2, state)
    assert isinstance(doubled, nnx.State)
    assert isinstance(doubled["layers"][0]["kernel"], nnx.Param)
    assert doubled["layers"][0]["kernel"] is not net.layers[0].kernel
    assert_trees_equal(doubled["table"], jnp.arange(2) * 2)


def test_treedefs_are_equal_iff_paths_and_kinds_are(net):
    structure = jax.tree.structure
    assert structure(nnx.state(net)) == structure(nnx.state(Net()))
    assert hash(structure(nnx.state(net))) == hash(structure(nnx.state(Net())))
    assert structure(nnx.state(net)) != structure(nnx.state(net, nnx.Param))


def test_leaf_paths_name_the_keys(state):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert [tuple(key.key for key in path[: len(want)]) for path, want in zip(paths, PATHS, strict=True)] == list(PATHS)


def test_a_state_crosses_jax_jit(state):
    out = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))(state)
    assert_trees_equal(nnx.to_pure_dict(out), jax.tree.map(lambda x: x + 1, nnx.to_pure_dict(state)))


# ---- depth -----------------------------------------------------------------------------------------------------------

DEPTH = 1000


def deep_state(depth=DEPTH):
    mapping = {"w": nnx.Param(jnp.ones(1))}
    for _ in range(depth):
        mapping = {"w": nnx.Param(jnp.ones(1)), "next": mapping}
    return nnx.State.over(mapping)


DEEP = {
    "State": nnx.State,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "nested": lambda s: nnx.to_nested_state(nnx.to_flat_state(s)),
    "filter": lambda s: nnx.filter_state(s, nnx.Param),
    "split": lambda s: nnx.split_state(s, nnx.Param, ...)[0],
    "merge": lambda s: nnx.merge_state(s, s),
    "map": lambda s: nnx.map_state(lambda path, x: x, s),
    "pure": lambda s: nnx.State(nnx.restore_int_paths(nnx.to_pure_dict(s))).map(lambda path, x: nnx.Param(x)),
    "or": lambda s: s | s,
}


@pytest.mark.parametrize("act", DEEP.values(), ids=DEEP)
def test_a_deep_state_has_no_limit_of_its_own(act):
    state = deep_state()
    result = act(state)
    flat = nnx.to_flat_state(result)
    assert len(flat) == DEPTH + 1
    assert set(flat.paths) == set(nnx.to_flat_state(state).paths)
    assert result == state


@pytest.mark.slow
def test_a_deep_state_is_written():
    state = deep_state()
    values = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, values)
    assert not (state - state)


@pytest.mark.slow
def test_a_deep_state_is_shown():
    # Each level says how large it is: less deep, or this takes ten seconds. A call a level would not do for this, too.
    assert repr(deep_state(sys.getrecursionlimit() // 3)).startswith("State({")
