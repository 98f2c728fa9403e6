"""How the first generation shows what it has: a Variable with its collection and numbers, never in one line.

Law: as in `nnx_core._repr`, showing never raises; values that have no numbers to show (traced, deleted, elsewhere)
are shown as there. Knows text; knows no modules.
"""

from collections.abc import Iterable
from typing import Any

import jax

from nnx_core._repr import show_value
from nnx_core.legacy.collections import collection_of
from nnx_core.variables import Variable


def fields_text(name: str, fields: Iterable[tuple[str, str]], *, indent: int = 2, brackets: str = "()") -> str:
    r"""`name(`, a line for each field, `)`; the further lines of a field's text are moved with it.

    >>> print(fields_text("Linear", [("din=", "2"), ("w=", "Variable(\n)")]))
    Linear(
      din=2,
      w=Variable(
      )
    )
    """
    lines = [_indented(f"{key}{text}", indent) for key, text in fields]
    opening, closing = brackets[: len(brackets) // 2], brackets[len(brackets) // 2 :]
    body = ",\n".join(lines)
    return f"{name}{opening}\n{body}\n{closing}" if lines else f"{name}{opening}{closing}"


def value_text(value: Any) -> str:
    """A Variable as `MutableVariable(...)`, an array with its numbers, anything else as its repr."""
    if isinstance(value, Variable):
        return fields_text("MutableVariable", _of_variable(value), indent=4)
    return _array_text(value) if isinstance(value, jax.Array) else repr(value)


def state_value_text(value: Any) -> str:
    """A value of a State: a Variable that nobody writes to any more, with the names of its axes."""
    if not isinstance(value, Variable):
        return value_text(value)
    fields = [*_of_variable(value), ("sharding=", repr(value.get_metadata().get("out_sharding")))]
    return fields_text("Variable", fields, indent=4)


def _of_variable(variable: Variable[Any]) -> list[tuple[str, str]]:
    value = variable.get_raw_value()
    text = _array_text(value) if isinstance(value, jax.Array) else show_value(value)
    return [("collection=", repr(collection_of(variable))), ("value=", text)]


def _array_text(value: Any) -> str:
    has_numbers = not isinstance(value, jax.core.Tracer) and value.is_fully_addressable and not value.is_deleted()
    return repr(value) if has_numbers else show_value(value)


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.split("\n"))
