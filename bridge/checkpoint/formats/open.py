"""Which format a checkpoint has, and the source or sink for it.

Law: the format is told from what is there or refused; the reason is said.
Knows the formats by name, and imports one when it is used; knows nothing of Linen, NNX or optimizers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import (
    BridgeError,
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    near_misses,
)
from bridge.checkpoint.formats.door import local_path, no_permission, only_orbax
from bridge.checkpoint.formats.nearby import contents, neighbours, what_is_at
from bridge.checkpoint.formats.protocol import UNFINISHED, Around, Items, Sink, Source
from bridge.checkpoint.formats.stores import asking, is_on_store, place_of
from bridge.checkpoint.tree.tree import Tree

#: What `open_source` reads and `open_sink` writes.
FORMATS = ("orbax", "orbax-v1", "msgpack", "safetensors", "npz")
SINK_FORMATS = ("orbax", "orbax-v1", "msgpack", "safetensors")

_ORBAX = ("orbax", "orbax-v1")
_SUFFIXES = {".msgpack": "msgpack", ".safetensors": "safetensors", ".npz": "npz"}
_INDEX = ".index.json"
_ORBAX_MARKS = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", "orbax.checkpoint", "_sharding")
# `checkpoint_7`, `7`: flax.training.checkpoints without Orbax writes one msgpack file a step.
_STEP_FILE = re.compile(r"(.*_)?(\d+)")
# A map or an array of msgpack, or an extension, which flax makes an array of.
_MSGPACK_FIRST = frozenset([*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)])


def open_source(
    path: str | FilePath,
    *,
    format: str | None = None,
    step: int | None = None,
    item: Items | None = None,
    separator: str | None = None,
) -> Source:
    """Open the checkpoint at `path`, of whatever format it is.

    Args:
      path: a file, an Orbax checkpoint, a folder of steps, or a folder with one `flax_model.msgpack`,
        `model.safetensors`, or the index of several such files.
      format: one of `FORMATS`, in place of what is detected.
      step: the step in a folder of steps; the latest by default. `source.around.steps` has all.
      item: which items of a composite Orbax checkpoint: one; several, which become the fields of one tree; or their
        names there -> their names on disk. By default the only one with arrays, the one called `default`, `state`,
        `train_state`, `items` or `pytree`, or all, if they are the parts of one state: `params`, `opt_state`, ... .
        What is no part of the source is in `source.around`.
      separator: what joins keys in the names of a safetensors or npz file that another program wrote; by default
        `/` if any name has one, else `.`.

    Raises:
      CheckpointNotFoundError: nothing there, or no such step or item.
      CheckpointCorruptError: a file is missing, cut short or hostile.
      CheckpointLayoutError: of no known format, or there are several checkpoints to choose from.
      CheckpointAccessError: `path` is a URL, or may not be read.
      MissingDependencyError: the package for that format is not installed.

    >>> import flax.serialization, numpy, tempfile
    >>> path = FilePath(tempfile.mkdtemp()) / "flax_model.msgpack"
    >>> _ = path.write_bytes(flax.serialization.to_bytes({"kernel": numpy.ones((2, 3), "float32")}))
    >>> source = open_source(path)
    >>> source.format, source.tree.leaves["kernel",].shape, float(source.read(("kernel",)).sum())
    ('msgpack', (2, 3), 6.0)
    """
    path = place_of(path)
    _require_known(format, FORMATS, path, "read")
    try:
        with asking(path):
            return _open(path, format, step, item, separator)
    except PermissionError as error:
        if isinstance(error, BridgeError):
            raise
        raise no_permission(error.filename or path, "read") from error
    except OSError as error:
        if isinstance(error, BridgeError):
            raise
        raise CheckpointCorruptError(
            "the checkpoint cannot be read", path, expected="files that may be read", found=error.strerror or str(error)
        ) from error


def steps_at(path: str | FilePath) -> dict[int, FilePath]:
    """The steps in a folder, files or folders, by their number, in its order; none if it is one checkpoint.

    >>> import tempfile
    >>> folder = FilePath(tempfile.mkdtemp())
    >>> for step in (12, 3):
    ...     (folder / f"checkpoint_{step}").mkdir()
    >>> {step: place.name for step, place in steps_at(folder).items()}
    {3: 'checkpoint_3', 12: 'checkpoint_12'}
    """
    path = place_of(path)
    with asking(path):
        if not path.is_dir():
            return {}
        by_step: Mapping[int, FilePath] = _step_files(sorted(path.iterdir()))
        if is_on_store(path) or not any(place.is_file() for place in by_step.values()):
            from bridge.checkpoint.formats.orbax.files import finished_steps

            by_step = finished_steps(path)
    return dict(sorted(by_step.items()))


def open_sink(
    path: str | FilePath,
    format: str,
    tree: Tree,
    *,
    resume: bool = False,
    item: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> Sink:
    """Begin to write a checkpoint of that `tree` to `path`.

    Args:
      path: where nothing is yet; folders above it are made.
      format: 'orbax' (its v0 layout), 'orbax-v1', 'msgpack' or 'safetensors'.
      tree: what will be written. A msgpack file takes the leaves in `tree.order` only; the others in any.
      resume: go on with what a killed run of the same conversion left; begin anew if it left nothing.
      item, part: of Orbax's formats: the item in the checkpoint, and which of how many processes writes it here, as
        for `OrbaxSink`.

    Raises:
      CheckpointExistsError: something is at `path`.
      CheckpointWriteError: no room, no permission, a leaf that the format cannot hold, an unfinished checkpoint that
        is of another tree, or is there without `resume`.
      CheckpointLayoutError: no format of that name is written.
      CheckpointAccessError: `path` is a URL, or nothing may be written there.

    >>> import numpy, tempfile
    >>> from bridge.checkpoint.tree.layout import Leaf
    >>> path, tree = (
    ...     FilePath(tempfile.mkdtemp()) / "a.safetensors",
    ...     Tree({("w",): Leaf(("w",), (2,), "int8", 2)}),
    ... )
    >>> with open_sink(path, "safetensors", tree) as sink:
    ...     sink.write({("w",): numpy.array([3, 4], "int8")})
    ...     sink.finish({"step": 7})
    >>> source = open_source(path)
    >>> source.read(("w",)), source.metadata
    (array([3, 4], dtype=int8), {'step': 7})
    """
    path = local_path(path)
    _require_known(format, SINK_FORMATS, path, "written")
    if format == "msgpack":
        from bridge.checkpoint.formats.msgpack import MsgpackSink

        return MsgpackSink(path, tree, resume=resume)
    if format == "safetensors":
        from bridge.checkpoint.formats.safetensors import SafetensorsSink

        return SafetensorsSink(path, tree, resume=resume)
    from bridge.checkpoint.formats.orbax.write import OrbaxSink

    version = "v1" if format == "orbax-v1" else "v0"
    return OrbaxSink(path, tree, version=version, item=item, resume=resume, part=part)


# --- which format -------------------------------------------------------------------------------------------


def _open(path: FilePath, format: str | None, step: int | None, item: Items | None, separator: str | None) -> Source:
    if not path.exists():
        raise CheckpointNotFoundError(
            "no checkpoint", path, expected="a checkpoint", found="nothing at this path", hint=neighbours(path)
        )
    if is_on_store(path):
        _require_orbax(path, format)
        format = "orbax"
    file = path if path.is_file() else _file_in(path, step, format)
    if file is None and format in (None, *_ORBAX):
        from bridge.checkpoint.formats.orbax.step import open_step

        return open_step(path, step=step, item=item)
    if file is None:
        raise CheckpointNotFoundError(
            f"no {format} file", path, expected=f"a {format} file in the folder", found=contents(path)
        )
    own_step = None if file is path else _step_of(file)
    if (step is not None and step != own_step) or item is not None:
        wanted = f"step {step}" if item is None else f"item {item!r}"
        raise CheckpointNotFoundError(f"no {wanted}", file, expected="a folder of them", found="one file")
    source = _open_file(file.absolute(), format, separator)
    source.step = own_step
    if own_step is not None:
        source.around = Around(steps=tuple(sorted(_step_files(sorted(path.iterdir())))))
    return source


def _require_orbax(path: FilePath, format: str | None) -> None:
    """On a store, what is no folder of Orbax's is refused for what it is, and not for what it is not."""
    if format is not None:
        found = "" if format in _ORBAX else format
    elif path.is_file():
        found = _by_name(path) or "a file"
    elif any((path / name).exists() for name in _ORBAX_MARKS):
        found = ""
    else:
        models = _models(sorted(path.iterdir()), None)
        found = ", ".join(model.name for model in models[:8])
    if found:
        raise only_orbax(path, found)


def _require_known(format: str | None, known: tuple[str, ...], path: FilePath, what: str) -> None:
    if format is not None and format not in known:
        raise CheckpointLayoutError(
            f"no such format is {what}",
            path,
            expected=", ".join(known),
            found=repr(format),
            hint="".join(f"Did you mean {close}?" for close in near_misses(format, known, 1)),
        )


def _file_in(folder: FilePath, step: int | None, format: str | None) -> FilePath | None:
    """The one file in `folder` that is a checkpoint, or is the step's; None if the folder itself is Orbax's."""
    if format in _ORBAX:
        return None
    if format is None and any((folder / name).exists() for name in _ORBAX_MARKS):
        return None
    children = sorted(folder.iterdir())
    if models := _models(children, format):
        if len(models) > 1:
            raise CheckpointLayoutError(
                "the folder holds several checkpoints",
                folder,
                expected="one file, or the path of one",
                found=", ".join(child.name for child in models[:8]),
                hint="Give the path of the file.",
            )
        return models[0]
    return _step_file(folder, children, step)


def _models(children: list[FilePath], format: str | None) -> list[FilePath]:
    """The files of that format, or of any, by their names; where there are indices, these alone."""
    indices = [child for child in children if child.name.endswith(_INDEX)]
    models = indices or [child for child in children if child.is_file() and child.suffix in _SUFFIXES]
    return [child for child in models if format in (None, _by_name(child))]


def _step_file(folder: FilePath, children: list[FilePath], step: int | None) -> FilePath | None:
    """The file of the step, or of the latest; None if that is a folder, or there are no steps."""
    by_step = _step_files(children)
    if step is None:
        step = max(by_step, default=None)
    elif step not in by_step and any(child.is_file() for child in by_step.values()):
        steps = ", ".join(map(str, sorted(by_step)))
        raise CheckpointNotFoundError(f"no step {step}", folder, expected=f"a file for step {step}", found=steps)
    file = by_step.get(step) if step is not None else None
    return file if file is not None and file.is_file() else None


def _step_files(children: list[FilePath]) -> dict[int, FilePath]:
    """The files and folders that are called as steps are, by their number."""
    by_step: dict[int, FilePath] = {}
    for child in children:
        number = _step_of(child)
        if number is not None and not (child.is_dir() and number in by_step):  # a file before a folder
            by_step[number] = child
    return by_step


def _step_of(path: FilePath) -> int | None:
    match = _STEP_FILE.fullmatch(path.name)
    return int(match[2]) if match else None


def _open_file(file: FilePath, format: str | None, separator: str | None) -> Any:
    kind, reason = (format, f"format={format!r} was given") if format else _detect(file)
    if kind in _ORBAX:
        raise CheckpointLayoutError("not an Orbax checkpoint", file, expected="a folder", found=what_is_at(file))
    if kind == "msgpack":
        from bridge.checkpoint.formats.msgpack import open_msgpack

        return open_msgpack(file, reason)
    if kind == "safetensors":
        from bridge.checkpoint.formats.safetensors import open_safetensors

        return open_safetensors(file, reason, separator)
    from bridge.checkpoint.formats.npz import open_npz

    return open_npz(file, reason, separator)


def _detect(file: FilePath) -> tuple[str, str]:
    """The format of a file and the reason, from its name, else from its first bytes."""
    with file.open("rb") as opened:
        head = opened.read(9)
    size = file.stat().st_size
    if file.name.endswith((UNFINISHED, UNFINISHED + ".json")) or not size:
        raise CheckpointCorruptError(
            "the checkpoint was never finished" if size else "the checkpoint is damaged",
            file,
            expected="a finished checkpoint",
            found=f"a file of {size} bytes",
        )
    if by_name := _by_name(file):
        note = " and it is an index" if file.suffix == ".json" else ""
        return by_name, f"its name ends in {file.suffix}{note}"
    if head.startswith(b"PK"):
        return "npz", "it begins as a zip file does"
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors", "it begins with the length of a JSON header"
    if head[0] in _MSGPACK_FIRST:
        return "msgpack", "its first byte begins a map or an array of msgpack"
    raise CheckpointLayoutError(
        "not a checkpoint",
        file,
        expected="a msgpack, safetensors or npz file",
        found=f"a file of {size} bytes that begins with {head!r}",
        hint="Say what it is: format=... (--source-format)",
    )


def _by_name(file: FilePath) -> str | None:
    name = file.name.removesuffix(_INDEX) if file.name.endswith(_INDEX) else file.name
    return _SUFFIXES.get(FilePath(name).suffix)
