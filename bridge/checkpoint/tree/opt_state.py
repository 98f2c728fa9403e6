"""Optimizer states cross between naming schemes by one rule, which knows neither the optimizer nor `tx`.

The rule. Let P be the key paths of the params. A dict in the optimizer state is *params-like* if every leaf
below it, masked ones included, has a path (from that dict) that starts with a member of P. Take the largest
such nodes. Each leaf in them is `prefix + param_path + tail`: the param path is renamed as the weights are,
prefix and tail stay (SM3 keeps one entry for each axis below a param: a tail). Everything else (count,
hyperparams, random keys) is copied. Paths decide, not shapes: Adafactor's rows and NovoGrad's scalars are
params-like too. Shapes only refute: where a param at the root has the name of a counter.

Law: mapping by a one-to-one renaming and back by its inverse is the identity, to the bit, for every optax
transformation.
Knows nested containers and key paths; knows nothing of files, of optax or of modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge._errors import CheckpointLayoutError, OptStateOrderError, RenameClashError
from bridge._types import Path, Shape
from bridge.checkpoint.tree import layout


@dataclass(frozen=True)
class Place:
    """Where a leaf of an optimizer state belongs. `param` is None for a leaf that belongs to no param."""

    prefix: Path
    param: Path | None = None
    tail: Path = ()

    @property
    def path(self) -> Path:
        """The whole path: prefix, param and tail joined."""
        return self.prefix + (self.param or ()) + self.tail


def param_shapes(params: Any) -> dict[Path, Shape]:
    """`{key path: shape}` of a tree of params: arrays, abstract arrays or `layout.Leaf`s.

    A box counts as its content. Boxes that came from disk are plain dicts `{'value': array}`; take them off
    first (`layout.unbox`).

    >>> import numpy as np
    >>> param_shapes({"Dense_0": {"kernel": np.zeros((3, 4))}})
    {('Dense_0', 'kernel'): (3, 4)}
    """
    shapes: dict[Path, Shape] = {}
    for path, node in layout.walk(params, _plain_children):
        leaves = list(layout.flatten_full(node).values())  # a box has one, an array is one itself
        if leaves:
            shapes[path], _ = layout.describe(leaves[0])
    return shapes


def _plain_children(path: Path, node: Any) -> list[tuple[str, Any]] | None:
    return layout.children(node) if isinstance(node, Mapping | list | tuple) else None


def to_raw(opt_state: Any) -> Any:
    """A live optax state as Orbax gives it back: dicts for namedtuples, lists for tuples, None if empty.

    Leaves are not copied. A raw tree comes back equal.

    >>> import optax, numpy as np
    >>> sorted(to_raw(optax.chain(optax.trace(0.9), optax.identity()).init({"w": np.zeros(2)}))[0])
    ['trace']
    """
    return layout.fold(opt_state, layout.every_child, _raw)


def _raw(path: Path, node: Any, parts: layout.Parts | None) -> Any:
    if parts is None:
        return None if layout.is_empty(node) else node
    if isinstance(node, list) or (isinstance(node, tuple) and not hasattr(node, "_fields")):
        return [child for _, child in parts]
    return dict(parts)


# --- the rule -----------------------------------------------------------------------------------------------


def find_param_nodes(opt_state: Any, params: Mapping[Path, Shape]) -> list[Path]:
    """Paths of the largest params-like nodes, in the tree's order.

    Args:
        opt_state: any nested containers: a live optax state, or a raw tree from a checkpoint.
        params: path -> shape of every param that the optimizer was initialised with (`param_shapes`).

    >>> raw = [{"count": 0, "mu": {"w": 0.0}, "nu": {"w": 0.0}}, None]
    >>> find_param_nodes(raw, {("w",): ()})
    [('0', 'mu'), ('0', 'nu')]
    """
    _require_named(params)
    return [path for path, _ in _param_nodes(opt_state, params)]


def places(opt_state: Any, params: Mapping[Path, Shape]) -> dict[Path, Place]:
    """For the path of every leaf and empty container of `opt_state`, where it belongs.

    >>> places({"count": 0, "mu": {"w": 0.0}}, {("w",): ()})[("mu", "w")]
    Place(prefix=('mu',), param=('w',), tail=())
    """
    nodes = set(find_param_nodes(opt_state, params))
    return {path: _place(path, nodes, params) for path in layout.flatten(opt_state)}


def _place(path: Path, nodes: set[Path], params: Mapping[Path, Shape]) -> Place:
    for depth in range(len(path) + 1):
        prefix, rest = path[:depth], path[depth:]
        if prefix in nodes:
            length = _start_length(rest, params)
            return Place(prefix, rest[:length], rest[length:])
    return Place(path)


def _start_length(path: Path, params: Mapping[Path, Shape]) -> int:
    """How many keys of `path` make a param's path, 0 if none: no param's path starts another's."""
    for length in range(1, len(path) + 1):
        if path[:length] in params:
            return length
    return 0


def _param_nodes(opt_state: Any, params: Mapping[Path, Shape]) -> list[tuple[Path, frozenset[Path]]]:
    """Paths of the params-like nodes in `opt_state`, each with the params it covers."""
    first_keys = frozenset(path[0] for path in params)
    covered: dict[Path, frozenset[Path]] = {}  # path of a node that may be params-like -> what it covers

    def enter(path: Path, node: Any) -> list[tuple[str, Any]] | None:
        below = layout.children(node)
        if isinstance(node, Mapping) and any(key in first_keys for key, _ in below or ()):
            covered[path] = _covered(node, params)
        return None if covered.get(path) and not _all_have_tails(node, params) else below

    def leave(path: Path, node: Any, parts: layout.Parts | None) -> list[tuple[Path, frozenset[Path]]]:
        own = covered.get(path, frozenset())
        inside = [pair for _, part in parts or () for pair in part]
        # A slot or a label can have the name of a param at the root: {'trace': {'trace': x, 'w': y}}. Then every leaf
        # seems to hang below that param, and the true node, which covers as many params or more, is further down.
        if own and all(len(inner) < len(own) for _, inner in inside):
            return [(path, own)]
        return inside

    return layout.fold(opt_state, enter, leave)


def _covered(node: Any, params: Mapping[Path, Shape]) -> frozenset[Path]:
    """The params that have a leaf in `node`; none if `node` is not params-like."""
    covered: set[Path] = set()
    same_shape, counters, others = False, 0, 0
    for path, leaf in layout.flatten(node).items():
        length = _start_length(path, params)
        if not length and layout.is_empty(leaf):
            continue  # an empty submodule: params have it too, without a param
        if not length:
            return frozenset()
        covered.add(path[:length])
        if layout.is_empty(leaf):
            continue
        shape, dtype = layout.describe(leaf)
        same_shape = same_shape or shape == params[path[:length]]
        if shape == () and "int" in dtype:
            counters += 1
        else:
            others += 1
    # A param at the root that is called `count` makes {count: 7} of a schedule look like params. It is not if
    # it covers some params only, or counts, and nothing in it has the shape of a param.
    counts = counters > 0 and not others
    if not same_shape and (len(covered) < len(params) or counts):
        return frozenset()
    return frozenset(covered)


def _all_have_tails(node: Any, params: Mapping[Path, Shape]) -> bool:
    return params.keys().isdisjoint(layout.flatten_full(node))


def _require_named(params: Mapping[Path, Shape]) -> None:
    if () in params:
        raise CheckpointLayoutError(
            "optimizer states are mapped by the names of params",
            "(params)",
            expected="a dict of params",
            found="a single array without a name",
        )


# --- mapping ------------------------------------------------------------------------------------------------


def rename_params(opt_state: Any, params: Mapping[Path, Shape], rename: Callable[[Path], Path]) -> Any:
    """`opt_state` with every param path replaced by `rename(param_path)`; prefix, tail and all else stay.

    Args:
        opt_state: a live optax state or a raw tree. Containers outside the params-like nodes keep their type,
            inside they are dicts, as Linen's params are. Leaves are not copied.
        params: path -> shape, under its *old* name, of every param that the optimizer was initialised with.
        rename: old param path -> new param path, one to one.

    Raises:
        RenameClashError: two params are given one name, or one name is the start of another.
        OptStateOrderError: the state holds flat vectors over all params and their order would change.
    """
    renamed = {path: tuple(rename(path)) for path in params}
    _require_one_to_one(renamed)
    _require_order(opt_state, params, renamed)
    nodes = set(find_param_nodes(opt_state, params))

    def enter(path: Path, node: Any) -> list[tuple[str, Any]] | None:
        return None if path in nodes else layout.children(node)

    def leave(path: Path, node: Any, parts: layout.Parts | None) -> Any:
        if parts is not None:
            return layout.rebuild(node, parts)
        return _rename_node(node, params, renamed) if path in nodes else node

    return layout.fold(opt_state, enter, leave)


def _rename_node(node: Any, params: Mapping[Path, Shape], renamed: Mapping[Path, Path]) -> Any:
    """One params-like node under new names. What hangs below a param (a tail) keeps its own containers."""
    moved: dict[Path, Any] = {}
    for path, below in layout.walk(node, lambda path, x: None if path in params else layout.children(x)):
        if path in params:
            moved[renamed[path]] = below
        elif layout.is_empty(below):
            moved[path] = below
    nested = layout.nest(moved)
    kind: Any = type(node)
    return nested if kind is dict else kind(nested)


def _require_one_to_one(renamed: Mapping[Path, Path]) -> None:
    taken: dict[Path, Path] = {}
    for old, new in renamed.items():
        if taken.setdefault(new, old) != old:
            raise RenameClashError(taken[new], new, old, new)
    for old, new in renamed.items():
        for length in range(len(new)):
            if new[:length] in taken:
                raise RenameClashError(taken[new[:length]], new[:length], old, new)


def order_dependent(opt_state: Any, params: Mapping[Path, Shape]) -> list[Path]:
    """Paths of 1-D leaves over *all* params in key order, as `optax.flatten` keeps them."""
    total = sum(map(math.prod, params.values()))
    if total <= 1:
        return []
    belongs, vectors = places(opt_state, params), []
    for path, leaf in layout.flatten_full(opt_state).items():
        shape, _ = layout.describe(leaf)
        if belongs[path].param is None and shape == (total,):
            vectors.append(path)
    return vectors


def _require_order(opt_state: Any, params: Mapping[Path, Shape], renamed: Mapping[Path, Path]) -> None:
    new_order = sorted(params, key=lambda path: renamed[path])
    if new_order != sorted(params):
        vectors = order_dependent(opt_state, params)
        if vectors:
            raise OptStateOrderError(vectors)


# --- Linen's and NNX's top level ----------------------------------------------------------------------------


def to_nnx_layout(opt_state: Any, params: Mapping[Path, Shape]) -> dict[Any, Any]:
    """A raw Linen tree as NNX keeps it: int keys for list indices, no EmptyState, None for a masked param.

    The two Nones look alike on disk and differ in meaning: below a param's path it is a masked param and
    stays, anywhere else it is a state without content and goes.

    >>> to_nnx_layout([{"count": 0, "mu": {"w": 0.5, "b": None}}, None], {("w",): (), ("b",): ()})
    {0: {'count': 0, 'mu': {'w': 0.5, 'b': None}}}
    """
    raw = to_raw(opt_state)
    belongs = places(raw, params)

    def enter(path: Path, node: Any) -> list[tuple[Any, Any]] | None:
        if not isinstance(node, list | dict):
            return None
        pairs = enumerate(node) if isinstance(node, list) else node.items()
        return [(k, x) for k, x in pairs if x is not None or belongs[(*path, str(k))].param is not None]

    def leave(path: Path, node: Any, parts: layout.Parts | None) -> Any:
        return node if parts is None else dict(parts)

    return layout.fold(raw, enter, leave) or {}


def to_linen_layout(opt_state: Any, template: Any = None) -> Any:
    """The inverse: lists for int keys, None where NNX has no entry for an EmptyState.

    Args:
        opt_state: a tree with int keys (or their text, as Orbax stores them).
        template: an optimizer state of the wanted structure (`jax.eval_shape(tx.init, params)` will do).
            Without it the gaps between int keys are filled, but EmptyStates at the *end* of a chain are not
            known and not added.

    >>> to_linen_layout({1: {"mu": {"w": 0.5}}})
    [None, {'mu': {'w': 0.5}}]
    """
    if template is not None:
        return _like(to_raw(template), opt_state)
    return layout.fold(opt_state, _keyed_children, _with_lists)


def _keyed_children(path: Path, node: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list) else None


def _with_lists(path: Path, node: Any, parts: layout.Parts | None) -> Any:
    """A list for a dict whose keys are indices, with None for those it has not."""
    if parts is None:
        return node
    if isinstance(node, list):
        return [child for _, child in parts]
    if not parts or not all(str(key).isdecimal() for key, _ in parts):
        return dict(parts)
    by_index = {int(key): child for key, child in parts}
    return [by_index.get(index) for index in range(max(by_index) + 1)]


def _like(template: Any, node: Any) -> Any:
    """`node` with the lists and Nones of the raw `template`; keys that it lacks stay, to be reported."""
    if not isinstance(template, dict | list) or not isinstance(node, Mapping | list):
        return node if layout.children(node) is None else to_linen_layout(node)
    below = dict(layout.children(node) or ())
    wanted = dict(layout.children(template) or ())
    merged = {}
    for key, child in wanted.items():
        if key in below:
            merged[key] = _like(child, below[key])
        elif _holds_nothing(child):
            merged[key] = child
    extra = below.keys() - wanted.keys()
    if isinstance(template, list) and len(merged) == len(wanted) and not extra:
        return list(merged.values())
    for key, child in below.items():
        if key in extra:
            merged[key] = to_linen_layout(child)
    return merged


def _holds_nothing(tree: Any) -> bool:
    return all(layout.is_empty(leaf) for leaf in layout.flatten(tree).values())


def restore_into_structure(template: Any, raw: Any, *, source: str = "checkpoint") -> Any:
    """`raw`'s leaves in `template`'s containers: what `tx.update` takes, from what Orbax gives.

    Args:
        template: the state that `tx.init(params)` gives, or `jax.eval_shape(tx.init, params)`.
        raw: dicts, lists, None and arrays; int keys or lists, with or without entries for empty states.

    Returns:
        The template's namedtuples with `raw`'s leaves, as `jax.Array`s where the template has (abstract)
        arrays.

    Raises:
        VariablesMismatchError: lists every missing, unexpected, wrong-shape and wrong-dtype path. A param
            that is masked on one side only is one of them.

    >>> import optax, jax.numpy as jnp
    >>> tx = optax.adam(1e-3)
    >>> state = tx.init({"w": jnp.ones(3)})
    >>> type(restore_into_structure(state, to_raw(state))[0]).__name__
    'ScaleByAdamState'
    """
    layout.require_match(template, raw, source=source, target="the optimizer state")
    return fill(template, raw)


def fill(template: Any, raw: Any) -> Any:
    """`template` with the leaves of `raw` at the same paths; both must have passed `layout.require_match`."""
    values = layout.flatten(raw)
    return layout.map_leaves(lambda path, leaf: _as_leaf(leaf, values[path]), template)


def _as_leaf(template: Any, value: Any) -> Any:
    """`value` as a jax.Array if the template is one (or abstract); numbers take the template's dtype."""
    import jax

    if isinstance(template, bool | int | float | complex):
        return value.item() if hasattr(value, "item") else value
    if isinstance(template, jax.Array | jax.ShapeDtypeStruct) and not isinstance(value, jax.Array):
        array = jax.numpy.asarray(value, dtype=template.dtype)
        placed = template.sharding is not None and getattr(template, "committed", True)
        return jax.device_put(array, template.sharding) if placed else array
    return value
