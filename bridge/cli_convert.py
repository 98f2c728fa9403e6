"""`linen-nnx convert`: a checkpoint from Linen's layout to NNX's, or back.

Law: what will be made of what is known, shown and checked before the first array is read; with `--json` stdout holds
one JSON document; the exit code is 0 only if nothing was lost or changed that nobody spoke of.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge._errors import show_path
from bridge.cli_inspect import describe_source, print_source
from bridge.cli_show import console, human_bytes, plain, print_json, progress_bar, table
from bridge.cli_words import load_attribute, parse_bytes, parse_input, parse_rng, users_code

if TYPE_CHECKING:
    from bridge.checkpoint.conversion import Conversion, ConvertReport

_LOSSY, _INTERRUPTED = 1, 130


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


class SourceFormat(enum.StrEnum):
    """The formats that can be read."""

    ORBAX = "orbax"
    ORBAX_V1 = "orbax-v1"
    SAFETENSORS = "safetensors"
    MSGPACK = "msgpack"
    NPZ = "npz"


class LayoutName(enum.StrEnum):
    """The layouts of `bridge.checkpoint.Kind`, as words; the same names."""

    LINEN_TRAIN_STATE = "linen-train-state"
    LINEN_NESTED_TRAIN_STATE = "linen-nested-train-state"
    LINEN_VARIABLES = "linen-variables"
    PARAMS_ONLY = "params-only"
    NNX_STATE = "nnx-state"
    NNX_TRAINING = "nnx-training"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any format. It is not touched.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Where the result goes; must not exist.")],
    to: Annotated[To, typer.Option(help="The layout to write.")],
    rules: Annotated[Path | None, typer.Option(help="TOML file: new names, and what is done to values.")] = None,
    linen: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The Linen module, to derive rules from.")] = "",
    nnx: Annotated[
        str, typer.Option(metavar="PKG.MOD:ATTR", help="The NNX module; the result is checked against.")
    ] = "",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="SHAPE:DTYPE", help="An input of both, as 2,28,28,1:float32.")
    ] = None,
    target_format: Annotated[TargetFormat, typer.Option("--format", help="What to write.")] = TargetFormat.ORBAX,
    source_format: Annotated[SourceFormat | None, typer.Option(help="What SRC is, instead of detecting it.")] = None,
    layout: Annotated[LayoutName | None, typer.Option(help="The layout of SRC, instead of detecting it.")] = None,
    step: Annotated[int | None, typer.Option(help="The step; the latest by default.")] = None,
    item: Annotated[str | None, typer.Option(help="The item of a composite checkpoint.")] = None,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="Leaves in memory at once, as 512MiB.")] = "2GiB",
    rng: Annotated[str, typer.Option(metavar="drop|keep|seed=N", help="What becomes of random streams.")] = "drop",
    tx: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The optax transformation, for checks.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, from metadata only.")] = False,
    lossy: Annotated[bool, typer.Option("--lossy", help="Go on although something is lost or changed.")] = False,
    verify_forward: Annotated[
        str, typer.Option(metavar="PKG.MOD:ATTR", help="A function of SRC and DST, called at the end: False is exit 3.")
    ] = "",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the result again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Convert a checkpoint between Linen's and NNX's layout. Exit codes: 0 clean, 1 lossy or failed, 3 not verified."""
    from bridge.checkpoint.conversion import open_conversion
    from bridge.checkpoint.layout import Kind
    from bridge.checkpoint.stream import share_freed_memory

    share_freed_memory()
    memory, options = parse_bytes(max_memory), {"rng": parse_rng(rng), "tx": _transformation(tx)}
    options |= {"source_format": source_format and source_format.value, "step": step, "item": item}
    options["target_format"] = target_format.value
    options |= _models(rules, linen, nnx, inputs or [], to)
    check = _check(verify_forward)
    if to is To.NNX and nnx:
        opening = {"format": options["source_format"], "step": step, "item": item}
        options["target"] = _target(options.pop("model"), options["tx"], options["rng"], _trains(source, opening))
    options.pop("model", None)
    with open_conversion(source, to=to.value, kind=layout and Kind[layout.name], **options) as conversion:
        losses = [] if lossy else conversion.losses
        shown = _Show(conversion, target, losses, dry_run=dry_run)
        if not (quiet or as_json):
            shown.before()
        report = None
        if not dry_run:
            steps = {"max_memory": memory, "resume": resume, "verify": not no_verify, "check": check, "lossy": lossy}
            report = _run(conversion, target, quiet=quiet or as_json, **steps)
        if as_json:
            print_json(shown.document(report))
        elif report is not None and not quiet:
            shown.after(report)
    raise typer.Exit(_LOSSY if losses else 0)


def _run(conversion: Conversion, target: Path, *, quiet: bool, **options: Any) -> ConvertReport:
    try:
        with progress_bar(quiet=quiet) as progress:
            return conversion.run(target, progress=progress, **options)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: nothing at {target}. Go on with the same command and --resume.", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def _models(rules: Path | None, linen: str, nnx: str, inputs: list[str], to: To) -> dict[str, Any]:
    """What the rules file and the models say: `rules` and `known` of `open_conversion`, and the NNX `model`."""
    from bridge.checkpoint.live import of_object
    from bridge.checkpoint.rules import read_rules

    if linen and not (nnx and inputs):
        raise typer.BadParameter("--linen needs --nnx and at least one --input: rules are derived from both models")
    if inputs and not linen:
        raise typer.BadParameter("--input is for --linen and --nnx: it is what both are called with")
    found: dict[str, Any] = {"rules": None if rules is None else read_rules(rules)}
    model = found["model"] = _nnx_model(nnx) if nnx else None
    if to is To.LINEN and model is not None:
        found["known"] = of_object(model).known
    if linen:
        derived = _derived(linen, model, [parse_input(text) for text in inputs], to)
        found["rules"] = derived if rules is None else found["rules"].then(derived.rules())
    return found


def _derived(linen: str, model: Any, inputs: list[Any], to: To) -> Any:
    from flax import linen as nn

    from bridge.checkpoint.derivation import derive

    module = load_attribute(linen)
    if callable(module) and not isinstance(module, nn.Module):
        with users_code(f"{linen!r} is no Linen module and cannot be called without arguments"):
            module = module()
    if not isinstance(module, nn.Module):
        raise typer.BadParameter(f"{linen!r} is no Linen module, and no function that makes one")
    with users_code("the models cannot be called with these inputs"):
        derived = derive(module, model, *inputs)
    return derived if to is To.NNX else derived.inverse()


def _nnx_model(reference: str) -> Any:
    """The NNX module that `--nnx` names, abstract if it is made here: a class or a function that takes `rngs`."""
    import inspect

    import nnx_core

    found = load_attribute(reference)
    if callable(found) and not isinstance(found, nnx_core.Module):
        with users_code(f"{reference!r} cannot be made, abstractly, from `rngs` or from nothing"):
            make, takes = found, inspect.signature(found).parameters
            found = nnx_core.eval_shape(lambda: make(rngs=nnx_core.Rngs(0)) if "rngs" in takes else make())
    if not isinstance(found, nnx_core.Module):
        raise typer.BadParameter(f"{reference!r} is no NNX module, and no class or function (of rngs) that makes one")
    return found


def _trains(source: Path, opening: dict[str, Any]) -> bool:
    """Whether the checkpoint holds an optimizer's state beside the model."""
    from contextlib import closing

    from bridge.checkpoint import layout
    from bridge.checkpoint.files import open_source

    with closing(open_source(source, **opening)) as opened:
        paths = [*opened.tree.leaves, *opened.tree.empty]
    tops = {path[0] for path in paths if path}
    return layout.detect(paths).kind is layout.Kind.NNX_TRAINING or bool(tops & {"opt_state", "step"})


def _target(model: Any, tx: Any, rng: str | int, trains: bool) -> Any:
    """What the result must fit: the model, and with `--tx` its optimizer. None where only `--tx` could tell.

    Random streams are part of it if `--rng` says where they come from: a Linen checkpoint has none.
    """
    import nnx_core

    if trains and tx is None:
        return None
    state = nnx_core.state(model, nnx_core.Not(nnx_core.RngState) if rng == "drop" else ...)
    if not trains:
        return state
    optimizer = nnx_core.eval_shape(lambda model: nnx_core.Optimizer(model, tx, wrt=nnx_core.Param), model)
    return {"model": state, "optimizer": nnx_core.state(optimizer)}


def _check(reference: str) -> Any:
    """What `--verify-forward` names: a function of two paths. Whatever it raises is a check that failed."""
    if not reference:
        return None
    found = load_attribute(reference)
    if not callable(found):
        raise typer.BadParameter(f"{reference!r} is no function of two paths, SRC and DST")

    def check(source: Path, target: Path) -> object:
        try:
            return found(source, target)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    check.__qualname__ = reference
    return check


def _transformation(reference: str) -> Any:
    """What `--tx` names: an optax transformation, or a function without arguments that makes one."""
    if not reference:
        return None
    found = load_attribute(reference)
    if callable(found):
        with users_code(f"{reference!r} cannot be called without arguments"):
            found = found()
    if not (hasattr(found, "init") and hasattr(found, "update")):
        raise typer.BadParameter(f"{reference!r} is no optax transformation: it has no init and update")
    return found


# --- showing ------------------------------------------------------------------------------------------------


class _Show:
    """What the command prints about one conversion, as text or as one JSON document."""

    def __init__(self, conversion: Conversion, target: Path, losses: list[str], *, dry_run: bool):
        self.conversion, self.plan, self.dry_run = conversion, conversion.plan, dry_run
        self.target, self.losses = target, losses
        self.rows = self.plan.rows()

    def before(self) -> None:
        """Source and target; for a dry run the table too, since it is all there is to see."""
        sources = [", ".join(show_path(path) for path in row["sources"]) for row in self.rows]
        targets = [show_path(row["target"]) for row in self.rows]
        texts = (sources, targets, [row["op"] for row in self.rows])
        screen = console(sum(max(map(len, column), default=0) for column in texts))
        print_source(screen, self.conversion.source, self.conversion.layout)
        screen.print(plain(f"target: {self.target} ({self.conversion.target_format}, {self.plan.target_layout.value})"))
        if self.dry_run:
            listed = table("source", "target", "shape", "dtype", "op", "bytes", right=("bytes",))
            for row, source, made in zip(self.rows, sources, targets, strict=True):
                last = (tuple(row["shape"]), row["dtype"], row["op"], human_bytes(row["nbytes"]))
                listed.add_row(*map(plain, (source, made, *last)))
            screen.print(listed)
        dropped = [f"dropped: {show_path(path)}: {why}" for path, why in self.plan.dropped.items()]
        warned = [f"warning: {text}" for text in self.plan.warnings]
        for text in (*dropped, *warned, *(f"note: {text}" for text in self.plan.notes)):
            screen.print(plain(text), soft_wrap=True)
        screen.print(plain(self.plan.summary()), soft_wrap=True)
        if self.dry_run and self.losses:
            screen.print("Something would be lost or changed that no rule speaks of: see above. Exit code 1.")

    def after(self, report: ConvertReport) -> None:
        speed = human_bytes(int(report.nbytes / max(report.seconds, 1e-9)))
        resumed = f", {report.resumed} leaves from an earlier run" if report.resumed else ""
        done = "written and verified" if report.verified else "written"
        typer.echo(f"{done}: {report.target} in {report.seconds:.1f} s, {speed}/s{resumed}")

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
            "warnings": list(self.plan.warnings),
            "notes": list(self.plan.notes),
            "losses": self.losses,
            "result": result,
            "exit_code": _LOSSY if self.losses else 0,
        }
