"""Numbers as options: sizes, shares and small numbers, of layers and of functions.

Law: numpy's numbers are taken as the Python numbers that they are; what cannot be meant is an OptionError where
the option is given, never other numbers later. Knows no particular layer.
"""

import operator
from typing import Any

import jax
import numpy as np

from nnx_core.module import Module
from nnx_core.nn._axes import as_tuple
from nnx_core.nn._errors import OptionError


def size(owner: Module | str, option: str, value: Any, *, least: int = 0) -> int:
    """`value` as an int; OptionError unless it is a whole number of at least `least`.

    >>> size("Linear", "in_features", np.int64(3))
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        fix = "It counts: give it one integer, Python's or numpy's."
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise OptionError(owner, option, expected, repr(value), fix)
    return number


def sizes(owner: Module | str, **options: Any) -> list[int]:
    """`size` of each of the options, in their order."""
    return [size(owner, option, value) for option, value in options.items()]


def shape(owner: Module | str, option: str, value: Any, *, least: int = 0) -> tuple[int, ...]:
    """`value` as a tuple of sizes; a single integer means one axis. OptionError for what is no size.

    >>> shape("Einsum", "kernel_shape", [3, np.int64(4)]), shape("Einsum", "bias_shape", 4)
    ((3, 4), (4,))
    """
    return tuple(size(owner, option, entry, least=least) for entry in as_tuple(value))


def share(owner: Module | str, option: str, value: Any, expected: str, fix: str) -> Any:
    """`value`; OptionError unless it is a number in [0, 1].

    A number of numpy's becomes Python's, whose dtype gives way to that of the arrays it meets. What a trace
    does not know yet passes: nothing can be said about it.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if not (_is_number(value) and 0 <= value <= 1):  # NaN compares false
        raise OptionError(owner, option, expected, repr(_plain(value)), fix)
    return _plain(value)


def probability(owner: Module | str, option: str, value: Any) -> Any:
    """`value`; OptionError unless it is a probability to drop something."""
    return share(owner, option, value, "a probability in [0, 1]", "It is the rate to drop, not to keep.")


def epsilon(owner: Module | str, value: Any) -> Any:
    """`value`; OptionError unless it is a number of at least zero, and finite."""
    if isinstance(value, jax.core.Tracer):
        return value
    if not (_is_number(value) and 0 <= value < float("inf")):
        fix = "It keeps a division by zero away; 1e-6 is usual."
        raise OptionError(owner, "epsilon", "a finite number, 0 or more", repr(_plain(value)), fix)
    return _plain(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (isinstance(value, np.ndarray | jax.Array) and not value.ndim)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
