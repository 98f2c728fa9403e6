"""One environment for every test, set before jax is imported.

Eight CPU devices, so that meshes mean something; matrix products in full float32, so that one tolerance table
(`tests/tolerance.py`) holds on every platform; no 64-bit; hypothesis draws the same examples in every run.
"""

import os
import sys

import pytest

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could set its environment")

_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two workers share one accelerator

import jax  # noqa: E402  the environment above has to come first
from hypothesis import settings  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_enable_x64", False)

# `deadline`: the first example compiles. `database`: a past failure belongs in an @example, not in a cache.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser):
    """`--write-layer-matrix`: write the measured matrix of layers into the migration guide."""
    parser.addoption("--write-layer-matrix", action="store_true", help="write migration_guide/layer_matrix.md")


@pytest.fixture
def no_compile_cache():
    """No compilation cache on disk: what is compiled here is compiled, and can be counted."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


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
