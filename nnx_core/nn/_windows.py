"""Windows that slide over the spatial axes of an image: their padding, and the batch axes around it.

Law: channels are last, spatial axes before them, any number of batch axes first; an option is one value for all
spatial axes or one for each. Knows arrays and sizes; knows no layer, and nothing of what is computed in a window.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PaddingLike = str | int | Sequence[int | tuple[int, int]]
PerAxis = int | Sequence[int] | None
LaxPadding = str | Sequence[tuple[int, int]]

LAX_PADDINGS = ("SAME", "SAME_LOWER", "VALID")
CONV_PADDINGS = (*LAX_PADDINGS, "CIRCULAR", "REFLECT", "CAUSAL")


def each_axis(option: PerAxis, rank: int) -> tuple[int, ...]:
    """One integer for each of `rank` axes; None is 1 for all of them."""
    if option is None:
        return (1,) * rank
    return tuple(option) if isinstance(option, Sequence) else (option,) * rank


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


def is_pair(padding: object) -> bool:
    """Whether this is (before, after), the padding of one axis."""
    return isinstance(padding, tuple) and len(padding) == 2 and all(isinstance(side, int) for side in padding)


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
