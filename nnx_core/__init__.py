"""nnx_core: neural networks as Python objects on JAX. `import nnx_core as nnx`.

The public list, nothing else: names, signatures and documented behaviour are those of flax.nnx. A name is public by
standing below as `a as a`, which type checkers take for an export; `__all__` follows.
"""

from types import ModuleType as _ModuleType

from nnx_core import graph as graph, inspect as inspect, traversals as traversals
from nnx_core._borrowed import LostWriteWarning as LostWriteWarning
from nnx_core._compat_paths import (
    M as M,
    VariableState as VariableState,
    compat as compat,
    deprecations as deprecations,
    extract as extract,
    filterlib as filterlib,
    graphlib as graphlib,
    helpers as helpers,
    object as object,
    proxy_caller as proxy_caller,
    pytreelib as pytreelib,
    reprlib as reprlib,
    rnglib as rnglib,
    spmd as spmd,
    statelib as statelib,
    summary as summary,
    tracers as tracers,
    training as training,
    variablelib as variablelib,
    visualization as visualization,
)
from nnx_core._compat_paths import installed as __getattr__  # noqa: F401  # asked for names that are not below
from nnx_core._errors import NnxError as NnxError
from nnx_core.capture import capture as capture
from nnx_core.filters import (
    All as All,
    Any as Any,
    Everything as Everything,
    ExactType as ExactType,
    Not as Not,
    Nothing as Nothing,
    OfType as OfType,
    PathContains as PathContains,
    PathIn as PathIn,
    PathRegex as PathRegex,
    WithTag as WithTag,
)
from nnx_core.graph.api import (
    clone as clone,
    graphdef as graphdef,
    merge as merge,
    pop as pop,
    set_metadata as set_metadata,
    split as split,
    state as state,
    unpack as unpack,
    update as update,
    variables as variables,
)
from nnx_core.graph.context import (
    MergeContext as MergeContext,
    SplitContext as SplitContext,
    UpdateContext as UpdateContext,
    current_update_context as current_update_context,
    merge_context as merge_context,
    split_context as split_context,
    update_context as update_context,
)
from nnx_core.graph.functional import (
    PureState as PureState,
    as_pure as as_pure,
    call as call,
    check_pytree as check_pytree,
    flatten as flatten,
    map as map,
    pure as pure,
    unflatten as unflatten,
    vars_as as vars_as,
    with_vars as with_vars,
)
from nnx_core.graph.objects import (
    Data as Data,
    Object as Object,
    Static as Static,
    data as data,
    dataclass as dataclass,
    has_data as has_data,
    is_data as is_data,
    register_data_type as register_data_type,
    static as static,
)
from nnx_core.graph.structure import GraphDef as GraphDef, GraphState as GraphState
from nnx_core.graph.tree import NodeStates as NodeStates, from_tree as from_tree, to_tree as to_tree
from nnx_core.graph.walk import (
    find_duplicates as find_duplicates,
    iter_children as iter_children,
    iter_graph as iter_graph,
    recursive_map as recursive_map,
)
from nnx_core.inspect.summary import tabulate as tabulate
from nnx_core.inspect.visualization import display as display
from nnx_core.kinds import (
    BatchStat as BatchStat,
    Cache as Cache,
    Intermediate as Intermediate,
    OptArray as OptArray,
    OptState as OptState,
    OptVariable as OptVariable,
    Param as Param,
    Perturbation as Perturbation,
    RngCount as RngCount,
    RngKey as RngKey,
    RngState as RngState,
    register_variable_name as register_variable_name,
    variable_name_from_type as variable_name_from_type,
    variable_type_from_name as variable_type_from_name,
)
from nnx_core.modes import (
    set_graph_mode as set_graph_mode,
    set_graph_updates as set_graph_updates,
    set_sow_capture_noop as set_sow_capture_noop,
    var_defaults as var_defaults,
)
from nnx_core.module import (
    Dict as Dict,
    List as List,
    Module as Module,
    Sequential as Sequential,
    iter_module_children as iter_module_children,
    iter_modules as iter_modules,
)
from nnx_core.nn import activations as activations, initializers as initializers
from nnx_core.nn.activations import (
    PReLU as PReLU,
    celu as celu,
    elu as elu,
    gelu as gelu,
    glu as glu,
    hard_sigmoid as hard_sigmoid,
    hard_silu as hard_silu,
    hard_swish as hard_swish,
    hard_tanh as hard_tanh,
    identity as identity,
    leaky_relu as leaky_relu,
    log_sigmoid as log_sigmoid,
    log_softmax as log_softmax,
    logsumexp as logsumexp,
    one_hot as one_hot,
    relu as relu,
    relu6 as relu6,
    selu as selu,
    sigmoid as sigmoid,
    silu as silu,
    soft_sign as soft_sign,
    softmax as softmax,
    softplus as softplus,
    standardize as standardize,
    swish as swish,
    tanh as tanh,
)
from nnx_core.nn.attention import MultiHeadAttention as MultiHeadAttention
from nnx_core.nn.attention_dot_product import (
    combine_masks as combine_masks,
    dot_product_attention as dot_product_attention,
    make_attention_mask as make_attention_mask,
    make_causal_mask as make_causal_mask,
)
from nnx_core.nn.batch_apply import BatchApply as BatchApply
from nnx_core.nn.conv import Conv as Conv
from nnx_core.nn.conv_local import ConvLocal as ConvLocal
from nnx_core.nn.conv_transpose import ConvTranspose as ConvTranspose
from nnx_core.nn.dropout import Dropout as Dropout
from nnx_core.nn.embed import Embed as Embed
from nnx_core.nn.group_norm import GroupNorm as GroupNorm, InstanceNorm as InstanceNorm
from nnx_core.nn.initializers import Initializer as Initializer
from nnx_core.nn.linear import Linear as Linear
from nnx_core.nn.linear_general import Einsum as Einsum, LinearGeneral as LinearGeneral
from nnx_core.nn.lora import LoRA as LoRA, LoRALinear as LoRALinear, LoRAParam as LoRAParam
from nnx_core.nn.norm import BatchNorm as BatchNorm, LayerNorm as LayerNorm
from nnx_core.nn.pooling import avg_pool as avg_pool, max_pool as max_pool, min_pool as min_pool, pool as pool
from nnx_core.nn.recurrent import RNN as RNN, Bidirectional as Bidirectional
from nnx_core.nn.recurrent_base import RNNCellBase as RNNCellBase
from nnx_core.nn.recurrent_cells import (
    GRUCell as GRUCell,
    LSTMCell as LSTMCell,
    MGUCell as MGUCell,
    OptimizedLSTMCell as OptimizedLSTMCell,
    SimpleCell as SimpleCell,
)
from nnx_core.nn.recurrent_conv import ConvLSTMCell as ConvLSTMCell
from nnx_core.nn.rms_norm import RMSNorm as RMSNorm
from nnx_core.nn.rope import (
    RoPE as RoPE,
    dot_product_attention_with_rope as dot_product_attention_with_rope,
)
from nnx_core.nn.spectral_norm import SpectralNorm as SpectralNorm
from nnx_core.nn.weight_norm import WeightNorm as WeightNorm
from nnx_core.optim import metrics as metrics, optimizer as optimizer
from nnx_core.optim.ema import EMA as EMA
from nnx_core.optim.metrics import Metric as Metric, MultiMetric as MultiMetric
from nnx_core.optim.optimizer import ModelAndOptimizer as ModelAndOptimizer, Optimizer as Optimizer
from nnx_core.optim.train_state import TrainState as TrainState
from nnx_core.rngs import (
    Rngs as Rngs,
    RngStream as RngStream,
    fork_rngs as fork_rngs,
    reseed as reseed,
    restore_rngs as restore_rngs,
    split_rngs as split_rngs,
    with_rngs as with_rngs,
)
from nnx_core.sharding import (
    abstract_with_sharding as abstract_with_sharding,
    as_abstract as as_abstract,
    get_abstract_model as get_abstract_model,
    get_named_sharding as get_named_sharding,
    get_partition_spec as get_partition_spec,
    logical_axis_rules as logical_axis_rules,
    use_eager_sharding as use_eager_sharding,
    using_eager_sharding as using_eager_sharding,
    with_partitioning as with_partitioning,
)
from nnx_core.state import (
    EmptyState as EmptyState,
    FlatState as FlatState,
    State as State,
    filter_state as filter_state,
    from_flat_state as from_flat_state,
    map_state as map_state,
    merge_state as merge_state,
    replace_by_pure_dict as replace_by_pure_dict,
    restore_int_paths as restore_int_paths,
    split_state as split_state,
    to_flat_state as to_flat_state,
    to_nested_state as to_nested_state,
    to_pure_dict as to_pure_dict,
)
from nnx_core.transforms.autodiff import grad as grad, remat as remat, value_and_grad as value_and_grad
from nnx_core.transforms.batch import (
    PARTITION_NAME as PARTITION_NAME,
    transform_metadata as transform_metadata,
    vmap as vmap,
)
from nnx_core.transforms.branch import cond as cond, switch as switch
from nnx_core.transforms.compile import eval_shape as eval_shape, jit as jit
from nnx_core.transforms.custom_vjp import custom_vjp as custom_vjp
from nnx_core.transforms.vjp_jvp import jvp as jvp, vjp as vjp
from nnx_core.transforms.groups import (
    Carry as Carry,
    DiffState as DiffState,
    StateAxes as StateAxes,
    StateSharding as StateSharding,
)
from nnx_core.transforms.loops import fori_loop as fori_loop, scan as scan, while_loop as while_loop
from nnx_core.transforms.mesh import pmap as pmap, shard_map as shard_map
from nnx_core.transforms.prefix import prefix as prefix
from nnx_core.transforms.stages import (
    cached_partial as cached_partial,
    checkify as checkify,
    jit_partial as jit_partial,
    make_jaxpr as make_jaxpr,
)
from nnx_core.variables import (
    A as A,
    Variable as Variable,
    VariableMetadata as VariableMetadata,
    with_metadata as with_metadata,
)
from nnx_core.views import view as view, view_info as view_info, with_attributes as with_attributes

Pytree = Object  # flax.nnx has both names


def _is_public(name: str, value: _ModuleType | None) -> bool:
    """Whether `name` was imported above, and is not just a room that some import put into its package."""
    if name.startswith("_"):
        return False
    is_room = isinstance(value, _ModuleType) and value.__spec__ is not None and value.__name__ == f"{__name__}.{name}"
    return not is_room or name in _PUBLIC_ROOMS


_PUBLIC_ROOMS = ("graph", "inspect", "traversals")  # flax.nnx has them too
__all__ = [_name for _name, _value in globals().items() if _is_public(_name, _value)]
