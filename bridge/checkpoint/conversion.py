"""A checkpoint on disk from Linen's layout to NNX's, or back: opened, planned, streamed, finished, read again.

Law: everything is checked before the first array is read; the source is never opened for writing; whatever ends a
conversion early (an error, a full disk, Ctrl-C, a kill) leaves nothing at the target's path.
Knows sources, plans and sinks; knows nothing of how a format stores a leaf or how a layout names it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Literal

from bridge._errors import (
    BridgeError,
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointLayoutError,
    cut_short,
    show_path,
)
from bridge._types import Path
from bridge._versions import version_of
from bridge.checkpoint.beside import carried
from bridge.checkpoint.blocks import InBlocks, too_large
from bridge.checkpoint.formats.door import local_path
from bridge.checkpoint.formats.open import open_sink, open_source
from bridge.checkpoint.formats.protocol import Items, Sink, Source
from bridge.checkpoint.formats.stores import is_on_store
from bridge.checkpoint.job import Job
from bridge.checkpoint.options import MAX_MEMORY, Check, ConversionOptions, LeafRules
from bridge.checkpoint.plan.place import embedded, metadata_of, place_in
from bridge.checkpoint.plan.plan import Plan, plan_of
from bridge.checkpoint.stream import Done, LeafHash, Progress, batches, by_source, share, values
from bridge.checkpoint.tree.canonical import Known
from bridge.checkpoint.tree.inner import below
from bridge.checkpoint.tree.layout import Kind, Layout
from bridge.checkpoint.tree.ops import Op, Read
from bridge.checkpoint.tree.tree import Tree
from bridge.checkpoint.verification import (
    HASHES,
    VerificationError,
    hash_table,
    stored_hashes,
    verify_source,
    wrong_bits,
)

# Shares of the memory: a batch that is made, the one before it that is written, and two for what formats need for both
# meanwhile (chunks as they are stored, compressed) and what an allocator keeps.
_SHARES = 4
# What the tools of a format call an optax state without content.
_EMPTY = {"orbax": "None", "orbax-v1": "None", "msgpack": "Dict"}
_MOST_SHOWN = 20
_UNVERIFIED = ".failed-verification"


class LossyConversionError(BridgeError, ValueError):
    """A conversion would lose or change something that nobody said may be lost. `losses` are the reasons."""

    def __init__(self, source: object, losses: Sequence[str]):
        self.path, self.losses = str(source), list(losses)
        listed = "\n".join(cut_short([f"    {loss}" for loss in self.losses], _MOST_SHOWN, "    "))
        super().__init__(
            f"the conversion would lose or change something: {source}\n"
            f"  expected: a place for every leaf, with its own number type\n  found:\n{listed}\n"
            "Say so in a rule (`drop = true`, `cast = ...`), choose items by name: item=... (--item NAME), "
            "or allow it: lossy=True (--lossy). Nothing was written."
        )


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
      source, target: the folders or files.
      source_format, target_format: 'orbax', 'msgpack', ...
      plan: which leaf was made how; `plan.rows()` is a table of it.
      leaves, nbytes: how much the target holds.
      resumed: how many of the leaves an earlier run had written.
      verified: whether all was read again and found equal.
      seconds: from the first array read to the end.
      step, steps: which step of the source it was, and all that there are.
      unproven: why nothing has shown that derived rules are right; "" otherwise. `verified` says nothing of that.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    plan: Plan
    leaves: int
    nbytes: int
    resumed: int
    verified: bool
    seconds: float
    unproven: str = ""
    step: int | None = None
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned and can run: `with open_conversion(...) as conversion: conversion.run(...)`.

    Attributes:
      source: the open source.
      layout: which layout it has, and why.
      plan: what will be made of it.
      options: what was asked for.
    """

    source: Source
    layout: Layout
    plan: Plan
    options: ConversionOptions

    @classmethod
    def open(cls, source: str | FilePath, options: ConversionOptions) -> Conversion:
        """Open a checkpoint and plan its conversion, as `open_conversion` does with keywords.

        Example::

            options = ConversionOptions(to="nnx", max_memory=512 << 20)
            with Conversion.open("run/linen", options) as conversion:
                conversion.run("run/nnx")
        """
        opened = source_of(source, options)
        try:
            return plan_conversion(opened, options)
        except BaseException:
            opened.close()
            raise

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()

    @property
    def target_format(self) -> str:
        """The format that it will be written in."""
        return self.options.target_format

    @property
    def losses(self) -> list[str]:
        """What would be lost or changed though no rule says so: one line each; empty for a clean conversion."""
        lost = [f"{show_path(path)} has no place: {why}" for path, why in self.plan.lost.items()]
        left_out = [f"{item.name} is left out: {item.why}" for item in self.plan.left_out if not item.asked]
        return [*lost, *left_out, *self.plan.warnings]

    def run(
        self,
        target: str | FilePath,
        *,
        max_memory: int | None = None,
        resume: bool | None = None,
        verify: bool | None = None,
        check: Check | None = None,
        lossy: bool | None = None,
        progress: Progress | None = None,
    ) -> ConvertReport:
        """Write the target. Options, result and errors as for `convert`; options not given are as it was opened."""
        changes = {"max_memory": max_memory, "resume": resume, "verify": verify, "check": check, "lossy": lossy}
        changes["progress"] = progress
        given = {name: value for name, value in changes.items() if value is not None}
        return self._run(local_path(target), replace(self.options, **given))

    def _run(self, path: FilePath, options: ConversionOptions) -> ConvertReport:
        require_apart(path, self.source.path)
        if self.losses and not options.lossy:
            raise LossyConversionError(self.source.path, self.losses)
        start = time.monotonic()
        with options.job.together():
            hashes, resumed = self._written(path, options)
            # Nobody but the hashes knows whether an earlier run, that wrote some leaves, has read the same source.
            verified = bool(options.verify or resumed)
            with _no_name_if_wrong(path, options.job):
                if verified:
                    _verify(path, hashes, self._share(options), options)
                if options.check is not None and options.job.rank == 0:
                    _require_check(options.check, self.source.path, path)
        return ConvertReport(
            source=str(self.source.path),
            target=str(path),
            source_format=self.source.format,
            target_format=options.target_format,
            plan=self.plan,
            leaves=len(hashes),
            nbytes=self.plan.target.nbytes,
            resumed=resumed,
            verified=verified,
            seconds=time.monotonic() - start,
            unproven=self.plan.unproven,
            step=self.source.step,
            steps=self.source.around.steps,
        )

    def _written(self, path: FilePath, options: ConversionOptions) -> tuple[dict[Path, str], int]:
        """Write the target; the hash of each leaf, and how many an earlier run had written.

        Each process of a job writes its share. The first opens the target before the others, and finishes it after.
        """
        job = options.job
        job.agree("conversion", f"{self.source.path} to {path}, {options.target_format}: {len(self.plan.made)} leaves")
        if job.rank:
            job.gather()
        form = {"resume": options.resume, "item": options.target_item, "part": (job.rank, job.count)}
        with open_sink(path, options.target_format, self.plan.target, **form) as sink:
            if job.rank == 0:
                job.gather()
            share = self._share(options)
            with _unchanged(self.source):
                own = self._write(sink, share, options)
                if options.verify and HASHES in self.source.metadata:
                    self._require_read_as_written(own, options)
            resumed = len(sink.done & share.keys())
            hashes, resumed = _told(job, sink, own, resumed)
            hashes = {path: hashes[path] for path in self.plan.made}
            if job.rank == 0:
                beside, _ = carried(self.source)
                sink.finish({**beside, **self.plan.metadata(), **self._provenance(), HASHES: hash_table(hashes)})
        job.gather()
        return hashes, resumed

    def _share(self, options: ConversionOptions) -> dict[Path, Op]:
        """The leaves that this process makes, in the order in which it does."""
        made = by_source(self.plan.made)
        if options.target_format == "msgpack":  # one file, written from its start to its end
            made = {path: self.plan.made[path] for path in self.plan.target.order}
        job = options.job
        return made if job.count == 1 else share(made, self.plan.target.leaves, job.rank, job.count)

    def _write(self, sink: Sink, made: Mapping[Path, Op], options: ConversionOptions) -> dict[Path, str]:
        """Make and write these leaves; the hash of each. One batch is made while the one before it is written.

        Leaves that an earlier run wrote are made again, for their hashes, and not written again.
        """
        leaves = self.plan.target.leaves
        hashes: dict[Path, str] = {}
        budget = options.max_memory // _SHARES
        done = Done(_asking(options), "converting", sum(leaves[path].nbytes for path in made))
        with ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            for batch in batches(made, leaves, self.source.tree.leaves, budget):
                large = too_large(batch, budget)
                fresh: dict[Path, Any] = {}
                if large is None:
                    for path, (value, digest) in values(batch, self.source.read).items():
                        hashes[path] = digest
                        if path not in sink.done:
                            fresh[path] = value
                if pending is not None:
                    pending.result()  # raises what the writer has raised
                pending = writer.submit(sink.write, fresh) if fresh else None
                if large is not None:
                    hashes[large[0]] = self._write_in_blocks(*large, sink, budget, done)
                else:
                    done.add(sum(leaves[path].nbytes for path in batch.leaves))
            if pending is not None:
                pending.result()
        return hashes

    def _write_in_blocks(self, path: Path, op: Op, sink: Sink, budget: int, done: Done) -> str:
        """A leaf that does not fit the budget, for which all others wait; its hash."""
        digest = LeafHash(op.shape, op.dtype)
        parts = InBlocks(op, self.source.read, budget, sink.chunk(path), sink.path.parent)
        with parts.hashed(digest) as made:
            told = done.telling(made)
            if path in sink.done:
                for _ in told:
                    pass
            else:
                sink.write_blocks(path, told)
        return digest.hexdigest()

    def _require_read_as_written(self, hashes: Mapping[Path, str], options: ConversionOptions) -> None:
        """Raise VerificationError if the source is one that was converted, and has other bits than it had then.

        A leaf that went over as it was has been hashed on its way; one that others were made of is read once more.
        """
        expected, job = stored_hashes(self.source), options.job
        as_it_was = {op.path: path for path, op in self.plan.made.items() if type(op) is Read}
        others = [path for path in expected if path not in as_it_was][job.rank :: job.count]
        wrong = [
            path for path, at in as_it_was.items() if at in hashes and expected.get(path, hashes[at]) != hashes[at]
        ]
        wrong += wrong_bits(self.source, {path: expected[path] for path in others}, max_memory=options.max_memory // 2)
        if wrong:
            raise VerificationError(self.source.path, {"other bits": wrong})

    def _provenance(self) -> dict[str, Any]:
        return {
            "converted_from": str(self.source.path),
            **({"unproven": self.plan.unproven} if self.plan.unproven else {}),
            "converted_by": f"linen-nnx-bridge {version_of('linen-nnx-bridge')}",
        }


def source_of(path: str | FilePath, options: ConversionOptions) -> Source:
    """The checkpoint at `path` that the options mean, open."""
    return open_source(path, format=options.source_format, step=options.step, item=options.item)


def plan_conversion(source: Source, options: ConversionOptions, progress: Progress | None = None) -> Conversion:
    """The conversion of a source that is open already, as where `target` depends on what it holds.

    `progress` is told of the planning alone, as `plan_of` does: its numbers are steps, not bytes.

    Example::

        with closing(open_source("run/linen")) as source:
            print(plan_conversion(source, ConversionOptions(to="nnx")).plan.summary())
    """
    place, tree = state_in(source, options)
    layout = tree.layout
    if options.kind is not None:
        layout = Layout(options.kind, "as asked for", layout.boxed)
        _require_variables(tree, options.kind, source.path)
    if options.empty is None:
        options = replace(options, empty=_EMPTY.get(options.target_format))
    plan = plan_of(tree, options, layout, metadata_of(source.metadata, place), progress)
    plan = embedded(plan, source.tree, place, options)
    _, without_place = carried(source)
    plan = replace(
        plan,
        left_out=(*source.around.left_out, *without_place),
        notes=(*source.around.notes, *plan.notes, *_read_whole(source, plan, options.max_memory)),
    )
    return Conversion(source, layout, plan, options)


def _read_whole(source: Source, plan: Plan, max_memory: int) -> list[str]:
    """A line for the leaf with the largest part that cannot be read in less memory."""
    read = {path for op in plan.made.values() for path in op.sources()}
    large = [path for path in read if source.tree.leaves[path].nbytes > max_memory // _SHARES]
    path = max(large, key=source.piece, default=None)
    if path is None or source.piece(path) <= max_memory // _SHARES:
        return []
    size = f"{show_path(path)} is stored in parts of {source.piece(path)} bytes, each of which is read whole"
    return [f"{size}: memory may exceed the {max_memory} bytes asked for"]


def state_in(source: Source, options: ConversionOptions) -> tuple[Path, Tree]:
    """Where in a source the training state is, and it as a tree; () and all of it as a rule.

    Raises:
      CheckpointLayoutError: nothing is at the place that was asked for, or several states could be meant.
    """
    place = place_in(source.tree, source.metadata, options.place, source.path)
    return place, below(source.tree, place)


def _require_variables(tree: Tree, kind: Kind, path: FilePath) -> None:
    """A layout that somebody says and that is none of this tree would find no variable in it, and convert nothing."""
    needs_params = kind in (Kind.LINEN_TRAIN_STATE, Kind.LINEN_NESTED_TRAIN_STATE)
    if needs_params and not any(path[0] == "params" for path in tree.leaves if path):
        raise CheckpointLayoutError(
            f"the checkpoint is no {kind.value}, as it is said to be",
            path,
            expected="the key 'params'",
            found=", ".join(dict.fromkeys(show_path(path[:1]) for path in tree.leaves)),
            hint="If it lies deeper, say where: at=... (--at PATH).",
        )


def open_conversion(source: str | FilePath, **options: Any) -> Conversion:
    """Open a checkpoint and plan its conversion; no array is read. Use as a context manager.

    Args:
      source: as for `convert`.
      options: the fields of `ConversionOptions`; `to` at least.

    Raises: what `convert` raises before it writes.

    Example::

        with open_conversion("run/linen", to="nnx") as conversion:
            print(conversion.layout.reason, conversion.plan.rows()[0])
    """
    return Conversion.open(source, ConversionOptions(**options))


def convert(
    source: str | FilePath,
    target_path: str | FilePath,
    *,
    to: Literal["nnx", "linen"],
    rules: LeafRules | None = None,
    target: Any = None,
    source_format: str | None = None,
    target_format: str = "orbax",
    step: int | None = None,
    item: Items | None = None,
    at: str | Path | None = None,
    outside: Literal["keep", "drop"] = "keep",
    kind: Kind | None = None,
    max_memory: int = MAX_MEMORY,
    resume: bool = False,
    verify: bool = True,
    check: Check | None = None,
    lossy: bool = False,
    unproven: bool = False,
    rng: str | int = "drop",
    tx: Any = None,
    known: Known | None = None,
    job: Job | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert the checkpoint at `source` to Linen's or NNX's layout and write it to `target_path`.

    Args:
      source: a checkpoint of any format that `open_source` reads. It is not touched.
      target_path: where the result goes; must not exist.
      to: 'nnx' or 'linen'.
      rules: what becomes of the variables' names and values: `read_rules("file.toml")`, or `derive(...)`.
      target: a model, or a tree, State or TrainState, abstract or not, that the result must fit.
      max_memory: bytes of leaves in memory at once.
      job: the processes that convert together: `Job.join(...)`, `Job.of_jax()`. Each makes the same call.
      lossy: go on if leaves have no place in the target, or number types change, though no rule says so.
      unproven: take derived rules that are not proven; the report and the target's metadata say so.
      The others, and these in full: the fields of `ConversionOptions`.

    Raises:
      OptionError: an option has a value that means nothing.
      UnprovenRulesError: the rules were derived and are not proven, without `unproven`.
      LossyConversionError: something would be lost, and neither a rule nor `lossy` says that it may.
      VariablesMismatchError: the result does not fit `target`.
      CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError: the source cannot be used.
      CheckpointChangedError: somebody wrote to the source while it was read.
      CheckpointAccessError: a path is a URL, or may not be read or written.
      CheckpointExistsError: there is something at `target_path`.
      CheckpointWriteError: disk full, no permission, an unfinished conversion that is not to be resumed, ...
      JobError: another process of the job has ended, or was asked for something else.
      VerificationError: what was written reads differently, or `check` fails; it is set aside, as
        `NAME.failed-verification`.
      There is nothing at `target_path` then.

    Example::

        report = convert("run/linen/12", "run/nnx/12", to="nnx", rules=read_rules("names.toml"))
        print(report.leaves, report.seconds)
    """
    options = ConversionOptions(
        to=to,
        rules=rules,
        target=target,
        source_format=source_format,
        target_format=target_format,
        step=step,
        item=item,
        at=at,
        outside=outside,
        kind=kind,
        max_memory=max_memory,
        resume=resume,
        verify=verify,
        check=check,
        lossy=lossy,
        unproven=unproven,
        rng=rng,
        tx=tx,
        known=known,
        job=job or Job(),
        progress=progress,
    )
    with Conversion.open(source, options) as conversion:
        return conversion.run(target_path)


def require_apart(path: FilePath, source: FilePath) -> None:
    """The target may lie beside the source's folder, never in it: nothing there is to be touched."""
    here, there = (place if is_on_store(place) else place.resolve() for place in (path, source))
    if here == there or there in here.parents:
        raise CheckpointExistsError(
            "the target is inside the source", path, expected="a path outside of it", found=f"the source {there}"
        )


def _asking(options: ConversionOptions) -> Progress:
    """`progress` of the options. Whenever it is told, the other processes of the job are asked if they are there."""

    def tell(doing: str, done: int, total: int) -> None:
        options.job.check()
        if options.progress is not None:
            options.progress(doing, done, total)

    return tell


def _told(job: Job, sink: Sink, hashes: dict[Path, str], resumed: int) -> tuple[dict[Path, str], int]:
    """The hashes of all leaves and the number of those resumed, of all processes; the first sink takes their leaves."""
    if job.count == 1:
        return hashes, resumed
    told = job.gather(json.dumps([hash_table(hashes), resumed, sink.told() if job.rank else []]))
    if job.rank:
        sink.__exit__(None, None, None)  # whatever is open would be in the way of the first
    job.gather()
    whole: dict[Path, str] = {}
    for table, _, records in map(json.loads, told):
        whole |= {tuple(keys): digest for keys, digest in table}
        if job.rank == 0:
            sink.take(records)
    return whole, sum(count for _, count, _ in map(json.loads, told))


def _verify(path: FilePath, hashes: dict[Path, str], only: Collection[Path], options: ConversionOptions) -> None:
    try:
        written = open_source(path, format=options.target_format)
    except CheckpointCorruptError as error:
        raise VerificationError(path, {}, f"it cannot be opened: {error}") from error
    with closing(written):
        budget = options.max_memory // 2
        verify_source(written, hashes, only=only, max_memory=budget, progress=_asking(options))


def _require_check(check: Check, source: FilePath, path: FilePath) -> None:
    name = getattr(check, "__qualname__", type(check).__qualname__)
    try:
        passed = check(source, path)
    except AssertionError as error:
        raise VerificationError(path, {}, f"the check {name} fails: {error}") from error
    if passed is False:
        raise VerificationError(path, {}, f"the check {name} says no")


@contextmanager
def _unchanged(source: Source) -> Iterator[None]:
    """What is read in here is of one checkpoint: damage that comes of a change is reported as the change."""
    try:
        yield
    except CheckpointCorruptError:
        source.require_unchanged()
        raise
    source.require_unchanged()


@contextmanager
def _no_name_if_wrong(path: FilePath, job: Job) -> Iterator[None]:
    """A target that fails verification does not keep its name, by which someone could take it for whole."""
    try:
        yield
    except VerificationError as error:
        job.gather(str(error))
        error.add_note(f"It is now at {_set_aside_once(path, job)}")
        raise
    wrong = [f"process {rank} of the job: {text}" for rank, text in enumerate(job.gather()) if text]
    if wrong:
        raise VerificationError(path, {}, f"{wrong[0]}\nIt is now at {_set_aside_once(path, job)}")


def _set_aside_once(path: FilePath, job: Job) -> str:
    """Where the first process of a job has put what all of them know to be wrong."""
    return job.gather("" if job.rank else str(_set_aside(path)))[0]


def _set_aside(path: FilePath) -> FilePath:
    """Rename a checkpoint, and the metadata beside it, if it has such a file."""
    aside = path.with_name(path.name + _UNVERIFIED)
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}{_UNVERIFIED}-{number}")
    path.rename(aside)
    beside = path.with_name(path.name + ".metadata.json")
    if beside.exists():
        beside.rename(aside.with_name(aside.name + ".metadata.json"))
    return aside
