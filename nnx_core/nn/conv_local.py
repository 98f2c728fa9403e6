"""Locally connected layers: convolutions whose kernel is another one at every position of the output.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits. Channels are
last; any number of batch axes comes first. Knows nothing of how parameters are stored or traced.
"""

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.graph.objects import data
from nnx_core.nn import dtypes
from nnx_core.nn._affine import new_param, optional_param
from nnx_core.nn._axes import hashable
from nnx_core.nn._errors import InputShapeError, require_rngs
from nnx_core.nn._options import shape
from nnx_core.nn._windows import CONV_PADDINGS, PaddingLike, PerAxis, channels_last, each_axis, merge_batch, pad_inputs
from nnx_core.nn.conv_base import Convolution
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.rngs import Rngs


class ConvLocal(Convolution):
    """Convolution with its own kernel for each output position, by `jax.lax.conv_general_dilated_local`.

    It is `Conv` without shared weights: flax.nnx has no such layer, flax.linen's learns the input's size from the
    first input. Here it is an argument, `in_spatial_shape`, since there is one kernel for each output position
    and so their number depends on it. With `P = out_spatial_shape`:

    `kernel` is a Param of shape `(*P, in_features * prod(kernel_size), out_features)` whose middle axis counts
    input features first, then the window's pixels; `bias` is one of shape `(*P, out_features)` or None.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      kernel_size: one integer for each spatial axis; a single integer means one axis.
      strides: between windows; one for all axes, or one for each.
      in_spatial_shape: the sizes of the input's spatial axes; a single integer means one axis.
      padding: as in `Conv`: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL"; an integer for all
        sides; or for each axis an integer for both sides or a pair (before, after).
      input_dilation: spread the input by this factor; needs padding in integers.
      kernel_dilation: spread the window by this factor.
      use_bias: whether to add a bias.
      mask: array of the shape of the kernel, multiplied onto it.
      dtype, param_dtype, precision: as in Conv.
      kernel_init: initializer of the kernel. As in Linen it is called with the shape above, and the default one
        takes the output positions for a part of the fan-in. For outputs of unit variance pass
        `nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=range(rank))`.
      bias_init, promote_dtype, rngs, kernel_metadata, bias_metadata: as in Conv.

    Raises:
      OptionError: options that do not fit the kernel size or the size of the input.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.ConvLocal(3, 4, kernel_size=(3, 3), strides=2, in_spatial_shape=(8, 6), rngs=nnx.Rngs(0))
    >>> layer.out_spatial_shape, layer.kernel.shape, layer.bias.shape
    ((4, 3), (4, 3, 27, 4), (4, 3, 4))
    >>> layer(jnp.ones((5, 8, 6, 3))).shape
    (5, 4, 3, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        in_spatial_shape: int | Sequence[int],
        padding: PaddingLike = "SAME",
        input_dilation: PerAxis = 1,
        kernel_dilation: PerAxis = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_window(in_features, out_features, kernel_size, strides, padding, kernel_dilation)
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.in_spatial_shape = shape(self, "in_spatial_shape", in_spatial_shape)
        self.input_dilation = hashable(input_dilation)
        self.use_bias, self.mask = use_bias, data(mask)
        self._nnx_check_per_axis("strides", "input_dilation", "kernel_dilation")
        self._nnx_check_padding(CONV_PADDINGS)
        self._nnx_check_input_dilation()
        self.out_spatial_shape = _out_spatial_shape(self)
        window = self.in_features * prod(self.kernel_size)
        self.kernel_shape = (*self.out_spatial_shape, window, self.out_features)
        self._nnx_check_mask()
        self.kernel = new_param(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        bias_shape = (*self.out_spatial_shape, self.out_features)
        self.bias = optional_param(use_bias, rngs, bias_init, bias_shape, param_dtype, bias_metadata)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: `[*batch, *in_spatial_shape, in_features]` with any number of batch axes: none, one, or several,
            which are flattened for the computation.

        Returns:
          `[*batch, *out_spatial_shape, out_features]`, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          InputShapeError: too few axes, other spatial sizes, or the last axis does not fit the kernel.
        """
        inputs = jnp.asarray(inputs)
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
        features = kernel.shape[-2] // prod(self.kernel_size)
        rank = len(self.kernel_size)
        self._nnx_check_input(inputs.shape, features)
        if inputs.shape[-rank - 1 : -1] != self.in_spatial_shape:
            expected = f"(*batch, {', '.join(map(str, self.in_spatial_shape))}, {features})"
            fix = "There is one kernel for each position: construct the layer with the in_spatial_shape of its input."
            raise InputShapeError(self, expected, inputs.shape, fix)
        inputs, batch = merge_batch(inputs, rank)
        dilation = each_axis(self.kernel_dilation, rank)
        inputs, padding = pad_inputs(inputs, self.padding, self.kernel_size, dilation)
        inputs, kernel, bias = self._nnx_promoted(inputs, kernel, bias)
        y = lax.conv_general_dilated_local(
            inputs,
            kernel,
            each_axis(self.strides, rank),
            padding,
            self.kernel_size,
            lhs_dilation=each_axis(self.input_dilation, rank),
            rhs_dilation=dilation,
            dimension_numbers=channels_last(rank),
            precision=self.precision,
        )
        return self._nnx_finished(y, bias, batch)


def _out_spatial_shape(layer: ConvLocal) -> tuple[int, ...]:
    """How many windows there are along each axis: what a convolution with shared weights would return."""
    rank = len(layer.kernel_size)
    if len(layer.in_spatial_shape) != rank:
        layer._nnx_fail("in_spatial_shape", f"{rank} integers, one for each spatial axis", layer.in_spatial_shape)

    def convolve(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        dilation = each_axis(layer.kernel_dilation, rank)
        inputs, padding = pad_inputs(inputs, layer.padding, layer.kernel_size, dilation)
        return lax.conv_general_dilated(
            inputs,
            kernel,
            each_axis(layer.strides, rank),
            padding,
            each_axis(layer.input_dilation, rank),
            dilation,
            channels_last(rank),
        )

    image = jax.ShapeDtypeStruct((1, *layer.in_spatial_shape, 1), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*layer.kernel_size, 1, 1), jnp.float32)
    shape = jax.eval_shape(convolve, image, kernel).shape[1:-1]
    if 0 in shape:
        found = f"{layer.in_spatial_shape}, which gives an output of {shape}"
        layer._nnx_fail("in_spatial_shape", "an input that is at least as large as the window", found)
    return shape
