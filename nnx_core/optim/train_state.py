"""TrainState: structure, parameters and optimizer state as one immutable pytree, for functional training loops.

Law: `apply_gradients` does what optax does to the same tree of arrays, bit for bit, and returns a new TrainState;
nothing here is ever written in place. Knows graphs as GraphDef and State; needs no module at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax.numpy as jnp

from nnx_core.graph.functional import call
from nnx_core.graph.structure import GraphDef
from nnx_core.optim._errors import TrainStateError
from nnx_core.optim._records import Record
from nnx_core.optim._trees import fitted
from nnx_core.state import State

if TYPE_CHECKING:
    import jax
    import optax

M = TypeVar("M")
TS = TypeVar("TS", bound="TrainState[Any]")


class TrainState(Record, Generic[M]):
    """Everything that a training step of one model changes. A frozen dataclass and a pytree; subclass it to add fields.

    Attributes:
      graphdef: the structure of the model, as `nnx.split` returns it; static.
      params: the State to optimize.
      opt_state: the state of `tx`, as optax makes it.
      step: number of updates so far, an integer scalar.
      tx: an optax transformation; static.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp, optax
      >>> class MyState(nnx.TrainState):
      ...     stats: nnx.State
      >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> graphdef, params, stats = nnx.split(model, nnx.Param, ...)
      >>> state = MyState.create(graphdef, params=params, tx=optax.sgd(0.1), stats=stats)
      >>> @jax.jit
      ... def train_step(state, x):
      ...     def loss(params):
      ...         y, (_, new) = state.apply(params, "stats")(x)
      ...         return (y - 1).mean(), new.filter(nnx.BatchStat)
      ...
      ...     grads, stats = jax.grad(loss, has_aux=True)(state.params)
      ...     return state.apply_gradients(grads, stats=stats)
      >>> state = train_step(state, jnp.ones((4, 2)))
      >>> int(state.step), state.params.bias[...]
      (1, Array([-0.05, -0.05], dtype=float32))
    """

    graphdef: GraphDef
    params: State
    opt_state: optax.OptState
    step: jax.Array
    tx: optax.GradientTransformation = dataclasses.field(metadata={"pytree_node": False})

    @classmethod
    def create(
        cls: type[TS],
        graphdef: GraphDef,
        *,
        params: State,
        tx: optax.GradientTransformation,
        step: int = 0,
        **kwargs: Any,
    ) -> TS:
        """A TrainState before its first step; **kwargs are the fields of a subclass."""
        return cls(graphdef, params=params, opt_state=tx.init(params), step=jnp.asarray(step), tx=tx, **kwargs)

    def apply(self, state: State | str, *states: State | str) -> Any:
        """Call the model with these States, or with the fields of these names.

        Returns:
          A stand-in for the model: calling it, or a method reached from it by attributes and items, returns
          (result, (graphdef, state)). The States given are not written.

        Raises:
          TrainStateError: if a named field holds no State.
          StateMismatchError: at the call, if the States do not fit the graphdef, listing all paths.
        """
        return call((self.graphdef, *map(self._state, (state, *states))))

    def _state(self, state: State | str) -> State:
        if not isinstance(state, str):
            return state
        field = getattr(self, state)
        if not isinstance(field, Mapping):
            raise TrainStateError(
                f"Expected {type(self).__name__}.{state} to be a State, got {type(field).__name__}."
                " apply() takes States, or names of fields that hold them."
            )
        return field  # type: ignore[return-value]  # any mapping of paths will do

    def apply_gradients(self: TS, grads: State, **kwargs: Any) -> TS:
        """One step of `tx`: a new TrainState with other `params`, `opt_state` and `step`.

        Args:
          grads: as `jax.grad` or `nnx.grad` returns them for `params`.
          **kwargs: new values of further fields.

        Raises:
          GradientMismatchError: listing all paths that `params` and `grads` do not share, or whose shapes differ.
        """
        import optax  # here, so that importing nnx_core costs no more than JAX

        if isinstance(self.params, State):
            grads = fitted(self.params, grads)
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return self.replace(params=params, opt_state=opt_state, step=self.step + 1, **kwargs)
