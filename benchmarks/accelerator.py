"""Accelerator: what of this package holds, and what it costs, on whatever backend JAX has here; in a bounded time.

Law: everything that was asked for is in the result: as it came out, or in `not_run` with the reason. No part starts
when the time is up, and one that fails does not take the others with it.
Knows what to run and for how long; `bridge.equivalence` knows how to compare, and the other benchmarks how to time.

The JSON, which is written anew after each part, so that a killed run leaves what it has:

    benchmark     "accelerator"
    backend       of JAX: "cpu", "gpu", "tpu"; `device`: its kind
    machine       as in the other benchmarks: processor, cores, load, versions
    limit_s       the time there was; `seconds`: what each part took
    tolerances    dtype -> rtol, atol, model: the row used, and `measured`: whether it was, on this backend
    models        comparisons: three small models, Linen against NNX, three training steps included
    wrappers      comparisons: Linen against ToNNX, NNX against ToLinen, of each of the models
    layers        comparisons: each layer of the matrix against its Linen twin, in training and evaluation
    dispatch      figures: `figure`, `found`, `goal`, `met`, `flax`, `wall`
    checkpoint    `bytes` of the checkpoint and `note` on its size; `figures`
    bridge        figures
    not_run       rows of `part`, `name`, `reason`
    equal         whether all comparisons are equal, and there are some

A comparison is: `name`; `equal`, `bit_equal`; `compared`: how many values; `worst`: for each kind of value (output,
gradient, state, ...) the largest `absolute` and `relative` difference, `ulp`, and `ratio` to the tolerance; `parts_at`:
where the two part, null if nowhere; `not_compared`: what was left out and why.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import optax

from benchmarks import bridge as bridge_benchmark
from benchmarks import checkpoint as checkpoint_benchmark
from benchmarks import core as core_benchmark
from benchmarks import dispatch
from benchmarks.figures import Figure, figure_rows
from benchmarks.small_models import SmallModel
from benchmarks.timing import machine
from bridge.equivalence import Report, compare
from bridge.equivalence.tolerance import TOLERANCES, tolerance_of

TRAINING_STEPS = 3
LEAVES, MEMORY = 200, 256 << 20  # of the checkpoint, as in its own benchmark
#: Comparing layers stops here, so that what is measured after them has its turn.
LAYERS_SHARE = 0.55
COMPARISONS = ("models", "wrappers", "layers")


class LayerRow(Protocol):
    """A layer and its twin in Linen, as pure functions (values, x) -> (y, updated values)."""

    name: str
    modes: Any

    def variables(self) -> Any:
        """Values for both."""

    def example(self) -> jax.Array:
        """An input for both."""

    def functional(self, *, train: bool) -> Callable[..., Any]:
        """Ours."""

    def functional_twin(self, *, train: bool) -> Callable[..., Any]:
        """Linen's."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is run.

    Attributes:
      limit: seconds; no part starts later.
      size: bytes of the checkpoint.
      repeats: rounds of the timings.
      depth: layers of the network that is timed.
      folder: where the checkpoints go.
    """

    limit: float
    size: int
    repeats: int
    depth: int
    folder: Path | None = None


class Run:
    """A run under way: `result` is the JSON so far."""

    def __init__(self, options: Options, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]):
        self._start, self._limit, self._say, self._save = time.perf_counter(), options.limit, say, save
        self.result: dict[str, Any] = {
            "benchmark": "accelerator",
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "machine": machine(),
            "limit_s": options.limit,
            "tolerances": {dtype: dataclasses.asdict(tolerance_of(dtype)) for dtype in TOLERANCES},
            "seconds": {},
            "not_run": [],
        }

    def each(self, part: str, items: Sequence[tuple[str, Callable[[], Any]]], share: float = 1.0) -> None:
        """The results of all items, as a list under the name of the part."""
        begin, results = self._now(), []
        for name, item in items:
            result = self._one(part, name, item, share)
            if result is not None:
                results.append(result)
        self._keep(part, results, begin)

    def whole(self, part: str, item: Callable[[], Any]) -> None:
        """The result of one item under the name of the part."""
        begin = self._now()
        self._keep(part, self._one(part, part, item, 1.0), begin)

    def _one(self, part: str, name: str, item: Callable[[], Any], share: float) -> Any:
        if self._now() > share * self._limit:
            self._leave_out(part, name, f"time: {self._now():.0f} s of {self._limit:.0f} s were over")
            return None
        begin = self._now()
        try:
            result = item()
        except Exception as error:  # noqa: BLE001  whatever it is: it is reported, and the other parts are run
            self._leave_out(part, name, f"{type(error).__name__}: {error}")
            return None
        self._say(f"{self._now():5.0f} s  {part}: {name}, {self._now() - begin:.1f} s")
        return result

    def _leave_out(self, part: str, name: str, reason: str) -> None:
        self._say(f"{self._now():5.0f} s  {part}: {name} NOT RUN: {reason}")
        self.result["not_run"].append({"part": part, "name": name, "reason": reason})

    def _keep(self, part: str, result: Any, begin: float) -> None:
        self.result[part] = result
        self.result["seconds"][part] = round(self._now() - begin, 1)
        comparisons = [row for name in COMPARISONS for row in self.result.get(name, [])]
        self.result["equal"] = bool(comparisons) and all(row["equal"] for row in comparisons)
        self._save(self.result)

    def _now(self) -> float:
        return time.perf_counter() - self._start


def run(
    models: Sequence[SmallModel],
    layers: Sequence[LayerRow],
    options: Options,
    say: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run all parts; `save` is called with the result after each. What it holds: see above."""
    running = Run(options, say, save)
    running.each("models", [(model.name, lambda model=model: _model(model)) for model in models])
    running.each("wrappers", [row for model in models for row in _wrappers(model)])
    running.each("layers", [row for layer in layers for row in _layer(layer)], LAYERS_SHARE)
    running.whole("dispatch", lambda: _timed(core_benchmark.training_step, options))
    running.whole("checkpoint", lambda: _checkpoint(options))
    running.whole("bridge", lambda: _timed(bridge_benchmark.figures, options))
    return running.result


def _model(model: SmallModel) -> dict[str, Any]:
    variables = model.variables()
    pair = (model.linen, variables), model.in_nnx(variables)
    tx = optax.adam(dispatch.RATE)
    return _row(model.name, compare(*pair, model.shape, seeds=(0,), steps=TRAINING_STEPS, tx=tx))


def _wrappers(model: SmallModel) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    def in_nnx() -> dict[str, Any]:
        variables = model.variables()
        pair = (model.linen, variables), model.wrapped(variables)
        return _row(f"ToNNX of {model.name}", compare(*pair, model.shape, seeds=(0,), layers=False))

    def in_linen() -> dict[str, Any]:
        variables = model.variables()
        pair = model.in_nnx(variables), (model.in_linen(), variables)
        return _row(f"ToLinen of {model.name}", compare(*pair, model.shape, seeds=(0,), layers=False))

    yield f"ToNNX of {model.name}", in_nnx
    yield f"ToLinen of {model.name}", in_linen


def _layer(layer: LayerRow) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    same_in_both = layer.modes[True] == layer.modes[False]
    for train in (True,) if same_in_both else (True, False):
        name = layer.name if same_in_both else f"{layer.name}, {'training' if train else 'evaluation'}"

        def compared(name: str = name, train: bool = train) -> dict[str, Any]:
            pair = layer.functional_twin(train=train), layer.functional(train=train)
            inputs = layer.variables(), layer.example()
            return _row(name, compare(*pair, *inputs, seeds=(0,), layers=False))

        yield name, compared


def _row(name: str, report: Report) -> dict[str, Any]:
    worst: dict[str, dict[str, float | None]] = {}
    for finding in report.findings:
        off = finding.difference
        if off is not None and off.ratio >= worst.get(finding.what, {"ratio": 0.0})["ratio"]:
            figures = "absolute", "relative", "ulp", "ratio"
            worst[finding.what] = {figure: getattr(off, figure) for figure in figures}
    return {
        "name": name,
        "equal": report.equal,
        "bit_equal": report.bit_equal,
        "compared": len(report.findings),
        "worst": worst,
        "parts_at": None if report.first is None else dataclasses.asdict(report.first),
        "not_compared": list(report.not_compared),
    }


def _timed(measure: Callable[[int, int], list[Figure]], options: Options) -> list[dict[str, Any]]:
    with dispatch.full_precision():
        return figure_rows(measure(options.repeats, options.depth))


def _checkpoint(options: Options) -> dict[str, Any]:
    figures, _ = checkpoint_benchmark.figures(options.size, LEAVES, MEMORY, 1, options.folder)
    size = f"{options.size / (1 << 30):g} GiB"
    note = size if options.size >= 2 << 30 else f"{size}: smaller than the 2 GiB that a full run converts"
    return {"bytes": options.size, "note": note, "figures": figure_rows(figures)}
