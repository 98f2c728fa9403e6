"""Every layer of the matrix in FromFlax and in AsFlax: outputs, effects and compiled calls are those of the layer."""

import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge.flax_nnx import AsFlax, FromFlax
from tests.layers import LAYERS
from tests.support.both_libraries import plain
from tests.tolerance import assert_trees_equal

SIDES = {"FromFlax": (FromFlax, flax_nnx, nnx), "AsFlax": (AsFlax, nnx, flax_nnx)}
#: Layers that the suite itself runs; the others are the grid.
DIAGONAL = {"Linear", "Conv", "BatchNorm", "LayerNorm", "Embed", "WeightNorm", "SpectralNorm", "GRUCell", "Dropout"}
CASES = [
    pytest.param(side, row, id=f"{side}-{row.name}", marks=() if row.name in DIAGONAL else pytest.mark.grid)
    for side in SIDES
    for row in LAYERS
    if side == "AsFlax" or row.in_flax_nnx
]


def call(row, module, x, train):
    if isinstance(row.method, str):
        return getattr(module, row.method)(x, **row.modes[train])
    return row.method(module, x, **row.modes[train])


@pytest.mark.parametrize(("side", "row"), CASES)
def test_a_layer_is_the_same_in_the_other_library(side, row):
    wrap, inner, outer = SIDES[side]
    alone, wrapped = row.make(inner, inner.Rngs(0)), wrap(row.make(inner, inner.Rngs(0)))
    x = row.example()
    for train in (True, False):
        try:
            want = call(row, alone, x, train)
        except TypeError:
            pytest.skip("flax.nnx's layer is called otherwise")
        assert_trees_equal(call(row, wrapped, x, train), want)
    assert_trees_equal(plain(outer, wrapped), plain(inner, alone))


@pytest.mark.grid
@pytest.mark.parametrize(("side", "row"), CASES)
def test_a_compiled_layer_is_too(side, row):
    wrap, inner, outer = SIDES[side]
    alone, wrapped = row.make(inner, inner.Rngs(0)), wrap(row.make(inner, inner.Rngs(0)))
    x = row.example()
    try:
        want = inner.jit(lambda module, x: call(row, module, x, True))(alone, x)
    except TypeError:
        pytest.skip("flax.nnx's layer is called otherwise")
    assert_trees_equal(outer.jit(lambda module, x: call(row, module, x, True))(wrapped, x), want)
    assert_trees_equal(plain(outer, wrapped), plain(inner, alone))
