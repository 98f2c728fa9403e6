"""A class put in front of an object's class, so that calls of its public methods are seen.

`nnx.capture` sows what they return, `nnx.tabulate` writes them down, ToLinen shows them to Linen: one mechanism, and
one answer to what a public method is.

Law: to the code that runs in it, a watched object is what it was. `isinstance`, `super()`, the names of its class
and pickles say the user's class, and what is set on its class (`type(self).calls += 1`) is set on the user's. Nothing
of the user's runs when a class is watched: no `__init_subclass__`, which may want arguments, and no `__new__` of a
metaclass, which may keep a list of classes.
Knows classes and objects; knows neither modules nor who watches, or what for.
"""

import abc
import copyreg
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from nnx_core.graph.objects import Object

C = TypeVar("C", bound=type)
Method = Callable[..., Any]

#: Where classes come from whose methods are those of a list or a dict, or of no interest to anybody.
_FOREIGN = ("builtins", "typing", "collections.abc")
_unwatched: set[type] = {Object}


def unwatched(cls: C) -> C:
    """Say that the methods which this class defines are what all of its kind have: who watches is not told of them."""
    _unwatched.add(cls)
    return cls


def public_methods(cls: type) -> dict[str, Method]:
    """`__call__` and the public methods of a class, by name, as functions of (object, ...).

    A method is a function, or what binds as a function does, such as a jitted one; properties, static methods and
    class methods are none. It is public unless its name begins with `_`. Inherited ones count, mixins' too, but not
    those of classes that are `unwatched`.
    """
    defined: dict[str, tuple[type, Any]] = {}
    for base in cls.__mro__:
        for name, member in vars(base).items():
            defined.setdefault(name, (base, member))
    methods = {}
    for name, (base, member) in defined.items():
        is_public = name == "__call__" or not name.startswith("_")
        if is_public and _is_method(member) and base not in _unwatched and base.__module__ not in _FOREIGN:
            methods[name] = getattr(cls, name)
    return methods


def _is_method(member: Any) -> bool:
    binds = callable(member) and hasattr(type(member), "__get__")
    return binds and not isinstance(member, type | staticmethod | classmethod)


class Watched:
    """In front of an object's class. A front derived from this one adds what else is to be done differently."""

    __slots__ = ()
    _nnx_plain: type  # the class in front of which it is

    def __init_subclass__(cls, **kwargs: Any):
        if "_nnx_plain" in cls.__dict__:
            Object.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]  # a classmethod has it
        else:  # a front, or what the user derives from `type(self)` while it is watched
            super().__init_subclass__(**kwargs)


def watched_class(
    cls: type, wrap: Callable[[str, Method], Method] | None, front: type[Watched] = Watched, **attributes: Any
) -> type:
    """`cls`, its public methods wrapped.

    To be remembered by who asks: another class is another structure, and JAX keeps every class it is told of.

    Args:
      cls: a class derived from Object, watched by another or not.
      wrap: (name, method) -> the method to call instead; None wraps none.
      front: what stands in front of it.
      **attributes: attributes of the new class.
    """
    members: dict[str, Any] = {"__slots__": (), "_nnx_plain": cls, **attributes}
    for name in ("__module__", "__qualname__", "__doc__"):
        members[name] = getattr(cls, name)
    if wrap is not None:
        for name, method in public_methods(cls).items():
            members[name] = wrap(name, method)
    kind = _transparent(type(cls))
    # Not `kind(...)`: this is Python's own part of what a metaclass does, without the user's.
    make: Any = abc.ABCMeta.__new__ if issubclass(kind, abc.ABCMeta) else type.__new__
    bases = (cls,) if issubclass(cls, front) else (front, cls)  # watched once more: `front` is in there already
    made: type = make(kind, cls.__name__, bases, members)
    type.__setattr__(made, "_nnx_made", True)
    return made


@functools.cache
def _transparent(kind: type[type]) -> type[type]:
    """The metaclass `kind`, for classes that pass writes on, and that pickles know as the class behind them."""

    def target(cls: Any) -> Any:
        # ABCMeta writes on a class that it makes; and a user may derive from a class that is watched.
        return cls._nnx_plain if "_nnx_made" in cls.__dict__ else cls

    def reduced(cls: Any) -> Any:
        return (_itself, (cls._nnx_plain,)) if "_nnx_made" in cls.__dict__ else cls.__qualname__

    def set_on(cls: Any, name: str, value: Any) -> None:
        kind.__setattr__(target(cls), name, value)

    def delete_on(cls: Any, name: str) -> None:
        kind.__delattr__(target(cls), name)

    transparent = type(kind.__name__, (kind,), {"__setattr__": set_on, "__delattr__": delete_on})
    # pickle looks a class up under its name, and there it finds the user's.
    copyreg.pickle(transparent, reduced)
    return transparent


def _itself(cls: type) -> type:
    return cls


def plain_class(cls: type, front: type[Watched] = Watched) -> type:
    """The class behind `cls`, if it was put there by `front`; else `cls`."""
    return cls._nnx_plain if issubclass(cls, front) else cls


def set_class(x: Object, cls: type) -> None:
    """Give `x` another class, of the same layout. That is no attribute: nothing to mark, and no change to count."""
    object.__setattr__(x, "__class__", cls)
