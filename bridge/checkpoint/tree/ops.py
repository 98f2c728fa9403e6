"""How one leaf of a converted checkpoint is made from leaves of the source: an expression over them.

`Join((Read(("ir", "kernel"), ...), Read(("iz", "kernel"), ...)), axis=-1)` makes a fused kernel of two gates. The same
expression tells shape and dtype before anything is read, gives the value, and one region of it for one device.
Law: `op.value(read)` has `op.shape` and `op.dtype`; `op.value(read, region)` equals `op.value(read)[region]`, bit for
bit, and reads what `op.reads(region)` tells, which is no more than it needs, unless a region of a reshaped source is no
run of elements; `Read` alone copies nothing.
Knows arrays and paths; knows nothing of files, layouts or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge._errors import BridgeError, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.tree.regions import Region, boxes, run_of, shape_of, whole

#: Gives the leaf at a path, or a region of it.
Reader = Callable[[Path, Region | None], Any]


class OpError(BridgeError, ValueError):
    """An operation does not fit what it is applied to. `path` is the first source that it reads."""

    def __init__(self, op: Op, expected: str, found: object):
        self.op, self.path = op, next(op.sources(), ())
        super().__init__(
            f"{show_path(self.path)}: {type(op).__name__.lower()} does not fit\n"
            f"  expected: {expected}\n  found: {found}\nChange the rule that says how this leaf is made."
        )


class Op:
    """A value made from leaves of the source. Its `shape` and `dtype` are known when it is built."""

    shape: Shape
    dtype: str

    def sources(self) -> Iterator[Path]:
        """Paths of the leaves that are read, in order, one as often as it is."""
        for part in self._parts():
            yield from part.sources()

    def value(self, read: Reader, region: Region | None = None) -> Any:
        """The value, or a region of it."""
        raise NotImplementedError

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        """What `value` reads for it: leaf and region, in order."""
        raise NotImplementedError

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        """The same expression with `leaf(path)` for each `Read(path)`; OpError if that does not fit."""
        raise NotImplementedError

    def __str__(self) -> str:
        """What is done, in words: 'transpose [1, 0] of stack along 0 of a/w, b/w'."""
        return f"{self._word()} of {', '.join(map(str, self._parts()))}"

    def _word(self) -> str:
        return type(self).__name__.lower()

    def _parts(self) -> tuple[Op, ...]:
        return ()


class OfOne(Op):
    """What is made of one other value. A region of it needs `_inner(region)` of that."""

    of: Op

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        yield from self.of.reads(self._inner(region))

    def _inner(self, region: Region | None) -> Region | None:
        return region

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        return replace(self, of=self.of.on(leaf))  # type: ignore[type-var]  # each subclass is a dataclass

    def _parts(self) -> tuple[Op, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Read(Op):
    """A leaf as it is.

    >>> Read(("kernel",), (2, 3), "float32").value(lambda path, region: path)
    ('kernel',)
    """

    path: Path
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return show_path(self.path)

    def sources(self) -> Iterator[Path]:
        yield self.path

    def value(self, read: Reader, region: Region | None = None) -> Any:
        return read(self.path, region)

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        yield self, region

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        return leaf(self.path)


@dataclass(frozen=True)
class Fill(Op):
    """A value that comes from nowhere in the source: that of a fresh model, or zeros."""

    content: Any = field(compare=False)
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        _set(self, shape=tuple(np.shape(self.content)), dtype=str(self.content.dtype))

    def __str__(self) -> str:
        return "new"

    def value(self, read: Reader, region: Region | None = None) -> Any:
        return self.content if region is None else self.content[region]

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        yield from ()

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        return self


@dataclass(frozen=True)
class Block(OfOne):
    """`of[start:stop]` along one axis, which stays: one gate of a fused kernel.

    >>> Block(Read(("kernel",), (2, 8), "float32"), axis=-1, start=4, stop=8).shape
    (2, 4)
    """

    of: Op
    axis: int
    start: int
    stop: int
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        axis, shape = _axis(self, self.axis, len(self.of.shape)), self.of.shape
        if not 0 <= self.start < self.stop <= shape[axis]:
            raise OpError(self, f"a part {self.start}:{self.stop} of axis {axis}", f"shape {shape}")
        _set(self, axis=axis, shape=(*shape[:axis], self.stop - self.start, *shape[axis + 1 :]), dtype=self.of.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        return self.of.value(read, self._inner(region))

    def _inner(self, region: Region | None) -> Region:
        wanted = list(whole(self.shape) if region is None else region)
        old = wanted[self.axis]
        wanted[self.axis] = slice(old.start + self.start, old.stop + self.start)
        return tuple(wanted)

    def _word(self) -> str:
        return f"{self.start}:{self.stop} along {self.axis}"


@dataclass(frozen=True)
class Pick(OfOne):
    """`of[index]` along one axis, which goes: one layer of a stack.

    >>> Pick(Read(("kernel",), (12, 2, 8), "float32"), axis=0, index=3).shape
    (2, 8)
    """

    of: Op
    axis: int
    index: int
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        axis, shape = _axis(self, self.axis, len(self.of.shape)), self.of.shape
        if not 0 <= self.index < shape[axis]:
            raise OpError(self, f"element {self.index} of axis {axis}", f"shape {shape}")
        _set(self, axis=axis, shape=(*shape[:axis], *shape[axis + 1 :]), dtype=self.of.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        value = self.of.value(read, self._inner(region))
        return value.reshape((*value.shape[: self.axis], *value.shape[self.axis + 1 :]))

    def _inner(self, region: Region | None) -> Region:
        rest = whole(self.shape) if region is None else region
        return (*rest[: self.axis], slice(self.index, self.index + 1), *rest[self.axis :])

    def _word(self) -> str:
        return f"{self.index} along {self.axis}"


@dataclass(frozen=True)
class Join(Op):
    """Parts one after the other along an axis; with `stack`, along a new axis at that place.

    >>> parts = tuple(Read((name,), (3, 4), "float32") for name in "ab")
    >>> Join(parts, axis=-1).shape, Join(parts, axis=0, stack=True).shape
    ((3, 8), (2, 3, 4))
    """

    parts: tuple[Op, ...]
    axis: int
    stack: bool = False
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        axis = _axis(self, self.axis, len(first.shape) + self.stack)

        def rest(shape: Shape) -> Shape:
            """What must be the same of all parts."""
            return shape if self.stack else (*shape[:axis], *shape[axis + 1 :])

        for part in self.parts:
            same_rank = len(part.shape) == len(first.shape)
            if not same_rank or rest(part.shape) != rest(first.shape) or part.dtype != first.dtype:
                raise OpError(
                    self,
                    f"what fits to {show_path(next(first.sources(), ()))}: {first.dtype}{list(first.shape)}",
                    f"{show_path(next(part.sources(), ()))}: {part.dtype}{list(part.shape)}",
                )
        size = len(self.parts) if self.stack else sum(part.shape[axis] for part in self.parts)
        base = rest(first.shape)
        _set(self, axis=axis, shape=(*base[:axis], size, *base[axis:]), dtype=first.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        values = [part.value(read, inner) for part, inner in self._wanted(region)]
        if self.stack:
            return _library(values).stack(values, axis=self.axis)
        return values[0] if len(values) == 1 else _library(values).concatenate(values, axis=self.axis)

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        for part, inner in self._wanted(region):
            yield from part.reads(inner)

    def _wanted(self, region: Region | None) -> Iterator[tuple[Op, Region | None]]:
        """The parts that a region has something of, and what."""
        if region is None:
            yield from ((part, None) for part in self.parts if self.stack or part.shape[self.axis])
            return
        before, along, after = region[: self.axis], region[self.axis], region[self.axis + 1 :]
        if self.stack:
            yield from ((part, (*before, *after)) for part in self.parts[along])
            return
        offset = 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(along.start - offset, 0), min(along.stop - offset, size)
            if start < stop:
                yield part, (*before, slice(start, stop), *after)
            offset += size

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        return Join(tuple(part.on(leaf) for part in self.parts), self.axis, self.stack)

    def _word(self) -> str:
        return f"{'stack' if self.stack else 'concat'} along {self.axis}"

    def _parts(self) -> tuple[Op, ...]:
        return self.parts


@dataclass(frozen=True)
class Transpose(OfOne):
    """Axes in another order, as `numpy.transpose` takes them.

    >>> Transpose(Read(("kernel",), (2, 3, 4), "float32"), (2, 0, 1)).shape
    (4, 2, 3)
    """

    of: Op
    axes: tuple[int, ...]
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        rank = len(self.of.shape)
        axes = tuple(_from_front(axis, rank) for axis in self.axes)
        if sorted(axes) != list(range(rank)):
            raise OpError(self, f"each axis of {self.of.shape} once", f"axes {list(self.axes)}")
        _set(self, axes=axes, shape=tuple(self.of.shape[axis] for axis in axes), dtype=self.of.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        return self.of.value(read, self._inner(region)).transpose(self.axes)

    def _inner(self, region: Region | None) -> Region | None:
        if region is None:
            return None
        return tuple(region[self.axes.index(axis)] for axis in range(len(self.axes)))

    def _word(self) -> str:
        return f"transpose {list(self.axes)}"


@dataclass(frozen=True)
class Reshape(OfOne):
    """The same numbers in row-major order under another shape; one size may be -1.

    A region that is a run of elements needs those alone, any other the whole source.

    >>> Reshape(Read(("kernel",), (2, 3, 4), "float32"), (2, -1)).shape
    (2, 12)
    """

    of: Op
    new: tuple[int, ...]
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        total, shape = math.prod(self.of.shape), list(self.new)
        if shape.count(-1) == 1:
            unknown = shape.index(-1)
            rest = math.prod(shape[:unknown] + shape[unknown + 1 :])
            shape[unknown] = total // rest if rest else -1
        if min(shape, default=0) < 0 or math.prod(shape) != total:
            raise OpError(self, f"a shape of {total} elements, as {self.of.shape}", list(self.new))
        _set(self, shape=tuple(shape), dtype=self.of.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        runs = self._runs(region)
        if region is None or runs is None:
            everything = self.of.value(read).reshape(self.shape)
            return everything if region is None else everything[region]
        values = [self.of.value(read, run).reshape(-1) for run in runs]
        joined = values[0] if len(values) == 1 else _library(values).concatenate(values)
        return joined.reshape(shape_of(region))

    def reads(self, region: Region | None = None) -> Iterator[tuple[Read, Region | None]]:
        for run in self._runs(region) or [None]:
            yield from self.of.reads(run)

    def _runs(self, region: Region | None) -> list[Region] | None:
        """The regions of the source that a region is made of, in order; None for all of it."""
        run = None if region is None else run_of(self.shape, region)
        if run is None or run[0] == run[1]:
            return None
        return boxes(self.of.shape, *run)

    def _word(self) -> str:
        return f"reshape {list(self.shape)}"


@dataclass(frozen=True)
class Cast(OfOne):
    """Another number type, by name: 'bfloat16', 'float32', ...

    >>> Cast(Read(("kernel",), (2,), "float32"), "bfloat16").dtype
    'bfloat16'
    """

    of: Op
    dtype: str
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        if self.of.dtype == "str" or self.of.dtype.startswith("key<"):
            raise OpError(self, "numbers", self.of.dtype)
        try:
            name = str(jnp.dtype(self.dtype))
        except TypeError:
            raise OpError(self, "the name of a number type, such as 'bfloat16'", repr(self.dtype)) from None
        _set(self, shape=self.of.shape, dtype=name)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        value = self.of.value(read, region)
        on_device = isinstance(value, jax.Array) and jax.dtypes.canonicalize_dtype(self.dtype) == self.dtype
        return (value if on_device else np.asarray(value)).astype(self.dtype)  # without x64 JAX has no int64

    def on(self, leaf: Callable[[Path], Op]) -> Op:
        """The cast is for leaves of the dtype that it was made for: optimizer slots may have one of their own."""
        of = self.of.on(leaf)
        return Cast(of, self.dtype) if of.dtype == self.of.dtype else of

    def _word(self) -> str:
        return f"cast to {self.dtype}"


@dataclass(frozen=True)
class Add(OfOne):
    """A constant more everywhere: a norm that multiplies by `1 + scale` keeps `scale`, another the whole factor.

    >>> Add(Read(("scale",), (4,), "float32"), 1.0).value(lambda path, region: np.zeros(4, "float32"))
    array([1., 1., 1., 1.], dtype=float32)
    """

    of: Op
    amount: float
    shape: Shape = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self) -> None:
        is_number = self.of.dtype != "str" and not self.of.dtype.startswith("key<")
        if not is_number or not jnp.issubdtype(jnp.dtype(self.of.dtype), jnp.inexact):
            raise OpError(self, "floating numbers", self.of.dtype)
        _set(self, shape=self.of.shape, dtype=self.of.dtype)

    def value(self, read: Reader, region: Region | None = None) -> Any:
        value = self.of.value(read, region)
        return value + np.asarray(self.amount, value.dtype)

    def _word(self) -> str:
        return f"{self.amount:+g} on each number"


def without_added(op: Op) -> Op:
    """The same without constants: what becomes of a derivative, to which a constant makes no difference.

    >>> str(without_added(Transpose(Add(Read(("a",), (1, 2), "float32"), 1.0), (1, 0))))
    'transpose [1, 0] of a'
    """
    if isinstance(op, Add):
        return without_added(op.of)
    if isinstance(op, OfOne):
        return replace(op, of=without_added(op.of))  # type: ignore[type-var]  # each subclass is a dataclass
    if isinstance(op, Join):
        return Join(tuple(map(without_added, op.parts)), op.axis, op.stack)
    return op


def unstack(of: Op, axis: int) -> tuple[Op, ...]:
    """The slices of `of` along `axis`: what `Join(..., stack=True)` was made from.

    >>> [part.shape for part in unstack(Read(("kernel",), (2, 3, 4), "float32"), axis=1)]
    [(2, 4), (2, 4), (2, 4)]
    """
    if not -len(of.shape) <= axis < len(of.shape):
        raise OpError(of, f"an axis {axis} to take apart", f"shape {of.shape}")
    return tuple(Pick(of, axis, index) for index in range(of.shape[axis]))


def values_of(ops: Mapping[Path, Op], leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """What expressions make of arrays on host or device, or of values under a transformation of JAX.

    >>> values_of({("b",): Transpose(Read(("a",), (1, 2), "int64"), (1, 0))}, {("a",): np.array([[1, 2]])})[
    ...     ("b",)
    ... ].shape
    (2, 1)
    """

    def read(path: Path, region: Region | None) -> Any:
        return leaves[path] if region is None else leaves[path][region]

    return {path: op.value(read) for path, op in ops.items()}


def _axis(op: Op, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise OpError(op, f"an axis of {rank}", f"axis {axis}")
    return axis % rank


def _from_front(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _library(values: list[Any]) -> Any:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _set(op: Op, **attributes: Any) -> None:
    for name, value in attributes.items():
        object.__setattr__(op, name, value)
