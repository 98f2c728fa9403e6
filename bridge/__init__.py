"""bridge: Linen modules and NNX modules inside each other, and the variables of one in the other.

The public list, nothing else: the names of flax.nnx.bridge, and what migration needs beyond them.
"""

from bridge import interop, variables
from bridge._compat_paths import __getattr__ as __getattr__
from bridge._compat_paths import initializers, module, wrappers
from bridge.functional import Functional, functional
from bridge.interop import linen_in_bridge_mdl, nnx_in_bridge_mdl
from bridge.linen_in_nnx.wrapper import ToNNX, lazy_init
from bridge.modules.module import AttrPriority, Module, Scope, compact, current_context, current_module
from bridge.nnx_in_linen.host import current_linen_module, is_linen_initializing
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class
from bridge.variables import to_linen_var, to_nnx_var, with_partitioning
from bridge.variables.load import LoadReport, load_variables, variables_of
from bridge.variables.mapping import linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars
from bridge.variables.metadata import NNXMeta, to_linen_value, to_nnx_variable
from bridge.variables.sidecar import join_metadata, split_metadata

__all__ = [
    # wrappers
    "ToLinen", "ToNNX", "lazy_init", "to_linen", "to_linen_class",
    # modules written as in Linen
    "AttrPriority", "Module", "Scope", "compact", "current_context", "current_module", "linen_in_bridge_mdl",
    "nnx_in_bridge_mdl",
    # an NNX class as two functions
    "Functional", "functional",
    # where a call happens
    "current_linen_module", "is_linen_initializing",
    # variables of one in the other
    "LoadReport", "linen_vars_to_nnx_attrs", "load_variables", "nnx_attrs_to_linen_vars", "variables_of",
    # metadata
    "NNXMeta", "join_metadata", "split_metadata", "to_linen_value", "to_linen_var", "to_nnx_var", "to_nnx_variable",
    "with_partitioning",
    # flax.nnx.bridge's paths
    "initializers", "interop", "module", "variables", "wrappers",
]  # fmt: skip
