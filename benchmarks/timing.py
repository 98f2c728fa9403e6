"""Timing variants against each other: interleaved, so that a slow minute of the machine hits all alike.

Law: in every round each variant has one turn, in an order drawn anew; what is reported is the median over the
rounds and its spread. A turn starts with a call that is not timed: what is measured is a call among others of its
kind, as in a training loop, and not the first one after another library's code has filled the caches. Nothing else
runs in the timed region: the garbage collector is off, and results are waited for.
Knows callables and clocks; knows nothing of what is timed.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, by one clock; one number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile: half of the rounds lie between."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def ratio_to(self, base: Timing) -> float:
        """The median over rounds of this time over the base's time in the same round.

        Rounds are paired: what slows a whole round (another process, a frequency change) cancels.
        """
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds, strict=True))


@dataclass(frozen=True)
class Timings:
    """One variant by two clocks.

    `wall` is what a user waits. `host` is the processor time of the calling thread: the Python around a call,
    and the computation as far as it runs inline. Other processes move it too (caches, shared cores), but less.
    """

    wall: Timing
    host: Timing


def interleaved(
    variants: Mapping[str, Step],
    *,
    rounds: int,
    calls: int,
    warmup: int = 3,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timings]:
    """Time every variant `rounds` times, `calls` calls a turn, after `warmup` calls that compile.

    Each step returns what must be waited for; it is waited for once, at the end of its `calls` calls.
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds and calls must be at least 1, got rounds={rounds}, calls={calls}")
    for step in variants.values():
        for _ in range(warmup):
            jax.block_until_ready(step())
    names, rng = list(variants), np.random.default_rng(seed)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for at in rng.permutation(len(names)):
            measured[names[at]].append(_time(variants[names[at]], calls))
        on_round()
    return {name: Timings(*map(Timing, zip(*rows, strict=True))) for name, rows in measured.items()}


def _time(step: Step, calls: int) -> tuple[float, float]:
    """Seconds per call, one before them not counted: of the wall clock, and of this thread's processor time."""
    with _no_collector():
        jax.block_until_ready(step())
        wall, host = time.perf_counter(), time.thread_time()
        for _ in range(calls):
            result = step()
        jax.block_until_ready(result)
        wall, host = time.perf_counter() - wall, time.thread_time() - host
    return wall / calls, host / calls


@contextmanager
def _no_collector():
    """Collect young garbage now and none until the end; a full collection costs more than what is timed."""
    was_on = gc.isenabled()
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, load, and the versions of what was timed."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "linen-nnx-bridge")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def _processor() -> str:
    """The model name, which only Linux's /proc tells; elsewhere what the platform module knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
