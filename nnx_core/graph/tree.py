"""to_tree and from_tree: a pytree with graphs in it as a pytree of structures and States, and back.

Law: `from_tree(to_tree(x))` is isomorphic to x, objects shared between its branches included.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import jax

from nnx_core._errors import Path
from nnx_core.graph.classify import plain_key
from nnx_core.graph.context import MergeContext, SplitContext, merge_context, split_context
from nnx_core.graph.objects import Object
from nnx_core.graph.structure import GraphDef
from nnx_core.variables import MISSING, Variable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NodeStates:
    """One graph in a tree: its structure, and its leaves as one State or more."""

    _graphdef: GraphDef | None
    states: tuple[Any, ...]
    metadata: Any = None

    @classmethod
    def from_split(cls, graphdef: GraphDef | None, state: Any, /, *states: Any, metadata: Any = None) -> "NodeStates":
        """From what `split` returned."""
        return cls(graphdef, (state, *states), metadata)

    @classmethod
    def from_states(cls, state: Any, *states: Any) -> "NodeStates":
        """Without a structure."""
        return cls(None, (state, *states))

    @classmethod
    def from_prefixes(cls, prefixes: Any, /, *, metadata: Any = None) -> "NodeStates":
        """One treatment for each State."""
        return cls(None, tuple(prefixes), metadata)

    @property
    def graphdef(self) -> GraphDef:
        """The structure."""
        if self._graphdef is None:
            raise ValueError("This NodeStates has no GraphDef; it was made from States or prefixes only.")
        return self._graphdef

    @property
    def state(self) -> Any:
        """The one State."""
        if len(self.states) != 1:
            raise ValueError(f"This NodeStates has {len(self.states)} States, expected one; read `.states`.")
        return self.states[0]

    def replace(self, **updates: Any) -> "NodeStates":
        """A copy with other fields."""
        return replace(self, **updates)


def is_graph_node(x: Any) -> bool:
    """Whether `x` is an object or a Variable: something with identity."""
    return isinstance(x, Object | Variable)


def _is_node_states(x: Any) -> bool:
    return isinstance(x, NodeStates)


def _split(ctx: SplitContext, path: Path, prefix: Any, node: Any) -> Any:
    return NodeStates.from_split(*ctx.split(node))


def _merge(ctx: MergeContext, path: Path, prefix: Any, states: Any) -> Any:
    if not isinstance(states, NodeStates):
        raise TypeError(f"from_tree expected NodeStates at {path}, found {type(states).__name__}.")
    return ctx.merge(states.graphdef, *states.states)


def to_tree(
    tree: Any,
    /,
    *,
    prefix: Any = MISSING,
    split_fn: Callable[[SplitContext, Path, Any, Any], Any] = _split,
    map_non_graph_nodes: bool = False,
    ctxtag: Hashable | None = None,
    check_aliasing: bool = True,
) -> Any:
    """`tree` with `split_fn(ctx, path, prefix, node)` for each object and Variable; by default a `NodeStates`.

    Args:
      tree: a pytree with modules and Variables in it.
      prefix: a tree prefix of `tree` with the treatment of each branch.
      split_fn: splits one of them.
      map_non_graph_nodes: call `split_fn` for all other leaves too.
      ctxtag: step (1) or (3) of that update context.
      check_aliasing: raise if something is reached under two treatments.

    Raises:
      AliasError: naming both paths, if something is reached under two treatments.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> a, b = from_tree(to_tree((model, [model])))
      >>> a is b[0]
      True
    """
    with split_context(ctxtag) as ctx:
        ctx.strict = check_aliasing

        def convert(path: Path, treatment: Any, x: Any) -> Any:
            ctx.treatment, ctx.path = treatment, path
            return split_fn(ctx, path, treatment, x) if map_non_graph_nodes or is_graph_node(x) else x

        return _mapped(convert, tree, prefix, is_graph_node)


def from_tree(
    tree: Any,
    /,
    *,
    prefix: Any = MISSING,
    merge_fn: Callable[[MergeContext, Path, Any, Any], Any] = _merge,
    is_node_leaf: Callable[[Any], bool] = _is_node_states,
    is_leaf: Callable[[Any], bool] = _is_node_states,
    map_non_graph_nodes: bool = False,
    is_inner: bool | None = None,
    ctxtag: Hashable | None = None,
) -> Any:
    """The inverse of `to_tree`.

    Args:
      tree: what `to_tree` returned.
      prefix: a tree prefix of `tree`, given to `merge_fn`.
      merge_fn: (ctx, path, prefix, leaf) -> node.
      is_node_leaf: which leaves are graphs.
      is_leaf: where the tree ends.
      map_non_graph_nodes: call `merge_fn` for all other leaves too.
      is_inner: True in step (2), False in step (4) of an update context.
      ctxtag: that update context.
    """
    with merge_context(ctxtag, is_inner) as ctx:

        def convert(path: Path, treatment: Any, x: Any) -> Any:
            return merge_fn(ctx, path, treatment, x) if map_non_graph_nodes or is_node_leaf(x) else x

        return _mapped(convert, tree, prefix, is_leaf)


def _mapped(f: Callable[[Path, Any, Any], Any], tree: Any, prefix: Any, is_leaf: Callable[[Any], bool]) -> Any:
    treedef: Any  # jax's stubs leave out most of it
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    if prefix is MISSING or prefix is None:
        treatments = [prefix] * len(pairs)
    else:
        places = treedef.unflatten(range(len(pairs)))
        spread = jax.tree.broadcast(prefix, places, is_leaf=lambda x: x is None)
        treatments = treedef.flatten_up_to(spread)
    leaves = [
        f(tuple(plain_key(entry) for entry in path), treatment, x)
        for (path, x), treatment in zip(pairs, treatments, strict=True)
    ]
    return treedef.unflatten(leaves)
