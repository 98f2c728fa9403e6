"""Leaves in batches, each with its hash: budgets hold, stacks are read once, hashes see every bit."""

import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bridge.checkpoint.stream import MOST_LEAVES, batches, by_source, bytes_read, leaf_hash, values
from bridge.checkpoint.tree.ops import Block, Cast, Fill, Join, Read, Reshape, Transpose, unstack
from tests.support.checkpoint_fakes import MemorySource, leaf_of

# ---- hashes ------------------------------------------------------------------------------------------------


HASHED = arrays.scalar_dtypes().filter(lambda dtype: dtype.kind not in "Mm")  # no checkpoint holds dates


@given(arrays.arrays(HASHED, arrays.array_shapes(min_dims=0, min_side=0), fill=st.nothing()))
def test_a_hash_is_that_of_the_bytes_whatever_the_strides(array):
    little = array.astype(array.dtype.newbyteorder("<"))
    expected = hashlib.sha256(f"{little.dtype.name}{list(array.shape)}".encode() + little.tobytes()).hexdigest()
    assert leaf_hash(array) == expected
    assert leaf_hash(np.asarray(array, order="F")) == expected
    assert leaf_hash(np.repeat(array[..., None], 2, axis=-1)[..., 0]) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32(0.0), np.float32(-0.0)),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.zeros((2, 2)), np.zeros((4, 1))),
        (np.zeros(0), np.zeros((0, 1))),
        ("a", "b"),
        (1, 1.0),
        (True, 1),
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.key(0), jax.random.key_data(jax.random.key(0))),
        (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, np.float16)),
    ],
    ids=repr,
)
def test_different_leaves_have_different_hashes(one, other):
    assert leaf_hash(one) == leaf_hash(one)
    assert leaf_hash(one) != leaf_hash(other)


def test_a_leaf_on_a_device_hashes_like_the_same_on_the_host():
    host = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert leaf_hash(jnp.asarray(host)) == leaf_hash(host)
    assert leaf_hash(3) == leaf_hash(np.int64(3))


# ---- batches -----------------------------------------------------------------------------------------------

STACK, OTHER = ("stack",), ("other",)
LEAVES = {STACK: np.arange(4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2), OTHER: np.ones((6, 2), np.float32)}
SIZES = {path: value.nbytes for path, value in LEAVES.items()}
STACKED, PLAIN = Read(STACK, (4, 6, 2), "float32"), Read(OTHER, (6, 2), "float32")


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (STACKED, {STACK: 192}),
        (unstack(STACKED, 0)[2], {STACK: 48}),
        (Block(unstack(STACKED, 0)[2], 0, 0, 3), {STACK: 24}),
        (unstack(Reshape(STACKED, (2, 24)), 0)[1], {STACK: 96}),
        (unstack(Reshape(STACKED, (2, 24)), 1)[1], {STACK: 192}),
        (Transpose(unstack(STACKED, 1)[0], (1, 0)), {STACK: 32}),
        (Join((PLAIN, unstack(STACKED, 0)[0]), 0), {OTHER: 48, STACK: 48}),
        (Cast(PLAIN, "bfloat16"), {OTHER: 48}),
        (Fill(np.ones(3)), {}),
    ],
    ids=str,
)
def test_bytes_read_are_those_that_the_value_reads(op, expected):
    assert dict(bytes_read(op, SIZES)) == expected
    source = MemorySource(LEAVES)
    op.value(source.read)
    found = {path: sum(size for at, size in source.reads if at == path) for path, _ in source.reads}
    assert found == expected


def plan_of(ops):
    source = MemorySource(LEAVES)
    target = {path: leaf_of(path, np.zeros(op.shape, op.dtype)) for path, op in ops.items()}
    return source, target


def test_batches_hold_every_leaf_once_within_the_budget():
    ops = {("layers", str(i)): part for i, part in enumerate(unstack(STACKED, 0))} | {OTHER: PLAIN}
    source, target = plan_of(ops)
    for budget in (1, 48, 100, 192, 10_000):
        found = list(batches(ops, target, source.tree.leaves, budget))
        assert [path for batch in found for path in batch.leaves] == list(ops)
        assert all(batch.nbytes <= budget or len(batch.leaves) == 1 for batch in found)
    assert len(found) == 1
    assert found[0].nbytes == 192 + 48


def test_what_is_made_counts_beside_what_is_read():
    ops = {("sum",): Join((PLAIN, PLAIN), 0)}
    source, target = plan_of(ops)
    (batch,) = batches(ops, target, source.tree.leaves, 1)
    assert batch.nbytes == 48 + 96  # the source once, though it is read twice


def test_a_stack_that_is_taken_apart_is_read_once():
    ops = {("layers", str(i)): part for i, part in enumerate(unstack(STACKED, 0))}
    source, target = plan_of(ops)
    (batch,) = batches(ops, target, source.tree.leaves, 10_000)
    found = values(batch, source.read)
    assert source.reads == [(STACK, 192)]
    for i in range(4):
        value, digest = found["layers", str(i)]
        np.testing.assert_array_equal(value, LEAVES[STACK][i])
        assert digest == leaf_hash(LEAVES[STACK][i])


def test_parts_of_a_stack_are_read_alone_where_the_whole_does_not_fit():
    ops = {("layers", str(i)): part for i, part in enumerate(unstack(STACKED, 0))}
    source, target = plan_of(ops)
    for batch in batches(ops, target, source.tree.leaves, 100):
        values(batch, source.read)
    assert source.reads == [(STACK, 48)] * 4


def test_by_source_brings_parts_of_one_leaf_together():
    stacks = {name: Read((name,), (3, 2), "float32") for name in "ab"}
    ops = {(str(i), name): unstack(stacks[name], 0)[i] for i in range(3) for name in "ab"}
    ops[("new",)] = Fill(np.ones(1))
    assert list(by_source(ops)) == [("new",), *((str(i), name) for name in "ab" for i in range(3))]


def test_an_error_of_a_thread_comes_out():
    class Broken(MemorySource):
        def read(self, path, region=None):
            raise ValueError("cut short")

    ops = {OTHER: PLAIN}
    (batch,) = batches(ops, {OTHER: leaf_of(OTHER, LEAVES[OTHER])}, MemorySource(LEAVES).tree.leaves, 100)
    with pytest.raises(ValueError, match="cut short"):
        values(batch, Broken(LEAVES).read)


def test_a_batch_has_a_thousand_leaves_at_most():
    ops = {("new", str(i)): Fill(np.ones(1)) for i in range(2 * MOST_LEAVES + 1)}
    target = {path: leaf_of(path, np.ones(1)) for path in ops}
    sizes = [len(batch.leaves) for batch in batches(ops, target, {}, 10**9)]
    assert sizes == [MOST_LEAVES, MOST_LEAVES, 1]
