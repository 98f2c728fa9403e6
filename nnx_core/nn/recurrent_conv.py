"""A recurrent cell whose products are convolutions.

Law: as for the cells of `recurrent_cells`; here Linen keeps one kernel for all gates as well, so the layouts agree.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.nn import dtypes
from nnx_core.nn._errors import OptionError, require_rngs
from nnx_core.nn._windows import PaddingLike, PerAxis
from nnx_core.nn.activations import sigmoid, tanh
from nnx_core.nn.conv import Conv
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer
from nnx_core.nn.recurrent_base import MemoryCell, Pair
from nnx_core.rngs import Rngs


class ConvLSTMCell(MemoryCell):
    """Convolutional LSTM (Shi et al. 2015, arXiv:1506.04214). flax.nnx has none; flax.linen has.

    i = σ(W_ii * x + W_hi * h + b_i),  f = σ(W_if * x + W_hf * h + b_f + 1),  g = tanh(W_ig * x + W_hg * h + b_g),
    o = σ(W_io * x + W_ho * h + b_o),  c' = f c + i g,  h' = o tanh(c'), where W * x is a convolution. The 1 makes
    the cell remember at first (Jozefowicz et al. 2015); it is added in each call and is in no parameter.

    `ih` and `hh` are Convs with kernels `(*kernel_size, in_features, 4 * hidden_features)` and `(*kernel_size,
    hidden_features, 4 * hidden_features)`, each with a bias; the gates are in the order i, g, f, o.

    Args:
      in_features: size of the last axis of the input.
      hidden_features: size of the last axis of carry and output.
      kernel_size: one integer for each spatial axis.
      strides: of both convolutions; with `padding` they must keep the spatial shape.
      padding: of both convolutions; see Conv.
      use_bias: whether both convolutions have a bias.
      dtype, param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as in LSTMCell.

    Raises:
      OptionError: options that do not fit the kernel size.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.ConvLSTMCell(3, 4, kernel_size=(3, 3), rngs=nnx.Rngs(0))
    >>> nnx.RNN(cell)(jnp.ones((2, 5, 8, 8, 3))).shape  # batch, time, height, width, features
    (2, 5, 8, 8, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: PerAxis = None,
        padding: PaddingLike = "SAME",
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(in_features, hidden_features, dtype, param_dtype, promote_dtype)
        self._nnx_keep_carry(carry_init, keep_rngs, rngs)
        self.use_bias = use_bias
        convolution = functools.partial(
            Conv,
            out_features=4 * hidden_features,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
        )
        self.ih = convolution(in_features, kernel_metadata=kernel_metadata)
        self.hh = convolution(hidden_features, kernel_metadata=recurrent_kernel_metadata)
        self.kernel_size, self.strides, self.padding = self.ih.kernel_size, self.ih.strides, self.ih.padding

    @property
    def num_feature_axes(self) -> int:
        """The spatial axes and the features."""
        return len(self.kernel_size) + 1

    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        """One step.

        Args:
          carry: (c, h), each `[*batch, *spatial, hidden_features]`.
          inputs: `[*batch, *spatial, in_features]`.

        Returns:
          ((c', h'), h').

        Raises:
          InputShapeError: an input or h with too few axes, or another number of features.
          OptionError: strides and padding do not keep the spatial shape.
          CarryError: `carry` is not a pair.
        """
        c, h = self._unpack(carry)
        of_input, of_state = self.ih(inputs), self.hh(h)
        self._check_spatial(c, of_input, of_state)
        i, g, f, o = jnp.split(of_input + of_state, 4, axis=-1)
        c = sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return (c, h), h

    def _check_spatial(self, *arrays: jax.Array) -> None:
        rank = len(self.kernel_size)
        expected, *shapes = (x.shape[-1 - rank : -1] for x in arrays)
        if found := [shape for shape in shapes if shape != expected]:
            raise OptionError(
                self,
                "padding",
                f"strides and padding that keep the spatial shape {expected} of the carry",
                f"{found[0]} after the convolution (padding {self.padding!r}, strides {self.strides})",
                "Use padding='SAME' and strides of 1, and a carry of the spatial shape of the input.",
            )
