"""Every layer of the table against its Linen twin: numbers, dtypes, updates, gradients, program size."""

import jax
import jax.numpy as jnp
import pytest

from tests.layers import LAYERS
from tests.twins import Layer, assert_equal_to_twin

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
HALF = (F32, BF16, F16)


def name(row):
    return row.name if isinstance(row, Layer) else None


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


@pytest.mark.parametrize(("inputs", "dtype", "param_dtype"), DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("layer", "train"), CASES)
@pytest.mark.accelerator
def test_forward_updates_and_gradients(layer, train, inputs, dtype, param_dtype, record_property):
    figures = assert_equal_to_twin(layer, train=train, inputs=inputs, dtype=dtype, param_dtype=param_dtype)
    record_property("layer_matrix", (layer.name, "jit", figures))


@pytest.mark.parametrize("inputs", HALF, ids=dtype_name)
@pytest.mark.parametrize(("layer", "train"), CASES)
def test_jaxpr_has_no_more_equations(layer, train, inputs):
    values, x = layer.variables(), layer.example(inputs)
    ours = jax.make_jaxpr(layer.functional(train=train))(values, x)
    theirs = jax.make_jaxpr(layer.functional_twin(train=train))(values, x)
    assert equations(ours.jaxpr) <= equations(theirs.jaxpr), f"ours:\n{ours}\nLinen's:\n{theirs}"


def equations(jaxpr):
    """Number of equations, those of inner jaxprs included."""
    inner = (getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values())
    return len(jaxpr.eqns) + sum(equations(value) for value in inner if hasattr(value, "eqns"))
