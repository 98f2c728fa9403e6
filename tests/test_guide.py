"""Every ```python block of README.md and of the migration guide runs, in order, one namespace a file.

A block whose info string is `python raises=SomeError` must raise that error. Files run in an empty folder, so
what a block writes is gone afterwards. `py`, `python3` and `pycon` are refused: such a block would never run.
"""

import linecache
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "migration_guide").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """One fenced block: its code, the file's line number of its first line, and the error it must raise."""

    code: str
    line: int
    raises: str | None


def blocks_of(text: str) -> list[Block]:
    blocks = []
    for token in MarkdownIt("commonmark").parse(text):
        match token.info.split() if token.type == "fence" else []:
            case ["python"]:
                blocks.append(Block(token.content, token.map[0] + 2, None))
            case ["python", option] if option.startswith("raises="):
                blocks.append(Block(token.content, token.map[0] + 2, option.removeprefix("raises=")))
            case [language, *_] if language.lower().startswith("py"):
                raise ValueError(f"line {token.map[0] + 1}: ```{token.info} is neither ```python nor raises=Error")
    return blocks


def run(file: Path) -> int:
    """Execute the blocks of `file`; a traceback shows the lines of the file itself. Returns how many ran."""
    module = types.ModuleType(f"guide_{file.stem}".replace("-", "_").replace(".", "_"))
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class up by its module
    linecache.checkcache(str(file))
    try:
        blocks = blocks_of(file.read_text())
        for block in blocks:
            code = compile("\n" * (block.line - 1) + block.code, str(file), "exec")
            if block.raises is None:
                exec(code, module.__dict__)
                continue
            with pytest.raises(Exception) as caught:  # noqa: PT011  the type is checked below, once it exists
                exec(code, module.__dict__)
            expected = eval(block.raises, module.__dict__)
            if not isinstance(caught.value, expected):
                raise caught.value
        return len(blocks)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_block_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run(file)
    assert ran or file.stem in ("README", "index"), f"{file.name} teaches nothing that runs"


def test_readme_shows_each_direction():
    code = "\n".join(block.code for block in blocks_of((ROOT / "README.md").read_text()))
    assert "bridge.ToNNX(" in code
    assert "bridge.to_linen(" in code


# ---- the runner itself can fail ----------------------------------------------------------------------------


@pytest.fixture
def guide(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "chapter.md"
        file.write_text(text)
        return file

    return write


def test_blocks_share_a_namespace_and_other_languages_are_left_alone(guide):
    text = "```python\na = 1\n```\n```bash\nrm x\n```\n- list\n\n  ```python\n  if a:\n      b = a + 1\n  ```\n"
    assert run(guide(text + "```python\nassert b == 2\n```\n")) == 3


def test_a_failing_block_fails_with_the_line_of_the_file(guide):
    with pytest.raises(ZeroDivisionError) as caught:
        run(guide("# Title\n\n```python\nx = 0\n1 / x\n```\n"))
    assert caught.traceback[-1].lineno + 1 == 5


def test_raises_passes_on_that_error_only(guide):
    own = "```python\nclass Own(ValueError): ...\n```\n```python raises=Own\nraise Own\n```\n"
    assert run(guide(own)) == 2
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run(guide("```python raises=ValueError\npass\n```\n"))
    with pytest.raises(KeyError):
        run(guide("```python raises=ValueError\n{}[0]\n```\n"))


@pytest.mark.parametrize("info", ["py", "pycon", "python3", "python raise=ValueError", "python no-run"])
def test_a_block_that_would_never_run_is_refused(guide, info):
    with pytest.raises(ValueError, match=f"line 2: ```{info} is neither"):
        run(guide(f"\n```{info}\npass\n```\n"))
