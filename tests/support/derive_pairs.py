"""Pairs of models in which the first guess at what is what is wrong, and another mapping is right; or none is.

Law: each pair computes the same under one mapping of variables (RIGHT), or under none (WRONG), or under two (TIED).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from tests.support.numbers import normal


class Pair(NamedTuple):
    linen: Any
    make: Any
    inputs: tuple[Any, ...]
    says: str = ""  # in the table, or in the error


def linear(n, m, rngs, **options):
    return nnx.Linear(n, m, rngs=rngs, **options)


def nnx_class(init, call):
    """A module from two functions."""
    return type("Net", (nnx.Module,), {"__init__": init, "__call__": call})


def linen_class(call):
    return type("Net", (nn.Module,), {"__call__": nn.compact(call)})()


def model(linen, init, call):
    """Linen's module of one function, and a class of NNX of two."""
    return linen_class(linen), nnx_class(init, call)


X = normal(1, 2, 8)
SEQ = normal(2, 2, 8, 8)
IMAGE = normal(3, 2, 4, 4, 8)


# ---- other orders of calls -------------------------------------------------------------------------------------


def _axial(self, x):
    x = x + nn.Embed(4, 8, name="row")(jnp.arange(4))[:, None]
    x = x + nn.Embed(4, 8, name="col")(jnp.arange(4))[None]
    return nn.Dense(3)(jnp.tanh(x))


def _axial_init(self, rngs):
    self.across, self.down = nnx.Embed(4, 8, rngs=rngs), nnx.Embed(4, 8, rngs=rngs)
    self.head = linear(8, 3, rngs)


def _axial_call(self, x):
    x = x + self.across(jnp.arange(4))[None]
    return self.head(jnp.tanh(x + self.down(jnp.arange(4))[:, None]))


def _mixing(self, x):
    x = nn.Dense(8, use_bias=False, name="channels")(x)
    x = nn.Dense(8, use_bias=False, name="tokens")(x.mT).mT
    return nn.Dense(3)(jnp.tanh(x))


def _mixing_init(self, rngs):
    self.time, self.depth = (linear(8, 8, rngs, use_bias=False) for _ in range(2))
    self.head = linear(8, 3, rngs)


def _mixing_call(self, x):
    return self.head(jnp.tanh(self.depth(self.time(x.mT).mT)))


def _towers(self, user, item):
    def tower(x):
        return nn.Dense(4)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))

    return (tower(user) * tower(item)).sum(-1)


def _towers_init(self, rngs):
    for name in ("item", "user"):
        layers = linear(8, 8, rngs), nnx.LayerNorm(8, rngs=rngs), nnx.relu, linear(8, 4, rngs)
        setattr(self, name, nnx.Sequential(*layers))


def _towers_call(self, user, item):
    y = self.item(item)
    return (self.user(user) * y).sum(-1)


class _Online(nn.Module):
    stop: bool = True

    @nn.compact
    def __call__(self, x):
        one, other = (nn.Dense(4)(nn.tanh(nn.Dense(8)(x))) for _ in range(2))
        return (one - (jax.lax.stop_gradient(other) if self.stop else other)) ** 2


def _online_init(self, rngs):
    for name in ("first", "second"):
        setattr(self, name, nnx.Sequential(linear(8, 8, rngs), nnx.tanh, linear(8, 4, rngs)))


def _target_first(self, x):
    target = jax.lax.stop_gradient(self.first(x))
    return (self.second(x) - target) ** 2


def _no_target(self, x):
    return (self.first(x) - self.second(x)) ** 2


def _experts(self, x):
    gates = nn.softmax(nn.Dense(3, name="router")(x))
    return sum(gates[..., n, None] * nn.Dense(8)(nn.relu(nn.Dense(6)(x))) for n in range(3))


def _experts_init(self, rngs):
    self.router = linear(8, 3, rngs)
    self.experts = nnx.List([nnx.Sequential(linear(8, 6, rngs), nnx.relu, linear(6, 8, rngs)) for _ in range(3)])


def _experts_call(self, x):
    gates = nnx.softmax(self.router(x))
    outputs = {n: self.experts[n](x) for n in (2, 0, 1)}
    return sum(gates[..., n, None] * outputs[n] for n in range(3))


def _tables(self, users, items):
    return nn.Dense(3)(nn.Embed(5, 4)(users) * 2 + nn.Embed(5, 4)(items))


def _tables_init(self, rngs):
    self.items, self.users = nnx.Embed(5, 4, rngs=rngs), nnx.Embed(5, 4, rngs=rngs)
    self.head = linear(4, 3, rngs)


def _tables_call(self, users, items):
    y = self.items(items)
    return self.head(self.users(users) * 2 + y)


# ---- other orders of numbers -----------------------------------------------------------------------------------


def attend(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def _fused(self, x):
    qkv = nn.Dense(24)(x).reshape(*x.shape[:2], 3, 2, 4)
    return nn.Dense(8)(attend(*(qkv[:, :, n] for n in range(3))).reshape(x.shape))


def _fused_init(self, rngs):
    self.qkv, self.out = linear(8, 24, rngs), linear(8, 8, rngs)


def _by_heads(self, x):
    qkv = self.qkv(x).reshape(*x.shape[:2], 2, 3, 4)
    return self.out(attend(*(qkv[:, :, :, n] for n in range(3))).reshape(x.shape))


def _kqv(self, x):
    k, q, v = (part.reshape(*x.shape[:2], 2, 4) for part in jnp.split(self.qkv(x), 3, -1))
    return self.out(attend(q, k, v).reshape(x.shape))


def _separate(self, x):
    q, k, v = (nn.Dense(8, name=name)(x).reshape(*x.shape[:2], 2, 4) for name in ("q", "k", "v"))
    return nn.Dense(8, name="o")(attend(q, k, v).reshape(x.shape))


def _separate_init(self, rngs):
    self.q, self.k, self.v, self.o = (linear(8, 8, rngs) for _ in range(4))


def _separate_call(self, x):
    q, k, v = (layer(x).reshape(*x.shape[:2], 2, 4) for layer in (self.q, self.k, self.v))
    return self.o(attend(q, k, v).reshape(x.shape))


def _attention(self, x):
    return nn.MultiHeadDotProductAttention(2)(x)


def _scaled_by_heads(self, x):
    qkv = self.qkv(x).reshape(*x.shape[:2], 2, 3, 4)
    q, k, v = (qkv[:, :, :, n] for n in range(3))
    return self.out(attend(q / 2, k, v).reshape(x.shape))


def _glu(self, x):
    a, b = jnp.split(nn.Dense(12)(x), 2, -1)
    return nn.Dense(3)(a * nn.silu(b))


def _glu_init(self, rngs):
    self.up, self.down = linear(8, 12, rngs), linear(6, 3, rngs)


def _glu_call(self, x):
    b, a = jnp.split(self.up(x), 2, -1)
    return self.down(a * nnx.silu(b))


def _gates(step, split):
    def call(self, x):
        c, h = jnp.zeros((2, 4)), jnp.zeros((2, 4))
        for n in range(3):
            gates = dict(zip(split, jnp.split(step(self, jnp.concatenate([x[:, n], h], -1)), 4, -1), strict=True))
            i, f, o = (jax.nn.sigmoid(gates[name]) for name in "ifo")
            c = f * c + i * jnp.tanh(gates["g"])
            h = o * jnp.tanh(c)
        return h

    return call


class _Cell(nn.Module):
    def setup(self):
        self.dense = nn.Dense(16)

    __call__ = _gates(lambda self, x: self.dense(x), "ifgo")


def _cell_init(self, rngs):
    self.dense = linear(12, 16, rngs)


def _flat(self, x):
    x = nn.relu(nn.Conv(6, (3, 3))(x))
    return nn.Dense(3)(x.reshape(len(x), -1))


def _flat_init(self, rngs):
    self.conv, self.head = nnx.Conv(8, 6, (3, 3), rngs=rngs), linear(96, 3, rngs)


def _channels_first(self, x):
    x = nnx.relu(self.conv(x)).transpose(0, 3, 1, 2)
    return self.head(x.reshape(len(x), -1))


class _Proj(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("weight", nn.initializers.normal(), (8, 8)).T


def _proj(self, x):
    return nn.Dense(3)(jnp.tanh(_Proj()(jnp.tanh(_Proj()(x)))))


def _proj_init(self, rngs):
    self.b, self.a = (linear(8, 8, rngs, use_bias=False) for _ in range(2))
    self.out = linear(8, 3, rngs)


def _proj_call(self, x):
    return self.out(jnp.tanh(self.b(jnp.tanh(self.a(x)))))


class _Filter(nn.Module):
    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(), (3, 3, 8, 8))
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight.transpose(1, 0, 3, 2), (1, 1), "SAME", dimension_numbers=form)


def _filter(self, x):
    return nn.Dense(3)(jnp.tanh(_Filter()(x)))


def _filter_init(self, rngs):
    self.conv, self.out = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs), linear(8, 3, rngs)


def _filter_call(self, x):
    return self.out(jnp.tanh(self.conv(x)))


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (8,))
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


def _norms(self, x):
    return nn.Dense(3)(_Norm()(jnp.tanh(nn.Dense(8)(_Norm()(x)))))


def _norms_init(self, rngs):
    self.last, self.first = nnx.RMSNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)
    self.inner, self.out = linear(8, 8, rngs), linear(8, 3, rngs)


def _norms_call(self, x):
    return self.out(self.last(jnp.tanh(self.inner(self.first(x)))))


def _position(self, x):
    return nn.Dense(3)(x + self.param("position", nn.initializers.normal(), (1, 8, 8)))


def _position_init(self, rngs):
    self.position, self.head = nnx.Param(jnp.zeros((8, 8))), linear(8, 3, rngs)


def _position_call(self, x):
    return self.head(x + self.position[...])


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + linen_class(_fused)(nn.LayerNorm()(x)), None


def _scanned(self, x):
    stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return stack()(x, None)[0]


def _listed_init(self, rngs):
    self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(3)])
    self.blocks = nnx.List([nnx_class(_fused_init, _by_heads)(rngs) for _ in range(3)])


def _listed_call(self, x):
    for norm, block in zip(self.norms, self.blocks, strict=True):
        x = x + block(norm(x))
    return x


IDS = (jnp.array([0, 3, 1]), jnp.array([4, 2, 2]))
RIGHT = {
    "axial embeddings": Pair(*model(_axial, _axial_init, _axial_call), (IMAGE,)),
    "token and channel mixing": Pair(*model(_mixing, _mixing_init, _mixing_call), (SEQ,)),
    "towers": Pair(*model(_towers, _towers_init, _towers_call), (X, X + 1)),
    "online and target": Pair(_Online(), nnx_class(_online_init, _target_first), (X,)),
    "experts": Pair(*model(_experts, _experts_init, _experts_call), (X,)),
    "tables": Pair(*model(_tables, _tables_init, _tables_call), IDS),
    "qkv by heads": Pair(*model(_fused, _fused_init, _by_heads), (SEQ,), "a (b c d) -> a (c b d)"),
    "kqv": Pair(*model(_fused, _fused_init, _kqv), (SEQ,), "in order [1, 0, 2]"),
    "separate, and fused": Pair(*model(_separate, _fused_init, _kqv), (SEQ,), "fused"),
    "separate, and fused by heads": Pair(*model(_separate, _fused_init, _by_heads), (SEQ,), "fused"),
    "fused, and separate": Pair(*model(_fused, _separate_init, _separate_call), (SEQ,), "fused"),
    "attention, and fused": Pair(*model(_attention, _fused_init, _scaled_by_heads), (SEQ,), "of another shape"),
    "halves of a GLU": Pair(*model(_glu, _glu_init, _glu_call), (X,), "in order [1, 0]"),
    "gates of an LSTM": Pair(_Cell(), nnx_class(_cell_init, _gates(lambda self, x: self.dense(x), "fiog")), (SEQ,)),
    "channels first": Pair(*model(_flat, _flat_init, _channels_first), (IMAGE,), "(a b) c -> (b a) c"),
    "turned kernels": Pair(*model(_proj, _proj_init, _proj_call), (X,), "a b -> b a"),
    "a turned filter": Pair(*model(_filter, _filter_init, _filter_call), (IMAGE,), "a b c d -> b a d c"),
    "an axis of one": Pair(*model(_position, _position_init, _position_call), (SEQ,), "1 a b -> a b"),
    "a stack, by heads": Pair(*model(_scanned, _listed_init, _listed_call), (SEQ,), "(a b c) -> (b a c)"),
}
SHIFTED = Pair(*model(_norms, _norms_init, _norms_call), (X,), "+1")


# ---- no mapping, and two ----------------------------------------------------------------------------------------


def _pre_norm(self, x):
    return x + nn.Dense(8)(nn.LayerNorm()(x))


def _norm_init(self, rngs):
    self.dense, self.norm = linear(8, 8, rngs), nnx.LayerNorm(8, rngs=rngs)


def _post_norm(self, x):
    return self.norm(x + self.dense(x))


def _other_activation(self, x):
    return self.out(nnx.gelu(self.hidden(x), approximate=False))


def _mlp(self, x):
    return nn.Dense(8)(nn.gelu(nn.Dense(8)(x)))


def _mlp_init(self, rngs):
    self.hidden, self.out = linear(8, 8, rngs), linear(8, 8, rngs)


def _epsilon_init(self, rngs):
    self.dense, self.norm = linear(8, 8, rngs), nnx.LayerNorm(8, epsilon=1e-3, rngs=rngs)


def _pre_norm_call(self, x):
    return x + self.dense(self.norm(x))


def _sum(self, x):
    return nn.Dense(4)(x) + nn.Dense(4)(nn.tanh(x)) + nn.Dense(4)(x)


def _sum_init(self, rngs):
    self.a, self.b, self.c = (linear(8, 4, rngs) for _ in range(3))


def _sum_call(self, x):
    return self.a(x) + self.b(nnx.tanh(x)) + self.c(x)


WRONG = {
    "pre-norm and post-norm": Pair(*model(_pre_norm, _norm_init, _post_norm), (X,), "output: off by"),
    "another activation": Pair(*model(_mlp, _mlp_init, _other_activation), (X,), "output: off by"),
    "another epsilon": Pair(*model(_pre_norm, _epsilon_init, _pre_norm_call), (X,), "output: off by"),
}
TIED = {
    "online and target": Pair(
        _Online(False), nnx_class(_online_init, _no_target), (X,), "first/layers/0, second/layers/0"
    ),
    "a sum": Pair(*model(_sum, _sum_init, _sum_call), (X,), "Dense_0, Dense_2 -> a, c"),
}
