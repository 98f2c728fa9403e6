"""Two models side by side: run on the same random numbers, compiled once, with their gradients, for any mapping.

Law: what is called the same was run and compared, outputs, gradients and what the call writes, on random numbers;
nothing of the caller's is read or changed but the structure of the models.
Knows modules, mappings and numbers; knows nothing of how mappings are found.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import show_path
from bridge._types import Location
from bridge.checkpoint.derivation.forward import nnx_values, outputs_apart, which_is_random
from bridge.equivalence.compiled import Compiled, options_for
from bridge.equivalence.dependence import Range, ranges_of
from bridge.equivalence.drawing import Draw, with_last_bits_moved
from bridge.equivalence.inputs import drawn
from bridge.equivalence.numbers import Difference, difference, is_inexact, is_key, on_host
from bridge.equivalence.rounding import NOISE, last_bit
from bridge.equivalence.weights import weighed
from bridge.tracing.pure_call import Values, linen_call, module_of, nnx_call, streams_of
from bridge.tracing.trace import Method, is_array

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Point:
    """Numbers to run both models on: Linen's variables, and arguments. `salt` weighs the outputs."""

    values: Values
    inputs: Any
    salt: int


@dataclass(frozen=True)
class Run:
    """What a model gave.

    Attributes:
      output: what it returned.
      gradients: of a random sum over that, by location; none if it has none.
      written: what is no parameter, as the call left it.
    """

    output: Any
    gradients: Mapping[Location, Any]
    written: Mapping[Location, Any]


@dataclass(frozen=True)
class Evidence:
    """How far apart the models are under one mapping.

    Attributes:
      outputs: path of an output -> difference.
      gradients: Linen's location -> difference of the gradients with respect to it.
      misfit: what cannot be compared, or "".
      noise: path of an output, or location -> what rounding alone does there, where that was asked.
      written: NNX's location -> difference of what the call leaves there.
      missing: NNX's locations that the call writes, and the rules make nothing of.
    """

    outputs: Mapping[str, Difference]
    gradients: Mapping[Location, Difference]
    misfit: str = ""
    noise: Mapping[Any, float] = field(default_factory=dict)
    written: Mapping[Location, Difference] = field(default_factory=dict)
    missing: tuple[Location, ...] = ()

    @property
    def worst(self) -> float:
        """The largest difference over its tolerance."""
        if self.misfit:
            return math.inf
        parts = (self.outputs, self.gradients, self.written)
        ratios = [self.ratio(key, off) for part in parts for key, off in part.items()]
        return max(ratios, default=0.0)

    @property
    def worst_output(self) -> float:
        """The same of the outputs alone."""
        return math.inf if self.misfit else max((off.ratio for off in self.outputs.values()), default=0.0)

    @property
    def bit_equal(self) -> bool:
        """Whether all outputs have the same bits."""
        return not self.misfit and all(off.bit_equal for off in self.outputs.values())

    def ratio(self, key: Any, off: Difference) -> float:
        """Over the tolerance. A gradient that is nothing but rounding (a bias before a norm) may be off by rounding."""
        floor = self.noise.get(key, 0.0)
        return off.ratio if off.absolute > floor else min(off.ratio, 1.0)

    def describe(self) -> list[str]:
        """The worst outputs, gradients and writes, in words."""
        if self.misfit:
            return [self.misfit]
        lines: list[str] = []
        parts = ("output", self.outputs), ("gradient of ", self.gradients), ("the call writes ", self.written)
        for what, part in parts:
            bad = sorted(part.items(), key=lambda item: -self.ratio(*item))
            for key, off in bad[:_MOST_SHOWN]:
                if self.ratio(key, off) > 1:
                    name = key if isinstance(key, str) else show_path(key)
                    lines.append(
                        f"{what}{name}: off by {off.absolute:.3g}, of {off.scale:.3g}; up to {off.tolerance:.3g}"
                    )
        return lines


class Bench:
    """Two models, each compiled once with its gradients.

    Attributes:
      without_gradients: why no gradients are compared, or "".
    """

    def __init__(
        self,
        linen_module: nn.Module,
        nnx_module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        rngs: Any = None,
        method: Method | tuple[Method, Method] = "__call__",
    ):
        methods = method if isinstance(method, tuple) else (method, method)
        self._inputs = (tuple(inputs), dict(kwargs))
        own = jax.tree.map(Draw(0).array, self._inputs)
        theirs = linen_call(linen_module, methods[0], rngs, *own)
        ours = nnx_call(module_of(nnx_module), methods[1])
        self._initial = theirs.initial()
        self._own = ours.variables
        self._keys = streams_of(rngs)
        self.without_gradients = ""
        self._expected: dict[int, Run] = {}
        self._points: dict[int, Point] = {}
        self._pull: tuple[Any, Compiled] | None = None
        self._runs = (theirs.writing, ours.writing)
        self._options = options_for(self._initial)
        self._linen, self._nnx = (Compiled(_with_gradients(run), self._options) for run in self._runs)

    @property
    def tolerance(self) -> float:
        """The smallest there can be, as the programs compute in half precision somewhere."""
        return max(self._linen.tolerance, self._nnx.tolerance)

    @functools.cached_property
    def _ranges(self) -> Mapping[int, Range]:
        """How far integers are drawn: as Linen's program needs them; cautiously, where it has no gradients."""
        trees = self._initial, self._keys
        try:
            self._linen.prepare(*trees, *self._inputs, np.uint32(0))
        except Exception:  # noqa: BLE001  the run says it
            return {}
        return ranges_of(self._linen.program, trees, self._inputs)

    def point(self, seed: int) -> Point:
        """Random numbers. Arrays of the caller's are as they are for the first seed, and varied for the others.

        Kept, of a large model those of the first alone, as `expected` is.
        """
        if seed in self._points:
            return self._points[seed]
        draw = Draw(seed)

        def argument(x: Any, below: int) -> Any:
            varied = seed and is_array(x) and not isinstance(x, jax.ShapeDtypeStruct)
            if varied and jnp.issubdtype(x.dtype, jnp.floating):
                return draw.near(x)
            return draw.array(x, below)

        inputs = drawn(self._inputs, argument, self._ranges, seed)
        values = {at: draw.near(x) for at, x in sorted(self._initial.items())}
        point = Point(values, inputs, seed)
        if self._keeps(seed):
            self._points[seed] = point
        return point

    def _keeps(self, seed: int) -> bool:
        return not seed or self._options is not None

    def expected(self, seed: int) -> Run:
        """What Linen's model gives on the numbers of a seed."""
        if seed in self._expected:
            return self._expected[seed]
        run = self.linen(self.point(seed))
        if self._keeps(seed):
            self._expected[seed] = run
        return run

    def linen(self, point: Point) -> Run:
        """What Linen's model gives."""
        return self._run(0, point.values, self._keys, point)

    def nnx(self, point: Point, rules: Any) -> Run:
        """What the NNX model gives, on what the rules make of Linen's values.

        Raises:
          VariablesMismatchError: they make what the model has no place for.
        """
        return self._run(1, self.converted(point, rules), None, point)

    def converted(self, point: Point, rules: Any) -> Values:
        """The NNX model's values."""
        draw = Draw(point.salt)
        own = {at: jax.tree.map(draw.array, x) for at, x in sorted(self._own.items())}
        return nnx_values(rules, point.values, own)

    def _run(self, side: int, values: Values, keys: Any, point: Point) -> Run:
        compiled = self._nnx if side else self._linen
        salt = np.uint32(point.salt)
        try:
            return Run(*compiled(values, keys, *point.inputs, salt))
        except Exception as error:
            if self.without_gradients:
                raise
            # A loop of unknown length has outputs and no gradients: then outputs alone are compared, and that is said.
            self.without_gradients = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self._linen, self._nnx = (Compiled(_without_gradients(run), self._options) for run in self._runs)
            return self._run(side, values, keys, point)

    def compare(self, point: Point, rules: Any, expected: Run | None = None) -> Evidence:
        """How far apart the models are. `expected` is what Linen's gave on these numbers."""
        expected = self.linen(point) if expected is None else expected
        actual = self.nnx(point, rules)
        outputs, misfit = outputs_apart(actual.output, expected.output, self._least())
        if misfit is not None:
            return Evidence({}, {}, f"outputs: expected {misfit[0]}, found {misfit[1]}")
        (_, of_linen, states), (_, of_nnx, own) = self._linen.least, self._nnx.least
        gradients: dict[Location, Difference] = {}
        if not self.without_gradients:
            back = self._pulled_back(rules, point.values, actual.gradients)
            allowed = max(of_nnx.values(), default=0.0)
            for at, wanted in expected.gradients.items():
                gradients[at] = difference(back[at], wanted, max(of_linen[at], allowed))
        made = _written(point, rules, expected) if actual.written else {}
        allowed = max(states.values(), default=0.0)
        written = {at: difference(x, made[at], max(own[at], allowed)) for at, x in actual.written.items() if at in made}
        missing = tuple(sorted(actual.written.keys() - made.keys()))
        evidence = Evidence(outputs, gradients, written=written, missing=missing)
        if evidence.worst > 1 and evidence.worst_output <= 1:
            return replace(evidence, noise=self._noise(point, rules, expected, made))
        return evidence

    def _pulled_back(self, rules: Any, values: Values, gradients: Values) -> dict[Location, Any]:
        """Gradients with respect to NNX's values as those with respect to Linen's; one program for the same rules."""
        if self._pull is None or self._pull[0] is not rules:
            self._pull = rules, Compiled(functools.partial(_transposed, rules), self._options)
        pulled: dict[Location, Any] = self._pull[1](dict(values), dict(gradients))
        return pulled

    def _least(self) -> Any:
        """Of each output the smallest tolerance, as one of the two programs computes it in half precision."""
        sides = [jax.tree.leaves(compiled.least[0]) for compiled in (self._linen, self._nnx)]
        return [max(pair) for pair in zip(*sides, strict=False)]

    def _noise(self, point: Point, rules: Any, expected: Run, made: Values) -> dict[Any, float]:
        """What the last bit of every number does to Linen's own gradients, and to what it writes."""
        eps = last_bit(self.tolerance, *point.values.values())
        values, inputs = with_last_bits_moved((dict(point.values), point.inputs), eps, point.salt)
        other = self.linen(Point(values, inputs, point.salt))
        noise: dict[Any, float] = {}
        for at, wanted in expected.gradients.items():
            noise[at] = NOISE * difference(other.gradients[at], wanted).absolute
        moved = _written(point, rules, other) if made else {}
        for at in moved.keys() & made.keys():
            noise[at] = max(noise.get(at, 0.0), NOISE * difference(moved[at], made[at]).absolute)
        return noise

    def which_is_random(self, point: Point, rules: Any) -> str | None:
        """Whether other keys make other outputs: 'Linen', 'NNX' or None."""
        values = self.converted(point, rules)
        return which_is_random(
            lambda keys: self._run(0, point.values, keys, point).output, self.linen(point).output, self._keys,
            lambda values: self._run(1, values, None, point).output, self._run(1, values, None, point).output, values,
        )  # fmt: skip


def _with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    def both(values: Values, keys: Any, args: Any, kwargs: Any, salt: Any) -> tuple[Any, Any]:
        floating = {at: x for at, x in values.items() if is_inexact(x)}

        def loss(floating: Values) -> tuple[Any, Any]:
            output, written = run({**values, **floating}, keys, args, kwargs)
            return weighed(output, salt), (output, _arrays(written))

        gradients, (output, written) = jax.grad(loss, has_aux=True)(floating)
        return output, gradients, written

    return both


def _without_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    def output(values: Values, keys: Any, args: Any, kwargs: Any, salt: Any) -> tuple[Any, Any]:
        result, written = run(values, keys, args, kwargs)
        return result, {}, _arrays(written)

    return output


def _arrays(written: Values) -> Values:
    return {at: x for at, x in written.items() if is_array(x)}


def _written(point: Point, rules: Any, run: Run) -> Values:
    """What the rules make of what Linen's model wrote, by NNX's location."""
    after = {at: on_host(x) if not is_key(x) else x for at, x in run.written.items() if at in point.values}
    converted: Values = rules.convert({**point.values, **after})
    return converted


def _transposed(rules: Any, values: Values, gradients: Values) -> Any:
    """What the transpose of the rules makes of gradients."""
    floating = {at: x for at, x in values.items() if is_inexact(x)}

    def convert(floating: Values) -> Values:
        made = rules.convert({**values, **floating})
        return {at: jnp.asarray(made[at]) for at in gradients if at in made}

    made, pull = jax.vjp(convert, floating)
    return pull({at: jnp.asarray(gradients[at], x.dtype) for at, x in made.items()})[0]
