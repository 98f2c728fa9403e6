"""How XLA compiles the programs of the tests on a CPU: fast, unless asked to optimize them as it does for users.

Most programs here run once, and optimizing them took two thirds of a cold run. `TESTS_OPTIMIZED=1` leaves it all to
XLA's defaults: so run the gate's second Python, the grids, the models and the oldest versions, so that every law is
tested on what users run, too. An accelerator is always left alone.
Works through the environment, before jax is imported; must not import it.
"""

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

VARIABLE = "TESTS_OPTIMIZED"
_ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def flags(environment: Mapping[str, str]) -> Iterator[str]:
    """For XLA_FLAGS, in which a flag that this XLA does not know ends the process."""
    is_on_cpu = environment.get("JAX_PLATFORMS", "cpu") == "cpu" and not any(map(Path.exists, map(Path, _ACCELERATORS)))
    if environment.get(VARIABLE) == "1" or not is_on_cpu:
        return
    yield "--xla_backend_optimization_level=0"
    yield "--xla_cpu_parallel_codegen_split_count=1"  # else one of LLVM's modules for each core
    if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        yield "--xla_cpu_use_fusion_emitters=false"  # they make and optimize a module of MLIR for each fusion
