"""Pairs of feed-forward models, and faults planted: MLPs, norms, gates, adapters, experts, towers.

Knows models; knows nothing of how they are compared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge import ToLinen
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.rules.rule import Rule
from bridge.variables.load import variables_of
from tests.support.arrays import noise
from tests.support.pairs.pair import Fault, Pair, Sides, drawn, native, rules, twins, wrapped

# ---- an MLP: Dense, LayerNorm, gelu; compact in Linen, with names of its own in NNX --------------


class LinenFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(8)(nn.LayerNorm(epsilon=1e-5)(x)))
        return nn.Dense(6)(y)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(6)(x)
        x = x + LinenFeedForward()(x)
        x = x + LinenFeedForward()(x)
        return nn.Dense(3)(x)


class FeedForward(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.act = nnx.gelu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.act(self.up(self.norm(x))))


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem, self.head = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.blocks = nnx.List([FeedForward(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _x() -> tuple[jax.Array]:
    return (noise(1, 5, 4),)


_MLP = (
    ("Dense_0", "stem"),
    ("Dense_1", "head"),
    (r"LinenFeedForward_(\d+)/LayerNorm_0", r"blocks/\1/norm"),
    (r"LinenFeedForward_(\d+)/Dense_0", r"blocks/\1/up"),
    (r"LinenFeedForward_(\d+)/Dense_1", r"blocks/\1/down"),
)
_MLP_LAYERS = {
    "Dense_0": "stem",
    "LinenFeedForward_0": "blocks/0",
    "LinenFeedForward_1/LayerNorm_0": "blocks/1/norm",
    "LinenFeedForward_1/Dense_1": "blocks/1/down",
    "Dense_1": "head",
}


def _against_to_nnx(_: Any = None) -> Sides:
    module, inputs = LinenMLP(), _x()
    variables = drawn(module, *inputs)
    return Sides((module, variables), wrapped(module, variables, *inputs), inputs)


def _against_to_linen(make: Any = None) -> Sides:
    inputs = _x()
    model = native(MLP, rules(*_MLP), drawn(LinenMLP(), *inputs))
    variables = variables_of(model)
    return Sides(model, (ToLinen(make or MLP), variables), inputs)


def _with_derived_rules(make: Any = None) -> Sides:
    """The rules are those that `derive` finds, and proves, from the two models."""
    module, inputs = LinenMLP(), _x()
    variables = drawn(module, *inputs)
    how = derive(module, MLP, *inputs)
    return Sides((module, variables), native(make or MLP, how, variables), inputs, {"rules": how})


def _between_functions(_: Any = None) -> Sides:
    """A function of arrays against the bound call of a Linen module."""
    module, inputs = LinenMLP(), _x()
    params = drawn(module, *inputs)["params"]

    def dense(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["kernel"] + p["bias"]

    def by_hand(x: jax.Array) -> jax.Array:
        x = dense(params["Dense_0"], x)
        for name in ("LinenFeedForward_0", "LinenFeedForward_1"):
            block = params[name]
            mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            norm = (x - mean) / jnp.sqrt(var + 1e-5)
            norm = norm * block["LayerNorm_0"]["scale"] + block["LayerNorm_0"]["bias"]
            x = x + dense(block["Dense_1"], jax.nn.gelu(dense(block["Dense_0"], norm)))
        return dense(params["Dense_1"], x)

    return Sides(functools.partial(module.apply, {"params": params}), by_hand, inputs)


# ---- gates: SwiGLU, fused in NNX -----------------------------------------------------------------


class LinenGated(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = nn.Dense(6, name="gate")(x), nn.Dense(6, name="value")(x)
        return nn.Dense(4, name="out")(nn.silu(gate) * value)


class Gated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.both, self.out = nnx.Linear(4, 12, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(self.both(x), 2, axis=-1)
        return self.out(nnx.silu(gate) * value)


class GatedTheOtherWay(Gated):
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.both(x), 2, axis=-1)
        return self.out(nnx.silu(gate) * value)


_FUSED_GATE = tuple(
    Rule([f"params/gate/{leaf}", f"params/value/{leaf}"], f"params/both/{leaf}", concat=-1)
    for leaf in ("kernel", "bias")
)


# ---- LoRA ----------------------------------------------------------------------------------------


class LinenLoRA(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lora_a = self.param("lora_a", nn.initializers.normal(), (x.shape[-1], 2))
        lora_b = self.param("lora_b", nn.initializers.zeros, (2, 5))
        return nn.Dense(5, name="base")(x) + x @ lora_a @ lora_b


class LinenAdapted(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(jnp.tanh(LinenLoRA(name="adapted")(x)))


class Adapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.adapted = nnx.LoRALinear(4, 5, lora_rank=2, lora_param_type=nnx.Param, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.adapted(x)))


# ---- weights that are normalized -----------------------------------------------------------------


class LinenWeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(jnp.tanh(nn.WeightNorm(nn.Dense(5), name="normed")(x)))


class WeightNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.normed = nnx.WeightNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.normed(x)))


class LinenSpectral(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.SpectralNorm(nn.Dense(5), name="normed")(x, update_stats=train)
        return nn.Dense(3, name="head")(nn.relu(x))


class Spectral(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.normed = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        return self.head(nnx.relu(self.normed(x, update_stats=train)))


class SpectralWithoutUpdate(Spectral):
    """The same output as long as nobody trains it: the vectors of the power iteration stay."""

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        kept = {name: jnp.asarray(v[...]) for name, v in self.normed.batch_stats["kernel"].items()}
        y = self.normed(x, update_stats=train)
        for name, value in kept.items():
            self.normed.batch_stats["kernel"][name][...] = value
        return self.head(nnx.relu(y))


def _spectral(name: str) -> Rule:
    place = ["batch_stats", "normed"]
    return Rule([*place, f"Dense_0/kernel/{name}"], [*place, "batch_stats", "kernel", name])


# ---- a mixture of experts: stacked in Linen, a list in NNX ---------------------------------------


class LinenMoE(nn.Module):
    experts: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nn.Dense(self.experts, use_bias=False, name="router")(x)
        wi = self.param("wi", nn.initializers.normal(), (self.experts, x.shape[-1], 6))
        wo = self.param("wo", nn.initializers.normal(), (self.experts, 6, x.shape[-1]))
        chosen = jnp.argmax(logits, axis=-1)
        gate = jnp.take_along_axis(nn.softmax(logits), chosen[:, None], axis=-1)
        every = jnp.einsum("beh,ehd->bed", nn.relu(jnp.einsum("bd,edh->beh", x, wi)), wo)
        return gate * every[jnp.arange(len(x)), chosen], chosen


class Expert(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 6, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(6, 4, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


class MoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.router = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.experts = nnx.List([Expert(rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = self.router(x)
        chosen = jnp.argmax(logits, axis=-1)
        hot = jax.nn.one_hot(chosen, 3) * nnx.softmax(logits)
        outputs = jnp.stack([expert(x) for expert in self.experts], axis=1)
        return jnp.einsum("be,bed->bd", hot, outputs), chosen


class MoEWithoutGate(MoE):
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.argmax(self.router(x), axis=-1)
        outputs = jnp.stack([expert(x) for expert in self.experts], axis=1)
        return jnp.einsum("be,bed->bd", jax.nn.one_hot(chosen, 3), outputs), chosen


class MoEOffByOne(MoE):
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, chosen = super().__call__(x)
        return y, chosen + 1


# ---- two towers ----------------------------------------------------------------------------------


class LinenTower(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x)))


class LinenTowers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        left, right = LinenTower(name="left")(x), LinenTower(name="right")(y)
        return nn.Dense(2, name="head")(jnp.concatenate([left, left * right], axis=-1))


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


class Towers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.left, self.right, self.head = Tower(rngs), Tower(rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        left, right = self.left(x), self.right(y)
        return self.head(jnp.concatenate([left, left * right], axis=-1))


class TowersOfEachOther(Towers):
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return super().__call__(y, x)


class StoppedTower(Tower):
    """Its output is right, and no gradient comes through it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(super().__call__(x))


class TowersOfWhichOneIsStopped(Towers):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.left = StoppedTower(rngs)


def _pair_of_x() -> tuple[jax.Array, jax.Array]:
    return noise(1, 3, 4), noise(2, 3, 4)


PAIRS = (
    twins("mlp", LinenMLP, MLP, _x, *_MLP, layers=_MLP_LAYERS),
    twins("mlp without rules", LinenMLP, MLP, _x, *_MLP, layers=_MLP_LAYERS, given=False),
    Pair("mlp with derived rules", _with_derived_rules, _MLP_LAYERS),
    Pair("mlp against its ToNNX", _against_to_nnx, {name: name for name in _MLP_LAYERS}),
    Pair(
        "native mlp against its ToLinen", _against_to_linen,
        {name: name for name in _MLP_LAYERS.values()},
    ),
    Pair("two functions", _between_functions, left_out=("a function has none",)),
    twins("gated, fused in nnx", LinenGated, Gated, _x, *_FUSED_GATE, layers={"out": "out"}),
    twins(
        "LoRA", LinenAdapted, Adapted, _x, ("adapted/base", "adapted"),
        Rule("params/adapted/(lora_.)", r"params/adapted/lora/\1"), layers={"head": "head"},
    ),
    twins(
        "weight norm", LinenWeightNormed, WeightNormed, _x,
        Rule(["params", "normed", "Dense_0/kernel/scale"], "params/normed/scales/kernel"),
        ("Dense_0", "normed/layer_instance"), layers={"normed": "normed", "head": "head"},
    ),
    twins(
        "spectral norm", LinenSpectral, Spectral, _x, *map(_spectral, ("u", "sigma")),
        ("Dense_0", "normed/layer_instance"), layers={"normed": "normed", "head": "head"},
        train=True,
    ),
    twins(
        "mixture of experts, unrolled in nnx", LinenMoE, MoE, _x,
        Rule("params/wi", "params/experts/{i}/up/kernel", unstack=0),
        Rule("params/wo", "params/experts/{i}/down/kernel", unstack=0), layers={"router": "router"},
    ),
    twins(
        "two towers", LinenTowers, Towers, _pair_of_x,
        layers={"left/up": "left/up", "right/down": "right/down"},
    ),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _one_element(model: MLP) -> None:
    kernel = model.blocks[0].up.kernel
    kernel.set_value(kernel[...].at[2, 3].add(0.05))


def _without_bias(model: MLP) -> None:
    model.blocks[1].down.bias.set_value(jnp.zeros(6))


def _transposed(model: Towers) -> None:
    square = model.left.down.kernel[...][:4]
    model.left.down.kernel.set_value(jnp.concatenate([square.T, model.left.down.kernel[...][4:]]))


def _epsilon(model: MLP) -> None:
    model.blocks[1].norm.epsilon = 1e-2


def _exact_gelu(model: MLP) -> None:
    """In both blocks: of one alone the output shows less than float32 allows a whole model."""
    for block in model.blocks:
        block.act = functools.partial(nnx.gelu, approximate=False)


def _norm_in_half(model: MLP) -> None:
    model.blocks[1].norm.dtype = jnp.bfloat16


def _exchanged_blocks(model: MLP) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def _exchanged_towers(model: Towers) -> None:
    model.left, model.right = model.right, model.left


def _an_ulp(model: MLP) -> None:
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Param):
            x.set_value(jnp.nextafter(x[...], jnp.inf))


def _low_rank_order(model: Adapted) -> None:
    a = model.adapted.lora.lora_a
    a.set_value(a[...][:, ::-1])


def _no_scale(model: WeightNormed) -> None:
    model.normed.epsilon = 0.5


def _wrong_function(_: Any) -> Any:
    module, inputs = LinenMLP(), _x()
    return functools.partial(module.apply, drawn(module, *inputs, seed=4))


def _wrong_wrapped(model: Any) -> None:
    kernel = model.LinenFeedForward_1["Dense_0"]["kernel"]
    kernel.set_value(kernel[...] * 1.01)


def _exchanged_experts(model: MoE) -> None:
    model.experts[0], model.experts[2] = model.experts[2], model.experts[0]


class UnscaledMLP(MLP):
    """The residual is missing around the second block."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x + self.blocks[0](x)
        return self.head(self.blocks[1](x))


class MLPInOtherOrder(MLP):
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in (self.blocks[1], self.blocks[0]):
            x = x + block(x)
        return self.head(x)


class HalfHead(MLP):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(jnp.bfloat16)


_BEHIND_BLOCK_0 = ("LinenFeedForward_1", "LinenFeedForward_1/Dense_0", "Dense_1")
_FF0, _FF1 = "LinenFeedForward_0", "LinenFeedForward_1"

FAULTS = (
    Fault(
        "a wrong weight, one element", "mlp", f"{_FF0}/Dense_0", "blocks/0/up", "parameters",
        _one_element, finding="parameter", behind=(f"{_FF0}/Dense_1", *_BEHIND_BLOCK_0),
    ),
    Fault(
        "a wrong weight, without rules", "mlp without rules", f"{_FF0}/Dense_0", "blocks/0/up",
        "parameters", _one_element, behind=_BEHIND_BLOCK_0,
    ),
    Fault(
        "a missing bias", "mlp", f"{_FF1}/Dense_1", "blocks/1/down", "parameters", _without_bias,
        behind=("Dense_1",),
    ),
    Fault(
        "a transposed block of a kernel", "two towers", "left/down", "left/down", "parameters",
        _transposed, behind=("head",),
    ),
    Fault(
        "another epsilon", "mlp", f"{_FF1}/LayerNorm_0", "blocks/1/norm", "computation", _epsilon,
        behind=(f"{_FF1}/Dense_0", f"{_FF1}/Dense_1", "Dense_1"),
    ),
    Fault("gelu, exact", "mlp", _FF0, "blocks/0", "computation", _exact_gelu, also=(_FF1,)),
    Fault(
        "a norm in half precision", "mlp", f"{_FF1}/LayerNorm_0", "blocks/1/norm", "dtype",
        _norm_in_half,
    ),
    Fault(
        "exchanged layers", "mlp", f"{_FF0}/LayerNorm_0", "blocks/0/norm", "parameters order",
        _exchanged_blocks,
        also=(
            f"{_FF0}/Dense_0", f"{_FF0}/Dense_1", f"{_FF1}/LayerNorm_0", f"{_FF1}/Dense_0",
            f"{_FF1}/Dense_1",
        ),
        behind=("Dense_1",),
    ),
    Fault(
        "layers called in another order", "mlp", _FF0, "blocks/0", "order", model=MLPInOtherOrder,
        behind=("Dense_1",),
    ),
    Fault(
        "exchanged towers", "two towers", "left/up", "left/up", "parameters order",
        _exchanged_towers, also=("left/down", "right/up", "right/down"), behind=("head",),
    ),
    Fault(
        "exchanged inputs", "two towers", "", "", "computation order", model=TowersOfEachOther,
        behind=("left/up", "right/up", "head"),
    ),
    Fault(
        "stop_gradient: only gradients differ", "two towers", "left", "left", "computation",
        model=TowersOfWhichOneIsStopped, finding="gradient",
    ),
    Fault(
        "a missing residual", "mlp", "", "", "computation", model=UnscaledMLP, behind=("Dense_1",),
    ),
    Fault("an output in another dtype", "mlp", "", "", "dtype", model=HalfHead),
    Fault(
        "gate and value exchanged", "gated, fused in nnx", "", "", "computation order",
        model=GatedTheOtherWay, behind=("out",),
    ),
    Fault(
        "ranks of LoRA exchanged on one side", "LoRA", "adapted", "adapted", "parameters",
        _low_rank_order, behind=("head",),
    ),
    Fault(
        "epsilon of a weight norm", "weight norm", "normed", "normed", "computation", _no_scale,
        behind=("head",),
    ),
    Fault(
        "a state that is not updated", "spectral norm", "normed", "normed", "state",
        model=SpectralWithoutUpdate, finding="state",
    ),
    Fault("another function", "two functions", "", "", "computation", _wrong_function),
    Fault(
        "a wrong weight in a ToNNX", "mlp against its ToNNX", f"{_FF1}/Dense_0", f"{_FF1}/Dense_0",
        "parameters", _wrong_wrapped, behind=(f"{_FF1}/Dense_1", "Dense_1"),
    ),
    Fault(
        "exchanged experts", "mixture of experts, unrolled in nnx", "", "experts/0",
        "parameters order", _exchanged_experts,
    ),
    Fault(
        "experts without their gate", "mixture of experts, unrolled in nnx", "", "", "computation",
        model=MoEWithoutGate,
    ),
    Fault(
        "an integer output off by one", "mixture of experts, unrolled in nnx", "", "",
        "computation", model=MoEOffByOne,
    ),
)  # fmt: skip
