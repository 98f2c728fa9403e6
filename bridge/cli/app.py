"""The command `linen-nnx`: arguments in, functions of `bridge` called, tables out.

Law: a BridgeError is shown as its text, without a traceback; exit codes are 0 done, 1 an error of `bridge` or something
would be lost, 2 wrong usage, 3 verification failed or models differ, 130 Ctrl-C; nothing that was read is changed.
With `--json` stdout holds one document, of errors and wrong usage too.
Knows which commands there are; what they do is in the rooms below, imported when one runs.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bridge._errors import BridgeError
from bridge._versions import version_of
from bridge.cli.compare import compare
from bridge.cli.convert import convert
from bridge.cli.demo import demo
from bridge.cli.diff import diff, verify
from bridge.cli.help import Command
from bridge.cli.inspect import inspect
from bridge.cli.show import print_json

_EXIT_ERROR, _EXIT_USAGE, _EXIT_UNVERIFIED, _EXIT_INTERRUPTED = 1, 2, 3, 130
# What click raises for wrong usage. Newer typers carry click inside themselves, under no public name.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

_NAME = "linen-nnx"
_OPTION = re.compile(r"--[a-z][a-z-]*[a-z]")

app = typer.Typer(
    name=_NAME,
    help="Move Flax models and their checkpoints between Linen and NNX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (inspect, convert, compare, diff, verify, demo):
    app.command(cls=Command)(command)


def _show_versions(asked: bool) -> None:
    if asked:
        typer.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Move Flax models and their checkpoints between Linen and NNX."""


def versions() -> dict[str, str]:
    """Versions of this package, of what it stands on, and of Python; 'unknown' for one that is not installed.

    >>> list(versions())
    ['linen-nnx-bridge', 'jax', 'flax', 'python']
    """
    packages = {name: version_of(name) for name in ("linen-nnx-bridge", "jax", "flax")}
    return {**packages, "python": platform.python_version()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; with `--json`, an error of `bridge` is a JSON document on stdout too.

    Args:
        arguments: the words after the program's name; those of the process by default.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in words
    try:
        code = app(args=words, prog_name=_NAME, standalone_mode=not as_json) or 0
        if code == _EXIT_INTERRUPTED:
            print_json({"error": "KeyboardInterrupt", "message": "interrupted", "exit_code": code})
        raise SystemExit(code)
    except _UsageError as error:  # with `--json` alone; without it typer has shown it already
        print_json({"error": "UsageError", "message": error.format_message(), "exit_code": _EXIT_USAGE})
        error.show()
        raise SystemExit(_EXIT_USAGE) from None
    except BridgeError as error:
        code = _exit_code(error)
        message = "\n".join([str(error), *getattr(error, "__notes__", ())])
        message += _of_other_commands(message, words)
        if as_json:
            print_json({"error": type(error).__name__, "message": message, "exit_code": code})
        typer.echo(f"error: {message}", err=True)
        raise SystemExit(code) from None


def _exit_code(error: BridgeError) -> int:
    from bridge.checkpoint.options import OptionError
    from bridge.checkpoint.verification import VerificationError

    if isinstance(error, OptionError):
        return _EXIT_USAGE
    return _EXIT_UNVERIFIED if isinstance(error, VerificationError) else _EXIT_ERROR


def options() -> dict[str, set[str]]:
    """The options of each command, as they are written.

    >>> "--lossy" in options()["convert"], "--lossy" in options()["diff"]
    (True, False)
    """
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group: there are several
    names = {name: [word for param in each.params for word in param.opts] for name, each in commands.items()}
    return {name: {word for word in words if word.startswith("-")} for name, words in names.items()}


def _of_other_commands(message: str, words: Sequence[str]) -> str:
    """A line for each option that a message names and the command lacks: rooms below know no commands."""
    commands = options()
    command = next((word for word in words if word in commands), "")
    text = ""
    for option in dict.fromkeys(_OPTION.findall(message)):
        having = [name for name, known in commands.items() if option in known]
        if command and having and command not in having:
            text += f"\n{option} is an option of {' and '.join(having)}, not of {command}."
    return text
