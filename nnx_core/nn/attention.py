"""Multi-head attention, with a cache for decoding token by token.

Law: the arithmetic, its order and its dtypes are flax.linen's, so equal weights and keys give equal bits, in
the cache too. Knows nothing of how parameters are stored or traced.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core._errors import NnxError
from nnx_core.graph.objects import data
from nnx_core.kinds import Cache
from nnx_core.module import Module
from nnx_core.nn import dtypes
from nnx_core.nn._axes import Shape, as_tuple
from nnx_core.nn._errors import InputShapeError, OptionError, next_key, place, require_rngs
from nnx_core.nn._flags import choose_flag, set_flags
from nnx_core.nn._options import probability, sizes
from nnx_core.nn.attention_dot_product import combine_masks, dot_product_attention
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.nn.linear_general import LinearGeneral
from nnx_core.nn.norm import LayerNorm
from nnx_core.rngs import Rngs, RngStream


class MissingCacheError(NnxError, ValueError):
    """Attention was called to decode without a cache."""

    def __init__(self, layer: Module):
        super().__init__(
            f"{type(layer).__name__} at {place(layer)}:\n  expected an autoregressive cache\n  found    None\n"
            "Call init_cache((*batch, max_length, features)) of the layer before the first token, or decode=False."
        )


class MissingInputError(NnxError, ValueError, TypeError):
    """Attention was given values without keys."""

    def __init__(self, layer: Module):
        super().__init__(
            f"{type(layer).__name__} at {place(layer)}:\n  expected inputs_k, since there is inputs_v\n"
            "  found    None\nWhere keys and values come from the same input, pass it as inputs_k alone."
        )


class MultiHeadAttention(Module):
    """Attention of `inputs_q` to `inputs_k`, in several heads (Vaswani et al. 2017, arXiv:1706.03762).

    `query`, `key` and `value` are LinearGenerals with kernels of shape `(features, heads, head_dim)`, `out`
    one of shape `(num_heads, head_dim, out_features)`; `query_ln` and `key_ln` are LayerNorms or None.
    `init_cache` fills `cached_key`, `cached_value` and `cache_index`.

    Args:
      num_heads: number of heads; it divides `qkv_features`, and `head_dim` is what comes out.
      in_features: size of the last axis of `inputs_q`.
      qkv_features: features of all heads together (None: `in_features`).
      out_features: size of the last axis of the output (None: `in_features`).
      num_kv_heads: number of heads of key and value, a divisor of `num_heads` (None: `num_heads`); each serves
        a group of query heads (Ainslie et al. 2023, arXiv:2305.13245).
      in_kv_features: size of the last axis of `inputs_k` and `inputs_v` (None: `in_features`).
      dtype: the dtype of the computation (None: promoted from inputs and parameters).
      param_dtype: the dtype of the parameters.
      broadcast_dropout: drop the same weights in every batch entry and head.
      dropout_rate: probability to drop an attention weight, in [0, 1].
      deterministic: True drops nothing; None leaves it to the call. `train()` and `eval()` of any module that
        holds this one set it.
      precision: of all products, see `jax.lax.Precision`.
      kernel_init: initializer of the kernels.
      out_kernel_init: initializer of the kernel of `out` (None: `kernel_init`).
      bias_init: initializer of the biases.
      out_bias_init: initializer of the bias of `out` (None: `bias_init`).
      use_bias: whether the four products add a bias.
      attention_fn: in place of `nnx.dot_product_attention`; called with query, key, value and, by name, mask,
        dropout_rng, dropout_rate, broadcast_dropout, deterministic, dtype, precision, module, is_causal.
      decode: True takes one token a call and keeps keys and values in the cache; None leaves it to the call.
      normalize_qk: LayerNorm each head's query and key (Dehghani et al. 2023, arXiv:2302.05442).
      qkv_promote_dtype: `promote_dtype` of `query`, `key` and `value`.
      out_promote_dtype: `promote_dtype` of `out`.
      ln_promote_dtype: `promote_dtype` of the LayerNorms.
      qkv_dot_general: `dot_general` of `query`, `key` and `value`.
      out_dot_general: `dot_general` of `out`.
      qkv_dot_general_cls: `dot_general_cls` of `query`, `key` and `value`.
      out_dot_general_cls: `dot_general_cls` of `out`.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      keep_rngs: fork a stream of the layer's own from the stream `dropout`, if `dropout_rate` is not 0.
      kernel_metadata: metadata of the kernels.
      out_kernel_metadata: metadata of the kernel of `out` (empty: `kernel_metadata`).
      bias_metadata: metadata of the biases.
      out_bias_metadata: metadata of the bias of `out` (empty: `bias_metadata`).
      query_ln_scale_metadata: metadata of the scale of `query_ln`.
      key_ln_scale_metadata: metadata of the scale of `key_ln`.

    Raises:
      OptionError: heads that do not divide, or a rate outside [0, 1].
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.MultiHeadAttention(num_heads=4, in_features=6, qkv_features=8, decode=False, rngs=nnx.Rngs(0))
    >>> layer.query.kernel.shape, layer.out.kernel.shape
    ((6, 4, 2), (4, 2, 6))
    >>> layer(jnp.ones((2, 5, 6))).shape
    (2, 5, 6)
    >>> layer.init_cache((2, 5, 6))
    >>> for token in range(3):
    ...     y = layer(jnp.ones((2, 1, 6)), decode=True)
    >>> y.shape, int(layer.cache_index[...])
    ((2, 1, 6), 3)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        qkv_dot_general: Callable[..., jax.Array] | None = None,
        out_dot_general: Callable[..., jax.Array] | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        query_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        key_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self.num_heads, self.in_features = sizes(self, num_heads=num_heads, in_features=in_features)
        _keep_other_sizes(self, qkv_features, out_features, num_kv_heads, in_kv_features)
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.dropout_rate = probability(self, "dropout_rate", dropout_rate)
        self.broadcast_dropout = broadcast_dropout
        self.deterministic, self.decode = deterministic, decode
        self.use_bias, self.normalize_qk, self.attention_fn = use_bias, normalize_qk, attention_fn
        self.qkv_promote_dtype, self.out_promote_dtype = qkv_promote_dtype, out_promote_dtype
        self.qkv_dot_general, self.out_dot_general = qkv_dot_general, out_dot_general
        self.qkv_dot_general_cls, self.out_dot_general_cls = qkv_dot_general_cls, out_dot_general_cls
        self.ln_promote_dtype = ln_promote_dtype
        _check_options(self)
        self.head_dim = self.qkv_features // self.num_heads
        inits = (kernel_init, bias_init, kernel_metadata, bias_metadata)
        ours = (out_kernel_init, out_bias_init, out_kernel_metadata, out_bias_metadata)
        out = tuple(own or shared for own, shared in zip(ours, inits, strict=True))
        _add_layers(self, rngs, inits, out, (query_ln_scale_metadata, key_ln_scale_metadata))
        self.rngs: RngStream | None = data(rngs["dropout"].fork() if keep_rngs and self.dropout_rate > 0 else None)
        self.cached_key = self.cached_value = self.cache_index = data(None)  # `data`: places for Variables

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | jax.Array | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the layer; in decoding, write the token into the cache.

        Args:
          inputs_q: `[*batch, q_length, in_features]`; in decoding, `q_length` and `kv_length` are 1.
          inputs_k: `[*batch, kv_length, in_kv_features]` (None: `inputs_q`).
          inputs_v: `[*batch, kv_length, in_kv_features]` (None: `inputs_k`).
          mask: broadcasts to `[*batch, num_heads, q_length, kv_length]`, in decoding with the `max_length` of the
            cache as `kv_length`; where it is false (or 0), the weight is zero.
          deterministic: goes before the layer's own; neither is asked for if `dropout_rate` is 0.
          rngs: an Rngs with a stream `dropout`, a stream, or a key to use as it is; goes before the layer's own.
          sow_weights: sow the weights (before dropout) as the nnx.Intermediate `attention_weights`.
          decode: goes before the layer's own.
          is_causal: query i sees keys 0 to i only. Decoding always is: a token sees those before it.
          out_sharding: of the output, in JAX's explicit sharding mode.
          qkv_sharding: of query, key and value, in JAX's explicit sharding mode.
          input_positions: `[*batch, length]`, handed to `attention_fn` if given; see
            `nnx.dot_product_attention_with_rope`.

        Returns:
          `[*batch, q_length, out_features]`, in `dtype`, or the dtype promoted from inputs and parameters.

        Raises:
          MissingInputError: there are values and no keys.
          InputShapeError: inputs that do not fit the layer, each other or the cache.
          MissingFlagError: `decode`, or where it matters `deterministic`, is None here and in the layer.
          MissingRngsError: weights are to be dropped, and there is no source of a key.
          MissingCacheError: `init_cache` was not called.
          AttentionShapeError: a mask that does not fit.
        """
        if inputs_k is None and inputs_v is not None:
            raise MissingInputError(self)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        decode = choose_flag(self, "decode", decode, self.decode)
        _check_inputs(self, jnp.shape(inputs_q), jnp.shape(inputs_k), jnp.shape(inputs_v), decode)
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        if decode:
            key, value, mask = _through_cache(self, key, value, mask)
        quiet = not self.dropout_rate or choose_flag(self, "deterministic", deterministic, self.deterministic)
        positions = {} if input_positions is None else {"input_positions": input_positions}
        y = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=None if quiet else next_key(self, rngs, "dropout"),
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=quiet,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal and not decode,  # the cache's mask is causal; row 0 of another sees key 0 only
            **positions,
        )
        return self.out(y, out_sharding=out_sharding)

    def init_cache(self, input_shape: Shape, dtype: Dtype = jnp.float32) -> None:
        """Begin to decode: an empty cache, in new Variables.

        `cached_key` and `cached_value` are Caches of shape `[*batch, max_length, num_kv_heads, head_dim]`,
        `cache_index` one of the number of tokens so far, int32. Beyond `max_length` each token replaces the
        last, as in Linen.

        Args:
          input_shape: `(*batch, max_length, features)`, the shape of the whole input.
          dtype: of the cache; keys and values are cast to it. Linen's is that of its keys.

        Raises:
          InputShapeError: `input_shape` has fewer than two axes.
        """
        if len(input_shape) < 2:
            fix = "init_cache takes the shape of all tokens: (*batch, max_length, features)."
            raise InputShapeError(self, "(*batch, max_length, features)", tuple(input_shape), fix)
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        self.cached_key = Cache(jnp.zeros(shape, dtype))
        self.cached_value = Cache(jnp.zeros(shape, dtype))
        self.cache_index = Cache(jnp.array(0, jnp.int32))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Shape | None = None,
        max_length: int | None = None,
    ) -> None:
        """What `nnx.view` sets; a view that decodes gets a cache of its own if both its sizes are given.

        Args:
          deterministic: True drops nothing, False drops, None leaves it as it is.
          decode: True takes one token a call, None leaves it as it is.
          batch_size: size of the batch axis of the cache, or sizes of several.
          max_length: number of tokens that the cache holds.
        """
        set_flags(self, deterministic=deterministic, decode=decode)
        if self.decode and batch_size is not None and max_length is not None:
            batch = as_tuple(batch_size)
            self.init_cache((*batch, max_length, self.in_features), self.dtype or self.param_dtype)


# ---- construction ------------------------------------------------------------------------------------------


def _either(size: int | None, default: int) -> int:
    return default if size is None else size


def _keep_other_sizes(
    layer: MultiHeadAttention, qkv: int | None, out: int | None, kv_heads: int | None, kv: int | None
) -> None:
    """The sizes that are those of others unless given."""
    layer.num_kv_heads, layer.qkv_features, layer.out_features, layer.in_kv_features = sizes(
        layer,
        num_kv_heads=_either(kv_heads, layer.num_heads),
        qkv_features=_either(qkv, layer.in_features),
        out_features=_either(out, layer.in_features),
        in_kv_features=_either(kv, layer.in_features),
    )


def _check_options(layer: MultiHeadAttention) -> None:
    heads, kv_heads, features = layer.num_heads, layer.num_kv_heads, layer.qkv_features
    if heads < 1 or features % heads:
        raise OptionError(
            layer,
            "num_heads",
            f"a divisor of qkv_features {features}",
            heads,
            "Each head has qkv_features // num_heads features; qkv_features is in_features unless given.",
        )
    if kv_heads < 1 or heads % kv_heads:
        fix = "Each head of key and value serves num_heads // num_kv_heads query heads."
        raise OptionError(layer, "num_kv_heads", f"a divisor of num_heads {heads}", kv_heads, fix)


def _add_layers(
    layer: MultiHeadAttention,
    rngs: Rngs,
    qkv: tuple[Any, ...],
    out: tuple[Any, ...],
    norms: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> None:
    """The layers in the order in which flax.nnx draws their keys.

    `qkv` and `out` are initializers and metadata of kernel and bias, `norms` the metadata of both scales.
    """
    heads, kv_heads = (layer.num_heads, layer.head_dim), (layer.num_kv_heads, layer.head_dim)
    layer.query = _product(layer, rngs, layer.in_features, heads, -1, "qkv", qkv)
    layer.key = _product(layer, rngs, layer.in_kv_features, kv_heads, -1, "qkv", qkv)
    layer.value = _product(layer, rngs, layer.in_kv_features, kv_heads, -1, "qkv", qkv)
    layer.query_ln = _norm(layer, rngs, norms[0]) if layer.normalize_qk else data(None)
    layer.key_ln = _norm(layer, rngs, norms[1]) if layer.normalize_qk else data(None)
    layer.out = _product(layer, rngs, heads, layer.out_features, (-2, -1), "out", out)


def _product(
    layer: MultiHeadAttention, rngs: Rngs, in_features: Any, out_features: Any, axis: Any, own: str, inits: Any
) -> LinearGeneral:
    kernel_init, bias_init, kernel_metadata, bias_metadata = inits
    return LinearGeneral(
        in_features,
        out_features,
        axis=axis,
        use_bias=layer.use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        kernel_init=kernel_init,
        bias_init=bias_init,
        precision=layer.precision,
        promote_dtype=getattr(layer, f"{own}_promote_dtype"),
        dot_general=getattr(layer, f"{own}_dot_general"),
        dot_general_cls=getattr(layer, f"{own}_dot_general_cls"),
        rngs=rngs,
        kernel_metadata=kernel_metadata,
        bias_metadata=bias_metadata,
    )


def _norm(layer: MultiHeadAttention, rngs: Rngs, scale_metadata: Mapping[str, Any]) -> LayerNorm:
    return LayerNorm(
        layer.head_dim,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        promote_dtype=layer.ln_promote_dtype,
        rngs=rngs,
        scale_metadata=scale_metadata,
    )


# ---- call --------------------------------------------------------------------------------------------------


def _check_inputs(layer: MultiHeadAttention, query: Shape, key: Shape, value: Shape, decode: bool) -> None:
    """Features, batch axes and lengths, and those of the cache."""
    # Not `in_features`: inside shard_map the kernel is a shard of its own size, and users replace it.
    features = [product.kernel.shape[0] for product in (layer.query, layer.key, layer.value)]
    batch = query[:-2]
    _check_input(layer, "inputs_q", query, (..., None, features[0]), "The last axis holds in_features.")
    fix = "Keys have the batch axes of the queries and in_kv_features; without inputs_k they come from inputs_q."
    _check_input(layer, "inputs_k", key, (*batch, None, features[1]), fix)
    fix = "Values come from the same tokens as keys; without inputs_v they come from inputs_k."
    _check_input(layer, "inputs_v", value, (*key[:-1], features[2]), fix)
    if decode:
        if layer.cached_key is None:
            raise MissingCacheError(layer)
        token = (*layer.cached_key.shape[:-3], 1)
        fix = "Autoregressive decoding takes one token a call, in the batch that init_cache was given."
        _check_input(layer, "inputs_q", query, (*token, features[0]), fix)
        _check_input(layer, "inputs_k", key, (*token, features[1]), fix)


def _check_input(layer: MultiHeadAttention, name: str, found: Shape, expected: tuple[Any, ...], fix: str) -> None:
    """`expected` may begin with `...`, for any batch axes, and have None where any size will do."""
    tail = expected[1:] if expected[0] is ... else expected
    fits = len(found) >= len(tail) if expected[0] is ... else len(found) == len(tail)
    if not fits or any(
        size not in (None, own) for size, own in zip(tail, found[len(found) - len(tail) :], strict=True)
    ):
        sizes = ["*batch" if size is ... else "length" if size is None else str(size) for size in expected]
        raise InputShapeError(layer, f"({', '.join(sizes)}) as {name}", found, fix)


def _through_cache(
    layer: MultiHeadAttention, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """All keys and values so far, these included, and the mask of those that are there."""
    cached_key, cached_value, index = layer.cached_key[...], layer.cached_value[...], layer.cache_index[...]
    length_axis = cached_key.ndim - 3
    key = lax.dynamic_update_slice_in_dim(cached_key, key.astype(cached_key.dtype), index, length_axis)
    value = lax.dynamic_update_slice_in_dim(cached_value, value.astype(cached_value.dtype), index, length_axis)
    layer.cached_key[...] = key
    layer.cached_value[...] = value
    layer.cache_index[...] = index + 1
    max_length = cached_key.shape[length_axis]
    seen = jnp.broadcast_to(jnp.arange(max_length) <= index, (*cached_key.shape[:-3], 1, 1, max_length))
    return key, value, combine_masks(mask, seen, dtype=bool)
