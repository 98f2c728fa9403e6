"""Training checkpoints between Linen and NNX.

Files: `layout` (trees and key paths), `opt_state` (the structure-driven rule), `train_state` (a tree in its
parts), `orbax` (files on disk), `restore` (into models and optimizers). One optional dependency a file.
"""

from bridge.checkpoint.layout import Kind, Layout, Leaf
from bridge.checkpoint.opt_state import (
    param_shapes,
    rename_params,
    restore_into_structure,
    to_linen_layout,
    to_nnx_layout,
)
from bridge.checkpoint.orbax import (
    CheckpointInfo,
    read_metadata,
    read_train_state,
    read_tree,
)
from bridge.checkpoint.restore import RestoreReport, load_train_state
from bridge.checkpoint.train_state import LinenTrainState

__all__ = [
    "CheckpointInfo",
    "Kind",
    "Layout",
    "Leaf",
    "LinenTrainState",
    "RestoreReport",
    "load_train_state",
    "param_shapes",
    "read_metadata",
    "read_train_state",
    "read_tree",
    "rename_params",
    "restore_into_structure",
    "to_linen_layout",
    "to_nnx_layout",
]
