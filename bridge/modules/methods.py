"""Methods and constructors of bridge modules, seen while they run.

Law: a method of a bound module is one run on the stack while it lasts; a module that is made meanwhile is the running
one's to name, unless it says that it has no parent.
Knows runs of methods; knows nothing of variables, nor of what a submodule is made of.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import flax.errors

from bridge._errors import UnboundModuleError
from bridge.modules.scope import ModuleStackEntry, current_context, running

F = TypeVar("F", bound=Callable[..., Any])


def compact(f: F) -> F:
    """A method that makes submodules where it uses them; they are named `Class_0`, `Class_1`, or by `name=`.

    Raises:
      UnboundModuleError: (the method) outside `init`, `apply` and `bind`.

    >>> import jax, jax.numpy as jnp, nnx_core as nnx
    >>> from bridge import Module
    >>> class Dense(Module):
    ...     features: int
    ...
    ...     @compact
    ...     def __call__(self, x):
    ...         return x @ self.param("kernel", nnx.initializers.lecun_normal(), (x.shape[-1], self.features))
    >>> class MLP(Module):
    ...     @compact
    ...     def __call__(self, x):
    ...         x = nnx.relu(Dense(3)(x))
    ...         return Dense(2)(x)
    >>> jax.tree.map(jnp.shape, MLP().init(0, jnp.ones((1, 4))))
    {'params': {'Dense_0': {'kernel': (4, 3)}, 'Dense_1': {'kernel': (3, 2)}}}
    """

    @functools.wraps(f)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None:
            raise UnboundModuleError(type(self), f"a call of {f.__name__!r}")
        with running(ModuleStackEntry(self, in_compact=True, method=f.__qualname__)):
            return f(self, *args, **kwargs)

    method._bridge_wrapped = True  # type: ignore[attr-defined]
    return method  # type: ignore[return-value]  # the signature is the same


def note_methods(cls: type) -> None:
    """Let the methods that a class defines be found out to be running; a compact one is already."""
    for name, f in list(vars(cls).items()):
        is_method = name == "__call__" or not name.startswith("__")
        is_plain = inspect.isfunction(f) and not hasattr(f, "_bridge_wrapped")
        # `setup` is run by the module itself, in an entry of its own.
        if is_method and is_plain and name != "setup":
            setattr(cls, name, _noted(f))


def _noted(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "scope", None) is None:
            return f(self, *args, **kwargs)
        with running(ModuleStackEntry(self, in_compact=False, method=f.__qualname__)):
            return f(self, *args, **kwargs)

    method._bridge_wrapped = True  # type: ignore[attr-defined]
    return method


def method_of(method: Any) -> Callable[..., Any]:
    """A function of (module, *args, **kwargs) from a name, a method or a function.

    Raises:
      ApplyModuleInvalidMethodError: (flax.errors) if it is none of them.
    """
    if isinstance(method, str):
        return lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)
    if inspect.ismethod(method):
        return method.__func__
    if not callable(method):
        raise flax.errors.ApplyModuleInvalidMethodError(method)
    return method


class ModuleMeta(type):
    """The type of bridge modules: one made in a compact method becomes a submodule of the one that is running."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module; inside another, `name=` is its name there, and `parent=None` leaves it on its own."""
        entry = current_context()
        name, parent = None, ...
        if entry is not None:
            # A class that takes them itself gets them.
            own = inspect.signature(cls.__init__).parameters
            name = None if "name" in own else kwargs.pop("name", None)
            parent = ... if "parent" in own else kwargs.pop("parent", ...)
        module = super().__call__(*args, **kwargs)
        for key, default in (("scope", None), ("attr_priorities", {})):
            if key not in module.__dict__:
                object.__setattr__(module, key, default)
        if entry is None or parent is None:
            return module
        entry.created.append(module)
        if entry.in_compact or name is not None:
            return entry.module._attach(entry, name or entry.automatic_name(cls), module)
        return module
