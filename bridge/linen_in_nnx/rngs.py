"""Random streams of NNX as the rngs of Linen: one key a stream for one call, counted only if Linen asked for it.

Law: a call that draws nothing changes no stream; a call that draws from a stream moves its count by one, however
often Linen asked. Outside of a trace a random operation runs only once a call has drawn. `exact` hands Linen the
keys of the streams themselves and moves nothing, so the same keys give the same numbers, as in Linen. Linen keeps a
counter for each name and module, and lifted transforms share them with the scope around: reading those after the
call is how it is known what was drawn.
Knows streams, keys and Linen's scopes; knows nothing of variables.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.errors
import jax
from flax import linen as nn

import nnx_core as nnx
from bridge.linen_in_nnx._errors import NoRngsError

#: What stands for random keys: streams, keys or seeds by name, or one key or seed (for `params`).
RngSource = nnx.Rngs | nnx.RngStream | Mapping[str, Any] | jax.Array | int | None


class Keys:
    """The keys for one call.

    Args:
      source: where they come from. Keys and seeds are handed to Linen as they are.
      exact: hand out the keys of streams themselves too.

    >>> import nnx_core as nnx, jax
    >>> stream = nnx.Rngs(dropout=0)
    >>> keys = Keys(stream, exact=False)
    >>> list(keys.by_name), bool(keys.by_name["dropout"] == jax.random.fold_in(jax.random.key(0), 0))
    (['dropout'], True)
    """

    def __init__(self, source: RngSource, *, exact: bool):
        self.by_name: dict[str, jax.Array] = {}
        self._streams: dict[str, nnx.RngStream] = {}
        self._counters: Mapping[Any, Any] = {}
        for name, stream in _by_name(source).items():
            if not isinstance(stream, nnx.RngStream):
                self.by_name[name] = nnx.rnglib.as_key(stream)  # a key or a seed
            elif (next_key := _key_of(stream, exact)) is not None:
                self.by_name[name] = next_key
                if not exact:
                    self._streams[name] = stream

    def watching(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, a function of a bound Linen module, seen by `settle`."""

        def watched(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            # Linen's own, and shared with the scopes of lifted transforms: read in `settle`, once the call is over.
            self._counters = module.scope.root.rng_counters
            return method(module, *args, **kwargs)

        return watched

    @contextmanager
    def required(self, module: nn.Module) -> Iterator[None]:
        """What draws a key in here says so if there are none at all; what draws none needs none.

        Raises:
          NoRngsError: if Linen asks for a key of `module`.
        """
        try:
            yield
        except flax.errors.InvalidRngError as error:
            if self.by_name:
                raise  # Linen says which one is missing
            raise NoRngsError(type(module).__name__) from error

    def settle(self) -> None:
        """Count the streams that the watched call drew from.

        Raises:
          TraceError: if a stream was drawn from under another trace than its own.
        """
        for name, stream in self._streams.items():
            if _was_used(self._counters, name):
                stream.count.set_value(stream.count.get_value() + jax.numpy.uint32(1))


def _by_name(source: RngSource) -> Mapping[str, Any]:
    if source is None:
        return {}
    if not isinstance(source, Mapping):
        return {"params": source}
    streams = {name: source[name] for name in source}
    if "params" not in streams and "default" in streams:
        streams["params"] = streams.pop("default")  # where Linen looks for names it has no rng for
    return streams


def _key_of(stream: nnx.RngStream, exact: bool) -> jax.Array | None:
    """The key that `stream` would give next; None where there is none, and Linen will say so if it asks."""
    try:
        key = stream.key.get_value()
    except flax.errors.InvalidRngError:
        return None  # a stream of a Linen module around, which has no such rng
    if key.shape:
        return None  # split for a vmap that this call is outside of
    return key if exact else _folded(stream, key)


# Linen wants keys before it is known whether it asks for one. While nothing is drawn the next key stays the same:
# stream -> (its key, its count, the next key).
_next: weakref.WeakKeyDictionary[nnx.RngStream, tuple[Any, Any, jax.Array]] = weakref.WeakKeyDictionary()


def _folded(stream: nnx.RngStream, key: jax.Array) -> jax.Array:
    count = stream.count.get_value()
    last_key, last_count, last_folded = _next.get(stream, (None, None, None))
    # By identity: no array is read, and nothing is traced.
    if last_folded is not None and last_key is key and last_count is count:
        return last_folded
    folded = jax.random.fold_in(key, count)
    # A count of numpy's could change in place.
    if isinstance(count, jax.Array) and not isinstance(folded, jax.core.Tracer):
        _next[stream] = key, count, folded
    return folded


def _was_used(counters: Mapping[Any, Any], name: str) -> bool:
    if counters.get(name):
        return True
    return any(isinstance(below, Mapping) and _was_used(below, name) for below in counters.values())
