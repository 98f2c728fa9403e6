"""Converting a checkpoint: time next to Orbax's own restore and save of the same tree, and what memory it takes.

Law: every run is a process of its own that has imported everything before its clock and its meter start; the peak is
that of the kernel's count of resident bytes (VmHWM), less what was resident at the start. Mapped files count in it;
`anon` beside it is the peak of memory that no file is behind (RssAnon, looked at every few milliseconds).
The numbers are random, so that compression cannot make the work smaller than it is for trained weights.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure

_SAMPLES_A_SECOND = 200
# Orbax's Linen tree: params, mu and nu of adam, beside count and step.
_SLOTS, _SCALARS = 3, 2


def figures(
    size: int, leaves: int, memory: int, rounds: int, folder: Path | None = None
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """All of them, and every run as it was measured: variant, seconds, bytes."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        _run("make", here / "linen", here / "linen", size, leaves)
        for _ in range(rounds):
            runs.append(_run("orbax", here / "linen", here / "orbax", memory))
            for verify in (0, 1):
                runs.append(_run("to_nnx", here / "linen", here / "nnx", memory, verify))
                runs.append(_run("to_linen", here / "nnx", here / "back", memory, verify))
                shutil.rmtree(here / "back")
                shutil.rmtree(here / "nnx")
            shutil.rmtree(here / "orbax")
        runs.append(_run("in_memory", here / "linen", here / "none", leaves))
    found = []
    for variant, arrow in (("to_nnx", "Linen -> NNX"), ("to_linen", "NNX -> Linen")):
        plain, verified = (_only(runs, variant, verify) for verify in (0, 1))
        orbax = _only(runs, "orbax", 0)
        found += [
            Figure(f"{arrow}, time / Orbax restore + save", _ratio(verified, orbax), 1.3),
            Figure("  without reading it again", _ratio(plain, orbax)),
            Figure(f"{arrow}, peak memory / --max-memory", _median(verified, "peak") / memory, 1.5),
            Figure("  of it in no file", _median(verified, "anon") / memory),
        ]
    found.append(Figure("Orbax restore + save, peak memory / the same", _median(orbax, "peak") / memory))
    found.append(Figure("leaves copied by a conversion in memory", float(runs[-1]["copied"]), 0.0))
    return found, runs


def _only(runs: list[dict[str, Any]], variant: str, verify: int) -> list[dict[str, Any]]:
    return [run for run in runs if run["variant"] == variant and run["verify"] == verify]


def _ratio(ours: list[dict[str, Any]], base: list[dict[str, Any]]) -> float:
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, base, strict=True))


def _median(runs: list[dict[str, Any]], what: str) -> float:
    return statistics.median(run[what] for run in runs)


def _run(variant: str, source: Path, target: Path, *numbers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoint", variant, str(source), str(target), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"variant": variant, "verify": numbers[1] if len(numbers) > 1 else 0, **found}


# ---- one run, in a process of its own ------------------------------------------------------------------------


def _shape(size: int, leaves: int) -> tuple[int, int]:
    """Of each kernel: about `size` bytes in all, in float32."""
    return max(1, size // (4 * 256 * (leaves - _SCALARS))), 256


def _make(_: Path, target: Path, size: int, leaves: int) -> dict[str, Any]:
    """A Linen training state of random numbers, written by Orbax."""
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    random = np.random.default_rng(0)
    layers = (leaves - _SCALARS) // _SLOTS

    def weights() -> dict[str, Any]:
        shape = _shape(size, leaves)
        return {f"Dense_{i}": {"kernel": jnp.asarray(random.random(shape, np.float32))} for i in range(layers)}

    adam = {"count": jnp.int32(7), "mu": weights(), "nu": weights()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, {"step": jnp.int32(7), "params": weights(), "opt_state": [adam, None]})
    return {}


def _orbax(source: Path, target: Path, memory: int) -> dict[str, Any]:
    """What a script without this library does: restore the whole tree, save it under another name."""
    import jax
    import orbax.checkpoint as ocp

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(source).item_metadata.tree
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), found)

        def work() -> None:
            checkpointer.save(target, checkpointer.restore(source, abstract))
            checkpointer.wait_until_finished()

        return measured(work)


def _convert(to: str) -> Callable[..., dict[str, Any]]:
    """The command `linen-nnx convert`, without the start of its interpreter."""

    def run(source: Path, target: Path, memory: int, verify: int) -> dict[str, Any]:
        import tensorstore  # noqa: F401  its import is not what is measured

        import bridge.checkpoint  # noqa: F401  likewise
        from bridge import cli
        from bridge.checkpoint.stream import share_freed_memory

        share_freed_memory()  # as the command does by itself, but before the meter's thread is there
        words = ["convert", str(source), str(target), "--to", to, "--max-memory", str(memory), "--quiet"]

        def work() -> None:
            try:
                cli.main([*words, *([] if verify else ["--no-verify"])])
            except SystemExit as end:
                if end.code:
                    raise

        return measured(work)

    return run


def _in_memory(_: Path, __: Path, leaves: int) -> dict[str, Any]:
    """How many leaves of variables are in other memory after a conversion to an nnx.State, or after the one back."""
    import jax
    import jax.numpy as jnp

    from bridge.checkpoint.in_memory import state_to_variables, variables_to_state

    params = {f"Dense_{i}": {"kernel": jnp.ones((64, 64)) * i} for i in range(leaves)}
    state, _ = variables_to_state({"params": params})
    back, _ = state_to_variables(state)
    places = [[leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)] for tree in (params, state, back)]
    if any(len(found) != leaves for found in places):
        raise RuntimeError(f"leaves were lost: {[len(found) for found in places]}")
    return {"copied": sum(len(set(three)) > 1 for three in zip(*map(sorted, places), strict=True))}


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, and peak bytes above the start: `peak` of all, `anon` of what no file is behind."""
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark is where the water is
    start, anon, over = _status(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(1 / _SAMPLES_A_SECOND):
            anon[0] = max(anon[0], _status()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        work()
        seconds = time.perf_counter() - begin
    finally:
        over.set()
        watcher.join()
    return {"seconds": seconds, "peak": _status()["VmHWM"] - start["VmRSS"], "anon": anon[0] - start["RssAnon"]}


def _status() -> dict[str, int]:
    """Bytes by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = (line.split() for line in lines if line.endswith("kB"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in rows}


_VARIANTS = {"make": _make, "orbax": _orbax, "to_nnx": _convert("nnx"), "to_linen": _convert("linen")}
_VARIANTS["in_memory"] = _in_memory

if __name__ == "__main__":
    variant, source, target, *numbers = sys.argv[1:]
    print(json.dumps(_VARIANTS[variant](Path(source), Path(target), *map(int, numbers))))
