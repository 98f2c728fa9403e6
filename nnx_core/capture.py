"""capture: what modules sow, as a result instead of an attribute.

Law: `capture(f, ...)(model, x)[0]` and its effects on `model` are those of `f(model, x)`, except that nothing is
sown into `model`: a call runs on copies (`replay`) whose modules have an attribute `__captures__` (flax.nnx's name),
one Variable for each type that is captured, which holds a dict of what was sown or perturbed by name. These Variables
are there before f begins, so what is sown is a value and no change of structure: it passes through transforms, split
and merge inside of f like all state.
"""

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from nnx_core._errors import Path, StateMismatchError
from nnx_core._foreign import require_own
from nnx_core._repr import show_fields
from nnx_core.graph.containers import DictStorage, ListStorage
from nnx_core.graph.objects import Object
from nnx_core.graph.replay import replay
from nnx_core.graph.watched import Method, Watched, plain_class, set_class, watched_class
from nnx_core.kinds import Perturbation
from nnx_core.module import Module, iter_modules, variable_class
from nnx_core.state import State, iter_leaves
from nnx_core.variables import Variable, new_variable

_CAPTURES = "__captures__"
Kinds = tuple[type[Variable[Any]], ...]
Captures = tuple[Variable[Any], ...]


class _Recording(Watched):
    """In front of a module's class: puts what is sown aside.

    One capture may run inside of another. Each has a front of its own, in front of the other's; that of the inner one
    has `__captures__`, and the outer's are kept under another name until it has ended.
    """

    __slots__ = ()
    _nnx_kinds: Kinds
    _nnx_depth: int

    def sow(
        self,
        variable_type: Any,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = lambda xs, x: (*xs, x),
        init_fn: Callable[[], Any] = lambda: (),
        capture_noop: bool | None = None,  # here is the capture that it asks for
    ) -> bool:
        captured = _captured(self, variable_class(variable_type))
        if captured is None:
            return False
        values = captured.get_raw_value()
        before = values[name] if name in values else init_fn()
        captured.set_raw_value({**values, name: reduce_fn(before, value)})
        return True

    def perturb(
        self, name: str, value: Any, variable_type: Any = Perturbation, capture_noop: bool | None = None
    ) -> Any:
        captured = _captured(self, variable_class(variable_type))
        if captured is None:
            return value
        values = captured.get_raw_value()
        if name not in values:
            values = {**values, name: jnp.zeros_like(value)}
            captured.set_raw_value(values)
        return value + values[name]


def _name(depth: int, innermost: int) -> str:
    return _CAPTURES if depth == innermost else f"__captures_{depth}__"


def _captured(module: Any, kind: type[Variable[Any]]) -> Variable[Any] | None:
    """The Variable for `kind` of the innermost capture; None if that wants no such type."""
    if kind not in module._nnx_kinds:
        return None
    captures = getattr(module, _CAPTURES, None)
    if captures is None:  # of a container, whose items are the user's: only once there is something
        captures = _fresh(module._nnx_kinds)
        _put(module, _CAPTURES, captures)
    return next(v for v in captures if type(v) is kind)


def _fresh(kinds: Kinds) -> Captures:
    return tuple(new_variable(kind, {}, {}) for kind in kinds)


def _sowing(kind: type[Variable[Any]], depth: int, name: str, method: Method) -> Method:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        captures = getattr(self, _name(depth, type(self)._nnx_depth), ())
        for captured in captures:
            if type(captured) is kind:
                values = captured.get_raw_value()
                captured.set_raw_value({**values, name: (*values.get(name, ()), output)})
        return output

    return call


@functools.lru_cache(maxsize=1024)  # the same class for the same question, or every call would compile anew
def _recording_class(cls: type, kinds: Kinds, outputs: type[Variable[Any]] | None) -> type:
    depth = _depth(cls) + 1
    sowing = None if outputs is None else functools.partial(_sowing, outputs, depth)
    own = {"__repr__": _shown} if cls.__repr__ is Object.__repr__ else {}
    return watched_class(cls, sowing, _Recording, _nnx_kinds=kinds, _nnx_depth=depth, **own)


@reprlib.recursive_repr()
def _shown(module: Module) -> str:
    """As `Object.__repr__`, without what is captured: to the code that runs, a module looks as it was."""
    items = module._nnx_items().items()
    return show_fields(type(module).__name__, [(f"{k}=", v) for k, v in items if not _is_ours(k)])


def _is_ours(key: Any) -> bool:
    return str(key).startswith("__captures_")


def _depth(cls: type) -> int:
    """How many captures record objects of this class."""
    return cls._nnx_depth if issubclass(cls, _Recording) else 0


def _begin(
    root: Any, kinds: Kinds, outputs: type[Variable[Any]] | None, init: Mapping[Any, Any] | None
) -> frozenset[type]:
    """Let the modules of `root` record; returns the classes that they have now."""
    modules = dict(iter_modules(root, graph=True))
    starts = dict(iter_leaves(init)) if init is not None else {}
    if lost := [path for path in starts if path[:-1] not in modules]:
        raise StateMismatchError(unexpected=lost)
    # What a call starts from is recorded too, though nobody asked for it as a result.
    recorded = tuple(dict.fromkeys((*kinds, *map(_kind_of_start, starts.values()))))
    for module in modules.values():
        depth = _depth(type(module))
        if depth:
            _rename(module, _CAPTURES, _name(depth, depth + 1))
        set_class(module, _recording_class(type(module), recorded, outputs))
        if not isinstance(module, DictStorage | ListStorage):
            _put(module, _CAPTURES, _fresh(recorded))
    for path, start in starts.items():
        captured = _captured(modules[path[:-1]], _kind_of_start(start))
        assert captured is not None  # `recorded` has the types of all
        value = start.get_raw_value() if isinstance(start, Variable) else start
        captured.set_raw_value({**captured.get_raw_value(), path[-1]: value})
    return frozenset(map(type, modules.values()))


def _kind_of_start(start: Any) -> type[Variable[Any]]:
    return type(start) if isinstance(start, Variable) else Perturbation


def _rename(module: Module, name: str, other: str) -> None:
    captures = getattr(module, name, None)
    if captures is not None:
        _drop(module, name)
        _put(module, other, captures)


def _put(module: Module, name: str, captures: Captures) -> None:
    """Not by `setattr`, which a class may have made its own: a frozen dataclass, say."""
    owner: Any = DictStorage if isinstance(module, DictStorage) else Object
    owner.__setattr__(module, name, captures)


def _drop(module: Module, name: str) -> None:
    owner: Any = DictStorage if isinstance(module, DictStorage) else Object
    owner.__delattr__(module, name)


def _end(root: Any, everything: Any, fronts: frozenset[type]) -> list[tuple[Path, Variable[Any]]]:
    """What the modules of `root` captured; all modules are what they were before this capture."""
    captured: list[tuple[Path, Variable[Any]]] = []
    closed: set[int] = set()
    for path, module in list(iter_modules(root, graph=True)):
        closed.add(id(module))
        for v in _closed(module) if type(module) in fronts else ():
            for name, value in v.get_raw_value().items():
                captured.append(((*path, name), new_variable(type(v), value, dict(v.get_metadata()))))
    for _, module in list(iter_modules(everything, graph=True)):
        if id(module) not in closed and type(module) in fronts:  # a copy that the call made
            _closed(module)
    return captured


def _closed(module: Module) -> Captures:
    """What `module` captured; it loses that, and has its own class back, or that of the capture around."""
    depth = _depth(type(module))
    captures: Captures = getattr(module, _CAPTURES, ())
    if captures:
        _drop(module, _CAPTURES)
    set_class(module, plain_class(type(module), _Recording))
    _rename(module, _name(depth - 1, depth), _CAPTURES)
    return captures


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
    if not callable(require_own(fn)):
        raise TypeError(f"nnx.capture needs a module, a method or a function, found {type(fn).__name__}.")
    for kind in (*var_types, *([] if method_outputs is None else [method_outputs])):
        if not (isinstance(kind, type) and issubclass(kind, Variable)):
            raise TypeError(f"nnx.capture needs Variable types, such as nnx.Intermediate; found {kind!r}.")
    kinds = var_types or (() if method_outputs is None else (method_outputs,))
    f, owner = _free(fn)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        root = args[0] if args else next(iter(kwargs.values()), None)
        fronts = _begin(root, kinds, method_outputs, init)
        out = f(*args, **kwargs)
        captured = _end(root, (args, kwargs, out), fronts)
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
