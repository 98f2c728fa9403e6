"""Which layers of a model need the output of which: read off the program of its call, which is not run.

Law: "a before b" is said only where a value made of b's variables alone meets one that depends on a, and nowhere the
other way round. What cannot be followed (`cond`, `while`, kernels) counts as needing both ways, and so says nothing.
Knows programs and variables; knows nothing of classes, names or the other model.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from bridge.tracing.pairs import Instance
from bridge.tracing.pure_call import Call
from bridge.tracing.trace import Unit, is_array, parted

#: Primitives that are a call of one inner program, argument by argument.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call")
_INPUT = 1  # the bit of whatever is no variable of a unit


class DataFlow:
    """The order that the data force on the layers of a model.

    >>> from flax import linen as nn
    >>> from bridge.tracing.pure_call import linen_call
    >>> from bridge.tracing.trace import trace_linen
    >>> model, inputs = nn.Sequential([nn.Dense(4), nn.Dense(4)]), (jax.ShapeDtypeStruct((1, 4), "float32"),)
    >>> first, second = units = trace_linen(model, "__call__", None, inputs, {})
    >>> flow = DataFlow(units, linen_call(model, "__call__", None, inputs, {}), None, inputs, {})
    >>> flow.in_order((first, ()), (second, ())), flow.in_order((second, ()), (first, ()))
    (True, False)
    """

    def __init__(self, units: Iterable[Unit], call: Call, keys: Any, args: Any, kwargs: Any):
        self._bits = {
            slot.part.location: 2 << number for number, unit in enumerate(units) for slot in unit.slots.values()
        }
        self._needs: dict[int, int] = {}
        self._backwards = 0
        values = dict(call.variables)
        own = [self._bits.get(at, _INPUT) for at in sorted(values) for x in jax.tree.leaves(values[at]) if is_array(x)]
        traced, arrays = parted(call.run, values, keys, args, kwargs)
        self._walk(jax.make_jaxpr(traced)(arrays), own + [_INPUT] * (len(arrays) - len(own)))

    def in_order(self, first: Instance, second: Instance) -> bool:
        """Whether the second cannot come before the first: it needs the first's output, or a later round of a stack.

        The rounds of a scan that runs backwards are in no order.
        """
        (one, at), (other, there) = first, second
        rounds = zip(zip(one.frames, at, strict=True), zip(other.frames, there, strict=True), strict=False)
        differs = next(((a, b) for a, b in rounds if a != b), None)
        if differs is not None and differs[0][0] == differs[1][0]:  # one stack, two rounds of it
            return not (self._bit(one) | self._bit(other)) & self._backwards
        return self._before(self._bit(one), self._bit(other)) and not self._before(self._bit(other), self._bit(one))

    def _bit(self, unit: Unit) -> int:
        return self._bits[next(iter(unit.slots.values())).part.location]

    def _before(self, one: int, other: int) -> bool:
        return bool(self._needs.get(other, 0) & one)

    # What follows gives each value of a program a mask: a bit for each unit that it depends on.

    def _walk(self, program: Any, inputs: Sequence[int]) -> list[int]:
        """The masks of the outputs; takes down what meets what."""
        program = getattr(program, "jaxpr", program)
        masks = dict.fromkeys(program.constvars, 0) | dict(zip(program.invars, inputs, strict=True))

        def mask(x: Any) -> int:
            return 0 if isinstance(x, Literal) else masks[x]

        for equation in program.eqns:
            given = [mask(x) for x in equation.invars]
            masks.update(zip(equation.outvars, self._outputs(equation, given), strict=True))
        return [mask(x) for x in program.outvars]

    def _outputs(self, equation: Any, given: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, given)
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr") if key in params), None)
        if name in _CALLS and inner is not None:
            return self._walk(inner, given)
        together = functools.reduce(operator.or_, given, 0)
        for alone in set(given):
            if alone > _INPUT and alone.bit_count() == 1:
                self._needs[alone] = self._needs.get(alone, 0) | together & ~alone
        return [together] * len(equation.outvars)

    def _scan(self, equation: Any, given: list[int]) -> list[int]:
        """The first round tells what comes first; what is carried on may depend on all of its predecessors."""
        body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
        stop = _as_they_are(equation.invars, body.invars)  # constants, and what is carried on
        start = stop - _as_they_are(equation.outvars, body.outvars)
        if equation.params["reverse"]:
            self._backwards |= functools.reduce(operator.or_, given[stop:], 0)
        outputs, needs = self._walk(body, given), dict(self._needs)
        while (carried := [a | b for a, b in zip(given[start:stop], outputs, strict=False)]) != given[start:stop]:
            given = [*given[:start], *carried, *given[stop:]]
            outputs = self._walk(body, given)
        self._needs = needs
        return outputs


def _as_they_are(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values a scan does not take apart, or put together, along its axis."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
