"""What Linen sees of an NNX module that runs inside it: its submodules, under their paths.

While a method of an NNX submodule runs, the innermost Linen module is a stand-in for it: one named after its class,
with its path and scope, so that rules by path find the right layer. Interceptors, `capture_intermediates` and
`nn.tabulate` get each call as if a Linen submodule had been called.

Law: the numbers are those of a call that nobody looks at; what nobody asks for is not made. Linen modules that NNX
code makes belong to it, and not to the module around. Inside another JAX trace, and on copies that an NNX transform
makes, Linen cannot look: the stand-in there is that of the module that called the transform.
Knows modules, paths and Linen's contexts; knows nothing of variables.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flax import linen as nn
from flax.core.scope import LazyRng, Scope, child_rng_token
from flax.linen import module as linen_module

import nnx_core as nnx
from nnx_core._trace import current_trace
from nnx_core.graph.objects import Object

Path = tuple[Any, ...]


# ---- Linen modules that are made by NNX code ----

_UNNAMED = "\0"  # no module has this in its name


class _Auto(int):
    """Where Linen's automatic names go on counting; the name it makes says that nobody gave one."""

    def __format__(self, spec: str) -> str:
        return _UNNAMED


class _Adopting:
    """Instead of the scope of a parent: the module that asks it for one gets none, and no parent either."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def scope(self) -> "_Adopting":
        return self

    def push(self, name: str, **_: Any) -> None:
        object.__setattr__(self.module, "parent", None)
        if name.endswith(_UNNAMED):
            object.__setattr__(self.module, "name", None)


class Unowning:
    """Instead of the state of a Linen module, while NNX code runs in it: what is made meanwhile has no parent.

    Linen makes the module on top of its stack the parent of a new one, asks its state for a name and enters the
    new module there.
    """

    in_setup = False
    is_initialized = in_compact_method = True  # submodules may be made

    def __init__(self, state: Any = None):
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    @property
    def children(self) -> "Unowning":
        return self

    autoname_cursor = children

    def get(self, prefix: str, default: int) -> int:
        return _Auto(default)

    def __setitem__(self, name: str, x: Any) -> None:
        if isinstance(x, nn.Module):
            object.__setattr__(x, "parent", _Adopting(x))


@contextmanager
def on_top(module: nn.Module) -> Iterator[None]:
    """Run NNX code in a bound Linen module, which is on top of Linen's stack and owns nothing made meanwhile."""
    state, stack = module._state, linen_module._context.module_stack
    object.__setattr__(module, "_state", Unowning(state))
    stack.append(module)
    try:
        yield
    finally:
        stack.pop()
        object.__setattr__(module, "_state", state)


# ---- stand-ins ----


class StandIn(nn.Module):
    """A Linen module that stands for a submodule of an NNX module while its method runs.

    Made without `__init__` it is light, and finds its scope once somebody asks.
    """

    @nn.nowrap
    def clone(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]  # generic in Linen
        """A Linen module that does what this one does, for `nn.tabulate`, which counts its operations."""
        if args or kwargs or (found := self.__dict__.get("_stands_for")) is None:
            return super().clone(*args, **kwargs)
        sight, at, _ = found
        module = sight.module_at(at)
        return super().clone() if module is None else sight.linen._alone(module)

    @property
    @nn.nowrap
    def path(self) -> tuple[str, ...]:
        """The path of the ToLinen, and of the submodule in it."""
        sight: Sight | None = self.__dict__.get("_sight")
        return super().path if sight is None else (*sight.linen.path, *map(str, self.__dict__["_at"]))

    @nn.nowrap
    def _name_taken(self, *_: Any, **__: Any) -> bool:
        return False


def _scope(module: StandIn) -> Scope | None:
    """Where the variables of the submodule are; made when it is asked for."""
    own = module.__dict__
    if "scope" not in own and "_sight" in own:
        own["scope"] = own["_sight"].scope_at(own["_at"])
    return own.get("scope")


_lazy_scope = property(_scope, lambda module, scope: module.__dict__.update(scope=scope))


@functools.lru_cache(maxsize=1024)
def stand_in_class(cls: type) -> type[StandIn]:
    """The class of the stand-ins for modules of this class, or for containers."""
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": f"Stands for {cls.__qualname__} in Linen."}
    # `nn.tabulate` leaves out calls of methods that the module does not have. Linen's own must stay what they are.
    names = ["__call__", *(name for name in public_methods(cls) if not hasattr(StandIn, name))]
    body |= {name: _watched_method(name) for name in names}
    made: type[StandIn] = type(cls.__name__, (StandIn,), body)
    made.scope = _lazy_scope  # Linen gives every class that is derived from its modules a `scope` of None
    return made


@functools.cache
def _watched_method(name: str) -> Callable[..., Any]:
    """A Linen method named `name` that runs the method of the NNX module the stand-in stands for."""

    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        sight, at, run = self.__dict__["_stands_for"]
        with sight.top(type(self), at):
            return run(*args, **kwargs)

    method.__name__ = method.__qualname__ = name
    return linen_module.wrap_method_once(method)


class Sight:
    """What Linen can see of one NNX module during one call.

    Args:
      linen: the bound ToLinen.
      modules: (path, module) of each NNX module in it, the root with the path ().
      entry: the name of the root's method that Linen has called, and seen, itself.
    """

    def __init__(self, linen: nn.Module, modules: list[tuple[Path, nnx.Module]], entry: str | None):
        self.linen, self.entry, self.trace = linen, entry, current_trace()
        self._stack: list[Any] = linen_module._context.module_stack
        self._entered: set[Path] = set()
        self._places = {id(module): (path, module) for path, module in modules}

    def call(self, module: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`method(module, *args, **kwargs)`, seen by Linen under the path of the module."""
        found = self._places.get(id(module))
        if found is None or found[1] is not module:
            return method(module, *args, **kwargs)
        path = found[0]
        if not path and self.entry == name:
            self.entry = None
            return method(module, *args, **kwargs)
        cls = stand_in_class(type(module)._nnx_plain) if path else type(self.linen)
        if _somebody_watches() and self.trace == current_trace():
            return self._watched(cls, path, name, functools.partial(method, module), args, kwargs)
        if not path:
            return method(module, *args, **kwargs)
        self._stack.append(self._light(cls, path))
        try:
            return method(module, *args, **kwargs)
        finally:
            self._stack.pop()

    def _light(self, cls: type, path: Path) -> StandIn:
        light: StandIn = object.__new__(cls)
        light.__dict__.update(name=str(path[-1]), _sight=self, _at=path, _state=_UNOWNING)
        return light

    def module_at(self, path: Path) -> nnx.Module | None:
        """The module at `path`; None for a container."""
        return next((module for at, module in self._places.values() if at == path), None)

    def _enter_containers(self, path: Path) -> None:
        """Give the lists and dicts on the way to `path` rows of their own in `nn.tabulate`.

        It leaves a module's variables out of the rows above only if there is a row for each key on the way.
        """
        shown = {at for at, _ in self._places.values()} | self._entered
        for end in range(1, len(path)):
            if (at := path[:end]) not in shown:
                self._entered.add(at)
                linen_module._context.capture_stack.append(False)
                try:
                    self._watched(stand_in_class(list), at, "__call__", lambda: None, (), {})
                finally:
                    linen_module._context.capture_stack.pop()

    def _watched(self, cls: type, path: Path, name: str, run: Any, args: Any, kwargs: Any) -> Any:
        if path:
            if linen_module._context.call_info_stack:
                self._enter_containers(path)
            scope = self.scope_at(path)
            module = cls(parent=scope, name=str(path[-1]))
        else:
            module = self.linen.clone(parent=self.linen.scope)
        module.__dict__["_stands_for"] = self, path, run
        return _watched_method(name)(module, *args, **kwargs)

    @contextmanager
    def top(self, cls: type, path: Path) -> Iterator[None]:
        """With the light stand-in for the module at `path` on top of the stack."""
        if not path:
            with on_top(self.linen):
                yield
            return
        self._stack.append(self._light(cls, path))
        try:
            yield
        finally:
            self._stack.pop()

    def scope_at(self, path: Path) -> Scope:
        """The scope of the submodule at `path`."""
        scope = self.linen.scope
        assert scope is not None
        for key in path:
            scope = _child(scope, str(key))
        return scope


_UNOWNING = Unowning()


def _somebody_watches() -> bool:
    context = linen_module._context
    filtered = context.capture_stack
    return bool(linen_module._global_interceptor_stack or context.call_info_stack or (filtered and filtered[-1]))


def _child(parent: Scope, name: str) -> Scope:
    """As `parent.push(name, reuse=True)`, but reserves nothing: what is in it stays a variable of the ToLinen."""
    rngs = {key: LazyRng.create(rng, name) for key, rng in parent.rngs.items()}
    scope = Scope(
        {},
        name=name,
        rngs=rngs,
        parent=parent,
        mutable=parent.mutable,
        path=(*parent.path, name),
        debug_path=(*parent.debug_path, name),
        flags=parent.flags,
    )
    counters: Any = parent.rng_counters
    scope.rng_counters = counters.setdefault((child_rng_token, name), dict.fromkeys(rngs, 0))
    scope.trace_level = parent.trace_level
    return scope


# ---- the classes of modules that Linen can see into ----

_sight: ContextVar[Sight | None] = ContextVar("bridge_sight", default=None)


class _Visible:
    """In front of the class of a module: Linen sees the calls of its methods."""

    __slots__ = ()
    _nnx_plain: type

    def __init_subclass__(cls, **kwargs: Any):
        # Not the user's own __init_subclass__, which may want arguments or keep a list of classes.
        Object.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]  # a classmethod has it


def _seen(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sight = _sight.get()
        return method(self, *args, **kwargs) if sight is None else sight.call(self, name, method, args, kwargs)

    return call


_CONTAINERS = (nnx.Module, nnx.List, nnx.Dict)


@functools.lru_cache(maxsize=1024)
def visible_class(cls: type) -> type | None:
    """`cls`, its public methods and `__call__` seen by Linen; None if there is none of its own."""
    methods = {name: _seen(name, getattr(cls, name)) for name in public_methods(cls)}
    if not methods or issubclass(cls, _Visible):
        return None
    members = {"__slots__": (), "_nnx_plain": cls, "__qualname__": cls.__qualname__, "__module__": cls.__module__}
    visible: type = _transparent(type(cls))(cls.__name__, (_Visible, cls), {**members, **methods})
    type.__setattr__(visible, "_nnx_made", True)
    return visible


@functools.lru_cache(maxsize=64)
def _transparent(kind: type[type]) -> type[type]:
    """The metaclass `kind`, for classes that pass writes on: `type(self).calls += 1` is meant for the user's class."""

    def set_on(cls: Any, name: str, value: Any) -> None:
        kind.__setattr__(cls._nnx_plain if "_nnx_made" in cls.__dict__ else cls, name, value)

    def delete_on(cls: Any, name: str) -> None:
        kind.__delattr__(cls._nnx_plain if "_nnx_made" in cls.__dict__ else cls, name)

    return type(kind.__name__, (kind,), {"__setattr__": set_on, "__delattr__": delete_on})


def public_methods(cls: Any) -> list[str]:
    """The names of `__call__` and of the public methods of a module's class that are not nnx.Module's own.

    None for a function.
    """
    if not isinstance(cls, type):
        return []
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if issubclass(base, nnx.Module) and base not in _CONTAINERS:
            names |= dict.fromkeys(n for n, f in vars(base).items() if _is_plain_function(f))
    public = [n for n in names if n == "__call__" or not n.startswith("_")]
    return [n for n in public if getattr(cls, n) is not getattr(nnx.Module, n, None)]


def _is_plain_function(x: Any) -> bool:
    return callable(x) and hasattr(x, "__get__") and not isinstance(x, type | staticmethod | classmethod)


@contextmanager
def seen_by(sight: Sight) -> Iterator[None]:
    """Run a method of the module that `sight` shows."""
    token = _sight.set(sight)
    try:
        yield
    finally:
        _sight.reset(token)


def set_class(module: Any, cls: type) -> None:
    """Change what Linen sees of `module`; not an attribute, so nothing to mark or count."""
    object.__setattr__(module, "__class__", cls)


def plain(module: nnx.Module) -> None:
    """Give `module`, and every module in it, the class that it was written as."""
    for _, x in nnx.iter_modules(module):
        if isinstance(x, _Visible):
            set_class(x, type(x)._nnx_plain)
