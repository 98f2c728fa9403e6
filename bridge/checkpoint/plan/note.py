"""What a converted checkpoint notes about itself, so that the way back is exact: JSON beside the arrays.

Linen's layout says things that NNX's has no place for (entries without content, boxes, Python's own step), and NNX's
some that Linen's has none for (where model and optimizer are). The note carries them.
Law: `read_note(write_note(note)) == note`, and what is no note of ours, or a damaged one, is never half believed.
Knows forms and paths; knows nothing of arrays or conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge._errors import CheckpointCorruptError
from bridge._types import Location, Path
from bridge.checkpoint.tree.canonical import Form, Known
from bridge.checkpoint.tree.layout import Kind

#: The key of the note in a checkpoint's metadata.
NOTE = "linen_nnx_bridge"


@dataclass(frozen=True)
class LinenNote:
    """Linen's side.

    Attributes:
      form: where it kept things.
      empty: its entries without content, but for masked params, by path.
      sequences: its nodes that are lists.
      step: dtype of its step.
    """

    form: Form
    empty: Mapping[Path, str] = field(default_factory=dict)
    sequences: frozenset[Path] = frozenset()
    step: str = "int32"


@dataclass(frozen=True)
class Note:
    """A note.

    Attributes:
      kind: the layout of the checkpoint that it is beside.
      collections: NNX: path in the model -> collection, of all that is no param.
      linen: how the Linen checkpoint was that this one was made from, or that one from which ...
      nnx: likewise.
      place: where in the tree the training state is; all other paths here are below it.
    """

    kind: Kind = Kind.UNKNOWN
    collections: Mapping[Path, str] = field(default_factory=dict)
    linen: LinenNote | None = None
    nnx: Form | None = None
    place: Path = ()

    @property
    def known(self) -> Known:
        """What it says about a tree that it is beside. Random streams are told from their dtype."""
        if self.kind is Kind.UNKNOWN:
            return Known()
        boxed = self.linen.form.boxed if self.linen else None
        return Known(self.collections, "params", boxed=boxed)


def write_note(note: Note) -> dict[str, Any]:
    """The note as metadata, of JSON types.

    >>> read_note(write_note(Note(Kind.NNX_STATE, {("bn", "mean"): "batch_stats"}))).collections
    {('bn', 'mean'): 'batch_stats'}
    """
    collections: dict[str, list[list[str]]] = {}
    for path, name in note.collections.items():
        if name != "params":
            collections.setdefault(name, []).append(list(path))
    table: dict[str, Any] = {"version": 1, "layout": note.kind.value, "collections": collections}
    if note.linen is not None:
        table["linen"] = {
            "layout": note.linen.form.kind.value,
            "boxed": _paths(note.linen.form.boxed),
            "empty": [[list(path), kind] for path, kind in note.linen.empty.items()],
            "sequences": _paths(note.linen.sequences),
            "step": note.linen.step,
        }
    if note.nnx is not None:
        form = note.nnx
        table["nnx"] = {"layout": form.kind.value, "model": list(form.model), "optimizer": list(form.optimizer)}
    if note.place:
        table["place"] = list(note.place)
    return {NOTE: table}


def _paths(paths: Iterable[Path]) -> list[list[str]]:
    return sorted(map(list, paths))


def read_note(metadata: Mapping[str, Any], place: object = "(metadata)") -> Note:
    """The note in a checkpoint's metadata; an empty one if there is none.

    Raises:
      CheckpointCorruptError: there is one that nobody can have written.
    """
    if NOTE not in metadata:
        return Note()
    try:
        return _read(metadata[NOTE])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorruptError(
            "the metadata of the checkpoint is damaged",
            place,
            expected=f"the note {NOTE!r} as the converter writes it",
            found=f"{type(error).__name__}: {error}",
        ) from error


def _read(table: Mapping[str, Any]) -> Note:
    if table["version"] != 1:
        raise ValueError(f"version {table['version']!r}")
    collections: dict[Path, str] = {}
    for name, paths in table["collections"].items():
        collections |= dict.fromkeys(map(_path, paths), str(name))
    linen = nnx = None
    if "linen" in table:
        side = table["linen"]
        form = Form(Kind(side["layout"]), boxed=frozenset(map(_path, side["boxed"])))
        empty = {_path(path): str(kind) for path, kind in side["empty"]}
        linen = LinenNote(form, empty, frozenset(map(_path, side["sequences"])), str(side["step"]))
    if "nnx" in table:
        side = table["nnx"]
        nnx = Form(Kind(side["layout"]), _path(side["model"]), _path(side["optimizer"]))
    return Note(Kind(table["layout"]), collections, linen, nnx, _path(table.get("place", [])))


def _path(keys: Any) -> Location:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"{keys!r} is no path")
    return tuple(keys)
