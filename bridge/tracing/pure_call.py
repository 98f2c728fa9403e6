"""A model as a pure function of its variables, by location: both APIs in one form.

Law: `run(values, ...)` returns what the model's own call returns on these values, `writing` also what it
writes; neither changes the model or `values`.
Knows modules; knows nothing of the other model, of rules or of files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import core
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._types import Location
from bridge.nnx_in_linen.host import adopted, made_by
from bridge.tracing.trace import TRANSIENT, TRANSIENT_TYPES, Method, parted
from bridge.variables.kinds import collection_of
from bridge.variables.mapping import EMPTY, leaves, tree_of

Values = Mapping[Location, Any]


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
      variables: what the model has: arrays, or abstract ones. Of NNX also its random streams.
      run: (values, keys of random streams, args, kwargs) -> output; NNX takes its keys from its own streams.
      writing: the same -> (output, what is no parameter, by location, as the call leaves it; without what it sows).
      initial: () -> values as the model's author starts with them; computes.
    """

    variables: Values
    run: Callable[[Values, Any, Any, Any], Any]
    writing: Callable[[Values, Any, Any, Any], tuple[Any, Values]]
    initial: Callable[[], Values]


def streams_of(rngs: Any) -> Mapping[str, Any]:
    """Linen's streams from what `module.init` takes.

    >>> list(streams_of(None))
    ['params']
    """
    if isinstance(rngs, Mapping):
        return rngs
    return {"params": jax.random.key(0) if rngs is None else rngs}


def linen_call(module: nn.Module, method: Method, rngs: Any, args: Any, kwargs: Any) -> Call:
    """The call of an unbound Linen module; it reads params, and may write other collections.

    >>> call = linen_call(nn.Dense(2), "__call__", None, (jax.ShapeDtypeStruct((1, 3), "float32"),), {})
    >>> {at: x.shape for at, x in sorted(call.variables.items())}
    {('params', 'bias'): (2,), ('params', 'kernel'): (3, 2)}
    """
    function = getattr(type(module), method) if isinstance(method, str) else method
    streams = streams_of(rngs)

    def init(args: Any, kwargs: Any) -> Any:
        variables = nn.Module.init(module, streams, *args, **kwargs, method=function)
        return {name: tree for name, tree in variables.items() if name not in TRANSIENT}

    def flat(variables: Any) -> Values:
        return {at: meta.unbox(x) for at, x in leaves(variables) if x is not EMPTY}

    def writing(values: Values, keys: Any, args: Any, kwargs: Any) -> tuple[Any, Values]:
        mutable = core.DenyList(("params", *TRANSIENT))
        variables = tree_of(values.items())
        output, written = nn.Module.apply(
            module, variables, *args, **kwargs, method=function, mutable=mutable, rngs=keys
        )
        return output, flat(written)

    def run(values: Values, keys: Any, args: Any, kwargs: Any) -> Any:
        return writing(values, keys, args, kwargs)[0]

    call, arrays = parted(init, args, kwargs)
    traced = jax.jit(call).trace(arrays)

    def initial() -> Values:
        return flat(traced.lower().compile(quick_options())(arrays))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    return Call(flat(shapes), run, writing, initial)


#: What makes XLA compile fast on a CPU: of a small GPT with gradients, a fifth of the time that the first alone takes.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,  # they make and optimize a module of MLIR for each fusion
    "xla_cpu_parallel_codegen_split_count": 1,  # else one of LLVM's modules for each core
}


def quick_options() -> dict[str, Any] | None:
    """For `compile`, of a program that runs a few times: on a CPU, optimizing it takes most of the time by far."""
    return _quick_options() if jax.default_backend() == "cpu" else None


@functools.cache
def _quick_options() -> dict[str, Any]:
    """Those that this XLA knows: an unknown one is an error."""
    program = jax.jit(lambda: 0).lower()
    known: dict[str, Any] = {}
    for name, value in _QUICK.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            program.compile({name: value})
            known[name] = value
    return known


def nnx_call(module: nnx.Module, method: Method) -> Call:
    """The call of an NNX module, real or abstract.

    >>> call = nnx_call(nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))), "__call__")
    >>> {at: x.shape for at, x in sorted(call.variables.items())}
    {('params', 'bias'): (2,), ('params', 'kernel'): (3, 2)}
    """
    graphdef, state = nnx.split(module)
    variables = {_location(path, x): x.get_raw_value() for path, x in nnx.to_flat_state(state)}

    def fill(values: Values, path: Any, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        return variable.replace(values.get(_location(path, variable), variable.get_raw_value()))

    def merged_and_called(values: Values, args: Any, kwargs: Any) -> tuple[nnx.Module, Any]:
        model: nnx.Module = nnx.merge(graphdef, nnx.map_state(functools.partial(fill, values), state))
        call = getattr(model, method) if isinstance(method, str) else functools.partial(method, model)
        return model, call(*args, **kwargs)

    def run(values: Values, _keys: Any, args: Any, kwargs: Any) -> Any:
        return merged_and_called(values, args, kwargs)[1]

    def writing(values: Values, _keys: Any, args: Any, kwargs: Any) -> tuple[Any, Values]:
        model, output = merged_and_called(values, args, kwargs)
        after = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, *TRANSIENT_TYPES))))
        return output, {_location(path, x): x.get_raw_value() for path, x in after if isinstance(x, nnx.Variable)}

    return Call(variables, run, writing, lambda: variables)


def module_of(made: nnx.Module | Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module itself, or what a function makes of `nnx.Rngs`, abstractly."""
    made = adopted(made)
    return made if isinstance(made, nnx.Module) else nnx.eval_shape(lambda: made_by(made, (), {}, nnx.Rngs(0), None))


def _location(path: Any, variable: nnx.Variable[Any]) -> Location:
    return (collection_of(type(variable)), *map(str, path))
