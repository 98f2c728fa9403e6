"""What a checkpoint file is to the converter: a source that is read leaf by leaf, a sink that is written in batches.

Law of a source: opening it reads metadata only; what it reads has exactly the form that its `tree` tells; whatever
is missing, cut short or hostile is a CheckpointError, and nothing is ever unpickled.
Law of a sink: until `finish` returns, nothing at its path looks like a finished checkpoint; a batch is on disk when
`write` returns, so that a killed run can go on from `done`.
Knows trees of leaves; knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Protocol

from bridge._types import Path, Shape
from bridge.checkpoint.tree.regions import Region
from bridge.checkpoint.tree.tree import Tree

#: What the name of a file ends in until it is whole.
UNFINISHED = ".unfinished"


#: The key in a checkpoint's metadata of items that hold JSON, where the format has no items.
JSON_ITEMS = "json_items"
#: Which items of a composite checkpoint: one, several, or their names in the tree -> their names on disk.
Items = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class LeftOut:
    """Something beside a source that is no part of it: its name, why, and whether somebody has asked for that."""

    name: str
    why: str
    asked: bool = False


@dataclass(frozen=True)
class Around:
    """What else there is where a source was found.

    Attributes:
      steps: all steps of the folder, if it was a folder of steps; one of them is the source's.
      items: name of each item of the step -> what it holds, in words.
      left_out: items that are no part of the source.
      json_items: items that hold JSON: name -> content.
      notes: what was taken to be so, in words.
    """

    steps: tuple[int, ...] = ()
    items: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    json_items: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """An opened checkpoint. Safe to read from several threads."""

    path: FilePath  #: the folder or file with the arrays
    format: str  #: 'orbax', 'orbax-v1', 'msgpack', 'safetensors' or 'npz'
    reason: str  #: why it is taken for that format, in words
    tree: Tree
    step: int | None
    item: str | None  #: several that are joined have no name
    around: Around  #: what else is there
    metadata: Mapping[str, Any]  #: what its writer stored beside the arrays (JSON types)

    def read(self, path: Path, region: Region | None = None) -> Any:
        """A leaf, or a region of it: numpy array of the stored dtype; a Python number or string as saved; typed
        random keys as such. Raises CheckpointCorruptError."""

    def piece(self, path: Path) -> int:
        """Bytes in memory that reading any part of a leaf takes, beside the part: a chunk that is stored as one."""

    def require_unchanged(self) -> None:
        """Raise CheckpointChangedError if somebody wrote to it since it was opened. To be asked after the last read."""

    def close(self) -> None:
        """Let go of files."""


class Sink(Protocol):
    """A checkpoint that is being written. Use as a context manager: an exception leaves it unfinished, resumable."""

    path: FilePath  #: what it will be
    done: frozenset[Path]  #: leaves that an earlier run, killed, had written whole

    def write(self, leaves: Mapping[Path, Any]) -> None:
        """Write some leaves of the tree, each once. Raises CheckpointWriteError (disk full, ...)."""

    def write_blocks(self, path: Path, blocks: Iterable[tuple[Region, Any]]) -> None:
        """Write one array that comes in runs of elements, in row-major order. Raises CheckpointWriteError.

        It is on disk when this returns; a leaf of which some blocks are written is begun anew by the next run.
        """

    def chunk(self, path: Path) -> Shape | None:
        """The shape of the chunks of an array, between which blocks end; None where they may end anywhere."""

    def told(self) -> list[Mapping[str, Any]]:
        """What process 0 must know of the leaves that this one has written, where several write together."""

    def take(self, records: Iterable[Mapping[str, Any]]) -> None:
        """What another process has `told`."""

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Put the checkpoint in its place, in one atomic step, with `metadata` (JSON types) beside the arrays."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *error: object) -> None: ...
