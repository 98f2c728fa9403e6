"""The comparison of programs, on which most of the layer matrix rests, tells programs apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.arrays import noise
from tests.twins import unless_same_program

X, Y = noise(0, 3), noise(1, 3)


def weighted(x, y):
    return {"sum": x * 2.0 + y}


def test_the_same_operations_are_one_program_whatever_they_are_called():
    def by_another_name(a, b):
        doubled = a * 2.0
        return {"sum": doubled + b}

    assert unless_same_program(weighted, by_another_name, X, Y) is None


TABLES = [np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.0, 4.0], np.float32)]

OTHERS = {
    "another operation": (weighted, lambda x, y: {"sum": x * 2.0 - y}),
    "another number": (weighted, lambda x, y: {"sum": x * 3.0 + y}),
    "another order of arguments": (lambda x, y: x - y, lambda x, y: y - x),
    "another argument": (lambda x, y: jnp.sin(x), lambda x, y: jnp.sin(y)),
    "another array outside": tuple(lambda x, y, table=table: x * jnp.asarray(table) for table in TABLES),
    "another array inside": tuple(jax.jit(lambda x, y, table=table: x * table) for table in TABLES),
    "another array inside what is computed again": tuple(
        jax.checkpoint(jax.jit(lambda x, y, table=table: x * table)) for table in TABLES
    ),
    "another dtype": (lambda x, y: x + y, lambda x, y: (x + y).astype(jnp.bfloat16)),
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_other_programs_are_run(pair):
    ours, theirs = unless_same_program(*pair, X, Y)
    for found, f in ((ours, pair[0]), (theirs, pair[1])):
        for a, b in zip(_leaves(found), _leaves(jax.jit(f)(X, Y)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_result_under_another_name_is_another_program():
    assert unless_same_program(weighted, lambda x, y: {"total": x * 2.0 + y}, X, Y) is not None


def _leaves(tree):
    return list(tree.values()) if isinstance(tree, dict) else [tree]
