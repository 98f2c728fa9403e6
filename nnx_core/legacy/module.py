"""Module, and Map and Seq: modules that hold others by key and by position.

Law: a raw value that is assigned where a Variable is goes into the Variable, so that a collection never loses
one; `split` and `merge` are nnx_core's, with the State keyed by path tuples.
"""

import reprlib
from typing import Any, TypeVar

from nnx_core import filters as filterlib
from nnx_core.graph import api
from nnx_core.graph.classify import ARRAY, NUMBER, kind_of
from nnx_core.legacy._text import fields_text, value_text
from nnx_core.legacy.collections import to_filter
from nnx_core.legacy.moduledef import ModuleDef
from nnx_core.legacy.state import State, as_core, snapshot
from nnx_core.module import Dict, List
from nnx_core.module import Module as CoreModule
from nnx_core.variables import Variable

A = TypeVar("A")


def _written(old: Any, new: Any) -> bool:
    """Whether `new` is a raw value for the Variable `old`; it has it then."""
    if not isinstance(old, Variable) or kind_of(new) not in (ARRAY, NUMBER):
        return False
    old.set_value(new)
    return True


class Module(CoreModule):
    """Base of all layers and models; see the example of this package.

    `self.mean = array`, where `self.mean` is a Variable, writes the array into the Variable.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> class Mean(nnx.Module):
      ...     def __init__(self):
      ...         self.mean = nnx.var("batch_stats", 0.0)
      ...
      ...     def __call__(self, x):
      ...         self.mean = 0.5 * self.mean + 0.5 * x
      ...         return x - self.mean
      >>> model = Mean()
      >>> model(4.0), model.filter("batch_stats")["mean"].value
      (2.0, 2.0)
      >>> model
      Mean(
        mean=MutableVariable(
            collection='batch_stats',
            value=2.0
        )
      )
    """

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return fields_text(type(self).__name__, [(f"{key}=", value_text(x)) for key, x in self._nnx_items().items()])

    def __setattr__(self, name: str, value: Any) -> None:
        if not _written(self.__dict__.get(name), value):
            super().__setattr__(name, value)

    def split(self, *filters: filterlib.Filter) -> Any:
        """The State of this module and its ModuleDef; with filters one State each: (state, ..., moduledef).

        Args:
          *filters: a collection's name, or any filter of nnx_core; `...` is all that is left.

        Returns:
          (State, ModuleDef). The State has Variables of its own: later writes to the module do not show in it.

        Raises:
          FilterError: naming a path that matches no filter.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> model = nnx.Map(w=nnx.param(1.0), mean=nnx.var("batch_stats", 2.0))
          >>> params, rest, moduledef = model.split("params", ...)
          >>> list(params), list(rest)
          ([('w',)], [('mean',)])
        """
        states, moduledef = self.partition(*filters)
        return (*states, moduledef) if len(filters) > 1 else (states, moduledef)

    def partition(self, *filters: filterlib.Filter) -> Any:
        """Like `split`, with the States of several filters in a tuple: ((state, ...), moduledef).

        Example:
          >>> from nnx_core import legacy as nnx
          >>> model = nnx.Map(w=nnx.param(1.0), mean=nnx.var("batch_stats", 2.0))
          >>> (params, batch_stats), moduledef = model.partition("params", "batch_stats")
          >>> moduledef.merge(params, batch_stats)["mean"].value
          2.0
        """
        graphdef, state = api.split(self)
        found = snapshot(state)
        return found.partition(*filters) if filters else found, ModuleDef(graphdef)

    def filter(self, first: filterlib.Filter, /, *filters: filterlib.Filter) -> Any:
        """The part of this module's State that matches each filter; a tuple for several."""
        return snapshot(api.state(self)).filter(first, *filters)

    def pop(self, *filters: filterlib.Filter) -> Any:
        """Remove the Variables that match from this module and return them, as one State a filter.

        Raises:
          FilterError: without a filter.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> model = nnx.Map(w=nnx.param(1.0), h=nnx.var("intermediates", 2.0))
          >>> model.pop("intermediates")["h"].value, list(model)
          (2.0, ['w'])
        """
        found = api.pop(self, *map(to_filter, filters))
        return tuple(map(State, found)) if isinstance(found, tuple) else State(found)

    def update_state(self, state: Any, /, *states: Any) -> None:
        """Write the values of the States into this module, in place; they may hold a part of its paths.

        Args:
          state, *states: States, or modules whose state is taken.

        Raises:
          StateMismatchError: listing all paths that this module has not; nothing is written then.
          NotAStateError: if one is no State.
        """
        api.update(self, *(as_core(s, "update_state") for s in (state, *states)))


class Map(Dict[A], Module):
    """A module that holds values by key; `m.key` reads and writes `m["key"]` where no method has that name.

    `pop` takes collections, as for every module; `del m[key]` removes one key.

    Args:
      mapping: a mapping or (key, value) pairs.
      **items: more items.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> m = nnx.Map({"a": nnx.param(1.0)}, b=nnx.param(2.0))
      >>> m["a"] = 5.0
      >>> m.a + m.b, list(m.filter("params"))
      (7.0, [('a',), ('b',)])
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not _written(self.get(key), value):
            super().__setitem__(key, value)


class Seq(List[A], Module):
    """A module that holds values by position: a list whose paths are integers.

    `pop` takes collections, as for every module; `del s[i]` removes one item.

    Args:
      items: any iterable.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> layers = nnx.Seq([nnx.Linear(2, 3, ctx=nnx.Context(0))])
      >>> layers.append(nnx.Linear(3, 4, ctx=nnx.Context(1)))
      >>> list(layers.filter("params"))
      [(0, 'bias'), (0, 'kernel'), (1, 'bias'), (1, 'kernel')]
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice) or not _written(self[index], value):
            super().__setitem__(index, value)

    def clear(self) -> None:
        """Remove all items."""
        del self[:]  # MutableSequence's own would call `pop`, which here takes collections
