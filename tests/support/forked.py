"""Child processes that begin where the imports end: forked from a server that has imported what conversions need.

Law: a child is a process of its own, and JAX starts in it: it may be killed, and its limits and environment are its
own. Only what importing costs is shared: two seconds a child. What is about importing starts an interpreter instead.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

#: None of them starts a JAX backend or a thread of Python's: what is forked may not have either.
IMPORTED = [
    "bridge.checkpoint.conversion",
    "bridge.checkpoint.loading",
    "bridge.checkpoint.save",
    "bridge.cli",
    "flax.training.train_state",
    "orbax.checkpoint.experimental.v1",
    "tests.support.orbax_files",
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(IMPORTED)


@dataclass(frozen=True)
class Done:
    """What a process left, as `subprocess.CompletedProcess` says it."""

    returncode: int  # `-signal` if it was killed
    stdout: str
    stderr: str


class Forked:
    """A process that runs `code` as `python -c code *arguments` would, in the folder of this one.

    It may print what a pipe holds, 64 KiB, before somebody reads.
    """

    def __init__(self, code: str, *arguments: object, environment: Mapping[str, str] | None = None):
        reader, writer = _processes.Pipe(duplex=False)
        self._errors = tempfile.NamedTemporaryFile("r+")  # noqa: SIM115  closed in `wait`
        words = [str(argument) for argument in arguments]
        call = (code, words, dict(environment or {}), os.getcwd(), writer, self._errors.name)
        self._process = _processes.Process(target=_run, args=call, daemon=True)
        self._process.start()
        writer.close()  # the child has its own, and with it ends what can be read
        self.output = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 120) -> Done:
        """Once it has ended: what it has printed since somebody read.

        Raises:
          AssertionError: it has not, and was killed.
        """
        self._process.join(timeout)
        returncode = self._process.exitcode
        self._process.kill()
        with self.output, self._errors:
            if returncode is None:
                raise AssertionError(f"still running after {timeout} seconds:\n{self._errors.read()}")
            return Done(returncode, self.output.read(), self._errors.read())


def run_forked(code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Done:
    """What such a process prints, and how it ends."""
    return Forked(code, *arguments, environment=environment).wait()


def _run(
    code: str, arguments: list[str], environment: dict[str, str], folder: str, output: Connection, errors: str
) -> None:
    """In the child. An exception ends it with status 1 and its traceback among the errors."""
    os.dup2(output.fileno(), 1)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
