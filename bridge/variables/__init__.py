"""Variables of Linen and Variables of NNX, in both directions: names, values, axis metadata, layouts.

Law: there and back is the identity, and nothing that was passed in is changed.
Knows values by location, and object graphs that hold them; knows no wrappers.
The names of flax.nnx's `bridge.variables` are listed here.
"""

from bridge.variables.flax_names import (
    get_col_name,
    is_vanilla_variable,
    sort_variable_types,
    to_linen_var,
    to_nnx_var,
    with_partitioning,
)
from bridge.variables.mapping import linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars
from bridge.variables.metadata import NNXMeta

__all__ = [
    "NNXMeta",
    "get_col_name",
    "is_vanilla_variable",
    "linen_vars_to_nnx_attrs",
    "nnx_attrs_to_linen_vars",
    "sort_variable_types",
    "to_linen_var",
    "to_nnx_var",
    "with_partitioning",
]
