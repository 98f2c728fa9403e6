"""A checkpoint while it is written: its content under another name, beside it a journal of what is whole in it.

Law: the content gets its name in one step, when all of it is on disk; a batch is in the journal after its bytes are on
disk, so that whatever a killed run leaves can be continued, by the same tree only; whatever the operating system
refuses while something is written is a CheckpointWriteError that names the path and says why.
Knows trees and journals; knows nothing of what a format writes where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from bridge._errors import CheckpointExistsError, CheckpointWriteError, listed, show_path
from bridge._types import Path, Shape
from bridge.checkpoint.formats.door import local_path, no_permission
from bridge.checkpoint.formats.journal import Journal, Record, sync_folder
from bridge.checkpoint.formats.nearby import bytes_in, what_is_at
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.regions import Region, run_of, shape_of
from bridge.checkpoint.tree.tree import Tree

# What reading a journal raises that is damaged: no JSON, other lines than ours, names and numbers that are not there.
_DAMAGED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


class BlockWriter(Protocol):
    """What puts the blocks of one leaf on disk."""

    def put(self, region: Region, value: Any) -> None:
        """Write the next block."""

    def end(self) -> list[Record]:
        """All blocks are written, and on disk when this returns; what the journal must know of it."""


class ResumableSink:
    """What the sinks of all formats share. A format says what goes where, in the methods that are empty here.

    Attributes:
      done: leaves that an earlier run had written whole.
    """

    #: what must be the same for a run to go on with what another left
    _same: ClassVar[str]
    #: what a format's own library raises when the operating system refuses something
    _system_errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    done: frozenset[Path]

    def __init__(self, path: str | FilePath, tree: Tree, *, resume: bool = False):
        self.path, self.tree = local_path(path), tree
        self._journal: Journal | None = None
        self._written: set[Path] = set()
        #: an earlier run gave the checkpoint its name, and was killed before it could clean up
        self._finished = False
        self._lay_out()
        try:
            self._begin(resume)
        except BaseException:
            self._close()
            raise
        self.done = frozenset(self._written)

    def write(self, leaves: Mapping[Path, Any]) -> None:
        """Write some leaves, each once; they are on disk when this returns.

        Raises:
          CheckpointWriteError: disk full, or a leaf that is not the tree's, has another shape or dtype, comes twice.
        """
        for path, value in leaves.items():
            self._require_expected(path, value)
        journal = self._require_open()
        if not leaves:
            return
        with self._writing(sum(self.tree.leaves[path].nbytes for path in leaves)):
            records = self._put(leaves)
            journal.append(records)
        for record in records:
            self._take(record)
        self._written |= leaves.keys()

    def write_blocks(self, path: Path, blocks: Iterable[tuple[Region, Any]]) -> None:
        """Write one array that comes in runs of elements, in row-major order; it is on disk when this returns.

        Raises:
          CheckpointWriteError: as for `write`; or blocks that are not all of the leaf, in order.
        """
        leaf, journal = self._require_leaf(path), self._require_open()
        writer: BlockWriter | None = None
        done, shape = 0, tuple(leaf.shape)
        for region, value in blocks:
            run = run_of(shape, region)
            if (
                run is None
                or run[0] != done
                or (tuple(value.shape), str(value.dtype)) != (shape_of(region), leaf.dtype)
            ):
                raise self._wrong_block(leaf, done, f"{region}: {value.dtype}{list(value.shape)}")
            with self._writing(leaf.nbytes):
                writer = writer or self._begin_blocks(leaf, value)
                writer.put(region, value)
            done = run[1]
        if writer is None or done != math.prod(shape):
            raise self._wrong_block(leaf, done, "no more blocks")
        with self._writing(leaf.nbytes):
            records = writer.end()
            journal.append(records)
        for record in records:
            self._take(record)
        self._written.add(path)

    def chunk(self, path: Path) -> Shape | None:
        """The shape of the chunks of an array, between which blocks end; None where they may end anywhere."""
        return None

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Put the checkpoint in its place, with `metadata` (JSON types).

        Raises:
          CheckpointWriteError: leaves are missing, or the disk is full.
          CheckpointExistsError: meanwhile something else is at the path.
        """
        missing = [path for path in self.tree.leaves if path not in self._written]
        if missing:
            names = listed([show_path(path) for path in missing], most=5)
            raise self._refused(
                "leaves are missing", f"all {len(self.tree.leaves)} leaves written", f"{len(missing)} missing: {names}"
            )
        self._require_open()
        with self._writing():
            if not self._finished:
                content = self._complete(metadata)
                if os.path.lexists(self.path):
                    raise self._target_exists()
                self._seal(content)
                os.rename(content, self.path)
                sync_folder(self.path.parent)
            self._discard()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    # what a format says

    @property
    def _content(self) -> FilePath:
        """Where the leaves are until all of them are written: a file or a folder."""
        raise NotImplementedError

    @property
    def _journal_path(self) -> FilePath:
        raise NotImplementedError

    @property
    def _leftovers(self) -> str:
        """What a user would delete to begin anew, in words."""
        raise NotImplementedError

    def _lay_out(self) -> None:
        """What the tree alone tells of the checkpoint; CheckpointWriteError if the format cannot hold it."""
        raise NotImplementedError

    def _identity(self) -> dict[str, str]:
        """What tells this checkpoint from all others: the first line of the journal."""
        raise NotImplementedError

    def _open_content(self, anew: bool) -> None:
        """Open what an earlier run left; or, `anew`, an empty one in place of whatever is there."""
        raise NotImplementedError

    def _make_room(self) -> None:
        """Cut off what a kill left of a batch, and have the disk refuse now what it has no room for."""

    def _put(self, leaves: Mapping[Path, Any]) -> list[Record]:
        """Write the leaves to disk; what the journal must know of it."""
        raise NotImplementedError

    def told(self) -> list[Record]:
        """What process 0 must know of the leaves that this one has written, where several write together."""
        raise NotImplementedError

    def take(self, records: Iterable[Record]) -> None:
        """What another process has `told`."""
        raise NotImplementedError

    def _begin_blocks(self, leaf: Leaf, first: Any) -> BlockWriter:
        """What writes a leaf that comes in blocks, of which `first` is the first."""
        raise NotImplementedError

    def _take(self, record: Record) -> Iterable[Path]:
        """A record is in the journal, of this run or an earlier one; the leaves that it says are written."""
        raise NotImplementedError

    def _complete(self, metadata: Mapping[str, Any]) -> FilePath:
        """Write what is left; what is to be given the name of the checkpoint."""
        raise NotImplementedError

    def _seal(self, content: FilePath) -> None:
        """Note that `content` is whole, if the journal must."""

    def _is_finished(self, records: list[Record]) -> bool:
        """Whether these records tell that what is at the target is theirs."""
        raise NotImplementedError

    def _discard(self) -> None:
        """Delete content and journal."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Close files of the content."""

    def _left(self, records: list[Record]) -> str:
        """How much is left of an earlier run, in words."""
        return f"{bytes_in(self._content)} bytes of an earlier run"

    def _reason(self, error: Exception) -> str:
        """What the operating system said."""
        return getattr(error, "strerror", None) or str(error)

    # beginning, and going on

    def _begin(self, resume: bool) -> None:
        exists = os.path.lexists(self.path)
        if exists and not (resume and self._journal_path.exists()):
            raise self._target_exists()
        with self._writing():
            if not self.path.parent.exists():  # a file there is told by who opens something in it
                self.path.parent.mkdir(parents=True, exist_ok=True)
            journal = self._open_journal()
            records = self._records_left(journal, resume, exists)
            self._finished = exists and bool(records) and self._is_finished(records)
            if exists and not self._finished:
                raise self._target_exists()
            if self._finished:
                self._written |= self.tree.leaves.keys()
            elif records:
                journal.go_on()
                self._open_content(anew=False)
                self._make_room()
            else:
                self._begin_anew(journal)

    def _open_journal(self) -> Journal:
        try:
            self._journal = Journal(self._journal_path)
        except BlockingIOError as error:
            raise self._refused(
                "another process is writing the checkpoint",
                "one writer",
                "it is being written by another process or sink",
                "Wait for it, or end it.",
            ) from error
        return self._journal

    def _records_left(self, journal: Journal, resume: bool, exists: bool) -> list[Record]:
        """The records of an earlier run of the same tree; none if there is nothing to go on with."""
        if not exists and not os.path.lexists(self._content):
            return []  # whatever the journal says is of a checkpoint that is gone
        try:
            identity, *records = journal.read() or [None]
            if identity is None and bytes_in(self._content):
                raise ValueError("it is empty, and what it should tell of is not")
        except _DAMAGED as error:
            self._require_resume(resume, [])
            raise self._damaged(error) from error
        if not records:
            return []
        self._require_resume(resume, records)
        if identity != self._identity():
            raise self._refused(
                "the unfinished checkpoint is of another conversion",
                self._same,
                f"another in {self._content.parent}",
                f"Delete {self._leftovers}, or write to another path.",
            )
        self._take_over(records)
        return records

    def _require_resume(self, resume: bool, records: list[Record]) -> None:
        if not resume:
            raise self._refused(
                "an unfinished checkpoint is in the way",
                "nothing of an earlier run",
                self._left(records),
                f"Go on with it: resume=True (--resume). Or delete {self._leftovers}.",
            )

    def _take_over(self, records: list[Record]) -> None:
        try:
            for record in records:
                self._written.update(self._take(record))
            if not self._written <= self.tree.leaves.keys():
                raise ValueError("leaves that are not the tree's")
        except _DAMAGED as error:
            raise self._damaged(error) from error

    def _begin_anew(self, journal: Journal) -> None:
        try:
            # First the line: old lines beside new content would be believed, and content without one is not known
            # for ours. A run that is killed from here on leaves a journal that promises nothing, and is begun anew;
            # where such a run was before, the line is there, and there is no moment without one.
            journal.restart(self._identity())
            self._open_content(anew=True)
            self._make_room()
        except Exception:
            with suppress(OSError):
                self._discard()
            raise

    def _require_open(self) -> Journal:
        if self._journal is None:
            raise self._refused("the sink is closed", "no call after the end of its `with`", "one")
        return self._journal

    def _close(self) -> None:
        """Let go of the files, which stay. All that was written is on disk, so that no error is worth telling."""
        with suppress(OSError):
            self._let_go()
        if self._journal is not None:
            with suppress(OSError):
                self._journal.close()
            self._journal = None

    # errors

    def _require_leaf(self, path: Path) -> Leaf:
        leaf, place = self.tree.leaves.get(path), show_path(path)
        if leaf is None:
            raise self._refused(
                "a leaf does not belong to the checkpoint",
                "leaves of the tree it was opened with",
                f"{place}, which is not one",
            )
        if path in self._written:
            raise self._refused("a leaf is written twice", "each leaf once", f"{place} a second time")
        return leaf

    def _require_expected(self, path: Path, value: Any) -> None:
        leaf, place = self._require_leaf(path), show_path(path)
        shape, dtype = layout.describe(value)
        if (shape, dtype) != (tuple(leaf.shape), leaf.dtype):
            raise self._refused(
                "a leaf is not what the tree tells",
                f"{place}: {leaf.dtype}{list(leaf.shape)}, as its tree says",
                f"{dtype}{list(shape)}",
            )

    def _wrong_block(self, leaf: Leaf, done: int, found: str) -> CheckpointWriteError:
        return self._refused(
            "the blocks of a leaf are not the leaf",
            f"{show_path(leaf.path)}: {leaf.dtype}{list(leaf.shape)}, in runs of elements, from element {done} on",
            found,
        )

    @contextmanager
    def _writing(self, nbytes: int = 0) -> Iterator[None]:
        """Whatever the operating system refuses in here becomes one CheckpointWriteError.

        `nbytes` is how much is to be written, where that is known.
        """
        try:
            yield
        except (CheckpointWriteError, CheckpointExistsError):
            raise
        except PermissionError as error:
            raise no_permission(self.path, "written") from error
        except self._system_errors as error:
            room = f"{nbytes} more bytes" if nbytes else "the checkpoint"
            hint = "Make room or choose another path; what was written, resume=True (--resume) goes on with."
            if not os.path.lexists(self.path):
                hint = f"Nothing is at the target. {hint}"
            raise self._refused(
                "the checkpoint could not be written",
                f"a disk with room for {room}, and the right to write there",
                self._reason(error),
                hint,
            ) from error

    def _target_exists(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            "the target exists and is in the way",
            self.path,
            expected="nothing at this path",
            found=what_is_at(self.path),
            hint="Choose another path, or move away what is there: nothing is ever written over.",
        )

    def _damaged(self, damage: Exception) -> CheckpointWriteError:
        what = f"a damaged journal, {self._journal_path}: {type(damage).__name__}: {damage}"
        hint = f"Delete {self._leftovers}, or write to another path."
        return self._refused("what was left unfinished is damaged", "a journal of whole lines", what[:500], hint)

    def _refused(self, problem: str, expected: str, found: str, hint: str = "") -> CheckpointWriteError:
        return CheckpointWriteError(problem, self.path, expected=expected, found=found, hint=hint)
