"""The compilation cache of the test run: shared through the environment, harmless when damaged, kept small."""

import os
import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.support import compile_cache


@pytest.fixture
def own_cache(tmp_path):
    """A cache of its own for one test, which keeps everything."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled():
    """A function that JAX has not seen in this process, and that is the same program each time."""

    def curious(x):
        return jnp.sin(x) * 7 + x

    return float(jax.jit(curious)(0.5))


@pytest.mark.parametrize("damage", [lambda _: b"", lambda content: content[: len(content) // 2]], ids=["empty", "torn"])
def test_a_damaged_entry_is_compiled_anew(own_cache, damage):
    before = compiled()
    entries = list(own_cache.glob("jit_curious*-cache"))
    assert len(entries) == 1
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
    assert compiled() == before


@pytest.fixture
def hits():
    """How often a compiled program was found on disk."""
    found = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


def test_the_cache_is_used(own_cache, hits):
    compiled()
    hits.clear()
    compiled()
    assert len(hits) == 1


def test_no_compile_cache(own_cache, no_compile_cache, hits):
    compiled()
    compiled()
    assert not hits
    assert not list(own_cache.iterdir())


def test_child_processes_share_it(tmp_path):
    """Whoever set the folder: what this run uses is what its child uses."""
    code = "import jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == os.environ["JAX_COMPILATION_CACHE_DIR"] == jax.config.jax_compilation_cache_dir


def test_what_the_user_set_stays():
    environment = {"JAX_COMPILATION_CACHE_DIR": "/mine", "HOME": "/nobody"}
    compile_cache.set_environment(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/mine"
    environment = {"XDG_CACHE_HOME": "/caches"}
    compile_cache.set_environment(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("/caches/linen-nnx-bridge/jax-")


def write(folder, **ages):
    for name, age in ages.items():
        file = folder / f"{name}-cache"
        file.write_bytes(b"x" * 10)
        os.utime(file, (1e9 - age, 1e9 - age))


def test_what_was_read_longest_ago_goes_first(tmp_path):
    write(tmp_path, old=3, new=1, middle=2)
    compile_cache.trim(tmp_path, limit=20)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["middle-cache", "new-cache"]
    compile_cache.trim(tmp_path, limit=20)
    assert len(list(tmp_path.iterdir())) == 2
    compile_cache.trim(tmp_path / "nothing", limit=0)


def test_a_folder_that_the_user_chose_is_not_trimmed(tmp_path, monkeypatch):
    write(tmp_path, mine=1)
    monkeypatch.setattr(compile_cache, "trim", lambda *_: pytest.fail("trimmed"))
    compile_cache.trim_own({"JAX_COMPILATION_CACHE_DIR": str(tmp_path)})
