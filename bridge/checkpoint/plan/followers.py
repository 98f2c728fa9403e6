"""The second step of a plan: what an optimizer keeps of variables, and averages of them, under the new names.

Law: an optimizer that would go on otherwise than before is an error or a warning, never silence.
Knows how slots follow and how an optimizer is tried; knows no layouts.
"""

from __future__ import annotations

import math

from bridge._errors import OptStateOrderError, show_path
from bridge._types import Location, Path
from bridge.checkpoint.plan.commute import probe, stacks, warning_without_tx
from bridge.checkpoint.plan.draft import Draft
from bridge.checkpoint.plan.slots import follow
from bridge.checkpoint.tree.canonical import Role
from bridge.checkpoint.tree.ops import Op, Read


def take_followers(draft: Draft) -> None:
    """Adds slots and averages to `made`, `masked` and `dropped`. Reads `variables`."""
    request, ruled = draft.request, draft.request.options.rules is not None
    followed = follow(
        request.source.leaves, request.source.masked, request.tree.leaves, draft.variables, request.variables
    )
    draft.made.update(followed.made)
    draft.masked.update(followed.masked)
    for path, why in followed.dropped.items():
        draft.drop(path, why, asked=ruled)
    if followed.zeroed and request.options.tx is None:
        names = dict.fromkeys(show_path(key.location or ()) for key in followed.zeroed)
        draft.warnings.append(
            f"new params start with an optimizer state of zeros: {', '.join(names)}. Some optimizers start otherwise: "
            "give tx=... (--tx) to have it started by the optimizer's own init"
        )
    if ruled:
        _require_order(draft)
        _try_optimizer(draft)


def _require_order(draft: Draft) -> None:
    """Vectors over all params, and keys split over them, follow the order of the names."""
    request, leaves = draft.request, draft.request.tree.leaves
    trained = [location for location in request.paths if location in request.trained]
    total = sum(math.prod(request.variables[location].shape) for location in trained)
    loose: dict[Path, Path] = {}
    for key, path in request.source.leaves.items():
        if key.role is Role.OPTIMIZER and key.location is None:
            loose[key.prefix] = path
    vectors = [path for path in loose.values() if total > 1 and leaves[path].shape == (total,)]
    keys = [path for path in loose.values() if leaves[path].dtype.startswith("key<")]
    if not (vectors or keys) or _keeps_order(draft, trained):
        return
    if vectors:
        raise OptStateOrderError(vectors)
    listed = ", ".join(map(show_path, keys))
    draft.warnings.append(f"the optimizer draws noise in the order of the names, which changes: {listed}")


def _keeps_order(draft: Draft, trained: list[Location]) -> bool:
    """Whether all variables are only renamed, and params sort by their new names as by their old ones."""
    new_names = {op.path: location for location, op in draft.variables.items() if isinstance(op, Read)}
    if any(location not in new_names for location in trained):
        return False
    if len(draft.variables) != len(draft.request.variables):
        return False
    by_new_name = sorted(trained, key=lambda location: new_names[location][1:])
    return by_new_name == sorted(trained, key=lambda location: location[1:])


def _try_optimizer(draft: Draft) -> None:
    """Warn of an optimizer that does not commute with what becomes of its params."""
    request, trained, tx = draft.request, draft.request.trained, draft.request.options.tx
    from_trained = [at for at, op in draft.variables.items() if not trained.isdisjoint(op.sources())]
    params = {location: draft.variables[location] for location in from_trained}
    has_slots = any(key.role is Role.OPTIMIZER and key.location for key in draft.made)
    if not has_slots or not stacks(params.values()):
        return
    if tx is None:
        draft.warnings.append(warning_without_tx())
        return

    def without_collection(location: Location) -> Op:
        leaf = request.variables[location]
        return Read(location[1:], leaf.shape, leaf.dtype)

    shapes = {location[1:]: request.variables[location].shape for location in trained}
    ops = {location[1:]: op.on(without_collection) for location, op in params.items()}
    draft.warnings += probe(tx, shapes, ops)
