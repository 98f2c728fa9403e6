"""Random streams: Rngs, the streams in it, and how they fork, split and are reseeded.

Law: a stream's n-th key is `fold_in(key, n)`: the same seed gives the same keys everywhere; a key is drawn only
when one is asked for, and reading a stream never changes it. Keys and counts are Variables, so they cross
transforms like all state.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core import filters as filterlib
from nnx_core._errors import MissingRngError, NnxError, Path
from nnx_core._foreign import require_own
from nnx_core.graph.api import graphdef
from nnx_core.graph.objects import Object
from nnx_core.graph.walk import iter_graph, recursive_map
from nnx_core.kinds import RngCount, RngKey
from nnx_core.modes import sharing_allowed, updates_allowed
from nnx_core.variables import Variable

RngValue = Any  # an int seed, a key (typed or raw), or a Variable with one
_SAMPLERS = (
    "ball bernoulli beta binomial bits categorical cauchy chisquare choice dirichlet double_sided_maxwell "
    "exponential f gamma generalized_normal geometric gumbel laplace loggamma logistic lognormal maxwell "
    "multinomial multivariate_normal normal orthogonal pareto permutation poisson rademacher randint rayleigh "
    "t triangular truncated_normal uniform wald weibull_min"
).split()
_INITIALIZERS = (
    "delta_orthogonal glorot_normal glorot_uniform he_normal he_uniform kaiming_normal kaiming_uniform "
    "lecun_normal lecun_uniform variance_scaling xavier_normal xavier_uniform"
).split()


def as_key(value: RngValue) -> jax.Array:
    """A typed key from a seed, a typed key, a raw uint32 key, or a Variable with one of these."""
    if isinstance(value, Variable):
        value = value.get_value()
    if isinstance(value, int | np.integer):
        return jax.random.key(int(value))
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value  # type: ignore[return-value]  # a typed key is a jax.Array
        if value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer):
            return jax.random.key(value)
        return jax.random.wrap_key_data(value)  # type: ignore[no-any-return]
    raise TypeError(f"Expected a seed or a key, found {type(value).__name__}.")


class _Samplers(Object):
    """`stream.normal(shape)` is `jax.random.normal(stream(), shape)`, and so on for all of jax.random."""

    def __call__(self) -> jax.Array:
        raise NotImplementedError


def _sampler(name: str, get: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return get()(self(), *args, **kwargs)

    sample.__name__ = name
    sample.__doc__ = f"`jax.random.{name}` (or the jax.nn initializer) with the stream's next key."
    return sample


def _initializer(name: str) -> Callable[..., Any]:
    def sampler(self: Any, *options: Any, **named: Any) -> Callable[..., Any]:
        initialize = getattr(jax.nn.initializers, name)(*options, **named)
        return lambda *args, **kwargs: initialize(self(), *args, **kwargs)

    sampler.__name__ = name
    sampler.__doc__ = f"`jax.nn.initializers.{name}(...)` that draws its key here: a function of (shape, dtype)."
    return sampler


for _name in _SAMPLERS:
    setattr(_Samplers, _name, _sampler(_name, functools.partial(getattr, jax.random, _name)))
for _name in _INITIALIZERS:
    setattr(_Samplers, _name, _initializer(_name))


class RngStream(_Samplers):
    """One random stream: a key and a count of the keys given out.

    Args:
      key: a seed or a key; a key array of shape (...) makes a stream of that shape, for vmap.
      tag: the stream's name, kept as metadata so that filters can tell streams apart.

    Example:
      >>> import nnx_core as nnx, jax
      >>> stream = nnx.RngStream(0, tag="params")
      >>> first, second = stream(), stream()
      >>> bool(second == jax.random.fold_in(jax.random.key(0), 1)), int(stream.count[...])
      (True, 2)
    """

    def __init__(self, key: RngValue, *, tag: str):
        key = as_key(key)
        self.tag = tag
        self.key = RngKey(key, tag=tag)
        self.count = RngCount(jnp.zeros(key.shape, jnp.uint32), tag=tag)

    def __call__(self) -> jax.Array:
        count = self.count.get_value()
        self.count.set_value(count + jnp.uint32(1))
        return jax.random.fold_in(self.key.get_value(), count)  # type: ignore[no-any-return]

    def fork(self, *, split: int | tuple[int, ...] | None = None) -> "RngStream":
        """A new stream seeded by this one's next key, or with `split` by that key split into this shape."""
        key = self()
        return type(self)(key if split is None else jax.random.split(key, split), tag=self.tag)

    def split(self, k: int | tuple[int, ...]) -> "RngStream":
        """`fork(split=k)`."""
        return self.fork(split=k)

    def broadcast(self, k: int | tuple[int, ...]) -> "RngStream":
        """A new stream with this one's next key in every place of this shape."""
        return type(self)(jnp.broadcast_to(self(), _shape(k)), tag=self.tag)


class Rngs(_Samplers, Mapping[str, RngStream]):
    """Named random streams; names that were not given fall back to the stream `default`.

    Args:
      default: seed or key of the default stream, a stream, or a mapping of names to these.
      **rngs: seeds or keys of more streams.

    Raises:
      MissingRngError: when a stream is asked for that is not there, and neither is a default.

    Example:
      >>> import nnx_core as nnx
      >>> rngs = nnx.Rngs(0, dropout=1)
      >>> rngs.params().shape, rngs.dropout.normal((2,)).shape, list(rngs)
      ((), (2,), ['default', 'dropout'])
    """

    def __init__(self, default: Any = None, **rngs: Any):
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs = {"default": default, **rngs}
        for name, value in rngs.items():
            key = value.key if isinstance(value, RngStream) else value
            setattr(self, name, RngStream(key, tag=name))

    def __getattr__(self, name: str) -> RngStream:
        if name.startswith("_"):
            raise AttributeError(name)  # protocols of Python and its tools are no streams
        streams = self.__dict__
        if "default" not in streams:
            raise MissingRngError(name, streams)
        return streams["default"]  # type: ignore[no-any-return]  # __dict__ is dict[str, Any]

    def __getitem__(self, name: str) -> RngStream:
        return getattr(self, name)  # type: ignore[no-any-return]

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __call__(self) -> jax.Array:
        return self.default()

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def items(self) -> Any:
        """(name, stream) pairs."""
        return self.__dict__.items()

    def fork(self, /, *, split: Any = None) -> "Rngs":
        """New streams, each seeded by the next key of the one with its name.

        Args:
          split: a shape, or {filter: shape}: the keys of these streams are split, as by `Rngs.split`. Unlike there,
            what no filter has is forked too: nothing of the new Rngs gives a number that this one gives.

        Example:
          >>> import nnx_core as nnx
          >>> rngs = nnx.Rngs(params=0, dropout=1)
          >>> new = rngs.fork(split={"params": 3})
          >>> new.params.key.shape, bool(new.dropout() == rngs.dropout())
          ((3,), False)
        """
        rules = _split_rules(split)
        return self._each(lambda name, stream: stream.fork(split=_split_of(rules, (name,), stream)))

    def split(self, k: Any) -> "Rngs":
        """New streams, with the next key of the one with their name split into a shape.

        Args:
          k: a shape for every stream; or {filter: shape}: streams that match none, or None, keep their key and
            count. They go on from there on both sides, with the same numbers: `fork(split=k)` gives new ones.
        """
        rules = _split_rules(k)
        return self._each(lambda name, stream: _split_stream(stream, _split_of(rules, (name,), stream)))

    def broadcast(self, k: Any) -> "Rngs":
        """The same with one key in every place of the shape.

        Example:
          >>> import nnx_core as nnx
          >>> keys = nnx.Rngs(7).broadcast((2, 3)).default.key
          >>> keys.shape, bool(keys[0, 0] == keys[1, 2])
          ((2, 3), True)
        """
        rules = _split_rules(k)
        return self._each(lambda name, stream: _broadcast_stream(stream, _split_of(rules, (name,), stream)))

    def _each(self, make: Callable[[str, RngStream], RngStream]) -> "Rngs":
        new: Rngs = type(self)()
        for name, stream in self.items():
            setattr(new, name, make(name, stream))
        return new


def _kept(stream: RngStream) -> RngStream:
    """A stream of its own that goes on where `stream` is."""
    new = type(stream)(stream.key.get_raw_value(), tag=stream.tag)
    new.count.set_raw_value(stream.count.get_raw_value())
    return new


def _split_stream(stream: RngStream, shape: "Shape") -> RngStream:
    return _kept(stream) if shape is None else stream.fork(split=shape)


def _broadcast_stream(stream: RngStream, shape: "Shape") -> RngStream:
    return _kept(stream) if shape is None else stream.broadcast(shape)


Shape = int | tuple[int, ...] | None
_Rules = list[tuple[filterlib.Predicate, Shape]]


class RngRuleError(NnxError, ValueError):
    """`with_rngs` was told two things about one stream."""

    def __init__(self, path: Path, stream: RngStream, rules: Mapping[str, filterlib.Predicate]):
        listed = "".join(f"\n  found    {kind} by the filter {predicate!r}" for kind, predicate in rules.items())
        super().__init__(
            f"RngStream at path {path} (tag {stream.tag!r}) matches multiple rules of with_rngs:\n"
            f"  expected one of split, broadcast and fork{listed}\n"
            "Narrow the filters, so that each stream is named once; `...` may stand beside: it has what is left."
        )


def _split_rules(split: Any) -> _Rules:
    if split is None:
        return []
    if isinstance(split, Mapping):
        return [(filterlib.to_predicate(f), shape) for f, shape in split.items()]
    return [(filterlib.to_predicate(...), split)]


def _rule_of(rules: _Rules, path: Path, stream: RngStream) -> tuple[filterlib.Predicate, Shape] | None:
    """The first rule that has this stream."""
    return next((rule for rule in rules if rule[0](path, stream)), None)


def _split_of(rules: _Rules, path: Path, stream: RngStream) -> Shape:
    rule = _rule_of(rules, path, stream)
    return None if rule is None else rule[1]


def streams_of(node: Any) -> list[tuple[Path, RngStream]]:
    """(path, stream) of every random stream in `node`, shared ones once."""
    return [(path, x) for path, x in iter_graph(node, graph=True) if isinstance(x, RngStream)]


class SplitBackups(tuple[Any, ...]):
    """What streams held before they were forked or split: `with` restores them at its end."""

    __slots__ = ()

    def __enter__(self) -> "SplitBackups":
        return self

    def __exit__(self, *_: object) -> None:
        restore_rngs(self)


def _replace(stream: RngStream, key: jax.Array) -> tuple[Any, ...]:
    backup = stream, stream.key.get_raw_value(), stream.count.get_raw_value()
    stream.key.set_raw_value(key)
    stream.count.set_raw_value(jnp.zeros(key.shape, jnp.uint32))
    return backup


def split_rngs(
    node: Any = None,
    /,
    *,
    splits: int | tuple[int, ...],
    only: filterlib.Filter = ...,
    squeeze: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """Split the streams of `node` in place, each key into `splits` keys; as a decorator, for the call.

    Args:
      node: a module or pytree; without it, a decorator for functions that take some.
      splits: number of keys, or a shape.
      only: which streams.
      squeeze: drop the new axis, which must have size 1.

    Returns:
      Backups for `restore_rngs`, also a context manager. With graph=False or graph_updates=False nothing is
      changed in place: a copy of `node` with the split streams, which shares all other Variables.

    Example:
      >>> import nnx_core as nnx
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> with nnx.split_rngs(rngs, splits=5, only="params"):
      ...     rngs.params.key.shape, rngs.dropout.key.shape
      ((5,), ())
      >>> rngs.params.key.shape
      ()
    """
    in_place = sharing_allowed(graph) and updates_allowed(graph_updates)
    if node is None or _is_function(node):
        options = {"splits": splits, "only": only, "squeeze": squeeze, "graph": graph, "graph_updates": graph_updates}
        around = _around_call if in_place else _on_copies
        return around(node, lambda args: split_rngs(args, **options))
    if squeeze and splits != 1:
        raise ValueError(f"squeeze=True needs splits=1, found {splits}.")
    predicate = filterlib.to_predicate(only)

    def new_key(stream: RngStream) -> jax.Array:
        keys = jax.random.split(stream(), splits)
        return keys[0] if squeeze else keys

    if not in_place:
        return _copied(node, graph, predicate, new_key)
    return SplitBackups([_replace(x, new_key(x)) for path, x in streams_of(node) if predicate(path, x)])


def _copied(node: Any, graph: bool | None, chosen: filterlib.Predicate, new_key: Callable[[RngStream], Any]) -> Any:
    """A copy of `node` with new keys in the streams that were chosen; it shares all other Variables."""
    if not sharing_allowed(graph):
        graphdef(node, graph=False)  # raises if something is shared

    def replaced(path: Path, x: Any) -> Any:
        return type(x)(new_key(x), tag=x.tag) if isinstance(x, RngStream) and chosen(path, x) else x

    return recursive_map(replaced, node, graph=True)


def fork_rngs(
    node: Any = None,
    /,
    *,
    split: Any = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """Fork the streams of `node` in place (see `RngStream.fork`); as a decorator, for the call.

    Args:
      node: a module or pytree; without it, a decorator for functions that take some.
      split: a shape, or {filter: shape}: the keys are split; streams that no filter has go on as they are.

    Returns:
      Backups for `restore_rngs`, also a context manager.
    """
    in_place = sharing_allowed(graph) and updates_allowed(graph_updates)
    if node is None or _is_function(node):
        around = _around_call if in_place else _on_copies
        return around(node, lambda args: fork_rngs(args, split=split, graph=graph, graph_updates=graph_updates))
    if not in_place:
        return with_rngs(node, fork=..., graph=graph) if split is None else with_rngs(node, split=split, graph=graph)
    rules = _split_rules({...: None} if split is None else split)
    backups = []
    for path, stream in streams_of(node):
        if _rule_of(rules, path, stream) is None:
            continue
        shape = _split_of(rules, path, stream)
        key = stream()
        backups.append(_replace(stream, key if shape is None else jax.random.split(key, shape)))
    return SplitBackups(backups)


def restore_rngs(backups: Iterable[tuple[Any, ...]], /) -> None:
    """Undo `split_rngs` or `fork_rngs`: keys come back, and counts go on from where they were."""
    for stream, key, count in backups:
        stream.key.set_raw_value(key)
        stream.count.set_raw_value(count)


def _is_function(node: Any) -> bool:
    return callable(require_own(node)) and not isinstance(node, Object | Variable)


def _around_call(f: Any, prepare: Callable[[Any], SplitBackups]) -> Any:
    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            with prepare((args, kwargs)):
                return f(*args, **kwargs)

        return call

    return decorate if f is None else decorate(f)


def reseed(node: Any, /, *, graph: bool | None = None, policy: Any = "scalars_only", **stream_keys: RngValue) -> None:
    """Give the streams of `node` with these names new keys and set their counts to zero.

    Args:
      policy: "scalars_only" raises for streams that are not scalar; "match_shape" splits the key to the
        stream's shape; a function (path, key, shape) -> keys decides itself.

    Raises:
      ValueError: for a stream with a shape under "scalars_only".
      SharedReferenceError: with `graph=False`, if something is reached twice.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> nnx.reseed(model, dropout=42, default=42)
      >>> int(model.rngs.count[...])
      0
    """
    if not sharing_allowed(graph):
        graphdef(node, graph=False)  # raises if something is shared
    sources = {name: RngStream(key, tag=name) for name, key in stream_keys.items()}
    for path, stream in streams_of(node):
        if stream.tag not in sources:
            continue
        key, shape = sources[stream.tag](), stream.key.shape  # several streams of one name get different keys
        if callable(policy):
            key = policy(path, key, shape)
        elif shape and policy == "match_shape":
            key = jax.random.split(key, shape)
        elif shape:
            raise ValueError(
                f"The stream {stream.tag!r} at {path} has shape {shape}, and policy 'scalars_only' reseeds scalar"
                " streams only. Pass policy='match_shape', or a function."
            )
        stream.key.set_raw_value(key)
        stream.count.set_raw_value(jnp.zeros(key.shape, jnp.uint32))


def with_rngs(
    node: Any = None,
    /,
    *,
    split: Any = None,
    fork: Any = None,
    broadcast: Any = None,
    only: filterlib.Filter = True,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """A copy of `node` with other streams; it shares all other Variables. As a decorator, for a call's arguments.

    Each stream is treated by the first of split, broadcast and fork that has it, and kept as it is if none has. The
    new stream takes the next key of the one it replaces, whose count goes on.

    Args:
      node: a module or pytree; without it, a decorator for functions that take some.
      split: a shape, or {filter: shape}: the key is split into this shape.
      broadcast: a shape, or {filter: shape}: every place of this shape has the same key.
      fork: a filter, or several: a new stream of the same shape.
      only: the streams that are considered at all.

    Raises:
      RngRuleError: two of split, broadcast and fork name one stream, by filters that do not have all streams.

    Example:
      >>> import nnx_core as nnx
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> new = with_rngs(rngs, split={"params": 4}, fork=nnx.Not("params"))
      >>> new.params.key.shape, new.dropout.key.shape, int(rngs.dropout.count[...])
      ((4,), (), 1)
    """
    options = {"split": split, "fork": fork, "broadcast": broadcast, "only": only, "graph": graph}
    if node is None or _is_function(node):
        return _on_copies(node, lambda args: with_rngs(args, **options))
    if not sharing_allowed(graph):
        graphdef(node, graph=False)  # raises if something is shared
    kinds = {
        "split": _split_rules(split),
        "broadcast": _split_rules(broadcast),
        "fork": [] if fork is None else [(filterlib.to_predicate(fork), None)],
    }
    considered = filterlib.to_predicate(only)
    for path, stream in streams_of(node):  # all of them, before the first key is drawn
        if considered(path, stream):
            _check_one_rule(kinds, path, stream)

    def replaced(path: Path, x: Any) -> Any:
        if not isinstance(x, RngStream) or not considered(path, x):
            return x
        for kind, rules in kinds.items():
            if (rule := _rule_of(rules, path, x)) is not None:
                return x.broadcast(_shape(rule[1])) if kind == "broadcast" else x.fork(split=rule[1])
        return x

    return recursive_map(replaced, node, graph=True)


def _check_one_rule(kinds: dict[str, _Rules], path: Path, stream: RngStream) -> None:
    matches = {kind: _rule_of(rules, path, stream) for kind, rules in kinds.items()}
    named = {kind: rule[0] for kind, rule in matches.items() if rule and not isinstance(rule[0], filterlib.Everything)}
    if len(named) > 1:
        raise RngRuleError(path, stream, named)


def _shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else shape or ()


def _on_copies(f: Any, copied: Callable[[Any], Any]) -> Any:
    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = copied((args, kwargs))
            return f(*args, **kwargs)

        return call

    return decorate if f is None else decorate(f)
