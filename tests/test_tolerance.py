"""The comparing helpers fail where they must: every test elsewhere leans on that."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bridge.equivalence.tolerance import TOLERANCES
from tests.support.arrays import key, ones
from tests.tolerance import assert_trees_close, assert_trees_equal

ONE = np.float32(1.0)
RBG = jax.random.wrap_key_data(np.zeros(4, np.uint32), impl="rbg")
BOTH = pytest.mark.parametrize("check", [assert_trees_close, assert_trees_equal])


def tree(kernel=ONE, **more):
    return {"layers": [{"kernel": kernel}], **more}


@BOTH
def test_equal_trees_pass(check):
    leaves = {
        "key": jax.random.key(0),
        "none": None,
        "name": "dense",
        "empty": np.zeros((0, 3)),
        "n": np.arange(4),
    }
    check(tree(ones(2, 3), **leaves), tree(np.ones((2, 3), np.float32), **leaves))


@BOTH
@pytest.mark.parametrize(
    ("actual", "expected", "text"),
    [
        (ones(2, 3), np.ones((3, 2), np.float32), r"got float32\[2, 3\], expected float32\[3, 2\]"),
        (np.ones(2, np.float32), np.float32(1), r"got float32\[2\], expected float32\[\]"),
        (ones(2, dtype=jnp.bfloat16), ones(2), r"got bfloat16\[2\], expected float32\[2\]"),
        (np.float64(1), ONE, r"got float64\[\], expected float32\[\]"),
        (np.int32(1), np.int32(2), r"1 of 1 values differ \(bit for bit\), most by 1: got 1, expected 2"),
        (np.array([True, False]), np.array([True, True]), r"most by 1 at \[1\]: got False, expected True"),
        (key(0), key(1), r"1 of 2 values differ \(bit for bit\)"),
        (key(0), RBG, r"got key<fry>\[\], expected key<rbg>\[\]"),
        (np.float32(np.nan), ONE, "most by inf: got nan, expected 1.0"),
        (np.float32(np.inf), np.float32(-np.inf), "most by inf: got inf, expected -inf"),
        (
            np.array([0.0, 1.0, 5.0], np.float32),
            np.array([0.0, 2.0, 3.0], np.float32),
            r"2 of 3 .* 2 at \[2\]: got 5.0, expected 3.0",
        ),
        (np.complex64(1j), np.complex64(2j), "most by 1: got 1j, expected 2j"),
        (None, ONE, r"got NoneType, expected float32\[\]"),
        ("dense", "conv", "got 'dense', expected 'conv'"),
        (1, 2, "most by 1: got 1, expected 2"),
    ],
)
def test_different_leaves_fail_by_path(check, actual, expected, text):
    with pytest.raises(AssertionError, match=r"1 of 1 leaves differ:\n  \['layers'\]\[0\]\['kernel'\]: .*" + text):
        check(tree(actual), tree(expected))


@BOTH
def test_missing_and_unexpected_paths_fail(check):
    with pytest.raises(AssertionError, match=r"(?s)2 of 3 .*\['bias'\]: missing.*\['scale'\]: unexpected"):
        check(tree(scale=ONE), tree(bias=ONE))


@pytest.mark.parametrize("dtype", [name for name in TOLERANCES if not name.endswith(("64", "128"))])
def test_close_holds_just_inside_and_fails_just_outside(dtype):
    row = TOLERANCES[dtype][jax.default_backend()]
    rtol, atol = row.rtol, row.atol
    here = np.full(3, 1.0).astype(getattr(ml_dtypes, dtype, dtype))
    assert_trees_close(here, 1.0 + np.array([0.0, 0.9, -0.9]) * (rtol + atol))
    with pytest.raises(AssertionError, match=rf"1 of 3 values differ \(rtol={rtol:g}, atol={atol:g}\)"):
        assert_trees_close(here, 1.0 + np.array([0.0, 1.1, 0.0]) * (rtol + atol))


def test_tolerance_covers_every_platform():
    assert all(set(row) == {"cpu", "gpu", "tpu"} for row in TOLERANCES.values())


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.float32(0.0), np.float32(-0.0)),
        (ONE, np.nextafter(ONE, 2, dtype=np.float32)),
        (np.ones(3), np.ones(3) + 1e-15),
    ],
)
def test_equal_sees_one_bit_where_close_does_not(actual, expected):
    assert_trees_close(actual, expected)
    with pytest.raises(AssertionError, match=r"\(root\): \d of \d values differ \(bit for bit\)"):
        assert_trees_equal(actual, expected)


def test_equal_sees_containers_and_python_numbers():
    with pytest.raises(AssertionError, match="their containers are not"):
        assert_trees_equal([ONE], (ONE,))
    with pytest.raises(AssertionError, match="got int, expected float"):
        assert_trees_equal(1, 1.0)
