"""Where nnx_core must not do what flax.nnx does: one row a reason, and the programs it covers.

Law: a row names the requirement or decision behind it and matches nothing else. What is not here has to agree.
Four more are met where graphs are built and drawn, so that programs need not avoid them: flax wants plain containers
marked as data (REQUIREMENTS 40), sorts attributes by name in a transform (law 1 keeps their order), makes JAX's
arrays of numpy's that jit only read (law 4), and keeps metadata of its own beside the user's.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tests.fuzz import programs as p
from tests.support.graphs import Settings


class Difference(NamedTuple):
    """Why, and in which statements; of them, in which programs."""

    row: str
    covers: Callable[[p.Statement], bool]
    applies: Callable[[p.Program], bool] = lambda program: True


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


def nested(statement: p.Statement, outer: type | tuple[type, ...], inner: type | tuple[type, ...]) -> bool:
    """Whether it is an `outer` with an `inner` somewhere in it."""
    inside = list(statements(statement))[1:]
    return isinstance(statement, outer) and any(isinstance(x, inner) for x in inside)


def _may_share_variables(program: p.Program) -> bool:
    """Whether a Variable can be at two places: of the graph, or because something was attached again."""
    references = Counter(reference for thing in program.graph.things for reference in _references(thing.members))
    return max(references.values(), default=0) > 1 or any(isinstance(x, p.Attach) for x in statements(program.body))


def _attaches_over_a_static(program: p.Program) -> bool:
    """Whether something new may take the name of a static member."""
    statics = {name for thing in program.graph.things for name, (kind, _) in thing.members if kind == "static"}
    return any(isinstance(x, p.Attach) and p.attached_name(x) in statics for x in statements(program.body))


def _has_static_without_hash(program: p.Program) -> bool:
    return any(isinstance(static, Settings) for thing in program.graph.things for static in _statics(thing.members))


def _statics(members: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    for _, (kind, content) in members:
        if kind == "static":
            yield content
        elif kind == "dict":
            yield from _statics(content)
        elif kind in ("list", "tuple"):
            yield from _statics(("", item) for item in content)


def _references(members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int]]:
    for _, (kind, content) in members:
        if kind in ("cell", "thing"):
            yield kind, content
        elif kind == "dict":
            yield from _references(content)
        elif kind in ("list", "tuple"):
            yield from _references(("", item) for item in content)


DIFFERENCES = (
    Difference(
        "law 2: metadata that is set in a transform reaches the caller; flax loses it where no value is written",
        lambda s: isinstance(s, p.Retag) or (isinstance(s, p.Write) and s.how == "copy_from"),
    ),
    Difference(
        "law 4, REQUIREMENTS 45: an object of an outer trace can be handed to a transform that only reads it",
        lambda s: nested(s, p.Closed, TRANSFORMS),
    ),
    Difference(
        "laws 2 and 3 of `capture`: the module that its function sees has no members of flax's own",
        lambda s: nested(s, p.Capture, p.Shape),
    ),
    Difference(
        "the same laws: flax cannot sort the member of its own, a string, with the numbers of a List",
        lambda s: isinstance(s, p.Capture),
        lambda program: any(thing.kind == "List" for thing in program.graph.things),
    ),
    Difference(
        "the documentation of `pop`: a Variable is removed from the graph; flax leaves it at all places but the first",
        lambda s: isinstance(s, p.Pop),
        _may_share_variables,
    ),
    Difference(
        "FAULTS A9: a static may stand where data stood; in a transform flax takes it for data by the name's old mark",
        lambda s: isinstance(s, p.Attach) and s.what == "static",
    ),
    Difference(
        "FAULTS A9: data may stand where a static stood; by the old mark flax leaves a tracer there, as a static",
        lambda s: isinstance(s, p.Attach),
        _attaches_over_a_static,
    ),
    Difference(
        "a static attribute may be of any kind, equality decides; flax wants one with a hash in a transform",
        lambda s: True,
        _has_static_without_hash,
    ),
)


def flax_differs(program: p.Program) -> list[str]:
    """The rows that cover something in the program."""
    inside = list(statements(program.body))
    rows = [difference for difference in DIFFERENCES if any(map(difference.covers, inside))]
    return [difference.row for difference in rows if difference.applies(program)]
