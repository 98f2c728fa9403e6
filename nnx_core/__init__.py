"""nnx_core: neural networks as Python objects on JAX. `import nnx_core as nnx`.

The public list, nothing else: names, signatures and documented behaviour are those of flax.nnx.
"""

from nnx_core import graph, inspect, traversals
from nnx_core._borrowed import LostWriteWarning
from nnx_core._compat_paths import (
    M,
    VariableState,
    compat,
    deprecations,
    extract,
    filterlib,
    graphlib,
    helpers,
    object,
    proxy_caller,
    pytreelib,
    reprlib,
    rnglib,
    spmd,
    statelib,
    summary,
    tracers,
    training,
    variablelib,
    visualization,
)
from nnx_core._compat_paths import installed as __getattr__  # noqa: F401  # asked for names that are not below
from nnx_core._errors import NnxError
from nnx_core.capture import capture
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
from nnx_core.graph.api import clone, graphdef, merge, pop, set_metadata, split, state, unpack, update, variables
from nnx_core.graph.context import (
    MergeContext,
    SplitContext,
    UpdateContext,
    current_update_context,
    merge_context,
    split_context,
    update_context,
)
from nnx_core.graph.functional import (
    PureState,
    as_pure,
    call,
    check_pytree,
    flatten,
    map,
    pure,
    unflatten,
    vars_as,
    with_vars,
)
from nnx_core.graph.objects import Data, Object, Static, data, dataclass, has_data, is_data, register_data_type, static
from nnx_core.graph.objects import Object as Pytree
from nnx_core.graph.structure import GraphDef, GraphState
from nnx_core.graph.tree import NodeStates, from_tree, to_tree
from nnx_core.graph.walk import find_duplicates, iter_children, iter_graph, recursive_map
from nnx_core.inspect.summary import tabulate
from nnx_core.inspect.visualization import display
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
from nnx_core.modes import set_graph_mode, set_graph_updates, var_defaults
from nnx_core.module import Dict, List, Module, Sequential, iter_module_children, iter_modules
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
from nnx_core.nn.attention import MultiHeadAttention
from nnx_core.nn.attention_dot_product import (
    combine_masks,
    dot_product_attention,
    make_attention_mask,
    make_causal_mask,
)
from nnx_core.nn.batch_apply import BatchApply
from nnx_core.nn.conv import Conv
from nnx_core.nn.conv_local import ConvLocal
from nnx_core.nn.conv_transpose import ConvTranspose
from nnx_core.nn.dropout import Dropout
from nnx_core.nn.embed import Embed
from nnx_core.nn.group_norm import GroupNorm, InstanceNorm
from nnx_core.nn.initializers import Initializer
from nnx_core.nn.linear import Linear
from nnx_core.nn.linear_general import Einsum, LinearGeneral
from nnx_core.nn.lora import LoRA, LoRALinear, LoRAParam
from nnx_core.nn.norm import BatchNorm, LayerNorm
from nnx_core.nn.pooling import avg_pool, max_pool, min_pool, pool
from nnx_core.nn.recurrent import RNN, Bidirectional
from nnx_core.nn.recurrent_base import RNNCellBase
from nnx_core.nn.recurrent_cells import GRUCell, LSTMCell, MGUCell, OptimizedLSTMCell, SimpleCell
from nnx_core.nn.recurrent_conv import ConvLSTMCell
from nnx_core.nn.rms_norm import RMSNorm
from nnx_core.nn.spectral_norm import SpectralNorm
from nnx_core.nn.weight_norm import WeightNorm
from nnx_core.optim import metrics, optimizer
from nnx_core.optim.ema import EMA
from nnx_core.optim.metrics import Metric, MultiMetric
from nnx_core.optim.optimizer import ModelAndOptimizer, Optimizer
from nnx_core.optim.train_state import TrainState
from nnx_core.rngs import Rngs, RngStream, fork_rngs, reseed, restore_rngs, split_rngs, with_rngs
from nnx_core.sharding import (
    abstract_with_sharding,
    as_abstract,
    get_abstract_model,
    get_named_sharding,
    get_partition_spec,
    logical_axis_rules,
    use_eager_sharding,
    using_eager_sharding,
    with_partitioning,
)
from nnx_core.state import (
    EmptyState,
    FlatState,
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
from nnx_core.transforms.batch import PARTITION_NAME, transform_metadata, vmap
from nnx_core.transforms.branch import cond, switch
from nnx_core.transforms.compile import eval_shape, jit
from nnx_core.transforms.custom_vjp import custom_vjp
from nnx_core.transforms.groups import Carry, DiffState, StateAxes, StateSharding
from nnx_core.transforms.loops import fori_loop, scan, while_loop
from nnx_core.transforms.mesh import pmap, shard_map
from nnx_core.transforms.prefix import prefix
from nnx_core.transforms.stages import cached_partial, checkify, jit_partial, make_jaxpr
from nnx_core.transforms.vjp_jvp import jvp, vjp
from nnx_core.variables import A, Variable, VariableMetadata, with_metadata
from nnx_core.views import view, view_info, with_attributes

__all__ = [
    # rooms
    "graph",
    "inspect",
    "traversals",
    # _borrowed
    "LostWriteWarning",
    # _compat_paths
    "M",
    "VariableState",
    "compat",
    "deprecations",
    "extract",
    "filterlib",
    "graphlib",
    "helpers",
    "object",
    "proxy_caller",
    "pytreelib",
    "reprlib",
    "rnglib",
    "spmd",
    "statelib",
    "summary",
    "tracers",
    "training",
    "variablelib",
    "visualization",
    # _errors
    "NnxError",
    # capture
    "capture",
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
    "unpack",
    "update",
    "variables",
    # graph.context
    "MergeContext",
    "SplitContext",
    "UpdateContext",
    "current_update_context",
    "merge_context",
    "split_context",
    "update_context",
    # graph.functional
    "PureState",
    "as_pure",
    "call",
    "check_pytree",
    "flatten",
    "map",
    "pure",
    "unflatten",
    "vars_as",
    "with_vars",
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
    "GraphState",
    # graph.tree
    "NodeStates",
    "from_tree",
    "to_tree",
    # graph.walk
    "find_duplicates",
    "iter_children",
    "iter_graph",
    "recursive_map",
    # inspect.summary
    "tabulate",
    # inspect.visualization
    "display",
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
    # modes
    "set_graph_mode",
    "set_graph_updates",
    "var_defaults",
    # module
    "Dict",
    "List",
    "Module",
    "Sequential",
    "iter_module_children",
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
    # nn.attention
    "MultiHeadAttention",
    # nn.attention_dot_product
    "combine_masks",
    "dot_product_attention",
    "make_attention_mask",
    "make_causal_mask",
    # nn.batch_apply
    "BatchApply",
    # nn.conv
    "Conv",
    # nn.conv_local
    "ConvLocal",
    # nn.conv_transpose
    "ConvTranspose",
    # nn.dropout
    "Dropout",
    # nn.embed
    "Embed",
    # nn.group_norm
    "GroupNorm",
    "InstanceNorm",
    # nn.initializers
    "Initializer",
    # nn.linear
    "Linear",
    # nn.linear_general
    "Einsum",
    "LinearGeneral",
    # nn.lora
    "LoRA",
    "LoRALinear",
    "LoRAParam",
    # nn.norm
    "BatchNorm",
    "LayerNorm",
    # nn.pooling
    "avg_pool",
    "max_pool",
    "min_pool",
    "pool",
    # nn.recurrent
    "Bidirectional",
    "RNN",
    # nn.recurrent_base
    "RNNCellBase",
    # nn.recurrent_cells
    "GRUCell",
    "LSTMCell",
    "MGUCell",
    "OptimizedLSTMCell",
    "SimpleCell",
    # nn.recurrent_conv
    "ConvLSTMCell",
    # nn.rms_norm
    "RMSNorm",
    # nn.spectral_norm
    "SpectralNorm",
    # nn.weight_norm
    "WeightNorm",
    # optim
    "metrics",
    "optimizer",
    # optim.ema
    "EMA",
    # optim.metrics
    "Metric",
    "MultiMetric",
    # optim.optimizer
    "ModelAndOptimizer",
    "Optimizer",
    # optim.train_state
    "TrainState",
    # rngs
    "RngStream",
    "Rngs",
    "fork_rngs",
    "reseed",
    "restore_rngs",
    "split_rngs",
    "with_rngs",
    # sharding
    "abstract_with_sharding",
    "as_abstract",
    "get_abstract_model",
    "get_named_sharding",
    "get_partition_spec",
    "logical_axis_rules",
    "use_eager_sharding",
    "using_eager_sharding",
    "with_partitioning",
    # state
    "EmptyState",
    "FlatState",
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
    "transform_metadata",
    "vmap",
    # transforms.branch
    "cond",
    "switch",
    # transforms.compile
    "eval_shape",
    "jit",
    # transforms.custom_vjp
    "custom_vjp",
    # transforms.groups
    "Carry",
    "DiffState",
    "StateAxes",
    "StateSharding",
    # transforms.loops
    "fori_loop",
    "scan",
    "while_loop",
    # transforms.mesh
    "pmap",
    "shard_map",
    # transforms.prefix
    "prefix",
    # transforms.stages
    "cached_partial",
    "checkify",
    "jit_partial",
    "make_jaxpr",
    # transforms.vjp_jvp
    "jvp",
    "vjp",
    # variables
    "A",
    "Variable",
    "VariableMetadata",
    "with_metadata",
    # views
    "view",
    "view_info",
    "with_attributes",
]
