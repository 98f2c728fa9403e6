"""Options and shapes of layers that slide a window over the spatial axes of an image.

Law: channels are last, spatial axes before them, any number of batch axes first; an option is one value for all
spatial axes or one for each. Knows windows and padding; knows nothing of what is computed inside a window.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core.module import Module
from nnx_core.nn._errors import InputShapeError, OptionError

PaddingLike = str | int | Sequence[int | tuple[int, int]]
PerAxis = int | Sequence[int] | None
LaxPadding = str | Sequence[tuple[int, int]]

LAX_PADDINGS = ("SAME", "SAME_LOWER", "VALID")
CONV_PADDINGS = (*LAX_PADDINGS, "CIRCULAR", "REFLECT", "CAUSAL")


def hashable(option: Any) -> Any:
    """Lists as tuples, at every depth: options are part of the key of a compiled function."""
    return tuple(map(hashable, option)) if isinstance(option, Sequence) and not isinstance(option, str) else option


def sizes(option: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of the spatial axes; a single integer means one axis."""
    return (option,) if isinstance(option, int) else tuple(option)


def each_axis(option: PerAxis, rank: int) -> tuple[int, ...]:
    """One integer for each of `rank` axes; None is 1 for all of them."""
    if option is None:
        return (1,) * rank
    return (option,) * rank if isinstance(option, int) else tuple(option)


def channels_last(rank: int) -> lax.ConvDimensionNumbers:
    """Image `[batch, *spatial, features]`, kernel `[*spatial, in, out]`."""
    spatial = tuple(range(1, rank + 1))
    image = (0, rank + 1, *spatial)
    return lax.ConvDimensionNumbers(image, (rank + 1, rank, *range(rank)), image)


def merge_batch(inputs: jax.Array, rank: int) -> tuple[jax.Array, tuple[int, ...]]:
    """`[*batch, *spatial, features]` as `[batch, *spatial, features]`, and the sizes of the batch axes it had.

    `rank` is the number of spatial axes.
    """
    batch = inputs.shape[: inputs.ndim - rank - 1]
    if len(batch) == 1:
        return inputs, batch
    return jnp.reshape(inputs, (math.prod(batch), *inputs.shape[len(batch) :])), batch


def split_batch(y: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """`[batch, ...]` as `[*batch, ...]`: undoes `merge_batch`."""
    return y if len(batch) == 1 else jnp.reshape(y, (*batch, *y.shape[1:]))


def explicit_padding(padding: PaddingLike, rank: int) -> LaxPadding:
    """`padding` as lax takes it: a name, or (before, after) for each axis."""
    if isinstance(padding, str):
        return padding.upper()
    if isinstance(padding, int):
        return [(padding, padding)] * rank
    return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]


def pad_inputs(
    inputs: jax.Array, padding: PaddingLike, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[jax.Array, LaxPadding]:
    """`inputs` with the padding that lax does not know applied, and what is left for lax to do."""
    left = explicit_padding(padding, len(kernel_size))
    if not isinstance(left, str) or left in LAX_PADDINGS:
        return inputs, left
    reach = [(size - 1) * spread for size, spread in zip(kernel_size, dilation, strict=True)]
    if left == "CAUSAL":
        return jnp.pad(inputs, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
    widths = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
    return jnp.pad(inputs, widths, mode="wrap" if left == "CIRCULAR" else "reflect"), "VALID"


def check_per_axis(layer: Module, *options: str) -> None:
    """OptionError unless each of these attributes is one integer, None, or as long as `kernel_size`."""
    rank = len(layer.kernel_size)
    for option in options:
        value = getattr(layer, option)
        if isinstance(value, tuple) and len(value) != rank:
            fail(layer, option, f"one integer, or {rank}: one for each spatial axis", value)


def check_padding(layer: Module, names: tuple[str, ...]) -> None:
    """OptionError unless `padding` is one of `names`, or integers that fit `kernel_size`."""
    rank, padding = len(layer.kernel_size), layer.padding
    if not _is_padding(padding, rank, names):
        expected = f"one of {', '.join(names)}; an integer; or {rank} integers or (before, after) pairs"
        fail(layer, "padding", expected, padding)
    if isinstance(padding, str) and padding.upper() == "CAUSAL" and rank != 1:
        fail(layer, "padding", "CAUSAL only with one spatial axis", f"kernel_size {layer.kernel_size}")


def check_input_dilation(layer: Module) -> None:
    """OptionError if the input is spread and the padding is a name: lax pads by name only what is not spread."""
    if isinstance(layer.padding, str) and set(each_axis(layer.input_dilation, 1)) != {1}:
        fail(layer, "input_dilation", "1, or a padding in integers", f"{layer.input_dilation}, padding {layer.padding}")


def check_mask(layer: Module) -> None:
    """OptionError unless `mask` is None or has the shape of the kernel."""
    if layer.mask is not None and jnp.shape(layer.mask) != layer.kernel_shape:
        fail(layer, "mask", f"the shape of the kernel, {layer.kernel_shape}", jnp.shape(layer.mask))


def check_input(layer: Module, shape: tuple[int, ...], features: int) -> None:
    """InputShapeError unless `shape` is `(*batch, *spatial, features)`."""
    rank = len(layer.kernel_size)
    if len(shape) < rank + 1 or shape[-1] != features:
        spatial = ", ".join(f"spatial_{i}" for i in range(rank))
        raise InputShapeError(
            layer,
            f"(*batch, {spatial}, {features})",
            shape,
            f"kernel_size {layer.kernel_size} has {rank} spatial axes; channels are last (NHWC, not NCHW).",
        )


def fail(layer: Module, option: str, expected: str, found: object) -> None:
    """Raise OptionError for a layer that has a `kernel_size`."""
    fix = f"This {type(layer).__name__} has kernel_size {layer.kernel_size}."
    raise OptionError(layer, option, expected, found, fix)


def _is_padding(padding: Any, rank: int, names: tuple[str, ...]) -> bool:
    if isinstance(padding, str):
        return padding.upper() in names
    if isinstance(padding, tuple):
        return len(padding) == rank and all(
            isinstance(p, int) or (isinstance(p, tuple) and len(p) == 2) for p in padding
        )
    return isinstance(padding, int)
