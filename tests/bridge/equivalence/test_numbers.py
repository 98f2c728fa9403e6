"""How far two arrays are apart."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence.numbers import difference, on_host, same_bits

FLOATS = [np.float32, np.float16, jnp.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 1e-7])
def test_ulps_are_steps_between_neighbours(dtype, value):
    x = np.full(3, value, dtype)
    up = np.nextafter(x, np.asarray(np.inf, dtype))
    assert difference(np.nextafter(up, np.asarray(np.inf, dtype)), x).ulp == 2
    assert difference(x, up).ulp == 1


def test_ulps_across_zero_and_the_zeros():
    tiny = np.nextafter(np.float32(0), np.float32(1))
    assert difference(np.float32([tiny]), np.float32([-tiny])).ulp == 2
    zeros = difference(np.float32([-0.0]), np.float32([0.0]))
    assert (zeros.ulp, zeros.absolute, zeros.bit_equal, zeros.equal) == (0.0, 0.0, False, True)


def test_what_is_not_finite():
    x = np.float32([np.nan, np.inf, -np.inf, 1.0])
    assert difference(x, x.copy()).bit_equal
    other_nan = x.copy()
    other_nan.view("int32")[0] ^= 1  # another payload
    off = difference(other_nan, x)
    assert (off.absolute, off.ulp, off.bit_equal, off.equal) == (0.0, 0.0, False, True)
    for wrong in (np.float32([1, np.inf, -np.inf, 1]), np.float32([np.nan, -np.inf, -np.inf, 1])):
        assert difference(wrong, x).absolute == math.inf
        assert not difference(wrong, x).equal
    assert difference(x, np.float32([np.nan, np.inf, 3e38, 1.0])).absolute == math.inf


def test_integers_bools_and_keys_must_be_equal():
    assert difference(np.int32([1, 2]), np.int32([1, 2])).bit_equal
    off = difference(np.int32([1, 3]), np.int32([1, 2]))
    assert (off.absolute, off.tolerance, off.ulp, off.equal) == (1.0, 0.0, None, False)
    assert not difference(np.array([True]), np.array([False])).equal
    keys = jax.random.split(jax.random.key(0), 2)
    assert difference(keys, keys).bit_equal
    assert not difference(keys, keys[::-1]).equal


def test_shapes_and_dtypes():
    off = difference(np.zeros((2, 3), "float32"), np.zeros(6, "float32"))
    assert (off.equal, off.forms) == (False, "float32[2, 3], expected float32[6]")
    off = difference(jnp.ones(2, "bfloat16"), np.ones(2, "float32"))
    assert (off.equal, off.bit_equal, off.ulp) == (True, False, 0.0)
    assert off.forms == "bfloat16[2], expected float32[2]"
    assert off.tolerance == 6.4e-2
    assert difference(np.float32([1.01]), np.float32([1.0]), least=0.02).equal
    assert not difference(np.float32([1.01]), np.float32([1.0])).equal


def test_scale_is_of_what_is_expected_and_ratio_of_the_tolerance():
    off = difference(np.complex64([3 + 4j, 3]), np.complex64([0, 1]))
    assert (off.absolute, off.scale, off.relative, off.ulp) == (5.0, 1.0, 5.0, None)
    assert off.ratio == 5.0 / off.tolerance
    assert difference(np.zeros(3, "float32"), np.zeros(3, "float32")).ratio == 0
    assert difference(np.ones(3, "float32"), np.zeros(3, "float32")).ratio == math.inf
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))).equal


@pytest.mark.parametrize("large", [-1e9, 1e6, -3e38])
def test_what_is_the_same_and_large_hides_nothing(large):
    logits = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    logits[:, 4:] = large
    wrong = logits.copy()
    wrong[2, 1] += 0.1
    assert not difference(wrong, logits).equal
    rounded = logits.copy()
    rounded[:, :4] *= np.float32(1 + 1e-6)
    assert difference(rounded, logits).equal


def test_what_cancels_but_for_rounding_is_no_difference():
    x = np.float32([1.0, -2.0, 0.5, 0.0])
    residue = x.copy()
    residue[3] = 1e-7
    assert difference(residue, x).equal
    residue[3] = 1e-4
    assert not difference(residue, x).equal


def test_same_bits_of_trees():
    tree = {"a": np.float32([1.0]), "b": [jax.random.key(3)]}
    assert same_bits(tree, {"a": jnp.float32([1.0]), "b": [jax.random.key(3)]})
    assert not same_bits(tree, {"a": np.float32([1.0]), "b": [jax.random.key(4)]})
    assert not same_bits(tree, {"a": np.float32([1.0])})
    assert not same_bits({"a": np.float32([0.0])}, {"a": np.float32([-0.0])})
    assert on_host(jax.random.key(0)).dtype == np.uint32
