"""Derived rules between stacks of layers and layers one by one, of both APIs; and as a file of rules."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.derivation.to_rules import UnsayableRuleError
from bridge.checkpoint.in_memory import train_state_to_nnx
from bridge.checkpoint.rules.apply import read_rules
from tests.support.derive_cases import X, check, converted, random_variables, reads
from tests.tolerance import assert_trees_equal


class Pairs(nn.Module):
    """Two equal layers in one body: unrolled, they alternate."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(4)(nn.tanh(nn.Dense(4)(x)))), None


class Scanned(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Pairs) if self.remat else Pairs
        x = nn.Dense(4)(x)
        stack = nn.scan(body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4)
        return nn.Dense(4)(stack()(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        for _ in range(4):
            x, _ = nn.remat(Pairs)()(x)
        return nn.Dense(4)(x)


class NnxPair(nnx.Module):
    def __init__(self, rngs):
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.one = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.second(nnx.tanh(self.one(x))))


class NnxListOfPairs(nnx.Module):
    def __init__(self, rngs):
        self.inp, self.out = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.layers = nnx.List([NnxPair(rngs) for _ in range(4)])

    def __call__(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return self.out(x)


class NnxStack(nnx.Module):
    axis = 0

    def __init__(self, rngs):
        self.inp, self.out = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: 0})
        make = nnx.split_rngs(splits=4)(nnx.vmap(NnxPair, in_axes=0, out_axes=axes))
        self.layers = make(rngs)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: 0})

        @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return self.out(run(self.inp(x), self.layers))


class NnxStackOnAxisOne(NnxStack):
    axis = 1


class NnxStackWithoutCalls(NnxStack):
    """The body uses the layers itself: no call of a pair says that both are in one stack."""

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.tanh(layer.second(nnx.tanh(layer.one(x))))

        return self.out(run(self.inp(x), self.layers))


MADE = [NnxListOfPairs, NnxStack, NnxStackOnAxisOne, NnxStackWithoutCalls]
LINEN = [Unrolled(), Scanned(), Scanned(1), Scanned(-1), Scanned(remat=True)]
# Layers one by one to each of NNX, each stack of Linen to another; the grid has every pair.
DIAGONAL = {(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0), (4, 3)}
PAIRS = [
    pytest.param(linen, make, id=f"{linen!r}-{make.__name__}", marks=[] if (i, j) in DIAGONAL else pytest.mark.grid)
    for i, linen in enumerate(LINEN)
    for j, make in enumerate(MADE)
]


@pytest.mark.slow
@pytest.mark.parametrize(("linen", "make"), PAIRS)
def test_stacks_and_layers_one_by_one(linen, make):
    check(linen, make, X)


class Grid(nn.Module):
    """Two rounds of three layers, the statistics of which stand in other axes than the parameters."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.tanh(nn.Dense(4)(nn.BatchNorm(use_running_average=True)(x)))
                return nn.GRUCell(4)(x, x)

        class Round(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                inner = nn.scan(
                    Layer, variable_axes={"params": 1, "batch_stats": 0}, split_rngs={"params": True}, length=3
                )
                return inner()(nn.Dense(4)(x), None)[0], None

        axes = {"params": -1, "batch_stats": 1}
        outer = nn.scan(Round, variable_axes=axes, split_rngs={"params": True}, length=2)
        return outer()(x, None)[0]


class NnxCell(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.fc, self.cell = nnx.Linear(4, 4, rngs=rngs), nnx.GRUCell(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.fc(self.norm(x)))
        return self.cell(x, x)[0]


class NnxRound(nnx.Module):
    def __init__(self, rngs):
        self.inp = nnx.Linear(4, 4, rngs=rngs)
        self.cells = nnx.split_rngs(splits=3)(nnx.vmap(NnxCell))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, cell: cell(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.inp(x), self.cells)


class NnxGrid(nnx.Module):
    def __init__(self, rngs):
        self.rounds = nnx.split_rngs(splits=2)(nnx.vmap(NnxRound))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.rounds)


class NnxGridByHand(nnx.Module):
    def __init__(self, rngs):
        self.rounds = nnx.List([NnxRound(rngs) for _ in range(2)])

    def __call__(self, x):
        for one in self.rounds:
            x = one(x)
        return x


class NnxFlatGrid(nnx.Module):
    def __init__(self, rngs):
        self.inputs = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.cells = nnx.List([NnxCell(rngs) for _ in range(6)])

    def __call__(self, x):
        for i, inp in enumerate(self.inputs):
            x = inp(x)
            for cell in self.cells[3 * i : 3 * i + 3]:
                x = cell(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("make", [NnxGrid, NnxGridByHand, NnxFlatGrid], ids=lambda cls: cls.__name__)
def test_stacks_of_stacks_with_fused_gates(make):
    check(Grid(), make, X, same_bits=False)


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            nn.Dense, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 1}, split_rngs={"params": True}
        )
        return heads(4)(x)


class NnxEnsemble(nnx.Module):
    def __init__(self, rngs):
        self.heads = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, None))(self.heads, x)


class NnxHeads(nnx.Module):
    def __init__(self, rngs):
        self.heads = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        return jnp.stack([head(x) for head in self.heads])


class NnxLaxScan(nnx.Module):
    """A stack that goes through JAX's own scan: no transform of NNX tells its axis, the sizes do."""

    def __init__(self, rngs):
        self.pairs = nnx.split_rngs(splits=3)(nnx.vmap(NnxPair))(rngs)

    def __call__(self, x):
        graphdef, state = nnx.split(self.pairs)
        return jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [NnxEnsemble, NnxHeads], ids=lambda cls: cls.__name__)
def test_ensembles(make):
    check(Ensemble(), make, X, same_bits=False)  # one batched product here, three there


def test_a_stack_in_a_scan_of_jax():
    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x, _ = Pairs()(x)
            return x

    check(Three(), NnxLaxScan, X)


@pytest.mark.slow
@pytest.mark.parametrize("linen", [Unrolled(), Scanned(1)], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("make", [NnxListOfPairs, NnxStack], ids=lambda cls: cls.__name__)
def test_as_a_file_of_rules(linen, make, tmp_path):
    derived = derive(linen, make, X)
    values = random_variables(linen, X)
    (tmp_path / "rules.toml").write_text(derived.to_toml())
    rules = read_rules(tmp_path / "rules.toml")
    assert rules.apply(reads(values)).made == derived.apply(reads(values)).made
    made = converted(derived, values)
    assert_trees_equal(converted(rules.inverse(), made), converted(derived.inverse(), made))
    assert derived.inverse().rules() == rules.inverse()


@pytest.mark.slow
def test_layers_that_no_rule_can_say():
    class Odd(NnxListOfPairs):
        def __call__(self, x):
            x = self.inp(x)
            for layer in reversed(self.layers):
                x = layer(x)
            return self.out(x)

    derived = check(Scanned(), Odd, X)
    with pytest.raises(UnsayableRuleError, match=r"(?s)Linen: params/ScanPairs_0/Dense_0/bias.*count 0, 1"):
        derived.to_toml()


@pytest.mark.slow
def test_a_train_state_and_its_optimizer():
    tx, linen = optax.adam(0.1), Unrolled()
    key = jax.random.key(5)
    state = TrainState.create(apply_fn=linen.apply, params=linen.init(key, X)["params"], tx=tx)
    grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), state.params)
    state = state.apply_gradients(grads=grads)
    derived = derive(linen, NnxStackOnAxisOne, X)
    model = NnxStackOnAxisOne(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_state_to_nnx(state, model, optimizer, rules=derived)
    for ours, theirs in (
        (model.layers.second.kernel, state.params),
        (optimizer.opt_state[0].mu["layers"]["second"]["kernel"], state.opt_state[0].mu),
    ):
        expected = [theirs[f"CheckpointPairs_{n}"]["Dense_0"]["kernel"] for n in range(4)]
        assert_trees_equal(ours[...], jnp.stack(expected, axis=1))
