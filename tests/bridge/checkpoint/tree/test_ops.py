"""Expressions over leaves: their values are numpy's, a region is a slice of the whole, nothing is copied for a read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bridge.checkpoint.tree.ops import Block, Cast, Fill, Join, OpError, Pick, Read, Reshape, Transpose, unstack

DRAW = np.random.default_rng(0)
A, B = (DRAW.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
LEAVES = {("a",): A, ("b",): B}


def leaf(name):
    return Read((name,), LEAVES[(name,)].shape, "float32")


def read(path, region=None):
    return LEAVES[path] if region is None else LEAVES[path][region]


def on_device(path, region=None):
    return jnp.asarray(read(path, region))


CASES = {
    "read": (leaf("a"), A),
    "block": (Block(leaf("a"), -1, 2, 5), A[:, 2:5]),
    "pick": (Pick(leaf("a"), 0, 3), A[3]),
    "concat": (Join((leaf("a"), leaf("b")), -1), np.concatenate([A, B], -1)),
    "stack": (Join((leaf("a"), leaf("b")), 1, stack=True), np.stack([A, B], 1)),
    "transpose": (Transpose(leaf("a"), (1, 0)), A.T),
    "reshape": (Reshape(leaf("a"), (3, -1)), A.reshape(3, 8)),
    "cast": (Cast(leaf("a"), "bfloat16"), A.astype(jnp.bfloat16)),
    "fill": (Fill(A), A),
    "all": (
        Cast(Transpose(Pick(Join((leaf("a"), Block(leaf("b"), 1, 0, 6)), 0, stack=True), 0, 1), (1, 0)), "float16"),
        B.T.astype(np.float16),
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("reader", [read, on_device])
def test_values_shapes_and_dtypes_are_numpys(name, reader):
    op, wanted = CASES[name]
    value = op.value(reader)
    assert (op.shape, op.dtype) == (wanted.shape, str(wanted.dtype))
    assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
    assert np.asarray(value).tobytes() == wanted.tobytes()


@each_case
@given(data=st.data())
def test_a_region_is_a_slice_of_the_whole(name, data):
    op, wanted = CASES[name]
    starts = [data.draw(st.integers(0, size - 1)) for size in op.shape]
    region = tuple(
        slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, op.shape, strict=True)
    )
    assert np.asarray(op.value(read, region)).tobytes() == wanted[region].tobytes()


def test_a_region_reads_no_more_than_it_needs():
    seen = []

    def recorded(path, region=None):
        seen.append((path, region))
        return read(path, region)

    CASES["concat"][0].value(recorded, (slice(0, 2), slice(7, 9)))
    assert seen == [(("b",), (slice(0, 2), slice(1, 3)))]
    seen.clear()
    CASES["stack"][0].value(recorded, (slice(1, 2), slice(0, 1), slice(0, 6)))
    assert seen == [(("a",), (slice(1, 2), slice(0, 6)))]


def test_a_read_is_the_leaf_itself():
    assert leaf("a").value(read) is A


def test_stacks_come_apart_again():
    op = CASES["stack"][0]
    assert [np.array_equal(part.value(read), x) for part, x in zip(unstack(op, 1), (A, B), strict=True)] == [True, True]


def test_sources_and_rebasing():
    op = CASES["all"][0]
    assert list(op.sources()) == [("a",), ("b",)]
    moved = op.on(lambda path: Read(("mu", *path), (4, 6), "float32"))
    assert list(moved.sources()) == [("mu", "a"), ("mu", "b")]
    kept = op.on(lambda path: Read(path, (4, 6), "int8"))
    assert kept.dtype == "int8"  # a cast is for leaves of the dtype that it was made for
    with pytest.raises(OpError, match="does not fit"):
        op.on(lambda path: Read(path, (), "float32"))


@given(st.sampled_from(["int64", "float64", "int8", "bool", "complex64"]))
def test_a_cast_gives_what_it_says_even_where_jax_would_not(dtype):
    assume(not jax.config.jax_enable_x64)
    value = Cast(leaf("a"), dtype).value(on_device)
    assert str(value.dtype) == dtype


TEXTS = {
    "read": "a",
    "block": "2:5 along 1 of a",
    "pick": "3 along 0 of a",
    "concat": "concat along 1 of a, b",
    "stack": "stack along 1 of a, b",
    "transpose": "transpose [1, 0] of a",
    "reshape": "reshape [3, 8] of a",
    "cast": "cast to bfloat16 of a",
    "fill": "new",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    assert str(CASES[name][0]) == TEXTS[name]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Block(leaf("a"), 2, 0, 1), r"a: block does not fit\n  expected: an axis of 2\n  found: axis 2"),
        (lambda: Block(leaf("a"), 0, 3, 5), r"a part 3:5 of axis 0\n  found: shape \(4, 6\)"),
        (lambda: Pick(leaf("a"), 0, 4), r"element 4 of axis 0"),
        (lambda: Join((leaf("a"), Read(("c",), (4, 5), "float32")), 0), r"fits to a: float32\[4, 6\]\n  found: c"),
        (lambda: Join((leaf("a"), Read(("c",), (4, 6), "int8")), 0), r"found: c: int8\[4, 6\]"),
        (lambda: Transpose(leaf("a"), (0, 0)), r"each axis of \(4, 6\) once\n  found: axes \[0, 0\]"),
        (lambda: Reshape(leaf("a"), (5, -1)), r"a shape of 24 elements"),
        (lambda: Reshape(leaf("a"), (-1, -1)), r"a shape of 24 elements"),
        (lambda: Reshape(Read(("e",), (0, 3), "float32"), (-1, 0)), r"a shape of 0 elements"),  # any size would do
        (lambda: Cast(leaf("a"), "float33"), r"the name of a number type.*\n  found: 'float33'"),
        (lambda: Cast(Read(("k",), (), "key<fry>"), "uint32"), r"expected: numbers\n  found: key<fry>"),
        (lambda: unstack(Read(("s",), (), "float32"), 0), r"an axis 0 to take apart\n  found: shape \(\)"),
        (lambda: unstack(leaf("a"), 2), r"an axis 2 to take apart\n  found: shape \(4, 6\)"),
    ],
)
def test_what_does_not_fit(make, text):
    with pytest.raises(OpError, match=text):
        make()
