"""Dot-product attention and its masks, as functions of arrays.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal arrays give equal bits; flax.nnx hands
over to `jax.nn.dot_product_attention`, whose bits differ. A mask is true where a query may see a key. Axes are
`[*batch, length, heads, depth]`. Knows nothing of parameters and caches.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core._errors import NnxError
from nnx_core.kinds import Intermediate
from nnx_core.module import Module
from nnx_core.nn import dtypes
from nnx_core.nn._axes import Shape
from nnx_core.nn._errors import MissingRngsError
from nnx_core.nn._options import probability, size
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn


class AttentionShapeError(NnxError, ValueError):
    """Query, key, value, mask and bias of one attention do not fit each other."""

    def __init__(self, what: str, expected: str, fix: str, **found: Shape):
        shapes = "".join(f"\n  found    {name} {shape}" for name, shape in found.items())
        super().__init__(f"Attention, {what}:\n  expected {expected}{shapes}\n{fix}")


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """Values, averaged with the weights softmax(query · key / sqrt(depth) + bias).

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762). With fewer heads in `key` and `value` than in
    `query`, each serves a group of query heads that follow each other (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
      query: `[*batch, q_length, heads, depth]`.
      key: `[*batch, kv_length, kv_heads, depth]`; `kv_heads` divides `heads`.
      value: `[*batch, kv_length, kv_heads, v_depth]`.
      bias: added to the logits; broadcasts to `[*batch, heads, q_length, kv_length]`.
      mask: broadcasts to that too; where it is false (or 0), the weight is zero. Where a query may see no key,
        all weights are equal, as in Linen.
      broadcast_dropout: drop the same weights in every batch entry and head.
      dropout_rng: the key to draw what is dropped from.
      dropout_rate: probability to drop a weight.
      deterministic: drop nothing.
      dtype: the dtype of the computation (None: promoted from query, key and value).
      precision: of both products, see `jax.lax.Precision`.
      module: where to sow the weights, as the nnx.Intermediate `attention_weights`; None does not.
      promote_dtype: called with `(query, key, value)` and `dtype`, and then with `(query, key)`.
      is_causal: query i sees keys 0 to i only; together with `mask`, what both allow.

    Returns:
      `[*batch, q_length, heads, v_depth]`.

    Raises:
      AttentionShapeError: arguments that do not fit each other.
      OptionError: `dropout_rate` is no probability.
      MissingRngsError: weights are to be dropped, and there is no `dropout_rng`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> x = jnp.arange(3.0).reshape(3, 1, 1)
    >>> nnx.dot_product_attention(jnp.zeros((3, 1, 1)), x, x, is_causal=True)[:, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_query_and_key(query.shape, key.shape)
    if value.shape[:-1] != key.shape[:-1]:
        raise AttentionShapeError(
            "key and value",
            "the same shape up to the depth",
            "They come from the same tokens: give them the same batch axes, length and heads.",
            key=key.shape,
            value=value.shape,
        )
    dropout: dict[str, Any] = {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate}
    dropout |= {"broadcast_dropout": broadcast_dropout, "deterministic": deterministic}
    numerics: dict[str, Any] = {"dtype": query.dtype, "precision": precision, "promote_dtype": promote_dtype}
    weights = dot_product_attention_weights(
        query, key, bias, mask, module=module, is_causal=is_causal, **dropout, **numerics
    )
    return _average(weights, value, precision)


def dot_product_attention_weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """The weights of `dot_product_attention`, to look at or to average with in another way.

    Args are those of `dot_product_attention`.

    Returns:
      `[*batch, heads, q_length, kv_length]`; rows sum to 1 where nothing is dropped.

    Raises:
      AttentionShapeError: arguments that do not fit each other.
      OptionError: `dropout_rate` is no probability.
      MissingRngsError: weights are to be dropped, and there is no `dropout_rng`.

    >>> import jax.numpy as jnp
    >>> dot_product_attention_weights(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1, 4)), is_causal=True).tolist()
    [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    query, key = promote_dtype((query, key), dtype=dtype)
    _check_query_and_key(query.shape, key.shape)
    dropout_rate = probability("dot_product_attention", "dropout_rate", dropout_rate)
    dtype = query.dtype
    query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
    logits = _logits(query, key, precision)
    if bias is not None:
        logits = logits + _broadcastable("bias", bias, logits.shape)
    if mask is not None:
        mask = _broadcastable("mask", mask, logits.shape)
    if is_causal:
        causal = _broadcastable("mask", jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits.shape)
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits).astype(dtype)
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    if deterministic or dropout_rate == 0:
        return weights
    return _dropped(weights, dropout_rate, dropout_rng, broadcast_dropout)


def _logits(query: jax.Array, key: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads == kv_heads:
        return jnp.einsum("...qhd,...khd->...hqk", query, key, precision=precision)
    # Not `jnp.repeat(key)`: to keep fewer keys in memory is what the groups are for.
    query = query.reshape(*query.shape[:-2], kv_heads, heads // kv_heads, query.shape[-1])
    logits = jnp.einsum("...qhgd,...khd->...hgqk", query, key, precision=precision)
    return logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])


def _average(weights: jax.Array, value: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    heads, kv_heads = weights.shape[-3], value.shape[-2]
    if heads == kv_heads:
        return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)
    weights = weights.reshape(*weights.shape[:-3], kv_heads, heads // kv_heads, *weights.shape[-2:])
    y = jnp.einsum("...hgqk,...khd->...qhgd", weights, value, precision=precision)
    return y.reshape(*y.shape[:-3], heads, y.shape[-1])


def _dropped(weights: jax.Array, rate: float, rng: jax.Array | None, broadcast: bool) -> jax.Array:
    """`weights`, some of them zero and the others divided by 1 - rate."""
    if rng is None:
        raise MissingRngsError(
            f"Attention with dropout_rate={rate}",
            "a key, as dropout_rng",
            rng,
            "Pass dropout_rng=rngs.dropout(), or deterministic=True.",
        )
    if rate == 1:  # 0 / 0 would make a NaN of every weight
        return jnp.zeros_like(weights)
    shape = (*(1,) * (weights.ndim - 2), *weights.shape[-2:]) if broadcast else weights.shape
    keep = jax.random.bernoulli(rng, 1 - rate, shape)
    return weights * (keep.astype(weights.dtype) / jnp.asarray(1 - rate, weights.dtype))


def _check_query_and_key(query: Shape, key: Shape) -> None:
    fits = len(query) == len(key) >= 3 and query[:-3] == key[:-3] and query[-1] == key[-1]
    if not fits or not key[-2] or query[-2] % key[-2]:
        raise AttentionShapeError(
            "query and key",
            "[*batch, q_length, heads, depth] and [*batch, kv_length, kv_heads, depth],"
            " with a number of heads that kv_heads divides",
            "Batch axes and depth must be the same: nothing is broadcast.",
            query=query,
            key=key,
        )


def _broadcastable(what: str, x: jax.Array, weights: Shape) -> jax.Array:
    """`x` with as many axes as the weights have; AttentionShapeError unless it broadcasts to them.

    JAX would put the axes in itself, but not under `jax_numpy_rank_promotion="raise"`.
    """
    shape = jnp.shape(x)
    try:
        fits = jnp.broadcast_shapes(shape, weights) == weights
    except ValueError:
        fits = False
    if not fits:
        raise AttentionShapeError(
            what,
            f"what broadcasts to [*batch, heads, q_length, kv_length] = {weights}",
            f"A {what} for all heads has a 1 there, which nnx.make_attention_mask puts in.",
            **{what: shape},
        )
    return x if len(shape) == len(weights) else jnp.expand_dims(x, tuple(range(len(weights) - len(shape))))


# ---- masks -------------------------------------------------------------------------------------------------


def make_attention_mask(
    query_input: jax.Array,
    key_input: jax.Array,
    pairwise_fn: Callable[..., Any] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """A mask from a function of a query's and a key's entry.

    Args:
      query_input: `[*batch, q_length]`.
      key_input: `[*batch, kv_length]`.
      pairwise_fn: elementwise; called with shapes `[*batch, q_length, 1]` and `[*batch, 1, kv_length]`.
      extra_batch_dims: number of axes of size 1 to put in front.
      dtype: of the mask.

    Returns:
      `[*1, *batch, 1, q_length, kv_length]`; the 1 stands for all heads.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> padding = jnp.array([1, 1, 0])
    >>> nnx.make_attention_mask(padding, padding, dtype=bool)[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    mask = pairwise_fn(jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2))
    mask = jnp.expand_dims(mask, -3)
    mask = jnp.expand_dims(mask, tuple(range(size("make_attention_mask", "extra_batch_dims", extra_batch_dims))))
    return cast(jax.Array, mask.astype(dtype))


def make_causal_mask(x: jax.Array, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32) -> jax.Array:
    """The mask under which each token sees itself and those before it.

    Args:
      x: `[*batch, length]`; only its shape counts.
      extra_batch_dims: number of axes of size 1 to put in front.
      dtype: of the mask.

    Returns:
      `[*1, *batch, 1, length, length]`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.make_causal_mask(jnp.zeros(3), dtype=int)[0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: jax.Array | None, dtype: Dtype = jnp.float32) -> jax.Array | None:
    """The mask that allows what all of `masks` allow.

    Args:
      *masks: of one rank, broadcastable to each other; None allows everything.
      dtype: of the mask.

    Returns:
      Their logical and; None if all are None.

    Raises:
      AttentionShapeError: masks of different ranks.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> nnx.combine_masks(jnp.array([1, 1, 0]), None, jnp.array([0, 2, 1]))
    Array([0., 1., 0.], dtype=float32)
    """
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    if len({jnp.ndim(mask) for mask in present}) > 1:
        raise AttentionShapeError(
            "masks",
            "the same rank",
            "Insert axes of size 1, or pass extra_batch_dims to nnx.make_attention_mask.",
            **{f"masks[{i}]": jnp.shape(mask) for i, mask in enumerate(present)},
        )
    return functools.reduce(jnp.logical_and, present).astype(dtype)
