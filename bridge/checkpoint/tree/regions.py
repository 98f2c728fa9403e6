"""Parts of an array: boxes of one slice an axis, and runs of elements in row-major order.

Law: what is cut comes back whole: the blocks of a shape, in their order, are its elements in theirs, each once.
Knows shapes and slices; knows no values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from bridge._types import Shape

#: One slice an axis, with start and stop, without a step.
Region = tuple[slice, ...]


def whole(shape: Sequence[int]) -> Region:
    """All of an array of that shape.

    >>> whole((2, 3))
    (slice(0, 2, None), slice(0, 3, None))
    """
    return tuple(slice(0, size) for size in shape)


def shape_of(region: Region) -> Shape:
    """The shape of what is in a region."""
    return tuple(part.stop - part.start for part in region)


def run_of(shape: Shape, region: Region) -> tuple[int, int] | None:
    """First and last + 1 of the elements in a region, if they follow each other in row-major order; None if not.

    >>> run_of((4, 6), (slice(1, 3), slice(0, 6))), run_of((4, 6), (slice(1, 3), slice(0, 5)))
    ((6, 18), None)
    """
    start, stride, inner_is_whole = 0, 1, True
    for part, size in zip(reversed(region), reversed(shape), strict=True):
        if not inner_is_whole and part.stop - part.start != 1:
            return None
        inner_is_whole = inner_is_whole and part.stop - part.start == size
        start += part.start * stride
        stride *= size
    return start, start + math.prod(shape_of(region))


def boxes(shape: Shape, start: int, stop: int) -> list[Region]:
    """The fewest regions that hold the elements `start:stop` in row-major order, each of them one run.

    >>> [shape_of(box) for box in boxes((5, 4), 2, 17)]
    [(1, 2), (3, 4), (1, 1)]
    """
    if not shape or start == stop:
        return [()] if not shape else []
    stride = math.prod(shape[1:])
    first, last = start // stride, (stop - 1) // stride
    if first == last:
        return [(slice(first, first + 1), *rest) for rest in boxes(shape[1:], start % stride, stop - first * stride)]
    found: list[Region] = []
    if start % stride:
        found += [(slice(first, first + 1), *rest) for rest in boxes(shape[1:], start % stride, stride)]
        first += 1
    end = stop // stride
    if first < end:
        found.append((slice(first, end), *whole(shape[1:])))
    if stop % stride:
        found += [(slice(end, end + 1), *rest) for rest in boxes(shape[1:], 0, stop % stride)]
    return found


def blocks(shape: Shape, most: int, chunk: Shape | None = None) -> Iterator[Region]:
    """An array cut into runs of at most `most` elements, in their order; cut between chunks, one of them at least.

    Args:
      chunk: the shape of the chunks it is stored in, which are runs themselves: `(1, ..., 1, n, all, ..., all)`.

    >>> [shape_of(block) for block in blocks((5, 4), most=9)]
    [(2, 4), (2, 4), (1, 4)]
    >>> [shape_of(block) for block in blocks((5, 4), most=9, chunk=(3, 4))]
    [(3, 4), (2, 4)]
    """
    if not shape:
        yield ()
        return
    steps = chunk or (1,) * len(shape)
    axis = 0
    while axis + 1 < len(shape) and steps[axis] == 1 and math.prod(shape[axis + 1 :]) > most:
        axis += 1
    step = max(1, most // max(math.prod(shape[axis + 1 :]) * steps[axis], 1)) * steps[axis]
    rest = whole(shape[axis + 1 :])
    for outer in itertools.product(*(range(size) for size in shape[:axis])):
        before = tuple(slice(index, index + 1) for index in outer)
        for start in range(0, shape[axis], step):
            yield (*before, slice(start, min(start + step, shape[axis])), *rest)
