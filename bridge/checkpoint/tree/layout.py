"""What a tree of weights is: leaves by key tuples, the layout they form, the collection each belongs to.

Law: nothing here joins keys into a string, so a key may hold `/`, `.` or anything else;
`nest(flatten(tree)) == tree` for every tree of dicts and lists; `detect` looks at paths and reads nothing.
Knows nested containers and key tuples; knows nothing of files, modules or optimizers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge._errors import CheckpointLayoutError, VariablesMismatchError, listed, show_path
from bridge._types import Path, Shape
from bridge.variables.kinds import LINEN_COLLECTIONS

#: Levels of a tree. What is deeper is taken for a container that holds itself.
DEEPEST = 5_000

#: (path, node) -> its `(key, child)`; None for a leaf.
Enter = Callable[[Path, Any], Sequence[tuple[Any, Any]] | None]
#: `(key, result)` of the children of a node.
Parts = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Leaf:
    """One array, number or string of a tree.

    `dtype` is a name: numpy's ('float32', 'bfloat16'), `key<fry>` for typed random keys, 'str' for text.
    `nbytes` is the size in memory once read.
    """

    path: Path
    shape: Shape
    dtype: str
    nbytes: int


class Kind(enum.Enum):
    """The layouts that are told apart."""

    LINEN_TRAIN_STATE = "Linen TrainState"
    LINEN_NESTED_TRAIN_STATE = "Linen TrainState, variables as params"
    LINEN_VARIABLES = "Linen variables"
    PARAMS_ONLY = "params only"
    NNX_STATE = "nnx.State"
    NNX_TRAINING = "NNX model and optimizer"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Layout:
    """A layout and the evidence for it; `boxed` are the paths (less `value`) that look like Linen boxes."""

    kind: Kind
    reason: str
    boxed: frozenset[Path] = frozenset()


class TreeStructureError(ValueError):
    """A list of paths that no tree of dicts and lists has. `path` is where."""

    def __init__(self, path: Path, why: str):
        self.path = path
        super().__init__(f"{'/'.join(path) or '(root)'}: {why}")


# --- trees --------------------------------------------------------------------------------------------------


def is_empty(node: object) -> bool:
    """True for what marks a place and holds no leaf: None, `{}`, `[]`, `()`, EmptyState, MaskedNode."""
    return node is None or (isinstance(node, Mapping | list | tuple) and not node)


def children(node: Any) -> list[tuple[str, Any]] | None:
    """`(key, child)` of a container, in its own order; None for a leaf and for an empty container.

    Dicts (any Mapping), lists, tuples, namedtuples, and every registered pytree: the keys are those of
    `jax.tree_util`.
    """
    if is_empty(node):
        return None
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return [(str(index), child) for index, child in enumerate(node)]
    if isinstance(node, np.ndarray | np.generic | bool | int | float | complex | str | Leaf):
        return None
    return _pytree_children(node)


def _pytree_children(node: Any) -> list[tuple[str, Any]] | None:
    import jax

    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if any(not keys for keys, _ in entries):  # the node is its own only entry: a leaf
        return None
    return [(key_name(keys[0]), child) for keys, child in entries]


def key_name(key: Any) -> str:
    """The bare text of one `jax.tree_util` key: DictKey, SequenceKey, GetAttrKey or FlattenedIndexKey."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any) -> dict[Path, Any]:
    """Every leaf and every empty container of `tree` by its key tuple, in the tree's order.

    >>> flatten({"params": {"a/b": 1}, "opt_state": [None, {"mu": 2}]})
    {('params', 'a/b'): 1, ('opt_state', '0'): None, ('opt_state', '1', 'mu'): 2}
    """
    return dict(walk(tree, every_child))


def every_child(path: Path, node: Any) -> list[tuple[str, Any]] | None:
    """For `walk` and `fold`: go into every container."""
    return children(node)


def walk(tree: Any, enter: Enter) -> Iterator[tuple[Path, Any]]:
    """`(path, node)` of every node of `tree` that counts as a leaf, in the tree's order.

    A loop, so that a tree may be deeper than Python's stack.

    Args:
      tree: nested containers.
      enter: (path, node) -> the `(key, child)` to go into; None for what counts as a leaf.

    Raises:
      CheckpointLayoutError: there are more than 5,000 levels.
    """
    pending: list[tuple[Path, Path, Any]] = [((), (), tree)]
    while pending:
        parent, key, node = pending.pop()
        path = parent + key
        below = enter(path, node)
        if below is None:
            yield path, node
        else:
            pending.extend((path, key, child) for key, child in _as_stack(path, below))


def fold(tree: Any, enter: Enter, leave: Callable[[Path, Any, Parts | None], Any], prefix: Path = ()) -> Any:
    """What `leave` makes of `tree`, children before parents, in the tree's order; a loop, too.

    Args:
      tree: nested containers.
      enter: as in `walk`.
      leave: (path, node, what it made of each `(key, child)`; None for a leaf) -> what stands for the node.
      prefix: the path of `tree` itself.

    Raises:
      CheckpointLayoutError: there are more than 5,000 levels.
    """
    results: list[Any] = []  # of the nodes that are done and whose parents are not
    pending: list[tuple[Path, Path, Any, list[Any] | None]] = [(prefix, (), tree, None)]
    while pending:
        parent, key, node, keys = pending.pop()
        path = parent + key
        if keys is not None:  # the last results are those of its children
            start = len(results) - len(keys)
            results[start:] = [leave(path, node, list(zip(keys, results[start:], strict=True)))]
            continue
        below = enter(path, node)
        if below is None:
            results.append(leave(path, node, None))
            continue
        pending.append((parent, key, node, [key for key, _ in below]))
        pending.extend((path, key, child, None) for key, child in _as_stack(path, below))
    return results[0]


def _as_stack(path: Path, below: Sequence[tuple[Any, Any]]) -> list[tuple[Path, Any]]:
    """(rest of the path, child) of what is below `path`, the last one first.

    The whole path is made when the child's turn comes: before, the paths of all that waits would fill the memory.
    """
    if len(path) >= DEEPEST:
        raise CheckpointLayoutError(
            "the tree is too deep",
            f"{show_path(path[:3])}/...",
            expected=f"at most {DEEPEST} levels",
            found="more",
            hint="If a container holds itself, take it out.",
        )
    return [((str(key),), child) for key, child in reversed(below)]


def flatten_full(tree: Any) -> dict[Path, Any]:
    """`flatten` without the empty containers."""
    return {path: leaf for path, leaf in flatten(tree).items() if not is_empty(leaf)}


def nest(leaves: Mapping[Path, Any], sequences: Iterable[Path] = ()) -> Any:
    """The tree whose `flatten` is `leaves`; nodes with a path in `sequences` are lists, all others dicts.

    Raises TreeStructureError if one path is the start of another, or the indices of a list have a gap.

    >>> nest({("opt_state", "0"): None, ("opt_state", "1", "mu"): 2}, sequences=[("opt_state",)])
    {'opt_state': [None, {'mu': 2}]}
    """
    if () in leaves:
        if len(leaves) > 1:
            raise TreeStructureError((), "is a leaf and has leaves below it")
        return leaves[()]
    root: dict[str, Any] = {}
    nodes: dict[Path, dict[str, Any]] = {(): root}
    for path, value in leaves.items():
        for depth in range(1, len(path)):
            node = path[:depth]
            if node in leaves:
                raise TreeStructureError(node, "is a leaf and has leaves below it")
            if node not in nodes:
                nodes[node] = nodes[path[: depth - 1]][path[depth - 1]] = {}
        nodes[path[:-1]][path[-1]] = value
    whole: Any = root
    # deepest first: a list is complete when its parent takes it
    for path in sorted(nodes.keys() & set(sequences), key=len, reverse=True):
        items = _as_list(path, nodes[path])
        if path:
            nodes[path[:-1]][path[-1]] = items
        else:
            whole = items
    return whole


def _as_list(path: Path, node: dict[str, Any]) -> list[Any]:
    indices = [str(index) for index in range(len(node))]
    if set(node) != set(indices):
        raise TreeStructureError(path, f"is a list with the indices {', '.join(sorted(node))}")
    return [node[index] for index in indices]


def map_leaves(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """`tree` with `function(path, leaf)` for every leaf; dicts, lists and (named) tuples keep their type.

    Empty containers stay as they are. Other pytrees are rebuilt by `jax.tree_util`.
    """

    def leave(path: Path, node: Any, parts: Parts | None) -> Any:
        if parts is not None:
            return rebuild(node, parts)
        return node if is_empty(node) else function(path, node)

    return fold(tree, every_child, leave)


def rebuild(node: Any, keyed_parts: Parts) -> Any:
    """A container like `node` with these children, in the order of `children(node)`."""
    parts = [part for _, part in keyed_parts]
    kind: Any = type(node)
    if isinstance(node, Mapping):
        return kind(dict(zip(node, parts, strict=True)))
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return kind(*parts)
    if isinstance(node, list | tuple):
        return kind(parts)
    import jax

    structure = jax.tree_util.tree_structure(node, is_leaf=lambda child: child is not node)
    return jax.tree_util.tree_unflatten(structure, parts)


def describe(value: Any) -> tuple[Shape, str]:
    """Shape and dtype name of an array, abstract array, Python number or string, without reading it.

    >>> describe(3), describe("text")
    (((), 'int64'), ((), 'str'))
    """
    if isinstance(value, str):
        return (), "str"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return tuple(value.shape), str(value.dtype)
    array = np.asarray(value)
    return array.shape, str(array.dtype)


# --- comparing ----------------------------------------------------------------------------------------------


def require_match(expected: Any, found: Any, *, source: str = "variables", target: str = "the model") -> None:
    """Raise one VariablesMismatchError unless `found` has the paths, shapes and dtypes of `expected`.

    Both are trees, of arrays or of anything `describe` takes. A Python number has no dtype of its own: on
    either side it fits every scalar of its kind (a TrainState's `step` is an int before the first jitted
    step, an int32 after). Empty containers count as nothing.
    """
    want, have = flatten_full(expected), flatten_full(found)
    shapes, dtypes = [], []
    for path in want.keys() & have.keys():
        (shape, dtype), (got_shape, got_dtype) = describe(want[path]), describe(have[path])
        if shape != got_shape:
            shapes.append((path, shape, got_shape))
        elif dtype != got_dtype and not _same_kind_number(want[path], dtype, have[path], got_dtype):
            dtypes.append((path, dtype, got_dtype))
    missing, unexpected = want.keys() - have.keys(), have.keys() - want.keys()
    if missing or unexpected or shapes or dtypes:
        raise VariablesMismatchError(missing, unexpected, shapes, dtypes, source=source, target=target)


def _same_kind_number(first: Any, dtype: str, second: Any, other: str) -> bool:
    if not any(isinstance(value, bool | int | float | complex) for value in (first, second)):
        return False
    return _number_kind(dtype) == _number_kind(other)


def _number_kind(dtype: str) -> str:
    """'bool', 'complex', 'float' or 'int': bfloat16 and float8_e4m3fn are 'float', uint8 is 'int'."""
    for kind in ("bool", "complex", "float", "int"):
        if kind in dtype:
            return kind
    return dtype


# --- layouts ------------------------------------------------------------------------------------------------


def detect(paths: Iterable[Path]) -> Layout:
    """The layout that leaves with these paths form, with the reason in words. Never raises.

    `.../kernel/value` is a Linen box (`nn.Partitioned`) or an NNX Variable. It is decided for the whole tree:
    Linen's top-level names make it a box; a bare tree in which *all* paths end in `value` is an nnx.State.

    >>> detect([("step",), ("params", "Dense_0", "kernel"), ("opt_state", "0", "count")]).kind
    <Kind.LINEN_TRAIN_STATE: 'Linen TrainState'>
    """
    paths = list(paths)
    if () in paths:
        return Layout(Kind.UNKNOWN, "it is one array, without a name")
    if not paths:
        return Layout(Kind.UNKNOWN, "it has no leaves")
    tops = list(dict.fromkeys(path[0] for path in paths))
    boxed = frozenset(path[:-1] for path in _boxed(paths))
    names = listed(tops, most=6)
    if "params" in tops:
        return _detect_linen(paths, tops, names, boxed)
    if {"model", "optimizer"} <= set(tops) or {"model", "opt_state", "step"} <= set(tops) or _is_pair(paths, tops):
        return Layout(Kind.NNX_TRAINING, f"the top-level keys are {names}: a model and its optimizer")
    if all(path[-1] == "value" for path in paths):
        return Layout(Kind.NNX_STATE, "all paths end in 'value', the level that an nnx.State has for each Variable")
    if any(map(_is_rng, paths)):
        return Layout(Kind.NNX_STATE, "it holds rngs/<stream>/count and key, which only NNX stores with a model")
    if LINEN_COLLECTIONS & set(tops):
        return Layout(Kind.LINEN_VARIABLES, f"the top-level keys are Linen collections: {names}", boxed)
    if not {"step", "opt_state"} & set(tops) and all(len(path) > 1 for path in paths):
        return Layout(Kind.PARAMS_ONLY, f"no collection names on top, only module names: {names}", boxed)
    return Layout(Kind.UNKNOWN, f"the top-level keys are {names}: no params among them")


def _is_pair(paths: list[Path], tops: list[str]) -> bool:
    """Whether it is `nnx.state((model, optimizer))`, and no list of two layers."""
    return set(tops) == {"0", "1"} and any(path[1:2] in (("opt_state",), ("step",)) for path in paths)


def _detect_linen(paths: list[Path], tops: list[str], names: str, boxed: frozenset[Path]) -> Layout:
    inner = {path[1] for path in paths if path[0] == "params" and len(path) > 2}
    nested = "params" in inner and inner <= LINEN_COLLECTIONS
    if {"step", "opt_state"} & set(tops):
        if nested:
            why = f"the top-level keys are {names}, and params holds collections: {', '.join(sorted(inner))}"
            return Layout(Kind.LINEN_NESTED_TRAIN_STATE, why, boxed)
        return Layout(Kind.LINEN_TRAIN_STATE, f"the top-level keys are {names}", boxed)
    if nested:
        why = f"params holds collections itself: {', '.join(sorted(inner))}"
        return Layout(Kind.LINEN_NESTED_TRAIN_STATE, why, boxed)
    return Layout(Kind.LINEN_VARIABLES, f"the top-level keys are collections: {names}", boxed)


def _boxed(paths: list[Path]) -> list[Path]:
    """Paths that end in a `value` which has no sibling: what a box leaves on disk."""
    keys: dict[Path, set[str]] = {}
    for path in paths:
        for depth, key in enumerate(path):
            keys.setdefault(path[:depth], set()).add(key)
    return [path for path in paths if len(path) > 1 and keys[path[:-1]] == {"value"} and path[-1] == "value"]


def _is_rng(path: Path) -> bool:
    bare = path[:-1] if path[-1] == "value" else path
    return len(bare) >= 3 and bare[-3] == "rngs" and bare[-1] in ("count", "key")


def collection_of(path: Path, kind: Kind) -> str:
    """The collection that a leaf belongs to, in a tree of this layout.

    >>> collection_of(("batch_stats", "BatchNorm_0", "mean"), Kind.LINEN_TRAIN_STATE)
    'batch_stats'
    >>> collection_of(("params", "batch_stats", "BatchNorm_0", "mean"), Kind.LINEN_NESTED_TRAIN_STATE)
    'batch_stats'
    """
    if not path:
        return "-"
    if kind is Kind.PARAMS_ONLY:
        return "params"
    if kind is Kind.LINEN_NESTED_TRAIN_STATE and path[0] == "params" and len(path) > 1:
        return path[1]
    if kind in (Kind.NNX_STATE, Kind.NNX_TRAINING):
        return _nnx_collection(path, kind)
    return path[0]


def _nnx_collection(path: Path, kind: Kind) -> str:
    if _is_rng(path):
        return "rngs"
    if "opt_state" in path:
        return "opt_state"
    if kind is Kind.NNX_TRAINING and path[0] in ("optimizer", "1"):
        return "optimizer"
    return "model"


def collection_names(tree: Mapping[str, Any], params: Any) -> list[str]:
    """Which top-level keys of a TrainState's tree, beside step, params and opt_state, are Linen collections.

    A name of Linen's own is one. Any other name is one when its leaves sit in modules that hold params, and
    are not params themselves: `ema_params` has the params' own paths and is no collection, `dropout_rng` is in
    no module.
    """
    weights = _bare_paths(params)
    modules = set()
    for path in weights:
        modules.update(path[:depth] for depth in range(1, len(path)))
    names = []
    for name, value in tree.items():
        if name in ("step", "params", "opt_state") or not isinstance(value, Mapping):
            continue
        if name in LINEN_COLLECTIONS or (value and _lives_beside(_bare_paths(value), weights, modules)):
            names.append(str(name))
    return names


def _lives_beside(paths: set[Path], weights: set[Path], modules: set[Path]) -> bool:
    """Whether leaves at these paths are in the modules of the weights, and are not the weights again."""
    return not paths <= weights and all(path[:-1] in modules for path in paths)


def _bare_paths(tree: Any) -> set[Path]:
    """The paths of the leaves, without the `value` of boxes."""
    return {_bare(path) for path in flatten(tree)}


def _bare(path: Path) -> Path:
    return path[:-1] if len(path) > 1 and path[-1] == "value" else path


def unbox(tree: Any, boxed: Iterable[Path], prefix: Path = ()) -> Any:
    """`tree`, which sits at `prefix` of the whole, without the `value` level at the paths in `boxed`.

    >>> unbox({"Dense_0": {"kernel": {"value": 1}, "bias": 2}}, [("Dense_0", "kernel")])
    {'Dense_0': {'kernel': 1, 'bias': 2}}
    """
    wanted = frozenset(boxed)

    def is_box(path: Path, node: Any) -> bool:
        return path in wanted and isinstance(node, Mapping) and set(node) == {"value"}

    def enter(path: Path, node: Any) -> Sequence[tuple[str, Any]] | None:
        return children(node) if isinstance(node, Mapping | list | tuple) and not is_box(path, node) else None

    def leave(path: Path, node: Any, parts: Parts | None) -> Any:
        if parts is not None:
            return rebuild(node, parts)
        return node["value"] if is_box(path, node) else node

    return fold(tree, enter, leave, prefix)
