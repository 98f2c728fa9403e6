"""Walks that visit: iterators over a graph, and maps of it.

Law: every object, Variable and leaf is visited once, under the path where it is first reached, children
before parents, keys in sorted order. Nothing here changes what it walks.
"""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import FrameType
from typing import Any

from nnx_core import _trace
from nnx_core import filters as filterlib
from nnx_core._depth import ROOM
from nnx_core._errors import Path, show_path
from nnx_core._foreign import ForeignObjectError
from nnx_core.graph.classify import DICT, PYTREE, SEQUENCE, STATE, children, kind_of, one_level
from nnx_core.graph.objects import Object, is_data
from nnx_core.graph.pack import Packer, Place, Refs
from nnx_core.modes import sharing_allowed
from nnx_core.variables import Variable


def iter_graph(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Path, Any]]:
    """(path, value) of every object, Variable and attribute of `node`, children first, shared ones once.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> [path for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)]
      [('bias',), ('kernel',)]
    """
    if not sharing_allowed(graph):
        require_unshared(node)
    seen: set[int] = set()
    # What is being visited, from `node` down, each with the children that are still to come. No recursion: a
    # generator cannot raise Python's limit for itself alone.
    branch: list[tuple[Path, Any, Iterator[tuple[Hashable, Any]]]] = [((), node, iter(children(node)))]
    while branch:
        path, x, rest = branch[-1]
        pair = next(rest, None)
        if pair is None:
            branch.pop()
            yield path, x
            continue
        key, child = pair
        if isinstance(child, Object | Variable):
            if id(child) in seen or child is node:
                continue
            seen.add(id(child))
        below = (*path, key)
        branch.append((below, child, iter(children(child, below))))


def require_unshared(node: Any) -> None:
    """What `graph=False` asks for.

    Raises:
      SharedReferenceError: naming both paths, if an object or Variable is reached twice.
    """
    Packer((None,), Refs(), allow_sharing=False, trace_numbers=False).pack(node, Place((), None, 0))


def iter_children(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Hashable, Any]]:
    """(key, child) of the direct children of `node` that are objects or Variables, keys sorted.

    Attributes, arrays and plain lists and dicts are left out; `iter_graph` reaches what is in those.

    Example:
      >>> import nnx_core as nnx
      >>> [key for key, _ in nnx.iter_children(nnx.Sequential(nnx.relu))]
      ['layers']
    """
    for key, child in children(node):
        if isinstance(child, Object | Variable):
            yield key, child


def data_children(x: Any) -> Iterator[tuple[Hashable, Any]]:
    """`iter_children`, and the lists, dicts and other pytrees that hold objects, Variables or arrays."""
    for key, child in children(x):
        is_container = kind_of(child) in (SEQUENCE, DICT, STATE, PYTREE)
        if isinstance(child, Object | Variable) or (is_container and is_data(child)):
            yield key, child


def recursive_map(f: Callable[[Path, Any], Any], node: Any, /, *, graph: bool | None = None) -> Any:
    """A copy of `node` in which every value is f(path, value), children before parents, shared ones once.

    f gets a fresh shallow copy of each object, with children replaced already; it may change it in place.
    With `graph=False` what is shared raises SharedReferenceError, before f is called.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> half = lambda path, x: x.replace(x / 2) if isinstance(x, nnx.Variable) else x
      >>> bool((nnx.recursive_map(half, model).kernel * 2 == model.kernel).all())
      True
    """
    if not sharing_allowed(graph):
        require_unshared(node)
    with ROOM:
        return _map(f, node, (), {})


def _map(f: Callable[[Path, Any], Any], x: Any, path: Path, done: dict[int, Any]) -> Any:
    if isinstance(x, Object | Variable):
        if id(x) in done:
            return done[id(x)]
        if isinstance(x, Variable):
            done[id(x)] = f(path, x)
            return done[id(x)]
        copy = x.__copy__()
        done[id(x)] = copy  # a cycle back to x meets the copy
        for key, child in children(x, path):
            new = _map(f, child, (*path, key), done)
            if new is not child:
                copy._nnx_assign({key: new}, ())
        done[id(x)] = f(path, copy)
        return done[id(x)]
    pairs = children(x, path)
    if not pairs:
        return f(path, x)
    mapped = [_map(f, child, (*path, key), done) for key, child in pairs]
    return f(path, rebuilt(x, [key for key, _ in pairs], mapped))


def rebuilt(x: Any, keys: list[Hashable], values: list[Any]) -> Any:
    """A container like `x`, which is no object, with other children."""
    kind = kind_of(x)
    if kind == DICT:
        new = dict(zip(keys, values, strict=True))
        return {key: new[key] for key in x}
    if kind == STATE:
        return type(x)(dict(zip(keys, values, strict=True)))
    if kind == SEQUENCE:
        return type(x)(values)
    return one_level(x)[2].unflatten(values)


def find_duplicates(node: Any, /, *, only: filterlib.Filter = ...) -> list[list[Path]]:
    """Paths of every object and Variable that is reached more than once, a list each, in walking order."""
    predicate = filterlib.to_predicate(only)
    paths: dict[int, list[Path]] = {}  # by id, from the first path on that `only` matches
    seen: dict[int, Any] = {}  # by id; held here, so that no id is used twice
    pending: list[tuple[Path, Any]] = [((), node)]
    while pending:
        path, x = pending.pop()
        if isinstance(x, Object | Variable):
            if id(x) in paths or predicate(path, x):
                paths.setdefault(id(x), []).append(path)
            if id(x) in seen:
                continue
            seen[id(x)] = x
        pending.extend(((*path, key), child) for key, child in reversed(children(x, path)))
    return [shared for shared in paths.values() if len(shared) > 1]


def locate(thing: Any) -> str | None:
    """The path of a Variable or object from the outermost object in sight: `Encoder.layers[0].kernel`.

    Nothing knows who holds it, and a reference upwards would make a cycle of every model. The functions that
    are running do know: the outermost one with an object from which `thing` can be reached tells the path.
    Only for messages: it walks every object in sight.
    """
    outermost: Path | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("jax", "nnx_core"):
            path = _path_in(frame.f_locals, thing) or _path_in(frame.f_globals, thing)
            outermost = path or outermost
        frame = frame.f_back
    return None if outermost is None else show_path(outermost)


def _path_in(namespace: Mapping[str, Any], thing: Any) -> Path | None:
    """The path of `thing` from the first object of `namespace` that holds it."""
    for root in list(namespace.values()):
        if isinstance(root, Object) and root is not thing:
            # What cannot be walked (a part of it is of another library) is passed over: this only serves a message.
            with contextlib.suppress(ForeignObjectError):
                for path, node in iter_graph(root, graph=True):
                    if node is thing:
                        return (type(root).__name__, *path)
    return None


_trace.locate_with(locate)
