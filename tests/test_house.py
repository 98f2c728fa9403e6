"""The house rules that no linter holds: sizes, the wall to flax, the public list, reasons beside exceptions.

import-linter holds the rooms (`.importlinter`); here is what is left of CONTRIBUTING.md's laws.
"""

import ast
import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nnx_core", "bridge")
FILE_LINES, FUNCTION_LINES = 600, 60


def python_files(*folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py"))


def module_names() -> list[str]:
    """Every importable module of both packages; `__main__` is left out, importing it is running it."""
    names = list(PACKAGES)
    for package in PACKAGES:
        names += [m.name for m in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")]
    return [name for name in names if not name.endswith("__main__")]


# ---- sizes -------------------------------------------------------------------------------------------------


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function from `def` to end, less its docstring: explaining must not cost space."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            lengths[f"{node.name}, line {node.lineno}"] = lines
    return lengths


def test_function_lengths_leave_out_decorator_and_docstring():
    source = '@cache\ndef f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    return x\n'
    assert function_lengths(source) == {"f, line 2": 4}


@pytest.mark.parametrize("file", python_files(*PACKAGES, "benchmarks"))
def test_file_and_functions_are_short(file):
    source = (ROOT / file).read_text()
    assert len(source.splitlines()) <= FILE_LINES, f"{file} is over {FILE_LINES} lines: split it by what it knows"
    long = {name: n for name, n in function_lengths(source).items() if n > FUNCTION_LINES}
    assert not long, f"{file} has functions over {FUNCTION_LINES} lines: {long}"


# ---- nnx_core never imports flax ---------------------------------------------------------------------------


def imported_packages(source: str) -> set[str]:
    """Top-level names that a source imports, inside functions and `importlib.import_module("...")` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__" | "optional")
                | ast.Attribute(attr="import_module" | "optional"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                found.add(module)
    return {name.split(".")[0] for name in found}


def test_imported_packages_sees_every_form():
    forms = [
        "import a.b",
        "from a import b",
        "def f():\n  import a",
        "importlib.import_module('a.b')",
        "optional('a')",
    ]
    assert [imported_packages(form) for form in forms] == [{"a"}] * len(forms)
    assert imported_packages("from . import flax\nflax = 'flax'") == set()


@pytest.mark.parametrize("file", python_files("nnx_core"))
def test_core_file_knows_neither_flax_nor_bridge(file):
    assert not imported_packages((ROOT / file).read_text()) & {"flax", "bridge"}


def test_importing_all_of_core_leaves_flax_out():
    core = [name for name in module_names() if name.startswith("nnx_core")]
    script = f"import importlib, sys; [importlib.import_module(n) for n in {core}]; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    assert "nnx_core" in loaded
    assert not loaded & {"flax", "bridge"}


@pytest.mark.parametrize("package", ["nnx_core", "bridge"])
def test_importing_starts_no_backend(package):
    # jax.distributed.initialize and XLA_FLAGS must come before the backend; an import must not be in their way.
    script = f"import {package}; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stdout + done.stderr


# ---- public = listed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", module_names())
def test_every_listed_name_exists_once(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert not [n for n in listed if not hasattr(module, n)], f"{name}.__all__ lists what is not there"
    assert len(listed) == len(set(listed)), f"{name}.__all__ lists a name twice"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_a_public_list(package):
    assert importlib.import_module(package).__all__


# ---- every exception has its reason, and the README what .ci/run runs --------------------------------------


def without_reason(pyproject: str, key: str) -> list[str]:
    """Entries of the TOML array `key` that have no comment on their line or on the line above."""
    block = re.search(rf"^{re.escape(key)} = \[\n(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    assert block, f"pyproject.toml has no array {key!r}"
    bare = []
    for above, line in itertools.pairwise(["", *block[1].splitlines()]):
        entry = line.strip().startswith(("'", '"'))
        if entry and not above.strip().startswith("#") and not re.search(r"[\"'],?\s+#", line):
            bare.append(line)
    return bare


def test_without_reason_finds_the_bare_entry():
    text = 'k = [\n  "a",  # why\n  # why\n  "b",\n  "c#",\n]\n'
    assert without_reason(text, "k") == ['  "c#",']


@pytest.mark.parametrize("key", ["dependencies", "orbax", "demo", "test", "models", "lint", "docs", "dev", "ignore"])
def test_every_dependency_and_ignored_rule_has_a_reason(key):
    assert without_reason((ROOT / "pyproject.toml").read_text(), key) == []


def test_every_warning_is_an_error_but_those_with_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    assert tomllib.loads(text)["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"
    assert without_reason(text, "filterwarnings") == ['  "error",']


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install '.[demo]' && .venv/bin/linen-nnx demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2",
    ],
    ids=["demo", "test"],
)
def test_readme_has_the_two_commands_that_ci_runs(command):
    assert (ROOT / "README.md").read_text().splitlines().count(command) == 1
