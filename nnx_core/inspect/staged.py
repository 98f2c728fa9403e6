"""A call of an object's method as equations: its Python code runs once, then its operations can be counted and run.

Law: `stage(method, args, kwargs)` returns what `method(*args, **kwargs)` returns and does to the objects in the
arguments what that does, for whatever trace is running; beside it stand the equations, which hold no tracer.
Knows graphs and JAX's equations; knows neither rows nor tables.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from nnx_core.graph.effects import After, Forced, apply, check_writes, collect
from nnx_core.graph.pack import Packer, Place, Refs, Unpacker, Watch
from nnx_core.graph.structure import Element, Static, nodes

_ROOT = Place((), None, 0)
_ARRAY, _REF = object(), object()  # where an array, or a Ref, was taken out


@dataclass(frozen=True)
class Packed:
    """A call taken apart: `arrays` go through JAX, the rest is `rest`; `unpack` puts a call together again."""

    root: Element
    arrays: tuple[Any, ...]
    rest: tuple[Any, ...]
    treedef: Any
    refs: Refs

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, from_shapes: bool = False) -> "Packed":
        """Pack a call; numbers stay what they are, as when a function is called without a transform.

        Args:
          args, kwargs: its arguments.
          from_shapes: whether a `jax.ShapeDtypeStruct` stands for an array. Inside a call it stands for itself.
        """
        packer = Packer((None,), Refs(), trace_numbers=False)
        root = packer.walk({"args": args, "kwargs": kwargs}, _ROOT)
        leaves, treedef = jax.tree.flatten(packer.leaves[0])
        return cls(root, *_taken_apart(leaves, from_shapes), treedef, packer.refs)

    def unpack(
        self, arrays: tuple[Any, ...], refs: Refs, watch: Watch | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with fresh copies of all objects, and these arrays; a Ref for each value of a Ref."""
        values, loose = jax.tree.unflatten(self.treedef, _put_together(arrays, self.rest))
        call = Unpacker(((values, loose),), refs, (None,), watch).build(self.root, _ROOT)
        return call["args"], call["kwargs"]


def _taken_apart(leaves: list[Any], from_shapes: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays among `leaves`, and what is left, with a mark where each array was."""
    arrays, rest = [], []
    for x in leaves:
        is_array = _is_array(x) or (from_shapes and isinstance(x, jax.ShapeDtypeStruct))
        if is_array:
            arrays.append(x)
        rest.append(_REF if isinstance(x, jax.Ref) else _ARRAY if is_array else x)
    return tuple(arrays), tuple(rest)


def _put_together(arrays: Iterable[Any], rest: tuple[Any, ...]) -> list[Any]:
    """The inverse of `_taken_apart`."""
    remaining = iter(arrays)
    leaves = []
    for x in rest:
        if x is _ARRAY:
            leaves.append(next(remaining))
        elif x is _REF:
            leaves.append(_as_ref(next(remaining)))
        else:
            leaves.append(x)
    return leaves


def _as_ref(x: Any) -> Any:
    return x if isinstance(x, jax.Ref) else jax.new_ref(x)


def _is_array(x: Any) -> bool:
    """Whether JAX traces `x`; numpy's scalars are numbers, and may well be somebody's shape."""
    if isinstance(x, jax.Array | jax.Ref):
        return True
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic | jax.ShapeDtypeStruct)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype: also of donated arrays, and of tracers that outlive their trace; of a Ref, those in it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


@dataclass(frozen=True)
class Equations:
    """A call as a function of arrays alone.

    Args:
      jaxpr: the equations.
      count: how many of their outputs the call returned; the others are what it wrote.
      inputs: the arrays in its arguments.
      closure: the arrays that it found elsewhere.
      refs: which of (*closure, *inputs) are in a Ref.
    """

    jaxpr: jax.extend.core.Jaxpr
    count: int
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    closure: tuple[jax.ShapeDtypeStruct, ...]
    refs: tuple[bool, ...]

    def outputs(self, inputs: Iterable[Any], closure: Iterable[Any]) -> list[jax.Array]:
        """What the call returns for these values."""
        values = zip((*closure, *inputs), self.refs, strict=True)
        arrays = [jax.new_ref(x) if is_ref else x for x, is_ref in values]
        split = len(self.closure)
        closed = jax.extend.core.ClosedJaxpr(self.jaxpr, arrays[:split])
        returned = jax.extend.core.jaxpr_as_fun(closed)(*arrays[split:])[: self.count]
        return [jnp.asarray(x) for x in returned]


def stage(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Equations]:
    """`method(*args, **kwargs)`, and its equations."""
    packed = Packed.of(args, kwargs)
    effects: list[tuple[After, int, tuple[Any, ...], Any]] = []  # filled by the one trace

    def call(*arrays: Any) -> list[Any]:
        refs, watch = Refs(), Watch()
        copies, keywords = packed.unpack(arrays, refs, watch)
        output = method(*copies, **keywords)
        returned = [x for x in jax.tree.leaves(output) if _is_counted(x)]
        after, leaves = collect(Packer((None,), refs, trace_numbers=False), watch, output, None, Forced())
        flat, treedef = jax.tree.flatten(leaves)
        written, rest = _taken_apart(flat)
        effects.append((after, len(returned), rest, treedef))
        return [*returned, *written]

    closed = jax.make_jaxpr(call)(*packed.arrays)
    [(after, count, rest, treedef)] = effects
    found = [*closed.consts, *packed.arrays]
    equations = Equations(
        closed.jaxpr,
        count,
        tuple(map(shape_of, packed.arrays)),
        tuple(map(shape_of, closed.consts)),
        tuple(isinstance(x, jax.Ref) for x in found),
    )
    if _may_hide_tracers(after):
        # A closure, say, or an object that JAX cannot open: it is of use only under the caller's own trace, so the
        # method runs again. What it calls has rows by now, and is not staged twice.
        return method(*args, **kwargs), equations
    outputs = jax.extend.core.jaxpr_as_fun(closed)(*packed.arrays)
    leaves = jax.tree.unflatten(treedef, _put_together(outputs[count:], rest))
    check_writes(after, packed.refs)
    return apply(after, leaves, packed.refs), equations


def _is_counted(x: Any) -> bool:
    return _is_array(x) or isinstance(x, bool | int | float | complex | np.generic)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, np.dtype, np.generic, Enum)


def _may_hide_tracers(after: After) -> bool:
    """Whether something that the call returned, or wrote as an attribute, may hold arrays which no walk sees."""
    elements = [after.result.root]
    for change in after.objects:
        elements += [element for _, element in change.set]
    parts = [part for element in elements for _, part in nodes(element)]
    return any(type(part) is Static and not isinstance(part.value, _PLAIN) for part in parts)
