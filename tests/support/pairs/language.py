"""Pairs of models of text, and faults planted: GPT, a cache, encoder and decoder, fused qkv.

Knows models; knows nothing of how they are compared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.rules.rule import Rule
from tests.support.arrays import noise
from tests.support.pairs.pair import Fault, Pair, Sides, drawn, native, rules, twins, wrapped

WIDTH, HEADS = 8, 2

# ---- a block: pre-norm, attention, MLP -----------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(y, mask=mask)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(12, name="up")(y))
        return x + nn.Dense(WIDTH, name="down")(y)


def attention(rngs: nnx.Rngs, **options: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, **options)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = attention(rngs)
        self.up, self.down = nnx.Linear(WIDTH, 12, rngs=rngs), nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class PostNormBlock(Block):
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self.down(nnx.gelu(self.up(x))))


class BlockWithoutResidual(Block):
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return self.down(nnx.gelu(self.up(self.norm2(x))))


class UnmaskedBlock(Block):
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x)


# ---- GPT -----------------------------------------------------------------------------------------


class LinenGPT(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(11, WIDTH, name="wte")(ids)
        x = x + nn.Embed(6, WIDTH, name="wpe")(jnp.arange(ids.shape[1]))
        mask = nn.make_causal_mask(ids)
        for n in range(2):
            x = LinenBlock(name=f"h_{n}")(x, mask)
        return nn.Dense(11, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


class GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, first: type[Block] = Block, second: type[Block] = Block):
        self.wte, self.wpe = nnx.Embed(11, WIDTH, rngs=rngs), nnx.Embed(6, WIDTH, rngs=rngs)
        self.h = nnx.List([first(rngs), second(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 11, use_bias=False, rngs=rngs)

    def positions(self, ids: jax.Array) -> jax.Array:
        return jnp.arange(ids.shape[1])

    def mask(self, ids: jax.Array) -> jax.Array:
        return nnx.make_causal_mask(ids)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.wte(ids) + self.wpe(self.positions(ids))
        mask = self.mask(ids)
        for block in self.h:
            x = block(x, mask)
        return self.head(self.norm(x))


class GPTFromOne(GPT):
    """The positions begin at one."""

    def positions(self, ids: jax.Array) -> jax.Array:
        return 1 + jnp.arange(ids.shape[1])


class GPTOfPadding(GPT):
    """The mask also hides the id 0: wrong in the rows that have one."""

    def mask(self, ids: jax.Array) -> jax.Array:
        padding = nnx.make_attention_mask(ids > 0, ids > 0)
        return nnx.combine_masks(nnx.make_causal_mask(ids), padding)


def _ids() -> tuple[jax.Array]:
    """The id 0 stands in the last row only."""
    ids = np.random.default_rng(0).integers(1, 11, (3, 5), np.int32)
    ids[-1, 2] = 0
    return (jax.device_put(ids),)


_GPT = ((r"h_(\d+)", r"h/\1"),)
_GPT_LAYERS = {
    "wte": "wte",
    "h_0": "h/0",
    "h_1/attention/value": "h/1/attention/value",
    "h_1/up": "h/1/up",
}


def _gpt_against_to_nnx(_: Any = None) -> Sides:
    module, inputs = LinenGPT(), _ids()
    variables = drawn(module, *inputs)
    return Sides((module, variables), wrapped(module, variables, *inputs), inputs)


# ---- decoding ------------------------------------------------------------------------------------


class LinenDecoder(nn.Module):
    """Takes one token after the other; keys and values of those before are in the cache."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, decode=True, name="attention")(y)
        return nn.Dense(5, name="head")(x)


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs)
        self.attention.init_cache((2, 4, WIDTH))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x + self.attention(self.norm(x)))


def _decoding(make: Any = None) -> Sides:
    """In the middle of a sequence: two tokens are in the cache."""
    module, inputs = LinenDecoder(), (noise(1, 2, 1, WIDTH),)
    variables = drawn(module, noise(0, 2, 4, WIDTH))
    cache = variables["cache"]["attention"]
    for n, name in enumerate(("cached_key", "cached_value")):
        cache[name] = noise(n, *cache[name].shape).at[:, 2:].set(0)
    cache["cache_index"] = jnp.asarray(2, jnp.int32)
    how = rules()
    model = native(make or Decoder, how, variables)
    return Sides((module, variables), model, inputs, {"rules": how})


# ---- encoder and decoder -------------------------------------------------------------------------


class LinenTranslator(nn.Module):
    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        embed = nn.Embed(9, WIDTH, name="embed")
        memory = LinenBlock(name="encoder")(embed(source))
        x = LinenBlock(name="decoder")(embed(target), nn.make_causal_mask(target))
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="cross")(y, memory)
        return embed.attend(x)


class Translator(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(9, WIDTH, rngs=rngs)
        self.encoder, self.decoder = Block(rngs), Block(rngs)
        self.norm, self.cross = nnx.LayerNorm(WIDTH, rngs=rngs), attention(rngs)

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        memory = self.encoder(self.embed(source))
        x = self.decoder(self.embed(target), nnx.make_causal_mask(target))
        x = x + self.cross(self.norm(x), memory)
        return self.embed.attend(x)


class TranslatorToItself(Translator):
    """Cross attention that looks at the target."""

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        self.encoder(self.embed(source))
        x = self.decoder(self.embed(target), nnx.make_causal_mask(target))
        x = x + self.cross(self.norm(x), self.norm(x))
        return self.embed.attend(x)


def _two_texts() -> tuple[jax.Array, jax.Array]:
    draw = np.random.default_rng(1)
    return tuple(jax.device_put(draw.integers(0, 9, (2, n), np.int32)) for n in (4, 3))


# ---- query, key and value in one kernel ----------------------------------------------------------


class LinenSeparate(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (nn.Dense(WIDTH, name=name)(x) for name in ("q", "k", "v"))
        weights = nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / WIDTH**0.5)
        return nn.Dense(WIDTH, name="out")(jnp.einsum("bqk,bkd->bqd", weights, v))


class LinenWithSeparate(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(x + LinenSeparate(name="attention")(x))


class Fused(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.scale = WIDTH**-0.5

    def heads(self, x: jax.Array) -> Any:
        return jnp.split(self.qkv(x), 3, axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.heads(x)
        weights = nnx.softmax(jnp.einsum("bqd,bkd->bqk", q * self.scale, k))
        return self.out(jnp.einsum("bqk,bkd->bqd", weights, v))


class FusedInAnotherOrder(Fused):
    def heads(self, x: jax.Array) -> Any:
        k, q, v = jnp.split(self.qkv(x), 3, axis=-1)
        return q, k, v


class FusedInHalf(Fused):
    """The logits overflow float16."""

    def heads(self, x: jax.Array) -> Any:
        q, k, v = jnp.split(self.qkv(x).astype(jnp.float16), 3, axis=-1)
        return q * 1000, k * 1000, v.astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.heads(x)
        logits = jnp.einsum("bqd,bkd->bqk", q, k).astype(jnp.float32) / 1e6
        return self.out(jnp.einsum("bqk,bkd->bqd", nnx.softmax(logits * self.scale), v))


class WithFused(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, kind: type[Fused] = Fused):
        self.attention, self.head = kind(rngs), nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x + self.attention(x))


def _fused(leaf: str) -> Rule:
    parts = [f"params/attention/{name}/{leaf}" for name in "qkv"]
    return Rule(parts, f"params/attention/qkv/{leaf}", concat=-1)


_QKV = tuple(map(_fused, ("kernel", "bias")))


def _tokens() -> tuple[jax.Array]:
    return (noise(1, 2, 4, WIDTH),)


PAIRS = (
    twins("gpt", LinenGPT, GPT, _ids, *_GPT, layers=_GPT_LAYERS),
    twins(
        "gpt, trained for two steps", LinenGPT, GPT, _ids, *_GPT, layers=_GPT_LAYERS,
        left_out=("rounding",), steps=2, tx=optax.adam(1e-2),
    ),
    Pair(
        "gpt against its ToNNX", _gpt_against_to_nnx,
        {"h_1/attention/value": "h_1/attention/value"},
    ),
    Pair(
        "decoding with a cache", _decoding, {"attention/query": "attention/query", "head": "head"},
    ),
    twins(
        "encoder and decoder, tied embedding", LinenTranslator, Translator, _two_texts,
        layers={"encoder/up": "encoder/up", "cross/key": "cross/key"},
    ),
    twins(
        "query, key and value fused in nnx", LinenWithSeparate, WithFused, _tokens, *_QKV,
        layers={"attention/out": "attention/out", "head": "head"},
    ),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _q_and_k(model: GPT) -> None:
    layer = model.h[0].attention
    layer.query, layer.key = layer.key, layer.query


def _exchanged_heads(model: GPT) -> None:
    kernel = model.h[1].attention.value.kernel
    kernel.set_value(kernel[...][:, ::-1])


def _unscaled(model: GPT) -> None:
    """`attention_fn` without the division by the root of the head's size."""

    def attend(query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return nnx.dot_product_attention(query * (WIDTH / HEADS) ** 0.5, *args, **kwargs)

    model.h[1].attention.attention_fn = attend


def _scale(model: WithFused) -> None:
    model.attention.scale = 1 / WIDTH


def _wrong_cache(model: Decoder) -> None:
    model.attention.cache_index.set_value(jnp.asarray(1, jnp.int32))


def _stale_cache(model: Decoder) -> None:
    keys = model.attention.cached_key
    keys.set_value(keys[...].at[:, 0].multiply(1.1))


def _exchanged_blocks(model: GPT) -> None:
    model.h[0], model.h[1] = model.h[1], model.h[0]


def _one_id(model: GPT) -> None:
    table = model.wte.embedding
    table.set_value(table[...].at[0, 3].add(0.1))


class ForgetfulDecoder(Decoder):
    """Its output is right; what it has seen is not kept."""

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = self.attention.cached_value[...]
        y = super().__call__(x)
        self.attention.cached_value[...] = kept
        return y


class UntiedTranslator(Translator):
    """Logits of a scaled table."""

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        return super().__call__(source, target) / WIDTH**0.5


_BEHIND_H0 = ("h_1/norm1", "h_1/attention", "h_1/up", "norm", "head")

FAULTS = (
    Fault(
        "query and key exchanged", "gpt", "h_0/attention/query", "h/0/attention/query",
        "parameters order", _q_and_k, also=("h_0/attention/key",),
    ),
    Fault(
        "heads of the value exchanged", "gpt", "h_1/attention/value", "h/1/attention/value",
        "parameters", _exchanged_heads, behind=("h_1/attention/out", "h_1/up", "norm", "head"),
    ),
    Fault(
        "attention without its scale", "gpt", "h_1/attention", "h/1/attention", "computation",
        _unscaled, behind=("h_1/attention/out", "norm", "head"),
    ),
    Fault(
        "another scale", "query, key and value fused in nnx", "attention", "attention",
        "computation", _scale, behind=("attention/out", "head"),
    ),
    Fault(
        "q and k in another order of the fused kernel", "query, key and value fused in nnx",
        "attention", "attention", "computation order",
        model=functools.partial(WithFused, kind=FusedInAnotherOrder),
        behind=("attention/out", "head"),
    ),
    Fault(
        "float16 overflows", "query, key and value fused in nnx", "attention", "attention",
        "computation dtype", model=functools.partial(WithFused, kind=FusedInHalf),
        behind=("attention/out", "head"),
    ),
    Fault(
        "positions begin at one", "gpt", "", "", "computation", model=GPTFromOne,
        behind=("wpe", "h_0/norm1", "head"),
    ),
    Fault(
        "a mask that hides id 0, in one row", "gpt", "", "", "computation", model=GPTOfPadding,
        behind=("h_0", "h_0/attention", "head"),
    ),
    Fault(
        "no mask in the first block", "gpt", "h_0", "h/0", "computation",
        model=functools.partial(GPT, first=UnmaskedBlock), behind=("h_0/attention", *_BEHIND_H0),
    ),
    Fault(
        "a norm behind instead of before", "gpt", "h_0", "h/0", "computation order",
        model=functools.partial(GPT, first=PostNormBlock), behind=_BEHIND_H0,
    ),
    Fault(
        "a block without its second residual", "gpt", "h_1", "h/1", "computation",
        model=functools.partial(GPT, second=BlockWithoutResidual), behind=("norm", "head"),
    ),
    Fault(
        "exchanged blocks", "gpt", "h_0/norm1", "h/0/norm1", "parameters order", _exchanged_blocks,
        also=(
            "h_0/attention/query", "h_0/attention/key", "h_0/attention/value", "h_0/attention/out",
            "h_0/norm2", "h_0/up", "h_0/down", "h_1/norm1", "h_1/attention/query",
            "h_1/attention/key", "h_1/attention/value", "h_1/attention/out", "h_1/norm2", "h_1/up",
            "h_1/down",
        ),
        behind=("norm", "head"),
    ),
    Fault(
        "one id of an embedding", "gpt", "wte", "wte", "parameters", _one_id,
        behind=("h_0", "h_1", "head"),
    ),
    Fault(
        "a cache that is one token behind", "decoding with a cache", "attention", "attention",
        "parameters state", _wrong_cache, behind=("head",),
    ),
    Fault(
        "a cache with other keys", "decoding with a cache", "attention", "attention",
        "parameters state", _stale_cache, behind=("head",),
    ),
    Fault(
        "a cache that is not written", "decoding with a cache", "attention", "attention", "state",
        model=ForgetfulDecoder, finding="state",
    ),
    Fault(
        "cross attention to itself", "encoder and decoder, tied embedding", "", "",
        "computation order shape", model=TranslatorToItself, behind=("cross",),
    ),
    Fault(
        "scaled logits", "encoder and decoder, tied embedding", "", "", "computation",
        model=UntiedTranslator,
    ),
)  # fmt: skip
