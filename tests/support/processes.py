"""Several processes of one `jax.distributed` job on this machine.

Law: what cannot go on ends: when one process fails, or time is up, all of them are killed and the caller gets an
AssertionError with what they printed; none is left behind.
"""

import socket
import time

from tests.support.forked import Forked


def run_processes(module: str, *arguments: object, count: int = 2, devices: int = 4, timeout: float = 240) -> None:
    """Run `module` with the words PORT COUNT INDEX *arguments for each INDEX, with `devices` CPU devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    start = _START.format(module=module)
    processes = [Forked(start, port, count, index, *arguments, environment=environment) for index in range(count)]
    try:
        complaint = _wait(processes, timeout)
    finally:
        for process in processes:
            process.kill()
        left = [process.wait() for process in processes]
    if complaint:
        printed = [f"--- process {index}:\n{done.stdout}{done.stderr[-6000:]}" for index, done in enumerate(left)]
        raise AssertionError("\n".join([complaint, *printed]))


#: JAX has read its environment when it was imported; it starts its devices here.
_START = """
import runpy
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
runpy.run_module("{module}", run_name="__main__")
"""


def _wait(processes: list[Forked], timeout: float) -> str:
    """What went wrong; nothing if all of them ended well."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.returncode for process in processes]
        if failed := [index for index, code in enumerate(codes) if code]:
            return f"process {failed[0]} ended with {codes[failed[0]]}"
        if None not in codes:
            return ""
        if time.monotonic() > deadline:
            return f"still running after {timeout} seconds: {[i for i, code in enumerate(codes) if code is None]}"
        time.sleep(0.05)
