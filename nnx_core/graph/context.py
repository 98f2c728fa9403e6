"""Update contexts: split and merge on both sides of a JAX transform the user calls, keeping identity.

  (1) split outside    the objects the caller has get indices     } one UpdateContext,
  (2) merge inside     fresh objects under the same indices       } found by its tag
  (3) split inside     the structure says which object is which   }
  (4) merge outside    the caller's objects are filled, new ones made

Law: `ctx.merge` (4) of what `ctx.split` (3) returned does to the caller's objects what the function did to its
own. Every transform of nnx_core does this by itself; a context is for the JAX transforms we do not wrap.
"""

import contextlib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from nnx_core import filters as filterlib
from nnx_core._errors import Path
from nnx_core.graph._errors import ContextError
from nnx_core.graph.functional import flatten_with, unflatten
from nnx_core.graph.pack import Packer, Refs
from nnx_core.graph.structure import GraphDef
from nnx_core.state import FlatState, split_pairs

_active: ContextVar[tuple["UpdateContext", ...]] = ContextVar("update contexts", default=())


@dataclass(eq=False)
class UpdateContext:
    """What the four steps know of each other; made by `update_context`.

    Args:
      tag: its name.
      outer: the caller's objects, from (1) to (4).
      inner: the objects inside, from (2) to (3).
    """

    tag: Hashable
    outer: Refs | None = None
    inner: Refs | None = None


@contextlib.contextmanager
def update_context(tag: Hashable) -> Iterator[UpdateContext]:
    """Let `split_context(tag)` and `merge_context(tag)` work together; also a decorator.

    Example:
      >>> import nnx_core as nnx, jax
      >>> tree = nnx.Dict(left=nnx.Param(3.0))
      >>> @jax.jit
      ... def grow(*parts):
      ...     with merge_context("growth", inner=True) as context:
      ...         inside = context.merge(*parts)
      ...     inside.right = nnx.Param(2 * inside.left[...])
      ...     inside.root = inside  # a cycle
      ...     with split_context("growth") as context:
      ...         return context.split(inside)
      >>> with update_context("growth"):
      ...     with split_context("growth") as context:
      ...         parts = context.split(tree)
      ...     parts = grow(*parts)
      ...     with merge_context("growth", inner=False) as context:
      ...         grown = context.merge(*parts)
      >>> grown is tree, float(tree.right[...]), tree.root is tree
      (True, 6.0, True)
    """
    context = UpdateContext(tag)
    before = _active.get()
    _active.set((*before, context))
    try:
        yield context
    finally:
        _active.set(before)
        context.outer = context.inner = None


def current_update_context(tag: Hashable) -> UpdateContext:
    """The innermost UpdateContext with this tag.

    Raises:
      ContextError: if there is none.
    """
    for context in reversed(_active.get()):
        if context.tag == tag:
            return context
    raise ContextError(f"No update context found for tag {tag!r}. Open one: `with nnx.update_context({tag!r}):`.")


def _context_of(tag: Hashable | None) -> UpdateContext | None:
    return None if tag is None else current_update_context(tag)


class SplitContext:
    """Splits graphs that share objects; made by `split_context`.

    Args:
      ctxtag: tag of the update context, if there is one.
      ref_index: the objects met so far.
      is_inner: whether this is step (3); None without an update context.
    """

    def __init__(self, ctxtag: Hashable | None, ref_index: Refs, is_inner: bool | None):
        self.ctxtag, self.ref_index, self.is_inner = ctxtag, ref_index, is_inner
        self.inner = current_update_context(ctxtag).inner if is_inner else None
        # How what is split now is treated, and where it is; `to_tree` sets both.
        self.treatment: Any = None
        self.path: Path = ()
        self.strict = True
        self.open = True

    def split(self, node: Any, *filters: filterlib.Filter) -> tuple[Any, ...]:
        """As `nnx.split`; what an earlier split introduced is only referred to."""
        structure, leaves = self._flatten(node, with_paths=True)
        return structure, *split_pairs(leaves, filters)

    def flatten(self, node: Any, *filters: filterlib.Filter, with_paths: bool = True) -> tuple[Any, ...]:
        """As `nnx.flatten`; with filters, one FlatState each."""
        structure, leaves = self._flatten(node, with_paths)
        if not filters:
            return structure, leaves
        if not with_paths:
            raise ContextError("Filters need paths: pass with_paths=True, or no filters.")
        parts = leaves.split(*filters)
        if isinstance(parts, FlatState):  # of one filter
            return structure, parts
        return structure, *parts

    def _flatten(self, node: Any, with_paths: bool) -> tuple[GraphDef, Any]:
        _require_open(self)
        packer = Packer((self.treatment,), self.ref_index, strict=self.strict)
        return flatten_with(packer, node, with_paths, self.inner, self.path)


class MergeContext:
    """Merges graphs that share objects; made by `merge_context`.

    Args:
      ctxtag: tag of the update context, if there is one.
      index_ref: the objects made so far.
      is_inner: whether this is step (2); None without an update context.
    """

    def __init__(self, ctxtag: Hashable | None, index_ref: Refs, is_inner: bool | None):
        self.ctxtag, self.index_ref, self.is_inner = ctxtag, index_ref, is_inner
        self.outer = current_update_context(ctxtag).outer if is_inner is False else None
        self.open = True

    def merge(self, graphdef: GraphDef, state: Any, /, *states: Any) -> Any:
        """As `nnx.merge`, in the order of the splits; in step (4) it fills the caller's objects."""
        if states:
            state = type(state).merge(state, *states)
        return self.unflatten(graphdef, state)

    def unflatten(self, graphdef: GraphDef, flat_state: Any, /, *flat_states: Any) -> Any:
        """As `nnx.unflatten`, in the order of the splits; in step (4) it fills the caller's objects."""
        _require_open(self)
        if flat_states:
            flat_state = FlatState.merge(flat_state, *flat_states)
        return unflatten(
            graphdef, flat_state, index_ref=self.index_ref, outer_index_outer_ref=self.outer, copy_variables=True
        )


def _require_open(context: SplitContext | MergeContext) -> None:
    if not context.open:
        raise ContextError(f"This {type(context).__name__} was used after its `with` had ended. Open a new one.")


@contextlib.contextmanager
def split_context(ctxtag: Hashable | None = None) -> Iterator[SplitContext]:
    """Split several graphs that share objects; with a tag, step (1) or (3) of that update context.

    Raises:
      ContextError: if there is no update context with that tag.

    Example:
      >>> import nnx_core as nnx
      >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> with split_context() as ctx:
      ...     pairs = [ctx.split(layer), ctx.split([layer])]
      >>> with merge_context() as ctx:
      ...     a, [b] = [ctx.merge(*pair) for pair in pairs]
      >>> a is b
      True
    """
    update = _context_of(ctxtag)
    is_inner = None if update is None else update.inner is not None
    context = SplitContext(ctxtag, Refs(), is_inner)
    try:
        yield context
    finally:
        context.open = False
        if update is not None:
            if is_inner:
                update.inner = None
            else:
                update.outer = context.ref_index


@contextlib.contextmanager
def merge_context(ctxtag: Hashable | None = None, inner: bool | None = None) -> Iterator[MergeContext]:
    """Merge several graphs that share objects; with a tag, step (2) (`inner=True`) or (4) of that update context.

    Raises:
      ContextError: if there is no update context with that tag, or a tag comes without `inner`.
    """
    if ctxtag is not None and inner is None:
        raise ContextError("merge_context needs inner=True (inside the transform) or inner=False with a tag.")
    update = _context_of(ctxtag)
    context = MergeContext(ctxtag, Refs(), None if update is None else inner)
    try:
        yield context
    finally:
        context.open = False
        if update is not None:
            if inner:
                update.inner = context.index_ref
            else:
                update.outer = None
