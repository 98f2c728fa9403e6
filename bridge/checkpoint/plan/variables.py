"""The first step of a plan: the variables of the model, under their new names.

Law: every variable of the source is made into something, or dropped as a rule says.
Knows rules and targets by what they are asked; knows nothing of optimizers.
"""

from __future__ import annotations

from bridge._types import Location
from bridge.checkpoint.plan.draft import Draft, Request
from bridge.checkpoint.plan.target import aim
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.tree.canonical import Key, Role
from bridge.checkpoint.tree.ops import Op, Read
from bridge.checkpoint.tree.tree import read_of


def take_variables(draft: Draft) -> None:
    """Adds `variables`, `new`, the model's part of `made`, and what a rule drops. Reads rules and target."""
    request = draft.request
    renamed: dict[Location, Op] = {}
    for location, leaf in request.variables.items():
        renamed[location] = Read(location, leaf.shape, leaf.dtype)
    if request.options.rules is not None:
        renamed = _ruled(draft, renamed)
    if request.target is not None:
        renamed = aim(request.target, renamed)
    draft.variables = renamed
    for location, op in renamed.items():
        draft.made[Key(Role.MODEL, location=location)] = op.on(lambda old: read_of(request.variables[old]))


def _ruled(draft: Draft, variables: dict[Location, Op]) -> dict[Location, Op]:
    """What the rules make of variables."""
    request, rules = draft.request, draft.request.options.rules
    if isinstance(rules, Rules):  # only these have a use for the target's names: `new = "target"` with a pattern
        result = rules.apply(variables, _locations_of_target(request))
    else:
        result = rules.apply(variables)
    draft.new = frozenset(result.new)
    for location, why in result.dropped.items():
        draft.drop(request.paths[location], why, asked=True)
    return dict(result.made)


def _locations_of_target(request: Request) -> list[Location] | None:
    if request.target is None:
        return None
    return [key.location for key in request.target.parts.leaves if key.role is Role.MODEL and key.location]
