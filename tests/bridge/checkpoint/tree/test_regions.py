"""Parts of arrays: numpy's row-major order is what they are held against."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint.tree.regions import blocks, boxes, run_of, shape_of, whole

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def numbered(shape):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


@given(SHAPES, st.data())
def test_boxes_are_the_elements_in_order(shape, data):
    array = numbered(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = [array[box].reshape(-1) for box in boxes(shape, start, stop)]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *found]), np.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@given(SHAPES, st.data())
def test_a_run_is_one_if_its_elements_follow_each_other(shape, data):
    array = numbered(shape)
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    region = tuple(
        slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True)
    )
    inside = array[region].reshape(-1)
    follow = bool((np.diff(inside) == 1).all())
    assert run_of(shape, region) == ((inside[0], inside[-1] + 1) if follow else None)


@given(SHAPES, st.integers(1, 40), st.data())
def test_blocks_are_the_array_in_order_between_chunks(shape, most, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    count = data.draw(st.integers(1, shape[axis]))
    chunk = (*(1,) * axis, count, *shape[axis + 1 :])
    array, chunk_size = numbered(shape), int(np.prod(chunk))
    found = list(blocks(shape, most, chunk))
    np.testing.assert_array_equal(np.concatenate([array[block].reshape(-1) for block in found]), array.reshape(-1))
    for block in found:
        assert array[block].size <= max(most, chunk_size)
        assert all(part.start % size == 0 for part, size in zip(block, chunk, strict=True))
        assert all(part.stop % n == 0 or part.stop == size for part, n, size in zip(block, chunk, shape, strict=True))
    assert all(array[block].size <= max(most, 1) for block in blocks(shape, most))


def test_a_scalar_is_one_block():
    assert list(blocks((), 1)) == boxes((), 0, 1) == [()] == [whole(())]
    assert shape_of(()) == ()
