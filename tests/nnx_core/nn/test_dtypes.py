"""promote_dtype and canonicalize_dtype against Linen's."""

import itertools

import flax.linen.dtypes
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_core.nn.dtypes import canonicalize_dtype, promote_dtype
from tests.support.arrays import ones
from tests.tolerance import assert_trees_equal

VALUES = {
    "bool": ones(2, dtype=bool),
    "int8": ones(2, dtype=np.int8),
    "uint32": ones(2, dtype=np.uint32),
    "bfloat16": ones(2, dtype=jnp.bfloat16),
    "float16": ones(2, dtype=np.float16),
    "float32": ones(2),
    "complex64": ones(2, dtype=np.complex64),
    "numpy": np.ones(2, np.float32),
    "int": 1,
    "float": 1.5,
    "none": None,
}
PAIRS = [pair for pair in itertools.combinations_with_replacement(VALUES, 2) if pair != ("none", "none")]


@pytest.mark.parametrize("inexact", [True, False], ids=["inexact", "any"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_inferred_as_linen_does(names, inexact):
    args = [VALUES[name] for name in names]
    ours = promote_dtype(tuple(args), inexact=inexact)
    assert_trees_equal(list(ours), list(flax.linen.dtypes.promote_dtype(*args, inexact=inexact)))
    expected = flax.linen.dtypes.canonicalize_dtype(*args, inexact=inexact)
    assert canonicalize_dtype(*args, inexact=inexact) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32, jnp.complex64], ids=str)
def test_given(dtype):
    ours = promote_dtype((VALUES["float32"], VALUES["int8"], None), dtype=dtype)
    theirs = flax.linen.dtypes.promote_dtype(VALUES["float32"], VALUES["int8"], None, dtype=dtype)
    assert_trees_equal(list(ours), list(theirs))
    assert canonicalize_dtype(dtype=dtype) is dtype


def test_integer_dtype_where_floats_are_needed():
    with pytest.raises(ValueError, match=r"must be inexact.*found int32.*inexact=False"):
        canonicalize_dtype(VALUES["float32"], dtype=jnp.int32)
    assert canonicalize_dtype(VALUES["float32"], dtype=jnp.int32, inexact=False) is jnp.int32
