"""Random streams among the arguments of a call: nnx_core's as flax.nnx's, and the other way round.

Law: who draws n keys gets the n that the other library would have drawn from the same stream, and the stream goes on
from there: both fold a count into a key. A call that fails moves no stream.
Knows streams; knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import nnx_core as nnx


class LentStream(flax_nnx.RngStream):
    """A stream of flax.nnx while its keys are those of another one: each key is asked for when it is wanted."""

    def __init__(self, lend: Callable[[str], jax.Array], tag: str):
        self.lend, self.tag = lend, tag
        self.key = flax_nnx.RngKey(jax.random.key(0), tag=tag)
        self.count = flax_nnx.RngCount(jnp.uint32(0), tag=tag)

    def __call__(self) -> jax.Array:
        """The next key."""
        return self.lend(self.tag)

    def fork(self, *, split: int | tuple[int, ...] | None = None) -> Any:
        """A stream of its own with the next key."""
        key = self()
        return flax_nnx.RngStream(key if split is None else jax.random.split(key, split), tag=self.tag)

    def split(self, k: int | tuple[int, ...]) -> Any:
        """A stream of its own with the next key, split."""
        return self.fork(split=k)


class LentRngs(flax_nnx.Rngs):
    """Rngs of flax.nnx for a constructor, with every stream that it is asked for."""

    def __init__(self, lend: Callable[[str], jax.Array], names: Iterable[str]):
        super().__init__()
        self.lend = lend
        for name in names:
            setattr(self, name, LentStream(lend, name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "lend":
            raise AttributeError(name)
        stream = LentStream(self.lend, name)
        setattr(self, name, stream)
        return stream

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def lent(rngs: nnx.Rngs) -> LentRngs:
    """The streams of `rngs` for a constructor of flax.nnx, which draws from them themselves."""
    return LentRngs(lambda name: rngs[name](), tuple(rngs))


def given_back(module: Any) -> Any:
    """`module`, whose lent streams are streams of its own from now on: the constructor is done."""
    for _, x in list(flax_nnx.iter_graph(module, graph=True)):
        if isinstance(x, LentStream | LentRngs):
            del x.lend
            object.__setattr__(x, "__class__", flax_nnx.RngStream if isinstance(x, LentStream) else flax_nnx.Rngs)
    return module


class Streams:
    """The streams that were handed over in one call."""

    def __init__(self) -> None:
        self._handed: dict[int, tuple[Any, Any]] = {}

    def hand(self, stream: Any, make: Callable[[Any], Any]) -> Any:
        """The stand-in for `stream`, one and the same for it in all of a call."""
        if id(stream) not in self._handed:
            self._handed[id(stream)] = stream, make(stream)
        return self._handed[id(stream)][1]

    def settle(self) -> None:
        """Let the streams go on where their stand-ins are."""
        for stream, stand_in in self._handed.values():
            count = stand_in.count.get_raw_value()
            if count is not stream.count.get_raw_value():
                stream.count.set_raw_value(count)


def _their_stream(stream: nnx.RngStream) -> Any:
    new = flax_nnx.RngStream(stream.key.get_value(), tag=stream.tag)
    new.count.set_raw_value(stream.count.get_raw_value())
    return new


def _our_stream(stream: Any) -> nnx.RngStream:
    new = nnx.RngStream(stream.key.get_value(), tag=stream.tag)
    new.count.set_raw_value(stream.count.get_raw_value())
    return new


def _filled(rngs: Any, streams: dict[str, Any]) -> Any:
    """`rngs` with these very streams, which the constructor would copy."""
    for name, stream in streams.items():
        setattr(rngs, name, stream)
    return rngs


def as_theirs(tree: Any, streams: Streams) -> Any:
    """`tree` with flax.nnx's streams in the place of nnx_core's."""

    def translate(x: Any) -> Any:
        if isinstance(x, nnx.RngStream):
            return streams.hand(x, _their_stream)
        if isinstance(x, nnx.Rngs):
            return _filled(flax_nnx.Rngs(), {name: streams.hand(x[name], _their_stream) for name in x})
        return x

    return jax.tree.map(translate, tree, is_leaf=lambda x: isinstance(x, nnx.Object))


def as_ours(tree: Any, streams: Streams) -> Any:
    """`tree` with nnx_core's streams in the place of flax.nnx's."""

    def translate(x: Any) -> Any:
        if isinstance(x, flax_nnx.RngStream):
            return streams.hand(x, _our_stream)
        if isinstance(x, flax_nnx.Rngs):
            return _filled(nnx.Rngs(), {name: streams.hand(x[name], _our_stream) for name in x})
        return x

    return jax.tree.map(translate, tree, is_leaf=lambda x: isinstance(x, flax_nnx.Pytree))
