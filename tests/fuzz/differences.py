"""Where nnx_core must not do what flax.nnx does: one row a reason, and the programs it covers.

Law: a row names the requirement or decision behind it and matches nothing else. What is not here has to agree.
Four more are met where graphs are built and drawn, so that programs need not avoid them: flax wants plain containers
marked as data (REQUIREMENTS 40), sorts attributes by name in a transform (law 1 keeps their order), makes JAX's
arrays of numpy's that jit only read (law 4), and keeps metadata of its own beside the user's.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.fuzz import programs as p


class Difference(NamedTuple):
    """Why, and in which statements."""

    row: str
    covers: Callable[[p.Statement], bool]


def statements(body: Any) -> Iterator[p.Statement]:
    """Every statement in a body, and in the bodies in it."""
    if isinstance(body, tuple):
        for part in body:
            yield from statements(part)
    elif isinstance(body, p.Statement):
        yield body
        for field in dataclasses.fields(body):
            yield from statements(getattr(body, field.name))


TRANSFORMS = (p.Jit, p.Functional, p.Remat, p.Grad, p.Vmap, p.VmapShared, p.Scan, p.Fori, p.While, p.Cond, p.Switch)
TRANSFORMS += (p.CondSame, p.Stack, p.StateCarry, p.Returned)


def _nested(statement: p.Statement, outer: type | tuple[type, ...], inner: type | tuple[type, ...]) -> bool:
    """Whether it is an `outer` with an `inner` somewhere in it."""
    inside = list(statements(statement))[1:]
    return isinstance(statement, outer) and any(isinstance(x, inner) for x in inside)


DIFFERENCES = (
    Difference(
        "law 2: metadata that is set in a transform reaches the caller; flax loses it where no value is written",
        lambda s: isinstance(s, p.Retag) or (isinstance(s, p.Write) and s.how == "copy_from"),
    ),
    Difference(
        "law 4, REQUIREMENTS 45: an object of an outer trace can be handed to a transform that only reads it",
        lambda s: _nested(s, p.Closed, TRANSFORMS),
    ),
    Difference(
        "laws 2 and 3 of `capture`: the module that its function sees has no members of flax's own",
        lambda s: _nested(s, p.Capture, p.Shape),
    ),
)


def flax_differs(program: p.Program) -> list[str]:
    """The rows that cover something in the program."""
    inside = list(statements(program.body))
    return [difference.row for difference in DIFFERENCES if any(map(difference.covers, inside))]
