"""A conversion before it runs: which leaf of the target is made how, from which leaves of the source.

Law: every leaf of the source is read by some leaf of the target, or stands in `dropped` with the reason; every leaf of
the target is made once. Planning reads no array.
Knows trees of leaves and expressions over them; knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from bridge._errors import BridgeError, CheckpointLayoutError, OptStateOrderError, cut_short, show_path
from bridge._types import Location, Path
from bridge.checkpoint.derivation.derive import Derived
from bridge.checkpoint.plan import empty_nodes
from bridge.checkpoint.plan.commute import probe, stacks, warning_without_tx
from bridge.checkpoint.plan.empty_nodes import EmptyNodes
from bridge.checkpoint.plan.note import LinenNote, Note, read_note, write_note
from bridge.checkpoint.plan.slots import follow, read_of
from bridge.checkpoint.plan.target import Target, aim, fit, fresh_stream, show
from bridge.checkpoint.plan.tx_template import TxTemplate, template_of
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.tree.canonical import STEP, UNKNOWN, VALUE, Form, Key, Known, Parts, Role, take_apart
from bridge.checkpoint.tree.from_objects import Live, of_object
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.ops import Cast, Fill, Op, Read
from bridge.checkpoint.tree.tree import Tree


class UnknownCollectionsError(BridgeError, ValueError):
    """Nobody knows to which collections of Linen some variables of an NNX checkpoint belong. `paths` are theirs."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        listed = "\n".join(cut_short([f"  {show_path(path)}" for path in self.paths], 20))
        first = show_path(self.paths[0])
        super().__init__(
            f"an NNX checkpoint does not tell collections, and these variables may be in any:\n{listed}\n"
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

    @property
    def lost(self) -> dict[Path, str]:
        """What is dropped though nobody asked for it."""
        return {path: why for path, why in self.dropped.items() if path not in self.asked}

    def rows(self) -> list[dict[str, Any]]:
        """One row a target leaf, in JSON types: target, sources, shape, dtype, nbytes, op."""
        return [
            {
                "target": list(path),
                "sources": [list(source) for source in dict.fromkeys(op.sources())],
                "shape": list(op.shape),
                "dtype": op.dtype,
                "nbytes": self.target.leaves[path].nbytes,
                "op": "" if isinstance(op, Read) else str(op),
            }
            for path, op in self.made.items()
        ]

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
      warnings, notes: as in `Plan`.
    """

    source_layout: str
    target_layout: str
    rows: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the target's leaves."""
        return sum(row["nbytes"] for row in self.rows)

    def summary(self) -> str:
        """One line: how many leaves, bytes and changes."""
        changed = sum(bool(row["op"]) for row in self.rows)
        return (
            f"{self.source_layout} -> {self.target_layout}: {len(self.rows)} leaves, {self.nbytes} bytes, "
            f"{changed} of them reworked, {len(self.dropped)} dropped"
        )

    def __str__(self) -> str:
        """A line for each leaf."""
        made = [
            f"{row['op'] or ', '.join(show_path(path) for path in row['sources'])} -> {show_path(row['target'])}"
            f"  {row['dtype']}{row['shape']}"
            for row in self.rows
        ]
        gone = [f"{show_path(row['source'])} is dropped: {row['why']}" for row in self.dropped]
        return "\n".join([self.summary(), *made, *gone, *self.warnings, *self.notes])


def leaf_of(path: Path, op: Op, source: Tree) -> Leaf:
    """What the target's tree tells of a leaf made so."""
    if op.dtype == "str" or op.dtype == "object" or op.dtype.startswith("key<"):
        nbytes = sum(source.leaves[at].nbytes for at in op.sources())
    else:
        nbytes = math.prod(op.shape) * jnp.dtype(op.dtype).itemsize
    return Leaf(path, op.shape, op.dtype, nbytes)


# ---- planning ---------------------------------------------------------------------------------------------------


def make_plan(
    tree: Tree,
    *,
    to: str,
    layout: Layout | None = None,
    rules: Any = None,
    target: Any = None,
    rng: str | int = "drop",
    metadata: Mapping[str, Any] | None = None,
    tx: Any = None,
    nested: bool | None = None,
    empty: str | None = None,
    known: Known | None = None,
) -> Plan:
    """How a tree in Linen's or NNX's layout becomes one in the other's, or in the same under other names.

    Args:
      tree: the source, without values.
      to: 'nnx' or 'linen'.
      layout: the source's layout; detected by default.
      rules: `Rules`, or what `derive` gives: anything with `apply(leaves, target=None) -> RuleResult`. They act on the
        variables; slots of the optimizer and averages follow.
      target: what the result must fit: a model, `{"model": model, "optimizer": optimizer}` or the pair, a TrainState,
        variables, abstract or not. It also says which collection a variable of NNX belongs to.
      rng: random streams: 'drop', 'keep' (Linen keeps them apart, under 'nnx_rngs'), or a seed for fresh ones.
      metadata: what is stored beside the source; a note of an earlier conversion makes the way back exact.
      tx: the optax transformation: its state must be what the result has; also tells where Linen keeps empty states.
      nested: for Linen: whether `params` holds all collections, as in a TrainState made with variables as params.
      empty: for Linen: what entries without content in the optimizer state are: 'None', as Orbax has them, or 'Dict',
        as flax.serialization has them; by default what they were.
      known: what else is known about the source.

    Returns:
      The plan. Nothing has been read.

    Raises:
      VariablesMismatchError: the result does not fit `target`, or `tx`: everything that does not.
      CheckpointLayoutError: the layout is unknown, or the target's has no place for what the source has.
      UnknownCollectionsError: nobody knows which collections of Linen the variables of an NNX state belong to.
      CollectionClashError: two variables get one place.
      SlotError, OptStateOrderError: the optimizer's state cannot follow its params.
      RulesError: the rules do not fit.

    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> leaf = Leaf(("params", "Dense_0", "kernel"), (2, 3), "float32", 24)
    >>> plan = make_plan(Tree({leaf.path: leaf}), to="nnx")
    >>> {path: str(op) for path, op in plan.made.items()}
    {('Dense_0', 'kernel', 'value'): 'params/Dense_0/kernel'}
    """
    if to not in ("nnx", "linen"):
        raise ValueError(f"make_plan(to={to!r}):\n  expected 'nnx' or 'linen'")
    note = read_note(metadata or {})
    found = layout or tree.layout
    wanted = None
    if target is not None:
        live = target if isinstance(target, Live) else of_object(target)
        wanted = Target(live, live.parts())
    known = known or note.known
    if known.collections is None and isinstance(rules, Derived):  # it has seen both models
        known = replace(known, collections={at[1:]: at[0] for at in (*rules.inverse().made, *rules.fresh)})
    planner = _Planner(tree, take_apart(tree, found, known), to, note, wanted)
    return planner.plan(rules, rng, tx, nested, empty)


class _Planner:
    """One conversion while it is planned."""

    def __init__(self, tree: Tree, source: Parts, to: str, note: Note, target: Target | None):
        self.tree, self.source, self.to, self.note, self.target = tree, source, to, note, target
        self.made: dict[Key, Op] = {}
        self.masked: set[Key] = set()
        self.dropped: dict[Path, str] = {}
        self.asked: set[Path] = set()
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def plan(self, rules: Any, rng: str | int, tx: Any, nested: bool | None, empty: str | None) -> Plan:
        """The whole plan, step by step."""
        variables, new = self._variables(rules)
        self._take_slots(variables, rules, tx)
        self._take_rest(rng)
        form = self._form(nested)
        self._require_places(form)
        self.template: TxTemplate | None = None
        if tx is not None:
            self.template = template_of(tx, self._trained(form), form)
            self.template.require(self.made)
        if self.target is not None:
            self._fit(self.target, new, rng)
        tree, made = self._tree(form, empty)
        read = {path for op in made.values() for path in op.sources()}
        for path in self.tree.leaves.keys() - read - self.dropped.keys():
            self._drop(path, "nothing takes it")
        return Plan(
            self.tree,
            tree,
            made,
            self.dropped,
            frozenset(self.asked),
            tuple(self.warnings),
            tuple(self.notes),
            self.source.form.kind,
            form.kind,
            self._note(form, tree),
        )

    # what is made

    def _variables(self, rules: Any) -> tuple[dict[Location, Op], frozenset[Location]]:
        """New location -> how it is made, and what comes from the target."""
        self.paths = {
            key.location: path
            for key, path in self.source.leaves.items()
            if key.role is Role.MODEL and key.location and not key.tail
        }
        self.forms = {at: self.tree.leaves[path] for at, path in self.paths.items()}
        made: dict[Location, Op] = {at: Read(at, leaf.shape, leaf.dtype) for at, leaf in self.forms.items()}
        new: frozenset[Location] = frozenset()
        if rules is not None:
            result = rules.apply(made, self._target_locations()) if isinstance(rules, Rules) else rules.apply(made)
            made, new = dict(result.made), frozenset(result.new)
            for at, why in result.dropped.items():
                self._drop(self.paths[at], why, asked=True)
        if self.target is not None:
            made = aim(self.target, made)
        for at, op in made.items():
            self.made[Key(Role.MODEL, location=at)] = op.on(lambda old: read_of(self.forms[old]))
        return made, new

    def _target_locations(self) -> list[Location] | None:
        if self.target is None:
            return None
        return [key.location for key in self.target.parts.leaves if key.role is Role.MODEL and key.location]

    def _drop(self, path: Path, why: str, asked: bool = False) -> None:
        self.dropped[path] = why
        if asked:
            self.asked.add(path)

    def _take_slots(self, variables: Mapping[Location, Op], rules: Any, tx: Any) -> None:
        """Slots and averages, under the new names."""
        followed = follow(self.source.leaves, self.source.masked, self.tree.leaves, variables, self.forms)
        self.made.update(followed.made)
        self.masked.update(followed.masked)
        for path, why in followed.dropped.items():
            self._drop(path, why, asked=rules is not None)
        if followed.zeroed:
            names = ", ".join(dict.fromkeys(show_path(key.location or ()) for key in followed.zeroed))
            self.warnings.append(f"new params start with an optimizer state of zeros: {names}")
        if rules is not None:
            self._require_order(variables)
            self._try_optimizer(variables, tx)

    def _try_optimizer(self, variables: Mapping[Location, Op], tx: Any) -> None:
        """Warn of an optimizer that does not commute with what becomes of its params."""
        old = self._old_trained()
        ops = {at: op for at, op in variables.items() if any(source in old for source in op.sources())}
        if not stacks(ops.values()) or not any(key.role is Role.OPTIMIZER and key.location for key in self.made):
            return
        if tx is None:
            self.warnings.append(warning_without_tx())
            return
        shapes = {at[1:]: self.forms[at].shape for at in old}
        self.warnings += probe(tx, shapes, {at[1:]: op.on(self._without_collection) for at, op in ops.items()})

    def _without_collection(self, at: Location) -> Op:
        return Read(at[1:], self.forms[at].shape, self.forms[at].dtype)

    def _require_order(self, variables: Mapping[Location, Op]) -> None:
        """Vectors over all params, and keys split over them, follow the order of the names."""
        loose = {key.prefix: path for key, path in self.source.leaves.items() if _is_loose(key)}
        trained = self._old_trained()
        olds = [at for at in self.paths if at in trained]
        total = sum(math.prod(self.forms[at].shape) for at in olds)
        vectors = [path for path in loose.values() if total > 1 and self.tree.leaves[path].shape == (total,)]
        keys = [path for path in loose.values() if self.tree.leaves[path].dtype.startswith("key<")]
        if not vectors and not keys:
            return
        names = {op.path: at for at, op in variables.items() if isinstance(op, Read)}
        kept = all(at in names for at in olds) and len(variables) == len(self.forms)
        if kept and sorted(olds, key=lambda at: names[at][1:]) == sorted(olds, key=lambda at: at[1:]):
            return
        if vectors:
            raise OptStateOrderError(vectors)
        listed = ", ".join(map(show_path, keys))
        self.warnings.append(f"the optimizer draws noise in the order of the names, which changes: {listed}")

    def _old_trained(self) -> set[Location]:
        slots = {key.location for key in self.source.leaves if key.role is Role.OPTIMIZER and key.location}
        return slots or {at for at in self.paths if at[0] == "params"}

    def _take_rest(self, rng: str | int) -> None:
        """What belongs to no variable: counters, the step, random streams, other fields; and values that are trees."""
        for key, path in self.source.leaves.items():
            leaf = self.tree.leaves[path]
            if key.role is Role.STREAM:
                self._take_stream(key, leaf, rng)
            elif key == STEP:
                self.made[key] = self._step(read_of(leaf))
            elif key.location is None or (key.role is Role.MODEL and key.tail):
                self.made[key] = read_of(leaf)
        for key in self.source.masked:
            if key.role is Role.MODEL and self.to == "nnx":
                self.masked.add(key)
        trained = any(key.role is Role.OPTIMIZER for key in self.made)
        if self.to == "nnx" and trained and STEP not in self.made:
            self.made[STEP] = self._step(Fill(np.zeros((), np.int32)))
            self.warnings.append("the source has an optimizer state and no step: it counts from 0")
        if self.source.convention and self.to == "linen":
            listed = ", ".join(show_path(at[1:]) for at in self.source.convention[:5])
            more = ", ..." if len(self.source.convention) > 5 else ""
            self.notes.append(f"taken to be params, from their names or the optimizer's slots: {listed}{more}")
        if self.source.guessed_boxes and self.target is None:
            listed = ", ".join(show_path(at) for at in sorted(self.source.form.boxed)[:5])
            self.notes.append(f"taken to be boxes, from a level `value` that is alone: {listed}")

    def _take_stream(self, key: Key, leaf: Leaf, rng: str | int) -> None:
        if rng == "keep":
            self.made[key] = read_of(leaf)
        elif self.to == "nnx" and not isinstance(rng, str):
            self.made[key] = fresh_stream(key, leaf, rng)
            self._drop(leaf.path, f"random streams begin anew, from seed {rng}", asked=True)
        else:
            self._drop(leaf.path, "random streams are not carried over (rng='keep' would)", asked=True)

    def _step(self, op: Op) -> Op:
        """Linen counts in int32 (or Python's int), NNX in uint32."""
        if (self.to == "nnx") == self.source.form.is_nnx:
            return op
        wanted = "uint32" if self.to == "nnx" else (self.note.linen.step if self.note.linen else "int32")
        if self.target is not None and STEP in self.target.parts.leaves:
            wanted = "int32" if self.target.is_number(STEP) else self.target.leaf(STEP).dtype
        return op if op.dtype == wanted else Cast(op, wanted)

    # where it goes

    def _form(self, nested: bool | None) -> Form:
        if self.target is not None:
            return self.target.parts.form
        trains = any(key.role is not Role.MODEL and key.role is not Role.STREAM for key in self.made)
        if self.to == "nnx":
            if self.source.form.is_nnx:
                return replace(self.source.form, value=True)
            if self.note.nnx and (self.note.nnx.kind is Kind.NNX_TRAINING) == trains:
                return self.note.nnx
            return Form(Kind.NNX_TRAINING, ("model",)) if trains else Form(Kind.NNX_STATE)
        before = None if self.note.linen is None else self.note.linen.form
        form = before if self.source.form.is_nnx else self.source.form
        default = Form(Kind.LINEN_TRAIN_STATE if trains else Kind.LINEN_VARIABLES)
        form = default if form is None else form
        others = any(key.role is not Role.MODEL or (key.location or ("",))[0] != "params" for key in self.made)
        if (form.kind is Kind.PARAMS_ONLY and others) or (form.kind is Kind.LINEN_VARIABLES and trains):
            form = replace(form, kind=default.kind)
        if nested is None:
            return form
        return replace(form, kind=Kind.LINEN_NESTED_TRAIN_STATE if nested else default.kind)

    def _require_places(self, form: Form) -> None:
        """Every variable has a collection, a place of its own, and the optimizer knows it by a name."""
        locations = [key.location for key in self.made if key.role is Role.MODEL and key.location]
        if not form.is_nnx:
            unknown = [at[1:] for at in locations if at[0] == UNKNOWN]
            if unknown:
                raise UnknownCollectionsError(unknown)
        if homeless := [key for key in self.made if not form.fits(key)]:
            raise CheckpointLayoutError(
                "the optimizer keeps state of variables that are no params",
                show_path(show(homeless[0])),
                expected="slots of params only, as a TrainState has them",
                found=f"{len(homeless)} slots of {show_path(homeless[0].location or ())} and others",
                hint="Write a TrainState whose params are all variables: nested=True.",
            )
        places: dict[Path, Location] = {}
        for at in locations:
            path = form.path(Key(Role.MODEL, location=at))
            if (other := places.setdefault(path, at)) != at:
                raise CollectionClashError(other, at)
        for path, at in places.items():
            bare = path[:-1] if form.is_nnx else path
            for length in range(1, len(bare)):
                inner = (*bare[:length], VALUE) if form.is_nnx else bare[:length]
                if inner in places and places[inner] != at:
                    raise CollectionClashError(places[inner], at)

    def _trained(self, form: Form) -> dict[Location, Op]:
        models = {key.location: op for key, op in self.made.items() if key.role is Role.MODEL and key.location}
        slots = {key.location for key in (*self.made, *self.masked) if key.role is Role.OPTIMIZER and key.location}
        if form.kind is Kind.LINEN_NESTED_TRAIN_STATE and not slots:
            return models
        return {at: op for at, op in models.items() if (at in slots if slots else at[0] == "params")}

    def _fit(self, target: Target, new: frozenset[Location], rng: str | int) -> None:
        fitted = fit(target, self.made, new, rng)
        for key in fitted.without_place:
            for path in dict.fromkeys(self.made[key].sources()):
                self._drop(path, f"the target has no place for {key.role.value} {show_path(show(key))}")
        self.made = fitted.made
        own = [show_path(show(key)) for key in fitted.filled]
        if own:
            more = ", ..." if len(own) > 5 else ""
            self.notes.append(f"taken from the target, or made anew: {', '.join(own[:5])}{more}")
        self.masked = set(target.parts.masked)

    # the tree that comes out

    def _tree(self, form: Form, empty: str | None) -> tuple[Tree, dict[Path, Op]]:
        if self.target is not None:
            made = {path: self.made[key] for key, path in self.target.parts.leaves.items() if key in self.made}
            shape = EmptyNodes(self.target.live.tree.empty, self.target.live.tree.sequences)
        else:
            made = {form.path(key): self.made[key] for key in sorted(self.made, key=_order(form))}
            shape = self._nnx_nodes(form, made) if form.is_nnx else self._linen_nodes(form, made, empty)
        leaves = {path: leaf_of(path, op, self.tree) for path, op in made.items()}
        return Tree(leaves, shape.empty, shape.sequences), made

    def _nnx_nodes(self, form: Form, made: Iterable[Path]) -> EmptyNodes:
        none = {form.path(key): "None" for key in self.masked}
        none |= self.source.empty if self.source.form.is_nnx else {}
        inside = any(path[: len(form.optimizer)] == form.optimizer for path in (*made, *none))
        if form.kind is Kind.NNX_TRAINING and not inside:
            none[form.optimizer] = "Dict"  # or nobody could tell what the tree is
        return EmptyNodes(none, self.source.sequences if self.source.form.is_nnx else frozenset())

    def _linen_nodes(self, form: Form, made: Iterable[Path], empty: str | None) -> EmptyNodes:
        linen, keys = self.note.linen, [*self.made, *self.masked]
        if not self.source.form.is_nnx:
            base = EmptyNodes(self.source.empty, self.tree.sequences)
        elif linen is not None:
            base = EmptyNodes(linen.empty, linen.sequences)
        else:
            base = EmptyNodes()
        if self.template is not None:
            base = EmptyNodes({**base.empty, **self.template.empty}, base.sequences | self.template.sequences)
        elif not any(path[0] == "opt_state" for path in base.sequences):
            told = empty_nodes.from_keys(keys)
            base = EmptyNodes({**told.empty, **base.empty}, base.sequences | told.sequences)
            if self.source.form.is_nnx and linen is None and (STEP in self.made or told.sequences):
                self.warnings.append(
                    "an NNX checkpoint does not tell of optax states without content at the end of a chain, which a "
                    "TrainState has: give tx or a target for Linen's exact structure"
                )
        masked = {form.path(key): "None" for key in self.masked}
        base = EmptyNodes(base.empty, base.sequences | empty_nodes.tails(keys, form))
        base = empty_nodes.fitting(base, [*made, *masked])
        if empty is not None:
            masked = dict.fromkeys(masked, empty)
            return EmptyNodes({**masked, **empty_nodes.called(base.empty, empty, keys)}, base.sequences)
        if not self.source.form.is_nnx:
            masked |= {path: self.tree.empty[path] for path in masked if path in self.tree.empty}
        return EmptyNodes({**masked, **base.empty}, base.sequences)

    def _note(self, form: Form, tree: Tree) -> Note:
        """The target's own side, and what is known of the other."""
        source, linen, nnx = self.source, self.note.linen, self.note.nnx
        if source.form.is_nnx:
            nnx = source.form
        else:
            linen = _linen_note(source.form, self.tree, source.masked.values(), source.leaves.get(STEP))
        if not form.is_nnx:
            step = form.path(STEP) if STEP in self.made else None
            linen = _linen_note(form, tree, [form.path(key) for key in self.masked], step)
        named = [key.location for key in self.made if key.role is Role.MODEL and key.location]
        others = [at for at in named if form.is_nnx and at[0] not in ("params", UNKNOWN)]
        collections = {form.variable(at): at[0] for at in others}
        unsure = form.is_nnx and any(at[0] == UNKNOWN for at in named)
        return Note(Kind.UNKNOWN if unsure else form.kind, collections, linen, nnx)


def _linen_note(form: Form, tree: Tree, masked: Iterable[Path], step: Path | None) -> LinenNote:
    apart = set(masked)
    empty = {path: kind for path, kind in tree.empty.items() if path not in apart}
    dtype = tree.leaves[step].dtype if step in tree.leaves else "int32"
    return LinenNote(form, empty, tree.sequences, dtype)


def _is_loose(key: Key) -> bool:
    return key.role is Role.OPTIMIZER and key.location is None


def _order(form: Form) -> Callable[[Key], int]:
    """The order of a real TrainState's fields, or of a model and its optimizer; within one, the source's."""
    roles = [Role.MODEL, Role.STREAM, Role.OPTIMIZER, Role.STEP, Role.EXTRA]
    if not form.is_nnx:
        roles = [Role.STEP, Role.MODEL, Role.OPTIMIZER, Role.STREAM, Role.EXTRA]

    def rank(key: Key) -> int:
        beside = not form.is_nnx and key.role is Role.MODEL and key.location is not None and key.location[0] != "params"
        return len(roles) if beside else roles.index(key.role)

    return rank
