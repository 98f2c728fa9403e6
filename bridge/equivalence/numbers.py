"""How far two arrays are apart: in their bits, in units in the last place, in numbers, and to their tolerance.

Law: equal NaNs are equal, and infinities of one sign; what is finite on one side only is infinitely far off.
Knows arrays; knows nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.equivalence.tolerance import tolerance_of

_LAST_BITS = 8.0
_FAR_LARGER = 1e3
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Difference:
    """How far one array is from another.

    Attributes:
      absolute: the largest difference of two elements; infinite where the shapes differ.
      scale: the largest finite element of the expected array, of those that are not the same in both: what masks with
        -1e9, on both sides, does not make the others any less exact. If all are the same, of all.
      ulp: the largest difference in units in the last place, of the coarser dtype; None for what is not floating.
      tolerance: what `absolute` may be.
      bit_equal: whether dtypes, shapes and bits are the same.
      forms: the two dtypes and shapes, if they differ; else "".
    """

    absolute: float
    scale: float
    ulp: float | None
    tolerance: float
    bit_equal: bool
    forms: str = ""

    @property
    def relative(self) -> float:
        """`absolute` over `scale`."""
        return over(self.absolute, self.scale)

    @property
    def ratio(self) -> float:
        """`absolute` over `tolerance`: up to 1, the arrays are the same."""
        return over(self.absolute, self.tolerance)

    @property
    def equal(self) -> bool:
        """Whether shapes are the same, and elements as near as their dtypes allow."""
        return self.absolute <= self.tolerance


def difference(actual: Any, expected: Any, least: float = 0.0) -> Difference:
    """How far `actual` is from `expected`.

    The tolerance is that of a whole model, by the coarser of the two dtypes: relative to the scale.

    Args:
      actual, expected: arrays on host or device, numbers, or random keys, which must be equal.
      least: the smallest tolerance, relative to the scale; for what was made of numbers in a coarser dtype.

    >>> difference(np.float32([1.0, 2.0]), np.float32([1.0, 2.0])).bit_equal
    True
    >>> off = difference(np.float32([1.0, 2.5]), np.float32([1.0, 2.0]))
    >>> off.absolute, off.relative, off.equal
    (0.5, 0.25, False)
    """
    a, b = on_host(actual), on_host(expected)
    own, wanted = (form_of(x if is_key(x) else host) for x, host in ((actual, a), (expected, b)))
    forms = "" if own == wanted else f"{own}, expected {wanted}"
    if a.shape != b.shape:
        return Difference(math.inf, _largest(b), None, 0.0, False, forms)
    bit_equal = not forms and a.tobytes() == b.tobytes()
    scale = _largest(b) if bit_equal else _largest(b[_apart(a, b)] if a.ndim else b)
    relative = [relative_tolerance(x.dtype.name) for x in (a, b)]
    tolerance = max(max(*relative, least) * scale, _rounding(a, b)) if all(relative) else 0.0
    absolute = 0.0 if bit_equal else _farthest(a, b)
    return Difference(absolute, scale, 0.0 if bit_equal and _is_real(a) else _ulps(a, b), tolerance, bit_equal, forms)


def relative_tolerance(dtype: str) -> float:
    """Of a whole model's output to its largest element; 0 for a dtype that must be equal."""
    row = tolerance_of(dtype)
    return 0.0 if row is None else row.model


def on_host(x: Any) -> np.ndarray:
    """The numbers on the host; of a random key, those that it is made of."""
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def form_of(x: Any) -> str:
    """Dtype and shape of an array; a random key is not the numbers that it is made of.

    >>> form_of(np.zeros((2, 3), "float32"))
    'float32[2, 3]'
    """
    return f"{x.dtype}{list(x.shape)}"


def is_key(x: Any) -> bool:
    """Whether `x` is an array of random keys."""
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_inexact(x: Any) -> bool:
    """Whether `x` is an array, real or abstract, of floating or complex numbers."""
    return hasattr(x, "shape") and hasattr(x, "dtype") and not is_key(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees have the same leaves, in dtype, shape and bits."""
    ones, others = jax.tree.leaves(one), jax.tree.leaves(other)
    if len(ones) != len(others):
        return False
    return all(_same_bits(on_host(a), on_host(b)) for a, b in zip(ones, others, strict=True))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def largest(xs: Any) -> float:
    """The largest finite absolute value in all of them."""
    most = 0.0
    for x in jax.tree.leaves(list(xs)):
        if is_inexact(x) and x.size:
            wide = np.abs(on_host(x).astype("complex128"))
            most = max(most, float(wide.max(where=np.isfinite(wide), initial=0.0)))
    return most


def over(size: float, most: float) -> float:
    """`size` over `most`: of nothing over nothing 0, of something over nothing infinity."""
    if most:
        return size / most
    return math.inf if size else 0.0


def _largest(x: np.ndarray) -> float:
    if x.dtype.kind not in "biufcV":
        return 0.0
    wide = x.astype("complex128" if x.dtype.kind == "c" else "float64")
    return float(np.abs(wide, where=np.isfinite(wide), out=np.zeros(wide.shape)).max(initial=0.0))


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where the two are not the same; everywhere, if they are the same but for their bits."""
    apart = ~((a == b) | ((a != a) & (b != b)))
    return apart if apart.any() else np.ones_like(apart)


def _rounding(a: np.ndarray, b: np.ndarray) -> float:
    """What sums of numbers of the usual size leave where they should cancel; what is far larger is a mask."""
    sizes = np.abs(b.astype("complex128" if b.dtype.kind == "c" else "float64")).ravel()
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not sizes.size:
        return 0.0
    usual = min(sizes.max(), _FAR_LARGER * np.quantile(sizes, 0.25))
    return float(_LAST_BITS * max(jnp.finfo(x.dtype).eps for x in (a, b)) * usual)


def _farthest(a: np.ndarray, b: np.ndarray) -> float:
    wide = "complex128" if "c" in (a.dtype.kind, b.dtype.kind) else "float64"
    a, b = a.astype(wide), b.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(a - b))
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))


def _is_real(x: np.ndarray) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _ulps(a: np.ndarray, b: np.ndarray) -> float | None:
    """Counted as steps between neighbouring numbers of the dtype: equal NaNs are none, a NaN and a number infinite."""
    if not (_is_real(a) and _is_real(b)) or not a.size:
        return None
    dtype = min(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).nmant)
    if dtype.itemsize not in _SIGNED:
        return None
    a, b = a.astype(dtype), b.astype(dtype)
    both, one = np.isnan(a) & np.isnan(b), np.isnan(a) ^ np.isnan(b)
    if one.any():
        return math.inf
    ordered_a, ordered_b = _ordered(a), _ordered(b)
    # Integers of two signs may be too far apart for one of 64 bits, and those of one sign too near for a float.
    apart = np.abs(ordered_a.astype("float64")) + np.abs(ordered_b.astype("float64"))
    one_sign = (ordered_a < 0) == (ordered_b < 0)
    near = np.abs(np.where(one_sign, ordered_a - ordered_b, 0))
    steps = np.where(one_sign, near, apart)
    return float(np.where(both, 0.0, steps).max(initial=0.0))


def _ordered(x: np.ndarray) -> np.ndarray:
    """Integers in the order of the numbers, neighbours next to each other; both zeros are 0."""
    bits = x.view(_SIGNED[x.dtype.itemsize]).astype(np.int64)
    return np.where(bits < 0, np.int64(-1) * (bits & np.iinfo(_SIGNED[x.dtype.itemsize]).max), bits)
