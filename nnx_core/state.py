"""State: a nested mapping path -> Variable (or array); pure data, taken out of a graph.

Law: `State.merge(*state.split(*filters, ...))` is `state`; a State never changes what it was made from, except
the Variables themselves, which it holds and does not copy. Knows filters and Variables; knows no objects.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax

from nnx_core import filters as filterlib
from nnx_core._changes import touch
from nnx_core._errors import FilterError, Path, StateMismatchError, show_path
from nnx_core._foreign import require_own
from nnx_core._repr import show_fields, show_value
from nnx_core.variables import Variable, is_ref


def sort_key(key: Hashable) -> tuple[bool, str, Any]:
    """Orders keys of one level: integers by value, before everything else by type and value."""
    if type(key) is int:
        return False, "", key
    return True, type(key).__name__, key if isinstance(key, str) else repr(key)


def sorted_keys(keys: Iterable[Hashable]) -> list[Any]:
    """`keys` in the one order all walks use."""
    keys = list(keys)
    try:
        return sorted(keys)  # type: ignore[type-var]  # the usual case: all str or all int
    except TypeError:
        return sorted(keys, key=sort_key)


class State(MutableMapping[Hashable, Any]):
    """A nested mapping from keys to Variables or arrays.

    Nested levels come out as States over the same storage, so writing through them writes here. A State is a
    JAX pytree: `jax.tree.map` reaches the arrays in its Variables.

    Args:
      mapping: a nested mapping, or (path, value) pairs.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> state = nnx.State({"layer": {"kernel": nnx.Param(jnp.ones((2, 3)))}})
      >>> state["layer"]["kernel"].shape, nnx.to_flat_state(state).paths
      ((2, 3), (('layer', 'kernel'),))
    """

    __slots__ = ("__weakref__", "_level_of", "_mapping", "_nnx_version")
    _mapping: dict[Hashable, Any]
    _level_of: "State | None"  # the State that this is a level of, if it is one
    _nnx_version: int

    def __init__(self, mapping: Mapping[Any, Any] | Iterable[tuple[Path, Any]] = (), /, *, _copy: bool = True):
        if not isinstance(mapping, Mapping):
            mapping = nest(mapping)
        elif _copy:
            mapping = _plain(mapping)
        object.__setattr__(self, "_mapping", mapping)
        object.__setattr__(self, "_level_of", None)
        object.__setattr__(self, "_nnx_version", 0)

    @classmethod
    def over(cls, mapping: dict[Any, Any]) -> "State":
        """A State over nested dicts themselves: no copy, so both see each other's writes."""
        return cls(mapping, _copy=False)

    @property
    def _root(self) -> "State":
        """Whose changes a write here is. A State does not hold itself: its arrays would outlive it, see `gc`."""
        return self if self._level_of is None else self._level_of

    @property
    def raw_mapping(self) -> Mapping[Hashable, Any]:
        """The nested dicts themselves."""
        return self._mapping

    def __getitem__(self, key: Hashable) -> Any:
        value = self._mapping[key]
        if type(value) is not dict:
            return value
        level = type(self).over(value)
        object.__setattr__(level, "_level_of", self._root)
        return level

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self._mapping[key] = _plain(value) if isinstance(value, Mapping) else value
        touch(self._root)

    def __delitem__(self, key: Hashable) -> None:
        del self._mapping[key]
        touch(self._root)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __getattr__(self, name: str) -> Any:
        if name in State.__slots__ or name not in self._mapping:
            raise AttributeError(f"{type(self).__name__} has no attribute or key {name!r}.")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Mapping):
            return False
        ours, theirs = dict(_entries(self)), dict(_entries(other))
        return ours.keys() == theirs.keys() and all(_same(x, theirs[path]) for path, x in ours.items())

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __or__(self, other: "State") -> "State":
        return merge_state(self, other) if other else self

    def __sub__(self, other: "State") -> "State":
        gone = set(to_flat_state(other).paths)
        return type(self)((p, v) for p, v in iter_leaves(self._mapping) if p not in gone)

    def __repr__(self) -> str:
        fields = [(f"{k!r}: ", self[k]) for k in sorted_keys(self._mapping)]
        return f"{type(self).__name__}({show_fields('', fields, '{}')})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(_entries(self)),)  # flat: a nested mapping may be deeper than pickle can go

    def __copy__(self) -> "State":
        return type(self)(self._mapping)

    # ---- the operations, also functions of this module ----

    def flat_state(self) -> "FlatState":
        """(path, value) pairs, sorted by path."""
        return to_flat_state(self)

    @classmethod
    def from_flat_path(cls, flat: Mapping[Path, Any] | Iterable[tuple[Path, Any]]) -> "State":
        """The inverse of `flat_state`."""
        return from_flat_state(flat, cls=cls)

    def to_pure_dict(self, extract_fn: Callable[[Any], Any] | None = None) -> dict[Any, Any]:
        """Nested dict of values; see `nnx.to_pure_dict`."""
        return to_pure_dict(self, extract_fn)

    def replace_by_pure_dict(self, pure_dict: Mapping[Any, Any], replace_fn: Any = None) -> None:
        """Replace values; see `nnx.replace_by_pure_dict`."""
        replace_by_pure_dict(self, pure_dict, replace_fn)

    def map(self, f: Callable[[Path, Any], Any]) -> "State":
        """A State with f(path, value) for each value."""
        return map_state(f, self)

    def filter(self, first: Any, /, *filters: Any) -> Any:
        """The part that matches each filter; a tuple for several."""
        return filter_state(self, first, *filters)

    def split(self, first: Any, /, *filters: Any) -> Any:  # type: ignore[override]
        """Like `filter`, but every value must match a filter."""
        return split_state(self, first, *filters)

    @classmethod
    def merge(cls, state: Mapping[Any, Any], /, *states: Mapping[Any, Any]) -> "State":
        """One State with the values of all; later ones win."""
        return merge_state(state, *states, cls=cls)


class EmptyState(State):
    """A State that has nothing in it."""

    __slots__ = ()


class FlatState(Sequence[tuple[Path, Any]]):
    """(path, value) pairs sorted by path, with the operations of State.

    Example:
      >>> import nnx_core as nnx
      >>> flat = nnx.to_flat_state(nnx.State({"b": 1, "a": {"c": 2}}))
      >>> list(flat)
      [(('a', 'c'), 2), (('b',), 1)]
    """

    __slots__ = ("leaves", "paths")
    paths: tuple[Path, ...]
    leaves: list[Any]

    def __init__(self, items: Iterable[tuple[Path, Any]], *, sort: bool = True):
        pairs = list(items)
        if sort:
            pairs.sort(key=lambda pair: tuple(map(sort_key, pair[0])))
        self.paths = tuple(tuple(path) for path, _ in pairs)
        self.leaves = [leaf for _, leaf in pairs]

    @staticmethod
    def from_sorted_keys_values(keys: Iterable[Path], values: Iterable[Any], /) -> "FlatState":
        """Pairs whose keys are sorted already."""
        return FlatState(zip(keys, values, strict=True), sort=False)

    def get_keys(self) -> tuple[Path, ...]:
        """The paths."""
        return self.paths

    def get_values(self) -> list[Any]:
        """The values."""
        return self.leaves

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FlatState(list(self)[index], sort=False)
        return self.paths[index], self.leaves[index]

    def __len__(self) -> int:
        return len(self.leaves)

    def __iter__(self) -> Iterator[tuple[Path, Any]]:
        return iter(zip(self.paths, self.leaves, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatState) and to_nested_state(self) == to_nested_state(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return show_fields("FlatState", [(f"{p!r}: ", v) for p, v in self], "{}")

    def to_nested_state(self) -> State:
        """The inverse of `nnx.to_flat_state`."""
        return to_nested_state(self)

    def filter(self, *filters: Any) -> Any:
        """The part that matches each filter; a tuple for several."""
        return _one_or_all([FlatState(part, sort=False) for part in _partition(self, filters)[:-1]])

    def split(self, *filters: Any) -> Any:
        """Like `filter`, but every value must match a filter."""
        return _one_or_all([FlatState(part, sort=False) for part in _exhaustive(self, filters)])

    @staticmethod
    def merge(flat_state: "FlatState", *flat_states: "FlatState") -> "FlatState":
        """One FlatState with the pairs of all; later ones win."""
        merged: dict[Path, Any] = {}
        for flat in (flat_state, *flat_states):
            merged.update(flat)
        return FlatState(merged.items())


# ---- nested dicts and paths ----


def _plain(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return _copied(mapping, lambda key: key)


def _copied(mapping: Mapping[Any, Any], rename: Callable[[Any], Any]) -> dict[Any, Any]:
    """Nested dicts like `mapping`; with a list in the place of recursion, since models may be deep."""
    root: dict[Any, Any] = {}
    stack: list[tuple[Mapping[Any, Any], dict[Any, Any]]] = [(mapping, root)]
    while stack:
        level, new = stack.pop()
        for key, value in level.items():
            if isinstance(value, Mapping):
                new[rename(key)] = below = {}
                stack.append((value, below))
            else:
                new[rename(key)] = value
    return root


def nest(pairs: Iterable[tuple[Path, Any]]) -> dict[Any, Any]:
    """Nested dicts from (path, value) pairs.

    Raises:
      StateMismatchError: if a path runs through a value.
    """
    root: dict[Any, Any] = {}
    for path, value in pairs:
        level = root
        for key in path[:-1]:
            level = level.setdefault(key, {})
            if type(level) is not dict:
                raise StateMismatchError(mismatched=[(path, "a nested mapping on the way", type(level).__name__)])
        level[path[-1]] = value
    return root


def iter_leaves(mapping: Mapping[Any, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of nested mappings, sorted; an empty mapping yields nothing."""
    for path, value in _entries(mapping, prefix):
        if not isinstance(value, Mapping):
            yield path, require_own(value, path)


def _entries(mapping: Mapping[Any, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """As `iter_leaves`, but empty mappings below count as leaves."""
    stack: list[tuple[Path, Any]] = [(prefix, mapping)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, Mapping) and (value or path == prefix):
            level = value._mapping if isinstance(value, State) else value
            stack += [((*path, key), level[key]) for key in reversed(sorted_keys(level))]
        else:
            yield path, value


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves of a State are equal: of one structure, with equal arrays."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def _equal(a: Any, b: Any) -> bool:
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def to_flat_state(state: Mapping[Any, Any]) -> FlatState:
    """(path, value) pairs of `state`, sorted by path."""
    return FlatState(iter_leaves(state), sort=False)


def to_nested_state(flat_state: Mapping[Path, Any] | Iterable[tuple[Path, Any]], *, cls: type[State] = State) -> State:
    """A State from (path, value) pairs or a mapping of paths."""
    return cls(flat_state.items() if isinstance(flat_state, Mapping) else flat_state)


from_flat_state = to_nested_state


def to_pure_dict(state: Any, extract_fn: Callable[[Any], Any] | None = None) -> dict[Any, Any]:
    """Nested plain dicts of the raw values: what a checkpoint library wants.

    Example:
      >>> import nnx_core as nnx
      >>> nnx.to_pure_dict(nnx.State({"a": {0: nnx.Param(1.0)}}))
      {'a': {0: 1.0}}
    """
    extract = extract_fn or _plain_value
    return nest((path, extract(value)) for path, value in iter_leaves(state))


def _plain_value(x: Any) -> Any:
    """What a Variable holds, without hooks; of a `jax.Ref` the array in it."""
    raw = x.get_raw_value() if isinstance(x, Variable) else x
    return raw[...] if is_ref(raw) else raw


def restore_int_paths(pure_dict: Mapping[Any, Any]) -> dict[Any, Any]:
    """`pure_dict` with digit strings turned back into ints, as checkpoint libraries turn ints into strings.

    Example:
      >>> restore_int_paths({"layers": {"0": 1}})
      {'layers': {0: 1}}
    """
    return _copied(pure_dict, lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key)


def replace_by_pure_dict(state: State, pure_dict: Mapping[Any, Any], replace_fn: Any = None) -> None:
    """Replace the values of `state` by those of `pure_dict`, a part of it or all.

    Keys may be the digit strings a checkpoint library made of ints. Nothing is written if anything is wrong.

    Args:
      state: written in place: its leaves are replaced; the Variables it was taken from are not written.
      pure_dict: nested mapping of values.
      replace_fn: (old leaf, new value) -> new leaf.

    Raises:
      StateMismatchError: listing all paths of `pure_dict` that `state` has not.
    """
    replace = replace_fn or (lambda old, new: old.replace(new) if isinstance(old, Variable) else new)
    known = {tuple(map(str, path)): path for path, _ in iter_leaves(state)}
    new = dict(_leaves_down_to(pure_dict, known))
    if unexpected := [path for path in new if tuple(map(str, path)) not in known]:
        raise StateMismatchError(unexpected=unexpected)
    for path, value in new.items():
        level: Any = state
        *parents, last = known[tuple(map(str, path))]
        for key in parents:
            level = level[key]
        level[last] = replace(level[last], value)


def _leaves_down_to(mapping: Any, known: Mapping[Path, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    # A dict below a known path is the value of a Variable that holds a dict.
    stack = [(prefix, mapping)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, Mapping) and tuple(map(str, path)) not in known:
            stack += [((*path, key), value[key]) for key in reversed(sorted_keys(value))]
        else:
            yield path, value


# ---- filters ----


def _partition(pairs: Iterable[tuple[Path, Any]], filters: tuple[Any, ...]) -> list[list[tuple[Path, Any]]]:
    predicates = filterlib.to_predicates(filters)
    parts: list[list[tuple[Path, Any]]] = [[] for _ in range(len(filters) + 1)]
    for path, value in pairs:
        i = filterlib.first_match(predicates, path, value)
        parts[-1 if i is None else i].append((path, value))
    return parts


def _exhaustive(pairs: Iterable[tuple[Path, Any]], filters: tuple[Any, ...]) -> list[list[tuple[Path, Any]]]:
    *parts, rest = _partition(pairs, filters)
    if rest:
        path, value = rest[0]
        raise FilterError(
            f"Non-exhaustive filters: {show_path(path)} ({show_value(value)}) and {len(rest) - 1} more match none of"
            f" {filters}. Use `...` as the last filter to match everything else."
        )
    return parts


def split_pairs(pairs: Iterable[tuple[Path, Any]], filters: tuple[Any, ...]) -> list[Any]:
    """One State a filter; all of the pairs in one for no filter.

    Raises:
      FilterError: if a pair matches none.
    """
    if not filters:
        return [state_or_leaf(list(pairs))]
    return [state_or_leaf(part) for part in _exhaustive(pairs, filters)]


def state_or_leaf(pairs: list[tuple[Path, Any]]) -> Any:
    """A State of `pairs`; a lone Variable or array, which has the empty path, is its own state."""
    return pairs[0][1] if len(pairs) == 1 and not pairs[0][0] else State(pairs)


def _one_or_all(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


def filter_state(state: Mapping[Any, Any], first: Any, /, *filters: Any) -> Any:
    """The part of `state` that matches each filter; a tuple for several filters."""
    return _one_or_all([State(part) for part in _partition(iter_leaves(state), (first, *filters))[:-1]])


def split_state(state: Mapping[Any, Any], first: Any, /, *filters: Any) -> Any:
    """Like `filter_state`, but raises FilterError if a value matches no filter."""
    return _one_or_all(split_pairs(iter_leaves(state), (first, *filters)))


def merge_state(state: Mapping[Any, Any], /, *states: Mapping[Any, Any], cls: type[State] = State) -> State:
    """One State with the values of all of them; later ones win."""
    merged: dict[Path, Any] = {}
    for part in (state, *states):
        merged.update(iter_leaves(part))
    return cls(merged.items())


def map_state(f: Callable[[Path, Any], Any], state: Mapping[Any, Any]) -> State:
    """A State with f(path, value) for each value."""
    return State((path, f(path, value)) for path, value in iter_leaves(state))


# ---- pytree ----


def _flatten(state: State) -> tuple[list[Any], tuple[type, tuple[Any, ...]]]:
    keys = tuple(sorted_keys(state._mapping))
    return [state[k] for k in keys], (type(state), keys)


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    children, aux = _flatten(state)
    return [(jax.tree_util.DictKey(k), c) for k, c in zip(aux[1], children, strict=True)], aux


def _unflatten(aux: Any, children: Any) -> State:
    kind, keys = aux
    pairs = zip(keys, children, strict=True)
    return kind.over({k: c._mapping if isinstance(c, State) else c for k, c in pairs})


for _kind in (State, EmptyState):
    jax.tree_util.register_pytree_with_keys(_kind, _flatten_with_keys, _unflatten, _flatten)

jax.tree_util.register_pytree_with_keys(
    FlatState,
    lambda flat: ([(jax.tree_util.DictKey(p), v) for p, v in flat], flat.paths),
    lambda paths, leaves: FlatState(zip(paths, leaves, strict=True), sort=False),
)
