"""The third step of a plan: what belongs to no variable: counters, the step, random streams, other fields.

Law: each of them is copied, made anew or dropped, as the options say.
Knows keys; knows nothing of rules, of slots, or of where a layout keeps a leaf.
"""

from __future__ import annotations

import numpy as np

from bridge._errors import listed, show_path
from bridge.checkpoint.plan.draft import Draft, Request
from bridge.checkpoint.plan.target import fresh_stream
from bridge.checkpoint.tree.canonical import STEP, Key, Role
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Cast, Fill, Op
from bridge.checkpoint.tree.tree import read_of


def take_rest(draft: Draft) -> None:
    """Adds to `made`, `masked`, `dropped`, `warnings` and `notes`; also parts of variables whose value is a tree."""
    request = draft.request
    for key, path in request.source.leaves.items():
        leaf = request.tree.leaves[path]
        if key.role is Role.STREAM:
            _take_stream(draft, key, leaf)
        elif key == STEP:
            draft.made[key] = _step(request, read_of(leaf))
        elif key.location is None or (key.role is Role.MODEL and key.tail):
            draft.made[key] = read_of(leaf)
    for key in request.source.masked:
        if key.role is Role.MODEL and request.to_nnx:
            draft.masked.add(key)
    trains = any(key.role is Role.OPTIMIZER for key in draft.made)
    if request.to_nnx and trains and STEP not in draft.made:
        draft.made[STEP] = _step(request, Fill(np.zeros((), np.int32)))
        draft.warnings.append("the source has an optimizer state and no step: it counts from 0")
    _note_guesses(draft)


def _take_stream(draft: Draft, key: Key, leaf: Leaf) -> None:
    options = draft.request.options
    if options.rng == "keep":
        draft.made[key] = read_of(leaf)
    elif draft.request.to_nnx and options.seed is not None:
        draft.made[key] = fresh_stream(key, leaf, options.seed)
        draft.drop(leaf.path, f"random streams begin anew, from seed {options.seed}", asked=True)
    else:
        draft.drop(leaf.path, "random streams are not carried over (rng='keep' would)", asked=True)


def _step(request: Request, op: Op) -> Op:
    """The step in the number type of the result."""
    if request.to_nnx == request.source.form.is_nnx:
        return op
    dtype = _dtype_of_step(request)
    return op if op.dtype == dtype else Cast(op, dtype)


def _dtype_of_step(request: Request) -> str:
    """The target's, or else the one that it once had. Linen counts in int32 (or Python's int), NNX in uint32."""
    target = request.target
    if target is not None and STEP in target.parts.leaves:
        return "int32" if target.is_number(STEP) else target.leaf(STEP).dtype
    if request.to_nnx:
        return "uint32"
    return request.note.linen.step if request.note.linen else "int32"


def _note_guesses(draft: Draft) -> None:
    """What `take_apart` has told from names and shapes, where nobody knew."""
    request, source = draft.request, draft.request.source
    if source.convention and not request.to_nnx:
        names = listed([show_path(location[1:]) for location in source.convention])
        draft.notes.append(f"taken to be params, from their names or the optimizer's slots: {names}")
    if source.guessed_boxes and request.target is None:
        names = listed([show_path(location) for location in sorted(source.form.boxed)])
        draft.notes.append(f"taken to be boxes, from a level `value` that is alone: {names}")
