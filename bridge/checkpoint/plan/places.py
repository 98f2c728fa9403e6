"""The fourth step of a plan: in which form the result is, and whether that has a place for each leaf.

Law: two variables never get one place, nor does one lie in another; a collection that nobody knows is an error.
Knows forms and keys; knows nothing of shapes, rules or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bridge._errors import BridgeError, CheckpointLayoutError, cut_short, show_path
from bridge._types import Location, Path
from bridge.checkpoint.plan.draft import Draft
from bridge.checkpoint.plan.target import show
from bridge.checkpoint.tree.canonical import UNKNOWN, VALUE, Form, Key, Role
from bridge.checkpoint.tree.layout import Kind


class UnknownCollectionsError(BridgeError, ValueError):
    """Nobody knows to which collections of Linen some variables of an NNX checkpoint belong. `paths` are theirs."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        lines = "\n".join(cut_short([f"  {show_path(path)}" for path in self.paths], 20))
        first = show_path(self.paths[0])
        super().__init__(
            f"an NNX checkpoint does not tell collections, and these variables may be in any:\n{lines}\n"
            "  expected: a collection of Linen for each\n  found: none in metadata, target or rules\n"
            f'Give target=..., or a rule for each: from = "{UNKNOWN}/{first}", to = "batch_stats/{first}" for example.'
        )


class CollectionClashError(BridgeError, ValueError):
    """Two variables would have one place in NNX, which has one tree for all collections; or one lies in another."""

    def __init__(self, first: Location, second: Location):
        self.first, self.second = first, second
        super().__init__(
            f"two variables clash:\n  {show_path(first)}\n  {show_path(second)}\n"
            "  expected: a path of its own for each variable, without its collection\n"
            "  found: the same path, or one inside the other\n"
            f'Rename one: from = "{show_path(second)}", to = "{show_path(second)}_{second[0]}".'
        )


# ---- the form ---------------------------------------------------------------------------------------------------


def form_of(draft: Draft) -> Form:
    """The target's form; or the one that source, note and options speak for. Reads `made`."""
    request = draft.request
    if request.target is not None:
        return request.target.parts.form
    trains = any(key.role not in (Role.MODEL, Role.STREAM) for key in draft.made)
    return _nnx_form(draft, trains) if request.to_nnx else _linen_form(draft, trains)


def _nnx_form(draft: Draft, trains: bool) -> Form:
    request = draft.request
    if request.source.form.is_nnx:
        return replace(request.source.form, value=True)
    before = request.note.nnx
    if before is not None and (before.kind is Kind.NNX_TRAINING) == trains:
        return before
    return Form(Kind.NNX_TRAINING, ("model",)) if trains else Form(Kind.NNX_STATE)


def _linen_form(draft: Draft, trains: bool) -> Form:
    request, nested = draft.request, draft.request.options.nested
    default = Kind.LINEN_TRAIN_STATE if trains else Kind.LINEN_VARIABLES
    if not request.source.form.is_nnx:
        form = request.source.form
    elif request.note.linen is not None:
        form = request.note.linen.form
    else:
        form = Form(default)
    too_narrow = form.kind is Kind.PARAMS_ONLY and not all(map(_is_param, draft.made))
    if too_narrow or (form.kind is Kind.LINEN_VARIABLES and trains):
        form = replace(form, kind=default)
    if nested is None:
        return form
    return replace(form, kind=Kind.LINEN_NESTED_TRAIN_STATE if nested else default)


def _is_param(key: Key) -> bool:
    return key.role is Role.MODEL and (key.location or ("",))[0] == "params"


# ---- the places -------------------------------------------------------------------------------------------------


def require_places(draft: Draft, form: Form) -> None:
    """Every variable has a collection, a place of its own, and the optimizer knows it by a name. Reads `made`."""
    locations = list(draft.models())
    unknown = [location[1:] for location in locations if location[0] == UNKNOWN]
    if unknown and not form.is_nnx:
        raise UnknownCollectionsError(unknown)
    homeless = [key for key in draft.made if not form.fits(key)]
    if homeless:
        raise CheckpointLayoutError(
            "the optimizer keeps state of variables that are no params",
            show_path(show(homeless[0])),
            expected="slots of params only, as a TrainState has them",
            found=f"{len(homeless)} slots of {show_path(homeless[0].location or ())} and others",
            hint="Write a TrainState whose params are all variables: nested=True.",
        )
    _require_apart(locations, form)


def _require_apart(locations: Iterable[Location], form: Form) -> None:
    places: dict[Path, Location] = {}
    for location in locations:
        path = form.path(Key(Role.MODEL, location=location))
        other = places.setdefault(path, location)
        if other != location:
            raise CollectionClashError(other, location)
    # NNX has a level `value` below each variable: `a/value` and `a/b/value` clash as `a` and `a/b` do in Linen.
    value = (VALUE,) if form.is_nnx else ()
    for path, location in places.items():
        for length in range(1, len(path) - len(value)):
            outer = places.get((*path[:length], *value), location)
            if outer != location:
                raise CollectionClashError(outer, location)
