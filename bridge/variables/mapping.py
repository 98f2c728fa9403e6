"""Variables of Linen and attributes of NNX are one set of values, keyed two ways.

Linen keys by collection, then path: `{"params": {"Dense_0": {"kernel": x}}}`. NNX keys by path; the collection is
the type of the Variable: `{"Dense_0": {"kernel": Param(x)}}`.

Law: `nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(v)) == v` for every legal Linen tree `v`, with plain dicts
for its mappings; the input is never touched. So that it holds:

- a Variable has the key `name` unless something else at that level needs it: a subtree, or a Variable of another
  collection (`params` goes first). Then its key is `name@collection`, with more `@` behind it while that is taken.
- an empty mapping is a Variable with the value `{}`; an empty collection is one named "" with the value `EMPTY`.
- a mapping with a key that is no string is a value: names of Linen modules and variables are strings.

Knows trees, names and values; knows nothing of modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jax
from flax.core import meta

import nnx_core as nnx
from bridge._types import Location, Path
from bridge.variables.kinds import collection_of
from bridge.variables.metadata import to_linen_value, to_nnx_variable
from nnx_core._foreign import require_own


@jax.tree_util.register_static
class _Empty:
    """The value that stands for a collection without variables."""

    def __eq__(self, other: object) -> bool:
        return type(other) is _Empty

    def __hash__(self) -> int:
        return hash(_Empty)

    def __repr__(self) -> str:
        return "EMPTY"


EMPTY = _Empty()


def linen_vars_to_nnx_attrs(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of new Variables, by path, from Linen variables: any Mapping of collections, boxed or not.

    >>> import jax.numpy as jnp
    >>> linen_vars_to_nnx_attrs({"params": {"Dense_0": {"bias": jnp.ones(2)}}})
    {'Dense_0': {'bias': Param(float32[2] [1., 1.])}}
    """
    return nest(variables_from(leaves(variables)))


def nnx_attrs_to_linen_vars(nnx_attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested dicts `{collection: {name: ... value}}` from Variables by path, as above or in an `nnx.State`.

    Integer keys, as NNX has them for lists, become strings. What is no Variable is left out.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> nnx_attrs_to_linen_vars({"norm": {"mean": nnx.BatchStat(jnp.zeros(1))}})
    {'batch_stats': {'norm': {'mean': Array([0.], dtype=float32)}}}
    """
    return linen_tree(dict(locations(nnx_attrs)))


# ---- the two shapes as flat (location, value) pairs ----


def leaves(variables: Mapping[str, Any]) -> Iterator[tuple[Location, Any]]:
    """(location, value) of everything in Linen variables, in their order; a box counts as a value."""
    for collection, tree in variables.items():
        if isinstance(tree, Mapping) and not tree:
            yield (collection, ""), EMPTY
        else:
            yield from _leaves(tree, (collection,))


def _leaves(tree: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    if is_subtree(tree):
        for key, child in tree.items():
            yield from _leaves(child, (*location, key))
    else:
        yield location, {} if isinstance(tree, Mapping) and not tree else tree


def is_subtree(x: Any) -> bool:
    """Whether `x` is a level of a Linen tree, and not a value in it."""
    return (
        isinstance(x, Mapping)
        and bool(x)
        and not isinstance(x, meta.AxisMetadata)
        and all(isinstance(key, str) for key in x)
    )


def tree_of(pairs: Iterable[tuple[Location, Any]]) -> dict[str, Any]:
    """Linen variables from (location, value) pairs; the inverse of `leaves`."""
    variables: dict[str, Any] = {}
    for location, value in pairs:
        if value is EMPTY or type(value) is _Empty:
            variables.setdefault(location[0], {})
            continue
        put(variables, location, value)
    return variables


def variables_from(values: Iterable[tuple[Location, Any]]) -> dict[Location, nnx.Variable[Any]]:
    """New Variables from (location, value) pairs, values boxed or not."""
    return {location: to_nnx_variable(location[0], value) for location, value in values}


def linen_tree(variables: Mapping[Location, nnx.Variable[Any]]) -> dict[str, Any]:
    """Linen variables from Variables by location, boxed where they have metadata."""
    return tree_of((location, to_linen_value(variable)) for location, variable in variables.items())


def put(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Set `value` in nested dicts, which are made where there are none."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def location_of(path: Sequence[Any], variable: nnx.Variable[Any]) -> Location:
    """Where Linen keeps the Variable that has this path in NNX.

    >>> import nnx_core as nnx
    >>> location_of(("layers", 0, "mean@batch_stats"), nnx.BatchStat(0.0))
    ('batch_stats', 'layers', '0', 'mean')
    """
    collection = collection_of(type(variable))
    if not path:
        return (collection,)
    *above, key = map(str, path)
    return (collection, *above, name_of(key, collection))


def inside(location: Location, path: Path) -> Location:
    """The location, in a model, of what has this one in a module at `path`.

    >>> inside(("params", "kernel"), ("encoder", "Dense_0"))
    ('params', 'encoder', 'Dense_0', 'kernel')
    """
    return (location[0], *path, *location[1:])


def locations(attrs: Mapping[Any, Any]) -> Iterator[tuple[Location, nnx.Variable[Any]]]:
    """(location, Variable) of every Variable in nested attributes, in their order."""
    for path, variable in _variables(attrs, ()):
        yield location_of(path, variable), variable


def _variables(attrs: Mapping[Any, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for key, child in attrs.items():
        if isinstance(child, nnx.Variable):
            yield (*path, str(key)), child
        elif isinstance(child, Mapping):
            yield from _variables(child, (*path, str(key)))
        else:
            require_own(child, (*path, str(key)))  # what is no Variable is left out, but not one of flax.nnx


# ---- keys ----


def nest(
    variables: Mapping[Location, nnx.Variable[Any]], level: Callable[[dict[str, Any]], Any] = dict
) -> dict[str, Any]:
    """Attributes from Variables by location: nested dicts, or what `level` makes of one below the top."""
    return _nest([(location[0], location[1:], v) for location, v in variables.items()], level)


def _nest(entries: list[tuple[str, Path, Any]], level: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    below: dict[str, list[tuple[str, Path, Any]]] = {}
    here: list[tuple[str, str, Any]] = []
    order: dict[Any, None] = {}  # levels by name, Variables by (name, collection): as they came
    for collection, path, variable in entries:
        if len(path) == 1:
            here.append((collection, path[0], variable))
            order[path[0], collection] = None
        else:
            below.setdefault(path[0], []).append((collection, path[1:], variable))
            order[path[0]] = None
    keys = _keys([(collection, name) for collection, name, _ in here], below)
    variables = {(name, collection): variable for collection, name, variable in here}
    attributes: dict[str, Any] = {}
    for what in order:
        if isinstance(what, tuple):
            name, collection = what
            attributes[keys[collection, name]] = variables[what]
        else:
            attributes[what] = level(_nest(below[what], level))
    return attributes


def _keys(variables: list[tuple[str, str]], taken: Iterable[str]) -> dict[tuple[str, str], str]:
    """A key for each Variable of one level, given as (collection, name), where `taken` are the keys of levels."""
    names = {name for _, name in variables}
    used = set(taken)
    keys: dict[tuple[str, str], str] = {}
    for collection, name in sorted(variables, key=lambda pair: (pair[0] != "params", pair)):
        if name not in used and name_of(name, collection) == name:
            keys[collection, name] = name
            used.add(name)
    for collection, name in variables:
        if (collection, name) not in keys:
            key = f"{name}@{_suffix(collection)}"
            while key in used or key in names:
                key += "@"
            keys[collection, name] = key
            used.add(key)
    return keys


def name_of(key: str, collection: str) -> str:
    """The name in Linen of the Variable of this collection that has this key; undoes the `@collection` behind it.

    >>> name_of("w", "ema"), name_of("w@ema", "ema"), name_of("w@ema", "params")
    ('w', 'w', 'w@ema')
    """
    if "@" not in key:
        return key
    return re.sub(rf"@{re.escape(_suffix(collection))}@*\Z", "", key, flags=re.DOTALL)


def _suffix(collection: str) -> str:
    # Quoted, it holds no "@", so the last "@" that is not at the end says where the name ends.
    return quote(collection, safe="", errors="surrogatepass") or "%"
