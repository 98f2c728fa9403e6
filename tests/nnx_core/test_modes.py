"""set_graph_mode and set_graph_updates: what the keywords stand for when they are not given."""

import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core import modes
from nnx_core._errors import SharedReferenceError, StructureUpdateError
from tests.strategies import Affine, Tied


def grow(m):
    m.extra = nnx.Param(jnp.ones(1))


def test_graph_mode_false_forbids_sharing():
    tied = Tied()
    with modes.set_graph_mode(False):
        with pytest.raises(SharedReferenceError, match=r"(?s)shared.*decode.*encode"):
            nnx.split(tied)
        with pytest.raises(SharedReferenceError, match=r"(?s)shared.*args\[0\]"):
            nnx.jit(lambda m: None)(tied)
        nnx.split(tied, graph=True)
    nnx.split(tied)


def test_graph_updates_false_forbids_structure_changes():
    m = Affine()
    with modes.set_graph_updates(False):
        with pytest.raises(StructureUpdateError, match="extra"):
            nnx.jit(grow)(m)
        nnx.jit(grow, graph_updates=True)(m)
    assert m.extra.shape == (1,)
