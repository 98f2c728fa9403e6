"""nnx.display: treescope in a notebook, print elsewhere, never an exception."""

import sys
import types

import jax.numpy as jnp
import pytest
import treescope

import nnx_core as nnx


class Model(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.me = self
        self.tied = self.linear.kernel
        self.items = nnx.List([1, nnx.Param(jnp.ones(2), tag="t")])
        self.heads = nnx.Dict(a=nnx.BatchStat(jnp.ones(1)))


@pytest.fixture
def notebook(monkeypatch):
    """A running IPython, as far as anyone asks; what is displayed is appended to the list."""
    shown = []
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: object()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(treescope, "display", lambda x, **options: shown.append((x, options)))
    return shown


def test_prints_outside_of_a_notebook(capsys):
    model = Model()
    nnx.display(model, "text", 3)
    assert capsys.readouterr().out == f"{model!r}\ntext\n3\n"
    nnx.display()
    assert capsys.readouterr().out == ""


def test_draws_in_a_notebook(notebook, capsys):
    model = Model()
    nnx.display(model, "text")
    assert [x for x, _ in notebook] == [model, "text"]
    assert all(options == {"ignore_exceptions": True, "autovisualize": True} for _, options in notebook)
    assert capsys.readouterr().out == ""


def test_prints_where_treescope_is_not_installed(notebook, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "treescope", None)
    nnx.display(nnx.Param(1.0))
    assert (notebook, capsys.readouterr().out) == ([], "Param(1.0)\n")


def test_a_broken_treescope_is_told_and_does_no_harm(notebook, monkeypatch, tmp_path, capsys):
    (tmp_path / "treescope.py").write_text("import no_such_module")
    monkeypatch.delitem(sys.modules, "treescope")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"treescope is installed, but cannot be imported \(No module.*no_such_module"):
        nnx.display(nnx.Param(1.0))
    assert capsys.readouterr().out == "Param(1.0)\n"


def test_prints_what_has_no_text(capsys):
    class Broken:
        def __repr__(self):
            raise ValueError("no")

    nnx.display(Broken())
    assert capsys.readouterr().out == "<Broken whose repr raised ValueError>\n"


# ---- what treescope draws ----------------------------------------------------------------------------------


def drawn(x):
    return treescope.render_to_text(x)


def test_modules_as_trees_with_sizes():
    text = drawn(Model())
    assert text.startswith("Model( # Param: 11 (44 B), BatchStat: 1 (4 B), Total: 12 (48 B)\n")
    assert "\n  linear=Linear( # Param: 9 (36 B)\n" in text
    assert "me=<cyclic reference to Model" in text
    assert "items=List([1, Param(value=<jax.Array([1., 1.], dtype=float32)>, tag='t')])" in text
    assert "heads=Dict({'a': BatchStat(" in text


def test_states_variables_and_structures_as_trees():
    state = nnx.state(Model().linear)
    assert drawn(state).startswith("State({\n  'bias': Param(value=<jax.Array([0., 0., 0.], dtype=float32)>),\n")
    assert "'kernel': Param( # 6 (24 B)\n" in drawn(state)
    assert drawn(nnx.to_flat_state(state)).startswith("FlatState({\n  ('bias',):")
    assert drawn(nnx.Param(jnp.ones((2, 40)))).startswith("Param( # 80 (320 B)\n")
    assert "VariableDef(kind=nnx_core.kinds.Param" in drawn(nnx.graphdef(Model().linear))


def test_html_is_drawn_too():
    html = treescope.render_to_html(Model(), compressed=False)
    assert "BatchStat: 1 (4 B)" in html


def test_drawing_a_donated_model_does_not_fail():
    model = Model()
    model.linear.kernel[...].delete()
    assert "linear=Linear(" in treescope.render_to_text(model, ignore_exceptions=True)
