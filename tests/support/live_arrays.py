"""What stays alive after something is done, without the help of the cyclic collector.

Knows JAX's list of live arrays and Python's of what is unreachable; knows nothing of models.
"""

import gc
from collections.abc import Callable

import jax
import numpy as np


def left_alive(act: Callable[[], object], times: int = 5) -> int:
    """Arrays that `times` calls of `act` leave behind, once it has been called before (what is compiled stays)."""
    was_enabled = gc.isenabled()
    act()
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


def left_in_cycles(act: Callable[[], object]) -> list[str]:
    """What a second call of `act` leaves to the cyclic collector: our objects, and whatever holds an array.

    Arrays on the host are seen too, and a cycle shows even where it holds no array this time.
    """
    was_enabled = gc.isenabled()
    act()
    gc.disable()
    gc.freeze()  # what is there already is not looked through: with all that a suite has traced that takes a second
    try:
        act()
        gc.set_debug(gc.DEBUG_SAVEALL)  # what is unreachable is kept to be looked at
        gc.collect()
        return sorted({_name(x) for x in gc.garbage if _is_ours(x) or _holds_array(x)})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _name(x: object) -> str:
    return f"{_home(x)}.{getattr(x, '__qualname__', type(x).__qualname__)}"


def _home(x: object) -> str:
    return str(getattr(x, "__module__", None) or type(x).__module__)


def _is_ours(x: object) -> bool:
    return _home(x).split(".")[0] in ("bridge", "nnx_core")


def _holds_array(x: object) -> bool:
    return any(isinstance(held, np.ndarray | jax.Array) for held in gc.get_referents(x))
