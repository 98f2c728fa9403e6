"""Functional: an NNX class as a pair of functions, `init` and `apply`, as Linen users know them.

Law: `functional(cls)(*args, **kwargs)` is `nnx.split(cls(*args, **kwargs))` and `nnx.call`, nothing else: a State goes
in, a State comes out, and nothing that was passed in is changed.
Knows nnx.split and nnx.call; knows no Linen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import nnx_core as nnx
from bridge.modules._errors import NotReadyError

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass
class Functional(Generic[M]):
    """What `functional` makes: a class and its arguments, and after `init` the structure of the module.

    Attributes:
      module_type: the NNX class.
      graphdef: the structure, None before `init`.
      args, kwargs: arguments of the class.
    """

    module_type: type[M]
    graphdef: nnx.GraphDef[M] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def init(self, *, rngs: nnx.Rngs | None = None) -> nnx.State:
        """The State of a new module, made with `rngs` if they are given; keeps its structure for `apply`."""
        kwargs = self.kwargs if rngs is None else {**self.kwargs, "rngs": rngs}
        self.graphdef, state = nnx.split(self.module_type(*self.args, **kwargs))
        return state

    def apply(self, *states: Any) -> Any:
        """A stand-in for the module with these states: calling it, or a method of it, returns (result, (graphdef,
        state)).

        Raises:
          NotReadyError: before `init`.
        """
        if self.graphdef is None:
            raise NotReadyError(self.module_type.__name__)
        return nnx.call((self.graphdef, *states))


def functional(cls: type[M]) -> Callable[..., Functional[M]]:
    """A constructor like `cls` that makes a `Functional`.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = functional(nnx.Linear)(2, 3)
      >>> state = model.init(rngs=nnx.Rngs(0))
      >>> y, (graphdef, state) = model.apply(state)(jnp.ones((1, 2)))
      >>> y.shape
      (1, 3)
    """

    def construct(*args: Any, **kwargs: Any) -> Functional[M]:
        return Functional(cls, None, args, kwargs)

    return construct
