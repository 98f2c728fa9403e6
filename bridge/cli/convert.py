"""`linen-nnx convert`: a checkpoint from Linen's layout to NNX's, or back.

Law: what will be made of what is known, shown and checked before the first array is read; with `--json` stdout holds
one JSON document; the exit code is 0 only if nothing was lost or changed that nobody spoke of.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge._errors import listed, show_path
from bridge.cli.help import choices
from bridge.cli.inspect import describe_source, print_source
from bridge.cli.models import Models, check_of, read_models, target_of, transformation, write_rules
from bridge.cli.show import Json, console, human_bytes, plain, print_json, print_table, progress_bar
from bridge.cli.words import ITEM_HELP, SourceFormat, parse_bytes, parse_items, parse_job, parse_rng

if TYPE_CHECKING:
    from bridge.checkpoint.conversion import Conversion, ConvertReport
    from bridge.checkpoint.formats.protocol import Source
    from bridge.checkpoint.job import Job
    from bridge.checkpoint.options import ConversionOptions
    from bridge.checkpoint.steps import StepsReport
    from bridge.checkpoint.tree.layout import Kind

_LOSSY, _UNPROVEN, _INTERRUPTED = 1, 4, 130


class To(enum.StrEnum):
    """The layouts to convert to."""

    NNX = "nnx"
    LINEN = "linen"


class TargetFormat(enum.StrEnum):
    """The formats that can be written."""

    ORBAX = "orbax"
    ORBAX_V1 = "orbax-v1"
    SAFETENSORS = "safetensors"
    MSGPACK = "msgpack"


class LayoutName(enum.StrEnum):
    """The layouts of `bridge.checkpoint.Kind`, as words; the same names."""

    LINEN_TRAIN_STATE = "linen-train-state"
    LINEN_NESTED_TRAIN_STATE = "linen-nested-train-state"
    LINEN_VARIABLES = "linen-variables"
    PARAMS_ONLY = "params-only"
    NNX_STATE = "nnx-state"
    NNX_TRAINING = "nnx-training"

    @property
    def kind(self) -> Kind:
        """The layout that it is the word for."""
        from bridge.checkpoint.tree.layout import Kind

        return Kind[self.name]


# The options whose texts take more than a line.
_To = Annotated[To, typer.Option(metavar="LAYOUT", help=f"The layout to write: {choices(To)}.")]
_Rules = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, metavar="FILE", help="TOML: new names, and what is done to values."),
]
_SaveRules = Annotated[Path | None, typer.Option(metavar="FILE", help="Write derived rules there, from Linen to NNX.")]
_Inputs = Annotated[
    list[str], typer.Option("--input", metavar="INPUT", help="An input of both models, as 2,28,28,1:float32.")
]
_Keywords = Annotated[
    list[str], typer.Option("--keyword", metavar="NAME=VALUE", help="A keyword of both, as train=False.")
]
_TargetFormat = Annotated[
    TargetFormat, typer.Option("--format", metavar="FORMAT", help=f"What to write: {choices(TargetFormat)}.")
]
_SourceFormat = Annotated[
    SourceFormat | None,
    typer.Option(metavar="FORMAT", help=f"What SRC is, instead of detecting it: {choices(SourceFormat)}."),
]
_Layout = Annotated[
    LayoutName | None,
    typer.Option(metavar="LAYOUT", help=f"The layout of SRC, instead of detecting it: {choices(LayoutName)}."),
]
_Job = Annotated[
    str,
    typer.Option(metavar="HOST:PORT,RANK,COUNT", help="One of COUNT processes that convert together."),
]
_Check = Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="Called last, with SRC and DST.")]
_Rng = Annotated[str, typer.Option(metavar="STREAMS", help="What becomes of random streams: drop, keep, seed=N.")]


def _stream() -> None:
    """This process does nothing but stream leaves, from before a checkpoint is opened."""
    from bridge.checkpoint.stream import share_freed_memory

    share_freed_memory()


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any format. It is not touched.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Where the result goes; must not exist.")],
    to: _To,
    rules: _Rules = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="The rules lead from DST to SRC: turn them.")] = False,
    save_rules: _SaveRules = None,
    linen: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The Linen module, to derive rules from.")] = "",
    nnx: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The NNX module; the result must fit it.")] = "",
    inputs: _Inputs = [],  # noqa: B006  typer makes a list of its own
    keywords: _Keywords = [],  # noqa: B006
    target_format: _TargetFormat = TargetFormat.ORBAX,
    source_format: _SourceFormat = None,
    layout: _Layout = None,
    step: Annotated[int | None, typer.Option(help="The step; the latest by default.")] = None,
    all_steps: Annotated[bool, typer.Option("--all-steps", help="Every step, into a folder of steps.")] = False,
    item: Annotated[list[str], typer.Option(metavar="NAME", help=ITEM_HELP)] = [],  # noqa: B006
    at: Annotated[str | None, typer.Option(metavar="PATH", help="Where in SRC the state is, as state or a/b.")] = None,
    drop_outside: Annotated[bool, typer.Option("--drop-outside", help="Leave out what is outside of it.")] = False,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="Leaves in memory at once, as 512MiB.")] = "2GiB",
    rng: _Rng = "drop",
    tx: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The optax transformation, for checks.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, from metadata only.")] = False,
    lossy: Annotated[bool, typer.Option("--lossy", help="Go on although something is lost or changed.")] = False,
    unproven: Annotated[bool, typer.Option("--unproven", help="Take derived rules that no run has proven.")] = False,
    job: _Job = "",
    verify_forward: _Check = "",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the result again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between Linen's and NNX's layout.

    Exit codes: 0 clean, 1 lossy or failed, 2 wrong usage, 3 not verified, 4 written by rules that are not proven.
    """
    from bridge.checkpoint.options import ConversionOptions

    if dry_run and verify_forward:
        raise typer.BadParameter("--verify-forward has nothing to check with --dry-run, which writes nothing")
    models = read_models(to.value, rules, inverse, linen, nnx, inputs, keywords, unproven)
    if save_rules is not None:
        write_rules(models.derived, save_rules)
    options = ConversionOptions(
        to=to.value,
        rules=models.rules,
        tx=transformation(tx),
        rng=parse_rng(rng),
        kind=layout and layout.kind,
        known=models.known,
        source_format=source_format and source_format.value,
        step=step,
        item=parse_items(item),
        at=at,
        outside="drop" if drop_outside else "keep",
        target_format=target_format.value,
        max_memory=parse_bytes(max_memory),
        resume=resume,
        verify=not no_verify,
        check=check_of(verify_forward),
        lossy=lossy,
        unproven=unproven,
    )
    raise typer.Exit(_together(job, all_steps, source, target, options, models, dry_run, quiet, as_json))


def _together(
    job: str,
    all_steps: bool,
    source: Path,
    target: Path,
    options: ConversionOptions,
    models: Models,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Convert one step or all, by this process or with the others of its job, for which the first speaks."""
    work = _convert_steps if all_steps else _convert
    with _joined(job) as joined:
        options = replace(options, job=joined)
        quiet, as_json = quiet or joined.rank > 0, as_json and not joined.rank
        return work(source, target, options, models, dry_run=dry_run, quiet=quiet, as_json=as_json)


@contextmanager
def _joined(text: str) -> Iterator[Job]:
    """The job of which this process is a part, and whose others its errors end."""
    from bridge.checkpoint.job import Job

    address, rank, count = parse_job(text)
    with Job.join(address, rank, count) if count > 1 else Job() as job, job.together():
        yield job


def _convert(
    source: Path, target: Path, options: ConversionOptions, models: Models, *, dry_run: bool, quiet: bool, as_json: bool
) -> int:
    """Plan, show, and unless it is a dry run write; the exit code."""
    from bridge.checkpoint.conversion import plan_conversion, source_of

    _stream()
    with closing(source_of(source, options)) as opened:
        options = _fitting(opened, options, models)
        with progress_bar(quiet=quiet or as_json) as progress:
            conversion = _with_streams_told(plan_conversion(opened, options, progress), models)
        losses = [] if options.lossy else conversion.losses
        shown = _Show(conversion, target, losses, dry_run=dry_run)
        if not (quiet or as_json):
            shown.before()
        report = None if dry_run else _run(conversion, target, quiet=quiet or as_json)
        if as_json:
            print_json(shown.document(report))
        elif report is not None and not quiet:
            shown.after(report)
    return shown.exit_code


def _fitting(opened: Source, options: ConversionOptions, models: Models) -> ConversionOptions:
    """With the NNX model that was named as the target, beside an optimizer if the source has one."""
    from bridge.checkpoint.conversion import state_in

    if options.to != "nnx" or models.model is None:
        return options
    _, tree = state_in(opened, options)
    return replace(options, target=target_of(models.model, options.tx, options.rng, tree))


def _with_streams_told(conversion: Conversion, models: Models) -> Conversion:
    """What a model has and its checkpoint will not have: restoring it into all of the model's state fails."""
    import nnx_core

    if conversion.options.to != "nnx" or models.model is None or conversion.options.rng != "drop":
        return conversion
    streams = nnx_core.to_flat_state(nnx_core.state(models.model, nnx_core.RngState))
    if not streams:
        return conversion
    names = listed([show_path(path) for path, _ in streams], most=4)
    note = f"random streams of the model are not in the result: {names}. --rng seed=0 writes new ones, --rng keep SRC's"
    plan = replace(conversion.plan, notes=(*conversion.plan.notes, note))
    return replace(conversion, plan=plan)


def _convert_steps(
    source: Path, target: Path, options: ConversionOptions, models: Models, *, dry_run: bool, quiet: bool, as_json: bool
) -> int:
    """Plan all steps, and unless it is a dry run write them; a line or a row for each; the exit code."""
    from bridge.checkpoint.conversion import LossyConversionError, source_of
    from bridge.checkpoint.steps import StepsReport, planned_steps, run_steps

    _stream()
    with closing(source_of(source, replace(options, step=None))) as opened:
        options = _fitting(opened, options, models)
    losses = planned_steps(source, options)
    lost = [f"step {step}: {loss}" for step, lines in losses.items() for loss in lines]
    if lost and not (dry_run or options.lossy):
        raise LossyConversionError(source, lost)
    report = StepsReport(str(source), str(target))
    if not dry_run:
        with progress_bar(quiet=quiet or as_json) as progress:
            report = run_steps(source, target, replace(options, progress=progress))
    unproven = getattr(options.rules, "unproven", "")
    exit_code = _LOSSY if lost and not options.lossy else _UNPROVEN if unproven else 0
    rows = [_step_row(step, lines, report) for step, lines in losses.items()]
    if as_json:
        document = {"source": str(source), "target": str(target), "dry_run": dry_run, "steps": rows}
        print_json({**document, "losses": lost, "unproven": unproven, "exit_code": exit_code})
    elif not quiet:
        for row in rows:
            typer.echo(f"step {row['step']}: {row['done']}")
        for line in lost:
            typer.echo(f"lost: {line}")
    return exit_code


def _step_row(step: int, losses: list[str], report: StepsReport) -> dict[str, Any]:
    """What became of one step, in JSON types."""
    if step in report.skipped:
        return {"step": step, "losses": losses, "done": "there already, and verified"}
    done = report.converted.get(step)
    if done is None:
        return {"step": step, "losses": losses, "done": "planned"}
    words = "written and verified" if done.verified else "written"
    row = {"step": step, "losses": losses, "done": f"{words}: {done.target}", "target": done.target}
    left_out = [{"name": item.name, "why": item.why, "asked": item.asked} for item in done.plan.left_out]
    return {**row, "leaves": done.leaves, "nbytes": done.nbytes, "verified": done.verified, "left_out": left_out}


def _run(conversion: Conversion, target: Path, *, quiet: bool) -> ConvertReport:
    try:
        with progress_bar(quiet=quiet) as progress:
            return conversion.run(target, progress=progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: nothing at {target}. Go on with the same command and --resume.", err=True)
        raise typer.Exit(_INTERRUPTED) from None


# --- showing ------------------------------------------------------------------------------------------------


class _Show:
    """What the command prints about one conversion, as text or as one JSON document."""

    def __init__(self, conversion: Conversion, target: Path, losses: list[str], *, dry_run: bool):
        self.conversion, self.plan, self.dry_run = conversion, conversion.plan, dry_run
        self.target, self.losses = target, losses
        self.rows = self.plan.rows()
        self.exit_code = _LOSSY if losses else _UNPROVEN if self.plan.unproven else 0

    def before(self) -> None:
        """Source and target; for a dry run the table too, since it is all there is to see."""
        cells = list(map(_cells, self.rows))
        screen = console()
        print_source(screen, self.conversion.source, self.conversion.layout)
        target = f"target: {self.target} ({self.conversion.target_format}, {self.plan.target_layout.value})"
        screen.print(plain(target), soft_wrap=True)
        if self.dry_run:
            print_table(screen, ("source", "target", "shape", "dtype", "op", "bytes"), cells, right=("bytes",))
        remarks = [f"dropped: {show_path(path)}: {why}" for path, why in self.plan.dropped.items()]
        remarks += [f"left out: {item.name}: {item.why}" for item in self.plan.left_out]
        remarks += [f"warning: {text}" for text in self.plan.warnings]
        remarks += [f"note: {text}" for text in self.plan.notes]
        if self.plan.unproven:
            remarks.append(f"NOT PROVEN: {self.plan.unproven}")
        for text in remarks:
            screen.print(plain(text), soft_wrap=True)
        screen.print(plain(self.plan.summary()), soft_wrap=True)
        if self.dry_run and self.losses:
            lost = "Something would be lost or changed that no rule speaks of: see above. Exit code 1."
            screen.print(lost, soft_wrap=True)

    def after(self, report: ConvertReport) -> None:
        speed = human_bytes(int(report.nbytes / max(report.seconds, 1e-9)))
        resumed = f", {report.resumed} leaves from an earlier run" if report.resumed else ""
        done = "written and verified" if report.verified else "written"
        typer.echo(f"{done}: {report.target} in {report.seconds:.1f} s, {speed}/s{resumed}")
        if report.unproven:
            typer.echo("NOT PROVEN: before you use it, compare both models: linen-nnx compare --checkpoint")

    def document(self, report: ConvertReport | None) -> dict[str, Any]:
        """The same, and every row, as JSON types."""
        result = None
        if report is not None:
            result = {"verified": report.verified, "resumed": report.resumed, "seconds": report.seconds}
        return {
            "source": describe_source(self.conversion.source, self.conversion.layout),
            "target": {
                "path": str(self.target),
                "format": self.conversion.target_format,
                "layout": self.plan.target_layout.value,
                "nbytes": self.plan.target.nbytes,
            },
            "dry_run": self.dry_run,
            "leaves": self.rows,
            "dropped": [
                {"path": list(path), "reason": why, "asked": path in self.plan.asked}
                for path, why in self.plan.dropped.items()
            ],
            "left_out": [{"name": item.name, "why": item.why, "asked": item.asked} for item in self.plan.left_out],
            "warnings": list(self.plan.warnings),
            "notes": list(self.plan.notes),
            "losses": self.losses,
            "unproven": self.plan.unproven,
            "result": result,
            "exit_code": self.exit_code,
        }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One leaf: source, target, shape, dtype, op, bytes."""
    sources = ", ".join(map(show_path, row["sources"]))
    shape = str(tuple(row["shape"]))
    return sources, show_path(row["target"]), shape, row["dtype"], row["op"], human_bytes(row["nbytes"])
