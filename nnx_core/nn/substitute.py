"""Calling a layer with other values in the place of its parameters.

Law: the values are there for the length of one call and only for it: they are put into copies (`replay`), so no
other thread, no failed call and no trace ever finds them in the layer. Everything else that the call does to the
layer (statistics, random streams, what it sows) is done to the layer itself.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import jax

from nnx_core._depth import ROOM
from nnx_core._errors import NnxError, Path
from nnx_core.graph.replay import replay
from nnx_core.graph.walk import iter_graph
from nnx_core.kinds import Param
from nnx_core.module import Dict, Module
from nnx_core.nn._errors import OptionError, place, require_rngs
from nnx_core.nn._options import epsilon as checked_epsilon
from nnx_core.nn.dtypes import Dtype
from nnx_core.rngs import Rngs
from nnx_core.state import nest
from nnx_core.variables import Variable, get_raw, is_ref, set_raw


def parameters(layer: Module, chosen: Callable[[Path, Any], bool]) -> list[tuple[Path, Param]]:
    """(path below `layer`, Param) of each Param that `chosen` takes, in the order of walks, shared ones once."""
    return [(path, x) for path, x in iter_graph(layer, graph=True) if isinstance(x, Param) and chosen(path, x)]


def stored(variable: Variable[Any]) -> jax.Array:
    """The stored value, no hooks: what stands in for it goes through the hooks when the layer reads it."""
    raw = get_raw(variable)
    return raw[...] if is_ref(raw) else raw


def mirror(pairs: Iterable[tuple[Path, Any]]) -> Dict[Any]:
    """Nested Dicts: what belongs to the parameter at a path is at the same path."""
    with ROOM:
        return _as_dict(nest(pairs))


def _as_dict(level: Any) -> Any:
    if not isinstance(level, dict):
        return level
    return Dict({key: _as_dict(below) for key, below in level.items()})


def mirrored(tree: Any, path: Path) -> Any:
    """What `mirror` put at `path`; None where it put nothing."""
    return reduce(lambda level, key: None if level is None else level.get(key), path, tree)


class Wrapper(Module):
    """A module that calls another one, `layer_instance`, with other values in the place of its parameters."""

    layer_instance: Module
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype

    def _nnx_wrap(self, layer: Module, rngs: Rngs, epsilon: float, dtype: Dtype | None, param_dtype: Dtype) -> None:
        require_rngs(self, rngs)
        if not isinstance(layer, Module) or not callable(layer):
            raise OptionError(
                self,
                "layer_instance",
                "a module with a __call__",
                f"{layer.__name__}, a class" if isinstance(layer, type) else type(layer).__name__,
                "Give it an instance: nnx.Linear(3, 4, rngs=rngs).",
            )
        self.layer_instance, self.epsilon = layer, checked_epsilon(self, epsilon)
        self.dtype, self.param_dtype = dtype, param_dtype


def call_with(
    wrapper: Wrapper, values: Callable[[Any], Iterable[tuple[Variable[Any], Any]]], *args: Any, **kwargs: Any
) -> Any:
    """`wrapper.layer_instance(*args, **kwargs)` with other values in some of its Variables.

    Args:
      wrapper: the module that holds the layer.
      values: the wrapper (a copy of it, with the layer) -> [(Variable, what it shall hold)]; it may write to
        other Variables of the wrapper.
      *args, **kwargs: of the layer.

    Returns:
      What the layer returns.

    Raises:
      What the layer raises, with a note that says where the wrapper is.
    """

    def call(wrapper: Wrapper, *args: Any, **kwargs: Any) -> Any:
        held = [(variable, get_raw(variable), value) for variable, value in values(wrapper)]
        for variable, _, value in held:
            set_raw(variable, value)
        output = wrapper.layer_instance(*args, **kwargs)
        for variable, raw, value in held:
            if get_raw(variable) is value:  # else the layer itself wrote to it
                set_raw(variable, raw)
        return output

    try:
        return replay(call, (wrapper, *args), kwargs)
    except NnxError as error:
        error.add_note(
            f"This is in a call of {type(wrapper).__name__} at {place(wrapper)}, which runs on a copy of it."
        )
        raise
