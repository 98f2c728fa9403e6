"""Where nnx_core must not do what flax.nnx does: one row a reason, and the programs it covers.

Law: a row names the requirement or decision behind it and matches nothing else. What is not here has to agree.
Three more are met where graphs are built and drawn, so that programs need not avoid them: flax wants plain containers
marked as data (REQUIREMENTS 40), sorts attributes by name in a transform (law 1 keeps their order), and keeps
metadata of its own beside the user's.
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


DIFFERENCES: tuple[Difference, ...] = ()


def flax_differs(program: p.Program) -> list[str]:
    """The rows that cover something in the program."""
    inside = list(statements(program.body))
    return [difference.row for difference in DIFFERENCES if any(map(difference.covers, inside))]
