"""Processes that are forked where the imports end are processes of their own, which end as an interpreter does."""

import os
import signal

import pytest

from tests.support.forked import Forked, run_forked


def test_it_prints_and_ends_as_an_interpreter_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; print(os.getpid(), os.getcwd(), os.environ['OWN'], *sys.argv[1:]); sys.exit(3)"
    done = run_forked(code, "a b", 4, environment={"OWN": "mine"})
    process, *rest = done.stdout.split(maxsplit=1)
    assert int(process) != os.getpid()
    assert rest == [f"{tmp_path} mine a b 4\n"]
    assert (done.returncode, done.stderr) == (3, "")
    assert "OWN" not in os.environ


def test_an_error_ends_it_with_a_traceback():
    done = run_forked("print('before'); raise ValueError('why')")
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert done.stderr.endswith("ValueError: why\n")


def test_it_has_imported_jax_and_started_no_device():
    done = run_forked(
        "import sys; assert 'jax' in sys.modules; import jax; print(jax.device_count())",
        environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_it_is_killed_while_it_waits():
    process = Forked("import time; print('waits', flush=True); time.sleep(60)")
    assert process.output.readline() == "waits\n"
    assert process.returncode is None
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL


def test_one_that_does_not_end_is_killed():
    process = Forked("import time; time.sleep(60)")
    with pytest.raises(AssertionError, match=r"still running after 0\.1 seconds"):
        process.wait(timeout=0.1)
