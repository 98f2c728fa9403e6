"""Nested mappings and flat ones, against flax.nnx."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core as nnx
from nnx_core import traversals as ours
from nnx_core._errors import StateMismatchError
from tests.strategies import LAW

theirs = pytest.importorskip("flax.nnx.traversals", reason="the oracle of this file")

names = st.text("abc", min_size=1, max_size=2)
nested = st.dictionaries(
    names, st.recursive(st.integers(), lambda x: st.dictionaries(names, x, max_size=3)), max_size=3
)


@LAW
@given(nested)
def test_unflatten_inverts_flatten(xs):
    assert ours.unflatten_mapping(ours.flatten_mapping(xs, keep_empty_nodes=True)) == xs
    flat = ours.flatten_mapping(xs, keep_empty_nodes=True, sep="/")
    assert ours.unflatten_mapping(flat, sep="/") == xs


@LAW
@given(nested)
def test_as_flax_nnx(xs):
    assert list(ours.flatten_mapping(xs).items()) == list(theirs.flatten_mapping(xs).items())
    assert ours.flatten_mapping(xs, sep=".") == theirs.flatten_mapping(xs, sep=".")
    assert ours.flatten_to_sequence(xs) == theirs.flatten_to_sequence(xs)
    assert ours.flatten_mapping(xs, is_leaf=lambda path, x: len(path) == 1) == theirs.flatten_mapping(
        xs, is_leaf=lambda path, x: len(path) == 1
    )
    assert ours.unflatten_mapping(ours.flatten_mapping(xs)) == theirs.unflatten_mapping(theirs.flatten_mapping(xs))


def test_states_and_pairs():
    assert ours.flatten_mapping(nnx.State({"a": {0: 1}})) == {("a", 0): 1}
    assert ours.unflatten_mapping([(("a", "b"), 1)]) == {"a": {"b": 1}}
    assert ours.flatten_mapping({"a": 1}, is_leaf=lambda path, x: True) == {(): {"a": 1}}
    assert jax.tree.leaves(ours.empty_node) == jax.tree.leaves(theirs.empty_node) == []


def test_errors():
    with pytest.raises(TypeError, match="Expected a mapping, found int"):
        ours.flatten_mapping(5)
    with pytest.raises(TypeError, match=r"Expected a mapping of paths or .* pairs, found int"):
        ours.unflatten_mapping(5)
    with pytest.raises(TypeError, match=r"Cannot join \('a', 1\) by '/': 1 is no string"):
        ours.flatten_mapping({"a": {1: 2}}, sep="/")
    with pytest.raises(StateMismatchError, match=r"a\.b: expected a nested mapping on the way, found int"):
        ours.unflatten_mapping({("a",): 1, ("a", "b"): 2})
    with pytest.raises(StateMismatchError, match="<root>"):
        ours.unflatten_mapping({(): 2})
