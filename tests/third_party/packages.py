"""A package that a row needs: imported, or the test is skipped with a reason.

Law: only a package that is not installed skips; one that is installed and cannot be imported is an error, and so is
one whose import turns on float64: all rows after it would be judged in another precision.
"""

import importlib
import importlib.util
import warnings

import jax
import pytest


def require(package: str) -> None:
    """Import it, or skip the test. Not `pytest.importorskip`: it skips too where a dependency is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; nox -s models installs it where this Python has it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a package warns about while it is imported is its own
        importlib.import_module(package)
    assert not jax.config.jax_enable_x64, f"importing {package} turned on float64 for the whole process"
