"""Every public path of 0.1.0 still leads to the object that the package has now.

`paths_of_0_1_0.txt` was written before files moved into rooms: a module, and the public names that it had.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bridge
import bridge.checkpoint
from tests.support.forked import run_forked

ROOT = Path(__file__).parents[2]
ROWS = [line.split(": ") for line in Path(__file__).with_name("paths_of_0_1_0.txt").read_text().splitlines()]


def test_the_list_is_whole():
    assert len(ROWS) == 36
    assert sum(len(names.split()) for _, names in ROWS) == 216


@pytest.mark.parametrize(("path", "names"), ROWS, ids=[path for path, _ in ROWS])
def test_a_public_path_still_works(path, names):
    module = importlib.import_module(path)
    gone = [name for name in names.split() if not hasattr(module, name)]
    assert gone == []
    public = vars(bridge) | vars(bridge.checkpoint)
    shared = [name for name in names.split() if name in public and name not in ("Layout", "interop", "module")]
    assert [name for name in shared if getattr(module, name) is not public[name]] == []


@pytest.mark.slow
def test_old_paths_work_in_any_order_and_hide_no_function():
    statements = [f"from {path} import {names.split()[0]}" for path, names in reversed(ROWS)]
    attributes = [path for path, _ in reversed(ROWS)]
    script = ";".join(["import bridge, bridge.checkpoint, bridge.cli", *attributes, *statements])
    script += ";print(callable(bridge.to_linen), callable(bridge.functional))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_an_old_path_is_the_module_itself():
    import bridge.checkpoint.derived_rules as old

    import bridge.checkpoint.derivation.to_rules as new

    assert old is new


def test_an_import_starts_no_backend():
    """A job of several processes says how many there are after its imports, and before JAX looks for devices."""
    done = run_forked(
        "import bridge, bridge.cli.app, bridge.equivalence, bridge.checkpoint, nnx_core\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    assert done.returncode == 0, done.stderr
