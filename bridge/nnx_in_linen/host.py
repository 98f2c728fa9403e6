"""Where NNX code inside Linen runs: the module around it, and the random streams that this module holds.

Law: a key is drawn from Linen when one is asked for and not before, so a missing rng raises what Linen raises, and
only then. Linen's keys are handed out as they are: `stream()` is `module.make_rng(tag)`. A stream that crosses an
NNX transform takes one key with it and counts from there, as all streams do.
Knows streams, and Linen's private account of which modules run, which no other file looks into; knows nothing of
variables and collections, nor of what stands in for NNX modules.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import CollectionFilter
from flax.linen import module as linen_module

import nnx_core as nnx
from nnx_core._errors import TraceError
from nnx_core._foreign import is_foreign
from nnx_core._trace import current_trace
from nnx_core.graph.watched import set_class


@dataclass(frozen=True, eq=False)
class Host:
    """What NNX code runs inside of, as far as it can tell.

    Args:
      module: the Linen module, or None where there is none.
      initializing: whether variables are being made.
      streams: names of the random streams there are.
      make_rng: name -> key.
      shapes_only: whether nothing but shapes is wanted.
      mutable: the collections in which variables may be made, where there is no Linen module to say so.
    """

    module: nn.Module | None
    initializing: bool
    streams: tuple[str, ...]
    make_rng: Callable[[str], jax.Array]
    shapes_only: bool = False
    mutable: CollectionFilter = False
    trace: object = field(default_factory=current_trace)

    @classmethod
    def of(cls, module: nn.Module) -> "Host":
        """The host that a bound Linen module is."""
        assert module.scope is not None
        return cls(module, module.is_initializing(), tuple(sorted(module.scope.rngs)), module.make_rng)

    @classmethod
    def abstract(cls, streams: tuple[str, ...]) -> "Host":
        """A host for finding out shapes: all keys are equal, and none may be used for numbers."""
        return cls(None, True, streams, lambda _: jax.random.key(0), shapes_only=True)

    def has_rng(self, name: str) -> bool:
        """Whether `make_rng(name)` gives a key: Linen falls back to the stream `params`."""
        return self.module is None or name in self.streams or "params" in self.streams


# The host cannot be an argument: the user's code stands between the wrapper and the streams.
_host: ContextVar[Host | None] = ContextVar("bridge_host", default=None)


@contextmanager
def hosted(host: Host | None, innermost: nn.Module | None = None) -> Iterator[None]:
    """Run NNX code in `host` (None: in none), with `innermost` as the Linen module that runs.

    If that is None, Linen modules made meanwhile have no parent, where the module around would be it: NNX owns them.
    """
    token = _host.set(host)
    stack = module_stack()
    stack.append(innermost)
    try:
        yield
    finally:
        stack.pop()
        _host.reset(token)


# ---- Linen's account of what runs; this file alone knows where it is ----


def module_stack() -> list[nn.Module | None]:
    """The modules whose methods are running in this thread, innermost last: Linen's own list, with None at first."""
    return linen_module._context.module_stack


def somebody_watches() -> bool:
    """Whether Linen is to be told of calls: for an interceptor, for a table, or to capture intermediates."""
    context = linen_module._context
    filters = context.capture_stack
    return bool(linen_module._global_interceptor_stack or context.call_info_stack or (filters and filters[-1]))


def has_table() -> bool:
    """Whether `nn.tabulate` is writing calls down."""
    return bool(linen_module._context.call_info_stack)


@contextmanager
def uncaptured() -> Iterator[None]:
    """With no intermediates captured."""
    filters = linen_module._context.capture_stack
    filters.append(False)
    try:
        yield
    finally:
        filters.pop()


def named_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` as a Linen method named `name`, for interceptors and error messages."""
    method.__name__ = method.__qualname__ = name
    return linen_module.wrap_method_once(method)


def current_linen_module() -> nn.Module | None:
    """The innermost Linen module whose method is running, seen from NNX code inside it too; None outside.

    >>> current_linen_module() is None
    True
    """
    return next((module for module in reversed(module_stack()) if module is not None), None)


def mutable_around() -> CollectionFilter | None:
    """The collections that a submodule of the Linen module around could write; None outside.

    >>> mutable_around() is None
    True
    """
    host = _host.get()
    if module_stack()[-1] is None and host is not None and host.module is None:
        return True if host.shapes_only else None  # a bridge.Module is nearer than any Linen module
    around = current_linen_module()
    return None if around is None or around.scope is None else around.scope.mutable


def made_around() -> CollectionFilter:
    """The collections in which a `bridge.Module` that is around lets calls make variables.

    >>> made_around()
    False
    """
    host = _host.get()
    return False if host is None or module_stack()[-1] is not None else host.mutable


def captured_around() -> Callable[[nn.Module, str], bool] | bool:
    """What `capture_intermediates` of the Linen module around says of submodules of a module that runs here.

    >>> captured_around()
    False
    """
    filters = linen_module._context.capture_stack
    wanted = filters[-1] if filters else False
    if not wanted or mutable_around() is None:
        return False
    # The module that runs here is captured already, as the NNX module that it is in.
    return lambda module, method: isinstance(module.parent, nn.Module) and wanted(module, method)


# Where in the module around the code is that runs, if no stand-in on Linen's stack says it: in an abstract run.
_path_inside: ContextVar[tuple[str, ...]] = ContextVar("bridge_path_inside", default=())


@contextmanager
def inside(path: tuple[str, ...]) -> Iterator[None]:
    """Run code that is at `path` in the Linen module around."""
    token = _path_inside.set(path)
    try:
        yield
    finally:
        _path_inside.reset(token)


def placed(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, a function of a bound Linen module, in which this has the path of the Linen module around.

    So rules by path, interceptors and Linen's errors name the layer that it is in the whole model.
    """
    if mutable_around() is None or (around := current_linen_module()) is None:
        return method
    # `path` may be a name of the user's in the Linen module around; a stand-in has no scope until it is asked for.
    around_path = around.path if "_sight" in vars(around) else around.scope.path
    path = (*around_path, *_path_inside.get())

    def run(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        module.scope.path = module.scope.debug_path = path
        return method(module, *args, **kwargs)

    return run


def is_linen_initializing() -> bool:
    """Whether this code runs because a Linen module is being initialised, so that heavy work can be skipped.

    >>> is_linen_initializing()
    False
    """
    module, host = module_stack()[-1], _host.get()
    if module is None and host is not None:
        return host.initializing
    return module is not None and module.scope is not None and nn.Module.is_initializing(module)


def _live() -> Host | None:
    """The host, unless the running trace is an inner one, to which Linen gives no keys."""
    host = _host.get()
    return host if host is not None and host.trace == current_trace() else None


@dataclass(frozen=True)
class MissingRng:
    """A hook for the key of a stream that Linen has no rng for: whoever reads it is told so."""

    module: str | None
    name: str

    def __call__(self, *_: Any) -> NoReturn:
        raise flax.errors.InvalidRngError(f'{self.module} needs PRNG for "{self.name}"')


@functools.cache
def no_key() -> jax.Array:
    """A key that stands where a key must be, and must not be used."""
    with jax.ensure_compile_time_eval():  # a constant in every trace
        return jax.random.key(0)


class LinenStream(nnx.RngStream):
    """A random stream whose key is Linen's.

    It has no key of its own (`key`, `count`) until somebody looks for one: a transform that it is passed to, or
    code that reads or splits it.
    """

    shape: tuple[int, ...] = ()  # of the keys, for streams that were split

    @classmethod
    def named(cls, tag: str, shape: tuple[int, ...] = ()) -> "LinenStream":
        """A stream without a key."""
        stream: LinenStream = cls.__new__(cls)
        stream.tag, stream.shape = tag, shape
        return stream

    def __call__(self) -> jax.Array:
        host = None if "key" in self.__dict__ or self.shape else _live()
        return super().__call__() if host is None else nnx.rnglib.as_key(host.make_rng(self.tag))

    def _take_key(self, host: Host) -> None:
        hooks = {}
        if host.has_rng(self.tag):
            key = nnx.rnglib.as_key(host.make_rng(self.tag))
        else:
            key = no_key()  # stands where a key must be; the hook lets nobody read it
            hooks["on_get_value"] = MissingRng(host.module and host.module.name, self.tag)
        key = jax.random.split(key, self.shape) if self.shape else key
        count = nnx.RngCount(jnp.zeros(self.shape, jnp.uint32), tag=self.tag)
        self._nnx_assign({"key": nnx.RngKey(key, tag=self.tag, **hooks), "count": count}, ())

    def _nnx_items(self) -> dict[Any, Any]:
        # Asked for by every walk. The ones a transform makes on its way in need the key; it does not walk twice.
        if "key" not in self.__dict__ and (host := _live()) is not None:
            self._take_key(host)
        return super()._nnx_items()

    def __getattr__(self, name: str) -> Any:
        if name not in ("key", "count"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        host = _live()
        if host is None:
            raise TraceError(f"the random stream {self.tag!r}")
        self._take_key(host)
        return self.__dict__[name]


class LinenRngs(nnx.Rngs):
    """Rngs for the constructor of an NNX module inside Linen: it has every stream that it is asked for."""

    @classmethod
    def of(cls, host: Host, *, only_common: bool = False) -> "LinenRngs":
        """The streams of `host`, unless only the common ones, and the two that constructors ask for most."""
        rngs = cls()
        others = () if only_common else host.streams
        for name in ("default", "params", *others):
            setattr(rngs, name, LinenStream.named(name))
        return rngs

    def __getattr__(self, name: str) -> nnx.RngStream:
        if name.startswith("_") or (host := _live()) is None:
            return super().__getattr__(name)
        if type(self.__dict__.get("default")) is nnx.RngStream and not host.has_rng(name):
            return super().__getattr__(name)  # it has keys of its own
        self._nnx_assign({name: LinenStream.named(name)}, ())
        return self.__dict__[name]  # type: ignore[no-any-return]  # __dict__ is dict[str, Any]


def intermediates_made(make: Callable[[], nnx.Object]) -> dict[Any, Any]:
    """The values of the Intermediates that `make` makes, by path; nothing else of it is computed.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> intermediates_made(lambda: nnx.Dict(kernel=nnx.Param(jnp.ones(9)), last=nnx.Intermediate(0.5)))
    {('last',): Array(0.5, dtype=float32, weak_type=True)}
    """

    def values() -> list[Any]:
        state = dict(nnx.to_flat_state(nnx.state(make(), nnx.Intermediate)))
        paths.extend(state)
        return [x.get_raw_value() for x in state.values()]

    paths: list[Any] = []
    with jax.ensure_compile_time_eval():  # constants in every trace
        numbers = jax.jit(values)()
    return dict(zip(paths, numbers, strict=True))


def give_back_streams(module: nnx.Object) -> None:
    """Make every random stream in `module`, which must be the caller's own, one of Linen's, without a key."""
    for _, x in list(nnx.iter_graph(module)):
        if isinstance(x, nnx.RngStream):
            _give_back(x)


def _give_back(stream: nnx.RngStream) -> None:
    key = stream.__dict__.get("key")
    if key is None:
        shape = stream.__dict__.get("shape", ())
    else:
        shape = getattr(key.get_raw_value(), "shape", ())
    set_class(stream, LinenStream)
    stream._nnx_assign({"shape": shape}, ("key", "count"))


def keep_streams(module: nnx.Object, host: Host) -> None:
    """Give every random stream in `module` a key and a count of its own, the key from `host` if it has none."""
    for _, x in list(nnx.iter_graph(module)):
        if isinstance(x, LinenStream):
            if not host.has_rng(x.tag):
                host.make_rng(x.tag)  # raises as Linen does
            if "key" not in x.__dict__:
                x._take_key(host)
            set_class(x, nnx.RngStream)
            x._nnx_assign({}, ("shape",))


# ---- classes of flax.nnx ----


def is_of_flax_nnx(factory: Any) -> bool:
    """Whether `factory` is a class of flax.nnx, or a function whose annotations say that it takes flax.nnx's Rngs."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    if isinstance(factory, type):
        return is_foreign(factory)
    kinds = [
        annotation for annotation in getattr(factory, "__annotations__", {}).values() if isinstance(annotation, type)
    ]
    return any(map(is_foreign, kinds))


def made_by(
    factory: Callable[..., Any], args: Any, kwargs: Any, rngs: nnx.Rngs | None, name: str | None = "rngs"
) -> Any:
    """What `factory` makes with these arguments and streams, as a module of nnx_core if it is one of flax.nnx.

    Args:
      name: the keyword that the streams are passed as; None passes them by position.
    """
    if rngs is not None:
        streams: Any = rngs
        if is_of_flax_nnx(factory):
            from bridge.flax_nnx.streams import lent  # imports flax.nnx, which is in use already

            streams = lent(rngs)
        args, kwargs = ((*args, streams), kwargs) if name is None else (args, {**kwargs, name: streams})
    return adopted(factory(*args, **kwargs))


def adopted(module: Any) -> Any:
    """A module of flax.nnx as one of nnx_core; anything else as it is."""
    if not is_foreign(type(module)):
        return module
    from bridge.flax_nnx.from_flax import adopt  # imports flax.nnx, which is in use already

    return adopt(module)


def made_kind(module: nnx.Module) -> type:
    """The class that a module is named after: that of flax.nnx, if it is one of those."""
    kind: type = getattr(module, "_flax_kind", None) or type(module)
    return kind


@contextmanager
def reseeded(streams: Iterable[nnx.RngStream]) -> Iterator[None]:
    """Streams with keys of their own as Linen's streams; afterwards they have their own keys and counts again."""
    kept = [(x, {"key": x.__dict__["key"], "count": x.__dict__["count"]}) for x in streams]
    for x, _ in kept:
        _give_back(x)
    try:
        yield
    finally:
        for x, own in kept:
            set_class(x, nnx.RngStream)
            x._nnx_assign(own, ("shape",))
