"""Links between two models as expressions: how a variable is made from its counterparts, gates and layers of stacks.

Law: `linen_op` undoes `nnx_op`, bit for bit.
Knows links; knows nothing of how they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.checkpoint.tree.ops import Block, Join, Op, Pick, Read, Transpose
from bridge.tracing.pairs import Index, Link, is_whole, permutation, raw_axis
from bridge.tracing.trace import Part, Slot


def nnx_op(links: Sequence[Link]) -> Op:
    """One Variable, from the variables of Linen that are its layers and its gates."""
    target = links[0].nnx.part
    layers: dict[Index, list[Link]] = {}
    for link in sorted(links, key=lambda link: link.nnx.index):
        layers.setdefault(link.nnx_index, []).append(link)
    if is_whole(links):
        gates = next(iter(layers.values()))
        source = gates[0].linen.part
        reads = [_read(link.linen.part) for link in gates]
        return _moved(_joined(reads, gates[0].nnx, source), source, target)

    def layer(index: Index) -> Op:
        gates = layers[index]
        picks = [_picked(link.linen.part, link.linen_index) for link in gates]
        return _joined(picks, gates[0].nnx)

    return _stacked(target, layer)


def linen_op(links: Sequence[Link]) -> Op:
    """One variable of Linen, from the Variables that are its layers, or have it as a gate."""
    target, slot = links[0].linen.part, links[0].nnx
    if is_whole(links):
        return _moved(_gate(_read(slot.part), slot, slot.part), slot.part, target)
    layers = {link.linen_index: link for link in links}

    def layer(index: Index) -> Op:
        return _gate(_picked(layers[index].nnx.part, layers[index].nnx_index), layers[index].nnx)

    return _stacked(target, layer)


def _read(part: Part) -> Op:
    return Read(part.location, part.shape, part.dtype)


def _joined(ops: Sequence[Op], slot: Slot, stacked: Part | None = None) -> Op:
    """All gates of `slot`; `stacked` is what they are layers of."""
    if len(ops) == 1:
        return ops[0]
    return Join(tuple(ops), slot.axis if stacked is None else raw_axis(stacked, slot.axis))


def _gate(op: Op, slot: Slot, stacked: Part | None = None) -> Op:
    if slot.count == 1:
        return op
    axis = slot.axis if stacked is None else raw_axis(stacked, slot.axis)
    size = op.shape[axis] // slot.count
    return Block(op, axis, slot.index * size, (slot.index + 1) * size)


def _moved(op: Op, source: Part, target: Part) -> Op:
    axes = permutation(source, target)
    return op if axes == tuple(range(len(axes))) else Transpose(op, axes)


def _picked(part: Part, index: Index) -> Op:
    op = _read(part)
    for axis, n in zip(part.axes, index, strict=True):
        op = Pick(op, axis, n)
    return op


def _stacked(target: Part, layer: Callable[[Index], Op], index: Index = ()) -> Op:
    if len(index) == len(target.axes):
        return layer(index)
    parts = (_stacked(target, layer, (*index, n)) for n in range(target.sizes[len(index)]))
    return Join(tuple(parts), target.axes[len(index)], stack=True)
