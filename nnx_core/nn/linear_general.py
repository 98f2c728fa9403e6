"""Layers that are one product of an input with a kernel, over any axes.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits.
Knows nothing of how parameters are stored or traced.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.nn import dtypes
from nnx_core.nn._affine import KernelLayer, new_param, optional_param
from nnx_core.nn._axes import Axes, Shape, as_tuple, hashable
from nnx_core.nn._errors import InputShapeError, OptionError, require_rngs
from nnx_core.nn._options import shape
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.rngs import Rngs
from nnx_core.variables import VariableMetadata

Labels = tuple[str | int, ...]  # of the axes of one operand; those behind `...` are -1, -2, ... from the right


class LinearGeneral(KernelLayer):
    """y = x · kernel + bias over any axes of the input, with any number of output axes.

    `kernel` is a Param of shape `(*batch, *in_features, *out_features)`, `bias` one of shape
    `(*batch, *out_features)` or None, where `batch` are the sizes in `batch_axis`. The kernel is initialized
    as a matrix, so that its variance is that of `nnx.Linear`.

    Args:
      in_features: sizes of the axes that are contracted, in the order in which the input has them.
      out_features: sizes of the axes that take their place, at the end.
      axis: the axes to contract, as many as `in_features`. They are taken in the order in which the input
        has them, whatever order they are given in.
      batch_axis: leading axes, 0 or 0, 1 and so on, and their sizes: each index has a kernel of its own.
      use_bias: whether to add a bias.
      dtype: the dtype of the computation (None: promoted from input and parameters).
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the kernel, called with the shape of a matrix.
      bias_init: initializer of the bias, called with the shape of a vector.
      precision: of the product, see `jax.lax.Precision`.
      promote_dtype: called with `(inputs, kernel, bias)` and `dtype`; returns them in one dtype.
      dot_general: in place of `jax.lax.dot_general`, with its arguments.
      dot_general_cls: called without arguments for each call of the layer; what it returns goes before
        `dot_general`.
      preferred_element_type: dtype in which the product accumulates and that it returns.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      OptionError: `axis` and `in_features` differ in length, or `batch_axis` are not the leading axes.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> merge_heads = nnx.LinearGeneral((8, 6), 10, axis=(-2, -1), rngs=nnx.Rngs(0))
    >>> merge_heads.kernel.shape, merge_heads.bias.shape
    ((8, 6, 10), (10,))
    >>> merge_heads(jnp.ones((2, 7, 8, 6))).shape
    (2, 7, 10)
    >>> experts = nnx.LinearGeneral(6, 4, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    >>> experts.kernel.shape, experts(jnp.ones((3, 20, 6))).shape
    ((3, 6, 4), (3, 20, 4))
    """

    def __init__(
        self,
        in_features: Axes,
        out_features: Axes,
        *,
        axis: Axes = -1,
        batch_axis: Mapping[int, int] = MappingProxyType({}),
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: lax.PrecisionLike = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        dot_general: Callable[..., jax.Array] | None = None,
        dot_general_cls: Any = None,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self.in_features = shape(self, "in_features", in_features)
        self.out_features = shape(self, "out_features", out_features)
        self.axis = as_tuple(axis)
        self.batch_axis = _AxisSizes(batch_axis)
        self.use_bias = use_bias
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.dot_general, self.dot_general_cls = dot_general, dot_general_cls
        self.preferred_element_type = preferred_element_type
        _check_axes(self)
        batch = tuple(self.batch_axis.values())
        matrix = (math.prod(batch + self.in_features), math.prod(self.out_features))
        kernel_shape = (*batch, *self.in_features, *self.out_features)
        self.kernel = new_param(rngs, _through(matrix, kernel_init), kernel_shape, param_dtype, kernel_metadata)
        bias_shape = (*batch, *self.out_features)
        vector_init = _through((math.prod(bias_shape),), bias_init)
        self.bias = optional_param(use_bias, rngs, vector_init, bias_shape, param_dtype, bias_metadata)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: any number of axes, `in_features` on `axis` and the sizes of `batch_axis` on those.
          out_sharding: of the product, in JAX's explicit sharding mode.

        Returns:
          `[*batch, *free, *out_features]`, where `free` are the axes of the input that are neither, in
          `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          InputShapeError: the contracted or batch axes do not exist or do not fit the kernel.
        """
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        axes = _contracted(self, jnp.shape(inputs), kernel.shape)
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        batch = tuple(range(len(self.batch_axis)))
        dot_general = self.dot_general or lax.dot_general
        if self.dot_general_cls is not None:
            dot_general = self.dot_general_cls()
        contracted = axes, tuple(range(len(batch), len(batch) + len(axes)))
        y = dot_general(inputs, kernel, (contracted, (batch, batch)), **self._nnx_product_options(out_sharding))
        if bias is not None:
            free = (1,) * (y.ndim - bias.ndim)
            y = y + jnp.reshape(bias, (*bias.shape[: len(batch)], *free, *bias.shape[len(batch) :]))
        return y


class Einsum(KernelLayer):
    """y = einsum(x, kernel) + bias.

    `kernel` is a Param of shape `kernel_shape`, `bias` one of shape `bias_shape` or None.

    Args:
      einsum_str: an equation of two operands, the input and the kernel, with an explicit result:
        `"nta,hab->nthb"`; spaces are ignored. None leaves it to the call.
      kernel_shape: shape of the kernel; a single integer means one axis, here and in `bias_shape`.
      bias_shape: shape of the bias, which is added along the axes that the result has from the kernel: their
        sizes, in the order of the result. None: no bias.
      dtype: the dtype of the computation (None: promoted from input and parameters).
      param_dtype: the dtype of the parameters.
      precision: of the product, see `jax.lax.Precision`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      promote_dtype: called with `(inputs, kernel, bias)` and `dtype`; returns them in one dtype.
      einsum_op: in place of `jax.numpy.einsum`, with its arguments.
      preferred_element_type: dtype in which the product accumulates and that it returns.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      OptionError: `einsum_str` is no such equation, or the shapes do not fit it.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> split_heads = nnx.Einsum("...d, dhk -> ...hk", kernel_shape=(6, 3, 2), bias_shape=(3, 2), rngs=nnx.Rngs(0))
    >>> split_heads(jnp.ones((5, 6))).shape, split_heads(jnp.ones((4, 5, 6))).shape
    ((5, 3, 2), (4, 5, 3, 2))
    """

    def __init__(
        self,
        einsum_str: str | None,
        kernel_shape: Axes,
        bias_shape: Axes | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        einsum_op: Callable[..., jax.Array] = jnp.einsum,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self.einsum_str = None if einsum_str is None else einsum_str.replace(" ", "")
        self.kernel_shape = shape(self, "kernel_shape", kernel_shape)
        self.bias_shape = None if bias_shape is None else shape(self, "bias_shape", bias_shape)
        if self.einsum_str is not None:
            _check_equation(self, self.einsum_str, self.kernel_shape, self.bias_shape)
        use_bias = self.bias_shape is not None
        self.kernel = new_param(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = optional_param(use_bias, rngs, bias_init, self.bias_shape, param_dtype, bias_metadata)
        self._nnx_keep_numerics(dtype, param_dtype, precision, promote_dtype)
        self.einsum_op, self.preferred_element_type = einsum_op, preferred_element_type

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: the first operand of the equation.
          einsum_str: goes before the layer's own.
          out_sharding: of the product, in JAX's explicit sharding mode.

        Returns:
          What the equation says, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          OptionError: there is no equation, or it does not fit kernel and bias.
          InputShapeError: the input does not fit the equation.
        """
        equation = self.einsum_str if einsum_str is None else einsum_str.replace(" ", "")
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        _check_equation(self, equation, kernel.shape, None if bias is None else bias.shape)
        _check_operand(self, equation, jnp.shape(inputs), kernel.shape)
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        y = self.einsum_op(equation, inputs, kernel, **self._nnx_product_options(out_sharding))
        if bias is not None:
            y = y + jnp.reshape(bias, _broadcastable(equation, kernel.shape, y.ndim))
        return y


# ---- LinearGeneral -----------------------------------------------------------------------------------------


class _AxisSizes(Mapping[int, int]):
    """Axis -> size in the order of the axes; hashable, since options are part of the key of a compiled function."""

    def __init__(self, sizes: Mapping[int, int]):
        self._items = tuple(sorted((hashable(axis), hashable(size)) for axis, size in sizes.items()))

    def __getitem__(self, axis: int) -> int:
        return dict(self._items)[axis]

    def __iter__(self) -> Iterator[int]:
        return iter(dict(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


def _through(flat: Shape, init: Initializer) -> Initializer:
    """`init` for any shape: it is called with the shape `flat`, and what it returns is reshaped."""

    def reshaped(key: jax.Array, shape: Shape, dtype: Dtype) -> Any:
        value: Any = init(key, flat, dtype)
        if isinstance(value, VariableMetadata):  # with the metadata that it carries
            return dataclasses.replace(value, raw_value=jnp.reshape(value.raw_value, shape))
        return jnp.reshape(value, shape)

    return reshaped


def _check_axes(layer: LinearGeneral) -> None:
    if len(layer.axis) != len(layer.in_features):
        raise OptionError(
            layer,
            "axis",
            f"as many axes as in_features {layer.in_features}",
            layer.axis,
            "Give in_features one size for each axis that is contracted.",
        )
    if tuple(layer.batch_axis) != tuple(range(len(layer.batch_axis))):
        raise OptionError(
            layer,
            "batch_axis",
            "the leading axes 0, 1, ... and their sizes",
            layer.batch_axis,
            "Move the batch axes of the input to the front.",
        )


def _contracted(layer: LinearGeneral, shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The contracted axes, counted from the front and in order, once they and the batch axes fit the kernel."""
    rank, batch, n = len(shape), len(layer.batch_axis), len(layer.axis)
    axes = sorted(axis % rank for axis in layer.axis if -rank <= axis < rank)
    # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
    expected = kernel[batch : batch + n]
    overlap = len({*axes, *range(batch)}) < batch + n
    if overlap or tuple(shape[axis] for axis in axes) != expected or shape[:batch] != kernel[:batch]:
        raise InputShapeError(
            layer,
            f"(..., {expected[0]})"
            if layer.axis == (-1,) and not batch
            else f"with sizes {expected} on axes {layer.axis}, taken in the order of the input"
            + (f", and batch sizes {kernel[:batch]} in front" if batch else ""),
            shape,
            "Give the layer the in_features and batch_axis of its input, or another axis.",
        )
    return tuple(axes)


# ---- Einsum ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _parse(equation: str | None) -> tuple[str, str, str] | None:
    """The subscripts of input, kernel and result; None if that is not what `equation` is."""
    operands, arrow, result = (equation or "").partition("->")
    inputs, comma, kernel = operands.partition(",")
    letters = [part.replace("...", "", 1) for part in (inputs, kernel, result)]
    if not (arrow and comma) or not all(part == "" or part.isalpha() for part in letters):
        return None
    if len(set(letters[2])) < len(letters[2]) or not set(result) <= set(inputs + kernel):
        return None
    return inputs, kernel, result


def _labels(subscripts: str, rank: int) -> Labels | None:
    """One label for each of `rank` axes; None if the letters do not fit that rank."""
    before, dots, after = subscripts.partition("...")
    behind = rank - len(before) - len(after)
    if behind < 0 or (behind and not dots):
        return None
    return (*before, *range(-behind, 0), *after)


def _kernel_sizes(equation: str, kernel: Shape) -> dict[str | int, int]:
    """Label -> size, for the axes of the kernel."""
    return dict(zip(_labels(_parse(equation)[1], len(kernel)), kernel, strict=True))


def _broadcastable(equation: str, kernel: Shape, rank: int) -> tuple[int, ...]:
    """The shape of a bias beside a result of this rank: sizes along the axes of the kernel, else 1."""
    sizes = _kernel_sizes(equation, kernel)
    return tuple(sizes.get(label, 1) for label in _labels(_parse(equation)[2], rank))


def _check_equation(layer: Einsum, equation: str | None, kernel: Shape, bias: Shape | None) -> None:
    parts = _parse(equation)
    if parts is None:
        raise OptionError(
            layer,
            "einsum_str",
            "two operands and a result of their letters, such as 'nta,hab->nthb'",
            equation,
            "Give an equation to the layer or to the call; its first operand is the input, its second the kernel.",
        )
    own = f"The equation is {equation!r}."
    if _labels(parts[1], len(kernel)) is None:
        raise OptionError(layer, "kernel_shape", f"one size for each letter of {parts[1]!r}", tuple(kernel), own)
    if bias is None:
        return
    sizes = _kernel_sizes(equation, kernel)
    behind = [label for label in sizes if isinstance(label, int)] if "..." in parts[2] else []
    before, _, after = parts[2].partition("...")
    expected = tuple(sizes[label] for label in (*before, *behind, *after) if label in sizes)
    # A bias of these sizes in another shape is reshaped, as flax.nnx does.
    if math.prod(bias) != math.prod(expected):
        fix = f"{own} A bias has the axes that the result has from the kernel."
        raise OptionError(layer, "bias_shape", f"the shape {expected}", tuple(bias), fix)


def _check_operand(layer: Einsum, equation: str, shape: tuple[int, ...], kernel: Shape) -> None:
    inputs = _parse(equation)[0]
    labels = _labels(inputs, len(shape))
    # Axes behind `...` broadcast; einsum itself compares them.
    sizes = {label: size for label, size in _kernel_sizes(equation, kernel).items() if isinstance(label, str)}
    if labels is None or any(sizes.get(label, size) != size for label, size in zip(labels, shape, strict=True)):
        before, dots, after = inputs.partition("...")
        expected = [str(sizes.get(label, label)) for label in (*before, *([dots] if dots else []), *after)]
        raise InputShapeError(
            layer,
            f"({', '.join(expected)})",
            shape,
            f"The equation is {equation!r}; its first operand is the input.",
        )
