"""Dispatch: what one training step costs on the host, next to a bare `jax.jit`.

Law: all variants are the same network (Linear, BatchNorm, relu in each layer), the same loss, the same adam,
from the same weights; before anything is timed their losses over several steps must agree.
The network is so small that the time is dispatch: walking objects, flattening, calling, writing back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.training import train_state

import nnx_core
from benchmarks.timing import Step, Timings, interleaved

WIDTH, BATCH, RATE = 8, 4, 1e-3
MOMENTUM, EPSILON = 0.99, 1e-5

BARE = "bare jax.jit"
CORE = "nnx_core.jit"
FLAX = "flax.nnx.jit"
FLAX_TREE = "flax.nnx.jit(graph=False)"
LINEN = "Linen TrainState"


@dataclass(frozen=True)
class Problem:
    """What every variant starts from: kernels `float32[layers, 8, 8]`, inputs and targets `float32[4, 8]`."""

    kernels: np.ndarray
    x: jax.Array
    y: jax.Array


def problem(layers: int) -> Problem:
    """Fixed random weights and data for a network of `layers` layers."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(layers, WIDTH, WIDTH), scale=WIDTH**-0.5).astype(np.float32)
    x, y = (jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32) for _ in range(2))
    return Problem(kernels, x, y)


def squared_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean over the batch and the features."""
    return ((found - wanted) ** 2).mean()


# ----------------------------------------------------------------------------------------- Linen, bare jit


class _LinenNetwork(linen.Module):
    layers: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = linen.Dense(WIDTH)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON)(x))
        return x


class _TrainState(train_state.TrainState):
    batch_stats: Any


def _linen_state(task: Problem) -> _TrainState:
    """The network as a pure function, and its state."""
    network = _LinenNetwork(len(task.kernels))
    variables = network.init(jax.random.key(0), task.x)
    params = dict(variables["params"])
    for i, kernel in enumerate(task.kernels):
        params[f"Dense_{i}"] = {**params[f"Dense_{i}"], "kernel": jnp.asarray(kernel)}
    return _TrainState.create(
        apply_fn=network.apply, params=params, tx=optax.adam(RATE), batch_stats=variables["batch_stats"]
    )


def _linen_step(state: _TrainState, x: jax.Array, y: jax.Array) -> tuple[_TrainState, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        found, updated = state.apply_fn(variables, x, mutable=["batch_stats"])
        return squared_error(found, y), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def linen_train_state(task: Problem) -> Step:
    """Linen as everyone writes it: a TrainState with batch statistics through jax.jit."""
    state, train_step = _linen_state(task), jax.jit(_linen_step)

    def step() -> jax.Array:
        nonlocal state
        state, loss = train_step(state, task.x, task.y)
        return loss

    return step


def bare(task: Problem) -> Step:
    """The floor: the same pure function over one flat list of arrays, which returns those that changed.

    Built from Linen's pure step, so that the compiled arithmetic is the same to the bit; once traced, nothing
    of Linen runs.
    """
    leaves, structure = jax.tree.flatten(_linen_state(task))
    leaves = [jnp.asarray(leaf) for leaf in leaves]  # the step starts as a Python int
    written: list[int] = []

    @jax.jit
    def run(leaves: list[jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        state, loss = _linen_step(jax.tree.unflatten(structure, leaves), x, y)
        new = jax.tree.leaves(state)
        written[:] = [i for i, (old, now) in enumerate(zip(leaves, new, strict=True)) if old is not now]
        return loss, [new[i] for i in written]

    def step() -> jax.Array:
        loss, changed = run(leaves, task.x, task.y)
        for i, leaf in zip(written, changed, strict=True):
            leaves[i] = leaf
        return loss

    return step


# --------------------------------------------------------------------------------------------------- NNX


def nnx_network(nnx: ModuleType, task: Problem) -> Any:
    """The network in the given NNX: nnx_core or flax.nnx, which share their public names."""

    class Layer(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.norm(self.linear(x)))

    class Network(nnx.Module):
        def __init__(self, rngs: Any):
            self.layers = nnx.List([Layer(rngs) for _ in task.kernels])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    network = Network(nnx.Rngs(0))
    for layer, kernel in zip(network.layers, task.kernels, strict=True):
        layer.linear.kernel[...] = jnp.asarray(kernel)
    return network


def _nnx_step(nnx: ModuleType, task: Problem, **mode: bool) -> Step:
    """The usual train step over (model, optimizer, x, y); `mode` goes to whatever takes `graph=`."""
    model = nnx_network(nnx, task)
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param, **mode)

    @nnx.jit(**mode)
    def train_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: squared_error(model(x), y), **mode)(model)
        optimizer.update(model, grads)
        return loss

    return lambda: train_step(model, optimizer, task.x, task.y)


def core(task: Problem) -> Step:
    """Ours."""
    return _nnx_step(nnx_core, task)


def flax_default(task: Problem) -> Step:
    """flax.nnx as everyone calls it."""
    return _nnx_step(flax.nnx, task)


def flax_tree(task: Problem) -> Step:
    """flax.nnx's tree mode: modules as plain pytrees, no shared references, the same code otherwise."""
    return _nnx_step(flax.nnx, task, graph=False)


PLAIN_ARRAYS = 100
DEEP = 200
IN_GOALS = (BARE, CORE, FLAX)
VARIANTS: dict[str, Callable[[Problem], Step]] = {
    BARE: bare,
    CORE: core,
    FLAX: flax_default,
    FLAX_TREE: flax_tree,
    LINEN: linen_train_state,
}


# ------------------------------------------------------------------------------------------- plain arrays


def _array_step(nnx: ModuleType) -> Callable[[], Any]:
    class Tables(nnx.Module):
        def __init__(self) -> None:
            for i in range(PLAIN_ARRAYS):
                setattr(self, f"table_{i}", jnp.full(4, float(i)))

    def step(tables: Any, x: jax.Array) -> None:
        for i in range(0, PLAIN_ARRAYS, 2):
            read = getattr(tables, f"table_{i + 1}")
            setattr(tables, f"table_{i}", getattr(tables, f"table_{i}") + read * x)

    tables, x, run = Tables(), jnp.float32(1e-3), nnx.jit(step)
    return lambda: run(tables, x)


def _bare_array_step() -> Callable[[], Any]:
    tables, x = [jnp.full(4, float(i)) for i in range(PLAIN_ARRAYS)], jnp.float32(1e-3)

    @jax.jit
    def run(tables: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        return [tables[i] + tables[i + 1] * x for i in range(0, PLAIN_ARRAYS, 2)]

    def step() -> None:
        tables[::2] = run(tables, x)

    return step


# ----------------------------------------------------------------------------------------------- measure


def start(task: Problem) -> dict[str, Step]:
    """Every variant, ready to run; of a deep network, which XLA compiles for a minute, only those of the goals."""
    is_deep = len(task.kernels) > DEEP
    return {name: build(task) for name, build in VARIANTS.items() if name in IN_GOALS or not is_deep}


def losses(variants: Mapping[str, Step], steps: int) -> dict[str, list[float]]:
    """The losses of the next steps of every variant."""
    return {name: [float(step()) for _ in range(steps)] for name, step in variants.items()}


def measure(layers: int, *, rounds: int, calls: int) -> dict[str, Timings]:
    """Time all variants of a network of `layers` layers, interleaved."""
    return interleaved(start(problem(layers)), rounds=rounds, calls=calls)


def measure_arrays(*, rounds: int, calls: int) -> dict[str, Timings]:
    """Time a step that writes half of a hundred plain arrays on a module, and reads the others."""
    variants = {BARE: _bare_array_step(), CORE: _array_step(nnx_core), FLAX: _array_step(flax.nnx)}
    return interleaved(variants, rounds=rounds, calls=calls)


def calls_at(layers: int, calls: int) -> int:
    """How many steps are timed together, so that a round of a deep network takes no longer than one of 50 layers."""
    return max(1, calls * 50 // max(layers, 50))


@dataclass(frozen=True)
class Goal:
    """A ratio of two variants that the design promises at one depth."""

    text: str
    layers: int
    numerator: str
    denominator: str
    holds: Callable[[float], bool]


GOALS = (
    Goal("nnx_core.jit / bare jax.jit <= 1.1", 50, CORE, BARE, lambda ratio: ratio <= 1.1),
    Goal("flax.nnx.jit / nnx_core.jit >= 9", 50, FLAX, CORE, lambda ratio: ratio >= 9),
)


def goals(measured: dict[int, dict[str, Timings]]) -> list[dict[str, Any]]:
    """Each goal with the ratios found; `met` is None where the depth was not measured.

    Host time decides, the work of the calling thread: that is what dispatch costs. Wall time, which waits for
    XLA as well, is given beside it.
    """
    rows = []
    for goal in GOALS:
        ratio = host_ratio = met = None
        if goal.layers in measured:
            ours, base = measured[goal.layers][goal.numerator], measured[goal.layers][goal.denominator]
            ratio, host_ratio = ours.wall.ratio_to(base.wall), ours.host.ratio_to(base.host)
            met = goal.holds(host_ratio)
        row = {"goal": goal.text, "layers": goal.layers, "ratio": ratio, "host_ratio": host_ratio, "met": met}
        rows.append(row)
    return rows


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in full float32, as the tolerance table assumes."""
    with jax.default_matmul_precision("highest"):
        yield


def parse_layers(text: str) -> Sequence[int]:
    """`"3,10,50"` as numbers, each at least 1."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--layers takes positive numbers with commas between, as 3,10,50; got {text!r}")
    return numbers
