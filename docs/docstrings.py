"""Docstrings as griffe wants them: our `Example:` is its `Examples:`, and an example without a heading is code."""

import inspect
from itertools import groupby
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Rewrites every docstring of the packages; named in mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each object, once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = readable(inspect.cleandoc(obj.docstring.value))


def readable(text: str) -> str:
    """`text` with its examples under a heading, or fenced."""
    paragraphs = [
        list(lines) for is_text, lines in groupby(text.splitlines(), key=lambda line: bool(line.strip())) if is_text
    ]
    return "\n\n".join("\n".join(paragraph(lines)) for lines in paragraphs)


def _is_text(line: str) -> bool:
    return bool(line.strip())


def paragraph(lines: list[str]) -> list[str]:
    """One paragraph."""
    if lines[0] in ("Example:", "Examples:"):
        return ["Examples:", *lines[1:]]
    first = next((n for n, line in enumerate(lines) if line.startswith(">>>")), None)
    if first is None:
        return lines
    return [*lines[:first], "", "```python", *lines[first:], "```"]
