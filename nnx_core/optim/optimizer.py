"""Optimizer: an optax transformation with its state, applied to the Variables of a module.

Law: an update does to the chosen Variables what optax does to the same tree of arrays, bit for bit; nothing is
written unless the whole update could be computed. The state is made of Variables under the paths that optax's
own state has, so it is saved, sharded and transformed like every other state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from nnx_core import filters as filterlib
from nnx_core._errors import OptimizerError, StateMismatchError
from nnx_core.graph.api import state as state_of
from nnx_core.graph.api import update as update_graph
from nnx_core.graph.objects import Object
from nnx_core.kinds import OptArray, OptState, OptVariable, Param
from nnx_core.state import State, to_flat_state
from nnx_core.variables import Variable, new_variable

if TYPE_CHECKING:
    import optax

_SOURCE = "source_type"  # metadata of an OptVariable: the type of the Variable it belongs to


def _is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def _to_state(tree: Any) -> Any:
    """optax's state with OptVariables for Variables and OptArrays for arrays."""

    def convert(x: Any) -> Any:
        if isinstance(x, Variable):
            return new_variable(OptVariable, x._raw_value, {**x._var_metadata, _SOURCE: type(x)})
        return new_variable(OptArray, x, {})

    return jax.tree.map(convert, tree, is_leaf=_is_variable)


def _from_state(tree: Any) -> Any:
    """The inverse of `_to_state`: what optax made and expects."""

    def convert(x: Any) -> Any:
        if isinstance(x, OptVariable):
            metadata = dict(x._var_metadata)
            return new_variable(metadata.pop(_SOURCE), x._raw_value, metadata)
        return x._raw_value if isinstance(x, OptArray) else x

    return jax.tree.map(convert, tree, is_leaf=_is_variable)


class Optimizer(Object):
    """Holds the state of an optax transformation for some Variables of a model.

    Args:
      model: the module, or any pytree with Variables.
      tx: an optax transformation.
      wrt: filter for the Variables to optimize.

    Attributes:
      step: OptState, uint32 scalar: number of updates so far.
      opt_state: the state of `tx`, made of OptVariables and OptArrays.

    Example:
      >>> import nnx_core as nnx, optax, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> before = model.bias[...]
      >>> optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
      >>> float((before - model.bias)[0]), int(optimizer.step[...])
      (0.10000000149011612, 1)
    """

    def __init__(self, model: Any, tx: optax.GradientTransformation, *, wrt: filterlib.Filter = None):
        if wrt is None:
            raise OptimizerError(
                "Expected wrt=, the filter of the Variables to optimize (usually nnx.Param). update() takes (model,"
                " grads); for the older update(grads) use nnx.ModelAndOptimizer."
            )
        self.step = OptState(jnp.array(0, jnp.uint32))
        self.tx = tx
        self.wrt = wrt
        self.opt_state = _to_state(tx.init(_copied(state_of(model, wrt))))

    def update(self, model: Any, grads: Any = None, /, **kwargs: Any) -> None:
        """One step: write the new values into the Variables of `model` and the new state into this object.

        Args:
          model: what the optimizer was made for.
          grads: State of gradients, as `nnx.grad` returns it, under the paths of the Variables.
          **kwargs: passed on to `tx.update` (such as `value=` for line searches).

        Raises:
          OptimizerError: if `grads` is not a State.
          StateMismatchError: if its paths are not those of the Variables to optimize.
        """
        import optax  # here, so that importing nnx_core costs no more than JAX

        params = state_of(model, self.wrt)
        if not isinstance(grads, State):
            raise OptimizerError(
                f"Expected gradients as nnx.grad(...)(model) returns them, a State; found {type(grads).__name__}."
                " The arguments are update(model, grads)."
            )
        grads = _under(params, grads, self.wrt)
        params = _copied(params)
        updates, opt_state = self.tx.update(grads, _from_state(self.opt_state), params, **kwargs)
        new_params = optax.apply_updates(params, updates)
        new_state = _leaves(_to_state(opt_state))
        old_state = _leaves(self.opt_state)
        if len(new_state) != len(old_state):
            raise OptimizerError(f"The state of {self.tx} had {len(old_state)} leaves and now has {len(new_state)}.")
        update_graph(model, new_params)
        for old, new in zip(old_state, new_state, strict=True):
            old.set_raw_value(new._raw_value)
        self.step[...] += jnp.uint32(1)


def _leaves(tree: Any) -> list[Variable[Any]]:
    return jax.tree.leaves(tree, is_leaf=_is_variable)


def _copied(state: State) -> State:
    """New Variables, so that nothing optax does reaches the model, and plain metadata: optax compares it."""
    return state.map(lambda _, x: new_variable(type(x), x._raw_value, dict(x._var_metadata)) if _is_variable(x) else x)


def _under(params: State, grads: State, wrt: filterlib.Filter) -> State:
    """`grads` under the paths, types and metadata of `params`."""
    wanted, found = dict(to_flat_state(params)), dict(to_flat_state(grads))
    missing, unexpected = [p for p in wanted if p not in found], [p for p in found if p not in wanted]
    if missing or unexpected:
        raise StateMismatchError(missing, unexpected)

    def gradient(path: Any, x: Any) -> Any:
        g = found[path]
        raw = g._raw_value if _is_variable(g) else g
        return new_variable(type(x), raw, dict(x._var_metadata)) if _is_variable(x) else raw

    return params.map(gradient)


class ModelAndOptimizer(Optimizer):
    """An Optimizer that holds its model: `update(grads)`. The older form of Optimizer."""

    def __init__(self, model: Any, tx: optax.GradientTransformation, *, wrt: filterlib.Filter = Param):
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(self, grads: Any, **kwargs: Any) -> None:  # type: ignore[override]  # that is the point of it
        """One step for the model this object holds; see `Optimizer.update`."""
        super().update(self.model, grads, **kwargs)
