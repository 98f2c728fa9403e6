"""Writing into a value that is there: `v[...] = x` and `v[i] = x`, as numpy and `jax.Ref` understand them.

Law: structure, shapes, dtypes and devices of what is written into stay; what is written is broadcast and cast,
or raises WriteError. The result is a new value: arrays (numpy's too), lists and dicts may be shared with clones
and States, and a write to one Variable reaches no other. Knows values; knows no Variables.
"""

import copy
from collections.abc import Callable
from numbers import Number
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core._errors import WriteError
from nnx_core._repr import show_value

#: Says which Variable is written; only asked if that fails.
Where = Callable[[], str]
_NUMBER = Number | np.generic


def written(old: Any, index: Any, value: Any, where: Where) -> Any:
    """`old` with `value` written into it: everywhere for the index `...`, else into the part under `index`."""
    if index is ...:
        return _filled(old, value, where)
    if isinstance(old, jax.Array | _NUMBER):
        return _with_part(jnp.asarray(old), index, value, where)
    if isinstance(old, np.ndarray) and isinstance(value, jax.core.Tracer):
        return _with_part(jnp.asarray(old), index, value, where)
    return _with_item(old, index, value, where)


def fitted_part(shape: tuple[int, ...], dtype: Any, index: Any, value: Any, where: Where) -> jax.Array:
    """`value` in the dtype, and the shape under `index`, of an array of this shape and dtype."""
    part = jax.ShapeDtypeStruct(shape, dtype)
    if index is not ...:
        part = jax.eval_shape(lambda x: x[index], part)
    return _broadcast(_cast(value, part, where), value, part, where)


def _filled(old: Any, value: Any, where: Where) -> Any:
    if isinstance(old, jax.Array):
        return _array_filled(old, value, where)
    if isinstance(old, np.ndarray) and not isinstance(value, jax.core.Tracer):
        return _numpy_filled(old, value, where)
    if isinstance(old, np.ndarray | _NUMBER):
        return _array_filled(jnp.asarray(old), value, where)
    if isinstance(old, jax.ShapeDtypeStruct):
        if isinstance(value, jax.ShapeDtypeStruct) and (value.shape, value.dtype) == (old.shape, old.dtype):
            return value
        return fitted_part(old.shape, old.dtype, ..., value, where)
    return _tree_filled(old, value, where)


def _array_filled(old: jax.Array, value: Any, where: Where) -> jax.Array:
    if not (
        isinstance(value, jax.Array)
        and value.shape == old.shape
        and value.dtype == old.dtype
        # A strong type into a weak one is no other dtype; a weak one would change what `old` promotes to.
        and not (_is_weak(value) and not _is_weak(old))
    ):
        new = _cast(value, old, where)
        if new.ndim == 0 and old.ndim and isinstance(old, jax.core.Tracer):
            return old.at[...].set(new)  # a function of `old`, or what is compiled would not know on which devices
        if new.ndim == 0 and old.ndim:
            return jax.lax.full_like(old, new)  # nothing larger than `value` on other devices than those of `old`
        value = _broadcast(new, value, old, where)
    return _placed_like(old, value, where)


def _is_weak(x: jax.Array) -> bool:
    return getattr(x, "weak_type", False)  # a key array has none


def _cast(value: Any, old: Any, where: Where) -> jax.Array:
    """`value` as an array of the dtype of `old`."""
    try:
        new = jnp.asarray(value)
    except (TypeError, ValueError):
        _refuse(old, value, where)
    if new.dtype == old.dtype and not (_is_weak(new) and not _is_weak(old)):
        return new
    keys = jnp.issubdtype(new.dtype, jax.dtypes.prng_key) or jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
    # The imaginary part is no rounding error.
    is_real = not jnp.issubdtype(old.dtype, jnp.complexfloating) and old.dtype != jnp.bool_
    if (keys and new.dtype != old.dtype) or (is_real and jnp.issubdtype(new.dtype, jnp.complexfloating)):
        _refuse(old, value, where)
    return new.astype(old.dtype)


def _broadcast(new: jax.Array, value: Any, old: Any, where: Where) -> jax.Array:
    """`new`, which is `value` cast, in the shape of `old`."""
    if new.shape == old.shape:
        return new
    try:
        return jnp.broadcast_to(new, old.shape)
    except ValueError:
        _refuse(old, value, where)


def _placed_like(old: jax.Array, new: jax.Array, where: Where) -> jax.Array:
    """`new` on the devices of `old`, unless it was spread over them in a way of its own."""
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer) or not old.committed:
        return new
    if new.sharding == old.sharding:
        return new
    if new.committed:
        if new.sharding.device_set != old.sharding.device_set:
            expected, got = (f"an array on {_devices(x)}" for x in (old, new))
            raise WriteError(where(), expected, got)
        if not new.sharding.is_fully_replicated:
            return new
    return jax.device_put(new, old.sharding)


def _devices(x: jax.Array) -> str:
    names = [str(device) for device in sorted(x.sharding.device_set, key=lambda device: device.id)]
    return ", ".join(names) if len(names) < 5 else f"{names[0]}, {names[1]}, ... ({len(names)} devices)"


def _numpy_filled(old: np.ndarray[Any, Any], value: Any, where: Where) -> np.ndarray[Any, Any]:
    new = np.empty_like(old)
    try:
        new[...] = value
    except (TypeError, ValueError):
        _refuse(old, value, where)
    return new


def _tree_filled(old: Any, value: Any, where: Where) -> Any:
    """Each array of a pytree filled, where `value` is a tree of the same structure."""
    leaves, treedef = jax.tree.flatten(old)
    if jax.tree_util.treedef_is_leaf(treedef) or not leaves:
        _refuse(old, value, where)
    new, new_treedef = jax.tree.flatten(value)
    if new_treedef != treedef:
        raise WriteError(where(), str(treedef), str(new_treedef))
    return treedef.unflatten([_filled(a, b, where) for a, b in zip(leaves, new, strict=True)])


def _with_part(old: jax.Array, index: Any, value: Any, where: Where) -> jax.Array:
    new = _cast(value, old, where)
    try:
        return old.at[index].set(new)
    except ValueError:
        part = jax.eval_shape(lambda x: x[index], old)
        if _fits(new.shape, part.shape):
            raise  # something else is wrong
        _refuse(part, value, where)


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, into) == into
    except ValueError:
        return False


def _with_item(old: Any, index: Any, value: Any, where: Where) -> Any:
    """A copy of a numpy array, a list, a dict, ... with one item set."""
    if not hasattr(type(old), "__setitem__"):
        raise WriteError(where(), "a value with items that can be set", show_value(old))
    new = old.copy() if isinstance(old, np.ndarray) else copy.copy(old)
    try:
        new[index] = value
    except ValueError:
        if not isinstance(old, np.ndarray):
            raise
        _refuse(old[index], value, where)
    return new


def _refuse(old: Any, value: Any, where: Where) -> NoReturn:
    if hasattr(old, "shape") and hasattr(old, "dtype"):
        expected = f"what broadcasts to shape {tuple(old.shape)} and casts to {old.dtype}"
    else:
        expected = f"nothing: it holds {show_value(old)}, which is no array"
    raise WriteError(where(), expected, show_value(value)) from None
