"""Transposed convolutions: the output is larger than the input by the factor `strides`.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits. Channels are
last; any number of batch axes comes first. Knows nothing of how parameters are stored or traced.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.graph.objects import data
from nnx_core.nn import dtypes
from nnx_core.nn._affine import new_param, optional_param
from nnx_core.nn._errors import require_rngs
from nnx_core.nn._windows import (
    LAX_PADDINGS,
    LaxPadding,
    PaddingLike,
    PerAxis,
    each_axis,
    explicit_padding,
    merge_batch,
)
from nnx_core.nn.conv_base import Convolution
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.rngs import Rngs


class ConvTranspose(Convolution):
    """Transposed ("fractionally strided") convolution by `jax.lax.conv_transpose`.

    `kernel` is a Param of shape `(*kernel_size, in_features, out_features)`, with `transpose_kernel`
    `(*kernel_size, out_features, in_features)`; `bias` is one of shape `(out_features,)` or None.
    Zeros are put between the pixels of the input, `strides - 1` of them, then a convolution runs over it
    (Dumoulin & Visin 2016, https://arxiv.org/abs/1603.07285, chapter 4).

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      kernel_size: one integer for each spatial axis; a single integer means one axis.
      strides: the factor by which an axis grows; one for all axes, or one for each; None is 1.
      padding: "SAME", output `n * strides` for an input of n pixels ("SAME_LOWER", only without strides: the odd
        pixel before, not after); "VALID", every output that an input reaches, which is
        `n * strides + max(d * (k - 1) + 1 - strides, 0)` for a kernel of size k and dilation d; "CIRCULAR"
        (periodic), output `n * strides`; "CAUSAL" (one axis), output `n * strides` whose i-th pixel depends on
        the inputs up to `i // strides`. Or an integer for all sides; or for each axis an integer for both sides or
        a pair (before, after): zeros around the spread input. That is not PyTorch's `padding` p, which is
        `d * (k - 1) - p` here.
      kernel_dilation: spread the kernel by this factor ("atrous", Chen et al. 2017, arXiv:1606.00915).
      use_bias: whether to add a bias.
      mask: array of the shape of the kernel, multiplied onto it (van den Oord et al. 2016, arXiv:1601.06759).
      dtype, param_dtype, precision, kernel_init, bias_init: as in Conv.
      transpose_kernel: flip the kernel's spatial axes and swap its features, as Keras does: the layer is then the
        gradient of the `Conv` with that kernel with respect to its input.
      promote_dtype, preferred_element_type, rngs, kernel_metadata, bias_metadata: as in Conv.

    Raises:
      OptionError: options that do not fit the kernel size.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> double = nnx.ConvTranspose(6, 2, kernel_size=(4, 3), strides=2, rngs=nnx.Rngs(0))
    >>> double.kernel.shape, double.bias.shape
    ((4, 3, 6, 2), (2,))
    >>> image = jnp.ones((5, 7, 6))
    >>> double(image).shape, double(image[None]).shape
    ((10, 14, 2), (1, 10, 14, 2))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: PerAxis = None,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_window(in_features, out_features, kernel_size, strides, padding, kernel_dilation)
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.use_bias, self.mask = use_bias, data(mask)
        self.transpose_kernel, self.preferred_element_type = transpose_kernel, preferred_element_type
        features = (self.in_features, self.out_features)
        self.kernel_shape = (*self.kernel_size, *(reversed(features) if transpose_kernel else features))
        self._nnx_check_per_axis("strides", "kernel_dilation")
        self._nnx_check_padding((*LAX_PADDINGS, "CIRCULAR", "CAUSAL"))
        if str(self.padding).upper() == "SAME_LOWER" and set(each_axis(self.strides, 1)) != {1}:
            self._nnx_fail("padding", "SAME_LOWER only without strides", f"strides {self.strides}")
        self._nnx_check_mask()
        self.kernel = new_param(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = optional_param(use_bias, rngs, bias_init, (self.out_features,), param_dtype, bias_metadata)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: `[*batch, *spatial, in_features]` with as many spatial axes as `kernel_size` has entries,
            and any number of batch axes: none, one, or several, which are flattened for the convolution.

        Returns:
          `[*batch, *spatial', out_features]`, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          InputShapeError: too few axes, or the last axis does not fit the kernel.
        """
        inputs = jnp.asarray(inputs)
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
        self._nnx_check_input(inputs.shape, kernel.shape[-1 if self.transpose_kernel else -2])
        rank = len(self.kernel_size)
        inputs, batch = merge_batch(inputs, rank)
        inputs, kernel, bias = self._nnx_promoted(inputs, kernel, bias)
        strides = each_axis(self.strides, rank)
        y = lax.conv_transpose(
            inputs,
            kernel,
            strides,
            self._lax_padding(),
            rhs_dilation=each_axis(self.kernel_dilation, rank),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if isinstance(self.padding, str) and self.padding.upper() == "CIRCULAR":
            for axis, stride in enumerate(strides, start=1):
                y = _wrap(y, axis, inputs.shape[axis] * stride, keep_left=not self.transpose_kernel)
        return self._nnx_finished(y, bias, batch)

    def _lax_padding(self) -> LaxPadding:
        padding = explicit_padding(self.padding, len(self.kernel_size))
        if padding == "CIRCULAR":
            return "VALID"
        if padding == "CAUSAL":
            [size], [stride] = self.kernel_size, each_axis(self.strides, 1)
            return [((size - 1) * each_axis(self.kernel_dilation, 1)[0], stride - 1)]
        return padding


def _wrap(y: jax.Array, axis: int, period: int, *, keep_left: bool) -> jax.Array:
    """Add up what lies a multiple of `period` apart, so that the middle of `y` stays where it is.

    What a kernel puts beyond one edge comes in again at the other. If the surplus is odd, the pixel without a
    counterpart is beyond the right edge (`keep_left`) or beyond the left one.
    """
    surplus = y.shape[axis] - period
    if surplus == 0:
        return y
    larger = (surplus + 1) // 2
    before = surplus - larger if keep_left else larger
    turns = -(-larger // period)
    widths = [(0, 0)] * y.ndim
    widths[axis] = (turns * period - before, turns * period - (surplus - before))
    shape = (*y.shape[:axis], 2 * turns + 1, period, *y.shape[axis + 1 :])
    return jnp.sum(jnp.reshape(jnp.pad(y, widths), shape), axis=axis)
