"""One environment for every test, set before jax is imported.

Eight CPU devices, so that meshes mean something; matrix products in full float32, so that one tolerance table
(`tests/tolerance.py`) holds on every platform; no 64-bit; hypothesis draws the same examples in every run.
What XLA compiled is kept on disk (`tests/support/compile_cache.py`): that saves time and changes no result. On a CPU
it compiles fast and optimizes little (`tests/support/compiler.py`), unless TESTS_OPTIMIZED=1.
The suite runs the diagonal of the large grids, and a sample of what is many times the same; `--grids` runs all.
"""

import gc
import os
import sys
import zlib
from collections import defaultdict

import pytest

from tests.support import compile_cache, compiler

# Traces are millions of small objects that live as long as the caches: to look through them for cycles after every
# 700 new ones takes a tenth of the suite, and of importing jax a third. What is freed is tested after `gc.collect()`.
gc.set_threshold(50_000, 20, 100)

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could set its environment")

_FLAGS = ["--xla_force_host_platform_device_count=8", *compiler.flags(os.environ)]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two workers share one accelerator
compile_cache.set_environment(os.environ)

import jax  # noqa: E402  the environment above has to come first
from hypothesis import settings  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_enable_x64", False)

# `deadline`: the first example compiles. `database`: a past failure belongs in an @example, not in a cache.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser):
    """What of the suite is run; `--write-layer-matrix`: write the measured matrix into the migration guide."""
    parser.addoption("--grids", action="store_true", help="run what is marked `grid`, too")
    parser.addoption("--first-cases", action="store_true", help="each test once, on its first parameters; no slow one")
    parser.addoption("--write-layer-matrix", action="store_true", help="write migration_guide/layer_matrix.md")


def pytest_configure(config):
    """Refuse to write half a page; keep the cache small, once a run and not in the workers of pytest-xdist."""
    if config.getoption("--write-layer-matrix") and not config.getoption("--grids"):
        raise pytest.UsageError("--write-layer-matrix writes the whole matrix: give --grids too")
    if not hasattr(config, "workerinput"):
        compile_cache.trim_own(os.environ)


def pytest_collection_modifyitems(config, items):
    """Without `--grids`, what is marked `grid` is deselected, and all but a sample of what is marked `sample`; with
    `--first-cases`, what is `slow`, and all but one case of each other test."""
    in_suite = items if config.getoption("--grids") else _without_grids(items)
    kept = list(_first_cases(in_suite)) if config.getoption("--first-cases") else in_suite
    if len(kept) < len(items):
        chosen = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = kept


def _function(item):
    return item.nodeid.partition("[")[0]


def _without_grids(items):
    """Not what is marked `grid`; of what is marked `sample(n)`, n cases of each function."""
    in_suite = [item for item in items if not item.get_closest_marker("grid")]
    cases = defaultdict(list)
    for item in in_suite:
        if item.get_closest_marker("sample"):
            cases[_function(item)].append(item)
    left_out: set[int] = set()
    for those in cases.values():
        (size,) = those[0].get_closest_marker("sample").args
        # Drawn by their names: as good as at random, the same in every run, and hardly others when a case is added.
        drawn = sorted(those, key=lambda item: zlib.crc32(item.name.encode()))
        left_out.update(map(id, drawn[size:]))
    return [item for item in in_suite if id(item) not in left_out]


def _first_cases(items):
    functions: set[str] = set()
    for item in items:
        if _function(item) not in functions and not item.get_closest_marker("slow"):
            functions.add(_function(item))
            yield item


@pytest.fixture
def no_compile_cache():
    """Everything is compiled in this process: for tests that count compilations or look at what was compiled."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is a cache, and keeps the answer
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_terminal_summary(terminalreporter, config):
    """Print the matrix of layers, if this run measured it."""
    from tests import layer_matrix

    found = layer_matrix.collect(terminalreporter.stats.get("passed", []))
    if found:
        from tests.layers import LAYERS

        terminalreporter.section("layers against their Linen twins")
        for row in layer_matrix.table(found, [layer.name for layer in LAYERS if layer.name in found]):
            terminalreporter.write_line(row)
        if config.getoption("--write-layer-matrix"):
            layer_matrix.write(found, [layer.name for layer in LAYERS])
