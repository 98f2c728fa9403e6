"""Copies that plain JAX transforms make of modules, and the writes to them that nothing hands back.

A module is a JAX pytree, so `jax.jit(f)(model)` calls f with a copy. A write to that copy is lost unless f
returns it. Law: a write under such a trace that is neither read again nor returned is named in one
`LostWriteWarning` when the copies are gone. Costs nothing outside of plain JAX transforms.
Knows Variables and objects only as things with a trace; `_trace.locate` finds their path.
"""

import threading
import warnings
import weakref
from typing import Any

from nnx_core import _trace

_SHOWN = 5  # paths in a warning; finding each one walks the model


class LostWriteWarning(UserWarning):
    """A module was changed inside a plain JAX transform, and the change was not returned from it."""

    def __init__(self, written: list[str], total: int):
        rows = "".join(f"\n  {what}" for what in written)
        more = f"\n  and {total - len(written)} more" if total > len(written) else ""
        super().__init__(
            f"Inside a plain JAX transform (jax.jit, jax.grad, jax.vmap, ...) the function wrote to{rows}{more}\n"
            "Expected the module among what the function returns; found it dropped, so the writes are lost: JAX"
            " calls the function with a copy.\nUse the transform of the same name in nnx_core, which writes back,"
            " or return the module (or its nnx.state) and use what is returned."
        )


class Borrowing:
    """The trace of all copies that one plain JAX transform made; equal to that trace itself."""

    __slots__ = ("__weakref__", "_names", "_pending", "trace")

    def __init__(self, trace: object):
        self.trace = trace
        self._pending: dict[int, str] = {}
        self._names: dict[int, str] = {}

    def __eq__(self, other: object) -> bool:
        return self.trace == (other.trace if type(other) is Borrowing else other)

    __hash__ = None  # type: ignore[assignment]  # as the traces it is compared with are not used as keys

    def wrote(self, thing: Any, what: str) -> None:
        """Note a write to `thing`, a copy."""
        self._pending[id(thing)] = what
        if id(thing) not in self._names and len(self._names.keys() & self._pending.keys()) < _SHOWN:
            path = _trace.locate(thing)
            self._names[id(thing)] = what if path is None else f"{what} at {path}"

    def used(self, thing: Any) -> None:
        """Note that `thing` was read or returned: what was written to it is not lost."""
        self._pending.pop(id(thing), None)

    def __del__(self) -> None:
        if self._pending:
            named = [self._names[thing] for thing in self._pending if thing in self._names]
            others = [what for thing, what in self._pending.items() if thing not in self._names]
            warnings.warn(LostWriteWarning((named + others)[:_SHOWN], len(self._pending)), stacklevel=2)


_local = threading.local()


def current_borrowing() -> Borrowing:
    """The Borrowing of the running trace; the same one as long as a copy that it belongs to lives."""
    trace = _trace.current_trace()
    last = getattr(_local, "last", None)
    shared = None if last is None else last()
    if shared is None or shared.trace != trace:
        shared = Borrowing(trace)
        _local.last = weakref.ref(shared)
    return shared
