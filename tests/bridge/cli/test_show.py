"""Tables on terminals of any width, and in a pipe."""

import io

import pytest
from rich.console import Console

from bridge.cli.show import amount, print_table

HEADINGS = ("path", "shape", "dtype", "note")
ROWS = [
    ("params/encoder/layer_17/self_attention/query/kernel", (1024, 16, 64), "bfloat16", ""),
    ("step", (), "int32", "a count [of updates]"),
]


def printed(width, rows=ROWS, *, terminal=True):
    screen = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(screen, HEADINGS, rows)
    return screen.file.getvalue().splitlines()


def test_a_wide_terminal_shows_columns():
    rows = [line.split() for line in printed(120)]
    assert ["params/encoder/layer_17/self_attention/query/kernel", "(1024,", "16,", "64)", "bfloat16"] in rows
    assert ["step", "()", "int32", "a", "count", "[of", "updates]"] in rows


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_one_shows_a_row_in_lines_of_its_own_and_no_cell_breaks(width):
    lines = printed(width)
    assert lines[0] == ROWS[0][0]
    assert "  shape: (1024, 16, 64)" in lines[1]
    assert any(line.endswith("dtype: bfloat16") for line in lines[1:3])
    assert lines[-2 if width == 40 else -1].startswith("  shape: ()  dtype: int32")
    assert lines[-1].endswith("note: a count [of updates]")
    assert max(len(line) for line in lines[1:]) <= width


def test_the_width_where_columns_begin_to_fit():
    """At the least width that shows columns no cell is folded, and one column less shows lines."""
    least = next(width for width in range(40, 200) if "path" in "".join(printed(width)[:2]))
    assert any(line.split()[:1] == [ROWS[0][0]] for line in printed(least))
    assert len(printed(least)) == len(printed(200))
    assert printed(least - 1)[0] == ROWS[0][0]


def test_a_pipe_has_no_width():
    name = "a_very_long_module_name_" * 40
    lines = printed(80, [(f"params/{name}", (1,), "float32", name)], terminal=False)
    assert any(line.split() == [f"params/{name}", "(1,)", "float32", name] for line in lines)


@pytest.mark.parametrize("width", [40, 120])
def test_rows_that_show_what_is_wrong_are_red(width):
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    print_table(screen, HEADINGS, ROWS, bad={0})
    red = [line for line in screen.file.getvalue().splitlines() if "\x1b[31m" in line]
    assert ROWS[0][0] in red[0]
    assert not any("int32" in line for line in red)


def test_a_table_without_rows():
    assert "path" in "".join(printed(60, []))


def test_amounts_have_a_rate():
    assert amount("verifying", 1024, 4096, 512.0) == "1.0 KiB of 4.0 KiB, 512 B/s"
    assert amount("planning", 1, 6, None) == "step 1 of 6"
