"""capture: what modules sow, as a result instead of an attribute.

Law: `capture(f, ...)(model, x)[0]` and its effects on `model` are those of `f(model, x)`, except that nothing is
sown into `model`: a call runs on copies (`replay`) whose modules put sown values aside, under names that no
attribute has, so they pass through transforms inside of f like all state.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nnx_core._errors import Path, StateMismatchError
from nnx_core.graph.objects import Object
from nnx_core.graph.replay import replay
from nnx_core.kinds import Perturbation
from nnx_core.module import Dict, List, Module, iter_modules, variable_class
from nnx_core.state import State, iter_leaves
from nnx_core.variables import Variable

_ASIDE = "captured:"  # no identifier: no attribute of a user's has such a name
Kinds = tuple[type[Variable[Any]], ...]


class _Recording:
    """In front of a module's class: puts what is sown aside."""

    __slots__ = ()
    _nnx_plain: type
    _nnx_kinds: Kinds

    def __init_subclass__(cls, **kwargs: Any):
        # Not the user's own __init_subclass__, which may want arguments or keep a list of classes.
        Object.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]  # a classmethod has it

    def sow(self, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        if not _wanted(self, variable_type, name):
            return False
        return Module.sow(self, variable_type, _ASIDE + name, value, *args, **kwargs)  # type: ignore[arg-type]  # a Module

    def perturb(self, name: str, value: Any, variable_type: Any = Perturbation) -> Any:
        if not _wanted(self, variable_type, name):
            return value
        return Module.perturb(self, _ASIDE + name, value, variable_type)  # type: ignore[arg-type]  # a Module


def _wanted(module: Any, kind: Any, name: str) -> bool:
    return variable_class(kind) in module._nnx_kinds or _ASIDE + name in vars(module)


def _sowing(name: str, method: Callable[..., Any], kind: type[Variable[Any]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        Module.sow(self, kind, _ASIDE + name, output)
        return output

    return call


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods and `__call__` of a class that are not nnx.Module's own, each as the class would call it."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if issubclass(base, Module) and base not in (Module, List, Dict):
            names |= dict.fromkeys(n for n, f in vars(base).items() if inspect.isfunction(f))
    for name in names:
        if name == "__call__" or not name.startswith("_"):
            yield name, getattr(cls, name)


@functools.lru_cache(maxsize=1024)  # the same class for the same question, or every call would compile anew
def _recording_class(cls: type, kinds: Kinds, outputs: type[Variable[Any]] | None) -> type:
    members: dict[str, Any] = {
        "__slots__": (),
        "_nnx_plain": cls,
        "_nnx_kinds": kinds,
        "__qualname__": cls.__qualname__,
    }
    members["__module__"] = cls.__module__
    if outputs is not None:
        members |= {name: _sowing(name, method, outputs) for name, method in _methods(cls)}
    return type(cls)(cls.__name__, (_Recording, cls), members)


def _set_class(module: Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # not an attribute: nothing to mark or count


def _begin(root: Any, kinds: Kinds, outputs: type[Variable[Any]] | None, init: Mapping[Any, Any] | None) -> None:
    modules = dict(iter_modules(root))
    for module in modules.values():
        _set_class(module, _recording_class(type(module), kinds, outputs))
    values = dict(iter_leaves(init)) if init is not None else {}
    if lost := [path for path in values if path[:-1] not in modules]:
        raise StateMismatchError(unexpected=lost)
    for path, x in values.items():
        made = type(x)(x.get_raw_value(), **x.get_metadata()) if isinstance(x, Variable) else Perturbation(x)
        setattr(modules[path[:-1]], _ASIDE + str(path[-1]), made)


def _end(root: Any, everything: Any) -> list[tuple[Path, Variable[Any]]]:
    """Take out of `root` what was put aside, and give all modules their own class back."""
    found: list[tuple[Path, Variable[Any]]] = []
    for path, module in list(iter_modules(root)):
        for key in [k for k in {**vars(module), **module._nnx_items()} if str(k).startswith(_ASIDE)]:
            found.append(((*path, key.removeprefix(_ASIDE)), getattr(module, key)))
            delattr(module, key)
    for _, module in iter_modules(everything):
        if isinstance(module, _Recording):
            _set_class(module, module._nnx_plain)
    return found


def capture(
    fn: Any,
    *var_types: type[Variable[Any]],
    init: State | None = None,
    method_outputs: type[Variable[Any]] | None = None,
) -> Any:
    """`fn` that returns what its module sows, and leaves the module without it.

    Args:
      fn: a module, a method of one, or a function whose first argument is a module (or a pytree of modules);
        without it (a Variable type comes first), a decorator.
      *var_types: the types of Variables to return; what is sown into others is dropped.
      init: what Variables start from: `perturb` adds the Perturbations in it.
      method_outputs: sow the output of each method of each module, under the method's name, into this type.

    Returns:
      A function that returns (result, State, ...), one State a type; the result alone if there are no types.
      With `method_outputs` and no types, the State of that type.

    Raises:
      TypeError: if `fn` cannot be called or a type is no Variable type.
      StateMismatchError: listing the paths in `init` where there is no module.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> class Model(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "features", x * 2)
      ...         return x
      >>> model = Model()
      >>> y, sown = capture(model, nnx.Intermediate)(jnp.ones(2))
      >>> sown
      State({'features': Intermediate((Array([2., 2.], dtype=float32),))})
      >>> hasattr(model, "features")
      False
    """
    if isinstance(fn, type) and issubclass(fn, Variable):
        return lambda f: capture(f, fn, *var_types, init=init, method_outputs=method_outputs)
    if not callable(fn):
        raise TypeError(f"nnx.capture needs a module, a method or a function, found {type(fn).__name__}.")
    for kind in (*var_types, *([] if method_outputs is None else [method_outputs])):
        if not (isinstance(kind, type) and issubclass(kind, Variable)):
            raise TypeError(f"nnx.capture needs Variable types, such as nnx.Intermediate; found {kind!r}.")
    kinds = var_types or (() if method_outputs is None else (method_outputs,))
    f, owner = _free(fn)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        root = args[0] if args else next(iter(kwargs.values()), None)
        _begin(root, kinds, method_outputs, init)
        out = f(*args, **kwargs)
        found = _end(root, (args, kwargs, out))
        return out, *(State((path, v) for path, v in found if type(v) is kind) for kind in kinds)

    def call(*args: Any, **kwargs: Any) -> Any:
        out, *states = replay(recorded, (*owner, *args), kwargs)
        return (out, *states) if states else out

    return functools.update_wrapper(call, fn if hasattr(fn, "__name__") else type(fn))


def _free(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, ()) or, for a module or a method of one, a function of that module, and the module."""
    if isinstance(fn, Module):
        return lambda module, *args, **kwargs: module(*args, **kwargs), (fn,)
    owner = getattr(fn, "__self__", None)
    if inspect.ismethod(fn) and isinstance(owner, Module):
        name = fn.__name__
        return lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs), (owner,)
    return fn, ()
