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

from bridge._types import Location
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
        self._bits: dict[Location, int] = {}  # of a variable: the bit of its unit
        for number, unit in enumerate(units):
            for slot in unit.slots.values():
                self._bits[slot.part.location] = 2 << number
        self._needs: dict[int, int] = {}  # bit of a unit -> mask of what meets its variables
        self._backwards = 0  # mask of what a scan takes from its last round to its first
        values = dict(call.variables)
        traced, arrays = parted(call.run, values, keys, args, kwargs)
        # `parted` flattens the variables first, and a dict in the order of its keys.
        inputs: list[int] = []
        for location in sorted(values):
            own = filter(is_array, jax.tree.leaves(values[location]))
            inputs += [self._bits.get(location, _INPUT) for _ in own]
        inputs += [_INPUT] * (len(arrays) - len(inputs))
        self._walk(jax.make_jaxpr(traced)(arrays), inputs)

    def in_order(self, first: Instance, second: Instance) -> bool:
        """Whether the second cannot come before the first: it needs the first's output, or a later round of a stack.

        The rounds of a scan that runs backwards are in no order.
        """
        one, other = self._bit(first[0]), self._bit(second[0])
        if _in_one_stack(first, second):
            return not (one | other) & self._backwards
        return self._before(one, other) and not self._before(other, one)

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
            outputs = self._outputs(equation, [mask(x) for x in equation.invars])
            masks.update(zip(equation.outvars, outputs, strict=True))
        return [mask(x) for x in program.outvars]

    def _outputs(self, equation: Any, inputs: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, inputs)
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if name in _CALLS and inner is not None:
            return self._walk(inner, inputs)
        together = functools.reduce(operator.or_, inputs, 0)
        for alone in set(inputs):
            if alone > _INPUT and alone.bit_count() == 1:  # made of one unit's variables and of nothing else
                self._needs[alone] = self._needs.get(alone, 0) | together & ~alone
        return [together] * len(equation.outvars)

    def _scan(self, equation: Any, inputs: list[int]) -> list[int]:
        """The first round tells what comes first; what is carried on may depend on all of its predecessors.

        The body is walked again until what it carries depends on nothing more. What the units need of each other is
        taken from the first walk: after it a layer seems to need the layers behind it, of the round before.
        """
        body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
        stop = as_they_are(equation.invars, body.invars)  # constants, and what is carried on
        start = stop - as_they_are(equation.outvars, body.outvars)
        if equation.params["reverse"]:
            self._backwards |= functools.reduce(operator.or_, inputs[stop:], 0)
        outputs = self._walk(body, inputs)
        needs_of_first = dict(self._needs)
        while True:
            carried = list(map(operator.or_, inputs[start:stop], outputs))  # the first outputs are what is carried
            if carried == inputs[start:stop]:
                break
            inputs = [*inputs[:start], *carried, *inputs[stop:]]
            outputs = self._walk(body, inputs)
        self._needs = needs_of_first
        return outputs


def _in_one_stack(first: Instance, second: Instance) -> bool:
    """Whether the two are in one stack, in two rounds of it: where their stacks and rounds part, the stack is one."""
    rounds = [tuple(zip(unit.frames, index, strict=True)) for unit, index in (first, second)]
    for (stack, index), (other_stack, other_index) in zip(*rounds, strict=False):
        if stack != other_stack:
            return False
        if index != other_index:
            return True
    return False


def as_they_are(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values a scan does not take apart, or put together, along its axis."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
