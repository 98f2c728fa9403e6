"""Nested mappings as flat ones: keys are paths.

Law: `unflatten_mapping(flatten_mapping(xs, keep_empty_nodes=True))` equals `xs`; order is kept.
Knows mappings only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from nnx_core._errors import Path, StateMismatchError
from nnx_core.state import nest

IsLeaf = Callable[[Path, Any], bool]


@jax.tree_util.register_static
@dataclass(frozen=True)
class EmptyNode:
    """Stands for an empty mapping in a flat one."""


empty_node = EmptyNode()


def flatten_mapping(
    xs: Mapping[Any, Any],
    /,
    *,
    keep_empty_nodes: bool = False,
    is_leaf: IsLeaf | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """A flat dict whose keys are paths (tuples), or strings joined by `sep`.

    Args:
      xs: a nested mapping.
      keep_empty_nodes: keep empty mappings as `empty_node`; they are left out otherwise.
      is_leaf: (path, mapping) -> whether to stop there.
      sep: what joins the keys, which must be strings then.

    Raises:
      TypeError: if `xs` is no mapping, or a key is no string and `sep` is given.

    Example:
      >>> flatten_mapping({"foo": 1, "bar": {"a": 2, "b": {}}})
      {('foo',): 1, ('bar', 'a'): 2}
      >>> flatten_mapping({"foo": 1, "bar": {"a": 2, "b": {}}}, sep="/")
      {'foo': 1, 'bar/a': 2}
    """
    if not isinstance(xs, Mapping):
        raise TypeError(f"Expected a mapping, found {type(xs).__name__}.")
    flat = dict(_leaves(xs, (), keep_empty_nodes, is_leaf))
    return flat if sep is None else {_joined(path, sep): value for path, value in flat.items()}


def _leaves(x: Any, path: Path, keep_empty: bool, is_leaf: IsLeaf | None) -> Iterator[tuple[Path, Any]]:
    if not isinstance(x, Mapping) or (is_leaf is not None and is_leaf(path, x)):
        yield path, x
    elif not x and path:
        if keep_empty:
            yield path, empty_node
    else:
        for key, value in x.items():
            yield from _leaves(value, (*path, key), keep_empty, is_leaf)


def _joined(path: Path, sep: str) -> str:
    for key in path:
        if not isinstance(key, str):
            raise TypeError(f"Cannot join {path} by {sep!r}: {key!r} is no string. Leave `sep` out for tuples.")
    return sep.join(path)  # type: ignore[arg-type]  # checked above


def flatten_to_sequence(xs: Mapping[Any, Any], /, *, is_leaf: IsLeaf | None = None) -> list[tuple[Path, Any]]:
    """The (path, value) pairs of `flatten_mapping`.

    Example:
      >>> flatten_to_sequence({"foo": 1, "bar": {"a": 2, "b": {}}})
      [(('foo',), 1), (('bar', 'a'), 2)]
    """
    return list(flatten_mapping(xs, is_leaf=is_leaf).items())


def unflatten_mapping(xs: Any, /, *, sep: str | None = None) -> dict[Any, Any]:
    """The inverse of `flatten_mapping`: nested dicts from a flat mapping or (path, value) pairs.

    Args:
      xs: keys are tuples, or with `sep` strings.
      sep: what joins the keys.

    Raises:
      TypeError: if `xs` is neither a mapping nor pairs.
      StateMismatchError: if a path is empty, or runs through a value.

    Example:
      >>> unflatten_mapping({("foo",): 1, ("bar", "a"): 2})
      {'foo': 1, 'bar': {'a': 2}}
    """
    if not isinstance(xs, Mapping | Iterable):
        raise TypeError(f"Expected a mapping of paths or (path, value) pairs, found {type(xs).__name__}.")
    items = xs.items() if isinstance(xs, Mapping) else xs
    pairs = [(path if sep is None else tuple(path.split(sep)), value) for path, value in items]
    if empty := [path for path, _ in pairs if not path]:
        raise StateMismatchError(unexpected=empty)
    return nest((path, {} if value is empty_node else value) for path, value in pairs)
