"""A function that is compiled once and knows how exact its arithmetic is.

Law: matrix products are in full precision on every platform.
Knows programs; knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from bridge.equivalence.numbers import relative_tolerance
from bridge.tracing.trace import parted

_HALVES = {"bf16": "bfloat16", "f16": "float16"}  # as a program names them


class Compiled:
    """A function of trees, compiled at its first call; what is no array in them never changes.

    Args:
      options: XLA's, for the compilation.

    Attributes:
      tolerance: the smallest there can be, relative to the largest element, as the program computes in half precision
        somewhere: logits in float32 are no better than the bfloat16 that they were made of. 0.0 before the first call.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None):
        self._function, self._compiled, self._options = function, None, options
        self.tolerance = 0.0

    def __call__(self, *trees: Any) -> Any:
        call, arrays = parted(self._function, *trees)
        if self._compiled is None:
            with jax.default_matmul_precision("float32"):
                traced = jax.jit(call).trace(arrays)
                self._compiled = traced.lower().compile(self._options)
            halves = set(re.findall(r"\b(bf16|f16)\[", str(traced.jaxpr)))
            tolerances = [relative_tolerance(_HALVES[name]) for name in halves]
            self.tolerance = max(tolerances, default=0.0)
        return self._compiled(arrays)
