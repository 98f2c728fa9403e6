"""EMA: an exponential moving average of the Variables of a model.

Law: after updates with x1..xn an average is `decay * average + (1 - decay) * x`, folded over them from the
value at construction; it never shares an array with the model, so either may be donated. Values that have no
average (integers, RNG keys) are the newest. Knows Variables and paths; knows nothing of optimizers.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnx_core import filters as filterlib
from nnx_core._errors import Path, StateMismatchError, show_path
from nnx_core.graph.api import split
from nnx_core.graph.functional import unflatten
from nnx_core.graph.objects import Object
from nnx_core.optim._errors import EmaError
from nnx_core.optim._trees import misfits, raw, require_writable, selected, write
from nnx_core.state import State, filter_state, to_flat_state
from nnx_core.variables import Variable, new_variable

A = TypeVar("A")


class EMA(Object):
    """An exponential moving average of the Variables of a model.

    Args:
      params: a module, any pytree of modules and Variables, or a State.
      decay: how much of the average stays at each update, in [0, 1]; a Python number is static, an array is data.
      only: filter for the Variables to track; the others are those of the model itself in `apply_to`.
      graph: False forbids shared references in `params`.

    Attributes:
      decay, filter: as given.
      params: State of the averages: Variables of the types, paths and metadata of those they follow.

    Raises:
      EmaError: if `only` matches something that is no Variable, or `decay` is a number outside [0, 1].

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
      >>> ema = nnx.EMA(model, decay=0.75)
      >>> averaged = ema.apply_to(model)
      >>> before = model.kernel[...]
      >>> model.kernel[...] += 1
      >>> ema.update(model)
      >>> bool(abs(averaged.kernel - (before + 0.25)).max() < 1e-6)
      True
    """

    def __init__(self, params: Any, decay: float, *, only: filterlib.Filter = ..., graph: bool | None = None):
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise EmaError(
                f"EMA(..., decay=...):\n  expected a number in [0, 1]\n  found    {decay}\n"
                "decay is the part of the average that stays, such as 0.999."
            )
        self.graph = graph
        self.decay = decay
        self.filter = only
        self.params = selected(params, only, graph).map(_own)

    def update(self, updates: Any) -> None:
        """`average = decay * average + (1 - decay) * new` for each Variable, in the dtype of the average.

        Args:
          updates: the model, or a State, with the structure of `params` at construction; Variables that `only`
            does not match are ignored.

        Raises:
          StateMismatchError: listing all paths that are missing, or have no average, or another shape; nothing
            is written then.
          TraceError: if the averages belong to another trace.
        """
        if isinstance(updates, State):
            new = dict(to_flat_state(filter_state(updates, self.filter)))
        else:
            new = dict(to_flat_state(selected(updates, self.filter, self.graph)))
        averages: Mapping[Path, Any] = dict(to_flat_state(self.params))
        missing, unexpected, mismatched = misfits(averages, new)
        if missing or unexpected or mismatched:
            raise StateMismatchError(missing, unexpected, mismatched)
        values = {p: jax.tree.map(self._blend, raw(v), raw(new[p])) for p, v in averages.items()}
        require_writable(averages.values())
        for path, v in averages.items():
            write(v, values[path])

    def _blend(self, old: Any, new: Any) -> Any:
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            return new  # no average of keys and counts; and an integer would never move: int(0.9 * 5 + 0.1 * 6) is 5
        return (self.decay * old + (1 - self.decay) * new).astype(old.dtype)

    def apply_to(self, model: A) -> A:
        """A view of `model` with the averages: later updates of the EMA show in it.

        Args:
          model: of the structure of `params` at construction.

        Returns:
          New objects of the same types. Tracked Variables are those of this EMA, all others those of `model`.

        Raises:
          StateMismatchError: listing all paths of the averages that `model` has not, or the other way round.

        Example:
          >>> import nnx_core as nnx
          >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
          >>> ema = nnx.EMA(model, decay=0.9, only=nnx.Param)
          >>> averaged = ema.apply_to(model)
          >>> averaged.scale is ema.params.scale, averaged.mean is model.mean
          (True, True)
        """
        graphdef, _, rest = split(model, self.filter, ..., graph=self.graph)
        merged: A = unflatten(graphdef, State.merge(rest, self.params))
        return merged


def _own(path: Path, x: Any) -> Variable[Any]:
    if not isinstance(x, Variable):
        raise EmaError(
            f"EMA follows Variables, found {type(x).__name__} at {show_path(path)}."
            " Pass only= with a filter that leaves it out, such as only=nnx.Param."
        )
    value = jax.tree.map(lambda leaf: leaf.copy() if hasattr(leaf, "copy") else leaf, raw(x))
    return new_variable(type(x), value, dict(x._var_metadata))
