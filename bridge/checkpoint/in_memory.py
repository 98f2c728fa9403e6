"""Live trees between Linen and NNX: variables and States, TrainStates and models with their optimizers.

Law: strict; nothing is changed unless all of it fits. There and back is the identity, bit for bit, and what is only
renamed is not copied: the array in the result is the array in the source.
What goes where is a `Plan`, the same as for a checkpoint on disk; each function returns its report.
Knows objects, Variables and boxes; knows nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge._errors import CheckpointLayoutError, show_path
from bridge._types import Location, Path
from bridge.checkpoint.options import ConversionOptions, LeafRules
from bridge.checkpoint.plan.plan import ConversionReport, Plan, plan_of
from bridge.checkpoint.plan.target import is_own
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.canonical import VALUE, Known
from bridge.checkpoint.tree.from_objects import (
    Live,
    map_state,
    of_leaves,
    of_object,
    of_training,
    raw_value,
    state_of,
    write,
)
from bridge.checkpoint.tree.layout import Kind
from bridge.checkpoint.tree.ops import Add, Cast, Op, Read
from bridge.variables.kinds import variable_type
from bridge.variables.load import place
from bridge.variables.mapping import EMPTY, leaves, tree_of
from bridge.variables.metadata import to_linen_value, to_nnx_variable

__all__ = [
    "nnx_to_train_state",
    "state_to_variables",
    "train_state_to_nnx",
    "train_state_to_states",
    "variables_to_state",
]


def variables_to_state(
    variables: Mapping[str, Any], *, rules: LeafRules | None = None, target: Any = None, unproven: bool = False
) -> tuple[nnx.State, ConversionReport]:
    """Linen variables as an `nnx.State`, for `nnx.update(model, state)` or `nnx.merge`.

    Args:
      variables: {collection: tree} of any Mapping, boxed or not; not changed. Boxes become metadata.
      rules: Linen's locations -> those of NNX; see `make_plan`.
      target: a model or its State, abstract or not: the State is for that. It gives types, keys and metadata; random
        streams, which Linen has not, are its own.
      unproven: take derived rules that are not proven; the report says so.

    Returns:
      (state, report). Without `target` a key of digits is the index of a list. Empty collections and empty mappings
      are left out: NNX has no place for them.

    Raises:
      VariablesMismatchError: missing, unexpected, wrong shape, wrong dtype, all at once.
      CollectionClashError: two collections have a variable under one path.
      UnprovenRulesError: the rules were derived and are not proven, without `unproven`; so do all functions here.
      RulesError: the rules do not fit.

    >>> state, report = variables_to_state({"params": {"Dense_0": {"bias": jnp.ones(2)}}})
    >>> state["Dense_0"]["bias"], report.rows[0]["sources"]
    (Param(float32[2] [1., 1.]), [['params', 'Dense_0', 'bias']])
    """
    boxed: dict[Location, nnx.Variable[Any]] = {}  # a box becomes a Variable with metadata
    for (collection, *keys), x in leaves(variables):
        if not layout.is_empty(x) and x is not EMPTY:
            boxed[(collection, *map(str, keys))] = to_nnx_variable(collection, x)
    raw = {location: variable.get_raw_value() for location, variable in boxed.items()}
    known = Known(names=frozenset(map(str, variables)), boxed=frozenset())
    source = of_leaves(raw, Kind.LINEN_VARIABLES, known)
    wanted = None if target is None else of_training(target)
    plan = _planned(source, ConversionOptions(to="nnx", rules=rules, target=wanted, unproven=unproven))
    made: dict[Path, nnx.Variable[Any]] = {}
    for path, op in plan.made.items():
        origin = boxed.get(_origin(op) or ())
        if wanted is not None:
            made[path] = _filled(wanted.variables[path[:-1]], _value(op, source), origin)
        else:
            kind = variable_type(plan.memo.collections.get(path[:-1], "params"))
            metadata = {} if origin is None else origin.get_metadata()
            made[path] = kind.from_metadata(_value(op, source), metadata)
    report = _reported(plan, {location for location, variable in boxed.items() if variable.get_metadata()})
    if wanted is not None:
        return _state_like(target, lambda at, own: made.get((*at, VALUE), own)), report
    return nnx.to_nested_state({tuple(map(_key, path[:-1])): v for path, v in made.items()}), report


def state_to_variables(
    state: Any, *, rules: LeafRules | None = None, unproven: bool = False
) -> tuple[dict[str, Any], ConversionReport]:
    """An `nnx.State`, or a model, as Linen variables. The inverse of `variables_to_state`.

    Args:
      state: of nnx_core or flax.nnx. Metadata of its Variables becomes boxes. Random streams are left out.
      rules: NNX's locations -> those of Linen; see `make_plan`.
      unproven: take derived rules that are not proven; the report says so.

    Returns:
      ({collection: tree}, report).

    Raises:
      RulesError: the rules do not fit.

    >>> variables, report = state_to_variables(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> {name: x.shape for name, x in variables["params"].items()}
    {'bias': (3,), 'kernel': (2, 3)}
    """
    source = of_training(state)
    plan = _planned(source, ConversionOptions(to="linen", rules=rules, unproven=unproven))
    named = {(*path, VALUE) for path, variable in source.variables.items() if variable.get_metadata()}
    tree = tree_of((path, _boxed_value(op, source)) for path, op in plan.made.items())
    return tree, _reported(plan, named)


def train_state_to_states(
    train_state: Any, model: Any, optimizer: Any = None, *, rules: LeafRules | None = None, unproven: bool = False
) -> tuple[nnx.State, nnx.State | None, ConversionReport]:
    """What `train_state_to_nnx` writes, as States: the model's, and the optimizer's if there is one.

    Args, Raises: as for `train_state_to_nnx`. Nothing is changed.

    >>> import optax
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> linen = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    >>> state, opt_state, _ = train_state_to_states(linen, model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param))
    >>> int(opt_state["step"][...]), state["kernel"][...] is params["kernel"]
    (0, True)
    """
    source, wanted = of_object(train_state), of_training(model, optimizer)
    tops = {path[0] for path in (*source.tree.leaves, *source.tree.empty)}
    if optimizer is not None and "opt_state" not in tops:
        raise CheckpointLayoutError(
            "no optimizer state",
            type(train_state).__name__,
            expected="opt_state, because an optimizer was given",
            found="none",
            hint="Leave the optimizer out to load the weights alone.",
        )
    plan = _planned(source, ConversionOptions(to="nnx", rules=rules, target=wanted, unproven=unproven))
    values: dict[Path, Any] = {}
    boxes: dict[Path, Any] = {}
    for path, op in plan.made.items():
        if not is_own(op, wanted.values.get(path)):
            values[path] = _value(op, source)
        box = source.boxes.get((_origin(op) or ())[:-1])
        if box is not None:
            boxes[path] = box
    report = _reported(plan, {(*path, VALUE) for path in source.boxes})

    def new(root: Path) -> Callable[[Path, Any], Any]:
        return lambda at, own: _replaced(own, (*root, *at, VALUE), values, boxes)

    if optimizer is None:
        return _state_like(model, new(())), None, report
    return _state_like(model, new(("model",))), _state_like(optimizer, new(("optimizer",))), report


def train_state_to_nnx(
    train_state: Any, model: Any, optimizer: Any = None, *, rules: LeafRules | None = None, unproven: bool = False
) -> ConversionReport:
    """Write a Linen TrainState into a model and its optimizer, in place; Variables keep identity, ties and metadata.

    Args:
      train_state: a TrainState of flax, of a subclass (batch_stats, ...), or its tree `{"params": ..., "step": ...}`.
      model: an NNX module; a ToNNX after `lazy_init`.
      optimizer: an Optimizer made for `model` with the same optax transformation. Without it the optimizer's state and
        the step are dropped, and the report says so.
      rules: Linen's locations -> those of the model; slots of the optimizer follow.
      unproven: take derived rules that are not proven; the report says so.

    Returns:
      The report. Fields that have no place in NNX (`ema_params`, ...) are in its `dropped`.

    Raises:
      VariablesMismatchError: all that does not fit, in model or optimizer; nothing is changed then.
      CheckpointLayoutError: `train_state` has no optimizer state for the `optimizer`.
      SlotError, OptStateOrderError: the optimizer state cannot follow its params.

    >>> import optax
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> linen = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(step=7)
    >>> report = train_state_to_nnx(linen, model, optimizer)
    >>> int(optimizer.step[...]), float(model.kernel.sum())
    (7, 6.0)
    """
    model_state, optimizer_state, report = train_state_to_states(
        train_state, model, optimizer, rules=rules, unproven=unproven
    )
    writes = list(zip(_flat(model), _flat(model_state), strict=True))
    if optimizer_state is not None:
        writes += zip(_flat(optimizer), _flat(optimizer_state), strict=True)
    for variable, _ in writes:
        write(variable, raw_value(variable))  # raises here, before anything is written, if it may not be
    for variable, new in writes:
        write(variable, new.get_raw_value())
        added = {key: x for key, x in new.get_metadata().items() if not variable.has_metadata(key)}
        if added:
            variable.set_metadata(**added)
    return report


def nnx_to_train_state(
    model: Any,
    optimizer: Any,
    *,
    tx: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    like: Any = None,
    cls: type[TrainState] = TrainState,
    rules: LeafRules | None = None,
    unproven: bool = False,
    **fields: Any,
) -> tuple[Any, ConversionReport]:
    """A Linen TrainState from a model and its optimizer. Nothing is changed.

    Args:
      model, optimizer: of nnx_core or flax.nnx.
      tx: the optax transformation. Needed unless there is `like`.
      apply_fn: the TrainState's.
      like: a TrainState, concrete or abstract (`jax.eval_shape`), of the structure that is wanted: class, FrozenDicts,
        boxes. Fields that follow no param and that NNX has not (a dropout key) stay as they are in it.
      cls: without `like`: the class; a field for each collection beside params.
      rules: the model's locations -> Linen's.
      unproven: take derived rules that are not proven; the report says so.
      fields: more to be carried by the same rule, by the field's name: `ema_params=ema.params`.

    Returns:
      (train_state, report). `step` is an int32 array, or a Python int if it is one in `like`.

    Raises:
      VariablesMismatchError: the optimizer's state is not that of `tx`, or something does not fit `like`.
      CheckpointLayoutError: `cls` has no field for a collection, or there is neither `tx` nor `like`.

    >>> import optax
    >>> model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(0.1)
    >>> linen, _ = nnx_to_train_state(model, nnx.Optimizer(model, tx, wrt=nnx.Param), tx=tx)
    >>> linen.params["kernel"] is model.kernel[...], type(linen.opt_state[0]).__name__
    (True, 'ScaleByAdamState')
    """
    if like is None:
        like = _like(model, tx, apply_fn, cls, rules, fields)
    source = of_object({"model": state_of(model), "optimizer": state_of(optimizer), **fields})
    wanted = of_object(like)
    plan = _planned(source, ConversionOptions(to="linen", rules=rules, target=wanted, unproven=unproven))
    values = {path: _value(op, source) for path, op in plan.made.items()}

    def new(path: Path, own: Any) -> Any:
        value = values[path]
        if isinstance(own, bool | int | float | complex) and hasattr(value, "item"):
            return value.item()
        return _placed(value, own)

    train_state = layout.map_leaves(new, like)
    if isinstance(train_state, TrainState):
        tx = train_state.tx if tx is None else tx
        apply_fn = train_state.apply_fn if apply_fn is None else apply_fn
        train_state = train_state.replace(tx=tx, apply_fn=apply_fn)
    return train_state, plan.report()


# ---- one object, one tree ---------------------------------------------------------------------------------------


def _planned(source: Live, options: ConversionOptions) -> Plan:
    """What becomes of an object, of which its types tell everything."""
    return plan_of(source.tree, dataclasses.replace(options, known=source.known), source.layout)


def _flat(thing: Any) -> list[Any]:
    return list(of_object(state_of(thing)).variables.values())


def _state_like(thing: Any, new: Callable[[Path, Any], Any]) -> Any:
    """The State of a model or an optimizer with `new(path, variable)` for each Variable."""
    return map_state(lambda at, own: new(tuple(map(str, at)), own), thing)


def _like(
    model: Any, tx: Any, apply_fn: Any, cls: type[TrainState], rules: LeafRules | None, fields: Mapping[str, Any]
) -> TrainState:
    """An abstract TrainState for a model: what `cls.create` would give."""
    if tx is None:
        raise CheckpointLayoutError(
            "neither tx nor like",
            "nnx_to_train_state",
            expected="the optax transformation, or a TrainState of the wanted structure",
            found="None",
        )
    variables, _ = state_to_variables(model, rules=rules, unproven=True)  # its form alone; the plan asks for a proof
    abstract = jax.eval_shape(lambda: variables)
    params = abstract.pop("params", {})
    own = dict(abstract)
    for name, field in fields.items():
        own[name] = jax.eval_shape(lambda field=field: _as_params(field, rules))
    known = {field.name for field in dataclasses.fields(cls)}
    lacking = [name for name in own if name not in known]
    if lacking:
        raise CheckpointLayoutError(
            "a TrainState without a field for a collection",
            cls.__name__,
            expected=f"a field {lacking[0]!r}, as in: class State(TrainState): {lacking[0]}: Any",
            found=", ".join(sorted(known)),
            hint="Give that class: cls=State; or a TrainState of it: like=state.",
        )
    state = jax.eval_shape(tx.init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return cls(step=step, apply_fn=apply_fn, params=params, tx=tx, opt_state=state, **own)


def _as_params(field: Any, rules: LeafRules | None) -> Any:
    """Averages under the names that Linen gives the params; what has no Variables (a dropout key) as it is."""
    if not of_object(field).variables:
        return field
    return state_to_variables(field, rules=rules, unproven=True)[0].get("params", {})


# ---- values -----------------------------------------------------------------------------------------------------


def _value(op: Op, source: Live) -> Any:
    def read(path: Path, region: Any) -> Any:
        return source.values[path] if region is None else source.values[path][region]

    return op.value(read)


def _boxed_value(op: Op, source: Live) -> Any:
    """The value as Linen holds it: axis names stay with what is only renamed or cast."""
    value, origin = _value(op, source), _origin(op)
    variable = None if origin is None else source.variables[origin[:-1]]
    if isinstance(variable, nnx.Variable) and variable.get_metadata():
        return to_linen_value(type(variable).from_metadata(value, variable.get_metadata()))
    return value


def _origin(op: Op) -> Path | None:
    """The one leaf that it is, axis by axis: renamed, cast, or with a constant more."""
    while isinstance(op, Cast | Add):
        op = op.of
    return op.path if isinstance(op, Read) else None


def _reported(plan: Plan, named: Collection[Path]) -> ConversionReport:
    """The report, with a warning for axis names that do not say what the axes of the result are."""
    reworked: dict[Path, None] = {}
    for op in plan.made.values():
        if _origin(op) is None:
            reworked |= dict.fromkeys(op.sources())
    lost = [show_path(path) for path in reworked if path in named]
    report = plan.report()
    if lost:
        report.warnings.append(f"axis names and other metadata do not stay where axes change: {', '.join(lost)}")
    return report


def _filled(own: Any, value: Any, origin: Any) -> Any:
    """A Variable as `own` with another value; metadata of `origin` goes where `own` has none."""
    metadata = dict(own.get_metadata())
    if origin is not None:
        metadata = {**origin.get_metadata(), **metadata}
    return type(own).from_metadata(_placed(value, own.get_raw_value()), metadata)


def _replaced(own: Any, at: Path, values: Mapping[Path, Any], boxes: Mapping[Path, Any]) -> Any:
    if at in values:
        origin = to_nnx_variable("params", boxes[at]) if at in boxes else None
        return _filled(own, values[at], origin)
    tree = raw_value(own)
    if not any((*at, *path) in values for path in layout.flatten(tree)):
        return own
    return _filled(own, layout.map_leaves(lambda path, leaf: values.get((*at, *path), leaf), tree), None)


def _placed(value: Any, own: Any) -> Any:
    """`value` as a JAX array, on the devices that `own` is sharded to; itself if it is there, or is no array."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex)
    return place(value, own) if is_array else value


def _key(key: str) -> int | str:
    """The index of a list from its digits; '07' is a name."""
    return int(key) if key.isdecimal() and str(int(key)) == key else key
