"""capture: what modules sow, as a result instead of an attribute.

Law: `capture(f, ...)(model, x)[0]` and its effects on `model` are those of `f(model, x)`, except that nothing is
sown into `model`: a call runs on copies (`replay`) whose modules put sown values aside, under names that no
attribute has, so they pass through transforms inside of f like all state.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nnx_core._errors import Path, StateMismatchError
from nnx_core.graph.replay import replay
from nnx_core.graph.watched import Method, Watched, plain_class, set_class, watched_class
from nnx_core.kinds import Perturbation
from nnx_core.module import Module, iter_modules, variable_class
from nnx_core.state import State, iter_leaves
from nnx_core.variables import Variable

#: Before the name of what is put aside, once for each capture around: no attribute of a user's has such a name.
_ASIDE = "captured:"
Kinds = tuple[type[Variable[Any]], ...]


class _Recording(Watched):
    """In front of a module's class: puts what is sown aside."""

    __slots__ = ()
    _nnx_kinds: Kinds
    _nnx_aside: str

    def sow(self, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        if not _wanted(self, variable_type, name):
            return False
        aside = self._nnx_aside + name
        kwargs["capture_noop"] = False  # here is the capture that it asks for
        return Module.sow(self, variable_type, aside, value, *args[:2], **kwargs)  # type: ignore[arg-type]  # a Module

    def perturb(self, name: str, value: Any, variable_type: Any = Perturbation, capture_noop: Any = None) -> Any:
        if not _wanted(self, variable_type, name):
            return value
        aside = self._nnx_aside + name
        return Module.perturb(self, aside, value, variable_type, False)  # type: ignore[arg-type]  # a Module


def _wanted(module: Any, kind: Any, name: str) -> bool:
    return variable_class(kind) in module._nnx_kinds or module._nnx_aside + name in vars(module)


def _sowing(kind: type[Variable[Any]], aside: str, name: str, method: Method) -> Method:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        Module.sow(self, kind, aside + name, output, capture_noop=False)
        return output

    return call


@functools.lru_cache(maxsize=1024)  # the same class for the same question, or every call would compile anew
def _recording_class(cls: type, kinds: Kinds, outputs: type[Variable[Any]] | None) -> type:
    aside = _aside(cls) + _ASIDE
    sowing = None if outputs is None else functools.partial(_sowing, outputs, aside)
    return watched_class(cls, sowing, _Recording, _nnx_kinds=kinds, _nnx_aside=aside)


def _aside(cls: type) -> str:
    """What stands before the names of what the innermost capture puts aside; nothing if there is none."""
    return cls._nnx_aside if issubclass(cls, _Recording) else ""


def _begin(root: Any, kinds: Kinds, outputs: type[Variable[Any]] | None, init: Mapping[Any, Any] | None) -> None:
    modules = dict(iter_modules(root))
    for module in modules.values():
        set_class(module, _recording_class(type(module), kinds, outputs))
    values = dict(iter_leaves(init)) if init is not None else {}
    if lost := [path for path in values if path[:-1] not in modules]:
        raise StateMismatchError(unexpected=lost)
    for path, x in values.items():
        # A Variable of our own: the caller's must not see what the call writes.
        start = type(x)(x.get_raw_value(), **x.get_metadata()) if isinstance(x, Variable) else Perturbation(x)
        module = modules[path[:-1]]
        setattr(module, _aside(type(module)) + str(path[-1]), start)


def _end(root: Any, everything: Any) -> list[tuple[Path, Variable[Any]]]:
    """Take out of `root` what was put aside, and give all modules their own class back."""
    captured: list[tuple[Path, Variable[Any]]] = []
    for path, module in list(iter_modules(root)):
        aside = _aside(type(module))
        if not aside:  # made by the call
            continue
        names = {**vars(module), **module._nnx_items()}  # containers keep attributes and items apart
        for name in [name for name in names if str(name).startswith(aside)]:
            captured.append(((*path, name.removeprefix(aside)), getattr(module, name)))
            delattr(module, name)
    for _, module in iter_modules(everything):
        set_class(module, plain_class(type(module), _Recording))
    return captured


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
        captured = _end(root, (args, kwargs, out))
        return out, *(_of_kind(kind, captured) for kind in kinds)

    def call(*args: Any, **kwargs: Any) -> Any:
        out, *states = replay(recorded, (*owner, *args), kwargs)
        return (out, *states) if states else out

    return functools.update_wrapper(call, fn if hasattr(fn, "__name__") else type(fn))


def _of_kind(kind: type[Variable[Any]], captured: list[tuple[Path, Variable[Any]]]) -> State:
    return State((path, variable) for path, variable in captured if type(variable) is kind)


def _free(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, ()), or for a module or a method of one: a function of that module, and the module."""
    if isinstance(fn, Module):
        return lambda module, *args, **kwargs: module(*args, **kwargs), (fn,)
    owner = getattr(fn, "__self__", None)
    if inspect.ismethod(fn) and isinstance(owner, Module):
        name = fn.__name__
        return lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs), (owner,)
    return fn, ()
