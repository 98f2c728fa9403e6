"""What all convolutions share: the options of their window, their checks, and the bias.

Law: channels are last, spatial axes before them, any number of batch axes first; an option is one value for all
spatial axes or one for each. Knows no particular convolution.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from nnx_core.nn._affine import KernelLayer
from nnx_core.nn._axes import hashable
from nnx_core.nn._errors import InputShapeError, OptionError
from nnx_core.nn._options import shape, sizes
from nnx_core.nn._windows import PaddingLike, PerAxis, each_axis, is_pair, split_batch


class Convolution(KernelLayer):
    """A layer that slides a window of shape `kernel_size` over the spatial axes of its input."""

    in_features: int
    out_features: int
    kernel_size: tuple[int, ...]
    strides: PerAxis
    padding: PaddingLike
    input_dilation: PerAxis  # of those that have one
    kernel_dilation: PerAxis
    kernel_shape: tuple[int, ...]
    mask: jax.Array | None

    def _nnx_keep_window(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis,
        padding: PaddingLike,
        kernel_dilation: PerAxis,
    ) -> None:
        self.in_features, self.out_features = sizes(self, in_features=in_features, out_features=out_features)
        self.kernel_size, self.strides = shape(self, "kernel_size", kernel_size, least=1), hashable(strides)
        self.padding, self.kernel_dilation = hashable(padding), hashable(kernel_dilation)

    def _nnx_promoted(
        self, inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """All three in one dtype, the kernel under its mask; `inputs` are padded already.

        The order padding, mask, promotion is Linen's, and the gradients of bfloat16 inputs depend on it.
        """
        if self.mask is not None:
            kernel = kernel * self.mask
        return self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)

    def _nnx_finished(self, y: jax.Array, bias: jax.Array | None, batch: tuple[int, ...]) -> jax.Array:
        """`y` with the bias added along its last axes, and with the batch axes that the input had."""
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)
        return split_batch(y, batch)

    # ---- checks

    def _nnx_check_per_axis(self, *options: str) -> None:
        """OptionError unless each of these is one positive integer, None, or as many as `kernel_size` has entries."""
        rank = len(self.kernel_size)
        for option in options:
            value = getattr(self, option)
            entries = value if isinstance(value, tuple) else (1 if value is None else value,) * rank
            if len(entries) != rank or not all(isinstance(entry, int) and entry > 0 for entry in entries):
                self._nnx_fail(option, f"one integer, or {rank}: one for each spatial axis, all positive", value)

    def _nnx_check_padding(self, names: tuple[str, ...]) -> None:
        """OptionError unless `padding` is one of `names`, or integers that fit `kernel_size`."""
        rank, padding = len(self.kernel_size), self.padding
        if not _is_padding(padding, rank, names):
            expected = f"one of {', '.join(names)}; an integer; or {rank} integers or (before, after) pairs"
            self._nnx_fail("padding", expected, padding)
        if isinstance(padding, str) and padding.upper() == "CAUSAL" and rank != 1:
            self._nnx_fail("padding", "CAUSAL only with one spatial axis", f"kernel_size {self.kernel_size}")

    def _nnx_check_input_dilation(self) -> None:
        """OptionError if the input is spread and the padding is a name: lax pads by name only what is not spread."""
        if isinstance(self.padding, str) and set(each_axis(self.input_dilation, 1)) != {1}:
            found = f"{self.input_dilation}, padding {self.padding}"
            self._nnx_fail("input_dilation", "1, or a padding in integers", found)

    def _nnx_check_mask(self) -> None:
        """OptionError unless `mask` is None or has the shape of the kernel."""
        if self.mask is not None and jnp.shape(self.mask) != self.kernel_shape:
            self._nnx_fail("mask", f"the shape of the kernel, {self.kernel_shape}", jnp.shape(self.mask))

    def _nnx_check_input(self, shape: tuple[int, ...], features: int) -> None:
        """InputShapeError unless `shape` is `(*batch, *spatial, features)`."""
        rank = len(self.kernel_size)
        if len(shape) < rank + 1 or shape[-1] != features:
            spatial = ", ".join(f"spatial_{i}" for i in range(rank))
            raise InputShapeError(
                self,
                f"(*batch, {spatial}, {features})",
                shape,
                f"kernel_size {self.kernel_size} has {rank} spatial axes; channels are last (NHWC, not NCHW).",
            )

    def _nnx_fail(self, option: str, expected: str, found: object) -> NoReturn:
        fix = f"This {type(self).__name__} has kernel_size {self.kernel_size}."
        raise OptionError(self, option, expected, found, fix)


def _is_padding(padding: Any, rank: int, names: tuple[str, ...]) -> bool:
    if isinstance(padding, str):
        return padding.upper() in names
    if isinstance(padding, tuple):
        return len(padding) == rank and all(isinstance(side, int) or is_pair(side) for side in padding)
    return isinstance(padding, int)
