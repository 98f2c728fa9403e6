"""What the tests of the guide read and a site does not: `python raises=SomeError` is Python to it."""

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page as it is shown; called by mkdocs."""
    lines = markdown.splitlines()
    return "\n".join("```python" if line.startswith("```python raises=") else line for line in lines)
