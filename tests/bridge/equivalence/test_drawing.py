"""What models are run on: random, of the author's sizes, and no variable as it was."""

import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence.drawing import Draw


@pytest.mark.parametrize("value", [np.zeros((4, 4), "int8"), np.full((3, 5), 7), np.ones((4, 4), bool)])
def test_integers_that_are_all_the_same_are_drawn(value):
    draws = [Draw(seed).near(value) for seed in range(3)]
    assert all(draw.dtype == value.dtype and draw.shape == value.shape for draw in draws)
    assert all(len(np.unique(draw)) > 1 for draw in draws)
    assert not np.array_equal(draws[0], draws[1])
    if value.dtype != bool:
        assert all((draw >= value).all() and (draw <= value + 2).all() for draw in draws)


def test_integers_that_differ_are_shuffled_and_the_seed_decides():
    value = np.arange(12).reshape(3, 4)
    drawn = Draw(3).near(value)
    assert sorted(drawn.ravel()) == list(range(12))
    np.testing.assert_array_equal(drawn, Draw(3).near(value))


def test_zeros_and_ones_are_drawn_and_signs_stay():
    zeros, ones = Draw(0).near(np.zeros((16, 4), "float32")), Draw(0).near(-jnp.ones(5))
    assert np.abs(zeros).max() <= 0.5 / 16**0.5
    assert len(np.unique(zeros)) == zeros.size
    assert ((ones <= -0.5) & (ones > -1.5)).all()
