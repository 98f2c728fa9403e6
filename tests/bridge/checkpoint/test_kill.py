"""A conversion that is killed at random points, three times in a row, and resumed: as if nothing had happened.

And one that a full disk stops where it notes a batch.
"""

import random
import time

import numpy as np
import pytest

from bridge._errors import CheckpointWriteError
from bridge.checkpoint.conversion import convert
from bridge.checkpoint.verification import verify
from tests.support import checkpoint_run as run
from tests.support.forked import Forked, run_forked
from tests.support.full_disk import fill_up, journal_has_room
from tests.tolerance import assert_trees_equal

LEAVES, BATCHES = 24, 12
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

#: Says on a line of its own whenever a batch is made, and how many leaves it found written by an earlier run.
SCRIPT = """
import sys
from bridge.checkpoint.conversion import convert
source, target, format = sys.argv[1:]
def tell(doing, done, total):
    print(doing, done, flush=True)
report = convert(source, target, to="nnx", target_format=format, max_memory=3 << 20, resume=True, progress=tell)
print("resumed", report.resumed, flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    numbers = np.random.default_rng(0)
    params = {f"Dense_{i}": {"kernel": numbers.random((256, 512), np.float32)} for i in range(LEAVES)}
    return run.save({"params": params}, tmp_path_factory.mktemp("source") / "ck", "orbax")


@pytest.mark.parametrize("format", ["orbax", "orbax-v1", "safetensors", "msgpack"])
def test_killed_three_times_then_resumed(format, source, tmp_path):
    chance = random.Random(format)
    for _ in range(3):
        process = Forked(SCRIPT, source, tmp_path / "out", format)
        for _ in range(chance.randint(2, BATCHES // 3)):
            assert process.output.readline().startswith("converting"), process.wait().stderr
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        assert process.wait().returncode == -9
        assert not (tmp_path / "out").exists()
    done = run_forked(SCRIPT, source, tmp_path / "out", format)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < LEAVES
    assert verify(tmp_path / "out").leaves == LEAVES
    convert(source, tmp_path / "unkilled", to="nnx", target_format=format)
    assert_trees_equal(run.load(tmp_path / "out", format), run.load(tmp_path / "unkilled", format))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if name.removesuffix(".metadata.json") not in ("out", "unkilled")] == []


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", ["orbax", "orbax-v1", "safetensors", "msgpack"])
def test_a_full_disk_when_a_batch_is_noted_then_resumed(format, source, tmp_path, monkeypatch):
    target, before = tmp_path / "out", content(source)

    def tell(doing, done, total):
        if done > total // 2:
            fill_up(left=9)

    def start(**options):
        return convert(source, target, to="nnx", target_format=format, max_memory=3 << 20, **options)

    with journal_has_room(1 << 20, monkeypatch):
        text = rf"(?s){target}\n.*found: No space left on device\n.*resume=True"
        with pytest.raises(CheckpointWriteError, match=text):
            start(progress=tell)
    assert not target.exists()
    assert content(source) == before
    assert 0 < start(resume=True).resumed < LEAVES
    convert(source, tmp_path / "unstopped", to="nnx", target_format=format)
    assert_trees_equal(run.load(target, format), run.load(tmp_path / "unstopped", format))
