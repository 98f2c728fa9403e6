"""What a wrapped Linen module has besides variables and fields: submodules and values that `setup` makes.

Law: what is read is what Linen's bound module says with the variables of now; nothing is written by reading, and no
bound module gets out. A submodule is named by its path of Linen names, from the wrapper on.
Knows Linen modules, and wrappers as what calls them and has their variables; knows nothing of the object graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import flax.errors
from flax import linen as nn

import nnx_core as nnx
from bridge._types import Location, Path
from bridge.linen_in_nnx._errors import SubmoduleAccessError
from bridge.linen_in_nnx.config import modules_in
from nnx_core.inspect.recording import part_recorder

#: Attributes of a Linen module that say where it is bound; they do not leave it.
BOUND = ("name", "parent", "scope", "_state", "_parent_ref", "_id")


class Wrapper(Protocol):
    """What is needed of a wrapped Linen module to look into it."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""

    def _nnx_at(self, path: Path) -> Any:
        """The submodule at `path`: itself, its variables, or a view where it has none."""

    def _nnx_variable_at(self, location: Location) -> nnx.Variable[Any]:
        """The Variable at a location."""

    def _nnx_linen_variables(self) -> dict[str, Any]:
        """Linen's variables dict, with the values of now."""


class Submodule:
    """A submodule of a wrapped Linen module that has no variables: its fields can be read, and it can be called.

    Args:
      wrapper: the ToNNX.
      path: names from the wrapped module on.

    >>> from flax import linen as nn
    >>> from bridge import ToNNX
    >>> class Model(nn.Module):
    ...     def setup(self):
    ...         self.drop = nn.Dropout(0.5, deterministic=True)
    >>> model = ToNNX(Model())
    >>> model.drop, model.drop.rate, model.drop(3.0)
    (Submodule(drop: Dropout), 0.5, 3.0)
    """

    __slots__ = ("_path", "_wrapper")

    def __init__(self, wrapper: Wrapper, path: Path):
        self._wrapper, self._path = wrapper, path

    def __call__(self, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        """Call the submodule, or its method of this name; further keywords as for ToNNX.

        Raises:
          SubmoduleAccessError: if it exists only while its parent's compact method runs.
        """
        return self._wrapper(*args, method=method_at(self._path, method), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Submodule.__slots__:
            raise AttributeError(name)
        here = self._wrapper._nnx_at(self._path)
        if isinstance(here, Submodule):
            return look(self._wrapper, self._path, name)
        return getattr(here, name)  # it has variables by now

    def _nnx_place(self) -> tuple[Wrapper, Path]:
        return self._wrapper, self._path

    def __repr__(self) -> str:
        def kind(module: nn.Module) -> str:
            return type(submodule_at(module, self._path)).__name__

        name = nn.Module.apply(self._wrapper.module, self._wrapper._nnx_linen_variables(), method=kind)
        return f"Submodule({'.'.join(self._path)}: {name})"


def method_at(path: Path, name: str | None) -> Callable[..., Any]:
    """A function of the wrapped module, bound, that calls the submodule at `path`, or its method `name`."""

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if name is None and (own_method := _method_at(module, path)) is not None:
            return own_method(*args, **kwargs)
        submodule: Any = submodule_at(module, path)
        return (submodule if name is None else getattr(submodule, name))(*args, **kwargs)

    return call


def _method_at(module: nn.Module, path: Path) -> Callable[..., Any] | None:
    """The method that stands at `path`, where a submodule has the same name: what Linen's instance answers."""
    *above, name = path
    try:
        owner = submodule_at(module, tuple(above))
    except SubmoduleAccessError:
        return None
    nn.Module.__dir__(owner)  # makes Linen run `setup`
    attribute = None if of_class(type(owner), name) is None else getattr(owner, name, None)
    return attribute if inspect.ismethod(attribute) and attribute.__self__ is owner else None


def submodule_at(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at `path` of a bound module.

    Raises:
      SubmoduleAccessError: if there is none outside of a compact method.
    """
    return functools.reduce(functools.partial(_child, path), path, module)


def _child(path: Path, module: nn.Module, name: str) -> nn.Module:
    attribute = getattr(module, name, None)  # asking makes Linen run `setup`, unless it is a field
    if isinstance(attribute, nn.Module) and attribute.name == name:
        return attribute
    nn.Module.__dir__(module)  # makes Linen run `setup`
    # Its name may be another than the attribute's: `layers_0` in a list. `_state` and `parent` are Linen's own.
    attributes = {key: getattr(module, key) for key in vars(module) if key not in ("parent", "_state")}
    for child in modules_in(attributes):
        if child.name == name:
            return child
    raise SubmoduleAccessError(type(module).__name__, path)


def holds_modules(x: Any) -> bool:
    """Whether `x` is a Linen module, or a list, tuple or mapping with one inside."""
    return next(modules_in(x), None) is not None


def has_setup(module: nn.Module) -> bool:
    """Whether the class of `module` has a `setup` of its own."""
    return inspect.getattr_static(type(module), "setup") is not inspect.getattr_static(nn.Module, "setup")


def has_getattr(module: nn.Module) -> bool:
    """Whether the class of `module` answers for attributes that it has not."""
    return inspect.getattr_static(type(module), "__getattr__") is not inspect.getattr_static(nn.Module, "__getattr__")


def of_class(kind: type[nn.Module], name: str) -> Any:
    """What the class of a Linen module adds to `nn.Module` by this name; None if nothing."""
    attribute = inspect.getattr_static(kind, name, None)
    if name in BOUND or attribute is inspect.getattr_static(nn.Module, name, None):
        return None
    return attribute


def look(wrapper: Wrapper, path: Path, name: str) -> Any:
    """The attribute `name` of the submodule at `path`: submodules as views, methods as functions of the wrapper.

    Raises:
      AttributeError: if it has none, or none before its variables are made.
    """
    if name in BOUND or inspect.getattr_static(nn.Module, name, None) is not None:
        raise AttributeError(f"{name!r} is of flax.linen.Module itself: see {'.'.join(('module', *path))}.")

    def read(module: nn.Module) -> Any:
        return _outside(getattr(submodule_at(module, path), name), wrapper)

    try:
        return nn.Module.apply(wrapper.module, wrapper._nnx_linen_variables(), method=read)
    except flax.errors.FlaxError as error:
        raise AttributeError(f"{'.'.join((*path, name))} of {type(wrapper.module).__name__}: {error}") from error


def _outside(x: Any, wrapper: Wrapper) -> Any:
    """`x`, found in a bound module, as it can leave it."""
    if isinstance(x, nn.Module):
        return wrapper._nnx_at(x.path) if x.scope is not None else x
    if isinstance(x, nn.Variable):
        return wrapper._nnx_variable_at((x.collection, *x.scope.path, x.name))
    if isinstance(x, Mapping):
        return {key: _outside(child, wrapper) for key, child in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_outside(child, wrapper) for child in x))
    if isinstance(x, list | tuple):
        return type(x)(_outside(child, wrapper) for child in x)
    if inspect.ismethod(x) and isinstance(x.__self__, nn.Module):
        return functools.partial(wrapper._nnx_at(x.__self__.path), method=x.__name__)
    return x


# ---- what tabulate shows of it ----

# Whose Linen module is running, for `nnx.tabulate`.
_shown: ContextVar[Any] = ContextVar("bridge_shown", default=None)


def reported(wrapper: nnx.Object) -> AbstractContextManager[Any]:
    """While the Linen module of `wrapper` runs in here, `nnx.tabulate` is told of the calls of its submodules."""
    record = part_recorder(wrapper) if wrapper._nnx_marks else None
    if record is None and _shown.get() is None:
        return nullcontext()
    return _reporting(wrapper, record)


@contextmanager
def _reporting(wrapper: nnx.Object, record: Callable[..., Any] | None) -> Iterator[None]:
    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        is_part = _shown.get() is wrapper and name != "setup" and module.path
        if record is None or not is_part:
            return method(*args, **kwargs)

        def run(_: Any, *args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return record(name, run, (module, *args), kwargs, (module.path, type(module)))

    token = _shown.set(wrapper)
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        _shown.reset(token)
