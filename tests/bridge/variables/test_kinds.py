"""Collection names and Variable types are each other's inverse, and made-up types survive a pickle."""

import copy
import pickle

import cloudpickle
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core as nnx
from bridge.variables.kinds import collection_of, variable_type

KNOWN = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "cache": nnx.Cache,
    "intermediates": nnx.Intermediate,
    "perturbations": nnx.Perturbation,
    "RngKey": nnx.RngKey,
    "RngCount": nnx.RngCount,
    "OptState": nnx.OptState,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_collections(name):
    assert variable_type(name) is KNOWN[name]
    assert collection_of(KNOWN[name]) == name


# A type's name can hold neither a null character nor a lone surrogate.
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_name_to_type_and_back(name):
    kind = variable_type(name)
    assert issubclass(kind, nnx.Variable)
    assert variable_type(name) is kind
    assert collection_of(kind) == name


class Ema(nnx.Variable):
    """A user's own type, never registered."""


def test_unregistered_type_is_named_after_its_class():
    assert collection_of(Ema) == "Ema"
    assert variable_type("Ema") is Ema


def test_another_class_under_a_taken_name_is_an_error():
    other = type("Param_", (nnx.Variable,), {})
    collection_of(other)
    with pytest.raises(nnx.NnxError, match="'Param_' is already registered"):
        collection_of(type("Param_", (nnx.Variable,), {"__module__": "elsewhere"}))


@pytest.mark.parametrize("via", [pickle, cloudpickle], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", ["made up/by a user", "ema.v2"])
def test_variables_of_new_types_survive_a_pickle_row49(via, name):
    variable = variable_type(name)(jnp.arange(3))
    for back in (via.loads(via.dumps(variable)), copy.deepcopy(variable)):
        assert type(back) is variable_type(name)
        assert back.get_value().tolist() == [0, 1, 2]
