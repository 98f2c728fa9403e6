"""What the sinks of all formats promise alike: full disks, kills between two steps, what is in the way, damage."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from bridge._errors import CheckpointExistsError, CheckpointWriteError
from bridge.checkpoint.formats.open import SINK_FORMATS, open_sink
from tests.support.checkpoint_files import as_dicts, describe, load, save
from tests.support.full_disk import fill_up, journal_has_room
from tests.tolerance import assert_trees_equal

TREE = {
    "params": {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.ones(3, jnp.bfloat16)},
    "name": "run",
    "step": 7,
}
SHAPE, VALUES = describe(TREE)
ORDER = SHAPE.order
ROOMY = 1 << 20


@pytest.fixture(params=SINK_FORMATS)
def format(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out"


def some(*places):
    return {place: VALUES[place] for place in places}


def resume(path, format, done):
    """Go on after `done` leaves; the checkpoint is then what one run would have made, and nothing is beside it."""
    with open_sink(path, format, SHAPE, resume=True) as sink:
        assert sink.done == set(ORDER[:done])
        sink.write(some(*ORDER[done:]))
        sink.finish({"m": 1})
    save(path.with_name("whole"), format, TREE)
    assert_trees_equal(load(path, format=format), load(path.with_name("whole"), format=format))
    names = {child.name.removesuffix(".metadata.json") for child in path.parent.iterdir()}
    assert names == {"out", "whole"}


def full_disk(path):
    """One error that names the path and the reason, and says how to go on."""
    text = rf"(?s)could not be written: {path}\n.*found: No space left on device\n.*resume=True"
    return pytest.raises(CheckpointWriteError, match=text)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- full disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 9], ids=["no room", "room for half a line"])
def test_a_full_disk_when_a_batch_is_noted(path, format, room, monkeypatch):
    """The bytes of the batch are on disk, its line in the journal is not; leaving the `with` raises nothing else."""

    def write():
        with open_sink(path, format, SHAPE) as sink:
            sink.write(some(*ORDER[:1]))
            fill_up(left=room)
            sink.write(some(*ORDER[1:3]))

    with journal_has_room(ROOMY, monkeypatch), full_disk(path):
        write()
    assert not path.exists()
    resume(path, format, done=1)


def test_a_full_disk_for_a_while_when_a_batch_is_noted(path, format, monkeypatch):
    with journal_has_room(ROOMY, monkeypatch), open_sink(path, format, SHAPE) as sink:
        fill_up(left=9)
        with full_disk(path):
            sink.write(some(*ORDER[:1]))
        fill_up(left=ROOMY)
        sink.write(some(*ORDER[:1]))
    resume(path, format, done=1)


def test_a_full_disk_when_the_journal_is_begun(path, format, monkeypatch):
    with journal_has_room(9, monkeypatch), full_disk(path):
        open_sink(path, format, SHAPE)
    assert not list(path.parent.iterdir())
    resume(path, format, done=0)


@pytest.mark.parametrize("format", ["msgpack", "safetensors"])
def test_a_full_disk_when_the_end_is_noted(path, format, monkeypatch):
    """A file's journal tells that it is whole before it gets its name."""

    def write():
        with open_sink(path, format, SHAPE) as sink:
            sink.write(some(*ORDER))
            fill_up(left=9)
            sink.finish({"m": 1})

    with journal_has_room(ROOMY, monkeypatch), full_disk(path):
        write()
    assert not path.exists()
    resume(path, format, done=len(ORDER))


def test_a_full_disk_when_it_is_finished(path, format, monkeypatch):
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with full_disk(path) as caught:
                sink.finish({"m": 1})
    assert "Nothing is at the target" in str(caught.value)
    assert not path.exists()
    resume(path, format, done=len(ORDER))


def test_what_cannot_be_cleaned_up_does_not_claim_that_nothing_is_there(path, format, monkeypatch):
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        with monkeypatch.context() as patch:
            patch.setattr(type(sink), "_discard", no_space)
            with full_disk(path) as caught:
                sink.finish({"m": 1})
    assert "Nothing is at the target" not in str(caught.value)
    assert_trees_equal(as_dicts(load(path, format=format)), as_dicts(TREE))
    resume(path, format, done=len(ORDER))


# --- between two steps --------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a test raises where a process could be killed."""


def test_wherever_it_is_killed_it_goes_on(tmp_path, format, monkeypatch):
    """Before every call that puts something on disk: a batch, a line, the last bytes, the name."""
    real = os.fsync
    for last in range(100):
        path, calls = tmp_path / str(last) / "out", iter(range(last))
        path.parent.mkdir()

        def fsync(handle, calls=calls):
            if next(calls, None) is None:
                raise Killed
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                with open_sink(path, format, SHAPE) as sink:
                    sink.write(some(*ORDER[:2]))
                    sink.write(some(*ORDER[2:]))
                    sink.finish({"m": 1})
                break
            except Killed:
                pass
        with open_sink(path, format, SHAPE, resume=True) as sink:
            sink.write(some(*(place for place in ORDER if place not in sink.done)))
            sink.finish({"m": 1})
        resumed = load(path, format=format)
        assert_trees_equal(as_dicts(resumed), as_dicts(TREE))
        assert {child.name.removesuffix(".metadata.json") for child in path.parent.iterdir()} == {"out"}
    assert last > 5


def test_killed_before_its_first_line_it_is_not_in_the_way(path, format, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("bridge.checkpoint.formats.journal.Journal.append", killed)
        with pytest.raises(Killed):
            open_sink(path, format, SHAPE)
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        sink.finish({"m": 1})
    assert_trees_equal(as_dicts(load(path, format=format)), as_dicts(TREE))


def test_a_journal_of_leaves_that_are_gone_is_not_believed(path, format):
    """Not even by a run that was to be resumed: somebody deleted the leaves."""
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        content = sink._content
    if content.is_dir():
        shutil.rmtree(content)
    else:
        content.unlink()
    resume(path, format, done=0)


# --- refused ------------------------------------------------------------------------------------------------


def test_after_its_end_nothing_is_written(path, format):
    with open_sink(path, format, SHAPE) as sink:
        pass
    with pytest.raises(CheckpointWriteError, match=r"(?s)the sink is closed.*after the end of its `with`"):
        sink.write(some(*ORDER[:1]))


def test_what_comes_to_the_path_meanwhile_stays(path, format):
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        path.write_text("mine")
        with pytest.raises(CheckpointExistsError, match=r"(?s)target exists and is in the way: .*a file of 4 bytes"):
            sink.finish({})
    assert path.read_text() == "mine"
    path.unlink()
    resume(path, format, done=len(ORDER))


def test_killed_twice_before_the_first_line_of_a_leaf(path, format, monkeypatch):
    """The second run begins anew, and dies while the content of the first one is still there."""
    with open_sink(path, format, SHAPE) as sink:
        monkeypatch.setattr(sink._journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            sink.write(some(*ORDER[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(type(sink), "_open_content", killed)
        with pytest.raises(KeyboardInterrupt):
            open_sink(path, format, SHAPE, resume=True)
    resume(path, format, done=0)


def killed(*_, **__):
    raise KeyboardInterrupt


def test_a_leftover_without_a_journal_is_not_overwritten(path, format):
    """Nothing of ours, it seems: it has no journal, or an empty one."""
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER))
        content, journal = sink._content, sink._journal_path
    before = {child: child.read_bytes() for child in [content, *content.rglob("*")] if child.is_file()}
    journal.write_bytes(b"")
    with pytest.raises(CheckpointWriteError, match=r"(?s)an unfinished checkpoint is in the way.*\d+ bytes of an earl"):
        open_sink(path, format, SHAPE)
    with pytest.raises(CheckpointWriteError, match=r"(?s)left unfinished is damaged.*a damaged journal.*it is empty"):
        open_sink(path, format, SHAPE, resume=True)
    assert {child: child.read_bytes() for child in before} == before


def test_a_journal_with_leaves_of_another_tree_is_damaged(path):
    with open_sink(path, "orbax", SHAPE) as sink:
        sink.write(some(*ORDER))
        journal = sink._journal_path
    first, line, *rest = journal.read_text().splitlines()
    line = json.dumps(json.loads(line) | {"path": ["else"]})
    journal.write_text("\n".join([first, line, *rest]) + "\n")
    with pytest.raises(CheckpointWriteError, match=r"(?s)a damaged journal.*leaves that are not the tree's"):
        open_sink(path, "orbax", SHAPE, resume=True)


@pytest.mark.parametrize("format", ["msgpack", "safetensors"])
@pytest.mark.parametrize("line", ["{}", '{"done": [99], "strings": {}, "numbers": []}', '{"count": "2", "size": 0}'])
def test_a_file_whose_journal_has_a_strange_line_is_not_gone_on_with(path, format, line):
    with open_sink(path, format, SHAPE) as sink:
        sink.write(some(*ORDER[:1]))
        journal = sink._journal_path
    with journal.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointWriteError, match=r"(?s)left unfinished is damaged.*Delete out.unfinished and"):
        open_sink(path, format, SHAPE, resume=True)
