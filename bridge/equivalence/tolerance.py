"""How far numbers may be apart that are to be the same: the only table of tolerances, for users and for the tests.

Law: a tolerance follows from a dtype and a platform and from nothing else.
Knows dtypes; knows nothing of arrays or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Tolerance:
    """What one dtype allows on one platform.

    Attributes:
      rtol, atol: for one layer, element by element: relative to the element, and beside it.
      model: for a whole model: of the largest difference to the largest value of an output.
      measured: whether the row was measured on that platform; else it is what its arithmetic leads one to expect.
    """

    rtol: float
    atol: float
    model: float
    measured: bool


# dtype -> platform. What is absent (integers, bools, RNG keys, strings) must be equal.
# A float32 sum over n ~ 1e3 terms in another order moves by ~ sqrt(n) * 2^-24 = 2e-6; the rows are a few times that.
# Half precision is four unit roundoffs: 2^-11 and 2^-8. GPUs and TPUs approximate exp and tanh. Ten layers add up to
# ten times as much, four where layers round to half precision. Swapped layers differ by far more.
_FLOAT64 = {
    "cpu": Tolerance(1e-12, 1e-13, 1e-11, True),
    "gpu": Tolerance(1e-12, 1e-13, 1e-9, False),
    "tpu": Tolerance(1e-10, 1e-12, 1e-9, False),
}
_FLOAT32 = {
    "cpu": Tolerance(1e-5, 2e-6, 1e-4, True),
    "gpu": Tolerance(2e-5, 5e-6, 1e-3, False),
    "tpu": Tolerance(1e-4, 1e-5, 1e-3, False),
}
_FLOAT16 = {
    "cpu": Tolerance(2e-3, 2e-4, 8e-3, True),
    "gpu": Tolerance(2e-3, 2e-4, 8e-3, False),
    "tpu": Tolerance(2e-3, 2e-4, 8e-3, False),
}
_BFLOAT16 = {
    "cpu": Tolerance(1.6e-2, 2e-3, 6.4e-2, True),
    "gpu": Tolerance(1.6e-2, 2e-3, 6.4e-2, False),
    "tpu": Tolerance(1.6e-2, 2e-3, 6.4e-2, False),
}
TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "float64": _FLOAT64,
    "float32": _FLOAT32,
    "float16": _FLOAT16,
    "bfloat16": _BFLOAT16,
    "complex128": _FLOAT64,
    "complex64": _FLOAT32,
}


def tolerance_of(dtype: str, platform: str | None = None) -> Tolerance | None:
    """The row of a dtype, by its name, on the default backend or another platform; None if it must be equal.

    >>> tolerance_of("int32"), tolerance_of("float32", "cpu").rtol
    (None, 1e-05)
    """
    platforms = TOLERANCES.get(dtype)
    return None if platforms is None else platforms[platform or jax.default_backend()]
