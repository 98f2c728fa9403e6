"""Every example runs, at small size, and asserts its own numbers; its notebook holds what the example holds."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.mark.slow
@by_name
def test_an_example_runs(example, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--quick"])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def cells(source: str) -> list[tuple[str, str]]:
    """(kind, text) of the cells of a script in the percent format."""
    found = []
    for part in source.split("# %%")[1:]:
        first, _, text = part.partition("\n")
        kind = "markdown" if first.strip() == "[markdown]" else "code"
        if kind == "markdown":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())
        found.append((kind, text.strip()))
    return found


@by_name
def test_its_notebook_holds_the_same(example):
    notebook = json.loads((example.parent / "notebooks" / f"{example.stem}.ipynb").read_text())
    held = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert held == cells(example.read_text()), "python -m docs.notebooks"


def test_there_is_no_notebook_without_an_example():
    notebooks = {path.stem for path in (EXAMPLES[0].parent / "notebooks").glob("*.ipynb")}
    assert notebooks == {path.stem for path in EXAMPLES}
