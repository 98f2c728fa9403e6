"""Laws of plain trees, and which layout is recognised by what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

from bridge._errors import CheckpointLayoutError, VariablesMismatchError
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Kind, TreeStructureError, collection_of, detect, flatten, nest
from bridge.checkpoint.tree.tree import Tree

KEYS = st.text(alphabet="ab/.0_é ", min_size=0, max_size=4)
LEAVES = st.one_of(st.integers(), st.none(), st.just({}))
TREES = st.recursive(
    LEAVES,
    lambda sub: st.one_of(st.dictionaries(KEYS, sub, min_size=1, max_size=3), st.lists(sub, min_size=1, max_size=3)),
    max_leaves=12,
)


def list_paths(tree, path=()):
    below = layout.children(tree) or []
    return ([path] if isinstance(tree, list) else []) + [p for k, c in below for p in list_paths(c, (*path, k))]


@given(TREES)
def test_nest_inverts_flatten(tree):
    assert nest(flatten(tree), list_paths(tree)) == tree


@given(TREES)
def test_map_leaves_with_identity_is_identity(tree):
    assert layout.map_leaves(lambda path, leaf: leaf, tree) == tree


def deep(levels, leaf=1):
    for level in range(levels):
        leaf = {"k": leaf} if level % 2 else [leaf]
    return leaf


def test_trees_are_deeper_than_pythons_stack():
    path = ("k", "0") * 1_500
    boxed, tree = deep(3_000, {"value": 1}), deep(3_000)
    lists = [path[:depth] for depth in range(1, 3_000, 2)]
    for same in (tree, layout.unbox(boxed, [path]), layout.nest({path: 1}, lists)):
        assert flatten(same) == {path: 1}
    assert flatten(layout.map_leaves(lambda at, leaf: len(at) + leaf, tree)) == {path: 3_001}
    leaves = {path: layout.Leaf(path, (), "int8", 1), ("a",): layout.Leaf(("a",), (), "int8", 1)}
    assert Tree(leaves).order == (path, ("a",))


@pytest.mark.parametrize("container", [dict, list])
def test_a_container_that_holds_itself(container):
    tree = {"a": 1, "b": {}} if container is dict else [{}, 1]
    tree["b" if container is dict else 0] = tree
    text = r"(?s)the tree is too deep: (b/b/b|0/0/0)/\.\.\..*at most 5000 levels.*more.*take it out"
    for walked in (flatten, lambda tree: layout.map_leaves(lambda path, leaf: leaf, tree)):
        with pytest.raises(CheckpointLayoutError, match=text):
            walked(tree)


def test_fold_asks_parents_first_and_makes_children_first():
    asked, made = [], []

    def enter(path, node):
        asked.append(path)
        return layout.children(node) if path != ("b",) else None

    def leave(path, node, parts):
        made.append(path)
        return node if parts is None else dict(parts)

    tree = {"a": [1, 2], "b": {"c": 3}, "d": {}}
    assert layout.fold(tree, enter, leave) == {"a": {"0": 1, "1": 2}, "b": {"c": 3}, "d": {}}
    assert asked == [(), ("a",), ("a", "0"), ("a", "1"), ("b",), ("d",)]
    assert made == [("a", "0"), ("a", "1"), ("a",), ("b",), ("d",), ()]


def test_flatten_knows_every_container():
    state = optax.masked(optax.adam(0.1), {"w": True, "b": False}).init({"w": jnp.ones(2), "b": jnp.ones(1)})
    paths = set(flatten({"s": state, "f": freeze({"x": 1}), "box": nn.Partitioned(jnp.ones(1), names=("i",))}))
    assert ("s", "inner_state", "0", "mu", "w") in paths
    assert ("s", "inner_state", "0", "mu", "b") in paths  # MaskedNode: without content, but there
    assert ("s", "inner_state", "1") in paths  # EmptyState
    assert {("f", "x"), ("box", "value")} <= paths


def test_map_leaves_keeps_types():
    tree = (freeze({"a": 1}), nn.Partitioned(jnp.ones(1), names=("i",)), optax.EmptyState(), [2])
    mapped = layout.map_leaves(lambda path, leaf: leaf * 2, tree)
    assert mapped[0] == freeze({"a": 2})
    assert mapped[1].names == ("i",)
    assert float(mapped[1].value[0]) == 2.0
    assert mapped[2:] == (optax.EmptyState(), [4])


@pytest.mark.parametrize(
    ("leaves", "sequences", "text"),
    [
        ({("a",): 1, ("a", "b"): 2}, (), "a: is a leaf and has leaves below it"),
        ({("a", "b"): 2, ("a",): 1}, (), "a: is a leaf and has leaves below it"),
        ({(): 1, ("a",): 2}, (), r"\(root\): is a leaf"),
        ({("a", "0"): 1, ("a", "2"): 2}, [("a",)], "a: is a list with the indices 0, 2"),
    ],
)
def test_paths_that_are_no_tree(leaves, sequences, text):
    with pytest.raises(TreeStructureError, match=text):
        nest(leaves, sequences)


def paths(*texts):
    return [tuple(text.split()) for text in texts]


@pytest.mark.parametrize(
    ("found", "kind", "reason"),
    [
        (
            paths("step", "params D kernel", "opt_state 0 count"),
            Kind.LINEN_TRAIN_STATE,
            "step, params, opt_state",
        ),
        (
            paths("step", "params D kernel value", "opt_state 0 mu D kernel value"),
            Kind.LINEN_TRAIN_STATE,
            "top-level",
        ),
        (
            paths("step", "params params D kernel", "params batch_stats B mean", "opt_state 0 count"),
            Kind.LINEN_NESTED_TRAIN_STATE,
            "params holds collections: batch_stats, params",
        ),
        (
            paths("params D kernel", "batch_stats B mean"),
            Kind.LINEN_VARIABLES,
            "collections: params, batch_stats",
        ),
        (paths("params D kernel value"), Kind.LINEN_VARIABLES, "params"),
        (paths("params params D kernel"), Kind.LINEN_NESTED_TRAIN_STATE, "params"),
        (paths("batch_stats B mean"), Kind.LINEN_VARIABLES, "batch_stats"),
        (paths("Dense_0 kernel", "Dense_0 bias"), Kind.PARAMS_ONLY, "module names: Dense_0"),
        (paths("layer kernel value", "layer bias value"), Kind.NNX_STATE, "all paths end in 'value'"),
        (paths("layer kernel", "drop rngs dropout count"), Kind.NNX_STATE, "rngs"),
        (paths("model layer kernel value", "optimizer step value"), Kind.NNX_TRAINING, "model, optimizer"),
        (paths("0 layer kernel value", "1 step value"), Kind.NNX_TRAINING, "0, 1"),
        (paths("step", "opt_state 0 count"), Kind.UNKNOWN, "no params among them"),
        (paths("kernel"), Kind.UNKNOWN, "no params"),
        ([], Kind.UNKNOWN, "no leaves"),
        ([()], Kind.UNKNOWN, "one array"),
    ],
)
def test_detect(found, kind, reason):
    got = detect(found)
    assert got.kind is kind
    assert reason in got.reason


def test_a_module_called_params_is_no_double_nesting():
    assert detect(paths("step", "params params kernel", "params Dense_0 kernel")).kind is Kind.LINEN_TRAIN_STATE


def test_boxes_are_lone_value_levels():
    got = detect(paths("step", "params D kernel value", "params E value", "params E scale", "opt_state 0 count"))
    assert got.boxed == {("params", "D", "kernel")}


@given(st.lists(st.lists(KEYS, max_size=4).map(tuple), max_size=6))
def test_detect_never_raises(found):
    got = detect(found)
    assert got.reason
    assert all(isinstance(collection_of(path, got.kind), str) for path in found)


@pytest.mark.parametrize(
    ("path", "kind", "collection"),
    [
        ("params D kernel", Kind.LINEN_TRAIN_STATE, "params"),
        ("opt_state 0 mu D kernel", Kind.LINEN_TRAIN_STATE, "opt_state"),
        ("params batch_stats B mean", Kind.LINEN_NESTED_TRAIN_STATE, "batch_stats"),
        ("D kernel", Kind.PARAMS_ONLY, "params"),
        ("drop rngs dropout key value", Kind.NNX_STATE, "rngs"),
        ("1 opt_state 0 mu w value", Kind.NNX_TRAINING, "opt_state"),
        ("optimizer step value", Kind.NNX_TRAINING, "optimizer"),
        ("model w value", Kind.NNX_TRAINING, "model"),
        ("", Kind.UNKNOWN, "-"),
    ],
)
def test_collection_of(path, kind, collection):
    assert collection_of(tuple(path.split()), kind) == collection


def test_collections_are_told_from_other_fields():
    params = {"B": {"scale": 1}, "D": {"kernel": {"value": 2}}}
    tree = {
        "step": 0,
        "params": params,
        "opt_state": [None],
        "batch_stats": {"B": {"mean": 1}},
        "ema_params": params,
        "dropout_rng": 3,
        "my_stats": {"B": {"seen": 1}},
        "dynamic_scale": {"scale": 1.0},
        "empty": {},
    }
    assert layout.collection_names(tree, params) == ["batch_stats", "my_stats"]


def test_unbox_strips_only_what_it_is_told():
    tree = {"D": {"kernel": {"value": 1}, "gate": {"value": 2}}, "l": [{"value": 3}]}
    assert layout.unbox(tree, [("D", "kernel"), ("l", "0")]) == {
        "D": {"kernel": 1, "gate": {"value": 2}},
        "l": [3],
    }
    assert layout.unbox({"w": {"value": 1}}, [("params", "w")], prefix=("params",)) == {"w": 1}


def test_require_match_lists_everything_at_once():
    want = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1), "gone": jnp.ones(1), "none": None}
    have = {"a": np.ones(4, np.float32), "b": np.ones(3, np.float64), "c": np.ones(1, np.float32), "new": 1.0}
    with pytest.raises(VariablesMismatchError) as caught:
        layout.require_match(want, have)
    error = caught.value
    assert error.missing == [("gone",)]
    assert error.unexpected == [("new",)]
    assert error.wrong_shape == [(("a",), (2,), (4,))]
    assert error.wrong_dtype == [(("b",), "float32", "float64")]


def test_a_python_number_fits_every_scalar_of_its_kind():
    layout.require_match({"step": 0, "x": 1.5}, {"step": jnp.int32(7), "x": jnp.bfloat16(2)})
    layout.require_match({"step": jnp.uint32(0)}, {"step": 7})
    with pytest.raises(VariablesMismatchError, match="step: expected int64, found float32"):
        layout.require_match({"step": 0}, {"step": jnp.float32(7)})
    with pytest.raises(VariablesMismatchError, match=r"step: expected \(\), found \(1,\)"):
        layout.require_match({"step": 0}, {"step": jnp.ones(1, "int32")})
    with pytest.raises(VariablesMismatchError, match="flag: expected bool, found int32"):
        layout.require_match({"flag": True}, {"flag": jnp.int32(1)})


def test_describe_reads_no_values():
    assert layout.describe(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)) == ((2, 3), "bfloat16")
    assert layout.describe(jax.random.key(0)) == ((), "key<fry>")
