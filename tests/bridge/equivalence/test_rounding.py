"""What the last bit of a number is, and what moving it does."""

import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence.drawing import with_last_bits_moved
from bridge.equivalence.numbers import relative_tolerance
from bridge.equivalence.rounding import last_bit

HALVES = ("bfloat16", "float16")
X = np.random.default_rng(0).uniform(1, 2, 4096).astype("float32")


def apart(x, y):
    """The largest distance of two arrays, relative to the numbers; how many differ."""
    x, y = (np.asarray(each, "float64") for each in (x, y))
    return np.max(np.abs(x - y) / np.abs(x)), np.mean(x != y)


@pytest.mark.parametrize("name", HALVES)
def test_one_rounding_brings_two_programs_apart_by_the_last_bit(name):
    """Two sums in other orders, as it were: the same numbers but for float32's own rounding."""
    eps = last_bit(relative_tolerance(name))
    worst, _ = apart(*(jnp.asarray(X * np.float32(factor)).astype(name) for factor in (1 - 1e-6, 1 + 1e-6)))
    assert 0.75 * eps < worst <= eps
    off, _ = apart(X, jnp.asarray(X).astype(name))  # either is off by the half of it
    assert 0.75 * eps < 2 * off <= eps


@pytest.mark.parametrize("name", HALVES)
def test_every_number_is_another_one_with_its_last_bit_moved(name):
    eps = last_bit(relative_tolerance(name))
    for x in (X, np.asarray(jnp.asarray(X).astype(name))):  # kept in float32, or in half precision
        moved = with_last_bits_moved(x, eps)
        assert apart(jnp.asarray(x).astype(name), jnp.asarray(moved).astype(name))[1] == 1
    halfway = with_last_bits_moved(X, eps / 2)
    assert apart(jnp.asarray(X).astype(name), jnp.asarray(halfway).astype(name))[1] < 0.8


def test_without_half_precision_the_coarsest_value_counts():
    assert last_bit(0.0, np.float32(1), np.float64(1), np.int32(1)) == float(np.finfo("float32").eps)
    assert last_bit(0.0, np.float64(1)) == float(np.finfo("float64").eps)
    assert last_bit(0.0, np.int32(1)) == 0.0
