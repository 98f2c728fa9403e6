"""The folder where XLA keeps what it compiled: one for both workers, for child processes, and for the next run.

Law: it saves time and changes no result. JAX names an entry after the program, the jaxlib, the flags and the devices;
the folder is named after the processor, since XLA compiles for the very one it runs on. An entry that cannot be read
is compiled anew: JAX warns of it, and pyproject.toml lets that warning pass.
Lies in the user's cache and not in the checkout: every clone, worktree and run of the gate finds it there.
Works through the environment, before jax is imported; must not import it.
"""

import contextlib
import hashlib
import platform
from collections.abc import MutableMapping
from pathlib import Path

LIMIT = 1 << 30  # bytes; all of the suite on two Pythons is far below


def set_environment(environment: MutableMapping[str, str]) -> None:
    """Let JAX, here and in child processes, keep all that it compiles. What the user has set stays.

    All: `x + 1` compiles in 40 ms and is read in 6; most of what the suite compiles is not much larger.
    """
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder(environment)))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def folder(environment: MutableMapping[str, str]) -> Path:
    """Where our own cache is, on this machine."""
    caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "linen-nnx-bridge" / f"jax-{processor()}"


def processor() -> str:
    """A name for the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    # `model name` and `flags` on x86, `Features` on ARM; the clock and the core's number are on other lines
    features = {line for line in lines if line.startswith(("model name", "flags", "Features")) or len(lines) == 1}
    digest = hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def trim(cache: Path, limit: int = LIMIT) -> None:
    """Remove entries until `limit` bytes are left, those first that were read longest ago.

    Not `jax_compilation_cache_max_size`: it takes a lock for every read, and looks at every file for every write.
    """
    entries = []
    for file in cache.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another run trims too
            entries.append((file.stat(), file))
    entries.sort(key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime))
    size = sum(stat.st_size for stat, _ in entries)
    for stat, file in entries:
        if size <= limit:
            return
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        size -= stat.st_size


def trim_own(environment: MutableMapping[str, str]) -> None:
    """Trim our own cache; a folder that the user chose is the user's to keep small."""
    own = folder(environment)
    if environment.get("JAX_COMPILATION_CACHE_DIR") == str(own):
        trim(own)
