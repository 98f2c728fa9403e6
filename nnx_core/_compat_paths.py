"""Module paths of flax.nnx that its users reach for, as aliases: `nnx.statelib.State`, `nnx.graph.NodeDef`, ...

Law: nothing is implemented here but what nnx_core itself does without: flax.nnx's bookkeeping (`TraceState`,
`PytreeState`), its decorator for old names, and the door for packages that install themselves. Every other name is
the object that its own room defines. Importing this file makes `import nnx_core.statelib` and
`from nnx_core.graphlib import iter_graph` work. One place, and the only one.
"""

import sys
import warnings
from collections.abc import Callable, Hashable
from functools import wraps
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

import jax

from nnx_core import _repr, _trace, modes, optim
from nnx_core.capture import capture
from nnx_core.graph import api, context, functional, objects, structure, tree, walk
from nnx_core.graph.pack import Refs
from nnx_core.inspect import summary as tables
from nnx_core.inspect import visualization as drawing
from nnx_core.inspect.census import ObjectInfo
from nnx_core.inspect.describe import ArrayRepr
from nnx_core.inspect.recording import CallInfo
from nnx_core.optim import ema, metrics, optimizer, train_state
from nnx_core.transforms import autodiff, batch, branch, compile, custom_vjp, loops, mesh, stages, vjp_jvp
from nnx_core.transforms.prefix import prefix
from nnx_core.views import view, view_info, with_attributes

# The public face has functions called `state` and `variables`: `from nnx_core import state` would give those.
filters, graph, kinds, module, rngs, sharding, state, variables, views = (
    import_module(f"nnx_core.{room}")
    for room in ("filters", "graph", "kinds", "module", "rngs", "sharding", "state", "variables", "views")
)

A = TypeVar("A")
M = TypeVar("M", bound=module.Module)
VariableState = variables.Variable  # States hold Variables themselves


class TraceState:
    """The trace that was running when this was made; equal to a token of the same trace."""

    __slots__ = ("jax_trace",)

    def __init__(self) -> None:
        self.jax_trace = _trace.current_trace()

    def is_valid(self) -> bool:
        """Whether that trace is running."""
        return self.jax_trace == _trace.current_trace()

    def __eq__(self, other: object) -> bool:
        return self.jax_trace == (other.jax_trace if isinstance(other, TraceState) else other)

    __hash__ = None  # type: ignore[assignment]  # as in flax.nnx

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: Any) -> None:
        self.jax_trace = _trace.current_trace()  # a trace does not outlive its process


@jax.tree_util.register_static
class PytreeState:
    """What flax.nnx keeps with each object. Here an object that exists has been set up."""

    __slots__ = ("_initializing", "_is_setup")

    def __init__(self, initializing: bool = False, is_setup: bool = True):
        self._initializing, self._is_setup = initializing, is_setup

    @property
    def initializing(self) -> bool:
        """Whether `__init__` is running, as far as anyone has said."""
        return self._initializing

    @property
    def is_setup(self) -> bool:
        """Whether `__init__` is done, as far as anyone has said."""
        return self._is_setup

    @property
    def trace_state(self) -> TraceState:
        """The trace that is running."""
        return TraceState()

    def __eq__(self, other: object) -> bool:
        return type(other) is PytreeState and (self._initializing, self._is_setup) == (
            other._initializing,
            other._is_setup,
        )

    def __hash__(self) -> int:
        return hash((self._initializing, self._is_setup))


class _StateOfObject:
    """`obj._pytree__state`: read it, or write what is then forgotten (flax.nnx's clients do both)."""

    def __get__(self, obj: Any, _: type | None = None) -> Any:
        return self if obj is None else PytreeState()

    def __set__(self, obj: Any, value: Any) -> None:
        return


def _public(source: ModuleType) -> dict[str, Any]:
    return {name: x for name, x in vars(source).items() if not name.startswith("_")}


def _alias(name: str, *sources: ModuleType, **names: Any) -> ModuleType:
    """A module `nnx_core.<name>` with the public names of `sources`, and these."""
    made = ModuleType(f"nnx_core.{name}", f"flax.nnx's path `{name}`; see nnx_core/_compat_paths.py.")
    for source in sources:
        vars(made).update(_public(source))
    vars(made).update(names)
    sys.modules[made.__name__] = made
    return made


def _names_of_graph() -> dict[str, Any]:
    """What flax.nnx has in its one file `graph`: the names of most rooms in ours, and some of other rooms."""
    names: dict[str, Any] = {}
    for source in (structure, objects, walk, api, functional, context, tree):
        # its own, and not what it imports
        names |= {n: x for n, x in _public(source).items() if getattr(x, "__module__", "").startswith("nnx_core")}
    return names | {
        "GraphState": structure.GraphState,
        "IndexMap": Refs,
        "Key": Hashable,
        "NodeDef": structure.Node,
        "NodeRef": structure.Ref,
        "PureState": functional.PureState,
        "RefMap": Refs,
        "State": state.State,
        "Variable": variables.Variable,
        "is_node": tree.is_graph_node,
        "iter_module_children": module.iter_module_children,
        "iter_modules": module.iter_modules,
        "prefix": prefix,
        "set_graph_mode": modes.set_graph_mode,
        "set_graph_updates": modes.set_graph_updates,
    }


def first_from(*args: A | None, error_msg: str) -> A:
    """The first argument that is not None; ValueError with `error_msg` if none is.

    flax.nnx's own layers read their flags with it, and so do layers that others wrote after them.
    """
    for arg in args:
        if arg is not None:
            return arg
    raise ValueError(error_msg)


# The hooks of the rooms below: they take these names from us, and cannot look up here.
graph.take_names(**_names_of_graph())
module.take_names(view=view, view_info=view_info, with_attributes=with_attributes, capture=capture, M=M)
module.take_names(first_from=first_from)
objects.set_state_view(_StateOfObject())

filterlib = sys.modules["nnx_core.filterlib"] = filters
statelib = sys.modules["nnx_core.statelib"] = state
rnglib = sys.modules["nnx_core.rnglib"] = rngs
graphlib = sys.modules["nnx_core.graphlib"] = graph
spmd = _alias("spmd", sharding, PARTITION_NAME=batch.PARTITION_NAME)
variablelib = _alias("variablelib", variables, kinds, VariableState=VariableState, var_defaults=modes.var_defaults)
pytreelib = _alias(
    "pytreelib",
    objects,
    Pytree=objects.Object,
    check_pytree=functional.check_pytree,
    PytreeState=PytreeState,
    ObjectState=PytreeState,
)
object = sys.modules["nnx_core.object"] = pytreelib  # flax.nnx's name
tracers = _alias("tracers", TraceState=TraceState, current_jax_trace=_trace.current_trace)


def deprecated(new_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`new_fn` under an older name: each call warns, then calls it."""

    @wraps(new_fn)
    def old(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"This name is deprecated: call {new_fn.__qualname__}.", DeprecationWarning, stacklevel=2)
        return new_fn(*args, **kwargs)

    return old


helpers = _alias(
    "helpers",
    **{name: getattr(module, name) for name in ("Dict", "List", "Module", "Sequential")},
    Rngs=rngs.Rngs,
    State=state.State,
    GraphDef=structure.GraphDef,
    TrainState=train_state.TrainState,
)
extract = _alias("extract", tree, find_duplicates=walk.find_duplicates, prefix=prefix)
reprlib = sys.modules["nnx_core.reprlib"] = _repr
visualization = sys.modules["nnx_core.visualization"] = drawing
summary = _alias(
    "summary", tables, ArrayRepr=ArrayRepr, CallInfo=CallInfo, ObjectInfo=ObjectInfo, SizeBytes=_repr.SizeBytes
)
deprecations = _alias("deprecations", deprecated=deprecated)
proxy_caller = _alias("proxy_caller", call=functional.call)
# Our own path of before, also as an attribute of its package.
differentials = _alias("transforms.differentials", vjp_jvp, custom_vjp)
sys.modules["nnx_core.transforms"].differentials = differentials  # type: ignore[attr-defined]
training = sys.modules["nnx_core.training"] = optim
sys.modules |= {"nnx_core.metrics": metrics, "nnx_core.optimizer": optimizer}
sys.modules |= {f"nnx_core.training.{room.__name__.rpartition('.')[2]}": room for room in (ema, metrics, optimizer)}
# flax.nnx keeps its graph mode there as a second set of functions. Here there is one mode: the same functions.
_COMPAT = """
cached_partial checkify clone cond custom_vjp eval_shape flatten fori_loop fork_rngs get_abstract_model grad
graphdef iter_children iter_graph iter_modules jit jvp pmap recursive_map remat reseed scan shard_map split split_rngs
state switch value_and_grad view view_info vjp vmap while_loop""".split()
_ROOMS = (api, walk, functional, module, rngs, sharding, views)
_ROOMS += (autodiff, batch, branch, compile, custom_vjp, loops, mesh, stages, vjp_jvp)
compat = _alias("compat", **{name: next(getattr(r, name) for r in _ROOMS if hasattr(r, name)) for name in _COMPAT})


def installed(name: str) -> ModuleType:
    """A package that installs itself as `nnx_core.<name>` (entry point group `nnx_core`); imported when first used.

    `bridge` does, since flax.nnx has its bridge there; nothing in nnx_core knows of it.
    """
    found = () if name.startswith("_") else tuple(entry_points(group="nnx_core", name=name))
    if not found:
        raise AttributeError(f"module 'nnx_core' has no attribute {name!r}")
    package: ModuleType = found[0].load()
    return package
