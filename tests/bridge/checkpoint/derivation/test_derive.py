"""Derived rules against numbers: models whose equal-shaped layers are random, so that only the right pairs agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge import ToNNX
from bridge.checkpoint.derivation.derive import DerivationError, UnprovenDerivationError, derive
from bridge.demo.linen_model import Cnn
from bridge.demo.native_model import DigitsNet
from tests.layers import LAYERS
from tests.support.derive_cases import Chain, NestedCalls, X, check, converted, located, random_variables, reads
from tests.tolerance import assert_trees_equal


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_every_layer_as_its_row_says(layer):
    """The rows are proven with numbers in tests/nnx_core/nn; here what is derived is compared with them."""

    def call(modes):
        method = layer.method
        if isinstance(method, str):
            return lambda module, x: getattr(module, method)(x, **modes)
        return lambda module, x: method(module, x, **modes)

    methods = call(layer.twin_modes[False]), call(layer.modes[False])
    derived = derive(layer.twin(), lambda rngs: layer.make(nnx, rngs), layer.example(), method=methods)
    values = random_variables(layer.twin(), layer.example(), method=methods[0])
    made = converted(derived, values)
    by_name = {"/".join(at): x for at, x in values.items()}
    assert_trees_equal(converted(derived.inverse(), made), values)
    module = layer.module({name: by_name[name.replace("|", "/")] for name in layer.variables()})
    expected = {at: x.get_value() for at, x in located(module).items()}
    assert_trees_equal(dict(sorted(made.items())), dict(sorted(expected.items())))


# ---- order, class and shape --------------------------------------------------------------------------------


def test_layers_of_one_shape_pair_in_the_order_of_calls():
    derived = check(NestedCalls(), Chain, X)
    pairs = {(a.split("/")[1], b.split("/")[1]) for a, b, _ in derived.table()}
    assert pairs == {("Dense_2", "first"), ("Dense_1", "middle"), ("Dense_0", "out")}
    assert "params/Dense_2/kernel" in str(derived)
    assert "Dense/Linear, call 1 of 3 alike" in str(derived)


class SetupChain(nn.Module):
    def setup(self):
        self.z = nn.Dense(4)
        self.layers = [nn.Dense(4), nn.Dense(4)]
        self.heads = {"a": nn.Dense(3), "b": nn.Dense(3)}

    def __call__(self, x):
        for layer in (*self.layers, self.z):
            x = nn.tanh(layer(x))
        return self.heads["b"](x), self.heads["a"](x)


class ListChain(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.heads = nnx.Dict({name: nnx.Linear(4, 3, rngs=rngs) for name in "ab"})

    def __call__(self, x):
        for layer in self.blocks:
            x = nnx.tanh(layer(x))
        return self.heads["b"](x), self.heads["a"](x)


def test_setup_lists_and_dicts():
    check(SetupChain(), ListChain, X)


@pytest.mark.slow
def test_the_pair_of_the_demo():
    x = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
    for train in (False, True):
        check(Cnn(dropout_rate=0.0), lambda rngs: DigitsNet(0.0, rngs=rngs), x, train=train)


class ResBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3,), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = nn.BatchNorm(use_running_average=True, name="last")(nn.Conv(self.features, (3,), use_bias=False)(y))
        if y.shape != x.shape:
            x = nn.Conv(self.features, (3,), use_bias=False, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ResBlock(6)(ResBlock(6)(x))
        shared = ResBlock(6)
        return nn.Dense(2, name="head")(shared(shared(x)))


class NnxResBlock(nnx.Module):
    def __init__(self, d, features, rngs):
        self.conv1 = nnx.Conv(d, features, (3,), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(features, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3,), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(features, use_running_average=True, rngs=rngs)
        if d != features:
            self.proj = nnx.Conv(d, features, (3,), use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu((self.proj(x) if hasattr(self, "proj") else x) + y)


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.a = NnxResBlock(4, 6, rngs)
        self.b = NnxResBlock(6, 6, rngs)
        self.c = NnxResBlock(6, 6, rngs)
        self.fc = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.c(self.c(self.b(self.a(x)))))


@pytest.mark.slow
def test_resnet_with_a_shared_block_and_a_projection():
    check(ResNet(), NnxResNet, X)


class Block(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=self.deterministic)(nn.LayerNorm()(x))
        x = x + y
        y = nn.Dense(8)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(y))


class Transformer(nn.Module):
    """Tokens and positions in, tied logits out; parameters of its own."""

    depth: int = 3

    @nn.compact
    def __call__(self, tokens, scale, *, deterministic=True):
        embed = nn.Embed(7, 4, name="embed")
        x = embed(tokens) * scale
        x = x + self.param("pos_embedding", nn.initializers.normal(), (5, 4))
        cls = self.param("cls", nn.initializers.normal(), (1, 1, 4))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, 4)), x], axis=1)
        for _ in range(self.depth):
            x = Block(deterministic)(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.ln1, self.ln2 = nnx.LayerNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, 4, rngs=rngs))
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.5, rngs=rngs)

    def __call__(self, x, deterministic=True):
        x = x + self.attention(self.ln1(x), deterministic=deterministic)
        return x + self.mlp(self.ln2(x))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.token_table = nnx.Embed(7, 4, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((5, 4)))
        self.cls = nnx.Param(jnp.zeros((1, 1, 4)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, tokens, scale, *, deterministic=True):
        x = self.token_table(tokens) * scale + self.position
        x = jnp.concatenate([jnp.broadcast_to(self.cls, (len(x), 1, 4)), x], axis=1)
        for block in self.blocks:
            x = block(x, deterministic)
        return self.token_table.attend(self.norm(x))


TOKENS = jnp.asarray(np.array([[1, 2, 3, 4, 5], [6, 5, 4, 0, 0]], "int32"))


@pytest.mark.slow
def test_transformer_with_tied_embedding_flags_and_two_inputs():
    scale = jnp.linspace(0.5, 1.5, 4)
    derived = check(Transformer(), NnxTransformer, TOKENS, scale, deterministic=True)
    with pytest.raises(UnprovenDerivationError, match="draws random numbers"):
        derive(Transformer(), NnxTransformer, TOKENS, scale, deterministic=False)
    noisy = derive(Transformer(), NnxTransformer, TOKENS, scale, deterministic=False, unproven=True)
    assert noisy == derived
    assert "draws random numbers" in noisy.unproven
    assert (
        "params/pos_embedding",
        "params/position",
        "Transformer/NnxTransformer, by shapes, the only ones alike (5, 4)",
    ) in (derived.table())


class NnxHalfMoved(nnx.Module):
    """The blocks are Linen's still."""

    def __init__(self, rngs):
        self.first = ToNNX(ResBlock(6), rngs).lazy_init(X)
        self.rest = nnx.List([ToNNX(ResBlock(6), rngs).lazy_init(jnp.ones((2, 5, 6))) for _ in range(2)])
        self.fc = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.rest[0](self.first(x))
        return self.fc(self.rest[1](self.rest[1](x)))


@pytest.mark.slow
def test_a_model_that_is_moved_in_part():
    check(ResNet(), NnxHalfMoved, X)


class Owner(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = Sharer()
        nn.share_scope(self, inner)
        return inner(nn.Dense(4)(x))


class Sharer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="inside")(x) * self.param("gain", nn.initializers.ones, (4,))


class NnxSharer(nnx.Module):
    def __init__(self, rngs):
        self.outside, self.inside = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.factor = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return self.inside(self.outside(x)) * self.factor


def test_modules_that_share_a_scope():
    check(Owner(), NnxSharer, X)


# ---- recurrent layers, layers around layers ----------------------------------------------------------------


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))(x)
        x = nn.RNN(nn.OptimizedLSTMCell(4))(x)
        x = nn.RNN(nn.LSTMCell(4))(nn.RNN(nn.LSTMCell(4))(x))
        x = nn.RNN(nn.MGUCell(4))(nn.RNN(nn.SimpleCell(4))(x))
        return nn.SpectralNorm(nn.Dense(4))(nn.WeightNorm(nn.Dense(4))(x), update_stats=False)


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.both = nnx.Bidirectional(nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs)), nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs)))
        self.spectral = nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), update_stats=False, rngs=rngs)
        self.b = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))
        self.a = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))
        self.fused = nnx.RNN(nnx.OptimizedLSTMCell(8, 4, rngs=rngs))
        self.simple = nnx.RNN(nnx.SimpleCell(4, 4, dtype=None, rngs=rngs))
        self.mgu = nnx.RNN(nnx.MGUCell(4, 4, rngs=rngs))
        self.weight = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        x = self.b(self.a(self.fused(self.both(x))))
        return self.spectral(self.weight(self.mgu(self.simple(x))))


@pytest.mark.slow
def test_recurrent_layers_and_norms_of_weights():
    check(Recurrent(), NnxRecurrent, X, same_bits=False)  # the gates of a GRU are one product here


class WeightNormOfCell(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.GRUCell(4, name="cell")
        return nn.WeightNorm(cell)(x[:, 0], x[:, 1])[1]


class NnxWeightNormOfCell(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.WeightNorm(nnx.GRUCell(4, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.norm(x[:, 0], x[:, 1])[1]


def test_weight_norm_of_a_cell_has_scales_for_each_gate():
    check(WeightNormOfCell(), NnxWeightNormOfCell, X, same_bits=False)


# ---- what was never called, and parameters of the user's own ------------------------------------------------


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        scale = self.param("scale", nn.initializers.ones, (4,))
        w_out = self.param("w_out", nn.initializers.ones, (4, 3))
        count = self.variable("counts", "n", lambda: jnp.zeros(()))
        ema = self.variable("averages", "scale", jnp.ones, (4,))
        return (x * scale + count.value * ema.value) @ w_out


class Count(nnx.Variable):
    """Of nobody's collection."""


class Average(nnx.Variable):
    """The same."""


class NnxCustom(nnx.Module):
    def __init__(self, rngs):
        self.scale, self.out = nnx.Param(jnp.ones(4)), nnx.Param(jnp.ones((4, 3)))
        self.steps, self.smoothed = Count(jnp.zeros(())), Average(jnp.ones(4))

    def __call__(self, x, *, train=False):
        return (x * self.scale + self.steps * self.smoothed) @ self.out


def test_parameters_and_collections_of_its_own():
    derived = check(Custom(), NnxCustom, X, train=True)
    assert {(a, b) for a, b, _ in derived.table()} == {
        ("params/scale", "params/scale"),
        ("params/w_out", "params/out"),
        ("counts/n", "Count/steps"),
        ("averages/scale", "Average/smoothed"),
    }


class WithHeads(nn.Module):
    heads: tuple[str, ...] = ("a", "b", "aux")

    @nn.compact
    def __call__(self, x, train=False):
        for name in self.heads:
            y = nn.Dense(4, name=f"head_{name}")(x)
            x = y if name in "ab" or train else x
        return nn.tanh(x)


class NnxWithHeads(nnx.Module):
    names = ("aux", "a", "b")

    def __init__(self, rngs):
        for name in self.names:
            setattr(self, f"head_{name}", nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x, train=False):
        x = self.head_b(self.head_a(x))
        return nnx.tanh(self.head_aux(x) if train else x)


class NnxOtherHeads(NnxWithHeads):
    names = ("a", "b", "help")


def test_a_head_that_is_not_called_is_told_by_its_name():
    derived = check(WithHeads(), NnxWithHeads, X)
    assert ("params/head_aux/bias", "params/head_aux/bias", "Dense/Linear, by name (4,)") in derived.table()


def test_a_head_that_is_not_called_and_has_another_name():
    with pytest.raises(
        DerivationError, match=r"(?s)head_aux/kernel float32\[4, 4\], of Dense, call 3; nearest: .*never called"
    ):
        derive(WithHeads(), NnxOtherHeads, X)
    check(WithHeads(), NnxOtherHeads, X, options={"rename": {"head_aux": "head_help"}})


def test_renamed_dropped_and_fresh():
    derived = check(
        WithHeads(("a", "b", "only_linen")),
        NnxWithHeads,
        X,
        options={"rename": {"head_only_linen": None, "head_b": "head_b"}, "fresh": ["head_aux"]},
        train=False,
    )
    assert derived.dropped == (("params", "head_only_linen", "bias"), ("params", "head_only_linen", "kernel"))
    values = random_variables(WithHeads(("a", "b", "only_linen")), X)
    result = derived.apply(reads(values))
    assert set(result.dropped) == set(derived.dropped)
    assert result.new == (("params", "head_aux", "bias"), ("params", "head_aux", "kernel"))
    assert derived.inverse().apply(reads(located(NnxWithHeads(nnx.Rngs(0))))).new == derived.dropped
    assert "params/head_only_linen/bias    -" in str(derived)
    assert derived.rules().apply(reads(values)).new == result.new
