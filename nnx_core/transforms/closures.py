"""What a function can see beside its arguments.

A transform that compiles once for many calls (pmap) may do so only while what f sees beside its arguments stays the
same. That cannot be watched, but it can be looked for: arrays, Variables and objects that f reaches by itself.
Knows functions and their environment; knows nothing of JAX.
"""

import functools
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from nnx_core.graph.objects import Object, is_array
from nnx_core.state import State
from nnx_core.variables import Variable


def sees_arrays(f: Callable[..., Any]) -> bool:
    """Whether `f` reaches an array, a Variable or an object by something else than its arguments.

    Through its closure, its defaults, the globals it names, the attributes of plain objects among these, and through
    functions of its own package. Not into other packages: the tables of jax and numpy are no business of the user's.
    """
    package = (getattr(f, "__module__", None) or "").partition(".")[0]
    seen: dict[int, Any] = {}  # by id; held here, so that no id is used twice
    pending: list[Any] = [f]
    while pending:
        thing = pending.pop()
        if isinstance(thing, Object | Variable | State) or is_array(thing):
            return True
        if id(thing) not in seen:
            seen[id(thing)] = thing
            pending.extend(_within(thing, package))
    return False


def _within(thing: Any, package: str) -> Iterator[Any]:
    """What `thing` leads to."""
    if isinstance(thing, FunctionType):
        if (thing.__module__ or "").partition(".")[0] == package:
            yield from _environment(thing)
    elif isinstance(thing, MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif not isinstance(thing, type | ModuleType | BuiltinFunctionType):
        yield getattr(thing, "__wrapped__", None)  # of a function under a decorator, such as `jax.jit`
        yield from getattr(thing, "__dict__", {}).values()


def _environment(f: FunctionType) -> Iterator[Any]:
    """What a function closes over, its defaults, and the globals that it names."""
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    yield getattr(f, "__wrapped__", None)
    names = set(_names(f.__code__))
    for name in names & f.__globals__.keys():
        value = f.__globals__[name]
        yield value
        if isinstance(value, ModuleType) and _is_plain(value):
            for inner in names & vars(value).keys():
                yield vars(value)[inner]


def _is_plain(module: ModuleType) -> bool:
    """Whether a module may be the user's own, and not one of the libraries that hold arrays for themselves."""
    return module.__name__.partition(".")[0] not in ("jax", "numpy", "nnx_core")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function that is made inside of this one
            yield from _names(constant)
