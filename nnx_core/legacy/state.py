"""State: path tuple -> Variable, as a module's `split` hands it out.

Law: a State is a value: nothing writes to it, and it shares no Variable with the module it was taken from.
A JAX pytree whose leaves are the arrays. Filters and sorting are nnx_core's; knows no modules.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from nnx_core import filters as filterlib
from nnx_core._errors import Path
from nnx_core.graph.api import state as state_of
from nnx_core.graph.objects import Object
from nnx_core.legacy._errors import NotAStateError
from nnx_core.legacy._text import fields_text, state_value_text
from nnx_core.legacy.collections import to_filter
from nnx_core.state import FlatState, to_flat_state
from nnx_core.state import State as CoreState


class State(Mapping[Path, Any]):
    """Path tuple -> Variable, sorted by path.

    Args:
      items: a mapping of paths, or (path, Variable) pairs; or a nested `nnx_core.State`. A path that is no tuple
        stands for the tuple of it alone, here and in lookups, which take "0" for a position 0 too.
      **named: values by name; of a path, the keys with `/` between them. `State(**params, **counts)` merges States.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> import jax
      >>> model = nnx.Map(a=nnx.param(1.0), layers=nnx.Seq([nnx.var("batch_stats", 2.0)]))
      >>> state, moduledef = model.split()
      >>> list(state), state["layers", 0].value
      ([('a',), ('layers', 0)], 2.0)
      >>> jax.tree.map(lambda x: 10 * x, state).filter("params")
      State({
        ('a',): Variable(
            collection='params',
            value=10.0,
            sharding=None
        )
      })
    """

    __slots__ = ("_items",)
    _items: dict[Path, Any]

    def __init__(self, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), /, **named: Any):
        if isinstance(items, CoreState):
            items = to_flat_state(items)
        pairs = items.items() if isinstance(items, Mapping) else items
        by_path = [(_as_path(path), x) for path, x in pairs]
        by_path += [(_path_of(name), x) for name, x in named.items()]
        self._items = dict(FlatState(by_path))

    def __getitem__(self, path: Any) -> Any:
        path = _as_path(path)
        return self._items[path if path in self._items else tuple(map(_position, path))]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def keys(self) -> Any:
        """The paths, as tuples that may also be names of keyword arguments: `State(**params, **counts)`."""
        return dict.fromkeys(map(PathKey, self)).keys()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._flat() == other._flat()

    __hash__ = None  # type: ignore[assignment]  # == compares arrays

    def __or__(self, other: "State") -> "State":
        return State.merge(self, other)

    def __repr__(self) -> str:
        fields = [(f"{tuple(map(str, path))!r}: ", state_value_text(x)) for path, x in self.items()]
        return f"State({fields_text('', fields, brackets='{}')})"

    def _flat(self) -> FlatState:
        return FlatState(self._items.items(), sort=False)

    def filter(self, first: filterlib.Filter, /, *filters: filterlib.Filter) -> Any:
        """The part that matches each filter; a tuple for several.

        Args:
          first, *filters: a collection's name, or any filter of nnx_core (a type, a predicate, `...`); a list of
            these matches what any of them does. Every value goes to the first that matches.

        Raises:
          FilterError: for something that is no filter.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> state, _ = nnx.Map(a=nnx.param(1.0), b=nnx.var("cache", 2.0)).split()
          >>> params, rest = state.filter("params", ...)
          >>> list(params), list(rest)
          ([('a',)], [('b',)])
        """
        return _all(self._flat().filter(*map(to_filter, (first, *filters))))

    def partition(self, first: filterlib.Filter, /, *filters: filterlib.Filter) -> Any:
        """Like `filter`, but every value must match a filter.

        Raises:
          FilterError: naming a path that matches none.
        """
        return _all(self._flat().split(*map(to_filter, (first, *filters))))

    @staticmethod
    def merge(state: "State", /, *states: "State") -> "State":
        """One State with the values of all; later ones win.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> state, _ = nnx.Map(a=nnx.param(1.0), b=nnx.var("cache", 2.0)).split()
          >>> nnx.State.merge(*state.filter("params", ...)) == state
          True
        """
        return State(pair for part in (state, *states) for pair in part.items())


class PathKey(str):
    """A path that may be the name of an argument: a str for the interpreter, a tuple for everybody else.

    >>> key = PathKey(("layers", 0))
    >>> key == ("layers", 0), key[0], list(key), f"{key}", {key: 1}["layers", 0]
    (True, 'layers', ['layers', 0], 'layers/0', 1)
    """

    path: Path

    def __new__(cls, path: Path) -> "PathKey":
        new = super().__new__(cls, "/".join(map(str, path)))
        new.path = path
        return new

    def __eq__(self, other: object) -> bool:
        return self.path == (other.path if isinstance(other, PathKey) else other)

    def __hash__(self) -> int:
        return hash(self.path)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.path)

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: Any) -> Any:
        return self.path[index]

    def __lt__(self, other: Any) -> bool:
        return self.path < (other.path if isinstance(other, PathKey) else other)

    def __repr__(self) -> str:
        return repr(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return PathKey, (self.path,)


def _path_of(name: str) -> Path:
    return name.path if isinstance(name, PathKey) else tuple(map(_position, name.split("/")))


def _as_path(path: Any) -> Path:
    if isinstance(path, PathKey):
        return path.path
    return path if isinstance(path, tuple) else (path,)


def _position(key: Any) -> Any:
    """A position is shown as text, as the names beside it are, and so it is found by that text too."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _all(found: Any) -> Any:
    return tuple(map(State, found)) if isinstance(found, tuple) else State(found)


def snapshot(state: CoreState) -> State:
    """A State with Variables of its own, and containers in them: the module's may be written later."""
    return State(jax.tree.map(lambda x: x, state))


def as_core(state: Any, function: str) -> Mapping[Any, Any]:
    """What nnx_core's `merge` and `update` take, from a State, a module, or a nested mapping.

    Raises:
      NotAStateError: for anything else, in the name of `function`.
    """
    if isinstance(state, State):
        return state._flat().to_nested_state()
    if isinstance(state, Object):
        return state_of(state)
    if isinstance(state, Mapping):
        return state
    raise NotAStateError(function, state)


def _unflatten(paths: tuple[Path, ...], values: Iterable[Any]) -> State:
    state = State()
    state._items = dict(zip(paths, values, strict=True))
    return state


jax.tree_util.register_pytree_with_keys(
    State,
    lambda s: ([(jax.tree_util.DictKey(path), x) for path, x in s.items()], tuple(s)),
    _unflatten,
    lambda s: (list(s.values()), tuple(s)),
)
