"""Several sources as one: each under its own name, as the fields of one tree.

Law: every leaf of every part is in the tree once, under the name of its part; what is read is what the part reads.
Knows sources; knows nothing of formats, or of what the parts are to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import CheckpointLayoutError, show_path
from bridge._types import Path
from bridge.checkpoint.formats.protocol import Around, Source
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Region
from bridge.checkpoint.tree.tree import Tree


class JoinedSource:
    """Parts of one checkpoint, each below its name. A `protocol.Source`.

    Args:
        path: what all of them are in.
        parts: name -> the source; closed with this one.
        values: further leaves, that no file holds: path -> number. A part has none at these paths.
        reason: why they are taken for one, in words.

    >>> import tempfile, numpy as np, safetensors.numpy
    >>> from bridge.checkpoint.formats.safetensors import open_safetensors
    >>> file = FilePath(tempfile.mkdtemp()) / "w.safetensors"
    >>> safetensors.numpy.save_file({"w": np.ones(2, "float32")}, file)
    >>> joined = JoinedSource(file.parent, {"params": open_safetensors(file, "it is one", None)})
    >>> list(joined.tree.leaves), joined.read(("params", "w"))
    ([('params', 'w')], array([1., 1.], dtype=float32))
    """

    item: str | None = None

    def __init__(
        self,
        path: FilePath,
        parts: Mapping[str, Source],
        *,
        values: Mapping[Path, Any] | None = None,
        reason: str = "",
        step: int | None = None,
    ):
        self.path, self.step, self.parts, self.around = path, step, dict(parts), Around()
        self.values = dict(values or {})
        first = next(iter(self.parts.values()))
        self.format, self.reason = first.format, reason or first.reason
        self.metadata: dict[str, Any] = {}
        for part in self.parts.values():
            self.metadata |= part.metadata
        self.tree = self._joined_tree()

    def read(self, path: Path, region: Region | None = None) -> Any:
        """The leaf of the part that the path begins with, or a region of it."""
        if path in self.values:
            return self.values[path]
        part = self.parts.get(path[0]) if path else None
        if part is None or path not in self.tree.leaves:
            raise CheckpointLayoutError(
                "the checkpoint has no such leaf",
                self.path,
                expected=show_path(path),
                found=f"the parts {', '.join(self.parts)}",
            )
        return part.read(path[1:], region)

    def piece(self, path: Path) -> int:
        """Bytes that reading any part of a leaf takes, beside the part."""
        return 0 if path in self.values else self.parts[path[0]].piece(path[1:])

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to one of the parts since they were opened."""
        for part in self.parts.values():
            part.require_unchanged()

    def close(self) -> None:
        """Close all parts."""
        for part in self.parts.values():
            part.close()

    def _joined_tree(self) -> Tree:
        leaves: dict[Path, Leaf] = {}
        empty: dict[Path, str] = {}
        sequences: set[Path] = set()
        for path, value in self.values.items():
            leaves[path] = Leaf(path, value.shape, str(value.dtype), value.nbytes)
        for name, part in self.parts.items():
            for path, leaf in part.tree.leaves.items():
                whole = (name, *path)
                leaves[whole] = Leaf(whole, leaf.shape, leaf.dtype, leaf.nbytes)
            for path, kind in part.tree.empty.items():
                empty[(name, *path)] = kind
            sequences |= {(name, *path) for path in part.tree.sequences}
        return Tree(leaves, empty, frozenset(sequences))
