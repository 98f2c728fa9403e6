"""Which JAX trace is running.

Law: a Variable or object may be written only under the trace that created it; anything else would lose
the write or leak a tracer. This file only answers "which one"; the objects do the check.
"""

import jax.extend.core


def current_trace() -> object:
    """An opaque token, equal to another one iff both were taken under the same trace."""
    return jax.extend.core.get_opaque_trace_state(convention="nnx")
