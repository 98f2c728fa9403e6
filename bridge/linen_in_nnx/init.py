"""lazy_init: the variables of wrapped Linen modules, made for a call.

Law: what is there stays as it is, and what is missing is what `module.init` makes for the same inputs and keys; all
that a call needs is made, or nothing. A model around the wrapped modules runs abstractly, on a copy.
Knows wrappers as nodes that hold a Linen module, and how one is initialised; knows nothing of calls that compute.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import UnboundModuleError, show_path
from bridge._types import Location
from bridge.linen_in_nnx._errors import AlreadyInitializedError, NoOwnerError, UnknownValueError
from bridge.linen_in_nnx.abstract_run import AbstractRun, calls_in, from_shapes
from bridge.linen_in_nnx.as_graph import LinenNode, LinenScope, is_empty, nodes_in
from bridge.linen_in_nnx.config import unpacking
from bridge.linen_in_nnx.rngs import Keys, RngSource
from bridge.linen_in_nnx.submodules import Submodule, method_at
from bridge.variables.mapping import leaves, variables_from
from nnx_core._errors import MetadataError
from nnx_core.sharding import place_eagerly


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the variables of every wrapped Linen module that a call needs; what is there stays as it is.

    A model that has wrapped modules inside runs abstractly, on a copy: no forward pass is computed and no other
    state changes. Each wrapped module is then initialised for the shapes it was called with, or for the values
    where it needs them, from the random keys of that call or its own. Where nnx.vmap or nnx.scan gives the variables
    an axis, they are stacked, each from its own keys as in such a call (nnx.split_rngs).

    Args:
      fn: a ToNNX, a submodule of one, any other NNX module, or a method of one.
      *args, **kwargs: what to call it with, `jax.ShapeDtypeStruct`s for arrays if you like. A ToNNX also takes
        `rngs`, `method` and `mutable`, as in a call.

    Returns:
      `fn`.

    Raises:
      AlreadyInitializedError: if `fn` is a ToNNX that has all it needs.
      NoRngsError: if a module has no random keys.
      UnknownValueError: if variables depend on the values of inputs, and only their shapes are known.
      NoOwnerError: if `fn` belongs to no module.
      UnboundModuleError: if the call reaches a `bridge.Module` without variables: it has no random keys of its own,
        so `bind` gives it what its `init` made.

    >>> from flax import linen as nn
    >>> from bridge import ToNNX
    >>> import nnx_core as nnx, jax, jax.numpy as jnp
    >>> model = nnx.Sequential(ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)), nnx.relu)
    >>> lazy_init(model, jax.ShapeDtypeStruct((1, 2), jnp.float32)).layers[0].kernel.shape
    (2, 3)
    """
    target = fn
    if isinstance(fn, functools.partial) and isinstance(fn.func, LinenNode | LinenScope | Submodule):
        target, kwargs = fn.func, {**fn.keywords, **kwargs}  # `model.encode` of a wrapped module
    owner = getattr(target, "__self__", target)
    if isinstance(target, LinenScope | Submodule):
        wrapper, path = target._nnx_place()
        init_one(wrapper, args, {**kwargs, "method": method_at(path, kwargs.get("method"))})
    elif isinstance(owner, LinenNode) and (owner is target or target.__func__ is type(owner)._nnx_call):
        init_one(owner, args, kwargs)
    elif isinstance(owner, nnx.Object):
        method = type(owner).__call__ if owner is target else target.__func__
        _init_inside(owner, method, args, kwargs)
    else:
        raise NoOwnerError(fn)
    return fn


def init_one(wrapper: LinenNode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`lazy_init` of a wrapped module alone.

    Raises:
      AlreadyInitializedError: if it has all that the call needs.
    """
    kwargs = dict(kwargs)
    rngs, method = kwargs.pop("rngs", None), kwargs.pop("method", None)
    kwargs.pop("mutable", None)  # everything is, while it is made
    count = len(wrapper._nnx_inventory().variables)
    if count and method is None:
        raise AlreadyInitializedError(type(wrapper.module).__name__, count)
    made_count = make_variables(wrapper, args, kwargs, rngs, method)
    if count and not made_count:
        raise AlreadyInitializedError(type(wrapper.module).__name__, count)


def keys_for(wrapper: LinenNode, rngs: RngSource) -> Keys:
    """The keys of one call: from `rngs`, or the wrapper's own streams."""
    return Keys(wrapper.rngs if rngs is None else rngs, exact=wrapper._nnx_wrapped.exact)


def make_variables(
    wrapper: LinenNode,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rngs: RngSource,
    method: Any,
    note: Callable[[dict[Location, Any]], None] | None = None,
) -> int:
    """Make the variables that this call needs and that are not there; how many there were.

    `note` is told of them before anything is changed.
    """
    wrapped, there = wrapper._nnx_wrapped, wrapper._nnx_inventory().variables
    keys = keys_for(wrapper, rngs)
    run, kwargs = wrapped.method(method, args, kwargs)
    watched = keys.watching(unpacking(run))

    def init(*args: Any, **kwargs: Any) -> Any:
        return nn.Module.init(wrapped.module, keys.by_name, args, kwargs, method=watched)

    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, kwargs)))
    with keys.required(wrapped.module):
        if is_abstract:
            variables = from_shapes(type(wrapped.module).__name__, init, args, kwargs)
        else:
            variables = init(*args, **kwargs)
    missing = [(location, value) for location, value in leaves(variables) if location not in there]
    new = {location: value for location, value in missing if not is_empty(value)}
    if new:
        if note is not None:
            note(new)
        keys.settle()
        made = variables_from(new.items())
        for variable in made.values():
            _place(variable)
        wrapper._nnx_add(made)
    return len(new)


def _place(variable: nnx.Variable[Any]) -> None:
    """Send a new value where its axis names say, as a Variable that NNX makes; what Linen took is no error here."""
    with contextlib.suppress(MetadataError):
        variable.set_raw_value(place_eagerly(variable, variable.get_raw_value()))


# ---- wrapped modules in a model ----


def record(
    run: AbstractRun, wrapper: LinenNode, args: tuple[Any, ...], kwargs: dict[str, Any], rngs: RngSource, method: Any
) -> None:
    """Make the variables of a call that is part of an abstract run, and have the run note what it was."""
    place = run.place_of(wrapper)
    assert place is not None  # who calls has looked
    exact = wrapper._nnx_wrapped.exact
    keys = None if rngs is None else Keys(rngs, exact=exact).by_name
    if wrapper._nnx_variables and not (keys or Keys(wrapper.rngs, exact=exact).by_name):
        return  # loaded, and not to be made

    def note(new: dict[Location, Any]) -> None:
        run.note(place, new, (args, kwargs), method, keys)

    make_variables(wrapper, args, kwargs, rngs, method, note)


def _init_inside(owner: nnx.Object, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wrappers = nodes_in(owner)
    with _unbound_modules_named(owner):
        calls, stacks = calls_in(owner, method, args, kwargs)
    stacked = [(wrappers[stack.place], *stack.values()) for stack in stacks]
    with _all_or_nothing([wrappers[call.place] for call in calls]):
        for call in calls:
            wrapper, keys = wrappers[call.place], call.keys()
            try:
                make_variables(wrapper, *call.shapes(), keys, call.note.method)
            except UnknownValueError:  # shapes are not enough for this one
                make_variables(wrapper, *call.values(), keys, call.note.method)
    for wrapper, variables, counts in stacked:
        wrapper._nnx_add(variables)
        for name, count in counts.items():
            wrapper.rngs[name].count.set_value(count)


@contextlib.contextmanager
def _unbound_modules_named(owner: nnx.Object) -> Iterator[None]:
    """An UnboundModuleError of a `bridge.Module` in `owner` says where it is."""
    try:
        yield
    except UnboundModuleError as error:
        unbound = [path for path, x in nnx.iter_graph(owner) if type(x) is error.kind and x.scope is None]
        if not unbound:
            raise
        places = ", ".join(map(show_path, unbound))
        raise UnboundModuleError(error.kind, f"a call in lazy_init, at {places},") from error


@contextlib.contextmanager
def _all_or_nothing(wrappers: Sequence[LinenNode]) -> Iterator[None]:
    """Undo what was made of the variables of `wrappers`, if the last of them fails."""
    variables_before = [(wrapper, wrapper._nnx_inventory().variables) for wrapper in wrappers]
    counts = [wrapper.rngs[name].count for wrapper in wrappers for name in wrapper.rngs or ()]
    counts_before = [(count, count.get_raw_value()) for count in counts]
    try:
        yield
    except Exception:
        for wrapper, variables in variables_before:
            wrapper._nnx_set_variables(variables)
        for count, value in counts_before:
            count.set_raw_value(value)
        raise
