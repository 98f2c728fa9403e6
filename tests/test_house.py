"""The house rules that no linter holds: sizes, the wall to flax, the public list, reasons beside exceptions.

import-linter holds the rooms (`.importlinter`); here is what is left of CONTRIBUTING.md's laws.
"""

import ast
import collections
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import symtable
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


def test_files_are_short():
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in python_files(*PACKAGES, "benchmarks")}
    long = {file: lines for file, lines in lengths.items() if lines > FILE_LINES}
    assert not long, f"over {FILE_LINES} lines, to be split by what they know: {long}"


def test_functions_are_short():
    long = []
    for file in python_files(*PACKAGES, "benchmarks"):
        lengths = function_lengths((ROOT / file).read_text())
        long += [f"{file}: {name}: {lines}" for name, lines in lengths.items() if lines > FUNCTION_LINES]
    assert not long, f"functions over {FUNCTION_LINES} lines: {long}"


# ---- nothing is in a reference cycle -----------------------------------------------------------------------


def functions_in_cycles(source: str) -> list[str]:
    """Nested functions that reach themselves by what they close over, and classes made inside of a function.

    Each is a cycle: function -> cell -> function. What else it closes over stays until the cyclic collector runs.
    """
    cycles = []
    scopes = [symtable.symtable(source, "source", "exec")]
    while scopes:
        scope = scopes.pop()
        inner = scope.get_children()
        scopes += inner
        if not isinstance(scope, symtable.Function):
            continue
        closes_over: dict[str, set[str]] = {}
        for table in inner:
            if isinstance(table, symtable.Function):  # of which two may have one name, in two branches
                closes_over.setdefault(table.get_name(), set()).update(table.get_frees())
        for table in inner:
            name = table.get_name()
            if isinstance(table, symtable.Class) or name in reachable(name, closes_over):
                cycles.append(f"line {table.get_lineno()}: {name}")
    return sorted(cycles)


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    pending = [start]
    while pending:
        new = edges.get(pending.pop(), set()) - reached
        reached |= new
        pending += new
    return reached


def raised_by_name(source: str) -> list[str]:
    """`error = ...; raise error`: the frame holds the error, and its traceback the frame, with all that is in it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id.islower():
            lines.append(f"line {node.lineno}: raise {node.exc.id}")
        if isinstance(node, ast.ExceptHandler) and node.name:
            kept = [x for x in ast.walk(node) if isinstance(x, ast.Assign) and ast.unparse(x.value) == node.name]
            lines += [f"line {x.lineno}: {ast.unparse(x)}" for x in kept]
    return lines


def test_functions_in_cycles_are_seen():
    source = """
def at_the_top(x): return at_the_top(x)
def outer(held):
    def loop(x): return [loop(y) for y in x]
    def deeper(x): return lambda: deeper(held)
    def first(x): return second(x)
    def second(x): return first(x)
    def harmless(x): return [harmless for harmless in x] + [loop, outer]
    class Made: pass
"""
    lines = ["line 4: loop", "line 5: deeper", "line 6: first", "line 7: second", "line 9: Made"]
    assert functions_in_cycles(source) == lines


def test_errors_raised_by_name_are_seen():
    source = """
def f():
    error = ValueError()
    raise error
def g():
    try: f()
    except ValueError as error:
        reason = error
        raise
    raise _Signal
"""
    assert raised_by_name(source) == ["line 4: raise error", "line 8: reason = error"]


@pytest.mark.parametrize("law", [functions_in_cycles, raised_by_name])
def test_nothing_is_in_a_reference_cycle(law):
    cycles = {file: law((ROOT / file).read_text()) for file in python_files(*PACKAGES)}
    assert {file: lines for file, lines in cycles.items() if lines} == {}, "pass it as an argument, or write a loop"


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


def test_core_files_know_neither_flax_nor_bridge():
    packages = {file: imported_packages((ROOT / file).read_text()) for file in python_files("nnx_core")}
    assert "nnx_core" in packages["nnx_core/__init__.py"]
    assert [file for file, names in packages.items() if names & {"flax", "bridge"}] == []


# What each import brings, one after the other in one fresh interpreter: the core first, since the bridge brings flax.
IMPORTS = """
import importlib, json, sys

def after(*modules):
    for module in modules:
        importlib.import_module(module)
    from jax._src import xla_bridge
    packages = sorted({name.split(".")[0] for name in sys.modules})
    slow = sorted({"jax.extend", "jax.extend.core"} & set(sys.modules))  # they load Pallas
    return {"packages": packages, "backends": xla_bridge.backends_are_initialized(), "slow": slow}

stages = json.loads(sys.argv[1])
found = {name: after(*modules) for name, modules in stages.items()}
found["rooms"] = [getattr(sys.modules["bridge"], room).__name__ for room in ("checkpoint", "equivalence", "flax_nnx")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """Stage -> the top-level packages then loaded, and whether jax has a backend."""
    core = [name for name in module_names() if name.startswith("nnx_core")]
    stages = {
        "inspect": ["nnx_core.inspect"],
        "nnx_core": ["nnx_core"],
        "all of nnx_core": core,
        "bridge": ["bridge"],
    }
    command = [sys.executable, "-c", IMPORTS, json.dumps(stages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_all_of_core_leaves_flax_out(imported):
    packages = set(imported["all of nnx_core"]["packages"])
    assert "nnx_core" in packages
    assert not packages & {"flax", "bridge"}
    assert {"flax", "bridge"} <= set(imported["bridge"]["packages"])  # the list sees them


def test_importing_brings_in_no_drawing_library(imported):
    for stage in ("inspect", "all of nnx_core"):
        assert not set(imported[stage]["packages"]) & {"rich", "treescope", "IPython"}


def test_importing_the_core_waits_for_no_slow_part_of_jax(imported):
    assert [imported[stage]["slow"] for stage in ("inspect", "nnx_core")] == [[], []]
    assert imported["all of nnx_core"]["slow"]  # transforms.equations needs it: the list sees it


def test_rooms_of_the_bridge_are_found_without_an_import_of_their_own(imported):
    assert imported["rooms"] == ["bridge.checkpoint", "bridge.equivalence", "bridge.flax_nnx"]


@pytest.mark.parametrize("package", ["nnx_core", "all of nnx_core", "bridge"])
def test_importing_starts_no_backend(imported, package):
    # jax.distributed.initialize and XLA_FLAGS must come before the backend; an import must not be in their way.
    assert imported[package]["backends"] is False


# ---- public = listed ---------------------------------------------------------------------------------------


def test_every_listed_name_exists_once():
    absent, twice = [], []
    for name in module_names():
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", [])
        absent += [f"{name}.{n}" for n in listed if not hasattr(module, n)]
        twice += [f"{name}.{n}" for n, times in collections.Counter(listed).items() if times > 1]
    assert not absent, f"an __all__ lists what is not there: {absent}"
    assert not twice, f"an __all__ lists a name twice: {twice}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_a_public_list(package):
    assert importlib.import_module(package).__all__


# ---- test modules compute nothing while they are collected, and are no libraries -----------------------------

COMPUTES = re.compile(r"(jnp\.(?!dtype$)|jax\.random\.(?!wrap_key_data$)|nnx\.Rngs$)")


def calls_at_import(source: str) -> list[str]:
    """Calls of jax that run when a module is imported: outside of functions, and in their decorators and defaults."""
    calls = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            runs_now = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
        else:
            runs_now = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and COMPUTES.match(ast.unparse(node.func)):
            calls.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in runs_now:
            visit(child)

    visit(ast.parse(source))
    return calls


def test_calls_at_import_sees_constants_and_decorators():
    source = """
X = jnp.ones(2) + 1
@pytest.mark.parametrize("x", [jax.random.key(0)])
def f(x, y=nnx.Rngs(0)): return jnp.zeros(2)
g = lambda: jnp.zeros(2)
D = jnp.dtype("float32")
"""
    assert calls_at_import(source) == ["line 2: jnp.ones(2)", "line 3: jax.random.key(0)", "line 4: nnx.Rngs(0)"]


def test_test_modules_compute_nothing_when_they_are_imported():
    top = [str(file.relative_to(ROOT)) for file in ROOT.glob("tests/*.py")]
    files = [*top, *python_files("tests/nnx_core", "tests/layer_rows")]
    calls = {file: calls_at_import((ROOT / file).read_text()) for file in files}
    assert len(calls) > 80
    assert {file: lines for file, lines in calls.items() if lines} == {}, "make it with tests/support/arrays.py"


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


@pytest.mark.parametrize(
    "key", ["dependencies", "orbax", "plot", "demo", "test", "models", "lint", "docs", "dev", "ignore"]
)
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
