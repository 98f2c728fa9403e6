"""Orbax checkpoints on object stores: read from there, written to there, and told from what is not finished."""

import importlib
import sys

import numpy as np
import pytest
from etils.epath import backend

from bridge._errors import (
    CheckpointAccessError,
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    MissingDependencyError,
)
from bridge.checkpoint import convert, diff, open_source, verify
from bridge.checkpoint.formats.open import steps_at
from tests.support import checkpoint_run
from tests.support.forked import run_forked
from tests.support.object_stores import upload
from tests.tolerance import assert_trees_equal

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
TREE = {"params": {"a": {"kernel": np.arange(12, dtype="float32").reshape(3, 4)}, "b": {"bias": np.ones(5, "float32")}}}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """format -> a checkpoint that Orbax has written to a disk."""
    root = tmp_path_factory.mktemp("local")
    return {format: checkpoint_run.save(TREE, root / format, format) for format in ("orbax", "orbax-v1", "manager")}


@pytest.mark.parametrize("format", ["orbax", "orbax-v1", "manager"])
def test_a_copy_of_a_checkpoint_is_read_as_the_checkpoint(format, folder, local, tmp_path):
    address = upload(local[format], f"{folder}/run")
    with open_source(address) as source:
        values = {path: source.read(path) for path in source.tree.leaves}
        assert str(source.path).startswith(address)
        assert source.step == (7 if format == "manager" else None)
    assert_trees_equal(values, checkpoint_run.flat(TREE))
    assert diff(address, local[format]).differences == ()
    convert(address, tmp_path / "nnx", to="nnx")
    assert verify(tmp_path / "nnx").leaves == 2
    convert(tmp_path / "nnx", tmp_path / "linen", to="linen")
    assert diff(address, tmp_path / "linen").differences == ()


def test_a_folder_of_steps_has_those_that_are_finished(folder, local):
    for step in (3, 12):
        upload(local["manager"] / "7", f"{folder}/run/{step}")
    upload(local["manager"] / "7", f"{folder}/run/20", leave_out="commit_success.txt")
    assert {step: str(place) for step, place in steps_at(f"{folder}/run").items()} == {
        3: f"{folder}/run/3",
        12: f"{folder}/run/12",
    }
    with open_source(f"{folder}/run") as source:
        assert (source.step, source.around.steps) == (12, (3, 12))
    with open_source(f"{folder}/run/3/../12/default") as source:
        assert len(source.tree.leaves) == 2
    with pytest.raises(CheckpointCorruptError, match=r"(?s)never finished.*run/20.*expected: commit_success.txt"):
        open_source(f"{folder}/run", step=20)


def test_what_nobody_has_finished_is_no_checkpoint(folder, local):
    upload(local["orbax"], f"{folder}/run", leave_out="commit_success.txt")
    with pytest.raises(CheckpointCorruptError, match=r"(?s)never finished.*empty file of that name"):
        open_source(f"{folder}/run")
    upload(local["manager"] / "7", f"{folder}/steps/7", leave_out="commit_success.txt")
    with pytest.raises(CheckpointCorruptError, match=r"(?s)never finished.*found: steps without it: 7"):
        open_source(f"{folder}/steps")


def test_a_source_that_changes_while_it_is_read_is_an_error(folder, local, tmp_path):
    address = upload(local["orbax"], f"{folder}/run")

    def write_there(doing, done, total):
        upload(local["orbax-v1"] / "state", address)

    with pytest.raises(CheckpointChangedError, match=r"(?s)changed while it was read.*bytes, tag"):
        convert(address, tmp_path / "out", to="nnx", progress=write_there)
    assert not (tmp_path / "out").exists()


def test_a_lost_array_is_damage_and_no_zeros(folder, local):
    address = upload(local["orbax"], f"{folder}/run", leave_out="manifest.ocdbt")
    with pytest.raises(CheckpointCorruptError, match=r"(?s)damaged.*manifest.ocdbt, the index of the arrays"):
        open_source(address)


def test_nothing_at_an_address(folder):
    with pytest.raises(CheckpointNotFoundError, match="found: nothing at this path"):
        open_source(f"{folder}/run")


def test_other_formats_are_refused_with_what_to_do(folder, local, tmp_path):
    scheme = folder.partition(":")[0]
    copy = {"gs": "gsutil cp -r gs://", "s3": "rclone copy s3://"}[scheme]
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    upload(tmp_path, f"{folder}/run")
    text = rf"(?s)only Orbax checkpoints are read and written on a store.*{copy}"
    for path, options in [("run", {}), ("run/model.safetensors", {}), ("run", {"format": "msgpack"})]:
        with pytest.raises(CheckpointAccessError, match=text):
            open_source(f"{folder}/{path}", **options)


def test_the_command_reads_from_a_store(folder, local, run):
    address = upload(local["manager"], f"{folder}/run")
    code, out, _ = run("inspect", address)
    assert code == 0
    assert "kernel" in out
    assert run("diff", address, local["manager"])[0] == 0


@pytest.mark.parametrize(("scheme", "client", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_without_its_client_the_error_names_the_extra(scheme, client, extra, monkeypatch):
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, extra, raising=False)
    with pytest.raises(MissingDependencyError, match=rf"{client}.*not installed(?s:.)*linen-nnx-bridge\[{extra}\]"):
        open_source(f"{scheme}://bucket/run")


@pytest.mark.slow  # the client asks five times
def test_a_store_that_cannot_be_reached(stores, local, monkeypatch, tmp_path):
    address = upload(local["orbax"], f"{stores['s3']}/unreachable")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = run_forked("import sys\nfrom bridge.checkpoint import open_source\nopen_source(sys.argv[1])", address)
    assert done.returncode == 1
    assert "the store does not answer: s3://" in done.stderr
