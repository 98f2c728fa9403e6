"""How `--help` looks: panels where there is room for them, one option below the other where there is not.

Law: no word is cut or broken, on any width.
Knows typer and widths; knows nothing of commands.
"""

from __future__ import annotations

import enum
import shutil
import textwrap
from typing import Any

from typer.core import TyperCommand

# Below that, typer's columns break names of options and what may be chosen in the middle of words.
_PANELS = 80
_INDENT = " " * 4


def choices(of: type[enum.StrEnum]) -> str:
    """What an option may be, for its help text.

    >>> choices(enum.StrEnum("To", ["NNX", "LINEN"]))
    'nnx, linen'
    """
    return ", ".join(of)


class Command(TyperCommand):
    """A command whose help fits narrow terminals."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text, as panels or as plain lines."""
        width = shutil.get_terminal_size().columns
        if width >= _PANELS:
            super().format_help(ctx, formatter)
            return
        formatter.write(f"{self.get_usage(ctx)}\n")
        for paragraph in textwrap.dedent(self.help or "").split("\n\n"):
            formatter.write(f"\n{_wrapped(' '.join(paragraph.split()), width)}\n")
        for param in self.get_params(ctx):
            names, text = param.get_help_record(ctx) or ("", "")
            if names:
                formatter.write(f"\n{_wrapped(names, width)}\n{_wrapped(text, width, _INDENT)}\n")


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
