"""Pooling against Linen's, bit for bit, and its errors."""

import inspect

import flax.linen.pooling as linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core.nn.pooling import PoolingError
from tests.support.arrays import noise
from tests.tolerance import assert_trees_equal
from tests.twins import unless_same_program

NAMES = ("avg_pool", "max_pool", "min_pool")
X = noise(0, 2, 6, 5, 3, mean=1)
CASES = {
    "valid": ((2, 3), {}),
    "strides": ((2, 2), {"strides": (2, 3)}),
    "same": ((3, 2), {"strides": (2, 1), "padding": "SAME"}),
    "same-lower": ((2, 2), {"padding": "SAME_LOWER"}),
    "lower-case": ((2, 2), {"padding": "same"}),
    "pairs": ((2, 3), {"padding": ((1, 0), (2, 1))}),
    "two-batch-axes": ((3,), {"strides": (2,), "padding": "SAME"}),
    "no-batch": ((2, 2, 2), {"padding": "SAME"}),
    "larger-than-the-input": ((7, 1), {}),
}


def program_size(f, x):
    return len(jax.make_jaxpr(f)(x).eqns)


def assert_equal(ours, theirs, x):
    """Values, and the gradient of floats; and no more equations than theirs has."""

    def both(f):
        def weighted(x):
            y = f(x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)).astype(jnp.float32)

        return lambda x: (f(x), jax.grad(weighted)(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else (f(x), None)

    results = unless_same_program(both(ours), both(theirs), x)
    if results is not None:
        assert_trees_equal(*results)
    assert program_size(ours, x) <= program_size(theirs, x)


@pytest.mark.parametrize(("window", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_against_linen(name, window, options):
    ours, theirs = getattr(nnx, name), getattr(linen, name)
    assert_equal(lambda x: ours(x, window, **options), lambda x: theirs(x, window, **options), X)


@pytest.mark.parametrize("name", NAMES)
def test_lists_and_explicit_padding_with_two_batch_axes(name):
    # Linen takes no lists, and explicit padding only with one batch axis or none.
    y = getattr(nnx, name)(X, [3], strides=[2], padding=[[1, 0]])
    theirs = getattr(linen, name)(X.reshape(12, 5, 3), (3,), strides=(2,), padding=((1, 0),))
    assert_trees_equal(y, theirs.reshape(2, 6, -1, 3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.uint8], ids=["bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    ours, theirs = getattr(nnx, name), getattr(linen, name)
    x = (X * 4).astype(dtype)
    assert_equal(lambda x: ours(x, (2, 2), padding="SAME"), lambda x: theirs(x, (2, 2), padding="SAME"), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32], ids=["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("window", [(2,), (2, 3), (2, 2, 2)], ids=["two-batch-axes", "batch", "no-batch"])
def test_mean_over_the_pixels_of_the_input_only(window, dtype):
    def pooled(library):
        return lambda x: library.avg_pool(x, window, padding="SAME", count_include_pad=False)

    assert_equal(pooled(nnx), pooled(linen), (X * 4).astype(dtype))
    ones = jnp.ones(X.shape, dtype)
    assert_trees_equal(pooled(nnx)(ones), jnp.ones(X.shape, jnp.float32))


def test_window_by_window_in_numpy():
    x = np.asarray(X)
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 3), axis=(1, 2))[:, ::2, ::1]
    assert_trees_equal(nnx.max_pool(X, (2, 3), strides=(2, 1)), windows.max((-2, -1)))
    assert_trees_equal(nnx.min_pool(X, (2, 3), strides=(2, 1)), windows.min((-2, -1)))


def test_any_reduction():
    y = nnx.pool(X, 1.0, jax.lax.mul, (2,), None, "VALID")
    assert_trees_equal(y, X[:, :, :-1] * X[:, :, 1:])
    y = nnx.pool(X, 0.0, jax.lax.add, (2, 1), (2, 1), ((0, 0), (1, 0)))
    assert_trees_equal(y, linen.pool(X, 0.0, jax.lax.add, (2, 1), (2, 1), ((0, 0), (1, 0))))


@pytest.mark.parametrize("name", [*NAMES, "pool"])
def test_signature_is_that_of_flax_nnx(name):
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (nnx, flax.nnx))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


ERRORS = {
    "rank": (
        {"window_shape": (2, 2, 2, 2)},
        r"inputs of.*\(\*batch, spatial_0, .*spatial_3, features\).*found +shape \(2, 6, 5, 3\).*features are last",
    ),
    "window": ({"window_shape": 2}, r"window_shape of.*a sequence of integers.*found +2\nWrite \(2, 2\)"),
    "strides": ({"strides": (2,)}, r"strides of.*None or 2 integers.*found +\(2,\)\nwindow_shape is \(2, 2\)"),
    "strides-type": ({"strides": 2}, r"strides of.*None or 2 integers.*found +2\n"),
    "padding-name": ({"padding": "CIRCULAR"}, r"padding of.*one of SAME, SAME_LOWER, VALID.*found +'CIRCULAR'"),
    "padding-count": ({"padding": ((1, 1),)}, r"padding of.*2 \(before, after\) pairs.*found +\(\(1, 1\),\)"),
    "padding-integers": ({"padding": (1, 1)}, r"padding of.*pairs.*found +\(1, 1\).*write \(\(1, 1\), \.\.\.\)"),
    "padding-type": ({"padding": 1}, r"padding of.*pairs.*found +1\n"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_error(name, options, message):
    with pytest.raises(PoolingError, match=f"(?s){message}"):
        getattr(nnx, name)(X, **({"window_shape": (2, 2)} | options))


def test_the_error_is_an_nnx_error_and_a_builtin():
    assert issubclass(PoolingError, nnx.NnxError)
    assert issubclass(PoolingError, ValueError)
