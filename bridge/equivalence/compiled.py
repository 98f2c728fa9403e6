"""A function that is compiled once and knows how exact its arithmetic is.

Law: matrix products are in full precision on every platform.
Knows programs; knows nothing of models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from bridge.equivalence.dependence import HALVES, halves
from bridge.equivalence.numbers import relative_tolerance
from bridge.tracing.pure_call import quick_options
from bridge.tracing.trace import is_array, parted

_LARGE = 16 << 20  # bytes of variables from which on optimizing a program pays


@functools.cache
def _allowances() -> dict[int, float]:
    """Of each dtype in half precision, by its bit: what it allows, relative to the largest element, on this backend.

    Asked for when something is compared: which backend there is, is not known when this is imported.
    """
    return {bit: relative_tolerance(name) for name, bit in HALVES.items()}


class Compiled:
    """A function of trees, compiled at its first call; what is no array in them never changes.

    Args:
      options: XLA's, for the compilation.

    Attributes:
      program: its jaxpr; None before it is compiled.
      least: of each result, in the form of what the function returns, the smallest tolerance there can be, relative
        to the largest element: logits in float32 are no better than the bfloat16 that they were made of. 0.0 for one
        that no number in half precision reaches. None before it is compiled.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None):
        self._function, self._compiled, self._options = function, None, options
        self._treedef: Any = None
        self.program: Any = None
        self.least: Any = None

    @property
    def tolerance(self) -> float:
        """The largest of `least`; 0.0 before the first call."""
        return max(jax.tree.leaves(self.least), default=0.0)

    def prepare(self, *trees: Any) -> None:
        """Compile for trees of this form, whose arrays may be abstract; once."""
        if self._compiled is None:
            self._compile(*parted(self._function, *trees))

    def __call__(self, *trees: Any) -> Any:
        call, arrays = parted(self._function, *trees)
        if self._compiled is None:
            self._compile(call, arrays)
        assert self._compiled is not None
        return self._compiled(arrays)

    def _compile(self, call: Callable[..., Any], arrays: list[Any]) -> None:
        with jax.default_matmul_precision("float32"):
            traced = jax.jit(call).trace(arrays)
            self._compiled = traced.lower().compile(self._options)
        self.program, self._treedef = traced.jaxpr, jax.tree.structure(traced.out_info)
        self.least = self._allowed(halves(self.program, [0] * len(arrays)))

    def least_after(self, trees: Any, before: Any) -> Any:
        """`least`, where the arrays of `trees` were made of half precision already, as `before` says of each."""
        leaves, treedef = jax.tree.flatten(trees)
        known = treedef.flatten_up_to(before)
        masks = [_mask_of(x) for leaf, x in zip(leaves, known, strict=True) if is_array(leaf)]
        return self._allowed(halves(self.program, masks))

    def _allowed(self, masks: list[int]) -> Any:
        return self._treedef.unflatten([_most(mask) for mask in masks])


def options_for(values: Any) -> dict[str, Any] | None:
    """XLA's options for a program of these variables that runs a few times: None if optimizing it pays."""
    size = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(values))
    return quick_options() if size < _LARGE else None


def _most(mask: int) -> float:
    return max((allowed for bit, allowed in _allowances().items() if mask & bit), default=0.0)


def _mask_of(least: float) -> int:
    return next((bit for bit, allowed in _allowances().items() if least and allowed == least), 0)
