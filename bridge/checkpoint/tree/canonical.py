"""What each leaf of a checkpoint is, whatever layout it is in: a variable, a slot of the optimizer, the step, ...

A `Key` says it in words that Linen and NNX share; a `Form` says where a layout keeps a leaf with that key.
Law: `take_apart(tree, kind).leaves` has every leaf of `tree` once, and `parts.form.path(key)` is where it was.
Keys of optimizers follow the structure-driven rule of `opt_state`; so do fields of the shape of the params (averages).
Knows trees of leaves and paths; knows nothing of arrays, files or models.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bridge._errors import CheckpointLayoutError
from bridge._types import Location, Path, Shape
from bridge.checkpoint.tree import layout, opt_state
from bridge.checkpoint.tree.layout import Kind, Layout
from bridge.checkpoint.tree.tree import Tree
from bridge.variables.kinds import LINEN_COLLECTIONS
from bridge.variables.mapping import name_of

#: The collection of a variable in an NNX checkpoint, as long as nobody has said which.
UNKNOWN = "?"
#: Where a Linen checkpoint keeps the random streams of an NNX model, at their paths in it.
STREAMS = "nnx_rngs"
#: The level that NNX has for each Variable, and Linen for each box.
VALUE = "value"
#: Layers of flax and nnx_core give these names to parameters and to nothing else.
PARAM_NAMES = frozenset({"kernel", "bias", "scale", "embedding", "negative_slope", "hn_bias"})

NNX_KINDS = (Kind.NNX_STATE, Kind.NNX_TRAINING)


class Role(enum.Enum):
    """What a leaf is."""

    MODEL = "variable of the model"
    STEP = "step"
    OPTIMIZER = "optimizer state"
    STREAM = "random stream"
    EXTRA = "another field"


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf, by what it is.

    Attributes:
      role: see there.
      prefix: OPTIMIZER: the path above the param, or all of it if there is none; STREAM: the path in the model;
        EXTRA: the field, and the path in it above the param, or all of it.
      location: the variable that it is (MODEL) or belongs to.
      tail: the path below that.
    """

    role: Role
    prefix: Path = ()
    location: Location | None = None
    tail: Path = ()


STEP = Key(Role.STEP)


@dataclass(frozen=True)
class Form:
    """Where a layout keeps things.

    Attributes:
      kind: the layout. The rest is for NNX, except `boxed`:
      model, optimizer: the paths of both, () for the root.
      value: whether each Variable has a level `value`.
      special: variables whose path is not the rest of their location: `w@stats` of a wrapped Linen module is `w`.
      boxed: Linen: variables in a box, which is a level `value` too.
    """

    kind: Kind
    model: Path = ()
    optimizer: Path = ("optimizer",)
    value: bool = True
    special: Mapping[Location, Path] = field(default_factory=dict)
    boxed: frozenset[Location] = frozenset()

    @property
    def is_nnx(self) -> bool:
        return self.kind in NNX_KINDS

    def path(self, key: Key) -> Path:
        """Where a leaf with this key is.

        >>> kernel = ("params", "Dense_0", "kernel")
        >>> Form(Kind.LINEN_TRAIN_STATE).path(Key(Role.OPTIMIZER, ("0", "mu"), kernel))
        ('opt_state', '0', 'mu', 'Dense_0', 'kernel')
        >>> Form(Kind.NNX_TRAINING, ("model",)).path(Key(Role.OPTIMIZER, ("0", "mu"), kernel))
        ('optimizer', 'opt_state', '0', 'mu', 'Dense_0', 'kernel', 'value')
        """
        return self._nnx_path(key) if self.is_nnx else self._linen_path(key)

    def variable(self, location: Location) -> Path:
        """The path by which optimizer states and averages call a variable."""
        if self.kind is Kind.LINEN_NESTED_TRAIN_STATE:
            return location
        return self.special.get(location, location[1:])

    def fits(self, key: Key) -> bool:
        """Whether there is a place for it: an optimizer over other variables than params needs their collections."""
        flat = not self.is_nnx and self.kind is not Kind.LINEN_NESTED_TRAIN_STATE
        return not (flat and key.role is not Role.MODEL and key.location and key.location[0] != "params")

    def _nnx_path(self, key: Key) -> Path:
        value = (VALUE,) if self.value else ()
        of_param = () if key.location is None else (*self.variable(key.location), *value)
        match key.role:
            case Role.MODEL:
                return (*self.model, *of_param, *key.tail)
            case Role.STREAM:
                return (*self.model, *key.prefix, *value)
            case Role.STEP:
                return (*self.optimizer, "step", *value)
            case Role.OPTIMIZER:
                loose = value if key.location is None else ()
                return (*self.optimizer, "opt_state", *key.prefix, *of_param, *key.tail, *loose)
            case Role.EXTRA:
                return (*key.prefix, *of_param, *key.tail)

    def _linen_path(self, key: Key) -> Path:
        box = (VALUE,) if key.location in self.boxed else ()
        of_param = () if key.location is None else (*self.variable(key.location), *box)
        match key.role:
            case Role.MODEL:
                top = ("params",) if self.kind is Kind.LINEN_NESTED_TRAIN_STATE else ()
                collection = () if self.kind is Kind.PARAMS_ONLY else (key.location or ())[:1]
                return (*top, *collection, *(key.location or ())[1:], *box, *key.tail)
            case Role.STREAM:
                return (STREAMS, *key.prefix)
            case Role.STEP:
                return ("step",)
            case Role.OPTIMIZER:
                return ("opt_state", *key.prefix, *of_param, *key.tail)
            case Role.EXTRA:
                return (*key.prefix, *of_param, *key.tail)


@dataclass(frozen=True)
class Known:
    """What somebody knows about a tree that its paths do not tell. None: nobody does.

    Attributes:
      collections: NNX: path in the model -> collection.
      default: NNX: the collection of a Variable that is not in `collections`.
      streams: NNX: paths in the model that are random streams.
      names: Linen: which keys beside params are collections.
      boxed: Linen: which variables are in boxes.
    """

    collections: Mapping[Path, str] | None = None
    default: str = UNKNOWN
    streams: frozenset[Path] | None = None
    names: frozenset[str] | None = None
    boxed: frozenset[Location] | None = None


@dataclass(frozen=True)
class Parts:
    """A tree taken apart.

    Attributes:
      form: where the tree keeps things.
      leaves: key -> path of a leaf.
      masked: key -> path of an entry without content that stands for a variable: a param that part of the optimizer
        leaves out, a Variable whose value is None.
      empty: other entries without content, by path.
      sequences: nodes that are lists or tuples, by path.
      convention: variables of an NNX checkpoint whose collection was told from the name or the optimizer alone.
      guessed_boxes: whether the boxes were told from a level `value` alone.
    """

    form: Form
    leaves: Mapping[Key, Path]
    masked: Mapping[Key, Path] = field(default_factory=dict)
    empty: Mapping[Path, str] = field(default_factory=dict)
    sequences: frozenset[Path] = frozenset()
    convention: tuple[Location, ...] = ()
    guessed_boxes: bool = False

    def params(self) -> dict[Path, Location]:
        """What an optimizer may have slots for: path in the optimizer state -> location."""
        params_only = not self.form.is_nnx and self.form.kind is not Kind.LINEN_NESTED_TRAIN_STATE
        params: dict[Path, Location] = {}
        for key in self.leaves:
            location = key.location
            if key.role is Role.MODEL and location and not (params_only and location[0] != "params"):
                params[self.form.variable(location)] = location
        return params


def take_apart(tree: Tree, found: Layout, known: Known | None = None) -> Parts:
    """What each leaf of a tree with this layout is.

    Raises:
      CheckpointLayoutError: nobody knows what an unknown layout holds.

    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> leaf = Leaf(("params", "Dense_0", "kernel"), (2, 3), "float32", 24)
    >>> tree = Tree({leaf.path: leaf})
    >>> parts = take_apart(tree, tree.layout)
    >>> [key.location for key in parts.leaves]
    [('params', 'Dense_0', 'kernel')]
    """
    known = known or Known()
    if found.kind is Kind.UNKNOWN:
        raise CheckpointLayoutError(
            "the layout of the checkpoint is not known",
            "(tree)",
            expected="params, with step and opt_state beside them or alone; or an nnx.State",
            found=found.reason,
            hint="Say which it is: kind=... (--layout; make_plan: layout=...), or where the state is: at=... (--at).",
        )
    return _Taken(tree, found, known).parts()


# ---- taking apart -----------------------------------------------------------------------------------------------


class _Taken:
    """A tree while it is taken apart: first the variables, then what follows them."""

    def __init__(self, tree: Tree, found: Layout, known: Known):
        self.tree, self.known = tree, known
        self.entries: dict[Path, Any] = {**tree.leaves, **dict.fromkeys(tree.empty)}
        self.leaves: dict[Key, Path] = {}
        self.masked: dict[Key, Path] = {}
        self.empty: dict[Path, str] = {}
        self.convention: tuple[Location, ...] = ()
        self.special: dict[Location, Path] = {}
        self.form = self._nnx_form(found.kind) if found.kind in NNX_KINDS else self._linen_form(found)

    def parts(self) -> Parts:
        if self.form.is_nnx:
            self._take_nnx()
        else:
            self._take_linen()
        guessed = self.known.boxed is None and any(at[0] == "params" for at in self.form.boxed)
        return Parts(self.form, self.leaves, self.masked, self.empty, self.tree.sequences, self.convention, guessed)

    def _put(self, key: Key, path: Path) -> None:
        if path in self.tree.leaves:
            self.leaves[key] = path
        elif key.location is not None and not (key.role is Role.MODEL and not self.form.is_nnx):
            self.masked[key] = path
        else:
            self.empty[path] = self.tree.empty[path]

    # Linen

    def _linen_form(self, found: Layout) -> Form:
        if self.known.boxed is not None:
            return Form(found.kind, boxed=self.known.boxed)
        locations = [_location(path, found.kind) for path in found.boxed]
        return Form(found.kind, boxed=frozenset(location for location in locations if len(location) > 1))

    def _take_linen(self) -> None:
        kind, names = self.form.kind, self._collection_names()
        fields: dict[str, list[Path]] = {}
        for path in self.entries:
            if kind is Kind.PARAMS_ONLY or (path[0] == "params" or path[0] in names):
                location = _location(path, kind)
                if location[:-1] in self.form.boxed and location[-1] == VALUE:
                    location = location[:-1]
                self._put(Key(Role.MODEL, location=location), path)
            elif path == ("step",):
                self._put(STEP, path)
            elif path[0] == STREAMS:
                self._put(Key(Role.STREAM, path[1:]), path)
            else:
                fields.setdefault(path[0], []).append(path)
        for name, paths in fields.items():
            self._take_field(Role.OPTIMIZER if name == "opt_state" else Role.EXTRA, (name,), paths)

    def _collection_names(self) -> frozenset[str]:
        """Top-level keys beside params that are collections."""
        if self.known.names is not None:
            return self.known.names
        if self.form.kind is Kind.PARAMS_ONLY:
            return frozenset()
        tree = layout.nest(self.entries)
        params = tree.get("params") or {}
        if self.form.kind is Kind.LINEN_NESTED_TRAIN_STATE:
            params = params.get("params", {})
        if self.form.kind is not Kind.LINEN_VARIABLES:
            return frozenset(layout.collection_names(tree, params))
        # No TrainState: there are no fields beside collections, but for averages, which have the paths of the params.
        weights = set(layout.flatten(params))
        names: set[str] = set()
        for name, below in tree.items():
            is_average = name not in LINEN_COLLECTIONS and set(layout.flatten(below)) == weights
            if isinstance(below, Mapping) and name not in ("params", STREAMS) and not is_average:
                names.add(name)
        return frozenset(names)

    # NNX

    def _nnx_form(self, kind: Kind) -> Form:
        model, optimizer = ((), ("optimizer",)) if kind is Kind.NNX_STATE else _roots(self.entries)
        inside = [path for path in self.entries if path[: len(model)] == model]
        value = bool(inside) and all(VALUE in path[len(model) :] for path in inside)
        return Form(kind, model, optimizer, value, self.special)

    def _take_nnx(self) -> None:
        form, step = self.form, self.form.path(STEP)
        state = (*form.optimizer, "opt_state")
        fields: dict[Path, list[Path]] = {}
        for path in self.entries:
            is_step = path == step
            if path[: len(form.model)] == form.model and not (form.kind is Kind.NNX_TRAINING and is_step):
                self._take_variable(path)
            elif is_step:
                self._put(STEP, path)
            elif path[: len(state)] == state:
                fields.setdefault(state, []).append(path)
            else:
                fields.setdefault(path[:1], []).append(path)
        for root, paths in fields.items():
            self._take_field(Role.OPTIMIZER if root == state else Role.EXTRA, root, paths)
        if self.known.collections is None:
            self._name_collections()

    def _take_variable(self, path: Path) -> None:
        bare, tail = path[len(self.form.model) :], ()
        if self.form.value:  # the last level `value`: what is below it is part of a value that is a tree
            cut = len(bare) - 1 - bare[::-1].index(VALUE)
            bare, tail = bare[:cut], bare[cut + 1 :]
        if self._is_stream(bare):
            self._put(Key(Role.STREAM, bare), path)
            return
        collection = (self.known.collections or {}).get(bare, self.known.default)
        location = (collection, *bare)
        if bare and "@" in bare[-1]:  # `w@stats` of a wrapped Linen module
            location = (collection, *bare[:-1], name_of(bare[-1], collection))
            if location[1:] != bare:
                self.special[location] = bare
        self._put(Key(Role.MODEL, location=location, tail=tail), path)

    def _is_stream(self, bare: Path) -> bool:
        """A random key, or the counter beside one: `rngs/params/key`, `dropout/rngs/count`."""
        if self.known.streams is not None:
            return bare in self.known.streams
        if not bare or bare[-1] not in ("key", "count"):
            return False
        key = self.tree.leaves.get(self.form.path(Key(Role.STREAM, (*bare[:-1], "key"))))
        count = self.tree.leaves.get(self.form.path(Key(Role.STREAM, (*bare[:-1], "count"))))
        if key is None or count is None:
            return False
        return key.dtype.startswith("key<") or "rngs" in bare[-3:-1]

    def _name_collections(self) -> None:
        """`params` for what the optimizer has slots of, and for names that layers give to parameters only."""
        trained = {key.location for key in (*self.leaves, *self.masked) if key.role is Role.OPTIMIZER}

        def named(key: Key) -> Key:
            location = key.location
            if location is None or location[0] != UNKNOWN:
                return key
            if location not in trained and location[-1] not in PARAM_NAMES:
                return key
            return replace(key, location=("params", *location[1:]))

        changed = [named(key) for key in self.leaves if key.role is Role.MODEL and named(key) is not key]
        self.convention = tuple(key.location for key in changed if key.location)
        self.leaves = {named(key): path for key, path in self.leaves.items()}
        self.masked = {named(key): path for key, path in self.masked.items()}

    # what follows the params

    def _take_field(self, role: Role, root: Path, paths: list[Path]) -> None:
        """Slots of an optimizer, or averages: `prefix + param + tail` by the structure-driven rule, or no param."""
        above = () if role is Role.OPTIMIZER else root
        params = Parts(self.form, self.leaves).params()
        for path, place in self._places(root, paths, params).items():
            whole = (*root, *path)
            if not place.param:  # () is a mask over a whole module
                prefix = path[:-1] if role is Role.OPTIMIZER and self._has_value(path) else path
                self._put(Key(role, (*above, *prefix)), whole)
                continue
            location, tail = params[place.param], place.tail
            has_level = self.form.value if self.form.is_nnx else location in self.form.boxed
            if has_level and tail[:1] == (VALUE,):
                tail = tail[1:]
            self._put(Key(role, (*above, *place.prefix), location, tail), whole)

    def _has_value(self, path: Path) -> bool:
        return self.form.is_nnx and self.form.value and path[-1:] == (VALUE,)

    def _places(
        self, root: Path, paths: Iterable[Path], params: Mapping[Path, Location]
    ) -> dict[Path, opt_state.Place]:
        """Where the params are below `root`: by the first guess of what the params are that finds any there."""
        nested = layout.nest({path[len(root) :]: self.entries[path] for path in paths})
        shapes: dict[Path, Shape] = {}
        for name, location in params.items():
            shapes[name] = self.tree.leaves[self.leaves[Key(Role.MODEL, location=location)]].shape
        for trained in self._guesses(nested, shapes, params):
            places = opt_state.places(nested, {name: shapes[name] for name in trained})
            if any(place.param for place in places.values()):
                return places
        return {path: opt_state.Place(path) for path in layout.flatten(nested)}

    def _guesses(
        self, nested: Any, shapes: Mapping[Path, Shape], params: Mapping[Path, Location]
    ) -> Iterator[Collection[Path]]:
        """What the optimizer may have been given, the best guess first.

        The rule asks for *the* params: a slot of another shape than its param (Adafactor's rows) counts only in a
        node that covers all of them. Linen tells which they are. In NNX an Optimizer may have been given any filter,
        and the checkpoint does not say which.
        """
        if not shapes:
            return
        if not self.form.is_nnx:
            yield shapes
            return
        # What the types or a note of ours say.
        known = [name for name in shapes if params[name][0] == "params"]
        if known:
            yield known
        # Asked about all variables, statistics too, the rule still finds slots of the shape of their params (`mu`).
        # Asked again about these params alone, it also finds their slots of other shapes.
        slots = opt_state.places(nested, shapes).values()
        trained = {place.param for place in slots if place.param}
        if trained:
            yield trained
        # No slot has the shape of its variable: what layers call their parameters, and nothing else.
        named = [name for name in shapes if name[-1] in PARAM_NAMES]
        if named:
            yield named


def _location(path: Path, kind: Kind) -> Location:
    if kind is Kind.PARAMS_ONLY:
        return ("params", *path)
    nested = kind is Kind.LINEN_NESTED_TRAIN_STATE and path[0] == "params" and len(path) > 1
    return path[1:] if nested else path


def _roots(paths: Iterable[Path]) -> tuple[Path, Path]:
    """Where model and optimizer are: the one of the two that holds an `opt_state`, or a `step`, is the optimizer."""
    known = list(paths)
    tops = {path[0] for path in known}
    if "model" in tops:
        inside = any(path[0] == "opt_state" for path in known)
        return ("model",), () if inside else ("optimizer",)
    second = any(path[0] == "0" and path[1:2] in (("opt_state",), ("step",)) for path in known)
    return (("1",), ("0",)) if second else (("0",), ("1",))
