"""Records: frozen dataclasses that are pytrees.

Law: every subclass is a dataclass and a pytree of its fields, in order; fields with metadata
`{"pytree_node": False}` are part of the treedef, as with `flax.struct.field(pytree_node=False)`.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

R = TypeVar("R", bound="Record")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Record:
    """Base of records. Keywords of the class statement are those of `dataclasses.dataclass`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, **options)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # the line above made it one
        fixed = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
        jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in fixed], fixed)

    def replace(self: R, **updates: Any) -> R:
        """A new record with other values for these fields."""
        return dataclasses.replace(self, **updates)  # type: ignore[type-var]  # every subclass is a dataclass
