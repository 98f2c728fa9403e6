"""The journal: a line is whole or not there, whatever the disk does; one writer; what is damaged is said to be."""

import errno
import json
import os

import pytest

from bridge.checkpoint.formats.journal import Journal
from tests.support.full_disk import fill_up, journal_has_room

FIRST, SECOND = {"tree": "3f"}, {"done": [1, 2], "text": "é\n"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_lines_come_back_in_order(path):
    journal = Journal(path)
    journal.append([FIRST])
    journal.append([SECOND, SECOND])
    assert journal.read() == [FIRST, SECOND, SECOND] == lines(path)
    journal.restart(SECOND)
    assert journal.read() == [SECOND] == lines(path)
    journal.close()


def test_what_begins_anew_with_the_line_that_is_there_has_no_moment_without_it(path, monkeypatch):
    path.write_bytes(json.dumps(FIRST).encode() + b'\n{"done')
    journal = Journal(path)
    monkeypatch.setattr(journal, "append", None)
    journal.restart(FIRST)
    journal.close()
    assert lines(path) == [FIRST]


def test_half_a_line_is_not_read_stays_until_one_goes_on_and_is_cut_off_then(path):
    torn = json.dumps(FIRST).encode() + b'\n{"done'
    path.write_bytes(torn)
    journal = Journal(path)
    assert journal.read() == [FIRST]
    assert path.read_bytes() == torn
    journal.go_on()
    journal.append([SECOND])
    journal.close()
    assert lines(path) == [FIRST, SECOND]


@pytest.mark.parametrize("room", [0, 1, 7])
def test_what_a_full_disk_took_of_a_line_is_cut_off(path, monkeypatch, room):
    with journal_has_room(1000, monkeypatch):
        journal = Journal(path)
        journal.append([FIRST])
        fill_up(left=room)
        with pytest.raises(OSError, match="No space left on device"):
            journal.append([SECOND, FIRST])
        assert lines(path) == [FIRST]
        journal.close()
        fill_up(left=1000)
        journal = Journal(path)
        journal.go_on()
        journal.append([SECOND])
        journal.close()
    assert lines(path) == [FIRST, SECOND]


def test_a_line_that_did_not_reach_the_disk_is_not_there(path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal(path)
    journal.append([FIRST])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            journal.append([SECOND])
    assert lines(path) == [FIRST]
    journal.append([SECOND])
    assert lines(path) == [FIRST, SECOND]
    journal.close()


def test_one_writer(path):
    journal = Journal(path)
    with pytest.raises(BlockingIOError):
        Journal(path)
    journal.close()
    Journal(path).close()


@pytest.mark.parametrize(("content", "text"), [("[1]\n", "a line that is list, and no object"), ("{x\n", "Expecting")])
def test_what_is_no_object_is_damage(path, content, text):
    path.write_text(content)
    journal = Journal(path)
    with pytest.raises(ValueError, match=text):
        journal.read()
    journal.close()
