"""What can be compared, in one form: a function of values by location, whatever API a model is written in.

Law: `run(values, keys, args, kwargs)` returns what the model's own call returns on these values, and what it wrote;
neither the model nor its variables are changed. Equal keys are handed to both models as they are.
Knows modules of both kinds; knows nothing of the other model or of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
from flax import core
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._errors import BridgeError, show_path
from bridge._types import Location, Path
from bridge.equivalence.numbers import is_inexact
from bridge.linen_in_nnx.wrapper import ToNNX
from bridge.nnx_in_linen.host import adopted, made_kind
from bridge.nnx_in_linen.wrapper import ToLinen
from bridge.tracing.trace import TRANSIENT, Method, Unit, is_array, trace_linen_on, trace_nnx
from bridge.variables.mapping import EMPTY, leaves, location_of, tree_of
from nnx_core.graph.watched import plain_class
from nnx_core.inspect.census import census
from nnx_core.inspect.recording import Recorder

Values = Mapping[Location, Any]
Keys = Mapping[str, Any] | None

#: Collections for what a call of an NNX module changes besides Variables: its attributes; keys taken, by stream.
ATTRIBUTES, DRAWS = "attributes", "keys taken"

#: What a call may write: everything but parameters, and `perturbations`, which `Module.perturb` would make anew.
_WRITABLE = core.DenyList(("params", "perturbations"))


class ComparisonError(BridgeError, ValueError):
    """Two models cannot be compared as was asked."""

    def __init__(self, what: str, expected: str, found: str, hint: str):
        super().__init__(f"{what}\n  expected: {expected}\n  found: {found}\n{hint}")


class ValueRules(Protocol):
    """What is known beforehand of two models' variables: of Linen's first."""

    def convert(self, values: Values) -> dict[Location, Any]:
        """The NNX model's values from Linen's; JAX can trace it."""

    def pairs(self, values: Values | None = None) -> list[tuple[Location, Location]]:
        """(Linen location, NNX location): what is made of what, of these values of Linen's if it depends on them."""


@dataclass(frozen=True)
class Layer:
    """What is called: `itself` is a bound Linen module or an NNX object."""

    path: Path
    kind: type
    itself: Any
    method: str

    def own_arrays(self) -> list[Any]:
        """Its own variables, as this call has them: of a layer in a scan those of one step."""
        if isinstance(self.itself, nn.Module):
            trees = self.itself.variables.values()
            own = [x for tree in trees for x in tree.values() if not isinstance(x, Mapping)]
            return [x for x in jax.tree.leaves(own) if is_array(x)]
        own = [x for x in vars(self.itself).values() if isinstance(x, nnx.Variable)]
        return [x for x in map(_raw, own) if is_array(x)]


class Listener(Protocol):
    """Is told of every call of a layer, and runs it."""

    def call(self, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `run(*args, **kwargs)` returns."""


@dataclass(frozen=True)
class Subject:
    """One model, or function, with its variables.

    Attributes:
      words: what it is, for people.
      api: whose names its variables have.
      values: its variables by location, without boxes; no random streams, and nothing that a call sows.
      parameters: those that are trained.
      run: (values, keys, args, kwargs) -> (output, what was written).
      listened: the same, with a Listener that is told of each layer's call; of what was written it may tell nothing.
      units: (keys, args, kwargs) -> its layers, in the order of their calls.
      is_native: whether it is an NNX module with code of its own, and no wrapper.
    """

    words: str
    api: Literal["linen", "nnx", "function"]
    values: Values
    parameters: frozenset[Location]
    run: Callable[[Values, Keys, Any, Any], tuple[Any, Values]]
    listened: Callable[[Values, Keys, Any, Any, Listener], tuple[Any, Values]]
    units: Callable[[Keys, Any, Any], list[Unit]]
    is_native: bool = False


def subject_of(x: Any, method: Method, which: str) -> Subject:
    """What was given as `a` or `b`, as `which` says.

    Raises:
      ComparisonError: if it is nothing that can be compared.

    >>> subject_of(abs, "__call__", "a").words
    'function abs'
    """
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], nn.Module):
        module, variables = x
        if not isinstance(variables, Mapping) or not all(isinstance(tree, Mapping) for tree in variables.values()):
            raise _unusable(which, f"variables of type {type(variables).__name__}")
        return _concrete(_linen(module, variables, method), which)
    x = adopted(x)
    if isinstance(x, nnx.Module):
        return _concrete(_nnx(x, method), which)
    if isinstance(x, nn.Module):
        raise _unusable(which, f"the Linen module {type(x).__name__} without its variables")
    if callable(x) and not isinstance(x, type):
        return _function(x)
    raise _unusable(which, f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__)


def _concrete(subject: Subject, which: str) -> Subject:
    for at, x in subject.values.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
            raise _unusable(which, f"the abstract variable {show_path(at)}")
    return subject


def _unusable(which: str, found: str) -> ComparisonError:
    return ComparisonError(
        f"{which} cannot be compared",
        "(linen_module, {collection: variables}), a ToNNX or another NNX module (flax.nnx's too), (ToLinen, variables),"
        " or a function",
        found,
        "Give a Linen module as the tuple (module, variables); of a class, make the module first, with real numbers.",
    )


# ---- Linen ----


def _linen(module: nn.Module, variables: Mapping[str, Any], method: Method) -> Subject:
    is_wrapper = isinstance(module, ToLinen)

    def invoke(bound: Any, args: Any, kwargs: Any) -> Any:
        if is_wrapper:
            return bound(*args, **kwargs, **({} if method == "__call__" else {"nnx_method": method}))
        return getattr(bound, method)(*args, **kwargs) if isinstance(method, str) else method(bound, *args, **kwargs)

    def run(values: Values, keys: Keys, args: Any, kwargs: Any) -> tuple[Any, Values]:
        variables = tree_of(values.items())
        # As one argument each, so that no keyword of the model's is taken for one of `apply`.
        output, updates = nn.Module.apply(module, variables, args, kwargs, method=invoke, mutable=_WRITABLE, rngs=keys)
        return output, _flat(updates)

    def listened(values: Values, keys: Keys, args: Any, kwargs: Any, listener: Listener) -> tuple[Any, Values]:
        def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            layer, name = context.module, context.method_name
            # What a lifted transform calls is a method by name alone: `scan_body` of a cell, say.
            if layer.scope is None or not _is_public(name) or not hasattr(type(layer), name):
                return method(*args, **kwargs)
            called = Layer(tuple(layer.path), type(layer), layer, name)
            return listener.call(called, method, args, kwargs)

        with nn.intercept_methods(intercept):
            return run(values, keys, args, kwargs)

    def units(keys: Keys, args: Any, kwargs: Any) -> list[Unit]:
        return trace_linen_on(module, invoke, values, keys, (args, kwargs), {})

    values = {at: x for at, x in _flat(variables).items() if at[0] not in TRANSIENT}
    parameters = frozenset(at for at, x in values.items() if at[0] == "params" and is_inexact(x))
    if is_wrapper:
        words = f"ToLinen({getattr(module.nnx_class, '__name__', module.nnx_class)})"
    else:
        words = f"Linen {type(module).__name__}"
    return Subject(words, "linen", values, parameters, run, listened, units)


def _flat(variables: Mapping[str, Any]) -> dict[Location, Any]:
    return {at: meta.unbox(x) for at, x in leaves(variables) if x is not EMPTY}


def _is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith(("_", "<", "setup"))


# ---- NNX ----


def _nnx(module: nnx.Module, method: Method) -> Subject:
    graphdef, state = nnx.split(_without_sown(module))
    start = nnx.to_flat_state(state)
    given = {_location(path, x): _raw(x) for path, x in start if not isinstance(x, nnx.RngState)}

    def merged(values: Values, keys: Keys) -> nnx.Module:
        flat = {path: _with_value(x, values.get(_location(path, x), _raw(x))) for path, x in start}
        model: nnx.Module = nnx.merge(graphdef, nnx.State.from_flat_path(flat))
        if keys:
            _reseed(model, keys)
        return model

    def run(values: Values, keys: Keys, args: Any, kwargs: Any) -> tuple[Any, Values]:
        model = merged(values, keys)
        before = _Before(model)
        output = _invoke(model, method, keys, args, kwargs)
        return output, _written(model, values, given) | before.changes(model)

    def listened(values: Values, keys: Keys, args: Any, kwargs: Any, listener: Listener) -> tuple[Any, Values]:
        model = merged(values, keys)
        with _Calls(model, listener).watching(model):
            return _invoke(model, method, keys, args, kwargs), {}

    def units(keys: Keys, args: Any, kwargs: Any) -> list[Unit]:
        def call(model: nnx.Module, args: Any, kwargs: Any) -> Any:
            return _invoke(model, method, keys, args, kwargs)

        return trace_nnx(merged(given, None), call, (args, kwargs), {})

    parameters = [_location(path, x) for path, x in start if isinstance(x, nnx.Param) and is_inexact(_raw(x))]
    kind = made_kind(module)
    words = f"NNX {kind.__name__}" if kind is type(module) else f"flax.nnx {kind.__name__}"
    if isinstance(module, ToNNX):
        words = f"ToNNX({type(module.module).__name__})"
    is_native = not isinstance(module, ToNNX) and kind is type(module)
    return Subject(words, "nnx", given, frozenset(parameters), run, listened, units, is_native)


def _invoke(model: nnx.Module, method: Method, keys: Keys, args: Any, kwargs: Any) -> Any:
    # In front of a class that is watched there is another one.
    if plain_class(type(model)).__call__ is ToNNX.__call__:
        chosen = None if method == "__call__" else method
        return model(*args, rngs=keys, method=chosen, mutable=_WRITABLE, **kwargs)
    return getattr(model, method)(*args, **kwargs) if isinstance(method, str) else method(model, *args, **kwargs)


def _without_sown(module: nnx.Module) -> nnx.Module:
    module = nnx.clone(module)
    nnx.pop(module, (nnx.Intermediate, nnx.Perturbation))
    return module


def _written(model: nnx.Module, values: Values, given: Iterable[Location]) -> dict[Location, Any]:
    """State after a call, None where it is gone, and parameters only where another array is in them."""
    written: dict[Location, Any] = {}
    gone = set(given)
    for path, x in nnx.to_flat_state(nnx.split(model)[1]):
        if isinstance(x, nnx.RngState | nnx.Perturbation):
            continue
        location, value = _location(path, x), _raw(x)
        gone.discard(location)
        if not isinstance(x, nnx.Param) or value is not values.get(location):
            written[location] = value
    return written | dict.fromkeys(gone)


class _Before:
    """A model's attributes and random streams before a call."""

    def __init__(self, model: nnx.Module):
        self._attributes, self._paths = _attributes(model)
        self._taken = _taken(model)

    def changes(self, model: nnx.Module) -> dict[Location, Any]:
        """Attributes with another value, and how many keys were taken from the streams of each name."""
        after, paths = _attributes(model)
        changes: dict[Location, Any] = {}
        for path in self._attributes.keys() - paths:
            changes[ATTRIBUTES, *path] = "nothing"
        for path, x in after.items():
            is_new = path not in self._paths  # what stands for a Variable is told of as state that is gone
            if is_new or (path in self._attributes and not _is_same(x, self._attributes[path])):
                changes[ATTRIBUTES, *path] = x
        for tag, count in _taken(model).items():
            changes[DRAWS, tag] = count - self._taken.get(tag, 0)
        return changes


def _attributes(model: nnx.Module) -> tuple[dict[Path, Any], set[Path]]:
    """What is no state, by path; and all paths that there are."""
    attributes: dict[Path, Any] = {}
    paths: set[Path] = set()
    for keys, x in nnx.iter_graph(model):
        path = tuple(map(str, keys))
        paths.add(path)
        if not (is_array(x) or isinstance(x, nnx.Variable | nnx.Object | Mapping | list)):
            attributes[path] = x
    return attributes, paths


def _is_same(x: Any, y: Any) -> bool:
    try:
        return x is y or (type(x) is type(y) and bool(x == y))
    except Exception:  # noqa: BLE001  whatever a class of the user's makes of `==`: it is another object
        return False


def _taken(model: nnx.Module) -> dict[str, Any]:
    """Keys taken so far, by the name of the stream."""
    counts: dict[str, Any] = {}
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.RngStream):
            counts[x.tag] = counts.get(x.tag, 0) + x.count.get_value().sum()
    return counts


def _location(path: Any, x: Any) -> Location:
    """Of a Variable as Linen has it; of an array that is an attribute as ToLinen has it."""
    return location_of(path, x) if isinstance(x, nnx.Variable) else ("arrays", *map(str, path))


def _raw(x: Any) -> Any:
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x


def _with_value(x: Any, value: Any) -> Any:
    return x.replace(value) if isinstance(x, nnx.Variable) else value


def _reseed(model: nnx.Module, keys: Mapping[str, Any]) -> None:
    """Every stream gets the key of its name, or that of `params`, where Linen looks too, or the only one there is."""
    tags = {x.tag for _, x in nnx.iter_graph(model) if isinstance(x, nnx.RngStream)}
    other = keys.get("params", next(iter(keys.values())) if len(keys) == 1 else None)
    chosen = {tag: keys.get(tag, other) for tag in tags}
    known = {tag: key for tag, key in chosen.items() if key is not None}
    nnx.reseed(model, policy="match_shape", **known)


class _Calls(Recorder):
    """Tells a Listener of the calls of a model's objects, and of Linen modules in wrapped ones."""

    def __init__(self, model: nnx.Module, listener: Listener):
        super().__init__(census(model), count=False)
        self._listener = listener

    def record(self, index: int, name: str, method: Any, args: Any, kwargs: Any, part: Any = None) -> Any:
        info = self.infos[index]
        path, kind = (info.path, info.kind) if part is None else ((*info.path, *part[0]), part[1])
        layer, run = args[0], method
        if not _is_public(name) or not issubclass(kind, nnx.Module | nn.Module):
            return method(*args, **kwargs)

        def call(*rest: Any, **keywords: Any) -> Any:
            return run(layer, *rest, **keywords)

        called = Layer(tuple(map(str, path)), kind, layer, name)
        return self._listener.call(called, call, args[1:], kwargs)


# ---- functions ----


def _function(function: Callable[..., Any]) -> Subject:
    def run(values: Values, keys: Keys, args: Any, kwargs: Any) -> tuple[Any, Values]:
        return function(*args, **kwargs), {}

    def listened(values: Values, keys: Keys, args: Any, kwargs: Any, listener: Listener) -> tuple[Any, Values]:
        return run(values, keys, args, kwargs)

    def units(keys: Keys, args: Any, kwargs: Any) -> list[Unit]:
        return []

    name = getattr(function, "__name__", type(function).__name__)
    return Subject(f"function {name}", "function", {}, frozenset(), run, listened, units)
