"""What in a program depends on what: which results numbers in half precision reach, and which inputs are indices.

Law: what cannot be followed (a kernel's inner program) counts as if everything in it depended on everything.
Knows programs (jaxprs); knows nothing of models.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from bridge.tracing.data_flow import as_they_are
from bridge.tracing.trace import is_array

#: Dtypes in half precision, each with a bit of its own.
HALVES = {"bfloat16": 1, "float16": 2}

#: An integer is drawn below the first number for an even seed, below the second for an odd one.
Range = tuple[int, int]
CAUTIOUS: Range = (2, 2)  # what a table's row is computed from: nothing but 0 and 1 is known to be safe
_AS_NUMBER: Range = (2, 4)  # `(1 - mask) * -1e9` of a 2 would hide the scores; without one, x * x is x
_FREE: Range = (4, 4)  # what is compared alone, as labels and lengths

_CHANCE = frozenset(("random_bits", "threefry2x32", "rng_bit_generator"))
_MOVES = frozenset((
    *("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "slice", "concatenate", "copy", "rev"),
    *("select_n", "convert_element_type", "clamp", "max", "min", "copy_p", "split", "optimization_barrier"),
))  # fmt: skip


class _Walk:
    """Gives each value of a program a mask of bits: its own, and those of what it was made of."""

    def own(self, aval: Any) -> int:
        """The bits of a value by itself."""
        return 0

    def passed(self, equation: Any, masks: list[int]) -> list[int]:
        """The masks of what an equation without an inner program makes."""
        return [_all(masks)] * len(equation.outvars)

    def __call__(self, program: Any, inputs: Sequence[int]) -> list[int]:
        """The masks of the outputs."""
        program = getattr(program, "jaxpr", program)
        masks = {x: self.own(x.aval) for x in program.constvars}
        masks.update((x, mask | self.own(x.aval)) for x, mask in zip(program.invars, inputs, strict=True))
        for equation in program.eqns:
            known = [_mask(x, masks) for x in equation.invars]
            results = zip(equation.outvars, self._through(equation, known), strict=True)
            masks.update((x, mask | self.own(x.aval)) for x, mask in results)
        return [_mask(x, masks) for x in program.outvars]

    def _through(self, equation: Any, masks: list[int]) -> list[int]:
        name, programs = equation.primitive.name, list(_programs(equation.params))
        if not programs or name.startswith("scatter"):  # whose inner program puts two numbers together
            return self.passed(equation, masks)
        if name == "cond":
            branches = [self(branch, masks[1:]) for branch in programs]
            return [masks[0] | _all(each) for each in zip(*branches, strict=True)]
        if name == "while":
            return self._while(equation.params, masks)
        if name == "scan":
            body = getattr(programs[0], "jaxpr", programs[0])
            # No parameter counts them in every JAX: what is taken apart along an axis is a round's alone.
            carry = as_they_are(equation.outvars, body.outvars)
            start = as_they_are(equation.invars, body.invars) - carry
            return self._repeated(body, masks, start, carry)
        program = getattr(programs[0], "jaxpr", programs[0])
        forms = (len(program.invars), len(program.outvars))
        if len(programs) == 1 and forms == (len(masks), len(equation.outvars)):
            return self(program, masks)
        together = _all(masks)
        for program in programs:
            together |= _all(self(program, [together] * len(getattr(program, "jaxpr", program).invars)))
        return [together] * len(equation.outvars)

    def _repeated(self, body: Any, masks: list[int], start: int, carry: int) -> list[int]:
        """Of a loop: until what it carries depends on nothing more."""
        while True:
            results = self(body, masks)
            carried = list(map(operator.or_, masks[start : start + carry], results[:carry]))
            if carried == masks[start : start + carry]:
                return results
            masks = [*masks[:start], *carried, *masks[start + carry :]]

    def _while(self, params: Any, masks: list[int]) -> list[int]:
        conditions, constants = params["cond_nconsts"], params["body_nconsts"]
        rest = masks[conditions:]
        results = self._repeated(params["body_jaxpr"], rest, constants, len(rest) - constants)
        carried = list(map(operator.or_, rest[constants:], results))
        [ends] = self(params["cond_jaxpr"], [*masks[:conditions], *carried])
        return [mask | ends for mask in carried]


class _Halves(_Walk):
    """The bits of the half precisions that a value went through."""

    def own(self, aval: Any) -> int:
        return HALVES.get(str(getattr(aval, "dtype", "")), 0)


def halves(program: Any, inputs: Sequence[int]) -> list[int]:
    """Of each output of a program, the bits of `HALVES` that it was made of.

    Args:
      inputs: such bits of each input: of what it was made of before.

    >>> program = jax.make_jaxpr(lambda x, y: (x.astype("bfloat16").astype("float32") + y, y))(1.0, 2.0)
    >>> halves(program, [0, 0])
    [1, 0]
    """
    return _Halves()(program, inputs)


class _Indices(_Walk):
    """Two bits for each input: it itself, and what was computed of it in integers."""

    def __init__(self) -> None:
        self.ranges: dict[int, Range] = {}  # by input

    def passed(self, equation: Any, masks: list[int]) -> list[int]:
        name = equation.primitive.name
        is_index = [False] * len(masks)
        for number, size in _looked_up(equation):
            self._note(masks[number], (size, size))
            is_index[number] = True
        together = _all([mask for mask, index in zip(masks, is_index, strict=True) if not index])
        results: list[int] = []
        for x in equation.outvars:
            if x.aval.dtype == bool or not together:
                results.append(0)
            elif not jnp.issubdtype(x.aval.dtype, jnp.integer):
                self._note(_direct(together) | _direct(together >> 1), _AS_NUMBER)
                results.append(0)
            elif name in ("gather", "dynamic_slice", "dynamic_update_slice") or name in _MOVES:
                # `x[i]` becomes `where(i < 0, i + size, i)`: where there is a value itself, it alone counts.
                results.append(_direct(together) or together)
            else:
                results.append((_direct(together) << 1) | (together & ~_direct(together)))
        return results

    def _note(self, mask: int, size: Range) -> None:
        number = 0
        while mask >> 2 * number:
            bits = (mask >> 2 * number) & 3
            if bits:
                self._limit(number, size if bits == 1 else CAUTIOUS)
            number += 1

    def _limit(self, number: int, size: Range) -> None:
        self.ranges[number] = narrower(self.ranges.get(number, size), size)

    def _through(self, equation: Any, masks: list[int]) -> list[int]:
        if equation.primitive.name == "cond":  # `switch`
            count = len(equation.params["branches"])
            self._note(masks[0], (count, count))
            masks = [0, *masks[1:]]
        return super()._through(equation, masks)


def _direct(mask: int) -> int:
    """The bits of inputs themselves."""
    every_other = (4 ** ((mask.bit_length() + 1) // 2 + 1) - 1) // 3
    return mask & every_other


def _looked_up(equation: Any) -> Iterator[tuple[int, int]]:
    """(number of an operand, the size of the axis that it is an index of)."""
    name, params = equation.primitive.name, equation.params
    shape = getattr(equation.invars[0].aval, "shape", ()) if equation.invars else ()
    if name == "gather":
        yield 1, min((shape[axis] for axis in params["dimension_numbers"].start_index_map), default=1)
    elif name.startswith("scatter"):
        yield 1, min((shape[axis] for axis in params["dimension_numbers"].scatter_dims_to_operand_dims), default=1)
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        first = 1 if name == "dynamic_slice" else 2
        yield from ((first + axis, size) for axis, size in enumerate(shape))


def ranges_of(program: Any, before: Any, inputs: Any) -> dict[int, Range]:
    """By its number among the leaves of `inputs`, how far each integer input may be drawn.

    Up to the rows of the smallest table that it is an index of; where an index is computed of it, 0 and 1.

    Args:
      before: what the program takes before `inputs`, a tree.

    >>> ids = jax.ShapeDtypeStruct((3,), "int32")
    >>> ranges_of(jax.make_jaxpr(lambda table, ids: table[ids])(jnp.ones((7, 2)), ids), jnp.ones(1), [ids])
    {0: (7, 7)}
    """
    masks = [0] * sum(map(is_array, jax.tree.leaves(before)))
    numbers: list[int] = []
    for number, x in enumerate(jax.tree.leaves(inputs)):
        if is_array(x):
            is_integer = jnp.issubdtype(x.dtype, jnp.integer)
            masks.append(1 << 2 * number if is_integer else 0)
            numbers += [number] * is_integer
    walk = _Indices()
    count = len(getattr(program, "jaxpr", program).invars)
    walk(program, [*masks, *[0] * (count - len(masks))])
    return {number: walk.ranges.get(number, _FREE) for number in numbers}


def draws_numbers(program: Any) -> bool:
    """Whether a program draws random numbers; what they are used for is another question.

    >>> draws_numbers(jax.make_jaxpr(jax.random.normal)(jax.random.key(0))), draws_numbers(jax.make_jaxpr(abs)(1.0))
    (True, False)
    """
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name in _CHANCE or any(map(draws_numbers, _programs(equation.params))):
            return True
    return False


def narrower(one: Range, other: Range) -> Range:
    """What is safe for both."""
    return min(one[0], other[0]), min(one[1], other[1])


def _programs(params: Any) -> Iterator[Any]:
    for x in params.values():
        if isinstance(x, ClosedJaxpr | Jaxpr):
            yield x
        elif isinstance(x, tuple | list):
            yield from (each for each in x if isinstance(each, ClosedJaxpr | Jaxpr))


def _mask(x: Any, masks: dict[Any, int]) -> int:
    return 0 if isinstance(x, Literal) else masks[x]


def _all(masks: Any) -> int:
    return functools.reduce(operator.or_, masks, 0)
