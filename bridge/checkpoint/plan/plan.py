"""A conversion before it runs: which leaf of the target is made how, from which leaves of the source.

Law: every leaf of the source is read by some leaf of the target, or stands in `dropped` with the reason; every leaf of
the target is made once. Planning reads no array.
Knows trees of leaves and expressions over them; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bridge._errors import show_path
from bridge._types import Path
from bridge.checkpoint.derivation.derived import Derived
from bridge.checkpoint.formats.protocol import LeftOut
from bridge.checkpoint.options import ConversionOptions, LeafRules
from bridge.checkpoint.plan.draft import Draft, Request
from bridge.checkpoint.plan.followers import take_followers
from bridge.checkpoint.plan.note import Note, read_note, write_note
from bridge.checkpoint.plan.outcome import fit_target, fit_transformation, note_of, tree_of
from bridge.checkpoint.plan.places import form_of, require_places
from bridge.checkpoint.plan.rest import take_rest
from bridge.checkpoint.plan.target import Target
from bridge.checkpoint.plan.variables import take_variables
from bridge.checkpoint.stream import Progress
from bridge.checkpoint.tree.canonical import Known, take_apart
from bridge.checkpoint.tree.from_objects import Live, of_object
from bridge.checkpoint.tree.layout import Kind, Layout
from bridge.checkpoint.tree.ops import Op, Read
from bridge.checkpoint.tree.tree import Tree


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
      source, target: the trees before and after.
      made: target path -> how it is made, in the target's order.
      dropped: source path -> why it has no place in the target.
      asked: those of `dropped` that a rule or an option says may go.
      warnings: what the user should know: optimizers whose state does not commute with stacking, ...
      notes: what was taken to be so, and why.
      source_layout, target_layout: Linen's or NNX's.
      memo: what the target should note about itself.
      unproven: why nothing has shown that the rules are right, if they were derived; "" otherwise.
      left_out: what is beside the source's tree and does not come along: items, metadata.
    """

    source: Tree
    target: Tree
    made: Mapping[Path, Op]
    dropped: Mapping[Path, str] = field(default_factory=dict)
    asked: frozenset[Path] = frozenset()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_layout: Kind = Kind.UNKNOWN
    target_layout: Kind = Kind.UNKNOWN
    memo: Note = field(default_factory=Note)
    unproven: str = ""
    left_out: tuple[LeftOut, ...] = ()

    @property
    def lost(self) -> dict[Path, str]:
        """What is dropped though nobody asked for it."""
        return {path: why for path, why in self.dropped.items() if path not in self.asked}

    def rows(self) -> list[dict[str, Any]]:
        """One row a target leaf, in JSON types: target, sources, shape, dtype, nbytes, op."""
        rows: list[dict[str, Any]] = []
        for path, op in self.made.items():
            row = {
                "target": list(path),
                "sources": list(map(list, dict.fromkeys(op.sources()))),
                "shape": list(op.shape),
                "dtype": op.dtype,
                "nbytes": self.target.leaves[path].nbytes,
                "op": "" if isinstance(op, Read) else str(op),
            }
            rows.append(row)
        return rows

    def metadata(self) -> dict[str, Any]:
        """What to keep beside the target's arrays, so that the way back is exact. JSON types."""
        return write_note(self.memo)

    def report(self) -> ConversionReport:
        """What goes where, as data."""
        return ConversionReport(
            self.source_layout.value,
            self.target_layout.value,
            self.rows(),
            [{"source": list(path), "why": why, "asked": path in self.asked} for path, why in self.dropped.items()],
            list(self.warnings),
            list(self.notes),
            self.unproven,
            [{"name": item.name, "why": item.why, "asked": item.asked} for item in self.left_out],
        )

    def summary(self) -> str:
        """One line: how many leaves, bytes and changes."""
        return self.report().summary()


@dataclass(frozen=True)
class ConversionReport:
    """What went where in a conversion, in JSON types (`dataclasses.asdict`).

    Attributes:
      source_layout, target_layout: in words.
      rows: as `Plan.rows`.
      dropped: source, why, asked (whether a rule or an option says so).
      warnings, notes, unproven: as in `Plan`.
      left_out: name, why, asked: what beside the tree does not come along.
    """

    source_layout: str
    target_layout: str
    rows: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str]
    unproven: str = ""
    left_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the target's leaves."""
        return sum(row["nbytes"] for row in self.rows)

    def summary(self) -> str:
        """One line: how many leaves, bytes and changes."""
        changed = [row["op"] for row in self.rows if row["op"]]
        how = ", ".join(sorted(set(map(_change, changed))))
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return (
            f"{self.source_layout} -> {self.target_layout}: {len(self.rows)} leaves, {self.nbytes} bytes: "
            f"{len(self.rows) - len(changed)} copied as they are, {len(changed)} changed on the way"
            f"{how and f' ({how})'}, {len(self.dropped)} dropped{left_out}"
            f"{', NOT PROVEN' if self.unproven else ''}"
        )

    def __str__(self) -> str:
        """A line for each leaf."""
        lines = [self.summary()]
        for row in self.rows:
            how = row["op"] or ", ".join(map(show_path, row["sources"]))
            lines.append(f"{how} -> {show_path(row['target'])}  {row['dtype']}{row['shape']}")
        lines += [f"{show_path(row['source'])} is dropped: {row['why']}" for row in self.dropped]
        lines += [f"{item['name']} is left out: {item['why']}" for item in self.left_out]
        if self.unproven:
            lines.append(f"nothing has shown that these rules are right: {self.unproven}")
        return "\n".join([*lines, *self.warnings, *self.notes])


def _change(op: str) -> str:
    """What is done last, in a word: 'cast' of 'cast to uint32 of step', 'cut' of '3 along 0 of layers/kernel'."""
    word = op.split()[0]
    if word.startswith(("+", "-")):
        return "added to"
    return word if word.isalpha() else "cut"


# ---- planning ---------------------------------------------------------------------------------------------------


def make_plan(
    tree: Tree,
    *,
    to: Literal["nnx", "linen"],
    layout: Layout | None = None,
    rules: LeafRules | None = None,
    target: Any = None,
    rng: str | int = "drop",
    metadata: Mapping[str, Any] | None = None,
    tx: Any = None,
    nested: bool | None = None,
    empty: str | None = None,
    known: Known | None = None,
    unproven: bool = False,
) -> Plan:
    """How a tree in Linen's or NNX's layout becomes one in the other's, or in the same under other names.

    Args:
      tree: the source, without values.
      layout: the source's layout; detected by default.
      metadata: what is stored beside the source; a note of an earlier conversion makes the way back exact.
      to, rules, target, rng, tx, nested, empty, known, unproven: as in `ConversionOptions`. Of rules whatever has
        `apply(leaves) -> RuleResult` will do; they act on the variables.

    Returns:
      The plan. Nothing has been read.

    Raises:
      OptionError: an option that there is not.
      VariablesMismatchError: the result does not fit `target`, or `tx`: everything that does not.
      CheckpointLayoutError: the layout is unknown, or the target's has no place for what the source has.
      UnknownCollectionsError: nobody knows which collections of Linen the variables of an NNX state belong to.
      CollectionClashError: two variables get one place.
      SlotError, OptStateOrderError: the optimizer's state cannot follow its params.
      RulesError: the rules do not fit.
      UnprovenRulesError: the rules were derived and are not proven, without `unproven`.

    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> leaf = Leaf(("params", "Dense_0", "kernel"), (2, 3), "float32", 24)
    >>> plan = make_plan(Tree({leaf.path: leaf}), to="nnx")
    >>> {path: str(op) for path, op in plan.made.items()}
    {('Dense_0', 'kernel', 'value'): 'params/Dense_0/kernel'}
    """
    options = ConversionOptions(
        to=to,
        rules=rules,
        target=target,
        rng=rng,
        tx=tx,
        nested=nested,
        empty=empty,
        known=known,
        unproven=unproven,
    )
    return plan_of(tree, options, layout, metadata)


def plan_of(
    tree: Tree,
    options: ConversionOptions,
    layout: Layout | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan for these options: all steps, in their order. Arguments and errors as for `make_plan`.

    `progress` is called as `progress("planning", steps done, steps in all)`.

    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> leaf = Leaf(("params", "kernel"), (2, 3), "float32", 24)
    >>> plan_of(Tree({leaf.path: leaf}), ConversionOptions(to="nnx")).summary()
    'Linen variables -> nnx.State: 1 leaves, 24 bytes: 1 copied as they are, 0 changed on the way, 0 dropped'
    """
    unproven = options.doubt
    request = _request(tree, options, layout or tree.layout, read_note(metadata or {}))
    draft = Draft(request)
    steps = (take_variables, take_followers, take_rest)
    in_all = len(steps) + 2
    for number, step in enumerate(steps, start=1):
        step(draft)
        _tell(progress, number, in_all)
    form = form_of(draft)
    require_places(draft, form)
    template = fit_transformation(draft, form)
    if request.target is not None:
        fit_target(draft, request.target)
    _tell(progress, in_all - 1, in_all)
    result, made = tree_of(draft, form, template)
    _drop_unread(draft, made)
    _tell(progress, in_all, in_all)
    return Plan(
        source=tree,
        target=result,
        made=made,
        dropped=draft.dropped,
        asked=frozenset(draft.asked),
        warnings=tuple(draft.warnings),
        notes=tuple(draft.notes),
        source_layout=request.source.form.kind,
        target_layout=form.kind,
        memo=note_of(draft, form, result),
        unproven=unproven,
    )


def _tell(progress: Progress | None, done: int, in_all: int) -> None:
    if progress is not None:
        progress("planning", done, in_all)


def _request(tree: Tree, options: ConversionOptions, layout: Layout, note: Note) -> Request:
    """What is asked, with the source taken apart by all that is known of it."""
    target = None
    if options.target is not None:
        live = options.target if isinstance(options.target, Live) else of_object(options.target)
        target = Target(live, live.parts())
    known = options.known or note.known
    if known.collections is None and isinstance(options.rules, Derived):  # it has seen both models
        locations = (*options.rules.inverse().made, *options.rules.fresh)
        known = replace(known, collections={location[1:]: location[0] for location in locations})
    return Request(tree, take_apart(tree, layout, known), options, note, target)


def _drop_unread(draft: Draft, made: Mapping[Path, Op]) -> None:
    """Whatever no step has spoken of is dropped, and nobody has asked for it."""
    read: set[Path] = set()
    for op in made.values():
        read.update(op.sources())
    for path in draft.request.tree.leaves:
        if path not in read and path not in draft.dropped:
            draft.drop(path, "nothing takes it")
