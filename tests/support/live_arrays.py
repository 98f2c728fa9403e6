"""How many arrays stay alive after something is done, without the help of the cyclic collector.

Knows JAX's list of live arrays; knows nothing of models.
"""

import gc
from collections.abc import Callable

import jax


def left_alive(act: Callable[[], object], times: int = 5) -> int:
    """Arrays that `times` calls of `act` leave behind, once it has been called before (what is compiled stays)."""
    was_enabled = gc.isenabled()
    act()
    gc.collect()
    gc.disable()
    try:
        act()  # what is remembered of the last call replaces what was remembered of the one before
        before = len(jax.live_arrays())
        for _ in range(times):
            act()
        return len(jax.live_arrays()) - before
    finally:
        if was_enabled:
            gc.enable()
