"""Every public name of flax.nnx is here, and takes every call that flax.nnx takes.

A signature of ours accepts a call if it has each parameter of theirs under its name, in its place, with its
default; it may have more that are optional. What differs on purpose stands in `DEVIATIONS`, with the reason.
"""

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import flax.nnx
import jax.numpy as jnp
import pytest

import nnx_core as nnx

# name -> why ours differs. A row whose signatures agree is an error too: see the last test.
DEVIATIONS = {
    "merge": "copies by default: a merged module that writes to the States it came from is a trap (REQUIREMENTS 66)",
    "GraphDef": "made by split, never by users; what is in it is each library's own",
    "UpdateContext": "made by update_context, never by users",
    "Dict": "as for a dict, at most one argument is given by position",
    "List": "an empty list is made from () here, from None there",
}
# Methods that only flax.nnx's own machinery calls, on what it builds for itself.
INTERNAL = {
    "GraphDef": "attributes nodes num_leaves with_matching_outer_index with_no_outer_index with_same_outer_index",
    "UpdateContext": "flatten_end unflatten_end",
    "StateAxes": "map_prefix",
    "StateSharding": "map_prefix",
    "DiffState": "map_prefix",
    "set_graph_mode": "get_default get_stack",
    "set_graph_updates": "get_default get_stack",
    "use_eager_sharding": "get_default get_stack",
    "Variable": "required_metadata",
}
SUBMODULES = "initializers traversals metrics".split()  # whose names are public too: documented as nnx.<module>.<name>


def public(module: Any) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_")]


def names_of(module: types.ModuleType) -> list[str]:
    """What `module` itself defines, not what it imported."""
    return [
        name
        for name in public(module)
        if getattr(getattr(module, name), "__module__", module.__name__).startswith((module.__name__, "jax._src.nn"))
        and not isinstance(getattr(module, name), types.ModuleType)
    ]


def test_the_names_are_here():
    assert len(public(flax.nnx)) > 200
    assert [name for name in public(flax.nnx) if not hasattr(nnx, name)] == []


@pytest.mark.parametrize("module", SUBMODULES)
def test_the_names_of_a_submodule_are_here(module):
    assert hasattr(nnx, module)
    ours = getattr(nnx, module)
    assert [name for name in names_of(getattr(flax.nnx, module)) if not hasattr(ours, name)] == []


def test_the_list_is_what_the_face_imports():
    imported = set()
    for node in ast.parse(inspect.getsource(nnx)).body:
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname for alias in node.names if alias.name == alias.asname}
    assert set(nnx.__all__) == imported | {"Pytree"}


# ---- signatures ----------------------------------------------------------------------------------------------------

_SAME = ("Missing", "MISSING", "None")  # "not given", in words of either library


def _shown(default: Any) -> str:
    """A default as text that does not depend on the library."""
    if default is inspect.Parameter.empty:
        return "required"
    if isinstance(default, Mapping):
        return f"mapping {dict(default)}"
    if isinstance(default, tuple):
        return f"({', '.join(map(_shown, default))})"
    name = default.__name__ if hasattr(default, "__name__") else type(default).__name__
    if name in _SAME or default is None:
        return "not given"
    if inspect.isroutine(default) or isinstance(default, type | functools.partial):
        return f"{'class' if isinstance(default, type) else 'function'} {name.lstrip('_')}"
    if dataclasses.is_dataclass(default):
        return f"{name}{dataclasses.astuple(default)}"
    return repr(default)


def _same_default(theirs: Any, ours: Any) -> bool:
    theirs, ours = _shown(theirs), _shown(ours)
    if theirs == "required":
        return True  # ours may have a default
    if theirs.startswith("function") and ours.startswith("function"):
        return True  # private helpers have names of their own: what they do is compared by the tests of the layers
    return theirs == ours


def refused(theirs: inspect.Signature, ours: inspect.Signature) -> Iterator[str]:
    """What of the calls that `theirs` accepts `ours` refuses, or takes in another way."""
    mine = list(ours.parameters.values())
    kinds = {p.kind for p in mine}
    positional = [p for p in mine if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name: p for p in mine}
    place = -1
    for p in theirs.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if p.kind not in kinds:
                yield f"takes no {p}"
            continue
        named = p.kind is not p.POSITIONAL_ONLY
        if p.kind is not p.KEYWORD_ONLY:
            place += 1
            if place >= len(positional):
                if p.VAR_POSITIONAL not in kinds:
                    yield f"has no parameter {place}: {p}"
                    continue
            elif named and positional[place].name != p.name:
                yield f"parameter {place} is called {positional[place].name}, expected {p.name}"
                continue
            elif not _same_default(p.default, positional[place].default):
                yield f"{p.name}: default {_shown(positional[place].default)}, expected {_shown(p.default)}"
                continue
        own = known.get(p.name)
        if named and (own is None or own.kind is p.POSITIONAL_ONLY) and p.VAR_KEYWORD not in kinds:
            yield f"takes no keyword {p.name}"
        elif p.kind is p.KEYWORD_ONLY and own is not None and not _same_default(p.default, own.default):
            yield f"{p.name}: default {_shown(own.default)}, expected {_shown(p.default)}"
    for p in mine:
        new = p.name not in theirs.parameters and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if new and p.default is p.empty and (p.kind is p.KEYWORD_ONLY or positional.index(p) > place):
            yield f"needs {p.name}, which flax.nnx has not"


def signature(f: Any) -> inspect.Signature | None:
    """The signature of a function, or of a class's `__init__`; None where Python cannot tell."""
    if getattr(f, "_is_protocol", False):
        return inspect.signature(lambda *args, **kwargs: None)  # nobody calls it
    if inspect.isclass(f):
        return inspect.Signature() if f.__init__ is object.__init__ else _without_first(inspect.signature(f.__init__))
    try:
        return inspect.signature(f)
    except (TypeError, ValueError):
        return None


def _without_first(s: inspect.Signature) -> inspect.Signature:
    return s.replace(parameters=list(s.parameters.values())[1:])


def complaints(theirs: Any, ours: Any) -> list[str]:
    s = signature(theirs)
    if s is None:
        return []
    mine = signature(ours)
    return ["is not callable"] if mine is None else list(refused(s, mine))


def is_plain(x: Any) -> bool:
    return callable(x) and not isinstance(x, types.ModuleType) and x is not flax.nnx.M and x is not flax.nnx.A


CALLABLES = [name for name in public(flax.nnx) if is_plain(getattr(flax.nnx, name))]
CLASSES = [name for name in CALLABLES if inspect.isclass(getattr(flax.nnx, name))]


def _signed(name: str) -> list[str]:
    return complaints(getattr(flax.nnx, name), getattr(nnx, name)) if hasattr(nnx, name) else ["is missing"]


def test_they_take_every_call_of_flax():
    same = {name: _signed(name) for name in CALLABLES if name not in DEVIATIONS}
    assert len(same) > 150
    assert {name: texts for name, texts in same.items() if texts} == {}


def test_their_methods_take_every_call_of_flax():
    assert len(CLASSES) > 70
    differ = {name: list(_methods_that_differ(name)) for name in CLASSES}
    assert {name: texts for name, texts in differ.items() if texts} == {}


def _methods_that_differ(name: str) -> Iterator[str]:
    """What of the methods of flax.nnx's class `name` ours has not, or takes in another way."""
    theirs, ours = getattr(flax.nnx, name), getattr(nnx, name)
    internal = " ".join(INTERNAL[base.__name__] for base in theirs.__mro__ if base.__name__ in INTERNAL).split()
    for method in public(theirs):
        if method in internal:
            continue
        if not hasattr(ours, method):
            if not _is_field(ours, method):
                yield f"{method}: is missing"
        elif callable(getattr(theirs, method)) and not isinstance(getattr(theirs, method), type):
            yield from (f"{method}: {text}" for text in complaints(_method(theirs, method), _method(ours, method)))


def _method(cls: type, name: str) -> Any:
    """A method as an instance has it: without its first parameter, whatever that is called."""
    f = getattr(cls, name)
    s = signature(f)
    if s is None or not inspect.isfunction(inspect.getattr_static(cls, name)):
        return f

    def bound(): ...

    bound.__signature__ = _without_first(s)
    return bound


def _is_field(cls: type, name: str) -> bool:
    """Whether instances have it: annotated, an argument that is kept, or forwarded to the value by a Variable."""
    annotated = any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__)
    return (
        annotated
        or name in inspect.signature(cls.__init__).parameters
        or (issubclass(cls, nnx.Variable) and hasattr(cls(jnp.zeros(())), name))
    )


def test_a_deviation_is_one():
    assert [name for name in DEVIATIONS if not _signed(name)] == []


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        (lambda a, b: 0, lambda a, c: 0, "parameter 1 is called c, expected b"),
        (lambda a, b: 0, lambda a: 0, "has no parameter 1: b"),
        (lambda a, b=1: 0, lambda a, b=2: 0, "b: default 2, expected 1"),
        (lambda a: 0, lambda a, b: 0, "needs b, which flax.nnx has not"),
        (lambda *, a: 0, lambda *, b=1: 0, "takes no keyword a"),
        (lambda *, a=(1,): 0, lambda *, a=(2,): 0, r"a: default (2), expected (1)"),
        (lambda *a: 0, lambda: 0, "takes no *a"),
        (lambda **a: 0, lambda: 0, "takes no **a"),
        (lambda a: 0, lambda a, /: 0, "takes no keyword a"),
    ],
)
def test_the_comparison_finds(theirs, ours, text):
    assert text in list(refused(inspect.signature(theirs), inspect.signature(ours)))


def test_the_comparison_allows_more():
    theirs, ours = inspect.signature(lambda a, *, b=1: 0), inspect.signature(lambda a, c=2, *, b=1, d=3, **e: 0)
    assert list(refused(theirs, ours)) == []


@pytest.mark.parametrize("name", "jit vmap grad value_and_grad remat scan pmap custom_vjp make_jaxpr".split())
def test_a_transform_is_a_decorator_with_and_without_arguments(name):
    transform = getattr(nnx, name)
    first = next(iter(inspect.signature(transform).parameters))
    for lifted in (transform(abs), transform()(abs), transform(...)(abs), transform(**{first: abs})):
        assert lifted.__name__ == "abs"
    with pytest.raises(TypeError, match=f"^{name} takes one function by position; its options have names"):
        transform(abs, 1)


def test_what_a_transform_needs_is_asked_for_at_once():
    with pytest.raises(TypeError, match=r"^shard_map needs mesh=, in_specs=, out_specs=\.$"):
        nnx.shard_map(abs)
    with pytest.raises(TypeError, match=r"^transform_metadata needs partition=\.$"):
        nnx.transform_metadata(abs)


# ---- names of parameters -------------------------------------------------------------------------------------------


def by_position(f: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(f).parameters.values() if p.kind in kinds]


def test_positional_parameters_have_their_names_too():
    differing = {}
    for name in set(public(flax.nnx)) & set(public(nnx)):
        theirs, ours = getattr(flax.nnx, name), getattr(nnx, name)
        if not callable(theirs) or name in DEVIATIONS:
            continue
        try:
            expected, got = by_position(theirs), by_position(ours)
        except (TypeError, ValueError):  # no signature
            continue
        if got[: len(expected)] != expected and got:
            differing[name] = (expected, got)
    assert differing == {}
