"""Converting a checkpoint of many leaves, of one large leaf, and by several processes: how time and memory grow.

Law: as in `benchmarks.checkpoint`, every run is a process of its own, measured from after its imports; `peak` is of the
kernel's count of resident bytes above the start. All conversions verify.
What is converted is written by `OrbaxSink`, in chunks of 8 MiB: Orbax itself takes minutes to save 100,000 leaves, and
by default keeps a large one in a single chunk, which can only be read whole.
"""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import measured
from benchmarks.figures import Figure

_ROW = 16384  # numbers in a row of the large leaf
_OPTIMIZER = ("opt_state",)
_TURNED = """
[[rule]]
from = "params/kernel"
to = "params/kernel"
transpose = [1, 0]
"""


def figures(
    leaves: Sequence[int], large: int, memory: int, processes: Sequence[int], folder: Path | None = None
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """All of them, and every run as it was measured.

    Args:
      leaves: how many, of 256 bytes each.
      large: bytes of the one large leaf.
      memory: `--max-memory`, bytes.
      processes: how many convert together; leaves of 4 MiB, as many bytes as the large leaf has.
    """
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        runs += [_many_leaves(here, count, memory) for count in leaves]
        rules = here / "turned.toml"
        rules.write_text(_TURNED)
        _call("make", "large", here / "source", large)
        for what, words in (("one leaf", []), ("one leaf, transposed", ["--rules", str(rules)])):
            runs.append({"what": what, "count": large, **_convert(here, memory, [words])})
        shutil.rmtree(here / "source")
        _call("make", "middle", here / "source", large)
        runs += [_several(here, count, memory) for count in processes]
    return list(_figures(runs, memory)), runs


def _figures(runs: Sequence[dict[str, Any]], memory: int) -> Iterator[Figure]:
    many = [run for run in runs if run["what"] == "leaves"]
    for run in many:
        yield Figure(f"{run['count']} leaves, seconds", run["seconds"])
        yield Figure("  milliseconds a leaf", 1000 * run["seconds"] / run["count"])
        yield Figure("  peak memory, MiB", run["peak"] / 2**20)
    for less, more in itertools.pairwise(many):
        growth = more["count"] / less["count"]
        name = f"{less['count']} -> {more['count']} leaves, time / proportion"
        yield Figure(name, more["seconds"] / less["seconds"] / growth, 2.0)
        yield Figure("  memory / proportion", more["peak"] / less["peak"] / growth, 1.5)
    for run in runs:
        if run["what"].startswith("one leaf"):
            yield Figure(f"{run['what']}, {run['count'] >> 20} MiB, seconds", run["seconds"])
            yield Figure("  peak memory / --max-memory", run["peak"] / memory, 1.5)
    alone = next((run["seconds"] for run in runs if run["what"] == "processes"), None)
    for run in runs:
        if run["what"] == "processes":
            yield Figure(f"{run['count']} processes, time / that of the first row", run["seconds"] / alone)
            yield Figure("  largest peak memory / --max-memory", run["peak"] / memory, 1.5)


def _many_leaves(here: Path, count: int, memory: int) -> dict[str, Any]:
    _call("make", "leaves", here / "source", count)
    run = {"what": "leaves", "count": count, **_convert(here, memory, [[]])}
    shutil.rmtree(here / "source")
    return run


def _several(here: Path, count: int, memory: int) -> dict[str, Any]:
    words = _words_of_job(count) if count > 1 else [[]]
    return {"what": "processes", "count": count, **_convert(here, memory, words)}


def _convert(here: Path, memory: int, words: Sequence[Sequence[str]]) -> dict[str, Any]:
    """One conversion by as many processes as there are words; the longest and the largest of them."""
    started = [_started("convert", here / "source", here / "target", memory, *each) for each in words]
    found = [_output(process) for process in started]
    shutil.rmtree(here / "target")
    return {key: max(each[key] for each in found) for key in ("seconds", "peak", "anon")}


def _words_of_job(count: int) -> list[list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [["--job", f"127.0.0.1:{port},{rank},{count}"] for rank in range(count)]


def _call(*words: object) -> dict[str, Any]:
    return _output(_started(*words))


def _started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.scale", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _output(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed:\n{errors}")
    return json.loads(printed.splitlines()[-1])


# ---- one run, in a process of its own ------------------------------------------------------------------------


def make(what: str, target: Path, number: int) -> dict[str, Any]:
    """A checkpoint of random numbers: `number` small leaves, or one of so many bytes, or leaves of 4 MiB."""
    import numpy as np

    from bridge.checkpoint.formats.open import open_sink
    from bridge.checkpoint.tree.regions import blocks, shape_of
    from bridge.checkpoint.tree.tree import Tree

    random = np.random.default_rng(0)
    tree = Tree(_large(number)) if what == "large" else Tree(_state(*_many(what, number)), {}, frozenset({_OPTIMIZER}))
    with open_sink(target, "orbax", tree) as sink:
        if what == "large":
            ((path, leaf),) = tree.leaves.items()
            parts = blocks(leaf.shape, 1 << 22, sink.chunk(path))
            sink.write_blocks(path, ((part, random.random(shape_of(part), np.float32)) for part in parts))
        else:
            paths = list(tree.leaves)
            at_once = 1000 if what == "leaves" else 8
            for first in range(0, len(paths), at_once):
                some = paths[first : first + at_once]
                forms = {path: tree.leaves[path] for path in some}
                sink.write(
                    {
                        path: np.asarray(random.random(leaf.shape, np.float32), leaf.dtype)
                        for path, leaf in forms.items()
                    }
                )
        sink.finish({})
    return {}


def _large(nbytes: int) -> dict[Any, Any]:
    from bridge.checkpoint.tree.layout import Leaf

    shape = (max(1, nbytes // (4 * _ROW)), _ROW)
    path = ("params", "kernel")
    return {path: Leaf(path, shape, "float32", 4 * shape[0] * _ROW)}


def _many(what: str, number: int) -> tuple[int, tuple[int, int]]:
    """How many leaves of which shape."""
    return (number, (8, 8)) if what == "leaves" else (max(1, number >> 22), (1024, 1024))


def _state(count: int, shape: tuple[int, int]) -> dict[Any, Any]:
    """A Linen training state: params, and the two moments of adam."""
    from bridge.checkpoint.tree.layout import Leaf

    slots = (("params",), (*_OPTIMIZER, "0", "mu"), (*_OPTIMIZER, "0", "nu"))
    layers = range(max(1, count // len(slots)))
    paths = [(*slot, f"Dense_{layer}", "kernel") for slot in slots for layer in layers]
    leaves = {path: Leaf(path, shape, "float32", 4 * shape[0] * shape[1]) for path in paths}
    return leaves | {path: Leaf(path, (), "int32", 4) for path in ((*_OPTIMIZER, "0", "count"), ("step",))}


def convert(source: str, target: str, memory: str, *words: str) -> dict[str, Any]:
    """The command `linen-nnx convert`, without the start of its interpreter."""
    import tensorstore  # noqa: F401  its import is not what is measured

    import bridge.checkpoint  # noqa: F401  likewise
    from bridge import cli
    from bridge.checkpoint.stream import share_freed_memory

    share_freed_memory()  # as the command does by itself, but before the meter's thread is there

    def work() -> None:
        try:
            cli.main(["convert", source, target, "--to", "nnx", "--max-memory", memory, "--quiet", *words])
        except SystemExit as end:
            if end.code:
                raise

    return measured(work)


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "make":
        what, target, number = words
        print(json.dumps(make(what, Path(target), int(number))))
    else:
        print(json.dumps(convert(*words)))
