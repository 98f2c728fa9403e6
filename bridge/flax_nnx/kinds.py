"""Types and metadata of Variables: those of nnx_core and those of flax.nnx, one for the other.

Law: `variable_type(variable_type(t)) is t` for every type of either library; a type of the user's has its base on the
other side, so that filters choose the same Variables. Values cross as they are; metadata crosses by the same names.
Knows Variables; knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx as flax_nnx
from flax.nnx import variablelib

import nnx_core as nnx
from bridge.flax_nnx._errors import NotAVariableTypeError
from nnx_core._foreign import is_foreign
from nnx_core.variables import current_keys, new_variable, set_metadata_dict, set_raw

#: Types that both libraries have under one name.
_NAMES = (
    "Variable Param BatchStat Cache Intermediate Perturbation LoRAParam RngState RngKey RngCount OptState OptArray"
    " OptVariable MetricState"
)
#: Metadata that says how flax.nnx keeps a value, and nothing about the value.
_OF_STORAGE = ("hijax", "ref", "eager_sharding")

_other: dict[type, type] = {}


def _find(name: str, *places: Any) -> Any:
    return next((getattr(place, name) for place in places if hasattr(place, name)), None)


def _register_common() -> None:
    for name in _NAMES.split():
        ours = _find(name, nnx, nnx.metrics if hasattr(nnx, "metrics") else nnx)
        theirs = _find(name, flax_nnx, flax_nnx.training.optimizer, flax_nnx.training.metrics, flax_nnx.rnglib)
        if ours is not None and theirs is not None:
            _other[ours], _other[theirs] = theirs, ours


_register_common()


def variable_type(kind: type[Any]) -> type[Any]:
    """The Variable type of the other library that stands for this one.

    Args:
      kind: a Variable type of nnx_core or of flax.nnx; the user's own are made anew, under the same name, where the
        other library has none that is registered so.

    Raises:
      NotAVariableTypeError: if it is neither.

    >>> import nnx_core as nnx
    >>> from flax import nnx as flax_nnx
    >>> variable_type(flax_nnx.BatchStat) is nnx.BatchStat, variable_type(nnx.Param) is flax_nnx.Param
    (True, True)
    >>> class Mask(flax_nnx.Param): ...
    >>> variable_type(Mask).__name__, issubclass(variable_type(Mask), nnx.Param)
    ('Mask', True)
    """
    other = _other.get(kind)
    if other is None:
        is_variable = isinstance(kind, type) and issubclass(kind, nnx.Variable | flax_nnx.Variable)
        if not is_variable:
            raise NotAVariableTypeError(kind)
        other = _registered(kind) or _made(kind)
        _other[kind], _other[other] = other, kind
    return other


def _bases(kind: type[Any]) -> tuple[type[Any], ...]:
    root = flax_nnx.Variable if issubclass(kind, flax_nnx.Variable) else nnx.Variable
    return tuple(variable_type(base) for base in kind.__bases__ if issubclass(base, root))


def _registered(kind: type[Any]) -> type[Any] | None:
    """The type that the other library knows under the name that `kind` has in its own."""
    here, there = (variablelib, nnx) if is_foreign(kind) else (nnx, variablelib)
    try:
        name = here.variable_name_from_type(kind)
        other: type[Any] = there.variable_type_from_name(name)
    except (ValueError, KeyError, nnx.NnxError):
        return None
    # One that stands for another type already, or is none of the kind, is no counterpart.
    return other if other not in _other and issubclass(other, _bases(kind)) else None


def _made(kind: type[Any]) -> type[Any]:
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": (), "__doc__": kind.__doc__}
    bases = _bases(kind)
    return type(bases[0])(kind.__name__, bases, body)


# ---- metadata ----


def metadata_of_ours(variable: nnx.Variable[Any]) -> dict[str, Any]:
    """What flax.nnx is told of a Variable of nnx_core."""
    return {**_storage_defaults(), **variable._var_metadata}


def metadata_of_theirs(variable: Any) -> dict[str, Any]:
    """What nnx_core is told of a Variable of flax.nnx."""
    return without_storage(variable._var_metadata)


def without_storage(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` of flax.nnx under nnx_core's names."""
    return current_keys({key: x for key, x in metadata.items() if key not in _OF_STORAGE})


def _storage_defaults() -> dict[str, Any]:
    """What this version of flax.nnx wants to be told of every Variable."""
    metadata = flax_nnx.Variable(0)._var_metadata
    return {key: metadata[key] for key in _OF_STORAGE if key in metadata} | {"ref": False, "hijax": False}


# ---- Variables ----


def to_ours(variable: Any) -> nnx.Variable[Any]:
    """A new Variable of nnx_core with value and metadata of one of flax.nnx; no hooks run."""
    return new_variable(variable_type(type(variable)), raw_of(variable), metadata_of_theirs(variable))


def to_theirs(variable: nnx.Variable[Any]) -> Any:
    """A new Variable of flax.nnx with value and metadata of one of nnx_core; no hooks run."""
    return variable_type(type(variable)).from_metadata(variable._raw_value, metadata_of_ours(variable))


def raw_of(variable: Any) -> Any:
    """The stored value of a Variable of either library, without hooks."""
    return variable.get_raw_value()


def put_ours(variable: nnx.Variable[Any], value: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write what flax.nnx wrote.

    Raises:
      TraceError: if the Variable belongs to another trace.
    """
    variable._check_can_write()
    set_raw(variable, value)
    if metadata is not None:
        set_metadata_dict(variable, metadata)


#: Past flax.nnx's check of the trace: who writes so owns the Variable.
set_theirs = flax_nnx.Variable._raw_value.__set__
get_theirs = flax_nnx.Variable._raw_value.__get__
