"""Random programs as plain data: statements over one graph `m` and one float32 scalar `x`.

Law: a program is a tree of frozen statements, so that hypothesis can shrink it and print it as code that builds it.
A statement picks its targets by a number modulo what is there. Bodies of loops and branches are *steady*: they leave
structure, shapes and dtypes as they are; what runs under an axis of None only *reads*.
Knows nothing of libraries: `run.py` says what each statement does.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.support.graphs import CELL_KINDS, STATICS, Graph, graphs

STEADY_WRITES = ("whole", "add", "broadcast", "number", "wide", "part", "set", "value", "full")
LOOSE_WRITES = ("replace", "wrong shape", "copy_from")
ATTACHED = ("param", "array", "static", "node", "alias", "list")
CLOSED = ("jit", "remat", "grad", "cond", "scan", "vmap")
COPIES = ("clone", "merge", "merge in parts", "deepcopy")


class Statement:
    """One step of a program: what it does to m, and what x is afterwards."""


Body = tuple[Statement, ...]


# ---- one step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read(Statement):
    """x + the i-th Variable."""

    i: int


@dataclass(frozen=True)
class ReadPlain(Statement):
    """x + the i-th plain array."""

    i: int


@dataclass(frozen=True)
class ReadOutside(Statement):
    """x + what a closure holds, which changes between two rounds."""

    what: str


@dataclass(frozen=True)
class Shape(Statement):
    """x + a number that depends on the structure alone: a constant in a trace."""


@dataclass(frozen=True)
class Square(Statement):
    """x times the i-th Variable: something to differentiate."""

    i: int


@dataclass(frozen=True)
class Write(Statement):
    """A new value for the i-th Variable, in one of many ways."""

    i: int
    how: str
    c: int


@dataclass(frozen=True)
class WritePlain(Statement):
    """A new value for the i-th plain array."""

    i: int
    c: int


@dataclass(frozen=True)
class StateStep(Statement):
    """update(m, map(f, state(m, kind))); kind "arrays" are those that are no Variables."""

    kind: str
    c: int


@dataclass(frozen=True)
class Draw(Statement):
    """x + a random number of the i-th Rngs."""

    i: int


@dataclass(frozen=True)
class Retag(Statement):
    """Metadata of the i-th Variable."""

    i: int
    c: int


@dataclass(frozen=True)
class Attach(Statement):
    """One more member for the i-th object: new, or something that is there already."""

    i: int
    what: str
    j: int


def attached_name(s: Attach) -> str:
    """The name of the new member."""
    return "abcz"[s.j % 4]


@dataclass(frozen=True)
class Grow(Statement):
    """One more element for the plain lists and dicts of the i-th object."""

    i: int


@dataclass(frozen=True)
class Delete(Statement):
    """The i-th object loses its j-th member."""

    i: int
    j: int


@dataclass(frozen=True)
class Sow(Statement):
    """The i-th module sows x."""

    i: int


@dataclass(frozen=True)
class Pop(Statement):
    """x + what was popped."""

    kind: str


@dataclass(frozen=True)
class Fail(Statement):
    """An exception on purpose."""


# ---- steps with bodies ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt(Statement):
    """The body; a planned exception in it is caught."""

    body: Body


@dataclass(frozen=True)
class Inside(Statement):
    """The body on a copy of m, which is thrown away."""

    how: str
    body: Body


@dataclass(frozen=True)
class Back(Statement):
    """The (steady) body on a copy of m, whose state then updates m."""

    how: str
    body: Body


@dataclass(frozen=True)
class Jit(Statement):
    """nnx.jit. With `also`, a part of m is another argument."""

    body: Body
    also: int | None = None


@dataclass(frozen=True)
class Functional(Statement):
    """split; jit over the State, in which merge adopts; steady."""

    body: Body


@dataclass(frozen=True)
class Remat(Statement):
    """nnx.remat."""

    body: Body


@dataclass(frozen=True)
class Grad(Statement):
    """x + gradients of the body's x by what `wrt` says."""

    wrt: str
    body: Body


@dataclass(frozen=True)
class Vmap(Statement):
    """nnx.vmap over an axis of one, which every array gets."""

    body: Body


@dataclass(frozen=True)
class VmapShared(Statement):
    """nnx.vmap over two x, m under None; the body only reads."""

    body: Body


@dataclass(frozen=True)
class Scan(Statement):
    """nnx.scan; m is the carry, under an axis of one, or under None (then the body only reads)."""

    length: int
    where: str
    body: Body


@dataclass(frozen=True)
class Fori(Statement):
    """nnx.fori_loop; the bounds are Python numbers or arrays."""

    n: int
    traced: bool
    body: Body


@dataclass(frozen=True)
class While(Statement):
    """nnx.while_loop."""

    n: int
    body: Body


@dataclass(frozen=True)
class Cond(Statement):
    """nnx.cond on the parity of x."""

    yes: Body
    no: Body


@dataclass(frozen=True)
class Switch(Statement):
    """nnx.switch on x."""

    bodies: tuple[Body, ...]


@dataclass(frozen=True)
class CondSame(Statement):
    """nnx.cond with the same body twice, so that both branches change the same structure."""

    body: Body


@dataclass(frozen=True)
class Stack(Statement):
    """The body on m and on what follows m, under an axis of two; m is the second from then on."""

    where: str
    body: Body


@dataclass(frozen=True)
class Pure(Statement):
    """split; a transform of JAX over the State, in which merge copies; update."""

    how: str
    body: Body


@dataclass(frozen=True)
class StateCarry(Statement):
    """split; a loop whose carry is the State, made anew in each step; update."""

    how: str
    body: Body


@dataclass(frozen=True)
class Closed(Statement):
    """A transform of a function of x alone, that only reads m, from outside."""

    how: str
    body: Body


@dataclass(frozen=True)
class Returned(Statement):
    """A transformed function returns a new object, with a part of m in it; m keeps it."""

    how: str
    i: int
    body: Body


@dataclass(frozen=True)
class Capture(Statement):
    """nnx.capture: x + what the body sows."""

    body: Body


@dataclass(frozen=True)
class Program:
    """A graph, and what is done with it, `rounds` times with the same functions."""

    graph: Graph
    body: Body
    rounds: int


# ---- strategies ----------------------------------------------------------------------------------------------

_NUMBER = st.integers(0, 5)


@dataclass(frozen=True)
class Scope:
    """What may be drawn.

    level: "reads", "steady" or "loose".
    depth: how deep statements may be nested below this one.
    outside: whether what a closure holds may be read; jit reads it once, as in JAX.
    reverse: whether it is differentiated, which JAX cannot do for loops without a fixed length.
    without: names of statements, ways to write, things to attach, types of statics, and "arrays" (those that are no
      Variables), that are left out, to look behind a known fault.
    """

    level: str = "loose"
    depth: int = 2
    outside: bool = True
    reverse: bool = False
    without: frozenset[str] = frozenset()

    def among(self, *names: str) -> st.SearchStrategy[str]:
        """One of the names that are not left out."""
        return st.sampled_from([name for name in names if name not in self.without] or names[:1])

    def allowed(self, *choices: st.SearchStrategy[Statement]) -> list[st.SearchStrategy[Statement]]:
        return [choice for choice in choices if _name(choice) not in self.without]


def _name(choice: st.SearchStrategy[Statement]) -> str:
    return choice.wrapped_strategy.target.__name__  # type: ignore[attr-defined]  # `builds` returns it lazily


def _reads(scope: Scope) -> list[st.SearchStrategy[Statement]]:
    reads = scope.allowed(
        st.builds(Read, _NUMBER), st.builds(ReadPlain, _NUMBER), st.builds(Shape), st.builds(Square, _NUMBER)
    )
    if scope.outside:
        reads += scope.allowed(st.builds(ReadOutside, st.sampled_from(("number", "array"))))
    return reads


def _steady(scope: Scope) -> list[st.SearchStrategy[Statement]]:
    return scope.allowed(
        st.builds(Write, _NUMBER, scope.among(*STEADY_WRITES), _NUMBER),
        st.builds(WritePlain, _NUMBER, _NUMBER),
        st.builds(StateStep, scope.among(*CELL_KINDS, "arrays"), _NUMBER),
        st.builds(Draw, _NUMBER),
    )


def _loose(scope: Scope) -> list[st.SearchStrategy[Statement]]:
    return scope.allowed(
        st.builds(Write, _NUMBER, scope.among(*LOOSE_WRITES), _NUMBER),
        st.builds(Retag, _NUMBER, _NUMBER),
        st.builds(Attach, _NUMBER, scope.among(*ATTACHED), _NUMBER),
        st.builds(Grow, _NUMBER),
        st.builds(Delete, _NUMBER, _NUMBER),
        st.builds(Sow, _NUMBER),
        st.builds(Pop, st.sampled_from((*CELL_KINDS, "Intermediate"))),
        st.builds(Fail),
    )


@functools.cache  # hypothesis spends more on making strategies than on drawing from them
def bodies(scope: Scope) -> st.SearchStrategy[Body]:
    """A few statements."""
    choices = _reads(scope)
    if scope.level != "reads":
        choices += _steady(scope) * 2
    if scope.level == "loose":
        choices += _loose(scope)
    if scope.depth:
        nested = st.deferred(lambda: _nested(dataclasses.replace(scope, depth=scope.depth - 1)))
        choices += [nested] * (len(choices) // 2)
    return st.lists(st.one_of(*choices), min_size=1, max_size=3).map(tuple)


@functools.cache
def _nested(scope: Scope) -> st.SearchStrategy[Statement]:
    def body(**changes: Any) -> st.SearchStrategy[Body]:
        return bodies(dataclasses.replace(scope, **changes))

    copies = scope.among(*COPIES)
    length = st.integers(1, 2)
    # Both branches of a cond are traced, so nothing may raise in one of them; and a step of a loop keeps structure.
    same = body(level="reads" if scope.level == "reads" else "steady")
    choices = scope.allowed(
        st.builds(Inside, copies, body(level="loose" if scope.level == "loose" else "steady")),
        st.builds(Jit, body(outside=False), st.none() | _NUMBER),
        st.builds(Remat, body()),
        st.builds(Grad, st.sampled_from(("x", "params", "both")), body(reverse=True)),
        st.builds(VmapShared, body(level="reads")),
        st.builds(Scan, length, st.just("None"), body(level="reads")),
        st.builds(Scan, length, st.just("Carry"), same),
        st.builds(Fori, length, st.just(False) if scope.reverse else st.booleans(), same),
        st.builds(Cond, same, same),
        st.builds(Switch, st.lists(same, min_size=1, max_size=2).map(tuple)),
        st.builds(CondSame, body()),
        st.builds(Closed, scope.among(*CLOSED), body(level="reads", outside=False, reverse=True)),
    )
    if not scope.reverse:
        choices += scope.allowed(st.builds(While, length, same))
    if scope.level != "reads":
        choices += scope.allowed(
            st.builds(Back, copies, body(level="steady")),
            st.builds(Functional, body(level="steady", outside=False)),
            st.builds(Vmap, body()),
            st.builds(Stack, scope.among("vmap", "scan"), same),
            st.builds(Pure, scope.among("jax.jit", "jax.checkpoint"), body(level="steady", outside=False)),
            st.builds(StateCarry, scope.among("fori", "scan"), body(level="steady")),
            st.builds(Scan, st.just(1), st.just("axis"), body(level="steady")),
        )
    if scope.level == "loose":
        choices += scope.allowed(
            st.builds(Attempt, body()),
            st.builds(Capture, body()),
            st.builds(Returned, st.sampled_from(("jit", "remat")), _NUMBER, body(outside=False)),
        )
    return st.one_of(*choices)


def programs(scope: Scope = Scope()) -> st.SearchStrategy[Program]:
    """Whole programs: a graph, some statements, one or two rounds."""
    statics = tuple(static for static in STATICS if type(static).__name__ not in scope.without)
    arrays = () if "arrays" in scope.without else ("array", "numpy")
    random_graphs = graphs(arrays=arrays, statics=statics)
    return st.builds(Program, random_graphs, bodies(scope), st.integers(1, 2))
