"""What is zero but for rounding: what is left where larger numbers cancel, and the last bit of each of these decides.

Law: only what is no larger than some last bits of the numbers that the models start from is looked at, and it is such a
zero only if it moves by as much as it is large once every one of these has its last bit moved. An output that is small
because it is multiplied by a small number moves by far less, and stays what it is.
Knows runs and arrays; knows nothing of findings.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from bridge.equivalence.dependence import HALVES
from bridge.equivalence.drawing import with_last_bits_moved
from bridge.equivalence.numbers import difference, is_inexact, largest, relative_tolerance
from bridge.equivalence.outcome import Kind, Outcome, Run
from bridge.equivalence.subjects import Keys

#: Rounding moves two programs apart by a few times what the last bit of each number does to either of them.
NOISE = 32.0
_LAST_BITS = 64.0


class Rounding:
    """Two runs on the same numbers, and what each made of them."""

    def __init__(self, runs: tuple[Run, Run], outcomes: tuple[Outcome, Outcome], keys: Keys, args: Any, kwargs: Any):
        self._runs, self._outcomes, self._keys, self._inputs = runs, outcomes, keys, (args, kwargs)
        self._moved_by: dict[float, tuple[Outcome, Outcome]] = {}

    def floor(self, what: Kind, at: Any, other: Any, x_a: Any, x_b: Any) -> float:
        """What two values may differ by if both are zero but for rounding; else 0.0."""
        if not (is_inexact(x_a) and is_inexact(x_b)):
            return 0.0
        size = largest([x_a, x_b])
        least = min(self._outcomes[0].allowed(what, at), self._outcomes[1].allowed(what, other))
        eps = last_bit(least, x_a, x_b)
        if not 0 < size <= _LAST_BITS * eps * self._scale:
            return 0.0
        noise = 0.0
        for moved, before, place in zip(self._moved(eps), self._outcomes, (at, other), strict=True):
            one, two = (getattr(outcome, what)[place] for outcome in (before, moved))
            noise = max(noise, difference(two, one).absolute)
        return NOISE * noise if size <= NOISE * noise < float("inf") else 0.0

    @functools.cached_property
    def _scale(self) -> float:
        return largest([self._inputs, *(list(run.subject.values.values()) for run in self._runs)])

    def _moved(self, eps: float) -> tuple[Outcome, Outcome]:
        if eps not in self._moved_by:
            self._moved_by[eps] = self._run_moved(eps)
        return self._moved_by[eps]

    def _run_moved(self, eps: float) -> tuple[Outcome, Outcome]:
        args, kwargs = with_last_bits_moved(self._inputs, eps)
        values = [with_last_bits_moved(dict(run.subject.values), eps) for run in self._runs]
        one, two = (run(own, self._keys, args, kwargs) for run, own in zip(self._runs, values, strict=True))
        return one, two


def last_bit(tolerance: float, *values: Any) -> float:
    """How far apart one rounding can bring two programs, relative to the number that is rounded.

    That is the distance of neighbouring numbers, `finfo.eps`: each program is off by at most half of it, the unit
    roundoff, but to either side (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.2). So a
    float32 that is moved by it is another bfloat16 for sure; moved by half of it, a third of them are the same.

    Args:
      tolerance: of the dtype in half precision that counts, on this backend; 0.0 where none does.
      *values: else the coarsest of these counts; what is not inexact does not.

    >>> import numpy as np
    >>> last_bit(0.0, np.float32(1)) == 2.0**-23, last_bit(relative_tolerance("bfloat16")) == 2.0**-7
    (True, True)
    """
    names = [name for name in HALVES if tolerance and relative_tolerance(name) == tolerance]
    names = names or [x.dtype.name for x in values if is_inexact(x)]
    return max((float(jnp.finfo(name).eps) for name in names), default=0.0)
