"""Compiling a program once, though the function it comes from is traced at every call.

A function that a loop or a branch is given may close over anything, and what that is may be another thing at the next
call. So outside of any JAX transform it is traced anew each time; but where the trace is the program that an earlier
one was, that one's compiled form runs it, on the arrays that this trace found.

Law: `traced_anew(f, *args)` equals `f(*args)`. Two programs are one only if nothing tells them apart; what cannot be
compared is not one. What is remembered holds no array: those that f closes over are arguments of the program.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import closed_call_p, custom_jvp_call_p, custom_vjp_call_p
from jax.extend.linear_util import WrappedFun
from jax.sharding import Mesh

from nnx_core._trace import current_trace

#: Programs that are remembered; beyond them, the one used longest ago is forgotten.
MAX_PROGRAMS = 256


class _Incomparable(Exception):
    """Something in a program, such as a function, of which nobody can say whether another one does the same."""


_programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
#: No trace. Should this file be imported inside of one, no program is remembered; that is all.
_OUTSIDE = current_trace()


def _is_outside() -> bool:
    """Whether no JAX transform is running."""
    is_jitting = not jax.config.jax_disable_jit  # type: ignore[attr-defined]  # jax's stubs leave its options out
    return is_jitting and bool(current_trace() == _OUTSIDE)


def traced_anew(f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)`, which is traced; compiled only if that gives another program than those of late."""
    if not _is_outside():
        return f(*args)
    closed, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    leaves = _program(_without_rules(closed.jaxpr))(closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _program(jaxpr: Jaxpr) -> Callable[[list[Any], list[Any]], list[Any]]:
    """(constants, arguments) -> results, compiled once for all programs that are this one."""
    try:
        key = tuple(_described(jaxpr, {}))
        hash(key)
    except (_Incomparable, TypeError):
        return _compiled(jaxpr)
    if key not in _programs:
        while len(_programs) >= MAX_PROGRAMS:
            _programs.popitem(last=False)
        _programs[key] = _compiled(jaxpr)
    _programs.move_to_end(key)
    return _programs[key]


def _compiled(jaxpr: Jaxpr) -> Callable[[list[Any], list[Any]], list[Any]]:
    def program(consts: list[Any], leaves: list[Any]) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, consts, *leaves)

    return jax.jit(program)


def _without_rules(jaxpr: Jaxpr) -> Jaxpr:
    """The same program without rules of differentiation, which hold what functions close over.

    Nobody differentiates what runs outside of all transforms; what was differentiated inside is in the program.
    """
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p):
            eqn = eqn.replace(primitive=closed_call_p, params={"call_jaxpr": eqn.params["call_jaxpr"]})
        eqns.append(eqn.replace(params={key: _cleaned(value) for key, value in eqn.params.items()}))
    # `constvars` too: from jax 0.12 on a jaxpr holds its constants, unless it is told of the variables anew.
    return jaxpr.replace(constvars=jaxpr.constvars, eqns=eqns)


def _cleaned(parameter: Any) -> Any:
    if isinstance(parameter, ClosedJaxpr):
        return parameter.replace(jaxpr=_without_rules(parameter.jaxpr))
    if isinstance(parameter, Jaxpr):
        return _without_rules(parameter)
    return tuple(map(_cleaned, parameter)) if type(parameter) is tuple else parameter


def _described(jaxpr: Jaxpr, names: dict[Any, int]) -> Iterator[Hashable]:
    """Everything that a program says, its variables named by the order in which they appear."""

    def name(var: Any) -> Hashable:
        if isinstance(var, Literal):
            return _constant(var.val), var.aval
        if var not in names:
            names[var] = len(names)
        return names[var], var.aval

    for var in (*jaxpr.constvars, *jaxpr.invars):
        yield name(var)
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, id(eqn.primitive)  # primitives live as long as Python
        yield from map(name, eqn.invars)
        for key in sorted(eqn.params):
            yield key, _parameter(eqn.params[key])
        yield from map(name, eqn.outvars)
        yield _parameter(eqn.ctx)
    yield from map(name, jaxpr.outvars)


def _parameter(value: Any) -> Hashable:
    if isinstance(value, ClosedJaxpr):
        return "closed", tuple(map(_constant, value.consts)), tuple(_described(value.jaxpr, {}))
    if isinstance(value, Jaxpr):
        return "jaxpr", tuple(_described(value, {}))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_parameter, value))
    if isinstance(value, dict):
        return dict, tuple((key, _parameter(value[key])) for key in sorted(value))
    is_function = isinstance(value, WrappedFun) or callable(value)
    if is_function and not isinstance(value, type | Mesh):  # a Mesh can be called: it is a decorator too
        raise _Incomparable
    if isinstance(value, np.ndarray | jax.Array):
        return _constant(value)
    hash(value)
    return type(value), value


def _constant(value: Any) -> Hashable:
    """A constant inside of a program, by its bits; arrays on a device are not looked into."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, bool | int | float | complex):
        return type(value), repr(value)
    raise _Incomparable
