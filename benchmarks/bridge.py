"""Bridge: what a wrapper costs next to the module it wraps, for ours and for flax.nnx.bridge.

Law: each figure is this library's ratio to a base that needs no bridge (Linen alone, NNX alone), and flax.nnx.bridge's
ratio to its own base, from the same rounds. All are one network (Linear, BatchNorm in training, relu), from the
same weights; before anything is timed their outputs and the statistics they leave behind must agree.
Counts are exact. Times are the calling thread's processor time: medians of ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import flax.nnx
import flax.nnx.bridge
import jax
import jax.extend
import jax.numpy as jnp
import optax
from flax import linen

import bridge
import nnx_core
from benchmarks import dispatch
from benchmarks.figures import Figure
from benchmarks.timing import Step, interleaved
from tests.tolerance import assert_trees_close

LAYERS = 20
LINEN, OURS, FLAX = "Linen", "bridge", "flax.nnx.bridge"
NATIVE, FLAX_NATIVE = "nnx_core", "flax.nnx"
STATS = ["batch_stats"]


# ---- the network, in Linen and in NNX, whole or bridged layer by layer ---------------------------------------


class LinenLayer(linen.Module):
    """Dense, BatchNorm in training, relu."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(dispatch.WIDTH, name="linear")(x)
        norm = linen.BatchNorm(False, momentum=dispatch.MOMENTUM, epsilon=dispatch.EPSILON, name="norm")
        return linen.relu(norm(x))


class LinenNetwork(linen.Module):
    """`layers` layers, each made by `layer(name=...)`."""

    layers: int
    layer: Callable[..., linen.Module] = LinenLayer

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = self.layer(name=f"layer_{i}")(x)
        return x


def nnx_classes(nnx: ModuleType) -> tuple[type, type]:
    """(layer, network of `layers` layers) as NNX modules, with the names that Linen has."""

    class Layer(nnx.Module):  # type: ignore[name-defined]
        def __init__(self, rngs: Any):
            width = dispatch.WIDTH
            self.linear = nnx.Linear(width, width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, momentum=dispatch.MOMENTUM, epsilon=dispatch.EPSILON, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.norm(self.linear(x)))

    class Network(nnx.Module):  # type: ignore[name-defined]
        def __init__(self, layers: int, make: Callable[..., Any] = Layer, *, rngs: Any):
            self.names = tuple(f"layer_{i}" for i in range(layers))
            for name in self.names:
                setattr(self, name, make(rngs=rngs))

        def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
            for name in self.names:
                x = getattr(self, name)(x, **options)
            return x

    return Layer, Network


def linen_variables(task: dispatch.Problem) -> dict[str, Any]:
    """The weights of the task and fresh statistics, as Linen keeps them."""
    width = dispatch.WIDTH
    params, stats = {}, {}
    for i, kernel in enumerate(task.kernels):
        linear = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(width)}
        params[f"layer_{i}"] = {"linear": linear, "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)}}
        stats[f"layer_{i}"] = {"norm": {"mean": jnp.zeros(width), "var": jnp.ones(width)}}
    return {"params": params, "batch_stats": stats}


def load(nnx: ModuleType, model: Any, task: dispatch.Problem) -> Any:
    """`model`, of any form, with the kernels of the task; its other variables start as they should."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel":
            [layer] = [key for key in path if str(key).startswith("layer_")]
            variable[...] = jnp.asarray(task.kernels[int(layer.removeprefix("layer_"))])
    return model


def pair(nnx: ModuleType) -> ModuleType:
    """The bridge that belongs to `nnx`."""
    return bridge if nnx is nnx_core else flax.nnx.bridge


def whole_in_nnx(nnx: ModuleType, task: dispatch.Problem) -> Any:
    """One ToNNX around the Linen network."""
    network = LinenNetwork(len(task.kernels))
    return load(nnx, pair(nnx).ToNNX(network, rngs=nnx.Rngs(0)).lazy_init(task.x), task)


def layers_in_nnx(nnx: ModuleType, task: dispatch.Problem) -> Any:
    """An NNX network whose layers are one ToNNX each, as in the middle of a migration."""
    make = lambda rngs: pair(nnx).ToNNX(LinenLayer(), rngs=rngs)  # noqa: E731
    network = nnx_classes(nnx)[1](len(task.kernels), make, rngs=nnx.Rngs(0))
    for name in network.names:
        getattr(network, name).lazy_init(task.x)
    return load(nnx, network, task)


def native(nnx: ModuleType, task: dispatch.Problem) -> Any:
    """The NNX network, no bridge."""
    return load(nnx, nnx_classes(nnx)[1](len(task.kernels), rngs=nnx.Rngs(0)), task)


def whole_in_linen(nnx: ModuleType, task: dispatch.Problem) -> linen.Module:
    """One ToLinen around the NNX network."""
    return pair(nnx).to_linen(nnx_classes(nnx)[1], len(task.kernels))


def layers_in_linen(nnx: ModuleType, task: dispatch.Problem) -> linen.Module:
    """A Linen network whose layers are one ToLinen each."""
    layer = nnx_classes(nnx)[0]
    return LinenNetwork(len(task.kernels), lambda name: pair(nnx).to_linen(layer, name=name))


def linen_side(nnx: ModuleType, network: linen.Module, task: dispatch.Problem) -> dict[str, Any]:
    """The variables of `network` for the task, in the boxes that its bridge keeps them in."""
    values = linen_variables(task)
    if nnx is nnx_core:
        return values
    made = network.init(jax.random.key(0), task.x)
    return jax.tree.map(lambda _, x: x, made, values)


# ---- calls: a step returns what must be waited for -----------------------------------------------------------


def call_linen(network: linen.Module, variables: dict[str, Any], x: jax.Array, *, jit: bool) -> Step:
    """Linen as everyone writes it: apply, and the new statistics into the variables."""

    def apply(variables: Any, x: jax.Array) -> Any:
        return network.apply(variables, x, mutable=STATS)

    run = jax.jit(apply) if jit else apply

    def step() -> jax.Array:
        nonlocal variables
        y, updates = run(variables, x)
        variables = {**variables, **updates}
        return y

    return step


def call_nnx(nnx: ModuleType, model: Any, x: jax.Array, *, jit: bool, **options: Any) -> Step:
    """NNX as everyone writes it."""

    def call(model: Any, x: jax.Array) -> jax.Array:
        return model(x, **options)

    run = nnx.jit(call) if jit else call
    return lambda: run(model, x)


def told(nnx: ModuleType) -> dict[str, Any]:
    """flax's ToNNX needs to be told in each call what may change; ours is called like any NNX module."""
    return {"mutable": STATS} if nnx is flax.nnx else {}


def in_nnx(make: Callable[..., Any], task: dispatch.Problem, *, jit: bool) -> dict[str, Step]:
    """Linen alone, and ToNNX of both libraries."""
    return {
        LINEN: call_linen(LinenNetwork(len(task.kernels)), linen_variables(task), task.x, jit=jit),
        OURS: call_nnx(nnx_core, make(nnx_core, task), task.x, jit=jit),
        FLAX: call_nnx(flax.nnx, make(flax.nnx, task), task.x, jit=jit, **told(flax.nnx)),
    }


def in_linen(make: Callable[..., linen.Module], task: dispatch.Problem, *, jit: bool) -> dict[str, Step]:
    """The NNX network alone in both libraries, and ToLinen of both."""
    steps = {}
    for name, base, nnx in ((OURS, NATIVE, nnx_core), (FLAX, FLAX_NATIVE, flax.nnx)):
        network = make(nnx, task)
        steps[base] = call_nnx(nnx, native(nnx, task), task.x, jit=jit)
        steps[name] = call_linen(network, linen_side(nnx, network, task), task.x, jit=jit)
    return steps


# ---- the law: equal numbers before any clock -----------------------------------------------------------------


def check(steps: Mapping[str, Step], calls: int = 3) -> None:
    """AssertionError unless all give the same outputs over `calls` calls, and the last is not the first's weights."""
    found = {name: [step() for _ in range(calls)] for name, step in steps.items()}
    base = next(iter(found.values()))
    assert_trees_close(found, dict.fromkeys(found, base))


# ---- figures -------------------------------------------------------------------------------------------------


def _ratio(
    name: str, steps: Mapping[str, Step], bases: Mapping[str, str], goal: float | None, *, rounds: int, calls: int
) -> Figure:
    """Ours and flax's time, each over its base's, from the same rounds."""
    check(steps)
    timings = interleaved(steps, rounds=rounds, calls=calls)

    def host(name: str) -> float:
        return timings[name].host.ratio_to(timings[bases[name]].host)

    wall = timings[OURS].wall.ratio_to(timings[bases[OURS]].wall)
    return Figure(name, host(OURS), goal, host(FLAX), wall)


TO_LINEN = {OURS: LINEN, FLAX: LINEN}
TO_NATIVE = {OURS: NATIVE, FLAX: FLAX_NATIVE}


def calls(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """Compiled and eager calls."""
    task = dispatch.problem(layers)
    figures = []
    for text, make, goals in (
        ("ToNNX", whole_in_nnx, (1.2, 1.05)),
        ("ToNNX per layer", layers_in_nnx, (1.2, None)),
    ):
        jitted = in_nnx(make, task, jit=True)
        eager = in_nnx(make, task, jit=False)
        figures += [
            _ratio(f"{text}, jit / Linen", jitted, TO_LINEN, goals[0], rounds=3 * rounds, calls=10),
            _ratio(f"{text}, eager / Linen", eager, TO_LINEN, goals[1], rounds=rounds, calls=1),
        ]
    for text, maker, goal in (("ToLinen", whole_in_linen, 1.3), ("ToLinen per layer", layers_in_linen, None)):
        eager = in_linen(maker, task, jit=False)
        figures.append(_ratio(f"{text}, eager / NNX", eager, TO_NATIVE, goal, rounds=rounds, calls=1))
    return figures


def beside_flax_nnx(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """Calls of a network of one library in the other's hands.

    Eager ones over those of the network alone; compiled ones over the other library's network, whose dispatch it is.
    """
    task = dispatch.problem(layers)
    names = {flax.nnx: FLAX_NATIVE, nnx_core: NATIVE}
    found = []
    for text, wrap, inner, outer in (
        ("FromFlax", bridge.flax_nnx.FromFlax, flax.nnx, nnx_core),
        ("AsFlax", bridge.flax_nnx.AsFlax, nnx_core, flax.nnx),
    ):
        for how, base, goal, calls in (("jit", outer, 1.2, 10), ("eager", inner, 1.3, 1)):
            jit = how == "jit"
            steps = {
                names[base]: call_nnx(base, native(base, task), task.x, jit=jit),
                OURS: call_nnx(outer, wrap(native(inner, task)), task.x, jit=jit),
            }
            check(steps)
            timings = interleaved(steps, rounds=(3 if jit else 1) * rounds, calls=calls)
            ours, alone = timings[OURS], timings[names[base]]
            ratio, wall = ours.host.ratio_to(alone.host), ours.wall.ratio_to(alone.wall)
            found.append(Figure(f"{text}, {how} / {names[base]}", ratio, goal, None, wall))
    return found


def training(rounds: int, layers: int = LAYERS) -> Figure:
    """A whole training step (adam) of a bridged network: ToNNX under jit / Linen's TrainState under jit."""
    task = dispatch.problem(layers)
    steps = {LINEN: _linen_training(task), OURS: _nnx_training(nnx_core, task), FLAX: _nnx_training(flax.nnx, task)}
    name = "ToNNX, training step / Linen"
    return _ratio(name, steps, TO_LINEN, 1.5, rounds=rounds, calls=5)


def _linen_training(task: dispatch.Problem) -> Step:
    network, tx = LinenNetwork(len(task.kernels)), optax.adam(dispatch.RATE)
    values = linen_variables(task)
    state = values["params"], values["batch_stats"], tx.init(values["params"])

    @jax.jit
    def train_step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats, opt_state = state

        def loss_fn(params: Any) -> Any:
            found, updates = network.apply({"params": params, "batch_stats": stats}, x, mutable=STATS)
            return dispatch.squared_error(found, y), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), stats, opt_state), loss

    def step() -> jax.Array:
        nonlocal state
        state, loss = train_step(state, task.x, task.y)
        return loss

    return step


def _nnx_training(nnx: ModuleType, task: dispatch.Problem) -> Step:
    model = whole_in_nnx(nnx, task)
    optimizer = nnx.Optimizer(model, optax.adam(dispatch.RATE), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss_fn(model: Any) -> jax.Array:
            return dispatch.squared_error(model(x, **told(nnx)), y)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    return lambda: train_step(model, optimizer, task.x, task.y)


# ---- equations and tracing -----------------------------------------------------------------------------------


def equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, those of its inner jaxprs included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(1 + sum(map(equations, _inner(eqn.params.values()))) for eqn in jaxpr.eqns)


def _inner(values: Iterable[Any]) -> list[Any]:
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    flat = [x for value in values for x in (value if isinstance(value, tuple | list) else (value,))]
    return [x for x in flat if isinstance(x, kinds)]


def apply_of(network: linen.Module) -> Callable[..., Any]:
    """A new function of (variables, x), so that nothing of an earlier trace is found."""
    return lambda variables, x: network.apply(variables, x, mutable=STATS)


def pure_of(nnx: ModuleType, model: Any) -> tuple[Callable[..., Any], Any]:
    """(function of (state, x), state): the NNX network without any bridge."""
    graphdef, state = nnx.split(model)

    def call(state: Any, x: jax.Array) -> Any:
        copy = nnx.merge(graphdef, state)
        return copy(x), nnx.state(copy, nnx.BatchStat)

    return call, state


def compiled_sizes(layers: int = LAYERS) -> list[Figure]:
    """Equations of a compiled ToLinen apply / those of the NNX network itself."""
    task = dispatch.problem(layers)
    figures = []
    for text, maker in (("ToLinen", whole_in_linen), ("ToLinen per layer", layers_in_linen)):
        ratios = {}
        for nnx in (nnx_core, flax.nnx):
            network = maker(nnx, task)
            bridged = jax.make_jaxpr(apply_of(network))(linen_side(nnx, network, task), task.x)
            call, state = pure_of(nnx, native(nnx, task))
            ratios[nnx.__name__] = equations(bridged) / equations(jax.make_jaxpr(call)(state, task.x))
        figures.append(Figure(f"{text}, equations / NNX's", ratios["nnx_core"], 1.0, ratios["flax.nnx"]))
    return figures


def tracing(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """Time to trace and lower one call / Linen's."""
    task = dispatch.problem(layers)
    figures = []
    for text, in_nnx_, in_linen_ in (
        ("", whole_in_nnx, whole_in_linen),
        (" per layer", layers_in_nnx, layers_in_linen),
    ):
        goal = 1.2 if not text else None
        figures.append(_tracing(f"ToNNX{text}, tracing / Linen", _lower_nnx(in_nnx_, task), goal, rounds))
        figures.append(_tracing(f"ToLinen{text}, tracing / Linen", _lower_linen(in_linen_, task), goal, rounds))
    return figures


def _lower_alone(task: dispatch.Problem) -> Callable[[], Any]:
    network, variables = LinenNetwork(len(task.kernels)), linen_variables(task)
    return lambda: jax.jit(apply_of(network)).lower(variables, task.x)


def _lower_nnx(make: Callable[..., Any], task: dispatch.Problem) -> dict[str, Callable[[], Any]]:
    def lower(nnx: ModuleType) -> Callable[[], Any]:
        model = make(nnx, task)
        options = told(nnx)
        return lambda: nnx.jit(lambda model, x: model(x, **options)).lower(model, task.x)

    return {LINEN: _lower_alone(task), OURS: lower(nnx_core), FLAX: lower(flax.nnx)}


def _lower_linen(make: Callable[..., linen.Module], task: dispatch.Problem) -> dict[str, Callable[[], Any]]:
    def lower(nnx: ModuleType) -> Callable[[], Any]:
        network = make(nnx, task)
        variables = linen_side(nnx, network, task)
        return lambda: jax.jit(apply_of(network)).lower(variables, task.x)

    return {LINEN: _lower_alone(task), OURS: lower(nnx_core), FLAX: lower(flax.nnx)}


def initialising(rounds: int, layers: int = LAYERS) -> Figure:
    """Time to trace and lower `init` of a class never seen before, which finds out its structure too / Linen's."""
    task = dispatch.problem(layers)
    key = jax.random.key(0)

    def lower(make: Callable[[], linen.Module]) -> Callable[[], Any]:
        return lambda: jax.jit(make().init).lower(key, task.x)

    makers = {
        LINEN: lower(lambda: LinenNetwork(layers)),
        OURS: lower(lambda: whole_in_linen(nnx_core, task)),
        FLAX: lower(lambda: whole_in_linen(flax.nnx, task)),
    }
    return _tracing("ToLinen, first init, tracing / Linen", makers, None, rounds)


def _tracing(name: str, makers: Mapping[str, Callable[[], Any]], goal: float | None, rounds: int) -> Figure:
    for make in makers.values():
        make()  # the structure of a module is found out once, not in each trace
    seconds: dict[str, list[float]] = {key: [] for key in makers}
    for at in range(rounds):
        order = list(makers.items())
        for key, make in order[at % len(order) :] + order[: at % len(order)]:
            start = time.thread_time()
            make()
            seconds[key].append(time.thread_time() - start)

    def ratio(key: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[key], seconds[LINEN], strict=True))

    return Figure(name, ratio(OURS), goal, ratio(FLAX))


def figures(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """All of them."""
    return [
        *calls(rounds, layers),
        *beside_flax_nnx(rounds, layers),
        training(rounds, layers),
        *compiled_sizes(layers),
        *tracing(max(rounds // 2, 1), layers),
        initialising(max(rounds // 4, 1), layers),
    ]
