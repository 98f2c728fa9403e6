"""The structure-driven rule, over the optimizers of optax: rename and back is the identity, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

from bridge._errors import (
    CheckpointLayoutError,
    OptStateOrderError,
    RenameClashError,
    VariablesMismatchError,
)
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.opt_state import (
    Place,
    find_param_nodes,
    order_dependent,
    param_shapes,
    places,
    rename_params,
    restore_into_structure,
    to_linen_layout,
    to_nnx_layout,
    to_raw,
)
from tests.support.optimizers import (
    BACK,
    OPTIMIZERS,
    RENAMED,
    each_deterministic,
    each_optimizer,
    each_renameable,
    filled,
    rename_tree,
    schedule,
    trained,
    update,
)
from tests.tolerance import assert_trees_close


def as_numpy(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


def assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = as_numpy(a), as_numpy(b)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@each_renameable
def test_rename_and_back_is_identity_on_live_states(name):
    _, params, state = filled(name)
    there = rename_params(state, param_shapes(params), RENAMED.__getitem__)
    back = rename_params(there, param_shapes(rename_tree(params, RENAMED)), BACK.__getitem__)
    assert_identical(back, state)
    assert type(back) is type(state)


@each_renameable
def test_renamed_state_has_the_keys_that_init_gives_on_renamed_params(name):
    """The oracle: `tx.init` on params that were renamed first."""
    tx, params, state = filled(name)
    renamed = rename_params(state, param_shapes(params), RENAMED.__getitem__)
    template = jax.eval_shape(tx.init, rename_tree(params, RENAMED))
    assert_identical(restore_into_structure(template, to_raw(renamed)), renamed)


@each_optimizer
def test_raw_tree_is_restored_into_the_structure_of_init(name):
    tx, params, state = filled(name)
    raw = to_raw(state)
    assert to_raw(raw) == raw
    assert_identical(restore_into_structure(jax.eval_shape(tx.init, params), raw), state)


def test_a_live_state_is_a_template_too():
    tx, params, state = trained("multi_transform")
    assert_identical(restore_into_structure(tx.init(params), to_raw(state)), state)


@pytest.mark.sample(4)
@each_deterministic
def test_next_update_is_equal_under_new_names(name):
    tx, params, state = trained(name)
    tx2, params2 = OPTIMIZERS[name](), rename_tree(params, RENAMED)
    state2 = restore_into_structure(
        tx2.init(params2), to_raw(rename_params(state, param_shapes(params), RENAMED.__getitem__))
    )
    grads = jax.tree.map(jnp.cos, params)
    updates, _ = update(tx, grads, state, params)
    updates2, _ = update(tx2, rename_tree(grads, RENAMED), state2, params2)
    # not to the bit: sums over all leaves (global norm, prodigy's distance) run in the order of the names
    assert_trees_close(rename_tree(updates2, BACK), updates)


@each_optimizer
def test_nnx_layout_and_back_is_identity(name):
    tx, params, state = filled(name)
    raw = to_raw(state)
    there = to_nnx_layout(state, param_shapes(params))
    template = jax.eval_shape(tx.init, params)
    assert to_linen_layout(there, template) == raw
    assert_identical(restore_into_structure(template, there), state)


def test_nnx_layout_keeps_masked_params_and_drops_empty_states():
    _, params, state = filled("masked")
    nnx = to_nnx_layout((state, optax.EmptyState()), param_shapes(params))
    assert list(nnx) == [0]
    mu = nnx[0]["inner_state"][0]["mu"]
    assert mu["Dense_0"]["bias"] is None
    assert mu["Dense_0"]["kernel"].shape == (3, 4)


def test_linen_layout_without_a_template_fills_gaps_only():
    assert to_linen_layout({"0": {"trace": {"w": 1}}, "2": {"count": 3}}) == [
        {"trace": {"w": 1}},
        None,
        {"count": 3},
    ]
    assert to_linen_layout([{1: 2}, None]) == [[None, 2], None]


def test_every_place_has_prefix_param_and_tail():
    _, params, state = filled("sm3")
    found = places(to_raw(state), param_shapes(params))
    tails = {place.tail for place in found.values() if place.param == ("Dense_0", "kernel")}
    assert ("0",) in tails  # SM3 keeps a row and a column below each matrix
    assert ("1",) in tails
    assert all(place.path == path for path, place in found.items())


def test_counts_and_hyperparams_belong_to_no_param():
    _, params, state = filled("inject_hyperparams")
    found = places(state, param_shapes(params))
    loose = {path for path, place in found.items() if place.param is None}
    assert ("count",) in loose
    assert ("hyperparams", "learning_rate") in loose
    assert found[("inner_state", "0", "mu", "Dense_0", "bias")] == Place(
        ("inner_state", "0", "mu"), ("Dense_0", "bias"), ()
    )


def test_largest_nodes_are_found():
    _, params, state = filled("adam")
    assert find_param_nodes(state, param_shapes(params)) == [("0", "mu"), ("0", "nu")]


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_a_root_param_called_count_is_not_taken_for_the_counter(shape):
    params = {"count": jnp.ones(shape), "w": jnp.ones(2)}
    tx = optax.adamw(schedule())
    state = tx.init(params)
    renamed = rename_params(state, param_shapes(params), lambda path: ("new", *path))
    wanted = jax.eval_shape(tx.init, {"new": params})
    assert jax.tree.structure(renamed) == jax.tree.structure(wanted)
    alone = {"count": params["count"]}
    renamed = rename_params(tx.init(alone), param_shapes(alone), lambda path: ("new", *path))
    assert jax.tree.structure(renamed) == jax.tree.structure(jax.eval_shape(tx.init, {"new": alone}))


@pytest.mark.parametrize("name", ["trace", "0", "w"])
def test_a_root_param_with_the_name_of_a_slot_an_index_or_a_label(name):
    params = {name: jnp.ones(3), "v": jnp.ones(2)}
    tx = optax.multi_transform({name: optax.sgd(0.1, momentum=0.9), "v": optax.adam(0.1)}, {name: name, "v": "v"})
    state, shapes = tx.init(params), param_shapes(params)
    label = {"new": {name: name, "v": "v"}}
    wanted = optax.multi_transform({name: optax.sgd(0.1, momentum=0.9), "v": optax.adam(0.1)}, label)
    template = jax.eval_shape(wanted.init, {"new": params})
    for tree in (state, to_raw(state)):
        renamed = rename_params(tree, shapes, lambda path: ("new", *path))
        assert jax.tree.structure(restore_into_structure(template, renamed)) == jax.tree.structure(template)


def test_boxed_params_keep_their_boxes():
    params = {"D": {"kernel": nn.Partitioned(jnp.ones((2, 2)), names=("i", "o")), "bias": jnp.ones(2)}}
    state = optax.adam(0.1).init(params)
    renamed = rename_params(state, param_shapes(params), lambda path: ("d", path[1]))
    assert isinstance(renamed[0].mu["d"]["kernel"], nn.Partitioned)
    raw = to_raw(state)
    assert raw[0]["mu"]["D"]["kernel"].keys() == {"value"}
    place = places(raw, param_shapes(params))[("0", "mu", "D", "kernel", "value")]
    assert (place.param, place.tail) == (("D", "kernel"), ("value",))


def test_frozen_dicts_stay_frozen():
    params = freeze({"D": {"kernel": jnp.ones((2, 2))}})
    state = optax.adam(0.1).init(params)
    renamed = rename_params(state, param_shapes(params), lambda path: ("d", "w"))
    assert type(renamed[0].mu) is type(params)
    assert renamed[0].mu["d"]["w"].shape == (2, 2)


def test_empty_submodules_are_no_hindrance():
    params = {"Dropout_0": {}, "D": {"kernel": jnp.ones((2, 2))}}
    state = optax.adam(0.1).init(params)
    renamed = rename_params(state, param_shapes(params), lambda path: ("d", "w"))
    assert set(layout.flatten(renamed[0].mu)) == {("Dropout_0",), ("d", "w")}


def test_flat_vectors_are_refused():
    _, params, state = filled("flatten")
    shapes = param_shapes(params)
    assert order_dependent(state, shapes) == [("0", "mu"), ("0", "nu")]
    reversed_names = {path: (f"{9 - i}", *path) for i, path in enumerate(sorted(shapes))}
    with pytest.raises(OptStateOrderError, match="0/mu"):
        rename_params(state, shapes, reversed_names.__getitem__)
    assert_identical(rename_params(state, shapes, lambda path: ("same", *path)), state)  # order kept: allowed


def test_renames_that_clash():
    params = {"a": {"w": jnp.ones(1)}, "b": {"w": jnp.ones(1)}}
    state, shapes = optax.adam(0.1).init(params), param_shapes(params)
    with pytest.raises(RenameClashError, match=r"(?s)a/w -> w.*b/w -> w"):
        rename_params(state, shapes, lambda path: ("w",))
    with pytest.raises(RenameClashError, match=r"(?s)a/w -> x.*b/w -> x/y"):
        rename_params(state, shapes, lambda path: ("x",) if path[0] == "a" else ("x", "y"))


def test_a_param_without_a_name_is_refused():
    with pytest.raises(CheckpointLayoutError, match="a single array without a name"):
        find_param_nodes(optax.adam(0.1).init(jnp.ones(2)), param_shapes(jnp.ones(2)))


def test_restore_lists_everything_that_is_wrong():
    tx, params = optax.adam(0.1), {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}
    raw = to_raw(tx.init(params))
    raw[0]["mu"] = {"a": jnp.ones(5), "b": jnp.ones(3, jnp.bfloat16), "d": jnp.ones(1)}
    with pytest.raises(VariablesMismatchError) as caught:
        restore_into_structure(tx.init(params), raw, source="the checkpoint /x")
    error = caught.value
    assert error.missing == [("0", "mu", "c")]
    assert error.unexpected == [("0", "mu", "d")]
    assert error.wrong_shape == [(("0", "mu", "a"), (2,), (5,))]
    assert error.wrong_dtype == [(("0", "mu", "b"), "float32", "bfloat16")]
    assert "the checkpoint /x and the optimizer state do not match" in str(error)


def test_a_param_masked_on_one_side_only_is_an_error():
    _, params, state = filled("masked")
    raw = to_raw(state)
    raw["inner_state"][0]["mu"]["Dense_0"]["kernel"] = None
    with pytest.raises(VariablesMismatchError, match="1 missing"):
        restore_into_structure(state, raw)
    raw = to_raw(optax.adam(1e-2).init(params))
    with pytest.raises(VariablesMismatchError, match="8 unexpected"):
        restore_into_structure(state.inner_state, raw)


def test_another_optimizer_is_an_error_that_names_paths():
    _, params, state = filled("adam")
    with pytest.raises(VariablesMismatchError, match=r"(?s)0/trace/Dense_0/kernel.*unexpected.*0/mu/Dense_0/kernel"):
        restore_into_structure(OPTIMIZERS["momentum"]().init(params), to_raw(state))


def test_numpy_leaves_become_jax_arrays_and_numbers_stay():
    tx, params = optax.adam(0.1), {"w": jnp.ones(2)}
    raw = jax.tree.map(np.asarray, to_raw(tx.init(params)))
    state = restore_into_structure(jax.eval_shape(tx.init, params), raw)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert restore_into_structure({"step": 0, "n": jnp.uint32(0)}, {"step": np.int32(7), "n": 3}) == {
        "step": 7,
        "n": jnp.uint32(3),
    }


NAMES = st.text(alphabet="ab/.01", min_size=1, max_size=3)
SHAPES = st.sampled_from([(), (1,), (2,), (2, 3)])
PARAMS = st.dictionaries(
    NAMES,
    st.recursive(SHAPES, lambda sub: st.dictionaries(NAMES, sub, min_size=1, max_size=3), max_leaves=4),
    min_size=1,
    max_size=3,
)


@given(PARAMS, st.sampled_from(["adam", "adafactor", "masked", "multi_transform", "sm3", "novograd"]))
def test_rename_and_back_on_drawn_params(shapes, name):
    if name == "sm3":
        shapes = jax.tree.map(lambda s: s or (1,), shapes, is_leaf=lambda s: isinstance(s, tuple))
    params = jax.tree.map(
        lambda s: np.arange(np.prod(s, dtype=int), dtype=np.float32).reshape(s),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    abstract = jax.eval_shape(OPTIMIZERS[name]().init, params)
    state = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), abstract)
    old = param_shapes(params)
    table = {path: ("new", f"{len(old) - i}", *path) for i, path in enumerate(sorted(old))}
    there = rename_params(state, old, table.__getitem__)
    back = rename_params(
        there,
        {table[path]: shape for path, shape in old.items()},
        {v: k for k, v in table.items()}.__getitem__,
    )
    assert_identical(back, state)


# ---- depth -------------------------------------------------------------------------------------------------


def test_params_are_deeper_than_pythons_stack():
    names = ("m",) * 2_000
    tree = {"w": np.ones(2)}
    for name in names:
        tree = {name: tree}
    path, renamed = (*names, "w"), ("first", *names[1:], "w")
    params = param_shapes(tree)
    assert params == {path: (2,)}
    state = [{"count": 0, "mu": tree}, None]
    assert find_param_nodes(state, params) == [("0", "mu")]
    moved = rename_params(state, params, lambda old: renamed)
    kept = to_nnx_layout(moved, {renamed: (2,)})
    leaves = layout.flatten(to_linen_layout(kept))
    assert list(leaves) == [("0", "count"), ("0", "mu", *renamed)]
    assert layout.flatten(to_raw(moved)).keys() == {*leaves, ("1",)}
