"""What a report says, as text and as JSON; of reports that were put together by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from bridge.equivalence.numbers import Difference, difference
from bridge.equivalence.report import Finding, Parting, Report, Row

SAME = difference(np.float32([1, 2]), np.float32([1, 2]))
NEAR = difference(np.float32([1, 2.0000005]), np.float32([1, 2]))
OFF = difference(np.float32([1, 2.5]), np.float32([1, 2]))
SHAPE = difference(np.float32([1]), np.float32([1, 2]))
NAN = difference(np.float32([np.nan, 2]), np.float32([1, 2]))


def layer(a, b, verdict, *sides, call=1, method="__call__", text=""):
    """A row; `sides`: input, output, alone, parameters."""
    return Row(a, b, "Dense/Linear", call, method, *(sides or (None,) * 4), verdict, text)


GOOD_ROW = layer("Dense_0", "hidden", "equal", SAME, NEAR, NEAR, SAME)
WRONG_ROW = layer("Dense_1", "mid", "wrong", NEAR, OFF, OFF, OFF)
FED_ROW = layer("Dense_2", "out", "fed wrong", OFF, OFF, NEAR, SAME)


def report(findings=(), rows=(), first=None, not_compared=(), seeds=(0, 1)):
    versions = {"jax": "0.10.2"}
    return Report("Linen MLP", "NNX MLP", tuple(findings), tuple(rows), first, seeds, not_compared, "cpu", versions)


def test_equal_reports_say_how_equal():
    exact = report([Finding("output", "", "", SAME, True, 0), Finding("structure", "", "", None, True)])
    assert (exact.equal, exact.bit_equal) == (True, True)
    assert str(exact).startswith("equal, every bit: 2 compared\n  a: Linen MLP\n  b: NNX MLP\n")
    near = report([Finding("output", "", "", NEAR, True, 0)])
    assert (near.equal, near.bit_equal) == (True, False)
    assert str(near).startswith("equal, to what their dtypes allow: 1 compared\n")
    assert "what differs" not in str(near)
    assert str(near).endswith("\nseeds 0, 1, cpu, jax 0.10.2")


def test_notes_stand_below_what_was_compared():
    told = dataclasses.replace(report([Finding("output", "", "", SAME, True, 0)]), notes=("values: those of x.npz",))
    assert "\n  b: NNX MLP\n  values: those of x.npz\n" in str(told)
    assert told.as_dict()["notes"] == ["values: those of x.npz"]


def test_nothing_compared_is_not_equal():
    empty = report(not_compared=("the models: neither can be run",))
    assert (empty.equal, empty.bit_equal) == (False, False)
    assert str(empty).startswith("not equal: nothing was compared\n")
    assert "not compared:\n  the models: neither can be run" in str(empty)


def test_what_differs_stands_worst_first_with_its_draw():
    findings = [
        Finding("gradient", "params/Dense_0/kernel", "params/hidden/kernel", NEAR, True, 1),
        Finding("loss", "", "", OFF, False, 0, step=3),
        Finding("output", "x", "y", SHAPE, False, 1),
        Finding("structure", "[1]", "[1]", None, False, text="expected a tuple of 2, found 3"),
    ]
    found = report(findings)
    text = str(found).split("what differs:\n")[1].splitlines()
    assert str(found).startswith("not equal: 3 of 4 differ\n")
    assert [line.split()[0] for line in text[1:4]] == ["output", "structure", "loss"]
    assert any(
        line.split()[:3] == ["output", "x", "y"] and "float32[1], expected float32[2]; seed 1" in line for line in text
    )
    assert any(line.startswith("  loss  ") and line.endswith("seed 0, step 3") and "0.5" in line for line in text)
    assert any(line.endswith("expected a tuple of 2, found 3") for line in text)


def test_the_summary_counts_and_has_the_worst_of_each_kind():
    findings = [
        Finding("gradient", name, name, off, off.equal, 0) for name, off in zip("abc", (SAME, OFF, NEAR), strict=True)
    ]
    summary = report(findings).tables()[0]
    assert summary.rows == (("gradient", "3", "1", "1", "0.5", "0.25", "2.1e+06", "0.0002"),)
    assert summary.bad == {0}


def test_where_they_first_part_comes_before_the_tables():
    first = Parting("Dense_1", "mid", "parameters", "kernel: expected 2, found 2.5.\nDerive the rules anew.")
    text = str(report([Finding("output", "", "", OFF, False, 0)], [GOOD_ROW, WRONG_ROW], first))
    expected = (
        "they first part at Dense_1 | mid: parameters\n  kernel: expected 2, found 2.5.\n  Derive the rules anew.\n"
    )
    assert text.index(expected) < text.index("compared:")
    whole = report([Finding("output", "", "", OFF, False, 0)], first=Parting("", "", "mode", "left open"))
    assert "they first part at (whole): mode" in str(whole)


def test_the_table_of_layers_is_cut_to_what_matters_and_says_so():
    rows = [dataclasses.replace(GOOD_ROW, a=f"block_{n}", b=f"blocks/{n}") for n in range(50)]
    rows += [WRONG_ROW, *[dataclasses.replace(FED_ROW, a=f"late_{n}") for n in range(30)]]
    rows += [layer("", "extra", "unpaired", text="a has no such layer")]
    found = report([Finding("output", "", "", OFF, False, 0)], rows)
    shown = next(table for table in found.tables() if table.title == "layers")
    assert [row[1] for row in shown.rows] == ["block_49", "Dense_1", "late_0", "-"]
    assert [row[0] for row in shown.rows] == ["50", "51", "52", "82"]
    assert shown.note == "50 equal, 1 wrong, 30 fed wrong, 1 unpaired; 4 of 82 shown"
    assert shown.bad == {1, 3}
    assert next(t for t in found.tables(whole=True) if t.title == "layers").note.endswith("1 unpaired")
    assert "block_3 " not in str(found)


def test_equal_layers_are_counted_and_not_listed():
    found = report([Finding("output", "", "", NEAR, True, 0)], [GOOD_ROW] * 40)
    assert "40 equal" in str(found)
    assert "hidden" not in str(found)


def test_a_long_list_is_cut_with_its_rest_counted():
    findings = [Finding("gradient", f"g{n}", f"g{n}", OFF, False, 0) for n in range(40)]
    assert "  and 28 more" in str(report(findings))
    assert "and 28 more" not in "".join(map(str, report(findings).tables(whole=True)))


def test_a_row_shows_its_sides_and_its_method():
    rows = [layer("Embed_0", "embed", "wrong", SAME, OFF, NEAR, None, call=2, method="attend")]
    (table,) = [
        table for table in report([Finding("output", "", "", OFF, False)], rows).tables() if table.title == "layers"
    ]
    headings = dict(zip(table.headings, table.rows[0], strict=True))
    assert headings == {
        "#": "1",
        "a": "Embed_0",
        "b": "embed",
        "layer": "Dense/Linear.attend",
        "call": "2",
        "parameters": "",
        "input": "0",
        "output": "0.25",
        "alone": "2.38e-07",
        "verdict": "wrong",
        "remark": "",
    }


def test_equal_numbers_of_other_bits_are_not_shown_as_equal_bits():
    zeros = difference(np.float32([0.0]), np.float32([-0.0]))
    rows = [layer("a", "b", "wrong", SAME, zeros, None, None)]
    (table,) = [
        table for table in report([Finding("output", "", "", zeros, True)], rows).tables() if table.title == "layers"
    ]
    assert table.rows[0][6:8] == ("0", "0.0")


def test_as_dict_is_json_and_has_everything():
    first = Parting("Dense_1", "mid", "shape", "expected [2], found [1]")
    findings = [
        Finding("output", "", "", SHAPE, False, np.int64(0)),
        Finding("state", "s", "t", NAN, False, 1, 2, "text"),
        Finding("structure", "", "", None, False),
    ]
    found = report(findings, [GOOD_ROW, WRONG_ROW], first, ("random: no streams",), seeds=(np.int64(0), 1))
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(again) == {"equal", "bit_equal"} | {entry.name for entry in dataclasses.fields(Report)}
    assert [set(x) for x in again["findings"]] == [{entry.name for entry in dataclasses.fields(Finding)}] * 3
    assert [set(x) for x in again["rows"]] == [{entry.name for entry in dataclasses.fields(Row)}] * 2
    assert again["first"] == dataclasses.asdict(first)
    assert (again["equal"], again["seeds"], again["not_compared"]) == (False, [0, 1], ["random: no streams"])
    shape, nan, structure = (finding["difference"] for finding in again["findings"])
    assert structure is None
    assert (shape["absolute"], shape["ulp"], shape["forms"]) == ("inf", None, "float32[1], expected float32[2]")
    assert math.isinf(float(nan["absolute"]))
    assert again["rows"][1]["output"]["relative"] == 0.25
    assert again["versions"] == {"jax": "0.10.2"}


@pytest.mark.parametrize("size", [math.inf, -math.inf, math.nan, np.float32("inf")])
def test_numbers_that_json_lacks_come_back(size):
    off = Difference(size, 1.0, size, 1.0, False)
    again = json.loads(json.dumps(report([Finding("output", "", "", off, False)]).as_dict(), allow_nan=False))
    assert str(float(again["findings"][0]["difference"]["absolute"])) == str(float(size))
