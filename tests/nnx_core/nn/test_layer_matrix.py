"""The equivalence matrix: every layer of the table under grad, vmap, scan over layers and remat.

Each column runs nnx_core's transform on the module, and plain JAX's on the Linen twin as a pure function. What is
measured here and in `test_linen_twin.py` (the column jit, in 13 combinations of dtypes) goes into the test report
and, with `--grids --write-layer-matrix`, into `migration_guide/layer_matrix.md`.
`pytest -m accelerator` runs these tests on whatever `jax.default_backend()` is.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.layer_matrix import PAGE, page_rows
from tests.layers import LAYERS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import (
    forward_and_gradient,
    max_difference,
    same_bits,
    unless_same_program,
    weighted_sum,
    with_gradients,
)

pytestmark = pytest.mark.accelerator

COPIES = 3
CASES = [
    pytest.param(layer, train, id=f"{layer.name}-{'train' if train else 'eval'}")
    for layer in LAYERS
    for train in ((False, True) if layer.modes[True] != layer.modes[False] else (False,))
]
DTYPES = (jnp.float32, jnp.bfloat16)
# Where streams of random numbers are part of the module: they are the same in every copy.
STACKED = nnx.StateAxes({nnx.RngState: None, ...: 0})


def stacked(tree):
    """COPIES of a tree of arrays along a new first axis, each other than the last."""
    return jax.tree.map(
        lambda x: jnp.stack([(x * (1 + i / 4)).astype(x.dtype) for i in range(COPIES)]),
        tree,
    )


def grad(layer, train, dtypes):
    def ours(values, x):
        def loss(module):
            return sum(map(weighted_sum, jax.tree.leaves(layer.call(module, x, **layer.modes[train]))))

        grads = nnx.grad(loss)(layer.module(values, **dtypes))
        flat = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
        return layer.to_linen({path: flat[path] for path in layer.params if path in flat})

    def theirs(values, x):
        grads = with_gradients(layer.functional_twin(train=train, **dtypes))(values, x)["gradients"][0]
        return {path: leaf for path, leaf in grads.items() if path.startswith("params/")}

    return ours, theirs


def vmap(layer, train, dtypes):
    def ours(values, x):
        module, xs = layer.module(stacked(values), **dtypes), stacked(x)
        y = nnx.vmap(lambda m, x: layer.call(m, x, **layer.modes[train]), in_axes=(STACKED, 0))(module, xs)
        return y, layer.read(module)

    def theirs(values, x):
        return jax.vmap(layer.functional_twin(train=train, **dtypes))(stacked(values), stacked(x))

    return ours, theirs


def feedback(carry, y):
    """What one layer's output adds to the next one's input."""
    return carry + sum(weighted_sum(leaf) / leaf.size for leaf in jax.tree.leaves(y)) / 8


def fed(x, carry):
    return (x + carry).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def scan(layer, train, dtypes):
    def ours(values, x):
        def body(carry, module):
            return feedback(carry, layer.call(module, fed(x, carry), **layer.modes[train]))

        module = layer.module(stacked(values), **dtypes)
        carry = nnx.scan(body, in_axes=(nnx.Carry, STACKED), out_axes=nnx.Carry)(jnp.zeros(()), module)
        return carry, layer.read(module)

    def theirs(values, x):
        def body(carry, values):
            y, updated = layer.functional_twin(train=train, **dtypes)(values, fed(x, carry))
            return feedback(carry, y), updated

        if not values:  # nothing to scan over: as many steps as there are copies
            return jax.lax.scan(body, jnp.zeros(()), {}, length=COPIES)
        return jax.lax.scan(body, jnp.zeros(()), stacked(values))

    return ours, theirs


def remat(layer, train, dtypes):
    def call(values, x):
        module = layer.module(values, **dtypes)
        y = nnx.remat(lambda m, x: layer.call(m, x, **layer.modes[train]))(module, x)
        return y, layer.read(module)

    twin = jax.checkpoint(layer.functional_twin(train=train, **dtypes))
    return with_gradients(call), with_gradients(twin)


COLUMNS = {"grad": grad, "vmap": vmap, "scan": scan, "remat": remat}
NO_DIFFERENCE = {
    "grad": {"gradient": 0.0},
    "vmap": {"forward": 0.0},
    "scan": {"forward": 0.0},
    "remat": {"forward": 0.0, "gradient": 0.0},
}


# Rows whose gradients are compared in bfloat16 outside the grid, too: what `nnx.grad` does to a dtype is not the
# layer's; every layer's own gradients in bfloat16 are in `test_linen_twin`.
IN_BFLOAT16 = {"Linear", "BatchNorm", "LayerNorm", "Embed", "MultiHeadAttention", "GRUCell", "WeightNorm"}


def crossed():
    """Every layer, in train and eval mode, under every transform: in float32, and some gradients in bfloat16 too."""
    for case, dtype, column in itertools.product(CASES, DTYPES, COLUMNS):
        layer, _ = case.values
        only_in_grid = dtype is jnp.bfloat16 and not (column == "grad" and layer.name in IN_BFLOAT16)
        only_in_grid |= layer.name == "Bidirectional" and column != "grad"  # two RNNs, which have a row
        marks = [pytest.mark.grid] if only_in_grid else []
        name = f"{case.id}-{jnp.dtype(dtype).name}-{column}"
        yield pytest.param(*case.values, dtype, column, id=name, marks=marks)


@pytest.mark.sample(48)
@pytest.mark.parametrize(("layer", "train", "dtype", "column"), list(crossed()))
def test_matrix(layer, train, dtype, column, record_property):
    x = layer.example(dtype)
    dtypes = {"dtype": None, "param_dtype": dtype}
    values = layer.variables(**dtypes)
    if not values and column in ("grad", "scan"):
        pytest.skip("the layer has no variables")
    results = unless_same_program(*COLUMNS[column](layer, train, dtypes), values, x)
    if results is None:
        record_property("layer_matrix", (layer.name, column, {"bits": True, **NO_DIFFERENCE[column]}))
        return
    ours, theirs = results
    exact = layer.same_bits and jax.default_backend() == "cpu"
    (assert_trees_equal if exact else assert_trees_close)(ours, theirs)
    figures = {"bits": same_bits(ours, theirs)}
    if column == "grad":
        figures["gradient"] = max_difference(ours, theirs)
    elif column == "remat":
        figures |= forward_and_gradient(ours, theirs)
    else:
        figures["forward"] = max_difference(ours, theirs)
    record_property("layer_matrix", (layer.name, column, figures))


def test_the_page_has_every_layer():
    assert [row.split("|")[1].strip(" `") for row in page_rows(PAGE.read_text())] == [layer.name for layer in LAYERS]
