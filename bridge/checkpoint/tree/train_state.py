"""A Linen training state as plain trees: step, params, the other collections, optimizer state, and the rest.

Law: every leaf of the tree is in exactly one field; none is copied.
Knows trees and layouts; knows nothing of files, of flax's own TrainState class or of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge._errors import CheckpointLayoutError
from bridge._types import Path
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Kind, Layout

_LINEN = (Kind.LINEN_TRAIN_STATE, Kind.LINEN_NESTED_TRAIN_STATE, Kind.LINEN_VARIABLES, Kind.PARAMS_ONLY)


@dataclass(frozen=True)
class LinenTrainState:
    """A Linen training state as plain trees of arrays.

    Attributes:
        params: the params, nested dicts by module name.
        step: a number or a scalar array as it was saved; None if the checkpoint has none.
        collections: `batch_stats` and the other variable collections, by name.
        opt_state: raw: lists of dicts, None for EmptyState and for masked params; None if the checkpoint has
            none. `opt_state.restore_into_structure` gives it its optax types back.
        extras: every other field of the TrainState, by name (`ema_params`, `dropout_rng`, ...).
        layout: which layout it was read from. If variables were nested in `params`, the params' paths in
            `opt_state` still begin with their collection: ('params', 'Dense_0', 'kernel').
        boxed: paths in the tree as stored, ('params', 'Dense_0', 'kernel'), where the array is in a box
            `{'value': array}`. `layout.unbox` takes it out.
    """

    params: Mapping[str, Any]
    step: Any = None
    collections: Mapping[str, Any] = field(default_factory=dict)
    opt_state: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    layout: Kind = Kind.LINEN_TRAIN_STATE
    boxed: frozenset[Path] = frozenset()

    @property
    def variables(self) -> dict[str, Any]:
        """What `Module.apply` takes: params and the other collections in one dict."""
        return {"params": self.params, **self.collections}


def require_linen(found: Layout, source: object) -> None:
    """Raise CheckpointLayoutError unless a tree of this layout can hold Linen params."""
    if found.kind not in _LINEN:
        raise CheckpointLayoutError(
            "not a Linen checkpoint with params",
            source,
            expected="params, with step and opt_state beside them or alone",
            found=f"{found.kind.value}: {found.reason}",
            hint=f"Look at it with: linen-nnx inspect {source}",
        )


def take_apart(tree: Mapping[str, Any], found: Layout, source: object) -> LinenTrainState:
    """The parts of a whole tree that was read from `source` and has the layout `found`.

    Raises CheckpointLayoutError if it holds no params.
    """
    require_linen(found, source)
    if found.kind is Kind.PARAMS_ONLY:
        return LinenTrainState(params=tree, layout=found.kind, boxed=found.boxed)
    params, collections = tree.get("params"), {}
    if found.kind is Kind.LINEN_NESTED_TRAIN_STATE:
        collections = dict(tree["params"])
        params = collections.pop("params")
    if not isinstance(params, Mapping) or not params:
        raise CheckpointLayoutError(
            "the checkpoint has no params",
            source,
            expected="params/<module>/<name>",
            found=f"params: {type(params).__name__} without entries; top-level keys {', '.join(tree)}",
        )
    extras = {name: value for name, value in tree.items() if name not in ("params", "step", "opt_state")}
    for name in layout.collection_names(tree, params):
        collections[name] = extras.pop(name)
    return LinenTrainState(
        params=params,
        step=tree.get("step"),
        collections=collections,
        opt_state=tree.get("opt_state"),
        extras=extras,
        layout=found.kind,
        boxed=found.boxed,
    )
