"""Looking into jaxprs: what JAX versions nest differently is found at any depth."""

from collections.abc import Iterator
from typing import Any


def scans(jaxpr: Any) -> Iterator[Any]:
    """Every scan in a jaxpr: JAX 0.12 wraps each in a jit."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            yield from scans(inner) if hasattr(inner, "eqns") else ()
