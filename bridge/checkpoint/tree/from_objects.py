"""Objects in memory as trees of leaves: models, States, optimizers, TrainStates, variables, concrete or abstract.

Law: `of_object(x).values` has every array of `x` once, itself and not a copy, at the path that Orbax gives it on disk.
What only types tell (collections, random streams, boxes) is in `known`, so that nothing has to be told from names.
Knows objects and their types; knows nothing of files or conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax.core import meta

import nnx_core as nnx
from bridge._errors import listed, show_path
from bridge._types import Location, Path, Shape
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.canonical import VALUE, Known, Parts, take_apart
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.tree import Tree
from bridge.variables.kinds import collection_of


@dataclass(frozen=True)
class Live:
    """An object as a tree.

    Attributes:
      tree: its leaves, without values.
      values: path -> array, abstract array, number or, for what is no array, whatever it is.
      variables: path of a Variable in `tree` (without `value`) -> the Variable, of nnx_core or flax.nnx.
      boxes: path of a box (without `value`) -> the box.
      layout: the layout the tree has.
      known: what the types tell.
    """

    tree: Tree
    values: Mapping[Path, Any]
    variables: Mapping[Path, Any]
    boxes: Mapping[Path, Any]
    layout: Layout
    known: Known

    def parts(self) -> Parts:
        """What each leaf is."""
        return take_apart(self.tree, self.layout, self.known)


def of_object(thing: Any, detected: Layout | None = None) -> Live:
    """A model, a State, a TrainState, a dict or tuple of them, variables, ...: whatever a checkpoint may be made of.

    `detected` is its layout, if it is known; a model may well have attributes called `model` and `optimizer`.

    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> live = of_object(model)
    >>> live.layout.kind, list(live.tree.leaves)
    (<Kind.NNX_STATE: 'nnx.State'>, [('bias', 'value'), ('kernel', 'value')])
    """
    walk = _Walk()
    walk.visit((), thing)
    tree = Tree(_leaves(walk.values), walk.empty, frozenset(walk.sequences))
    if walk.variables:
        return Live(tree, walk.values, walk.variables, walk.boxes, *_nnx(tree, walk.variables, detected))
    detected = detected or tree.layout
    detected = Layout(detected.kind, detected.reason, frozenset(walk.boxes))
    return Live(tree, walk.values, {}, walk.boxes, detected, Known(boxed=_locations(walk.boxes, detected.kind)))


def of_training(model: Any, optimizer: Any = None, extras: Mapping[str, Any] | None = None) -> Live:
    """A model, or a model, its optimizer and what else goes by its params, such as averages, under their names.

    The model may well have attributes called `model` and `optimizer`.
    """
    if optimizer is None and not extras:
        return of_object(state_of(model), Layout(Kind.NNX_STATE, "it is a model or its State"))
    fields = {"model": state_of(model)}
    if optimizer is not None:
        fields["optimizer"] = state_of(optimizer)
    fields |= {name: params_of(extra)[0] for name, extra in (extras or {}).items()}
    return of_object(fields, Layout(Kind.NNX_TRAINING, "it is a model and its optimizer"))


def params_of(extra: Any) -> tuple[Any, list[Path]]:
    """The params of a model or a State, as a tree of Variables, and the paths of its other Variables.

    Averages are of params: what else a model of averages has (statistics, random streams) is no part of them. A State
    without any param, and whatever is neither model nor State, is taken as it is.
    """
    flat = flat_state(extra)
    if flat is None:
        return extra, []
    params: dict[Path, Any] = {}
    others: list[Path] = []
    for keys, variable in flat:
        path = tuple(map(str, keys))
        if _is_a(type(variable), "Param"):
            params[path] = variable
        else:
            others.append(path)
    return (layout.nest(params), others) if params else (state_of(extra), [])


def notes_on_extras(extras: Mapping[str, Any]) -> list[str]:
    """A line for each of `extras` that has more than params."""
    notes: list[str] = []
    for name, extra in extras.items():
        others = params_of(extra)[1]
        if others:
            paths = listed([show_path(path) for path in others])
            notes.append(f"{name} is of params: these variables of it are left as they are, and no part of it: {paths}")
    return notes


def of_leaves(leaves: Mapping[Path, Any], kind: Kind, known: Known) -> Live:
    """A flat tree whose layout is known; its values count as leaves, whatever they are."""
    return Live(Tree(_leaves(leaves)), leaves, {}, {}, Layout(kind, "as it was given"), known)


def _leaves(values: Mapping[Path, Any]) -> dict[Path, Leaf]:
    return {path: _leaf(path, value) for path, value in values.items()}


def _leaf(path: Path, value: Any) -> Leaf:
    shape, dtype = describe(value)
    nbytes = getattr(value, "nbytes", 0) if isinstance(value, jax.Array | np.ndarray) else 0
    return Leaf(path, shape, dtype, nbytes)


def describe(value: Any) -> tuple[Shape, str]:
    """Shape and dtype; of a pytree or another object, which can only be renamed, `()` and 'object'."""
    if isinstance(value, str | bool | int | float | complex) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return layout.describe(value)
    return (), "object"


@dataclass
class _Walk:
    """What is found on the way through an object."""

    values: dict[Path, Any] = field(default_factory=dict)
    empty: dict[Path, str] = field(default_factory=dict)
    sequences: list[Path] = field(default_factory=list)
    variables: dict[Path, Any] = field(default_factory=dict)
    boxes: dict[Path, Any] = field(default_factory=dict)

    def visit(self, path: Path, node: Any) -> None:
        if is_variable(node):
            self._visit_variable(path, node)
        elif (state := flat_state(node)) is not None:
            for keys, variable in state:
                self.visit((*path, *map(str, keys)), variable)
        elif isinstance(node, meta.AxisMetadata):
            self.boxes[path] = node
            self.visit((*path, VALUE), node.unbox())
        elif layout.is_empty(node):
            self.empty[path] = _empty_name(node)
        elif isinstance(node, jax.Array | jax.ShapeDtypeStruct) or (below := layout.children(node)) is None:
            self.values[path] = node
        else:
            if isinstance(node, list) or (isinstance(node, tuple) and not hasattr(node, "_fields")):
                self.sequences.append(path)
            for key, child in below:
                self.visit((*path, key), child)

    def _visit_variable(self, path: Path, variable: Any) -> None:
        self.variables[path] = variable
        value = raw_value(variable)
        if value is None or type(value).__name__ == "MaskedNode":
            self.empty[(*path, VALUE)] = "None"
        elif _is_a(type(variable), "OptState"):  # an optimizer may keep several arrays of one param
            self.visit((*path, VALUE), value)
        else:
            self.values[(*path, VALUE)] = value


def is_variable(x: Any) -> bool:
    """Whether `x` is a Variable of nnx_core or of flax.nnx, which is not imported for that."""
    if isinstance(x, nnx.Variable):
        return True
    return _is_flax(x) and hasattr(x, "get_raw_value") and hasattr(x, "get_metadata")


def _is_flax(x: Any) -> bool:
    return any(base.__module__.startswith("flax.nnx") for base in type(x).__mro__)


def state_of(node: Any) -> Any:
    """The State of a module or an optimizer, of nnx_core or flax.nnx; anything else as it is."""
    if isinstance(node, nnx.Object):
        return nnx.state(node)
    if not _is_flax(node) or isinstance(node, Mapping):
        return node
    from bridge.flax_nnx.states import their_state

    return their_state(node)


def flat_state(node: Any) -> list[tuple[tuple[Hashable, ...], Any]] | None:
    """(path, Variable) of a module, an optimizer or a State; None of anything else."""
    if isinstance(node, nnx.Object | nnx.State):
        return list(nnx.to_flat_state(state_of(node)))
    if not _is_flax(node):
        return None
    from bridge.flax_nnx.states import their_flat_state

    return their_flat_state(state_of(node))


def map_state(f: Callable[[tuple[Hashable, ...], Any], Any], node: Any) -> Any:
    """The State of a module, an optimizer or a State with `f(path, variable)` for each Variable."""
    if not _is_flax(node):
        return nnx.map_state(f, state_of(node))
    from bridge.flax_nnx.states import map_their_state

    return map_their_state(f, state_of(node))


def raw_value(variable: Any) -> Any:
    """The value of a Variable, read out of its `jax.Ref` if it lives in one."""
    value = variable.get_raw_value()
    return value[...] if getattr(variable, "has_ref", False) else value


def write(variable: Any, value: Any) -> None:
    """Write a value, into the `jax.Ref` if there is one."""
    if getattr(variable, "has_ref", False):
        variable.get_raw_value()[...] = value
    else:
        variable.set_raw_value(value)


def _empty_name(node: Any) -> str:
    if isinstance(node, Mapping):
        return "Dict"
    if isinstance(node, list):
        return "List"
    return "Tuple" if type(node) is tuple else "None"


def _nnx(tree: Tree, variables: Mapping[Path, Any], detected: Layout | None) -> tuple[Layout, Known]:
    """Layout and knowledge from the Variables' types."""
    detected = detected or tree.layout
    if detected.kind is not Kind.NNX_TRAINING:
        detected = Layout(Kind.NNX_STATE, "it has Variables")
    root = take_apart(tree, detected, Known({}, streams=frozenset())).form.model
    collections: dict[Path, str] = {}
    streams: set[Path] = set()
    for path, variable in variables.items():
        if path[: len(root)] != root:
            continue
        inside = path[len(root) :]
        collections[inside] = collection_name(type(variable))
        if _is_a(type(variable), "RngState"):
            streams.add(inside)
    return detected, Known(collections, streams=frozenset(streams))


def collection_name(kind: type) -> str:
    """The collection of a Variable type; a type of flax.nnx has that of nnx_core's type of the same name."""
    if not issubclass(kind, nnx.Variable):
        for base in kind.__mro__:
            if _is_ours_too(base):
                return collection_of(getattr(nnx, base.__name__))
    return collection_of(kind)


def _is_ours_too(base: type) -> bool:
    ours = getattr(nnx, base.__name__, None)
    return isinstance(ours, type) and issubclass(ours, nnx.Variable)


def _is_a(kind: type, name: str) -> bool:
    """Whether it is the Variable type of that name, of nnx_core or of flax.nnx, which is not imported for that."""
    return any(base.__name__ == name for base in kind.__mro__)


def _locations(boxed: Iterable[Path], kind: Kind) -> frozenset[Location]:
    if kind is Kind.PARAMS_ONLY:
        return frozenset(("params", *path) for path in boxed)
    drop = 1 if kind is Kind.LINEN_NESTED_TRAIN_STATE else 0
    return frozenset(path[drop:] for path in boxed)
