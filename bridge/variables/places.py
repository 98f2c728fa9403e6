"""Where a Linen location is in an NNX module, and a Variable put there if the place is free.

Keys are strings in Linen; here they find what they were made from. A module that *waits* wraps a Linen module and gets
its variables in its first call: what is below it is its own business, and is handed over by `_nnx_take`.
Law: nothing that a module has is replaced. A parameter is no state that a call may add: an attribute that may hold
one (`bias`, None) is part of what the module computes.
Knows modules as graphs with keys; knows nothing of what they are, or of who asks.
"""

from __future__ import annotations

from typing import Any

import jax

import nnx_core as nnx
from bridge.variables.mapping import Location
from nnx_core.graph.walk import children


def child_at(module: Any, keys: tuple[str, ...]) -> Any:
    """What is in `module` under keys that Linen made strings; None if nothing is."""
    for key in keys:
        module = next((child for own, child in children(module) if str(own) == key), None)
    return module


def waits(x: Any) -> bool:
    """Whether `x` gets its variables in its first call, as ToNNX does."""
    return hasattr(type(x), "_nnx_take")


def waiting_at(module: Any, location: Location) -> tuple[Any, Location] | None:
    """The module that waits and that `location` is in, and the keys in there."""
    for end in range(1, len(location)):
        inner = child_at(module, location[1:end])
        if waits(inner):
            return inner, location[end:]
    return None


def hand_over(module: Any, location: Location, variable: nnx.Variable[Any]) -> bool:
    """Give a Variable to the module that waits and that `location` is in; whether there is one."""
    waiting = waiting_at(module, location)
    if waiting is None:
        return False
    inner, below = waiting
    inner._nnx_take((location[0], *below), variable)
    return True


def attach(module: Any, location: Location, variable: nnx.Variable[Any]) -> bool:
    """Give the module at a location a Variable that a call made; whether there is a free place for it."""
    collection, *parents, name = location
    owner = child_at(module, tuple(parents))
    if not isinstance(owner, nnx.Module) or waits(owner) or hasattr(type(owner), name):
        return False
    if collection == "params" or owner._nnx_items().get(name) is not None:
        return False
    owner._nnx_assign({name: variable}, ())
    return True


def same_leaves(a: Any, b: Any) -> bool:
    """Whether two values are one, or trees of the very same leaves: by identity, since == of arrays is an array."""
    if a is b:
        return True
    ours, our_tree = jax.tree.flatten(a)
    theirs, their_tree = jax.tree.flatten(b)
    return bool(our_tree == their_tree) and all(x is y for x, y in zip(ours, theirs, strict=True))
