"""What a program says: its equations, in a form that can be compared and be a key.

Law: two programs are described alike only if nothing tells them apart; what cannot be compared is `Incomparable`.
Knows JAX's equations; knows nothing of who runs them. It needs much of jax.extend, so who wants it imports it late.
"""

from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import closed_call_p, custom_jvp_call_p, custom_vjp_call_p
from jax.extend.linear_util import WrappedFun
from jax.sharding import Mesh


class Incomparable(Exception):
    """Something in a program, such as a function, of which nobody can say whether another one does the same."""


def without_rules(jaxpr: Jaxpr) -> Jaxpr:
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
        return parameter.replace(jaxpr=without_rules(parameter.jaxpr))
    if isinstance(parameter, Jaxpr):
        return without_rules(parameter)
    return tuple(map(_cleaned, parameter)) if type(parameter) is tuple else parameter


def described(jaxpr: Jaxpr, names: dict[Any, int]) -> Iterator[Hashable]:
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
        return "closed", tuple(map(_constant, value.consts)), tuple(described(value.jaxpr, {}))
    if isinstance(value, Jaxpr):
        return "jaxpr", tuple(described(value, {}))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_parameter, value))
    if isinstance(value, dict):
        return dict, tuple((key, _parameter(value[key])) for key in sorted(value))
    is_function = isinstance(value, WrappedFun) or callable(value)
    if is_function and not isinstance(value, type | Mesh):  # a Mesh can be called: it is a decorator too
        raise Incomparable
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
    raise Incomparable
