"""A Linen module as configuration: compared by its fields, and its training flags found wherever they are.

Law: two are equal iff they wrap equal modules in the same way, whatever the fields hold (lists, dicts, arrays),
so a compiled function is found again; they are hashable and never change.
Knows Linen modules and their fields; knows nothing of variables or graphs.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from bridge.variables.hashable import fields_of, frozen

#: Flags of Linen modules that say whether they train, and what they say then.
WHEN_TRAINING = {"deterministic": False, "use_running_average": False, "train": True, "training": True}
_OF_NNX = ("deterministic", "use_running_average")  # what `train()` and `eval()` of NNX set


class Wrapped:
    """A Linen module and how it is wrapped; immutable and hashable, so that it can be part of the graph's structure.

    Args:
      module: the module, unbound.
      exact: whether it gets the keys of the streams themselves.
      defaults: arguments of calls that do not give them: flags that are no fields.
      key: under which key this object is in the graph.
      attributes: (key in the graph, name) of each plain attribute of the wrapper.
    """

    __slots__ = ("_frozen", "attributes", "defaults", "exact", "key", "module")

    def __init__(
        self,
        module: nn.Module,
        exact: bool = False,
        defaults: tuple[tuple[str, Any], ...] = (),
        key: str = "",
        attributes: tuple[tuple[str, str], ...] = (),
    ):
        self.module, self.exact, self.defaults = module, exact, defaults
        self.key, self.attributes = key, attributes
        self._frozen: Any = None

    def replace(self, **changes: Any) -> Wrapped:
        """One with other fields."""
        fields = ("module", "exact", "defaults", "key", "attributes")
        return Wrapped(**{**{name: getattr(self, name) for name in fields}, **changes})

    def _key(self) -> Any:
        if self._frozen is None:
            self._frozen = frozen((self.module, self.exact, self.defaults, self.key, self.attributes))
        return self._frozen

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Wrapped) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return Wrapped, (self.module, self.exact, self.defaults, self.key, self.attributes)

    def __repr__(self) -> str:
        return repr(self.module)

    # ---- calls ----

    def method(
        self, method: Callable[..., Any] | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What to call with the bound module, and keywords with the flags that the caller left open."""
        if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
            method = method.__func__
        run = method if callable(method) else _by_name(method)
        if self.defaults:
            target = method if callable(method) else getattr(type(self.module), method or "__call__")
            kwargs = {**_open_flags(target, self.defaults, args, kwargs), **kwargs}
        return run, kwargs

    # ---- flags: fields of the module or of modules in its fields, and arguments of `__call__` ----

    def has(self, name: str) -> bool:
        """Whether `name` is a field, or a training flag that something stands for."""
        return self._is_field(name) or bool(self._targets(name))

    def get(self, name: str) -> Any:
        """The value of the field or flag `name`; None for one that was never set."""
        for target, is_same in self._targets(name):
            value = dict(self.defaults).get(target, _flag_in(self.module, target))
            if value is not None:
                return value if is_same else not value
        return getattr(self.module, name, None) if self._is_field(name) else None

    def set(self, name: str, value: Any) -> Wrapped:
        """With the field or flag `name` set, wherever it is."""
        wrapped = self
        for target, is_same in self._targets(name) or [(name, True)]:
            wrapped = wrapped._set_one(target, value if is_same or value is None else not value)
        # `train()` of a container sets one of NNX's flags after the other; once both agree it is a mode.
        if name in _OF_NNX and all(self._knows(flag) and wrapped.get(flag) is value for flag in _OF_NNX):
            for flag in filter(self._knows, ("train", "training")):
                wrapped = wrapped._set_one(flag, not value)
        return wrapped

    def _set_one(self, name: str, value: Any) -> Wrapped:
        # A flag that may come with each call stays one, where the constructor left it open: modules such as
        # nn.BatchNorm refuse to be told twice.
        if name in _call_parameters(self.module) and _flag_in(self.module, name) is None:
            return self.replace(defaults=tuple({**dict(self.defaults), name: value}.items()))
        return self.replace(module=_with_field(self.module, name, value))

    def _is_field(self, name: str) -> bool:
        return name != "name" and name in _field_names(self.module)

    def _targets(self, name: str) -> list[tuple[str, bool]]:
        """Which flags stand for the flag `name`, and whether they mean the same or the opposite."""
        if name not in WHEN_TRAINING:
            return []
        if self._knows(name):
            return [(name, True)]
        if name not in _OF_NNX:
            return []
        return [(flag, False) for flag in ("train", "training") if self._knows(flag)]

    def _knows(self, flag: str) -> bool:
        if flag in _call_parameters(self.module):
            return True
        return any(flag in _field_names(part) for part in _all_modules(self.module))


def _field_names(module: nn.Module) -> set[str]:
    return {field.name for field in fields_of(module)}


def _call_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    method = inspect.getattr_static(type(module), "__call__", None)
    return inspect.signature(method).parameters if inspect.isfunction(method) else {}


@functools.cache
def _by_name(method: str | None) -> Callable[..., Any]:
    # One function for each name: JAX and Linen remember what they made of a function by the object.
    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return (module if method is None else getattr(module, method))(*args, **kwargs)

    return call


def unpacking(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with its arguments as a tuple and a dict, so that no keyword is taken for one of `nn.Module.apply`."""

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return method(module, *args, **kwargs)

    return call


def _open_flags(
    method: Callable[..., Any], defaults: tuple[tuple[str, Any], ...], args: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Those of `defaults` that `method` takes and this call does not give."""
    signature = inspect.signature(method)
    arguments = signature.bind_partial(None, *args, **kwargs).arguments
    return {name: x for name, x in defaults if name in signature.parameters and name not in arguments}


def modules_in(x: Any) -> Iterator[nn.Module]:
    """The Linen module that `x` is, or those that it holds as a list, tuple or mapping."""
    if isinstance(x, nn.Module):
        yield x
    elif isinstance(x, Mapping):
        for child in x.values():
            yield from modules_in(child)
    elif isinstance(x, list | tuple):
        for child in x:
            yield from modules_in(child)


def _all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and every Linen module in its fields, however deep."""
    yield module
    for field in fields_of(module):
        for child in modules_in(getattr(module, field.name)):
            yield from _all_modules(child)


def _flag_in(module: nn.Module, flag: str) -> Any:
    for part in _all_modules(module):
        value = getattr(part, flag, None)
        if value is not None and not callable(value):
            return value
    return None


def _with_field(x: Any, name: str, value: Any) -> Any:
    """A copy of `x` with the field `name` set in every module that has it; `x` itself where none has."""
    # By identity: what holds no such module stays the very object, so that a field nobody set is not cloned.
    if isinstance(x, nn.Module):
        changes = {}
        for field in fields_of(x):
            old = getattr(x, field.name)
            new = value if field.name == name else _with_field(old, name, value)
            if new is not old:
                changes[field.name] = new
        return x.clone(**changes) if changes else x
    if isinstance(x, Mapping):
        children = {key: _with_field(child, name, value) for key, child in x.items()}
        if all(map(operator.is_, children.values(), x.values())):
            return x
        return type(x)(children)
    if isinstance(x, list | tuple):
        items = [_with_field(child, name, value) for child in x]
        if all(map(operator.is_, items, x)):
            return x
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
