"""Whether a converted checkpoint still holds what was written: every leaf is read again and hashed.

Law: no leaf is left out and none is added; what is reported equal has the dtype, the shape and the bits that were
written. Reads only.
Knows sources and hashes; knows nothing of layouts or of how the leaves were made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from bridge._errors import BridgeError, CheckpointCorruptError, CheckpointLayoutError, cut_short, show_path
from bridge._types import Path
from bridge.checkpoint.blocks import hash_in_blocks, too_large
from bridge.checkpoint.formats.open import open_source
from bridge.checkpoint.formats.protocol import Items, Source
from bridge.checkpoint.options import MAX_MEMORY
from bridge.checkpoint.stream import Batch, Progress, batches, leaf_hash, values
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.tree import reads_of

#: The key of the hashes in the metadata of a checkpoint: a list of `[keys of the path, SHA-256]`.
HASHES = "hashes"

_MOST_SHOWN = 20


class VerificationError(BridgeError, ValueError):
    """A checkpoint does not hold what was written to it.

    Attributes:
      path: the checkpoint.
      wrong: what is wrong -> paths of the leaves: 'other bits', 'unreadable', 'missing', 'unexpected'.
    """

    def __init__(self, path: object, wrong: Mapping[str, Sequence[Path]], reason: str = ""):
        self.path = str(path)
        self.wrong = {what: list(paths) for what, paths in wrong.items() if paths}
        counts = ", ".join(f"{len(paths)} {what}" for what, paths in self.wrong.items())
        lines = [f"verification failed: {path}", "  expected: the leaves that were written, with the same hashes"]
        lines.append(f"  found: {counts or reason}")
        for what, paths in self.wrong.items():
            shown = [f"    {what}: {show_path(leaf)}" for leaf in paths]
            lines += cut_short(shown, _MOST_SHOWN, f"    {what}: ")
        super().__init__("\n".join([*lines, "Do not use it. Convert again; to another disk if this happens twice."]))


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found equal: the number of leaves and their bytes in memory."""

    path: str
    format: str
    leaves: int
    nbytes: int


def verify(
    path: str | FilePath,
    *,
    format: str | None = None,
    step: int | None = None,
    item: Items | None = None,
    max_memory: int = MAX_MEMORY,
    progress: Progress | None = None,
) -> VerifyReport:
    """Read a converted checkpoint again and compare it with the hashes that were stored when it was written.

    Args:
      path, format, step, item: which checkpoint, as for `open_source`.
      max_memory: bytes of leaves in memory at once.
      progress: called as `progress("verifying", bytes done, bytes in all)`.

    Returns:
      How much was compared. That it returns says that all was equal.

    Raises:
      VerificationError: leaves differ from what was written, are missing or were added; lists them.
      CheckpointChangedError: somebody wrote to it meanwhile.
      CheckpointLayoutError: the checkpoint has no hashes: it was not written by `convert`.
      CheckpointNotFoundError, CheckpointCorruptError: as for `open_source`.

    Example::

        bridge.checkpoint.verify("run/nnx").leaves  # 212
    """
    try:
        source = open_source(path, format=format, step=step, item=item)
    except CheckpointCorruptError as error:
        raise VerificationError(path, {}, f"it cannot be opened: {error}") from error
    with closing(source):
        return verify_source(source, stored_hashes(source), max_memory=max_memory, progress=progress)


def verify_source(
    source: Source,
    expected: Mapping[Path, str],
    *,
    only: Collection[Path] | None = None,
    max_memory: int = MAX_MEMORY,
    progress: Progress | None = None,
) -> VerifyReport:
    """As `verify`, for a source that is open and hashes that are known.

    Args:
      only: the leaves to read, where other processes read the others; all by default.

    Raises:
      VerificationError: as for `verify`.
    """
    leaves, done = source.tree.leaves, 0
    wrong: dict[str, list[Path]] = {"other bits": [], "unreadable": []}
    wrong["missing"] = [path for path in expected if path not in leaves]
    wrong["unexpected"] = [path for path in leaves if path not in expected]
    mine = leaves if only is None else {path: leaf for path, leaf in leaves.items() if path in only}
    nbytes = sum(leaf.nbytes for leaf in mine.values())
    for hashes in _hashed(source, mine, max_memory):
        for path, digest in hashes.items():
            if digest is None:
                wrong["unreadable"].append(path)
            elif digest != expected.get(path, digest):
                wrong["other bits"].append(path)
        done += sum(leaves[path].nbytes for path in hashes)
        if progress is not None:
            progress("verifying", done, nbytes)
    if any(wrong.values()):
        raise VerificationError(source.path, wrong)
    source.require_unchanged()
    return VerifyReport(str(source.path), source.format, len(leaves), source.tree.nbytes)


def wrong_bits(source: Source, expected: Mapping[Path, str], *, max_memory: int = MAX_MEMORY) -> list[Path]:
    """Those of the leaves in `expected`, as far as they are there, that have another hash or cannot be read."""
    leaves = {path: leaf for path, leaf in source.tree.leaves.items() if path in expected}
    wrong: list[Path] = []
    for hashes in _hashed(source, leaves, max_memory):
        wrong += [path for path, digest in hashes.items() if digest != expected[path]]
    return wrong


def _hashed(source: Source, leaves: Mapping[Path, Leaf], max_memory: int) -> Iterator[dict[Path, str | None]]:
    """The hashes of these leaves, batch by batch."""
    for batch in batches(reads_of(leaves), leaves, leaves, max_memory):
        yield _hashes(batch, source, max_memory)


def _hashes(batch: Batch, source: Source, budget: int) -> dict[Path, str | None]:
    """The hash of each leaf; None for one that cannot be read."""
    try:
        if large := too_large(batch, budget):
            path, op = large
            return {path: hash_in_blocks(op, source.read, budget)}
        return {path: digest for path, (_, digest) in values(batch, source.read).items()}
    except CheckpointCorruptError:  # one damaged leaf fails its batch: each is read again, to tell which
        if len(batch.leaves) == 1:
            return dict.fromkeys(batch.leaves)
        return {path: _hash_alone(path, source) for path in batch.leaves}


def _hash_alone(path: Path, source: Source) -> str | None:
    try:
        return leaf_hash(source.read(path, None))
    except CheckpointCorruptError:
        return None


# --- hashes in the metadata ---------------------------------------------------------------------------------


def hash_table(hashes: Mapping[Path, str]) -> list[Any]:
    """The hashes as JSON types: rows of `[keys, hash]`, since keys may hold any character.

    >>> hash_table({("params", "a/b"): "00ff"})
    [[['params', 'a/b'], '00ff']]
    """
    return [[list(path), digest] for path, digest in hashes.items()]


def stored_hashes(source: Source) -> dict[Path, str]:
    """The hashes that were stored with a checkpoint; CheckpointLayoutError if there are none."""
    table = source.metadata.get(HASHES)
    if table is None:
        raise CheckpointLayoutError(
            "nothing to verify against",
            source.path,
            expected="hashes in its metadata, as `linen-nnx convert` stores them",
            found=", ".join(map(str, source.metadata)) or "no metadata",
            hint="Compare it with another checkpoint: linen-nnx diff A B",
        )
    try:
        return {tuple(map(str, keys)): str(digest) for keys, digest in table}
    except (TypeError, ValueError) as error:
        raise CheckpointCorruptError(
            "the stored hashes are damaged", source.path, expected="rows of [keys, hash]", found=str(error)
        ) from error
