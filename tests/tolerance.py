"""Comparing trees of arrays, by the only table of tolerances: `bridge.equivalence.tolerance`.

Law: both helpers raise AssertionError naming every path that differs, and return nothing.
Knows leaves and paths; knows nothing of models, so a caller turns objects into trees first.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bridge.equivalence.tolerance import tolerance_of

_ORACLES = (np.dtype("float64"), np.dtype("complex128"))


def assert_trees_close(actual: Any, expected: Any) -> None:
    """Same paths and shapes, and values within the tolerance of a layer for the dtype of `actual`.

    Dtypes agree too, except that `expected` may be an oracle in float64 or complex128 (a Python float is).
    """
    _compare(actual, expected, _why_not_close)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same containers, paths, shapes and dtypes, and the same bits: -0.0 is not 0.0, NaN is itself.

    An array on the host equals the same array on a device; a Python number equals only its own type.
    """
    _compare(actual, expected, _why_not_equal)
    ours, theirs = jax.tree_util.tree_structure(actual), jax.tree_util.tree_structure(expected)
    if ours != theirs:
        raise AssertionError(f"the leaves are equal, their containers are not:\n  {ours}\n  {theirs}")


def _compare(actual: Any, expected: Any, why_not: Callable[[Any, Any], str | None]) -> None:
    ours, theirs = _leaves(actual), _leaves(expected)
    complaints = [f"{path}: missing" for path in theirs if path not in ours]
    complaints += [f"{path}: unexpected" for path in ours if path not in theirs]
    for path in ours:
        if path in theirs and (reason := why_not(ours[path], theirs[path])):
            complaints.append(f"{path}: {reason}")
    if complaints:
        raise AssertionError(f"{len(complaints)} of {len(ours | theirs)} leaves differ:\n  " + "\n  ".join(complaints))


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path. None counts as a leaf, or an array could vanish unseen."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path) or "(root)": leaf for path, leaf in leaves}


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _host(leaf: Any) -> np.ndarray:
    """The array on the host; an RNG key as the integers it is made of."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _kind(leaf: Any) -> str:
    """Dtype and shape as an error shows them: `float32[2, 3]`, `key<fry>[]`; a Python number its type."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _why_not_equal(actual: Any, expected: Any) -> str | None:
    if _kind(actual) != _kind(expected):
        return f"got {_kind(actual)}, expected {_kind(expected)}"
    if not _is_number(actual):
        return None if actual == expected else f"got {actual!r}, expected {expected!r}"
    a, b = _host(actual), _host(expected)
    differs = (_bytes_of_each(a) != _bytes_of_each(b)).any(axis=-1)
    return _worst(a, b, differs, "bit for bit") if differs.any() else None


def _why_not_close(actual: Any, expected: Any) -> str | None:
    if not (_is_number(actual) and _is_number(expected)):
        return _why_not_equal(actual, expected)
    a, b = _host(actual), _host(expected)
    if a.shape != b.shape or not (a.dtype == b.dtype or b.dtype in _ORACLES):
        return f"got {_kind(actual)}, expected {_kind(expected)}"
    row = tolerance_of(a.dtype.name)
    if row is None:
        return _why_not_equal(actual, expected)
    rtol, atol = row.rtol, row.atol
    with np.errstate(over="ignore"):  # an oracle may be finite where `actual` is infinite
        wide = np.result_type(a.dtype.name if a.dtype.kind == "c" else "float64", b.dtype)
        differs = ~np.isclose(a.astype(wide), b.astype(wide), rtol=rtol, atol=atol, equal_nan=True)
    return _worst(a, b, differs, f"rtol={rtol:g}, atol={atol:g}") if differs.any() else None


def _bytes_of_each(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(*array.shape, 1).view(np.uint8)


def _worst(a: np.ndarray, b: np.ndarray, differs: np.ndarray, law: str) -> str:
    """One line on the largest difference among those that break `law`; against NaN it is infinite."""
    wide = "complex128" if a.dtype.kind == "c" else "float64"
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(a.astype(wide) - b.astype(wide))
    size = np.where(np.isnan(size), np.inf, size)
    at = np.unravel_index(np.argmax(np.where(differs, size, -1)), a.shape)
    where = f" at {[int(i) for i in at]}" if at else ""
    worst = f"most by {size[at]:.3g}{where}: got {a[at]}, expected {b[at]}"
    return f"{differs.sum()} of {a.size} values differ ({law}), {worst}"
