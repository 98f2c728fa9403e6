"""Values as a table shows them: arrays as dtype and shape, containers as their outline.

Law: `describe` keeps nothing of a value but Python scalars and what `ArrayRepr` says, so what it returns may
outlive the trace it was made in. Knows values; knows nothing of calls or tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnx_core._repr import show_value
from nnx_core.graph.classify import PYTREE, kind_of, one_level
from nnx_core.graph.objects import Object, is_array
from nnx_core.variables import Variable

MAX_LINES = 24  # of one cell: the gradients of a model are an input of an optimizer's `update`


@dataclass(frozen=True)
class ArrayRepr:
    """Shape and dtype of an array; `str` gives `float32[1,32]`."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def from_array(cls, x: Any) -> "ArrayRepr":
        """What is to be said of `x`: an array, tracer or abstract array."""
        return cls(tuple(x.shape), x.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    __repr__ = __str__


def describe(x: Any) -> Any:
    """`x` with every array an ArrayRepr, every container a list or dict, and everything else a scalar or a word."""
    if isinstance(x, Variable):
        inner = describe(x.get_raw_value())
        return f"{type(x).__name__}({inner})" if isinstance(inner, ArrayRepr) else {type(x).__name__: inner}
    if isinstance(x, Object):
        return f"{type(x).__name__}(...)"
    if is_array(x) and hasattr(x, "shape") and hasattr(x, "dtype"):
        return ArrayRepr.from_array(x)
    if isinstance(x, Mapping):
        return {str(key): describe(value) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return {name: describe(value) for name, value in zip(x._fields, x, strict=True)}
    if isinstance(x, list | tuple):
        return [describe(value) for value in x]
    if x is None or isinstance(x, bool | int | float | complex | str):
        return x
    if isinstance(x, type):
        return f"type[{x.__name__}]"
    if kind_of(x) == PYTREE:
        keys, values, _ = one_level(x)
        return {str(key): describe(value) for key, value in zip(keys, values, strict=True)}
    return _word(x)


def _word(x: Any) -> str:
    text = show_value(x)
    return text if "\n" not in text and len(text) <= 60 else f"{type(x).__name__}(...)"


def describe_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The arguments of a call, as lines: one alone as it is, several as a list, keywords as a dict."""
    if len(args) == 1 and not kwargs:
        return outline(describe(args[0]))
    lines = outline([describe(x) for x in args]) if args else []
    return _short(lines + (outline({name: describe(x) for name, x in kwargs.items()}) if kwargs else []))


def outline(described: Any) -> list[str]:
    """What `describe` returned, as lines in the manner of YAML; `[]` for None alone (a call without result)."""
    return [] if described is None else _short(_outline(described))


def _short(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], f"... {len(lines) - MAX_LINES + 1} more"]


def _outline(x: Any) -> list[str]:
    if isinstance(x, dict) and x:
        return [line for key, value in x.items() for line in _entry(key, value)]
    if isinstance(x, list) and x:
        return [line for item in x for line in _item(_outline(item))]
    return str(x).splitlines() or [""]


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [f"{key}:", *(f"  {line}" for line in _outline(value))]
    if isinstance(value, list) and value:
        return [f"{key}:", *_outline(value)]
    return [f"{key}: {value}"]


def _item(lines: list[str]) -> list[str]:
    return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]


def describe_variable(x: Any) -> Any:
    """A Variable in a list of Variables: its arrays, and its metadata where there is any."""
    if not isinstance(x, Variable):
        return describe(x)
    value = describe(x.get_raw_value())
    metadata = x.get_metadata()
    return {**{name: describe(m) for name, m in metadata.items()}, "value": value} if metadata else value
