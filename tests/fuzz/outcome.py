"""What came of a program, run in one way: kinds of errors, results, and the graph with who is who in it.

Law: two outcomes differ iff a user could tell the two runs apart. A way is a transform around the whole program.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from tests.fuzz.compare import first_difference, kind_of, portrait, reachable, tracers_in
from tests.fuzz.programs import Program
from tests.fuzz.run import Run, squeeze, stretch

Way = Callable[[ModuleType, Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


def _vmapped(nnx: Any, f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    mapped = nnx.vmap(f)

    def call(m: Any, x: Any) -> Any:
        stretch(m)
        try:
            return mapped(m, x[None])[0]
        finally:
            squeeze(m)

    return call


def _as_jax(nnx: Any, f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def call(m: Any, x: Any) -> Any:
        stretch(m)
        squeeze(m)
        return f(m, x)

    return call


#: Law 2: each of these is the thing itself. The second is what "vmap" does to arrays of numpy.
UNTRANSFORMED = ("as it is", "with arrays of JAX")
#: Transforms that see arrays of JAX where the graph has arrays of numpy.
PREPARED = ("with arrays of JAX", "vmap", "jit, with arrays of JAX", "remat, with arrays of JAX")
WAYS: dict[str, Way] = {
    "as it is": lambda nnx, f: f,
    "with arrays of JAX": _as_jax,
    "jit": lambda nnx, f: nnx.jit(f),
    "jit, with arrays of JAX": lambda nnx, f: _as_jax(nnx, nnx.jit(f)),
    "remat": lambda nnx, f: nnx.remat(f),
    "remat, with arrays of JAX": lambda nnx, f: _as_jax(nnx, nnx.remat(f)),
    "vmap": _vmapped,
    "jit of remat": lambda nnx, f: nnx.jit(nnx.remat(f)),
}


class Outcome(NamedTuple):
    """One entry a round; none after a round that raised."""

    kinds: list[str]
    results: list[float]
    portraits: list[Any]
    errors: list[Exception]


class TracerLeftError(AssertionError):
    """A call left a tracer in the objects it was given: nothing can be said of them any more."""


def outcome(program: Program, run: Run, way: str = "as it is", *, strict: bool = True) -> Outcome:
    """Runs a program.

    Raises:
      TracerLeftError: if a tracer stays behind.
      AssertionError: if a transform of the whole program raises and changes something.
    """
    m = program.graph.build(run.library)
    origin = reachable(m)
    out = Outcome([], [], [], [])
    f = WAYS[way](run.nnx, lambda m, x: run.block(program.body, m, x))
    x = jnp.float32(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dtypes that a write changes, and of deprecated ways to write
        for _ in range(program.rounds):
            before = portrait(m, origin=origin, strict=strict)
            try:
                x = f(m, x)
            except Exception as error:  # noqa: BLE001  # any: to say of which kind it is
                out.errors.append(error)
            if tracers_in(m):
                raise TracerLeftError(f"{way} left a tracer behind")
            after = portrait(m, origin=origin, strict=strict)
            failed = bool(out.errors)
            if failed and way not in (*UNTRANSFORMED, *PREPARED):
                assert after == before, f"{way} raised, and changed {first_difference(before, after)}"
            out.kinds.append(kind_of(out.errors[-1]) if failed else "fine")
            out.results.append(float(x))
            out.portraits.append(after)
            if failed:
                break
            run.next_round()
    return out


def assert_same(expected: Outcome, actual: Outcome, *, rolled_back: bool) -> None:
    """Raise unless both runs are the same to a user.

    rolled_back: whether one of them undid its last round where it raised, and the other did not.
    """
    texts = [str(error)[:2000] for error in (*expected.errors, *actual.errors)]
    assert actual.kinds == expected.kinds, f"expected {expected.kinds}, got {actual.kinds}: {texts}"
    assert actual.results == expected.results, f"expected x = {expected.results}, got {actual.results}"
    last = len(expected.portraits) - (rolled_back and bool(expected.errors))
    for round_, (before, after) in enumerate(zip(expected.portraits[:last], actual.portraits[:last], strict=True)):
        assert before == after, f"round {round_}: {first_difference(before, after)}"
