"""Several processes convert one checkpoint: the result is that of one; one that ends early ends all, which resumes."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bridge.checkpoint.conversion import _no_name_if_wrong, convert
from bridge.checkpoint.formats.open import open_source
from bridge.checkpoint.job import Job, JobError
from bridge.checkpoint.options import ConversionOptions, OptionError
from bridge.checkpoint.verification import VerificationError, verify
from tests.support import checkpoint_run as run
from tests.support.forked import Forked
from tests.support.processes import run_processes
from tests.tolerance import assert_trees_equal

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def in_threads(count, work):
    """What `work(job)` returns or raises for each process of a job, each of which is a thread here."""
    address = free_address()

    def one(rank):
        try:
            with Job.join(address, rank, count, patience=5) as job, job.together():
                return work(job)
        except (JobError, ValueError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# ---- what processes tell each other -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_hear_all_in_the_order_of_ranks(count):
    def work(job):
        job.check()
        return job.gather(f"first {job.rank}"), job.gather("x" * 3_000_000 * (job.rank % 2))

    (first, second), *others = in_threads(count, work)
    assert first == [f"first {rank}" for rank in range(count)]
    assert [len(text) for text in second] == [3_000_000 * (rank % 2) for rank in range(count)]
    assert others == [(first, second)] * (count - 1)


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_an_error_of_one_is_an_error_of_all(fails):
    def work(job):
        if job.rank == fails:
            raise ValueError("no such leaf\nand more")
        job.gather()

    found = in_threads(3, work)
    assert str(found[fails]) == "no such leaf\nand more"
    for rank in {0, 1, 2} - {fails}:
        assert isinstance(found[rank], JobError)
        assert found[rank].found == f"process {fails} has failed: no such leaf"
        assert "ended early" in str(found[rank])
        assert "--resume" in str(found[rank])


def test_whoever_works_on_finds_out_when_it_asks():
    def work(job):
        if job.rank:
            raise ValueError("gone")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            job.check()

    found = in_threads(2, work)
    assert found[0].found == "process 1 has failed: gone"


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_connection_that_closes_is_a_process_that_ended(leaves):
    def work(job):
        if job.rank == leaves:
            job.close()
            return "left"
        return [job.gather() for _ in range(3)]

    found = in_threads(2, work)
    assert found[leaves] == "left"
    assert found[1 - leaves].found == f"process {leaves} has ended"


def test_processes_that_were_asked_for_other_things():
    found = in_threads(2, lambda job: job.agree("conversion", f"to {job.rank}"))
    for error in found:
        assert isinstance(error, JobError)
    assert "the processes of a job have another conversion" in str(found[0])
    assert "process 1: to 1" in str(found[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere", 0, 2), r"no address of a coordinator\n.*host:port\n.*'nowhere'"),
        (("localhost:1", 2, 2), r"no such process in the job\n.*from 0 to 1\n.*rank 2"),
        (("192.0.2.1:1", 0, 2), r"process 0 cannot listen\n.*listen at 192.0.2.1:1"),
        (("127.0.0.1:1", 1, 2), r"process 0 has not come\n.*127.0.0.1:1\n.*refused"),
    ],
    ids=["address", "rank", "listen", "nobody"],
)
def test_a_job_that_cannot_be(arguments, text):
    with pytest.raises(JobError, match=text):
        Job.join(*arguments, patience=0.3)


def test_one_that_does_not_come():
    with pytest.raises(JobError, match=r"(?s)not all processes have come.*none of rank \[1, 2\]"):
        Job.join(free_address(), 0, 3, patience=0.3)


def test_who_else_knocks_is_not_minded():
    address = free_address()
    host, port = address.split(":")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Job.join, address, 0, 2, patience=5)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", (2).to_bytes(8, "big") + b"[]"):
            deadline = time.monotonic() + 5
            while True:
                try:
                    stranger = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
            with stranger:
                stranger.sendall(said)
        with pool.submit(Job.join, address, 1, 2, patience=5).result() as second, first.result() as job:
            assert pool.submit(second.gather, "there").result is not None
            assert job.gather("here") == ["here", "there"]


def test_two_of_one_rank():
    address = free_address()

    def one(rank):
        with pytest.raises(JobError) as caught:
            Job.join(address, rank, 3, patience=5)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(one, [0, 1, 1])
    assert "a process does not belong to the job" in first
    assert "process 1 of 3, with [0, 1] of 3 there" in first
    assert all("process 0 has not begun the job" in text for text in others)


def test_only_orbax_is_written_by_several():
    def work(job):
        with pytest.raises(OptionError, match=r"(?s)target_format.*where several processes write.*'msgpack'"):
            ConversionOptions(to="nnx", target_format="msgpack", job=job)

    assert in_threads(2, work) == [None, None]


# ---- conversions --------------------------------------------------------------------------------------------

LEAVES = 16
SCRIPT = """
import os, sys, time
from bridge.checkpoint.conversion import _no_name_if_wrong, convert
from bridge.checkpoint.job import Job
source, target, format, address, rank, count, dies, slow = sys.argv[1:]
def tell(doing, done, total):
    print(doing, done, flush=True)
    if rank == dies and done > total * 0.6:
        os.kill(os.getpid(), 9)
    time.sleep(float(slow))
with Job.join(address, int(rank), int(count), patience=60) as job:
    options = {"max_memory": 4 << 20, "resume": True, "job": job, "progress": tell}
    report = convert(source, target, to="nnx", target_format=format, **options)
print("resumed", report.resumed, report.leaves, report.verified, flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    numbers = np.random.default_rng(0)
    params = {f"Dense_{i}": {"kernel": numbers.random((256, 512), np.float32)} for i in range(LEAVES - 1)}
    params["large"] = numbers.random((2048, 512), np.float32)  # larger than its share of the memory
    return run.save({"params": params}, tmp_path_factory.mktemp("source") / "ck", "orbax")


def together(source, target, format="orbax", count=2, dies="", slow=0.0):
    """The processes of a job, each when it has ended."""
    address = free_address()
    processes = [Forked(SCRIPT, source, target, format, address, rank, count, dies, slow) for rank in range(count)]
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("format", "count"), [("orbax", 2), ("orbax-v1", 4)])
def test_the_result_is_that_of_one_process(source, format, count, tmp_path):
    for done in together(source, tmp_path / "several", format, count):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"resumed 0 {LEAVES} True"
        converted = [line for line in done.stdout.splitlines() if line.startswith("converting")]
        assert converted
    assert verify(tmp_path / "several").leaves == LEAVES
    convert(source, tmp_path / "alone", to="nnx", target_format=format)
    assert_trees_equal(run.load(tmp_path / "several", format), run.load(tmp_path / "alone", format))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "several"]
    metadata = [dict(open_source(tmp_path / name).metadata) for name in ("several", "alone")]
    assert metadata[0] == metadata[1]


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "count"), [(0, 2), (1, 2), (2, 4)])
def test_one_that_is_killed_ends_the_others_and_resumes(source, dies, count, tmp_path):
    start = time.monotonic()
    ended = together(source, tmp_path / "out", count=count, dies=dies, slow=0.05)
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out").exists()
    for rank, done in enumerate(ended):
        if rank == dies:
            assert done.returncode == -9
        else:
            assert done.returncode == 1
            assert "JobError: a process of the job has ended early" in done.stderr
            assert f"found: process {dies} has ended" in done.stderr
    again = together(source, tmp_path / "out", count=count)
    for done in again:
        assert done.returncode == 0, done.stderr
        assert 0 < int(done.stdout.splitlines()[-1].split()[1]) < LEAVES
    assert verify(tmp_path / "out").leaves == LEAVES
    convert(source, tmp_path / "unkilled", to="nnx")
    assert_trees_equal(run.load(tmp_path / "out", "orbax"), run.load(tmp_path / "unkilled", "orbax"))


@pytest.mark.slow
def test_the_command(source, tmp_path):
    code = "from bridge import cli; import sys; cli.main(sys.argv[1:])"
    words = ["convert", source, tmp_path / "out", "--to", "nnx", "--max-memory", "6MiB", "--job"]
    address = free_address()
    processes = [Forked(code, *words, f"{address},{rank},2") for rank in range(2)]
    first, second = [process.wait() for process in processes]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "written and verified" in first.stdout
    assert second.stdout == ""
    assert verify(tmp_path / "out").leaves == LEAVES
    wrong = Forked(code, *words, "here,2,2").wait()
    assert wrong.returncode == 2
    assert "'here,2,2' is no process of a job" in " ".join(wrong.stderr.replace("│", "").split())


@pytest.mark.slow
def test_the_processes_of_jax_distributed(source, tmp_path):
    run_processes("tests.support.converting_job", source, tmp_path / "out", devices=1)
    assert verify(tmp_path / "out").leaves == LEAVES


def test_what_one_finds_wrong_is_wrong_for_all(tmp_path):
    """The threads are processes here; each writes its share of a target, of which one then reads other bits."""

    def work(job):
        with _no_name_if_wrong(tmp_path / "out", job):
            if job.rank:
                raise VerificationError(tmp_path / "out", {"other bits": [("w",)]})

    (tmp_path / "out").mkdir()
    found = in_threads(3, work)
    assert all(isinstance(error, VerificationError) for error in found)
    assert "process 1 of the job: verification failed" in str(found[0])
    assert f"It is now at {tmp_path}/out.failed-verification" in str(found[0])
    assert found[1].__notes__ == [f"It is now at {tmp_path}/out.failed-verification"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed-verification"]
