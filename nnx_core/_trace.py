"""Which JAX trace is running.

Law: a Variable or object may be written only under the trace that created it; anything else would lose
the write or leak a tracer. This file only answers "which one"; the objects do the check.
"""

from collections.abc import Callable

_ask: Callable[..., object] | None = None


def current_trace() -> object:
    """An opaque token, equal to another one iff both were taken under the same trace."""
    global _ask
    if _ask is None:
        import jax.extend.core  # at the first question: it loads much of jax.extend, which imports need not wait for

        _ask = jax.extend.core.get_opaque_trace_state
    return _ask(convention="nnx")
