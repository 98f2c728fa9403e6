"""Activations by flax.nnx's names: JAX's own functions, and PReLU, which has a parameter.

Law: nothing is computed here that jax.nn computes.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
)
from jax.numpy import tanh

from nnx_core.kinds import Param
from nnx_core.module import Module
from nnx_core.nn import dtypes
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn

__all__ = [
    "PReLU",
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
]


class PReLU(Module):
    """Parametric ReLU (He et al. 2015, https://arxiv.org/abs/1502.01852): x where x >= 0, else slope * x.

    The slope is one number, `negative_slope`, a scalar Param of dtype `param_dtype`.

    Args:
      negative_slope_init: the slope before training.
      dtype: the dtype of the result (None: the input's, as in Linen; float32 for integers).
      param_dtype: the dtype of the parameter.
      promote_dtype: called with `(inputs, negative_slope)` and `dtype`; returns both in one dtype.
      negative_slope_metadata: metadata of the parameter.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.PReLU(0.25)(jnp.array([-4.0, 2.0]))
    Array([-1.,  2.], dtype=float32)
    """

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        negative_slope_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.negative_slope = Param(jnp.asarray(negative_slope_init, param_dtype), **negative_slope_metadata)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Shape of `inputs`: any; the result has it too."""
        dtype = self.dtype
        if dtype is None and jnp.issubdtype(jnp.result_type(inputs), jnp.inexact):
            dtype = jnp.result_type(inputs)
        inputs, slope = self.promote_dtype((inputs, self.negative_slope[...]), dtype=dtype)
        return jnp.where(inputs >= 0, inputs, slope * inputs)
