"""Core: what nnx_core's own operations cost, next to flax.nnx's and to plain JAX.

Law: both sides of a ratio do the same to the same 50-layer model (Linear and BatchNorm each, adam), interleaved in
one process. Counts (retraces, bytes) are exact; times are medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import optax

import nnx_core
from benchmarks import dispatch
from benchmarks.figures import Figure
from benchmarks.timing import interleaved

LAYERS = 50


def network(nnx: ModuleType, task: dispatch.Problem) -> tuple[Any, Any]:
    """Model and optimizer of the dispatch benchmark, in `nnx`."""
    model = dispatch.nnx_network(nnx, task)
    return model, nnx.Optimizer(model, optax.adam(dispatch.RATE), wrt=nnx.Param)


# ---- graph operations ----------------------------------------------------------------------------------------


def graph_operations(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """split, update, state, clone and merge of the model: nnx_core / flax.nnx."""
    task = dispatch.problem(layers)
    goals = {"split": 0.15, "update": 0.15, "state": 0.15, "clone": 0.15, "merge": 0.30}
    figures = []
    for name, goal in goals.items():
        timings = interleaved(
            {nnx.__name__: _operation(nnx, name, task) for nnx in (nnx_core, flax.nnx)}, rounds=rounds, calls=10
        )
        ratio = timings["nnx_core"].host.ratio_to(timings["flax.nnx"].host)
        figures.append(Figure(f"{name} / flax.nnx", ratio, goal))
    return figures


def _operation(nnx: ModuleType, name: str, task: dispatch.Problem) -> Callable[[], Any]:
    model, _ = network(nnx, task)
    graphdef, state = nnx.split(model)
    return {
        "split": lambda: (nnx.split(model), None)[1],
        "state": lambda: (nnx.state(model), None)[1],
        "clone": lambda: (nnx.clone(model), None)[1],
        "update": lambda: nnx.update(model, state),
        "merge": lambda: (nnx.merge(graphdef, state), None)[1],
    }[name]


# ---- the training step ---------------------------------------------------------------------------------------


def training_step(rounds: int, layers: int = LAYERS) -> list[Figure]:
    """Host time of one training step of the dispatch benchmark: nnx_core.jit beside bare jax.jit and flax.nnx.jit.

    The last row is the floor of the one before: what a step costs that does nothing but call jax.jit.
    """
    found = dispatch.measure(layers, rounds=rounds, calls=10)
    host = {name: timings.host for name, timings in found.items()}
    ours, bare = host[dispatch.CORE], host[dispatch.BARE]
    return [
        Figure("training step / bare jax.jit", ours.ratio_to(bare), 1.10),
        Figure("training step / flax.nnx.jit(graph=False)", ours.ratio_to(host[dispatch.FLAX_TREE]), 0.35),
        Figure("training step / flax.nnx.jit", ours.ratio_to(host[dispatch.FLAX]), 0.10),
        Figure("  bare jax.jit / flax.nnx.jit: its floor", bare.ratio_to(host[dispatch.FLAX])),
    ]


def plain_arrays(rounds: int) -> list[Figure]:
    """Host time of a step that writes half of a hundred plain arrays on a module: beside bare jax.jit and flax.nnx."""
    timings = dispatch.measure_arrays(rounds=rounds, calls=10)
    ours = timings[dispatch.CORE].host
    return [
        Figure("step with 100 plain arrays / bare jax.jit", ours.ratio_to(timings[dispatch.BARE].host)),
        Figure("step with 100 plain arrays / flax.nnx.jit", ours.ratio_to(timings[dispatch.FLAX].host)),
    ]


# ---- tracing -------------------------------------------------------------------------------------------------


def pure_step(task: dispatch.Problem) -> Callable[[], Any]:
    """A new jitted step over dicts of arrays, written by hand with the operations that the layers use."""
    tx = optax.adam(dispatch.RATE)
    width = dispatch.WIDTH
    names = [f"layer_{i}" for i in range(len(task.kernels))]
    params = {
        name: {"kernel": jnp.asarray(k), "bias": jnp.zeros(width), "scale": jnp.ones(width), "shift": jnp.zeros(width)}
        for name, k in zip(names, task.kernels, strict=True)
    }
    stats = {name: {"mean": jnp.zeros(width), "var": jnp.ones(width)} for name in names}
    opt_state = tx.init(params)

    def forward(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        updated = {}
        for name in names:
            p, s = params[name], stats[name]
            x = jax.lax.dot_general(x, p["kernel"], (((1,), (0,)), ((), ()))) + jnp.reshape(p["bias"], (1, -1))
            mean = jnp.mean(x, 0)
            var = jnp.maximum(0.0, jnp.mean(jax.lax.square(x), 0) - jax.lax.square(mean))
            keep = dispatch.MOMENTUM
            updated[name] = {"mean": keep * s["mean"] + (1 - keep) * mean, "var": keep * s["var"] + (1 - keep) * var}
            factor = jax.lax.rsqrt(jnp.expand_dims(var, 0) + dispatch.EPSILON) * jnp.reshape(p["scale"], (1, -1))
            x = jax.nn.relu((x - jnp.expand_dims(mean, 0)) * factor + jnp.reshape(p["shift"], (1, -1)))
        return x, updated

    def step(params: Any, stats: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            found, updated = forward(params, stats, x)
            return dispatch.squared_error(found, y), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, new_state = tx.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), updated, new_state

    return lambda: jax.jit(lambda *args: step(*args)).lower(params, stats, opt_state, task.x, task.y)


def core_step(task: dispatch.Problem) -> Callable[[], Any]:
    """A new nnx_core.jit of the training step, lowered."""
    model, optimizer = network(nnx_core, task)
    return lambda: nnx_core.jit(_new_step()).lower(model, optimizer, task.x, task.y)


def _new_step() -> Callable[..., jax.Array]:
    def step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx_core.value_and_grad(lambda model: dispatch.squared_error(model(x), y))(model)
        optimizer.update(model, grads)
        return loss

    return step


def tracing(rounds: int, layers: int = LAYERS) -> Figure:
    """Time to trace and lower the training step: nnx_core / a pure function of dicts."""
    task = dispatch.problem(layers)
    makers = {"core": core_step(task), "pure": pure_step(task)}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.thread_time()
            make()
            seconds[name].append(time.thread_time() - start)
    ratio = statistics.median(c / p for c, p in zip(*seconds.values(), strict=True))
    return Figure("trace + lower of the step / pure function of a dict", ratio, 1.25)


def recompilations() -> Figure:
    """What a second call of a transform compiles, with other values and the same structure.

    jit keeps its trace; what a loop or a branch is given is traced at each call outside of jit, and compiled once.
    """
    events: list[str] = []
    models = [nnx_core.Linear(2, 2, rngs=nnx_core.Rngs(seed)) for seed in range(2)]
    x = jnp.ones((2, 2))

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    def body(model: Any, x: jax.Array) -> jax.Array:
        return model(x)

    def carried(x: jax.Array, model: Any) -> jax.Array:
        return body(model, x)

    def below(state: Any) -> Any:
        return state[1] < 3

    def more(state: Any) -> Any:
        model, i = state
        body(model, x)
        return model, i + 1

    stack = nnx_core.vmap(lambda key: nnx_core.Linear(2, 2, rngs=nnx_core.Rngs(key)))
    stacks = [stack(jax.random.split(jax.random.key(seed), 3)) for seed in range(2)]
    scanned = nnx_core.scan(carried, in_axes=(nnx_core.Carry, 0), out_axes=nnx_core.Carry)
    graded = nnx_core.jit(nnx_core.grad(lambda model, x: body(model, x).sum()))
    jitted = nnx_core.jit(body)
    calls: list[Callable[[int], Any]] = [
        lambda i: jitted(models[i], x),
        lambda i: graded(models[i], x),
        lambda i: scanned(x, stacks[i]),
        lambda i: nnx_core.cond(True, body, body, models[i], x),
        lambda i: nnx_core.while_loop(below, more, (models[i], jnp.array(0))),
    ]
    for call in calls:
        call(0)
        call(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for call in calls:
        call(1)
        call(1)
    jax.monitoring.unregister_event_duration_listener(listen)
    return Figure("recompilations of jit, grad, scan, cond and while_loop", float(len(events)), 0.0)


# ---- memory and import ---------------------------------------------------------------------------------------


def donation(layers: int = LAYERS) -> Figure:
    """Peak bytes of the compiled step with everything donated: nnx_core.jit / bare jax.jit."""
    task = dispatch.problem(layers)
    model, optimizer = network(nnx_core, task)
    ours = nnx_core.jit(_new_step(), donate_argnums=(0, 1)).lower(model, optimizer, task.x, task.y).compile()
    graphdef, state = nnx_core.split((model, optimizer))

    def pure(state: Any, x: jax.Array, y: jax.Array) -> Any:
        model, optimizer = nnx_core.merge(graphdef, state)
        loss = _new_step()(model, optimizer, x, y)
        return loss, nnx_core.state((model, optimizer))

    bare = jax.jit(pure, donate_argnums=0).lower(state, task.x, task.y).compile()
    return Figure("peak memory with donation / bare jax.jit", _peak(ours) / _peak(bare), 1.01)


def _peak(compiled: Any) -> int:
    found = compiled.memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    return arguments + outputs + found.temp_size_in_bytes - found.alias_size_in_bytes


def importing(rounds: int) -> Figure:
    """CPU seconds of `import nnx_core` in a new interpreter, which imports jax too / `import jax`.

    Bytecode is cached, as it is once pip has installed a package; the first import of each fills the cache.
    """

    def seconds(module: str, cache: str) -> float:
        code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return float(run.stdout)

    with tempfile.TemporaryDirectory() as cache:
        seconds("jax", cache), seconds("nnx_core", cache)
        ratios = [seconds("nnx_core", cache) / seconds("jax", cache) for _ in range(rounds)]
    return Figure("import nnx_core / import jax", statistics.median(ratios), 1.15)
