"""A package imported on two libraries in one process: each world has its own, and outside nothing has changed."""

import importlib
import sys

import flax.nnx
import pytest

import nnx_core
from tests.support.worlds import World

PACKAGE = {
    "__init__.py": "from flax import nnx\nfrom written_in_nnx import layers\n",
    "layers.py": """
import flax.nnx as face
import flax.nnx.statelib
from flax import nnx
from flax.nnx import Linear
from flax.nnx.module import first_from


def late():
    from flax import nnx
    from flax.nnx.nn import initializers
    import written_in_nnx.other

    return nnx, initializers, written_in_nnx.other.nnx
""",
    "other.py": "import flax\nimport flax.nnx\nnnx = flax.nnx\n",
}


@pytest.fixture
def worlds(tmp_path, monkeypatch):
    (tmp_path / "written_in_nnx").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "written_in_nnx" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return [World(library, "written_in_nnx") for library in ("nnx_core", "flax.nnx")]


def test_every_form_of_import_is_the_worlds_library(worlds):
    for world, library in zip(worlds, (nnx_core, flax.nnx), strict=True):
        with world:
            layers = world.load("written_in_nnx").layers
            assert layers.nnx is layers.face is world.nnx is library
            assert layers.Linear is library.Linear
            assert layers.first_from.__module__.startswith(library.__name__)
            nnx, initializers, inner = layers.late()
            assert nnx is inner is library
            assert initializers.__name__ == f"{library.__name__}.nn.initializers"
        assert "written_in_nnx" not in sys.modules


def test_a_package_is_imported_once_a_world(worlds):
    ours, theirs = worlds
    assert ours.load("written_in_nnx.layers") is ours.load("written_in_nnx").layers
    assert ours.load("written_in_nnx") is not theirs.load("written_in_nnx")
    with ours:
        first = ours.load("written_in_nnx")
        assert first.layers.late()[2] is nnx_core
    assert ours.load("written_in_nnx") is first


def test_outside_nothing_has_changed(worlds):
    before, spec = sys.modules["flax.nnx"], nnx_core.__spec__
    names = {name for name in sys.modules if name.startswith("flax.nnx")}
    worlds[0].load("written_in_nnx")
    with pytest.raises(ModuleNotFoundError, match=r"nnx_core\.no_such_room"), worlds[0]:
        importlib.import_module("flax.nnx.no_such_room")
    assert sys.modules["flax.nnx"] is before is flax.nnx is importlib.import_module("flax.nnx")
    assert {name for name in sys.modules if name.startswith("flax.nnx")} == names
    assert nnx_core.__spec__ is spec
    assert nnx_core.nn.__name__ == "nnx_core.nn"
