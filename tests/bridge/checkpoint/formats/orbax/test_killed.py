"""Orbax checkpoints whose writing is cut short: killed at any point and gone on with, full disks, damaged leftovers."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import textwrap

import numpy as np
import orbax.checkpoint as ocp
import pytest

from bridge._errors import CheckpointCorruptError, CheckpointExistsError, CheckpointWriteError
from bridge.checkpoint.formats.orbax.read import open_orbax, read_tree
from bridge.checkpoint.formats.orbax.write import OrbaxSink
from tests.support.checkpoint_files import describe, run_limited
from tests.support.forked import run_forked
from tests.support.orbax_files import content, write
from tests.tolerance import assert_trees_equal

SUFFIX = ".orbax-checkpoint-tmp-linen-nnx"


def assert_whole(path, tree):
    assert_trees_equal(read_tree(path), tree)
    with open_orbax(path) as source:
        assert source.metadata == {"made": "here"}
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore(path)
    np.testing.assert_array_equal(theirs["params"]["layer_7"]["kernel"], tree["params"]["layer_7"]["kernel"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


class Killed(BaseException):
    """What a test raises where a process could be killed."""


def dying(monkeypatch, call):
    """Let the `call`-th fsync from here on be the last thing that happens."""
    real, calls = os.fsync, iter(range(call - 1))

    def fsync(handle):
        if next(calls, None) is None:
            raise Killed
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Couldn't find sharding info")
def test_wherever_it_is_killed_it_goes_on(tmp_path, monkeypatch):
    """Every point at which something has just reached the disk, or was about to: batches, tables, the rename."""
    tree, finished_early = content(), 0
    for call in range(1, 100):
        path = tmp_path / str(call) / "ck"
        with monkeypatch.context() as patch:
            dying(patch, call)
            try:
                write(path, tree)
                break
            except Killed:
                pass
        if path.exists():
            finished_early += 1  # killed after the rename: what is there is whole
        else:
            with pytest.raises(CheckpointCorruptError, match="never finished"):
                open_orbax(path.with_name(path.name + SUFFIX))
        write(path, tree, resume=True)
        assert_whole(path, tree)
    assert call > 10
    assert finished_early == 1


def test_what_is_done_is_not_written_again(tmp_path):
    tree = content()
    shape, values = describe(tree)
    first, second = list(values)[:3], list(values)[3:]
    with OrbaxSink(tmp_path / "ck", shape) as sink:
        sink.write({place: values[place] for place in first})
    with OrbaxSink(tmp_path / "ck", shape, resume=True) as sink:
        assert sink.done == set(first)
        with pytest.raises(CheckpointWriteError, match="written twice"):
            sink.write({first[0]: values[first[0]]})
        sink.write({place: values[place] for place in second})
        sink.finish({"made": "here"})
    assert_trees_equal(read_tree(tmp_path / "ck"), tree)


def test_a_torn_leaf_and_a_torn_journal_are_written_again(tmp_path):
    """As a kill in the middle of a batch leaves it: other numbers, another shape of chunks, half a line."""
    tree = content()
    shape, values = describe(tree)
    place = ("params", "layer_3", "kernel")
    journal = tmp_path / f"ck{SUFFIX}" / "journal"
    with OrbaxSink(tmp_path / "ck", shape) as sink:
        sink.write({("step",): 7})
        before = journal.read_bytes()
        sink.write({place: values[place] * 0 - 1})
    journal.write_bytes(journal.read_bytes()[:-5])
    with OrbaxSink(tmp_path / "ck", shape, resume=True) as sink:
        assert sink.done == {("step",)}
        assert journal.read_bytes() == before
        sink.write({name: value for name, value in values.items() if name != ("step",)})
        sink.finish({})
    assert_trees_equal(read_tree(tmp_path / "ck"), tree)


SCRIPT = """
    import os, signal, sys, threading, time
    from tests.support.orbax_files import content, write
    from bridge.checkpoint.formats.orbax.write import OrbaxSink

    path, last_write, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    real, calls = OrbaxSink.write, iter(range(1, 1000))

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def slowly(self, leaves):
        time.sleep(0.01)
        if next(calls) == last_write:
            threading.Thread(target=kill, daemon=True).start()
        real(self, leaves)

    OrbaxSink.write = slowly
    write(path, content(20, 400), batch=1, resume=True)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Couldn't find sharding info")
@pytest.mark.parametrize("seed", range(2))
def test_killed_three_times_in_a_row(seed, tmp_path):
    rng, path = random.Random(seed), tmp_path / "run" / "ck"
    for last_write in (*(rng.randint(1, 3) for _ in range(3)), 0):
        done = run_forked(textwrap.dedent(SCRIPT), path, last_write, rng.uniform(0, 0.02))
        if last_write:
            assert done.returncode == -signal.SIGKILL
            assert not path.exists()
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert_whole(path, content(20, 400))


# --- leftovers ----------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path):
    shape, values = describe(content())
    with OrbaxSink(tmp_path / "ck", shape) as sink:
        sink.write({place: values[place] for place in list(values)[:2]})
    return tmp_path / "ck"


def test_a_leftover_is_neither_deleted_nor_gone_on_with_unasked(unfinished):
    with pytest.raises(CheckpointWriteError, match=r"(?s)unfinished checkpoint is in the way.*2 leaves in.*--resume"):
        OrbaxSink(unfinished, describe(content())[0])
    with OrbaxSink(unfinished, describe(content())[0], resume=True) as sink:
        assert len(sink.done) == 2


@pytest.mark.parametrize(
    ("tree", "options"), [(content(7), {}), (content(size=51), {}), (content(), {"version": "v1"})]
)
def test_another_conversion_is_not_gone_on_with(unfinished, tree, options):
    with pytest.raises(
        CheckpointWriteError,
        match=r"(?s)another conversion.*same tree, version, item and number of processes.*Delete that",
    ):
        OrbaxSink(unfinished, describe(tree)[0], resume=True, **options)


def test_a_damaged_journal_is_named(unfinished):
    journal = unfinished.with_name(unfinished.name + SUFFIX) / "journal"
    header, *lines = journal.read_text().splitlines()
    for text in ("\x00\n" + lines[0] + "\n", header + "\n{}\n", header + '\n{"path": 3}\n', "[]\n[]\n"):
        journal.write_text(text)
        with pytest.raises(CheckpointWriteError, match=r"(?s)left unfinished is damaged.*journal.*Delete that folder"):
            OrbaxSink(unfinished, describe(content())[0], resume=True)
        assert journal.read_text() == text


def test_a_run_that_wrote_nothing_leaves_nothing_in_the_way(tmp_path):
    tree = content()
    with OrbaxSink(tmp_path / "ck", describe(content(7))[0]):
        pass
    write(tmp_path / "ck", tree)
    assert_trees_equal(read_tree(tmp_path / "ck"), tree)


def test_two_writers_of_one_checkpoint(tmp_path):
    shape, values = describe(content())
    with OrbaxSink(tmp_path / "ck", shape) as sink:
        with pytest.raises(CheckpointWriteError, match=r"(?s)another process is writing.*expected: one writer"):
            OrbaxSink(tmp_path / "ck", shape, resume=True)
        sink.write(values)
        sink.finish({})
    assert_trees_equal(read_tree(tmp_path / "ck"), content())


def test_a_finished_checkpoint_is_not_resumed(tmp_path):
    write(tmp_path / "ck", content())
    with pytest.raises(CheckpointExistsError):
        OrbaxSink(tmp_path / "ck", describe(content())[0], resume=True)


# --- full disks ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error(tmp_path):
    script = textwrap.dedent("""
        import sys
        from bridge._errors import CheckpointWriteError
        from tests.support.orbax_files import content, write
        try:
            write(sys.argv[1], content(size=400))
        except CheckpointWriteError as error:
            print(error)
    """)
    text = run_limited(script, tmp_path / "ck")
    assert f"the checkpoint could not be written: {tmp_path / 'ck'}" in text
    assert "File too large" in text
    assert "--resume" in text
    assert not (tmp_path / "ck").exists()
    write(tmp_path / "ck", content(size=400), resume=True)
    assert_trees_equal(read_tree(tmp_path / "ck"), content(size=400))


@pytest.mark.parametrize("limit", [20, 20_000], ids=["opening an array", "writing one"])
def test_the_reason_is_shown_however_long_the_path(tmp_path, limit):
    script = textwrap.dedent("""
        import resource, signal, sys
        import numpy as np
        import tensorstore
        from bridge.checkpoint.formats.orbax.write import _cause
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        store = {"driver": "ocdbt", "base": f"file://{sys.argv[1]}/", "path": "kernel/"}
        spec = {"driver": "zarr3", "kvstore": store}
        values = np.random.default_rng(0).random((256, 256), np.float32)
        try:
            array = tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=values.shape).result()
            array.write(values).result()
        except ValueError as error:
            print(_cause(error))
    """)
    folder = tmp_path / ("x" * 200) / ("y" * 200)
    done = run_forked(script, folder, limit)
    assert done.stdout == "File too large\n", done.stdout + done.stderr


def test_a_small_disk(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    capfd.readouterr()
    try:
        with pytest.raises(CheckpointWriteError, match=r"(?s)could not be written: .*room for \d+ more.*No space left"):
            write(disk / "ck", content(size=400))
        assert not (disk / "ck").exists()
        assert capfd.readouterr() == ("", "")
        small = content(size=20)
        shutil.rmtree(disk / f"ck{SUFFIX}")
        write(disk / "ck", small)
        assert_trees_equal(read_tree(disk / "ck"), small)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_for_a_while(unfinished, monkeypatch):
    """The batch is on disk, its lines in the journal are not: half of one would damage the next."""
    shape, values = describe(content())
    journal = unfinished.with_name(unfinished.name + SUFFIX) / "journal"
    rest = dict(list(values.items())[2:])
    before = journal.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with OrbaxSink(unfinished, shape, resume=True) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CheckpointWriteError, match="No space left on device"):
                sink.write(rest)
        assert journal.read_bytes() == before
        sink.write(rest)
        sink.finish({})
    assert_trees_equal(read_tree(unfinished), content())


def test_the_journal_names_every_leaf_once(unfinished):
    journal = unfinished.with_name(unfinished.name + SUFFIX) / "journal"
    _, *lines = map(json.loads, journal.read_text().splitlines())
    assert [line["path"] for line in lines] == [["params", f"layer_{n}", "kernel"] for n in range(2)]
