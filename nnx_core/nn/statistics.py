"""Statistics of arrays, and normalization with them: what all norms share.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights give equal bits. Statistics
are accumulated in at least float32 and inputs are never rounded first; only the result is cast to `dtype`.
Knows the options of a norm (`axis_name`, `use_fast_variance`, ...) as attributes of a layer, no layer itself.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.nn import dtypes
from nnx_core.nn._axes import Axes
from nnx_core.nn._errors import InputShapeError
from nnx_core.nn.dtypes import at_least_float32, canonicalize_dtype


def values(layer: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """Scale and bias as arrays."""
    scale, bias = layer.scale, layer.bias
    return None if scale is None else scale[...], None if bias is None else bias[...]


def features_of(*parameters: jax.Array | None) -> int | None:
    """The number of features that scale and bias have; None without either."""
    return next((p.shape[0] for p in parameters if p is not None), None)


def promote(layer: Any, *arrays: jax.Array | None) -> Sequence[Any]:
    """What the user's own `promote_dtype` makes of the arrays.

    The default is not called: it would round the inputs to `dtype` before their statistics are taken.
    """
    if layer.promote_dtype is dtypes.promote_dtype:
        return arrays
    return layer.promote_dtype(arrays, dtype=layer.dtype)


def checked_axes(layer: Any, shape: tuple[int, ...], axes: Axes, size: int | None) -> tuple[int, ...]:
    """`axes` counted from the front; together they must hold `size` features, unless that is None."""
    rank = len(shape)
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    features = 1
    for axis in axes:
        if not -rank <= axis < rank:
            raise InputShapeError(layer, f"with an axis {axis}", shape, "Give it that axis, or the layer another one.")
        features *= shape[axis]
    if size is not None and features != size:
        raise InputShapeError(
            layer,
            f"(..., {size})" if axes == (-1,) else f"with {size} features on axes {axes}",
            shape,
            "num_features must be the size of the feature axis; features are on the last axis unless told.",
        )
    return tuple(axis % rank for axis in axes)


def broadcastable(shape: tuple[int, ...], features: tuple[int, ...]) -> list[int]:
    """The shape of what differs along the axes `features` only, so that it broadcasts to `shape`."""
    return [size if axis in features else 1 for axis, size in enumerate(shape)]


def squared(x: jax.Array) -> jax.Array:
    """|x|², real: of a complex number without the square root that abs would take."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)


def moments(layer: Any, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `x` over `axes`, in at least float32, without those axes.

    Over a mapped axis each index has the same weight, masked or not. The one-pass variance can come out below
    zero; it is cut there.
    """
    x = x.astype(at_least_float32(x))
    mask = None if mask is None else jnp.asarray(mask, bool)
    name, groups = layer.axis_name, layer.axis_index_groups
    if not layer.use_fast_variance:
        mean = x.mean(axes, where=mask)
        mean = mean if name is None else lax.pmean(mean, name, axis_index_groups=groups)
        var = squared(x - jnp.expand_dims(mean, axes)).mean(axes, where=mask)
        return mean, var if name is None else lax.pmean(var, name, axis_index_groups=groups)
    squares = squared(x)  # before the mean, or the two gradients of `x` add up in another order than Linen's
    mean, square = x.mean(axes, where=mask), squares.mean(axes, where=mask)
    if name is not None:  # one collective for both
        both = lax.pmean(jnp.stack([mean, square]), name, axis_index_groups=groups)
        mean, square = both[0], both[1]
    return mean, jnp.maximum(0.0, square - squared(mean))


def mean_of_squares(layer: Any, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """Mean of |x|² over `axes`, in at least float32, without those axes."""
    mask = None if mask is None else jnp.asarray(mask, bool)
    mean = squared(x.astype(at_least_float32(x))).mean(axes, where=mask)
    if layer.axis_name is None:
        return mean
    return lax.pmean(mean, layer.axis_name, axis_index_groups=layer.axis_index_groups)


def normalize(
    layer: Any,
    x: jax.Array,
    mean: jax.Array | None,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    shape: list[int],
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, cast to the result's dtype at the end.

    Without a mean, x / sqrt(var + epsilon) * scale + bias. `scale` and `bias` are reshaped to `shape`.

    `x` comes in its own dtype and is promoted here once more: sharing the float32 copy that the statistics
    use would save one cast, but then the two gradients of a bfloat16 `x` add up in float32; Linen's do not.
    """
    dtype = canonicalize_dtype(x, scale, bias, dtype=layer.dtype)
    y = x if mean is None else x - mean
    factor = lax.rsqrt(var + layer.epsilon)
    if scale is not None:
        factor = factor * scale.reshape(shape)
    y = y * factor
    if bias is not None:
        y = y + bias.reshape(shape)
    return jnp.asarray(y, dtype)


def normalize_over(
    layer: Any,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    axes: tuple[int, ...],
    features: tuple[int, ...],
    mask: jax.Array | None,
) -> jax.Array:
    """`x` normalized with its moments over `axes`; scale and bias differ along `features`."""
    x, scale, bias = promote(layer, x, scale, bias)
    mean, var = moments(layer, x, axes, mask)
    mean, var = jnp.expand_dims(mean, axes), jnp.expand_dims(var, axes)
    return normalize(layer, x, mean, var, scale, bias, broadcastable(x.shape, features))
