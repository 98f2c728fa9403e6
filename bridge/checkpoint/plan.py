"""A conversion before it runs: which leaf of the target is made how, from which leaves of the source.

Law: every leaf of the source is read by some leaf of the target, or stands in `dropped` with the reason; every leaf of
the target is made once. Planning reads no array.
Knows trees of leaves and expressions over them; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.checkpoint.files import Tree
from bridge.checkpoint.layout import Kind, Path
from bridge.checkpoint.ops import Op


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
      source, target: the trees before and after.
      made: target path -> how it is made, in the target's order.
      dropped: source path -> why it has no place in the target.
      warnings: what the user should know: optimizers whose state does not commute with stacking, ...
      source_layout, target_layout: Linen's or NNX's.
    """

    source: Tree
    target: Tree
    made: Mapping[Path, Op]
    dropped: Mapping[Path, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    source_layout: Kind = Kind.UNKNOWN
    target_layout: Kind = Kind.UNKNOWN

    def rows(self) -> list[dict[str, Any]]:
        """One row a target leaf, in JSON types: target, sources, shape, dtype, nbytes, op."""
        raise NotImplementedError
