"""What the tests of loading share."""

import numpy as np
import pytest

from bridge.checkpoint.formats.orbax.read import OrbaxSource
from tests.support.placed_models import BIAS, KERNEL
from tests.support.training import saved


@pytest.fixture
def dense(tmp_path):
    return saved(tmp_path / "dense", {"params": {"dense": {"kernel": KERNEL, "bias": BIAS}}})


@pytest.fixture
def reads(monkeypatch):
    """Every array that is read, as (path, bytes)."""
    found = []
    read = OrbaxSource.read

    def recorded(self, path, region=None):
        value = read(self, path, region)
        found.append((path, np.asarray(value).nbytes))
        return value

    monkeypatch.setattr(OrbaxSource, "read", recorded)
    return found
