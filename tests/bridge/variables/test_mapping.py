"""Law 6: variables -> attributes -> variables is the identity, over hostile trees."""

from collections.abc import Mapping
from typing import Any

import jax
import pytest
from flax.core import freeze
from hypothesis import example, given
from hypothesis import strategies as st

import nnx_core as nnx
from bridge.variables.mapping import leaves, linen_vars_to_nnx_attrs, name_of, nnx_attrs_to_linen_vars, tree_of
from tests.support.variable_trees import COLLECTIONS, array, dict_of, names, variables


def assert_round_trip(tree: Mapping[str, Any]) -> None:
    assert dict_of(nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(tree))) == dict_of(tree)


@pytest.mark.slow
@given(variables)
@example({"params": {"w": array(1)}, "ema": {"w": array(2)}})
@example({"params": {"w": {"k": array(1)}}, "ema": {"w": array(2)}})
@example({"params": {"w@ema": {"k": array(1)}, "w": array(0)}, "ema": {"w": array(2), "w@ema": array(1)}})
@example({"params": {"": {}}, "ema": {}, "": {}})
def test_law6_round_trip_is_the_identity(tree):
    assert_round_trip(tree)


@pytest.mark.slow
@given(variables)
def test_law6_for_frozen_dicts_row31(tree):
    assert_round_trip(freeze(tree))


@pytest.mark.slow
@given(variables)
def test_input_is_not_touched_row16(tree):
    before = dict_of(tree), jax.tree.structure(tree)
    linen_vars_to_nnx_attrs(tree)
    assert (dict_of(tree), jax.tree.structure(tree)) == before


@pytest.mark.slow
@given(variables)
def test_leaves_and_tree_of_are_inverse(tree):
    assert dict_of(tree_of(leaves(tree))) == dict_of(tree)


@given(variables)
def test_keys_of_attributes_are_strings_and_leaves_are_variables(tree):
    def check(attrs):
        for key, child in attrs.items():
            assert type(key) is str
            if not isinstance(child, nnx.Variable):
                assert type(child) is dict
                check(child)

    check(linen_vars_to_nnx_attrs(tree))


def test_path_is_linens_and_collection_is_the_type():
    tree = {"params": {"Dense_0": {"kernel": array(1)}}, "batch_stats": {"Dense_0": {"mean": array(2)}}}
    attrs = linen_vars_to_nnx_attrs(tree)
    assert type(attrs["Dense_0"]["kernel"]) is nnx.Param
    assert type(attrs["Dense_0"]["mean"]) is nnx.BatchStat
    assert attrs["Dense_0"]["kernel"].get_value() is tree["params"]["Dense_0"]["kernel"]


def test_same_name_in_two_collections_row18():
    attrs = linen_vars_to_nnx_attrs({"ema": {"w": array(1)}, "params": {"w": array(2)}})
    assert {key: type(v).__name__ for key, v in attrs.items()} == {"w@ema": "ema", "w": "Param"}


def test_level_and_value_of_one_name_row18():
    attrs = linen_vars_to_nnx_attrs({"params": {"w": array(1)}, "ema": {"w": {"a": array(2)}}})
    assert type(attrs["w@params"]) is nnx.Param
    assert list(attrs["w"]) == ["a"]


def test_order_of_keys_is_kept():
    tree = {"params": {"b": {"z": array(1), "a": array(2)}, "a": array(0)}}
    back = nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(tree))
    assert (list(back["params"]), list(back["params"]["b"])) == (["b", "a"], ["z", "a"])


def test_integer_keys_of_nnx_become_strings_row21():
    state = nnx.state(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))
    assert list(nnx_attrs_to_linen_vars(state)["params"]) == ["0"]


def test_what_is_no_variable_is_left_out_row20():
    assert nnx_attrs_to_linen_vars({"a": 3, "b": {"c": array(1)}, "w": nnx.Param(array(1))}).keys() == {"params"}


@given(names, st.sampled_from(COLLECTIONS))
def test_name_of_a_plain_key(name, collection):
    [key] = linen_vars_to_nnx_attrs({collection: {name: array(1)}})
    assert name_of(key, collection) == name
    if "@" not in name:
        assert key == name
