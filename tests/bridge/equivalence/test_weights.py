"""The number that a comparison differentiates: every element counts, each with a weight of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence.numbers import is_inexact
from bridge.equivalence.weights import weighed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_element_has_a_weight_of_its_own(dtype):
    x = {"a": jnp.ones((3, 4), dtype), "b": [jnp.ones(5, dtype), jnp.ones((), dtype)]}
    gradients = jax.grad(weighed)(x)
    weights = np.concatenate([np.ravel(g).astype("float32") for g in jax.tree.leaves(gradients)])
    assert len(np.unique(weights)) == weights.size == 18
    assert np.abs(weights).max() <= 1


def test_both_parts_of_a_complex_number_count():
    x = jnp.array([1 + 2j, 3 - 1j])
    gradient = np.asarray(jax.grad(weighed)(x))
    assert len(set(gradient.real) | set(gradient.imag)) == 4
    assert (gradient.imag != 0).all()


def test_weights_are_balanced_and_other_for_another_salt():
    x = jnp.ones(10_000)
    first, second = (np.asarray(jax.grad(weighed)(x, salt)) * 100 for salt in (0, 1))
    for weights in (first, second):
        np.testing.assert_allclose(weights.mean(), 0, atol=0.03)
        np.testing.assert_allclose(weights.std(), 3**-0.5, atol=0.02)  # of a uniform number in [-1, 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_what_is_not_inexact_is_left_out():
    tree = (jnp.arange(3), jax.random.key(0), True, "text", jnp.zeros((0, 2)))
    assert float(weighed(tree)) == 0
    assert [is_inexact(x) for x in tree] == [False, False, False, False, True]
    assert float(weighed((*tree, jnp.ones(2)))) != 0
