"""Convolutions.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits. Channels are
last; any number of batch axes comes first. Knows nothing of how parameters are stored or traced.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.graph.objects import data
from nnx_core.nn import dtypes
from nnx_core.nn._affine import new_param, optional_param
from nnx_core.nn._axes import hashable
from nnx_core.nn._errors import require_rngs
from nnx_core.nn._options import size
from nnx_core.nn._windows import CONV_PADDINGS, PaddingLike, PerAxis, channels_last, each_axis, merge_batch, pad_inputs
from nnx_core.nn.conv_base import Convolution
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.rngs import Rngs


class Conv(Convolution):
    """Convolution over the axes before the last, by `jax.lax.conv_general_dilated`.

    `kernel` is a Param of shape `(*kernel_size, in_features // feature_group_count, out_features)`, `bias`
    one of shape `(out_features,)` or None. As everywhere in deep learning it is a cross-correlation: no
    kernel is flipped.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      kernel_size: one integer for each spatial axis; a single integer means one axis.
      strides: between windows; one for all axes, or one for each.
      padding: "SAME", "SAME_LOWER" or "VALID"; "CIRCULAR" (periodic) or "REFLECT" (mirrored without the
        edge), both to the size of the input; "CAUSAL" (one axis, padded on the left); an integer for all
        sides; or for each axis an integer for both sides or a pair (before, after).
      input_dilation: spread the input by this factor; needs padding in integers.
      kernel_dilation: spread the kernel by this factor ("atrous", Chen et al. 2017, arXiv:1606.00915).
      feature_group_count: split the features into groups that do not see each other.
      use_bias: whether to add a bias.
      mask: array of the shape of the kernel, multiplied onto it (van den Oord et al. 2016, arXiv:1601.06759).
      dtype: the dtype of the computation (None: promoted from input and parameters).
      param_dtype: the dtype of the parameters.
      precision: of the products, see `jax.lax.Precision`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      conv_general_dilated: in place of `jax.lax.conv_general_dilated`, with its arguments.
      promote_dtype: called with `(inputs, kernel, bias)` and `dtype`; returns them in one dtype.
      preferred_element_type: dtype in which the convolution accumulates and that it returns.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      OptionError: options that do not fit the kernel size or each other.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> halve = nnx.Conv(2, 6, kernel_size=(5, 3), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0))
    >>> halve.kernel.shape, halve.bias.shape
    ((5, 3, 2, 6), (6,))
    >>> image = jnp.ones((10, 12, 2))
    >>> halve(image).shape, halve(image[None]).shape
    ((5, 6, 6), (1, 5, 6, 6))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: PerAxis = 1,
        kernel_dilation: PerAxis = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_window(in_features, out_features, kernel_size, strides, padding, kernel_dilation)
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.input_dilation = hashable(input_dilation)
        self.feature_group_count = size(self, "feature_group_count", feature_group_count, least=1)
        self.use_bias, self.mask = use_bias, data(mask)
        self.conv_general_dilated, self.preferred_element_type = conv_general_dilated, preferred_element_type
        self.kernel_shape = (*self.kernel_size, self.in_features // self.feature_group_count, self.out_features)
        self._nnx_check_per_axis("strides", "input_dilation", "kernel_dilation")
        self._nnx_check_padding(CONV_PADDINGS)
        self._nnx_check_input_dilation()
        self._nnx_check_groups()
        self._nnx_check_mask()
        self.kernel = new_param(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = optional_param(use_bias, rngs, bias_init, (self.out_features,), param_dtype, bias_metadata)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: `[*batch, *spatial, in_features]` with as many spatial axes as `kernel_size` has entries,
            and any number of batch axes: none, one, or several, which are flattened for the convolution.
          out_sharding: of the convolution, in JAX's explicit sharding mode.

        Returns:
          `[*batch, *spatial', out_features]`, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          InputShapeError: too few axes, or the last axis does not fit the kernel.
        """
        inputs = jnp.asarray(inputs)
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
        self._nnx_check_input(inputs.shape, kernel.shape[-2] * self.feature_group_count)
        rank = len(self.kernel_size)
        inputs, batch = merge_batch(inputs, rank)
        dilation = each_axis(self.kernel_dilation, rank)
        inputs, padding = pad_inputs(inputs, self.padding, self.kernel_size, dilation)
        inputs, kernel, bias = self._nnx_promoted(inputs, kernel, bias)
        y = self.conv_general_dilated(
            inputs,
            kernel,
            each_axis(self.strides, rank),
            padding,
            lhs_dilation=each_axis(self.input_dilation, rank),
            rhs_dilation=dilation,
            dimension_numbers=channels_last(rank),
            feature_group_count=self.feature_group_count,
            **self._nnx_product_options(out_sharding),
        )
        return self._nnx_finished(y, bias, batch)

    def _nnx_check_groups(self) -> None:
        for option in ("in_features", "out_features"):
            features = getattr(self, option)
            if features % self.feature_group_count:
                found = f"{option} {features}, feature_group_count {self.feature_group_count}"
                self._nnx_fail("feature_group_count", f"a divisor of {option}", found)
