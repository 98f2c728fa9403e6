"""The Variables of an object graph, where Linen keeps them: read, and added to.

Law: a Variable that is shared is read once, where it is reached first; one that is added takes no place that
something has, and changes nothing of what the object computes.
Knows object graphs and locations; knows no modules of Linen, but that their wrappers take Variables by location.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nnx_core as nnx
from bridge._types import Location, Path
from bridge.variables.mapping import location_of
from nnx_core.graph.walk import children


def state_of(node: Any) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of everything in an object of NNX but random state.

    >>> import nnx_core as nnx
    >>> [at for at, _ in state_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))]
    [('params', 'bias'), ('params', 'kernel')]
    """
    for path, x in nnx.iter_graph(node):
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState):
            yield location_of(path, x), x


def child_at(node: Any, names: Path) -> Any:
    """What is in `node` under keys that Linen made strings; None if nothing is."""
    for name in names:
        node = next((child for key, child in children(node) if str(key) == name), None)
    return node


def takes_variables(x: Any) -> bool:
    """Whether `x` gets its Variables from whoever has them, as a wrapped Linen module does: in its first call."""
    return hasattr(type(x), "_nnx_take")


def taker_of(node: Any, location: Location) -> tuple[Any, Location] | None:
    """The wrapped module in `node` that `location` is in, and the location in there; None if it is in none."""
    collection, *names = location
    for depth in range(len(names)):
        owner = child_at(node, tuple(names[:depth]))
        if takes_variables(owner):
            return owner, (collection, *names[depth:])
    return None


def hand_over(node: Any, location: Location, variable: nnx.Variable[Any]) -> bool:
    """Give a Variable that a call made to the wrapped module that its location is in; whether there is one."""
    taker = taker_of(node, location)
    if taker is None:
        return False
    owner, location_inside = taker
    owner._nnx_take(location_inside, variable)
    return True


def attach(node: Any, location: Location, variable: nnx.Variable[Any]) -> bool:
    """Give `node` a Variable that an earlier call made; whether a module in it has a free attribute there.

    Parameters are not state: an attribute that may hold one (`bias`, None) is part of what the module computes.
    """
    collection, *above, name = location
    owner = child_at(node, tuple(above))
    if collection == "params" or not isinstance(owner, nnx.Module) or takes_variables(owner):
        return False
    if isinstance(owner, nnx.List):
        return False  # its keys are no names
    if hasattr(type(owner), name) or owner._nnx_items().get(name) is not None:
        return False
    owner._nnx_assign({name: variable}, ())
    return True
