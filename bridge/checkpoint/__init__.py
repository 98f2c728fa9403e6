"""Training checkpoints between Linen and NNX: in memory, on disk, into sharded models.

Rooms, from the ground: `tree`, a checkpoint without bytes; `formats`, what is on disk, one file a format; `rules` and
`derivation`, what goes where; `stream`, leaves read and written a batch at a time; `blocks`, one leaf in parts; `job`,
several processes; `options`, what may be asked of a conversion; `plan`, a conversion before it runs; `beside`, what
travels beside the leaves. Above them what users call: `conversion`, `steps` and `verification` from disk to disk,
`comparison`, `in_memory`, `loading` into a model, `save` out of one.

Law: nothing is written before all is known to fit; what is dropped, changed or guessed is said.
Knows models by their variables alone; one optional dependency a file.
"""

from bridge._compat_paths import moved_in
from bridge.checkpoint.comparison import Difference, DiffReport, diff
from bridge.checkpoint.conversion import (
    Conversion,
    ConvertReport,
    LossyConversionError,
    convert,
    open_conversion,
)
from bridge.checkpoint.derivation.derive import (
    DerivationError,
    UnknownPathError,
    UnprovenDerivationError,
    UnsureDerivationWarning,
    derive,
    prove,
)
from bridge.checkpoint.derivation.derived import Derived, Proof
from bridge.checkpoint.derivation.forward import ForwardMismatchError, ForwardReport, RandomCallError, compare_forward
from bridge.checkpoint.derivation.to_rules import UnsayableRuleError
from bridge.checkpoint.formats.open import open_sink, open_source
from bridge.checkpoint.formats.orbax.read import (
    CheckpointInfo,
    read_metadata,
    read_train_state,
    read_tree,
)
from bridge.checkpoint.formats.protocol import Sink, Source
from bridge.checkpoint.in_memory import (
    nnx_to_train_state,
    state_to_variables,
    train_state_to_nnx,
    train_state_to_states,
    variables_to_state,
)
from bridge.checkpoint.job import Job, JobError
from bridge.checkpoint.loading import ShardingError, load_into
from bridge.checkpoint.options import ConversionOptions, OptionError, UnprovenRulesError
from bridge.checkpoint.plan.commute import probe
from bridge.checkpoint.plan.places import CollectionClashError, UnknownCollectionsError
from bridge.checkpoint.plan.plan import ConversionReport, Plan, make_plan
from bridge.checkpoint.plan.slots import SlotError
from bridge.checkpoint.rules.apply import Rule, RuleResult, Rules, RulesError, apply_rules, read_rules
from bridge.checkpoint.save import save_as_linen
from bridge.checkpoint.steps import StepsReport, convert_steps
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.opt_state import (
    param_shapes,
    rename_params,
    restore_into_structure,
    to_linen_layout,
    to_nnx_layout,
)
from bridge.checkpoint.tree.train_state import LinenTrainState
from bridge.checkpoint.tree.tree import Tree
from bridge.checkpoint.verification import VerificationError, VerifyReport, verify

__all__ = [
    # from disk to disk
    "Conversion", "ConversionOptions", "ConvertReport", "DiffReport", "Difference", "Job", "JobError",
    "LossyConversionError", "OptionError", "StepsReport", "VerificationError", "VerifyReport", "convert",
    "convert_steps", "diff", "open_conversion", "verify",
    # into a model, out of one
    "ShardingError", "load_into", "save_as_linen",
    # in memory
    "nnx_to_train_state", "state_to_variables", "train_state_to_nnx", "train_state_to_states", "variables_to_state",
    # what goes where
    "CollectionClashError", "ConversionReport", "Plan", "Rule", "RuleResult", "Rules", "RulesError", "SlotError",
    "UnknownCollectionsError", "apply_rules", "make_plan", "probe", "read_rules",
    # rules from the models themselves
    "DerivationError", "Derived", "ForwardMismatchError", "ForwardReport", "RandomCallError", "UnknownPathError",
    "Proof", "UnprovenDerivationError", "UnprovenRulesError", "UnsayableRuleError", "UnsureDerivationWarning",
    "compare_forward", "derive", "prove",
    # what is on disk
    "CheckpointInfo", "Kind", "Layout", "Leaf", "LinenTrainState", "Sink", "Source", "Tree", "open_sink",
    "open_source", "read_metadata", "read_train_state", "read_tree",
    # optimizer states
    "param_shapes", "rename_params", "restore_into_structure", "to_linen_layout", "to_nnx_layout",
]  # fmt: skip

__getattr__ = moved_in("bridge.checkpoint")
