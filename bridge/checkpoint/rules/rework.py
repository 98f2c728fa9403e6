"""What a rule does to a value, once it is known which: its axes, its numbers, its parts.

Law: the order is the one at the head of `apply.py`, whatever order the rule is written in.
Knows rules and expressions; knows nothing of how leaves are found or placed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bridge._errors import show_path
from bridge.checkpoint.rules.patterns import PatternError
from bridge.checkpoint.rules.rule import Rule
from bridge.checkpoint.tree.ops import Add, Block, Cast, Fill, Op, Reshape, Transpose, unstack


def reworked(rule: Rule, op: Op) -> Op:
    """Axes and numbers as the rule says."""
    if rule.rearrangement is not None:
        op = rule.rearrangement.apply(op)
    if rule.transpose is not None:
        op = Transpose(op, tuple(rule.transpose))
    if rule.reshape is not None:
        op = Reshape(op, tuple(rule.reshape))
    if rule.add is not None:
        op = Add(op, float(rule.add))
    return op if rule.cast is None or op.dtype == str(jnp.dtype(rule.cast)) else Cast(op, rule.cast)


def unstacked(rule: Rule, op: Op) -> Sequence[Op]:
    """One value for each index along an axis, or the one that there is."""
    if rule.unstack is None:
        return [op]
    if not -len(op.shape) <= rule.unstack < len(op.shape):
        raise PatternError(f"{show_path(next(op.sources()))} of shape {op.shape}: no axis {rule.unstack}")
    return unstack(op, rule.unstack)


def split(rule: Rule, op: Op) -> list[Op]:
    """The parts along an axis, or the one that there is."""
    if rule.split is None:
        return [op]
    count, rank = len(rule.templates), len(op.shape)
    length = op.shape[rule.split] if -rank <= rule.split < rank else 0
    sizes = rule.sizes or [length // count] * count
    if sum(sizes) != length or not length:
        parts = f"sizes = {list(rule.sizes)}" if rule.sizes else f"{count} equal parts"
        raise PatternError(f"{show_path(next(op.sources()))} of shape {op.shape} along axis {rule.split}: not {parts}")
    starts = [sum(sizes[:part]) for part in range(count)]
    return [Block(op, rule.split, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def filled(new: Mapping[str, Any]) -> Fill:
    """A value of which the rule says all."""
    return Fill(np.full(tuple(new["shape"]), new["value"], jnp.dtype(new["dtype"])))
