"""Every layer of the table against its Linen twin: numbers, dtypes, updates, gradients, program size."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.layers import LAYERS
from tests.twins import assert_equal_to_twin, equations

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
HALF = (F32, BF16, F16)


def dtype_name(dtype):
    return "none" if dtype is None else jnp.dtype(dtype).name


CASES = [
    pytest.param(layer, train, id=f"{layer.name}-{'train' if train else 'eval'}")
    for layer in LAYERS
    for train in ((False, True) if layer.modes[True] != layer.modes[False] else (False,))
]
# With dtype=None what computes is promoted from inputs and parameters: all nine. A given dtype: one row each.
DTYPES = [(inputs, None, params) for inputs in HALF for params in HALF]
DTYPES += [(F32, BF16, F32), (F32, F16, F32), (BF16, F32, BF16), (BF16, BF16, BF16)]
# The gate has one case of each kind: all alike, inputs narrower than parameters, computed in less, computed in more.
# What is promoted to what is in `test_dtypes`, for every pair.
DIAGONAL = [(F32, None, F32), (BF16, None, BF16), (F16, None, F32), (F32, F16, F32), (BF16, F32, BF16)]
# Rows whose programs are others than Linen's, with a scan or all gates in it: each case compiles both.
# Bidirectional is two RNNs, whose dtypes are in their own row.
SHORTER = [(F32, None, F32), (BF16, None, BF16), (F32, F16, F32)]
COMPILED_TWICE = {"RNN": SHORTER, "OptimizedLSTMCell": SHORTER, "Bidirectional": [(F32, None, F32)]}


def crossed():
    """Every layer, in train and eval mode, with every combination of dtypes."""
    for case, dtypes in itertools.product(CASES, DTYPES):
        layer, _ = case.values
        marks = [] if dtypes in COMPILED_TWICE.get(layer.name, DIAGONAL) else [pytest.mark.grid]
        name = "-".join([case.id, *map(dtype_name, dtypes)])
        yield pytest.param(*case.values, *dtypes, id=name, marks=marks)


@pytest.mark.sample(56)
@pytest.mark.parametrize(("layer", "train", "inputs", "dtype", "param_dtype"), list(crossed()))
@pytest.mark.accelerator
def test_forward_updates_and_gradients(layer, train, inputs, dtype, param_dtype, record_property):
    figures = assert_equal_to_twin(layer, train=train, inputs=inputs, dtype=dtype, param_dtype=param_dtype)
    record_property("layer_matrix", (layer.name, "jit", figures))


# Of the two half precisions one: both are cast in the same places.
INPUTS = [F32, BF16, pytest.param(F16, marks=pytest.mark.grid)]


@pytest.mark.parametrize("inputs", INPUTS, ids=dtype_name)
@pytest.mark.parametrize(("layer", "train"), CASES)
def test_jaxpr_has_no_more_equations(layer, train, inputs):
    values, x = layer.variables(), layer.example(inputs)
    ours = jax.make_jaxpr(layer.functional(train=train))(values, x)
    theirs = jax.make_jaxpr(layer.functional_twin(train=train))(values, x)
    assert equations(ours.jaxpr) <= equations(theirs.jaxpr), f"ours:\n{ours}\nLinen's:\n{theirs}"
