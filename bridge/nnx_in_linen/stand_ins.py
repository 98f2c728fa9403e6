"""What Linen sees of an NNX module that runs inside it: its submodules, under their paths.

While a method of an NNX submodule runs, the innermost Linen module is a stand-in for it: one named after its class,
with its path and scope, so that rules by path find the right layer. Interceptors, `capture_intermediates` and
`nn.tabulate` get each call as if a Linen submodule had been called.

Law: the numbers are those of a call that nobody looks at; what nobody asks for is not made. Linen modules that NNX
code makes belong to it, and not to the module around. Inside another JAX trace, and on copies that an NNX transform
makes, Linen cannot look: the stand-in there is that of the module that called the transform.
Knows modules, paths and scopes; knows nothing of variables, nor where Linen keeps its account of what runs (`host`).

Linen's protocol of module state, and what answers here. Each bound module has a private `_state`. Linen pushes a
module on its *stack* while a method of it runs. Who makes a module without naming a *parent* gets the top of the stack
as its parent, which is asked, in this order: `_state.in_setup` (an unnamed module then waits for its attribute);
`_initialization_allowed`, which is `is_initialized or in_compact_method` (else: no submodules here); for an unnamed one
`_state.autoname_cursor`, how many of its class there are (`Dense_0`, and the cursor moves on); `_name_taken`; then
`_state.children[name] = module`, and `scope.push(name)` becomes the scope of the new module. After a method, Linen
resets the flags and the cursor. So NNX code that makes a Linen module would leave a child and a name in the module
around it. The stand-in for that state, `Unowning`, lets every module be made, hands out automatic names that say so
(`_Auto`), lets no child in, and puts `_Adopting` in the place of the parent: asked for a scope, it gives none and takes
parent and automatic name away again. The new module is then what `nn.Dense(3, parent=None)` is. `setup` needs no
answer: a stand-in has none, and what it stands for ran its constructor long ago.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from flax import linen as nn
from flax.core.scope import LazyRng, Scope, child_rng_token

import nnx_core as nnx
from bridge.nnx_in_linen.host import has_table, inside, module_stack, named_method, somebody_watches, uncaptured
from nnx_core._errors import Path
from nnx_core._trace import current_trace
from nnx_core.graph.watched import Method, Watched, plain_class, public_methods, set_class, watched_class

# ---- Linen modules that are made by NNX code ----

_UNNAMED = "\0"  # no module has this in its name


class _Auto(int):
    """Where Linen's automatic names go on counting; the name it makes says that nobody gave one."""

    def __format__(self, spec: str) -> str:
        return _UNNAMED


class _Adopting:
    """Instead of a parent and of its scope: the module that asks it for a scope gets none, and no parent either."""

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

    What the code asks for otherwise is what `state` says.
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
        if isinstance(x, nn.Module):  # else Linen moves its cursor on
            object.__setattr__(x, "parent", _Adopting(x))


@contextmanager
def owning_nothing(module: nn.Module) -> Iterator[None]:
    """Run NNX code in a bound Linen module, which owns nothing that is made meanwhile."""
    state = module._state
    object.__setattr__(module, "_state", Unowning(state))
    try:
        yield
    finally:
        object.__setattr__(module, "_state", state)


# ---- stand-ins ----


class StandIn(nn.Module):
    """A Linen module that stands for a submodule of an NNX module while its method runs.

    Made without `__init__` it is light, and finds its scope once somebody asks.
    """

    @nn.nowrap
    def clone(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]  # generic in Linen
        """A Linen module that does what this one does, for `nn.tabulate`, which counts its operations."""
        subject = self.__dict__.get("_stands_for")
        if args or kwargs or subject is None:
            return super().clone(*args, **kwargs)
        sight, path, _ = subject
        module = sight.module_at(path)
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
    stand_in: type[StandIn] = type(cls.__name__, (StandIn,), body)
    stand_in.scope = _lazy_scope  # Linen gives every class that is derived from its modules a `scope` of None
    return stand_in


@functools.cache
def _watched_method(name: str) -> Method:
    """A Linen method named `name` that runs the method of the NNX module the stand-in stands for."""

    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        sight, path, run = self.__dict__["_stands_for"]
        with sight.top(type(self), path):
            return run(*args, **kwargs)

    return named_method(name, method)


class Sight:
    """What Linen can see of one NNX module during one call.

    Args:
      linen: the bound ToLinen.
      modules: (path, module) of each NNX module in it, the root with the path ().
      entry: the name of the root's method that Linen has called, and seen, itself.
    """

    def __init__(self, linen: nn.Module, modules: list[tuple[Path, nnx.Module]], entry: str | None):
        self.linen, self.entry, self.trace = linen, entry, current_trace()
        self._stack: list[Any] = module_stack()
        self._entered: set[Path] = set()
        self._places = {id(module): (path, module) for path, module in modules}

    def call(self, module: Any, name: str, method: Method, args: Any, kwargs: Any) -> Any:
        """`method(module, *args, **kwargs)`, seen by Linen under the path of the module."""
        place = self._places.get(id(module))
        # By identity: a copy that a transform made may have the id of a module that is gone.
        if place is None or place[1] is not module:
            return method(module, *args, **kwargs)
        path = place[0]
        if not path and self.entry == name:
            self.entry = None
            return method(module, *args, **kwargs)
        cls = stand_in_class(type(module)._nnx_plain) if path else type(self.linen)
        if somebody_watches() and self.trace == current_trace():
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
        return next((module for place, module in self._places.values() if place == path), None)

    def _enter_containers(self, path: Path) -> None:
        """Give the lists and dicts on the way to `path` rows of their own in `nn.tabulate`.

        It leaves a module's variables out of the rows above only if there is a row for each key on the way.
        """
        shown = {place for place, _ in self._places.values()} | self._entered
        for end in range(1, len(path)):
            container = path[:end]
            if container not in shown:
                self._entered.add(container)
                with uncaptured():
                    self._watched(stand_in_class(list), container, "__call__", lambda: None, (), {})

    def _watched(self, cls: type, path: Path, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if path:
            if has_table():
                self._enter_containers(path)
            scope = self.scope_at(path)
            module = cls(parent=scope, name=str(path[-1]))
        else:
            module = self.linen.clone(parent=self.linen.scope)
        module.__dict__["_stands_for"] = self, path, run
        return _watched_method(name)(module, *args, **kwargs)

    @contextmanager
    def top(self, cls: type, path: Path) -> Iterator[None]:
        """With what stands for the module at `path`, and owns nothing, on top of the stack."""
        owning = nullcontext() if path else owning_nothing(self.linen)
        self._stack.append(self._light(cls, path) if path else self.linen)
        try:
            with owning:
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


class Places:
    """What an abstract run knows of the modules in it: only where they are. Linen sees none of their calls.

    Args:
      module: the root.
    """

    def __init__(self, module: nnx.Module):
        self._places = {id(x): (path, x) for path, x in nnx.iter_modules(module)}

    def call(self, module: Any, name: str, method: Method, args: Any, kwargs: Any) -> Any:
        """`method(module, *args, **kwargs)`, at the path of the module."""
        place = self._places.get(id(module))
        if place is None or place[1] is not module:
            return method(module, *args, **kwargs)
        with inside(tuple(map(str, place[0]))):
            return method(module, *args, **kwargs)


_UNOWNING = Unowning()


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

_sight: ContextVar[Sight | Places | None] = ContextVar("bridge_sight", default=None)


class _Visible(Watched):
    """In front of the class of a module: Linen sees the calls of its methods."""

    __slots__ = ()


def _seen(name: str, method: Method) -> Method:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sight = _sight.get()
        return method(self, *args, **kwargs) if sight is None else sight.call(self, name, method, args, kwargs)

    return call


@functools.lru_cache(maxsize=1024)
def visible_class(cls: type) -> type | None:
    """`cls`, its public methods seen by Linen; None if it has none of its own, or is seen already."""
    if issubclass(cls, _Visible) or not public_methods(cls):
        return None
    return watched_class(cls, _seen, _Visible)


@contextmanager
def seen_by(sight: Sight | Places) -> Iterator[None]:
    """Run a method of the module that `sight` shows."""
    token = _sight.set(sight)
    try:
        yield
    finally:
        _sight.reset(token)


@contextmanager
def located(module: nnx.Module) -> Iterator[None]:
    """Run a method of `module` abstractly: wrapped Linen modules in it know where they are."""
    for _, x in list(nnx.iter_modules(module)):
        set_class(x, visible_class(type(x)) or type(x))
    try:
        with seen_by(Places(module)):
            yield
    finally:
        plain(module)


def plain(module: nnx.Module) -> None:
    """Give `module`, and every module in it, the class that it was written as."""
    for _, x in nnx.iter_modules(module):
        if isinstance(x, _Visible):
            set_class(x, plain_class(type(x), _Visible))
