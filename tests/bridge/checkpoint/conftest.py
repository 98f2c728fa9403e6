"""What the tests of loading share."""

import secrets

import numpy as np
import pytest

from bridge.checkpoint.formats.orbax.read import OrbaxSource
from tests.support.object_stores import BUCKET, gcs_server, s3_server
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


@pytest.fixture(scope="session")
def stores():
    """Scheme -> an empty bucket, `gs://...` and `s3://...`, on servers that end with the tests."""
    with s3_server() as s3, gcs_server() as gcs, pytest.MonkeyPatch.context() as environment:
        for name, value in {**s3, **gcs}.items():
            environment.setenv(name, value)
        from etils import epath

        epath.Path(f"s3://{BUCKET}").mkdir()
        yield {scheme: f"{scheme}://{BUCKET}" for scheme in ("gs", "s3")}


@pytest.fixture(params=["s3", "gs"])
def folder(stores, request):
    """The address of a folder on each store, in which no other test writes."""
    return f"{stores[request.param]}/{secrets.token_hex(4)}"
