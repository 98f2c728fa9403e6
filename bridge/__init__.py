"""bridge: Linen modules and NNX modules inside each other, and the variables of one in the other.

The public list, nothing else: the names of flax.nnx.bridge, and what migration needs beyond them.
"""

from bridge.context import current_linen_module, is_linen_initializing
from bridge.load import LoadReport, load_variables, variables_of
from bridge.mapping import linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars
from bridge.metadata import NNXMeta, to_linen_value, to_nnx_variable
from bridge.to_linen import ToLinen, to_linen, to_linen_class
from bridge.to_nnx import ToNNX, lazy_init

__all__ = [
    # wrappers
    "ToLinen", "ToNNX", "lazy_init", "to_linen", "to_linen_class",
    # where a call happens
    "current_linen_module", "is_linen_initializing",
    # variables of one in the other
    "LoadReport", "linen_vars_to_nnx_attrs", "load_variables", "nnx_attrs_to_linen_vars", "variables_of",
    # metadata
    "NNXMeta", "to_linen_value", "to_nnx_variable",
]  # fmt: skip
