"""A call of an object's method, taken apart: kept as it began, put together again, traced alone to equations.

Law: a Packed shares no object with the call that it was made of, so whatever the call does to its arguments later, the
Packed does not see; what no walk opens, such as a closure, is shared. Equations hold no tracer.
Knows graphs and JAX's equations; knows neither rows nor tables.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core._depth import ROOM
from nnx_core.graph.pack import Packer, Place, Refs
from nnx_core.graph.structure import Element, Node, Static, nodes, static
from nnx_core.graph.unpack import Unpacker

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr

_ROOT = Place((), None, 0)
_ARRAY, _REF = object(), object()  # where an array, or a Ref, was taken out
_NO_NUMBERS = "OSUmM"  # kinds of numpy's dtypes that JAX does not have


@dataclass(frozen=True)
class Packed:
    """A call taken apart: `arrays` go through JAX, the rest is `rest`; `unpack` puts a call together again.

    Of arrays there are shapes only.
    """

    root: Element
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    rest: tuple[Any, ...]
    treedef: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, from_shapes: bool = False) -> "Packed":
        """Pack a call; numbers stay what they are, as when a function is called without a transform.

        Args:
          args, kwargs: its arguments.
          from_shapes: whether a `jax.ShapeDtypeStruct` stands for an array. Inside a call it stands for itself.
        """
        packer = Packer((None,), Refs(), trace_numbers=False)
        root = packer.pack({"args": args, "kwargs": kwargs}, _ROOT)
        leaves, treedef = jax.tree.flatten(packer.leaves[0])
        arrays: list[jax.ShapeDtypeStruct] = []
        rest = []
        for x in leaves:
            is_array = _is_array(x) or (from_shapes and isinstance(x, jax.ShapeDtypeStruct))
            if is_array:
                arrays.append(_shape_of(x))
            rest.append(_REF if isinstance(x, jax.Ref) else _ARRAY if is_array else x)
        return cls(root, tuple(arrays), tuple(rest), treedef)

    def unpack(self, arrays: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with fresh copies of all objects, and these arrays."""
        remaining = iter(arrays)
        leaves = []
        for x in self.rest:
            if x is _ARRAY:
                leaves.append(next(remaining))
            elif x is _REF:
                leaves.append(jax.new_ref(next(remaining)))
            else:
                leaves.append(x)
        values, loose = jax.tree.unflatten(self.treedef, leaves)
        call = Unpacker(((values, loose),), Refs()).unpack(self.root, None)
        return call["args"], call["kwargs"]

    def map_nodes(self, change: Callable[[Node], Node]) -> "Packed":
        """The same call, each Node of its structure changed."""
        with ROOM:
            return replace(self, root=_changed(change, self.root))

    @functools.cached_property
    def key(self) -> Any:
        """Equal for calls that do the same; None if that cannot be told from what is in the call."""
        values = [part.value for _, part in nodes(self.root) if type(part) is Static]
        if not all(map(_is_value, (*values, *self.rest))):
            return None
        shapes = tuple((x.shape, x.dtype, x.weak_type) for x in self.arrays)
        key = self.root, tuple(map(static, self.rest)), self.treedef, shapes
        try:
            hash(key)
        except TypeError:
            return None
        return key


def _changed(change: Callable[[Node], Node], element: Element) -> Element:
    if type(element) is not Node:
        return element
    children = [_changed(change, child) for child in element.children]
    return change(element._replace(children=tuple(children)))


def _is_value(x: Any) -> bool:
    """Whether `x` stays equal to itself only as long as it stays what it is: not so an object that code may fill."""
    return x is None or x is _ARRAY or x is _REF or callable(x) or type(x).__hash__ is not object.__hash__


def _is_array(x: Any) -> bool:
    """Whether JAX traces `x`; numpy's scalars are numbers, and may well be somebody's shape."""
    if isinstance(x, jax.Array | jax.Ref):
        return True
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in _NO_NUMBERS
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic | jax.ShapeDtypeStruct)


def _is_counted(x: Any) -> bool:
    return _is_array(x) or isinstance(x, bool | int | float | complex | np.number | np.bool_)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype: also of donated arrays, and of tracers that outlive their trace; of a Ref, those in it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


@dataclass(frozen=True, eq=False)
class Equations:
    """A call as a function of arrays alone.

    Args:
      jaxpr: the equations; their outputs are the arrays and numbers that the call returned.
      inputs: the arrays in its arguments.
      consts: what it found elsewhere. A value is a constant to XLA; of an array of a trace outside there is the shape.
      refs: which of `consts` are in a Ref: shapes, too.
    """

    jaxpr: "Jaxpr"
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    consts: tuple[Any, ...]
    refs: tuple[bool, ...]

    @classmethod
    def of(cls, method: Callable[..., Any], packed: Packed) -> "Equations":
        """Trace the call of `method` that `packed` is. What the method finds in a closure may be of a trace outside."""

        def call(*arrays: Any) -> list[jax.Array]:
            args, kwargs = packed.unpack(arrays)
            returned = [x for x in jax.tree.leaves(method(*args, **kwargs)) if _is_counted(x)]
            return [x[...] if isinstance(x, jax.Ref) else jnp.asarray(x) for x in returned]

        closed = jax.make_jaxpr(call)(*packed.arrays)
        refs = tuple(isinstance(x, jax.Ref) for x in closed.consts)
        consts = [_shape_of(x) if isinstance(x, jax.core.Tracer | jax.Ref) else x for x in closed.consts]
        return cls(closed.jaxpr, packed.arrays, tuple(consts), refs)

    @property
    def closure(self) -> list[jax.ShapeDtypeStruct]:
        """Those of `consts` whose values are not known."""
        return [x for x in self.consts if isinstance(x, jax.ShapeDtypeStruct)]

    def outputs(self, inputs: Iterable[Any], closure: Iterable[Any]) -> list[jax.Array]:
        """What the call returns for these values."""
        import jax.extend.core  # late: `import nnx_core` need not wait for it

        remaining = iter(closure)
        consts = []
        for x, is_ref in zip(self.consts, self.refs, strict=True):
            value = next(remaining) if isinstance(x, jax.ShapeDtypeStruct) else x
            consts.append(jax.new_ref(value) if is_ref else value)
        closed = jax.extend.core.ClosedJaxpr(self.jaxpr, consts)
        return [jnp.asarray(x) for x in jax.extend.core.jaxpr_as_fun(closed)(*inputs)]
