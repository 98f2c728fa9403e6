"""Which JAX trace is running, and what is known of the place of a thing that belongs to another one.

Law: a Variable or object may be written only under the trace that created it; anything else would lose
the write or leak a tracer. This file only answers "which one"; the objects do the check.
"""

import sys
from collections.abc import Callable
from types import CodeType

Site = tuple[CodeType, int]

_ask: Callable[..., object] | None = None


def current_trace() -> object:
    """An opaque token, equal to another one iff both were taken under the same trace."""
    global _ask
    if _ask is None:
        import jax.extend.core  # at the first question: it loads much of jax.extend, which imports need not wait for

        _ask = jax.extend.core.get_opaque_trace_state
    return _ask(convention="nnx")


class Handed:
    """The trace of what a transform of ours hands to the user's function; equal to that trace itself.

    What has it is fresh and belongs to that one call, so `merge` may put it into an object.
    """

    __slots__ = ("trace",)

    def __init__(self, trace: object):
        self.trace = trace

    def __eq__(self, other: object) -> bool:
        return self.trace == other

    __hash__ = None  # type: ignore[assignment]  # as the traces it is compared with are not used as keys


def is_handed(trace: object) -> bool:
    """Whether `trace` is that of something which the running transform handed to the user's function."""
    return type(trace) is Handed and trace == current_trace()


_locator: Callable[[object], str | None] | None = None


def locate_with(locator: Callable[[object], str | None]) -> None:
    """Let `locator` answer `locate`. A hook: `graph.walk`, rooms above, knows how objects are walked."""
    global _locator
    _locator = locator


def locate(thing: object) -> str | None:
    """The path of a Variable or object as the running functions see it, if anybody can tell."""
    return None if _locator is None else _locator(thing)


def caller() -> Site:
    """Where the code outside this package is that is being served."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nnx_core."):
        frame = frame.f_back
    return frame.f_code, frame.f_lineno


def show_site(site: Site | None) -> str:
    """` (created at model.py:12 in Block.__init__)`, or nothing."""
    if site is None:
        return ""
    code, line = site
    return f" (created at {code.co_filename}:{line} in {code.co_qualname})"
