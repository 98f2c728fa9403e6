"""Several processes of one `jax.distributed` job on this machine.

Law: what cannot go on ends: when one process fails, or time is up, all of them are killed and the caller gets an
AssertionError with what they printed; none is left behind.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]


def run_processes(module: str, *arguments: object, count: int = 2, devices: int = 4, timeout: float = 240) -> None:
    """Run `python -m module PORT COUNT INDEX *arguments` for each INDEX, with `devices` CPU devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    with contextlib.ExitStack() as stack:
        outputs = [
            stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)
        ]  # a full pipe would stop them
        commands = [
            [sys.executable, "-m", module, str(port), str(count), str(index), *map(str, arguments)]
            for index in range(count)
        ]
        complaint = _run(commands, outputs, environment, timeout)
        if complaint:
            raise AssertionError("\n".join([complaint, *map(_printed, range(count), outputs)]))


def _run(commands: list[list[str]], outputs: list[IO[str]], environment: dict[str, str], timeout: float) -> str:
    """What went wrong; nothing if all of them ended well."""
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        for command, output in zip(commands, outputs, strict=True)
    ]
    try:
        return _wait(processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _printed(index: int, output: IO[str]) -> str:
    output.seek(0)
    return f"--- process {index}:\n{output.read()[-6000:]}"


def _wait(processes: list[subprocess.Popen], timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        if failed := [index for index, code in enumerate(codes) if code]:
            return f"process {failed[0]} ended with {codes[failed[0]]}"
        if None not in codes:
            return ""
        if time.monotonic() > deadline:
            return f"still running after {timeout} seconds: {[i for i, code in enumerate(codes) if code is None]}"
        time.sleep(0.05)
