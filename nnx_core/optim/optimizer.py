"""Optimizer: an optax transformation with its state, applied to the Variables of a module.

Law: an update does to the chosen Variables what optax does to the same tree of arrays, bit for bit; nothing is
written unless the whole update could be computed and written. The state is made of Variables under the paths
that optax's own state has, so it is saved, sharded and transformed like every other state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from nnx_core import filters as filterlib
from nnx_core._errors import OptimizerError, Path, show_path
from nnx_core.graph.api import state as state_of
from nnx_core.graph.api import update as update_graph
from nnx_core.graph.objects import Object, data
from nnx_core.kinds import OptArray, OptState, OptVariable, Param
from nnx_core.optim._trees import (
    by_path,
    fitted,
    is_variable,
    nested,
    raw,
    require_writable,
    rewrapped,
    selected,
    write,
)
from nnx_core.sharding import place_eagerly
from nnx_core.state import State, to_flat_state
from nnx_core.variables import AXIS_NAMES, OPTIMIZER_AXIS_NAMES, Variable, new_variable, set_raw

if TYPE_CHECKING:
    import optax

M = TypeVar("M")

_SOURCE = "source_type"  # metadata of an OptVariable: the type of the Variable it belongs to
_MOST_SHOWN = 20  # paths in a message
# What pytrees that differ in their containers raise, and functions of params that ask for dicts.
_OF_CONTAINERS = (ValueError, TypeError, AssertionError)
_WRT_TEXT = (
    "Missing required argument `wrt`: Optimizer(model, tx, wrt=filter of the Variables to optimize, usually nnx.Param)."
    " update() takes (model, grads); for the older Optimizer(model, tx) and update(grads) use nnx.ModelAndOptimizer."
)
_GRADS_TEXT = (
    "Missing required argument `grads`: the arguments are update(model, grads)."
    " For the older update(grads) use nnx.ModelAndOptimizer."
)


def _explain(fits: Callable[[tuple[Any, ...], dict[str, Any]], bool], text: str) -> Callable[[Any], Any]:
    """Replace Python's "missing argument" for calls that an older flax.nnx took; the signature stays."""

    def wrap(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not fits(args, kwargs):
                raise OptimizerError(text)
            return method(self, *args, **kwargs)

        return call

    return wrap


def _to_state(tree: Any) -> Any:
    """optax's state with OptVariables for Variables and OptArrays for arrays."""

    def convert(x: Any) -> Any:
        if isinstance(x, OptState):
            return x
        if isinstance(x, Variable):
            return _moment(x)
        return new_variable(OptArray, x, {})

    return jax.tree.map(convert, tree, is_leaf=is_variable)


def _moment(x: Variable[Any]) -> OptVariable[Any]:
    """optax's `x`, with its parameter's metadata, as an OptVariable where its axis names send it."""
    moment = new_variable(OptVariable, x._raw_value, {**_apart(x._var_metadata), _SOURCE: type(x)})
    set_raw(moment, place_eagerly(moment, moment._raw_value))
    return moment


def _apart(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata with the axis names that are meant for the optimizer, if there are any."""
    names = metadata.get(OPTIMIZER_AXIS_NAMES)
    return metadata if names is None else {**metadata, AXIS_NAMES: names}


def _lives_apart(params: State) -> frozenset[Path]:
    """The parameters whose moments have axis names of their own."""
    leaves = to_flat_state(params)
    return frozenset(p for p, x in leaves if is_variable(x) and OPTIMIZER_AXIS_NAMES in x._var_metadata)


def _brought(state: Any, paths: frozenset[Path], described: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`state`, of which the Variables at `paths` are where described(their metadata) sends them."""
    if not paths or not isinstance(state, State):
        return state

    def place(path: Path, x: Any) -> Any:
        if path not in paths or not is_variable(x):
            return x
        like = new_variable(OptVariable, None, described(x._var_metadata))
        return new_variable(type(x), place_eagerly(like, x._raw_value), dict(x._var_metadata))

    return state.map(place)


def _from_state(tree: Any, params: State) -> Any:
    """The inverse of `_to_state`: what optax made and expects.

    optax compares metadata, so each Variable has that of its parameter now, not that of the day it was made.
    """
    metadata = {path: x._var_metadata for path, x in to_flat_state(params) if isinstance(x, Variable)}

    def convert(path: tuple[Any, ...], x: Any) -> Any:
        if not isinstance(x, OptVariable):
            return raw(x)
        keys = tuple(getattr(entry, "key", None) for entry in path)  # ends in the path of the parameter
        own = {k: v for k, v in x._var_metadata.items() if k != _SOURCE}
        found = next((metadata[keys[i:]] for i in range(len(keys)) if keys[i:] in metadata), own)
        return new_variable(x._var_metadata[_SOURCE], raw(x), dict(found))

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=is_variable)


def _initial(tx: optax.GradientTransformation, params: State) -> tuple[Any, bool]:
    """The state that `tx` makes, and whether it is of dicts in dicts in the place of a State.

    Labels of `multi_transform` and masks given as trees are compared with the params, their containers too, and what
    `tx` was given is out of reach inside its functions. So what does not take a State is tried with dicts.
    """
    try:
        return tx.init(params), False
    except _OF_CONTAINERS as error:
        of_states = str(error)
        try:
            return tx.init(nested(params)), True
        except _OF_CONTAINERS as second:
            of_dicts = str(second)
        if of_dicts == of_states:
            raise  # no matter of containers
        known = list(dict(to_flat_state(params)))
        paths = "\n".join(f"  {show_path(path)}" for path in known[:_MOST_SHOWN])
        if len(known) > _MOST_SHOWN:
            paths += f"\n  and {len(known) - _MOST_SHOWN} more"
        raise OptimizerError(
            "tx.init takes the Variables to optimize neither as a State nor as dicts in dicts.\n"
            "Expected of labels and masks that are trees: all States or all dicts, of these paths, or beginnings:\n"
            f"{paths}\nFound with a State: {of_states}\nFound with dicts: {of_dicts}\n"
            "Mend the tree, or give a function of the params: lambda params: jax.tree.map(..., params)."
        ) from error


def _with_states(x: Any) -> Any:
    """An extra argument for a transformation over dicts: functions of params are still given a State."""
    if not callable(x) or isinstance(x, jax.Array):
        return nested(x)
    return lambda params, *args, **kwargs: x(State(params), *args, **kwargs)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_variable)


class Optimizer(Object, Generic[M]):
    """Holds the state of an optax transformation for some Variables of a model.

    Args:
      model: a module, or any pytree of modules and Variables.
      tx: an optax transformation. Two optimizers over the same object are one structure to nnx.jit. Labels of
        `optax.multi_transform` and masks of `optax.masked` that are trees have the paths of `nnx.state(model, wrt)`,
        or beginnings of them: States, or dicts in dicts.
      wrt: filter for the Variables to optimize.
      graph: False forbids shared references in `model`.

    Attributes:
      step: OptState, uint32 scalar: number of updates so far.
      opt_state: the state of `tx`, made of OptVariables, which carry the metadata of their parameters (axis
        names), and OptArrays. On a mesh the OptVariables are where their axis names say: those of
        the parameter, or what its metadata has under `optimizer_sharding`.

    Raises:
      OptimizerError: without `wrt`, if `model` is a lone Variable, or if such a tree does not fit the Variables.

    Example:
      >>> import nnx_core as nnx, optax, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> before = model.bias[...]
      >>> updates = optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
      >>> float((before - model.bias)[0]), int(optimizer.step[...])
      (0.10000000149011612, 1)
    """

    _over_dicts = False  # whether `tx` knows the params as dicts in dicts

    @_explain(lambda args, kwargs: "wrt" in kwargs and len(args) < 3, _WRT_TEXT)
    def __init__(
        self,
        model: M,
        tx: optax.GradientTransformation,
        *,
        wrt: filterlib.Filter,
        graph: bool | None = None,
    ):
        self.graph = graph
        self.step = OptState(jnp.array(0, jnp.uint32))
        self.tx = tx
        opt_state, over_dicts = _initial(tx, _copied(selected(model, wrt, graph)))
        if over_dicts:
            self._over_dicts = True
        self.opt_state = data(_to_state(opt_state))
        self.wrt = wrt

    def __getattr__(self, name: str) -> Any:
        hint = " It does not hold its model; nnx.ModelAndOptimizer does." if name == "model" else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{hint}")

    @_explain(lambda args, kwargs: len(args) > 1, _GRADS_TEXT)
    def update(self, model: M, grads: Any, /, **kwargs: Any) -> Any:
        """One step: write the new values into the Variables of `model` and the new state into this object.

        Args:
          model: what the optimizer was made for.
          grads: the gradients as `nnx.grad` or `jax.grad` returns them, each of its parameter's shape, in any
            dtype. There may be more than `wrt` asks for.
          **kwargs: passed on to `tx.update` (`value=` for reduce_on_plateau and polyak_sgd; `value=`, `grad=` and
            `value_fn=` for line searches). `value_fn` is called with a State like `nnx.state(model, wrt)`.

        Returns:
          What was added to the parameters, a State of arrays.

        Raises:
          GradientMismatchError: listing all paths without a gradient, gradients of nothing in `model`, and
            gradients of another shape. Nothing is written then, nor if `tx` raises anything.
          TraceError: if the Variables of `model`, or those of the optimizer, belong to another trace.
          OptimizerError: if `grads` are no gradients, or `tx` returns another structure of its state.
        """
        import optax  # here, so that importing nnx_core costs no more than JAX

        live = selected(model, self.wrt, self.graph)
        params = _copied(live)
        _require_state(grads)
        grads = fitted(params, grads, lambda: by_path(state_of(model)))
        kwargs = {name: _like(params, x) for name, x in kwargs.items()}
        updates, opt_state = self._updates(params, grads, kwargs)
        new_params = optax.apply_updates(params, updates)
        self._write(model, live, new_params, opt_state)
        return jax.tree.map(raw, updates, is_leaf=is_variable)

    def _updates(self, params: State, grads: State, kwargs: dict[str, Any]) -> tuple[State, Any]:
        """What `tx` makes of them, computed where the moments live: explicit axes do not mix."""
        apart = _lives_apart(params)
        bring = functools.partial(_brought, paths=apart, described=_apart)
        kwargs = {name: bring(x) for name, x in kwargs.items()}
        state = _from_state(self.opt_state, params)
        grads, params = bring(grads), bring(params)
        if self._over_dicts:
            kwargs = {name: _with_states(x) for name, x in kwargs.items()}
            updates, opt_state = self.tx.update(nested(grads), state, nested(params), **kwargs)
            updates = State(updates)
        else:
            updates, opt_state = self.tx.update(grads, state, params, **kwargs)
        return _brought(updates, apart, dict), opt_state

    def _write(self, model: M, live: State, new_params: State, opt_state: Any) -> None:
        old, new = _leaves(self.opt_state), _leaves(opt_state)
        if len(new) != len(old):
            raise OptimizerError(
                f"Expected the state of {self.tx} to keep its structure of {len(old)} arrays, found {len(new)} after"
                " tx.update. Nothing was updated; make the transformation return a state like the one of tx.init."
            )
        values = dict(to_flat_state(new_params))
        variables = {path: x for path, x in to_flat_state(live) if isinstance(x, Variable)}
        require_writable([*variables.values(), self.step, *filter(is_variable, old)])
        if not all(map(is_variable, old)):  # a hyperparameter was replaced by an array
            self.opt_state = data(_to_state(self.opt_state))
            old = _leaves(self.opt_state)
        for path, v in variables.items():
            write(v, raw(values.pop(path)))
        if values:
            update_graph(model, State(values.items()))
        for v, x in zip(old, new, strict=True):
            apart = OPTIMIZER_AXIS_NAMES in v._var_metadata
            write(v, place_eagerly(v, raw(x)) if apart else raw(x))
        self.step[...] += jnp.uint32(1)


def _copied(state: State) -> State:
    """New Variables, so that nothing optax does reaches the model."""
    return rewrapped(state, dict(to_flat_state(state)))


def _require_state(grads: Any) -> None:
    """Raise OptimizerError for a lone value in the place of gradients."""
    if isinstance(grads, Variable) or jax.tree_util.all_leaves([grads]):
        raise OptimizerError(
            f"Expected gradients as nnx.grad(...)(model) returns them, a State; found {type(grads).__name__}."
            " The arguments are update(model, grads)."
        )


def _like(params: State, x: Any) -> Any:
    """An extra argument; a State with a leaf for each parameter becomes one of the same Variables."""
    if not isinstance(x, State):
        return x
    leaves: dict[Path, Any] = dict(to_flat_state(x))
    return rewrapped(params, leaves) if leaves.keys() == dict(to_flat_state(params)).keys() else x


class ModelAndOptimizer(Optimizer[M]):
    """An Optimizer that holds its model: `update(grads)`. The older form of Optimizer.

    Example:
      >>> import nnx_core as nnx, optax, jax.numpy as jnp
      >>> both = nnx.ModelAndOptimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
      >>> updates = both.update(nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(both.model))
      >>> both.model.bias[...]
      Array([-0.1], dtype=float32)
    """

    def __init__(self, model: M, tx: optax.GradientTransformation, *, wrt: filterlib.Filter = Param):
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(self, grads: Any, /, **kwargs: Any) -> Any:
        """One step for the model this object holds; see `Optimizer.update`."""
        return super().update(self.model, grads, **kwargs)
