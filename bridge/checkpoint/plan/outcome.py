"""The last steps of a plan: the tree that comes out, fitted to what the user has, and what it notes about itself.

Law: a tree for Linen has the lists and the entries without content that Linen's own code would have there.
Knows forms, targets and notes; knows nothing of rules or of how a slot follows its param.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp

from bridge._errors import listed, show_path
from bridge._types import Location, Path
from bridge.checkpoint.plan import empty_nodes
from bridge.checkpoint.plan.draft import Draft
from bridge.checkpoint.plan.empty_nodes import EmptyNodes
from bridge.checkpoint.plan.note import LinenNote, Note
from bridge.checkpoint.plan.slots import is_new
from bridge.checkpoint.plan.target import Target, fit, show
from bridge.checkpoint.plan.tx_template import TxTemplate, template_of
from bridge.checkpoint.tree.canonical import STEP, UNKNOWN, Form, Key, Role
from bridge.checkpoint.tree.layout import Kind, Leaf
from bridge.checkpoint.tree.ops import Cast, Fill, Op, Read
from bridge.checkpoint.tree.tree import Tree

_TRAINING = (Kind.LINEN_TRAIN_STATE, Kind.LINEN_NESTED_TRAIN_STATE, Kind.NNX_TRAINING)

# ---- what the result must fit -----------------------------------------------------------------------------------


def fit_transformation(draft: Draft, form: Form) -> TxTemplate | None:
    """What the state of `tx` is like; an error if the one that is made is another.

    Reads `made` and `masked`, and puts there what the optimizer keeps of new params; adds to `notes`.
    """
    tx = draft.request.options.tx
    if tx is None:
        return None
    trained = _trained(draft, form)
    template = template_of(tx, trained, form, _names_before(draft, trained))
    _start_new(draft, template, trained)
    template.require(draft.made)
    return template


def _start_new(draft: Draft, template: TxTemplate, trained: Mapping[Location, Op]) -> None:
    """What the optimizer keeps of params that are new is what its own `init` makes of them."""
    new = [location for location in trained if location in draft.variables and is_new(draft.variables[location])]
    if not new or draft.request.source.form.kind not in _TRAINING:
        return
    draft.made = {
        key: op for key, op in draft.made.items() if key.role is not Role.OPTIMIZER or key.location not in new
    }
    for key, value in template.initial(trained, new).items():
        draft.made[key] = Fill(value)
    draft.masked |= {key for key in template.masked if key.location in new}
    names = listed([show_path(location) for location in new])
    draft.notes.append(f"new params start with what the optimizer's init keeps of them: {names}")


def _names_before(draft: Draft, trained: Mapping[Location, Op]) -> dict[Location, Path] | None:
    """What the source's optimizer calls each param; None if one of them is not one of its params under another name."""
    source_form, names = draft.request.source.form, {}
    for location in trained:
        op = draft.variables.get(location)
        op = op.of if isinstance(op, Cast) else op
        if not isinstance(op, Read):
            return None
        names[location] = source_form.variable(op.path)
    return names


def _trained(draft: Draft, form: Form) -> dict[Location, Op]:
    """The variables that the optimizer was given: those with slots, or all that it may be for."""
    models = draft.models()
    slots: set[Location] = set()
    for key in (*draft.made, *draft.masked):
        if key.role is Role.OPTIMIZER and key.location:
            slots.add(key.location)
    if slots:
        slots |= {location for location, op in draft.variables.items() if location[0] == "params" and is_new(op)}
        return {location: op for location, op in models.items() if location in slots}
    if form.kind is Kind.LINEN_NESTED_TRAIN_STATE:
        return models
    return {location: op for location, op in models.items() if location[0] == "params"}


def fit_target(draft: Draft, target: Target) -> None:
    """Puts the target's leaves in the place of `made` and `masked`; adds to `dropped` and `notes`. Reads `new`."""
    fitted = fit(target, draft.made, draft.new, draft.request.options.seed)
    for key in fitted.without_place:
        for path in dict.fromkeys(draft.made[key].sources()):
            draft.drop(path, f"the target has no place for {key.role.value} {show_path(show(key))}")
    # Averages are as large as the model, and as dear: that they stay behind is more than a line among what is dropped.
    averages = {key.prefix[0]: None for key in fitted.without_place if key.role is Role.EXTRA and key.location}
    if averages:
        names = ", ".join(averages)
        draft.warnings.append(f"what follows the params has no place in the target: {names} (load_into: extras=...)")
    draft.made = fitted.made
    draft.masked = set(target.parts.masked)
    if fitted.filled:
        names = listed([show_path(show(key)) for key in fitted.filled])
        draft.notes.append(f"taken from the target, or made anew: {names}")


# ---- the tree ---------------------------------------------------------------------------------------------------


def tree_of(draft: Draft, form: Form, template: TxTemplate | None) -> tuple[Tree, dict[Path, Op]]:
    """The result without values, and how each of its leaves is made. Reads all of the draft; may add a warning."""
    target = draft.request.target
    if target is not None:
        made = {path: draft.made[key] for key, path in target.parts.leaves.items() if key in draft.made}
        nodes = EmptyNodes(target.live.tree.empty, target.live.tree.sequences)
    else:
        made = {form.path(key): draft.made[key] for key in sorted(draft.made, key=_rank_in(form))}
        nodes = _nnx_nodes(draft, form, made) if form.is_nnx else _linen_nodes(draft, form, made, template)
    leaves = {path: leaf_of(path, op, draft.request.tree) for path, op in made.items()}
    return Tree(leaves, nodes.empty, nodes.sequences), made


def leaf_of(path: Path, op: Op, source: Tree) -> Leaf:
    """What the target's tree tells of a leaf made so."""
    if op.dtype == "str" or op.dtype == "object" or op.dtype.startswith("key<"):
        nbytes = sum(source.leaves[old].nbytes for old in op.sources())
    else:
        nbytes = math.prod(op.shape) * jnp.dtype(op.dtype).itemsize
    return Leaf(path, op.shape, op.dtype, nbytes)


def _rank_in(form: Form) -> Callable[[Key], int]:
    """The order of a real TrainState's fields, or of a model and its optimizer; within one, the source's."""
    roles = [Role.STEP, Role.MODEL, Role.OPTIMIZER, Role.STREAM, Role.EXTRA]
    if form.is_nnx:
        roles = [Role.MODEL, Role.STREAM, Role.OPTIMIZER, Role.STEP, Role.EXTRA]

    def rank(key: Key) -> int:
        if not form.is_nnx and key.role is Role.MODEL and key.location and key.location[0] != "params":
            return len(roles)  # batch_stats is a field of the user's own, after those of a TrainState
        return roles.index(key.role)

    return rank


def _nnx_nodes(draft: Draft, form: Form, made: Iterable[Path]) -> EmptyNodes:
    source = draft.request.source
    empty = {form.path(key): "None" for key in draft.masked}
    sequences: frozenset[Path] = frozenset()
    if source.form.is_nnx:
        empty |= source.empty
        sequences = source.sequences
    inside = any(path[: len(form.optimizer)] == form.optimizer for path in (*made, *empty))
    if form.kind is Kind.NNX_TRAINING and not inside:
        empty[form.optimizer] = "Dict"  # or nobody could tell what the tree is
    return EmptyNodes(empty, sequences)


def _linen_nodes(draft: Draft, form: Form, made: Mapping[Path, Op], template: TxTemplate | None) -> EmptyNodes:
    """What the source, its note, `tx` or the keys tell, and an entry for each masked param."""
    request, name = draft.request, draft.request.options.empty
    keys = [*draft.made, *draft.masked]
    nodes = _with_optimizer(draft, _before(draft), template, keys)
    nodes = EmptyNodes(nodes.empty, nodes.sequences | empty_nodes.tails(keys, form))
    masked = {form.path(key): "None" for key in draft.masked}
    nodes = empty_nodes.fitting(nodes, [*made, *masked])
    if name is not None:
        masked = dict.fromkeys(masked, name)
        return EmptyNodes({**masked, **empty_nodes.called(nodes.empty, name, keys)}, nodes.sequences)
    if not request.source.form.is_nnx:
        masked |= {path: request.tree.empty[path] for path in masked if path in request.tree.empty}
    return EmptyNodes({**masked, **nodes.empty}, nodes.sequences)


def _before(draft: Draft) -> EmptyNodes:
    """Those that a Linen source has, or had."""
    request, noted = draft.request, draft.request.note.linen
    if not request.source.form.is_nnx:
        return EmptyNodes(request.source.empty, request.tree.sequences)
    return EmptyNodes() if noted is None else EmptyNodes(noted.empty, noted.sequences)


def _with_optimizer(draft: Draft, before: EmptyNodes, template: TxTemplate | None, keys: Iterable[Key]) -> EmptyNodes:
    """With those of the optimizer state: the template's, or, where nothing is known of it, what its keys tell."""
    if template is not None:
        return EmptyNodes({**before.empty, **template.empty}, before.sequences | template.sequences)
    if any(path[0] == "opt_state" for path in before.sequences):
        return before
    told = empty_nodes.from_keys(keys)
    never_linen = draft.request.source.form.is_nnx and draft.request.note.linen is None
    if never_linen and (STEP in draft.made or told.sequences):
        draft.warnings.append(
            "an NNX checkpoint does not tell of optax states without content at the end of a chain, which a "
            "TrainState has: give tx or a target for Linen's exact structure"
        )
    return EmptyNodes({**told.empty, **before.empty}, before.sequences | told.sequences)


# ---- the note ---------------------------------------------------------------------------------------------------


def note_of(draft: Draft, form: Form, tree: Tree) -> Note:
    """The result's own side, and what is known of the other."""
    request, source = draft.request, draft.request.source
    linen, nnx = request.note.linen, request.note.nnx
    if source.form.is_nnx:
        nnx = source.form
    else:
        linen = _linen_note(source.form, request.tree, source.masked.values(), source.leaves.get(STEP))
    if not form.is_nnx:
        step = form.path(STEP) if STEP in draft.made else None
        linen = _linen_note(form, tree, [form.path(key) for key in draft.masked], step)
        return Note(form.kind, {}, linen, nnx)
    locations = list(draft.models())
    collections: dict[Path, str] = {}
    for location in locations:
        if location[0] not in ("params", UNKNOWN):
            collections[form.variable(location)] = location[0]
    unsure = any(location[0] == UNKNOWN for location in locations)
    return Note(Kind.UNKNOWN if unsure else form.kind, collections, linen, nnx)


def _linen_note(form: Form, tree: Tree, masked: Iterable[Path], step: Path | None) -> LinenNote:
    of_params = set(masked)
    empty = {path: kind for path, kind in tree.empty.items() if path not in of_params}
    dtype = tree.leaves[step].dtype if step in tree.leaves else "int32"
    return LinenNote(form, empty, tree.sequences, dtype)
