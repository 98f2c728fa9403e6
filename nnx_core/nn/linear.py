"""Layers that are one matrix product over the last axis.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits.
Knows nothing of how parameters are stored or traced.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.nn import dtypes
from nnx_core.nn._affine import KernelLayer, new_param, optional_param
from nnx_core.nn._errors import InputShapeError, require_rngs
from nnx_core.nn._options import sizes
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.nn.initializers import default_embed_init as default_embed_init  # flax.nnx has it here too
from nnx_core.rngs import Rngs


class Linear(KernelLayer):
    """y = x @ kernel + bias over the last axis.

    `kernel` is a Param of shape `(in_features, out_features)`, `bias` one of shape `(out_features,)` or None.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      use_bias: whether to add a bias.
      dtype: the dtype of the computation (None: promoted from input and parameters).
      param_dtype: the dtype of the parameters.
      precision: of the product, see `jax.lax.Precision`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      dot_general: in place of `jax.lax.dot_general`, with its arguments.
      promote_dtype: called with `(inputs, kernel, bias)` and `dtype`; returns them in one dtype.
      preferred_element_type: dtype in which the product accumulates and that it returns.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      OptionError: a size is no whole number.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer.bias.shape
    ((3, 4), (4,))
    >>> layer(jnp.ones((2, 5, 3))).shape
    (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Callable[..., jax.Array] = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        in_features, out_features = sizes(self, in_features=in_features, out_features=out_features)
        shape = (in_features, out_features)
        self.kernel = new_param(rngs, kernel_init, shape, param_dtype, kernel_metadata)
        self.bias = optional_param(use_bias, rngs, bias_init, shape[1:], param_dtype, bias_metadata)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.dot_general, self.preferred_element_type = dot_general, preferred_element_type

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: `[..., in_features]`, any dtype.
          out_sharding: of the product, in JAX's explicit sharding mode.

        Returns:
          `[..., out_features]`, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          InputShapeError: the last axis does not fit the kernel.
        """
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
        if jnp.ndim(inputs) < 1 or jnp.shape(inputs)[-1] != kernel.shape[0]:
            raise InputShapeError(
                self,
                f"(..., {kernel.shape[0]})",
                jnp.shape(inputs),
                "Give the layer the in_features of its input; features are on the last axis.",
            )
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        contracted, batch = ((inputs.ndim - 1,), (0,)), ((), ())
        y = self.dot_general(inputs, kernel, (contracted, batch), **self._nnx_product_options(out_sharding))
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return y
