"""nnx_core: neural networks as Python objects on JAX. `import nnx_core as nnx`.

The public list, nothing else: names, signatures and documented behaviour are those of flax.nnx.
"""

from nnx_core import filters as filterlib
from nnx_core import graph
from nnx_core import rngs as rnglib
from nnx_core import state as statelib
from nnx_core import variables as variablelib
from nnx_core._errors import NnxError
from nnx_core.filters import (
    All,
    Any,
    Everything,
    ExactType,
    Not,
    Nothing,
    OfType,
    PathContains,
    PathIn,
    PathRegex,
    WithTag,
)
from nnx_core.graph.api import clone, graphdef, merge, pop, set_metadata, split, state, update, variables
from nnx_core.graph.objects import Data, Object, Static, data, dataclass, has_data, is_data, register_data_type, static
from nnx_core.graph.objects import Object as Pytree
from nnx_core.graph.structure import GraphDef
from nnx_core.graph.walk import find_duplicates, iter_children, iter_graph, recursive_map
from nnx_core.kinds import (
    BatchStat,
    Cache,
    Intermediate,
    OptArray,
    OptState,
    OptVariable,
    Param,
    Perturbation,
    RngCount,
    RngKey,
    RngState,
    register_variable_name,
    variable_name_from_type,
    variable_type_from_name,
)
from nnx_core.module import Dict, List, Module, Sequential, iter_modules
from nnx_core.nn import activations, initializers
from nnx_core.nn.activations import (
    PReLU,
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from nnx_core.nn.conv import Conv
from nnx_core.nn.dropout import Dropout
from nnx_core.nn.embed import Embed
from nnx_core.nn.linear import Linear
from nnx_core.nn.norm import BatchNorm, LayerNorm
from nnx_core.optim.optimizer import ModelAndOptimizer, Optimizer
from nnx_core.rngs import Rngs, RngStream, fork_rngs, reseed, restore_rngs, split_rngs
from nnx_core.state import (
    EmptyState,
    FlatState,
    GraphState,
    State,
    filter_state,
    from_flat_state,
    map_state,
    merge_state,
    replace_by_pure_dict,
    restore_int_paths,
    split_state,
    to_flat_state,
    to_nested_state,
    to_pure_dict,
)
from nnx_core.transforms.autodiff import grad, remat, value_and_grad
from nnx_core.transforms.batch import PARTITION_NAME, vmap
from nnx_core.transforms.branch import cond, switch
from nnx_core.transforms.compile import eval_shape, jit
from nnx_core.transforms.groups import Carry, DiffState, StateAxes, StateSharding
from nnx_core.transforms.loops import fori_loop, scan, while_loop
from nnx_core.variables import Variable, VariableMetadata, with_metadata

__all__ = [
    # rooms
    "filterlib",
    "graph",
    "rnglib",
    "statelib",
    "variablelib",
    # _errors
    "NnxError",
    # filters
    "All",
    "Any",
    "Everything",
    "ExactType",
    "Not",
    "Nothing",
    "OfType",
    "PathContains",
    "PathIn",
    "PathRegex",
    "WithTag",
    # graph.api
    "clone",
    "graphdef",
    "merge",
    "pop",
    "set_metadata",
    "split",
    "state",
    "update",
    "variables",
    # graph.objects
    "Data",
    "Object",
    "Pytree",
    "Static",
    "data",
    "dataclass",
    "has_data",
    "is_data",
    "register_data_type",
    "static",
    # graph.structure
    "GraphDef",
    # graph.walk
    "find_duplicates",
    "iter_children",
    "iter_graph",
    "recursive_map",
    # kinds
    "BatchStat",
    "Cache",
    "Intermediate",
    "OptArray",
    "OptState",
    "OptVariable",
    "Param",
    "Perturbation",
    "RngCount",
    "RngKey",
    "RngState",
    "register_variable_name",
    "variable_name_from_type",
    "variable_type_from_name",
    # module
    "Dict",
    "List",
    "Module",
    "Sequential",
    "iter_modules",
    # nn
    "activations",
    "initializers",
    # nn.activations
    "PReLU",
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
    # nn.conv
    "Conv",
    # nn.dropout
    "Dropout",
    # nn.embed
    "Embed",
    # nn.linear
    "Linear",
    # nn.norm
    "BatchNorm",
    "LayerNorm",
    # optim.optimizer
    "ModelAndOptimizer",
    "Optimizer",
    # rngs
    "RngStream",
    "Rngs",
    "fork_rngs",
    "reseed",
    "restore_rngs",
    "split_rngs",
    # state
    "EmptyState",
    "FlatState",
    "GraphState",
    "State",
    "filter_state",
    "from_flat_state",
    "map_state",
    "merge_state",
    "replace_by_pure_dict",
    "restore_int_paths",
    "split_state",
    "to_flat_state",
    "to_nested_state",
    "to_pure_dict",
    # transforms.autodiff
    "grad",
    "remat",
    "value_and_grad",
    # transforms.batch
    "PARTITION_NAME",
    "vmap",
    # transforms.branch
    "cond",
    "switch",
    # transforms.compile
    "eval_shape",
    "jit",
    # transforms.groups
    "Carry",
    "DiffState",
    "StateAxes",
    "StateSharding",
    # transforms.loops
    "fori_loop",
    "scan",
    "while_loop",
    # variables
    "Variable",
    "VariableMetadata",
    "with_metadata",
]
