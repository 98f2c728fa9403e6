"""`linen-nnx compare`: whether two models compute the same, and where they part.

Law: exits with 0 only if all that was compared is equal, and 3 if something is not; what was left out is printed; an
option that cannot be honoured is wrong usage. Changes no model and no checkpoint; writes the page alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.models import transformation
from bridge.cli.show import Json, console, plain, print_json, print_table
from bridge.cli.words import load_attribute, parse_input, parse_keyword, users_code

if TYPE_CHECKING:
    from bridge.cli.sides import Sides, Source
    from bridge.equivalence.inputs import Inputs
    from bridge.equivalence.report import Report
    from bridge.equivalence.tables import Table

_NOT_EQUAL = 3


# The options whose texts take more than a line.
_Inputs = Annotated[
    list[str], typer.Option("--input", metavar="INPUT", help="f32[2,28,28,1], i32[2,16], or a file batch.npz.")
]
_Keywords = Annotated[
    list[str], typer.Option("--keyword", metavar="NAME=VALUE", help="A keyword of both, as train=False.")
]
_Rngs = Annotated[
    list[str], typer.Option("--rng", metavar="STREAM=SEED", help="A random stream of both, as dropout=0.")
]
_Methods = Annotated[
    list[str], typer.Option("--method", metavar="NAME", help="Called instead of __call__; twice: of a, of b.")
]
_Checkpoint = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Values of the Linen module; random ones without.")
]
_Rules = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, metavar="FILE", help="TOML: from Linen's names to NNX's; derived without."
    ),
]
_Seeds = Annotated[
    int | None, typer.Option(min=1, metavar="COUNT", help="How many draws of random inputs; 2 by default.")
]
_Steps = Annotated[int, typer.Option(min=0, metavar="COUNT", help="How many training steps to compare.")]


def compare(
    linen: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The Linen module.")] = "",
    nnx: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The NNX module; it takes Linen's values.")] = "",
    a: Annotated[str, typer.Option("--a", metavar="PKG.MOD:ATTR", help="Any model, or a function.")] = "",
    b: Annotated[str, typer.Option("--b", metavar="PKG.MOD:ATTR", help="Another.")] = "",
    inputs: _Inputs = [],  # noqa: B006  typer makes a list of its own
    keywords: _Keywords = [],  # noqa: B006
    rngs: _Rngs = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    checkpoint: _Checkpoint = None,
    rules: _Rules = None,
    seeds: _Seeds = None,
    steps: _Steps = 0,
    tx: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="The optax transformation of the steps.")] = "",
    loss: Annotated[str, typer.Option(metavar="PKG.MOD:ATTR", help="Trained on: (output, inputs) -> scalar.")] = "",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page there; must not exist.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict alone.")] = False,
    as_json: Json = False,
) -> None:
    """Run two models on the same values and inputs: outputs, gradients, state, training, and layer by layer.

    Exit codes: 0 equal, 1 an error, 2 wrong usage, 3 not equal.
    """
    from bridge.cli.sides import Source, any_two, linen_and_nnx

    _require_two(linen, nnx, a, b)
    if html is not None:
        _require_place(html)
    call = _call(inputs, keywords)
    options = {"seeds": _seeds(seeds, call), "rngs": _streams(rngs), **_training(steps, tx, loss)}
    source = Source(call.args, call.kwargs, _methods(method), checkpoint, rules)
    with _doing("making both models", quiet=quiet or as_json), _aside(as_json):
        sides = linen_and_nnx(linen, nnx, source) if linen else any_two(a, b, source)
    if method and not any(side.is_linen or side.is_nnx for side in (sides.a, sides.b)):
        raise typer.BadParameter("--method is for models: both are functions")
    with _doing("comparing", quiet=quiet or as_json), _aside(as_json):
        report = _compared(sides, source, options)
    report = replace(report, notes=(*sides.notes, *report.notes))
    if html is not None:
        report.save_html(html)
    code = 0 if report.equal else _NOT_EQUAL
    if as_json:
        page = None if html is None else str(html)
        print_json({**report.as_dict(), "html": page, "exit_code": code})
    else:
        _print(report, html, quiet=quiet)
    raise typer.Exit(code)


# ---- what was asked ----------------------------------------------------------------------------------------


def _require_two(linen: str, nnx: str, a: str, b: str) -> None:
    options = tuple(name for name, text in (("--linen", linen), ("--nnx", nnx), ("--a", a), ("--b", b)) if text)
    if options not in (("--linen", "--nnx"), ("--a", "--b")):
        named = " and ".join(options) or "none"
        raise typer.BadParameter(f"two models are compared: --linen and --nnx, or --a and --b; given: {named}")


def _require_place(html: Path) -> None:
    from bridge.equivalence.page import PageExistsError, PageWriteError, require_place

    try:
        require_place(html)
    except (PageExistsError, PageWriteError) as error:
        raise typer.BadParameter(f"--html: {error}") from None


def _training(steps: int, tx: str, loss: str) -> dict[str, Any]:
    if bool(steps) != bool(tx):
        raise typer.BadParameter("--steps and --tx go together: so many steps, with that transformation")
    if loss and not steps:
        raise typer.BadParameter("--loss is for --steps: the loss that is trained on")
    options: dict[str, Any] = {"steps": steps, "tx": transformation(tx)}
    if loss:
        options["loss"] = load_attribute(loss)
        if not callable(options["loss"]):
            raise typer.BadParameter(f"{loss!r} is no function of the output")
    return options


def _seeds(count: int | None, call: Inputs) -> tuple[int, ...]:
    if count is not None and not call.is_drawn:
        raise typer.BadParameter("--seeds: no input is drawn at random, all of them are arrays of a file")
    return tuple(range(2 if count is None else count))


def _call(inputs: Sequence[str], keywords: Sequence[str]) -> Inputs:
    """Positional arguments and keywords of both calls."""
    import inspect

    from bridge.equivalence.compare import compare as run
    from bridge.equivalence.inputs import inputs_of

    if not inputs:
        raise typer.BadParameter("--input is needed: what both models are called with, such as f32[2,28,28,1]")
    call = inputs_of([_input(text) for text in inputs], dict(map(parse_keyword, keywords)))
    taken = [name for name in call.kwargs if name in inspect.signature(run).parameters]
    if taken:
        raise typer.BadParameter(f"--keyword {taken[0]}=...: compare has an option of that name; wrap the models")
    return call


def _input(text: str) -> Any:
    import jax

    if text.endswith(".npz"):
        if not Path(text).is_file():
            raise typer.BadParameter(f"--input: there is no file at {text}")
        return Path(text)
    x = parse_input(text)
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise typer.BadParameter(f"{text!r}: JAX has no {x.dtype} unless it is told: set JAX_ENABLE_X64=1")
    return x


def _streams(texts: Sequence[str]) -> dict[str, Any] | None:
    """The key of each random stream; None if none is given."""
    import jax

    streams = {}
    for text in texts:
        name, equals, seed = text.partition("=")
        if not (name and equals and seed.isdecimal()):
            raise typer.BadParameter(f"{text!r} is no random stream with its seed, such as dropout=0")
        streams[name] = jax.random.key(int(seed))
    return streams or None


def _methods(names: Sequence[str]) -> tuple[str, str]:
    match names:
        case []:
            return "__call__", "__call__"
        case [one]:
            return one, one
        case [one, other]:
            return one, other
    raise typer.BadParameter("--method is given once for both models, or twice: of a, of b")


# ---- comparing and showing ---------------------------------------------------------------------------------


def _compared(sides: Sides, source: Source, options: dict[str, Any]) -> Report:
    from bridge.equivalence.compare import compare as run

    a, b = sides.a.subject, sides.b.subject
    with users_code("the models cannot be compared with these inputs"):
        return run(a, b, *source.inputs, rules=sides.rules, method=source.methods, **options, **source.keywords)


def _aside(as_json: bool) -> AbstractContextManager[Any]:
    """With `--json` stdout is for one document: what models print goes to stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


@contextmanager
def _doing(what: str, *, quiet: bool) -> Iterator[None]:
    """Says what is going on, on stderr, if that is a terminal."""
    from rich.console import Console

    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        yield
        return
    with screen.status(what):
        yield


def _print(report: Report, html: Path | None, *, quiet: bool) -> None:
    screen = console()
    color = "bold green" if report.equal else "bold red"
    screen.print(plain(report.headline), style=color)
    if quiet:
        return
    for line in (f"a: {report.a}", f"b: {report.b}", *report.notes):
        screen.print(plain(line), soft_wrap=True)
    if report.first is not None:
        screen.print(plain(f"they first part at {report.first.place}"), style=color, soft_wrap=True)
        screen.print(plain(report.first.text), soft_wrap=True)
    for each in report.tables():
        _print_table(screen, each)
    for text in report.not_compared:
        screen.print(plain(f"not compared: {text}"), soft_wrap=True)
    screen.print(plain(report.origin), soft_wrap=True)
    if html is not None:
        screen.print(plain(f"page: {html}"), soft_wrap=True)


def _print_table(screen: Any, each: Table) -> None:
    title = f"{each.title}: {each.note}" if each.note else each.title
    screen.print(plain(title), soft_wrap=True)
    if each.rows:
        print_table(screen, each.headings, each.rows, tuple(each.right), each.bad)
