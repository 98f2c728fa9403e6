"""The page of a report: it stands for itself, and shows what it is told, whatever that is."""

import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bridge._errors import MissingDependencyError
from bridge.equivalence import page
from bridge.equivalence.numbers import Difference
from bridge.equivalence.report import Finding, Parting, Report, Row
from bridge.equivalence.tables import Table

SMALL = Difference(1e-7, 1.0, 1.0, 1e-4, False)
LARGE = Difference(0.5, 1.0, 4e6, 1e-4, False)
EXACT = Difference(0.0, 1.0, 0.0, 1e-4, True)
FAR = Difference(float("inf"), 1.0, None, 0.0, False, "float32[1], expected float32[2]")

# Names as people have them, and as people should not.
HOSTILE = "<script>alert(1)</script> $x^{$ 模型 \x00 \ud800 {0} &amp; \"q\" 'p'"


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def rows(*names):
    """Layers of which every third is wrong."""
    sides = [(EXACT, SMALL, SMALL, EXACT), (SMALL, LARGE, LARGE, None), (LARGE, FAR, None, EXACT)]
    verdicts = ["equal", "wrong", "fed wrong"]
    return tuple(
        Row(name, name, "Dense/Linear", 1, "__call__", *sides[n % 3], verdicts[n % 3]) for n, name in enumerate(names)
    )


def report(layers=(), name="model"):
    first = Parting(name, name, "computation", f"expected {name}, found another")
    finding = Finding("output", name, name, LARGE, False, 0, text=name)
    return Report(name, name, (finding,), layers, first, (0,), (f"{name}: left out",), "cpu", {"jax": "0.10"})


def saved(found, tmp_path):
    file = tmp_path / "page.html"
    found.save_html(file)
    return file.read_text()


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = saved(report(rows("a", "b", "c")), tmp_path)
    tags = Tags(text).tags
    assert not {name for name, _ in tags} & {"script", "link", "iframe", "object", "embed", "img", "image", "base"}
    for _, attributes in tags:
        assert not {"src", "onload", "onclick", "action"} & set(attributes)
        assert all(target.startswith("#") for key, target in attributes.items() if key.endswith("href"))
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_says_what_the_report_says(tmp_path):
    text = Tags(saved(report(rows("first", "second", "third")), tmp_path)).text
    for said in ("not equal: 1 of 1 differ", "Where they first part", "model: computation", "model: left out"):
        assert said in text
    for said in ("first", "second", "third", "fed wrong", "jax 0.10"):
        assert said in text


def test_all_layers_are_in_the_table_and_wrong_ones_are_marked(tmp_path):
    names = [f"layer_{n}" for n in range(200)]
    text = saved(report(rows(*names)), tmp_path)
    assert all(f"<td>{name}</td>" in text for name in names)
    assert len(re.findall('<tr class="bad">', text)) == 2 + 67  # the summary, what differs, every third layer


def test_the_plot_is_one_svg_with_a_line_for_each_series(tmp_path):
    text = saved(report(rows("a", "b", "c")), tmp_path)
    (svg,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    ElementTree.fromstring(svg)  # well-formed
    assert len(re.findall(r'<g id="line2d_', svg)) >= 3
    assert "Error by layer" in text


def test_a_report_without_layers_has_no_plot(tmp_path):
    text = saved(report(), tmp_path)
    assert "<svg" not in text
    assert "Error by layer" not in text


@pytest.mark.parametrize("count", [1, 2, 61])
def test_plots_of_any_size_draw(count, tmp_path):
    assert "<svg" in saved(report(rows(*[f"layer_{n}" for n in range(count)])), tmp_path)


def test_a_plot_of_nothing_but_gaps_and_zeros_draws(tmp_path):
    gaps = Row("a", "", "Dense", 1, "__call__", None, None, None, None, "unpaired")
    zeros = Row("b", "b", "Dense", 1, "__call__", EXACT, EXACT, EXACT, EXACT, "equal")
    assert "<svg" in saved(report((gaps,)), tmp_path)
    (tmp_path / "page.html").unlink()
    assert "<svg" in saved(report((gaps, zeros)), tmp_path)


def test_text_of_models_is_text(tmp_path):
    text = saved(report(rows(HOSTILE, "$", "\\frac{"), HOSTILE), tmp_path)
    seen = Tags(text)
    assert "script" not in {name for name, _ in seen.tags}
    assert "<script>alert(1)</script>" in seen.text
    assert "模型" in seen.text
    assert "&amp;amp;" in text


def test_the_same_report_gives_the_same_page(tmp_path):
    first = saved(report(rows("a", "b", "c")), tmp_path)
    (tmp_path / "page.html").unlink()
    assert saved(report(rows("a", "b", "c")), tmp_path) == first


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_written_over(kind, tmp_path):
    place = tmp_path / "page.html"
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(page.PageExistsError, match=r"(?s)page\.html\n  expected: nothing there.*Choose another name"):
        report().save_html(place)
    assert isinstance(page.PageExistsError(place), FileExistsError)
    assert kind != "file" or place.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    place = tmp_path / "page.html"

    def slow(self):
        place.write_text("mine")
        return "a page"

    monkeypatch.setattr(page.Page, "html", slow)
    with pytest.raises(page.PageExistsError, match="nothing is ever written over"):
        report().save_html(place)
    assert place.read_text() == "mine"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(page.PageWriteError, match=r"(?s)expected: a folder that exists.*no folder .*absent"):
        report().save_html(tmp_path / "absent" / "page.html")
    assert isinstance(page.PageWriteError(tmp_path, ""), OSError)
    assert not (tmp_path / "absent").exists()


def test_what_the_system_refuses_is_told(tmp_path):
    name = "x" * 300 + ".html"
    with pytest.raises(page.PageWriteError, match=r"(?s)the page cannot be written: .*found: .*File name too long"):
        report().save_html(tmp_path / name)


def test_matplotlib_that_is_not_there_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"(?s)page of a report.*'matplotlib'.*bridge\[plot\]"):
        report(rows("a")).save_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_matplotlib_that_is_broken_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    (tmp_path / "matplotlib.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        report(rows("a")).save_html(tmp_path / "page.html")


def test_tables_are_aligned():
    table = Table("t", ("name", "n"), (("a", "10"), ("bcdefg", "1")), right=frozenset({"n"}), note="end")
    assert str(table).splitlines() == ["t:", "  name     n", "  a       10", "  bcdefg   1", "  end"]
