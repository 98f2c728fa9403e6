"""Random programs over random graphs: nnx_core against Python, under its transforms, and against flax.nnx.

Law 2, and 1, 3, 4, 5 with it. The gate draws the same programs each time; `nox -s fuzz -- --fuzz-minutes 60` draws
others for as long as one likes. A failure prints a program that can be pasted into `examples.py`.
"""

import flax.nnx
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import nnx_core
from tests.fuzz import programs as p
from tests.fuzz.compare import portrait
from tests.fuzz.differences import TRANSFORMS, flax_differs, nested, statements
from tests.fuzz.examples import EXAMPLES
from tests.fuzz.lifted import Lifted
from tests.fuzz.outcome import PREPARED, TracerLeftError, assert_same, outcome
from tests.fuzz.plain import Plain
from tests.support.graphs import Cell, Graph, Thing, graphs, library_of

CORE, FLAX = library_of(nnx_core), library_of(flax.nnx)
CELL = Cell("Param", (2,), "float32", 1, ())
ONE = Graph((CELL,), (Thing("Node", (("a", ("cell", 0)),)),))

#: All of a state is written back, and so is what stands in a container whose structure changes: compiled, numpy's
#: arrays come back as JAX's, or as they were if nothing was written.
WRITES_ARRAYS = (p.StateCarry, p.Back, p.Delete, p.Grow, p.Attach, p.Pop)


def _may_make_arrays(statement: p.Statement) -> bool:
    """Whether JAX's own transforms hand back numpy's arrays as JAX's, or as they were: both happen."""
    return isinstance(statement, p.Pure) or nested(statement, TRANSFORMS, WRITES_ARRAYS)


def check(program: p.Program, way: str) -> None:
    """nnx_core, with `way` around the program, does what Python does."""
    if way in ("jit", "remat") and any(isinstance(x, WRITES_ARRAYS) for x in statements(program.body)):
        way = f"{way}, with arrays of JAX"
    elif way == "as it is" and any(map(_may_make_arrays, statements(program.body))):
        way = "with arrays of JAX"
    expected = outcome(program, Plain(CORE), "with arrays of JAX" if way in PREPARED else "as it is")
    assert_same(expected, outcome(program, Lifted(CORE), way), rolled_back=way != "as it is")


def check_flax(program: p.Program, way: str) -> None:
    """nnx_core and flax.nnx do the same, but for what REQUIREMENTS.md demands."""
    if flax_differs(program):
        return
    expected = outcome(program, Lifted(CORE), way, strict=False)
    try:
        actual = outcome(program, Lifted(FLAX), way, strict=False)
    except TracerLeftError:  # law 5: ours leaves none, and what flax left there cannot be compared
        return
    assert_same(expected, actual, rolled_back=False)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "examples"), [("as it is", 50), ("jit", 15), ("remat", 10), ("vmap", 10)])
def test_nnx_core_does_what_python_does(explore, way, examples):
    scope = p.Scope(outside=way != "jit")
    explore(scope, lambda program: check(program, way), examples)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "examples"), [("as it is", 25), ("jit", 10)])
def test_nnx_core_does_what_flax_does(explore, way, examples):
    explore(p.Scope(outside=False), lambda program: check_flax(program, way), examples)


@pytest.mark.parametrize("program", EXAMPLES.values(), ids=EXAMPLES)
def test_what_failed_once(program):
    check(program, "as it is")
    for flax_way in ("as it is", "jit"):
        if not any(isinstance(statement, p.ReadOutside) for statement in statements(program.body)):
            check(program, flax_way)
            check_flax(program, flax_way)


# ---- the fuzzer itself ---------------------------------------------------------------------------------------


class Forgetful(Plain):
    """A planted fault: what a fori_loop wrote is lost."""

    def fori(self, s, m, x):
        return super().fori(s, self.copied("deepcopy", m), x)


@pytest.mark.slow
def test_a_planted_fault_is_found_and_shrunk():
    def is_found(program):
        try:
            assert_same(outcome(program, Plain(CORE)), outcome(program, Forgetful(CORE)), rolled_back=False)
        except AssertionError:
            return True
        return False

    some = {"Write", "Fori", "Read", "Square"}
    rest = frozenset({statement.__name__ for statement in p.Statement.__subclasses__()} - some)
    programs = st.builds(p.Program, st.just(ONE), p.bodies(p.Scope(depth=1, without=rest)), st.just(1))
    few = settings(max_examples=200, derandomize=True, database=None, deadline=None)
    assert find(programs, is_found, settings=few).body == (p.Fori(1, False, (p.Write(0, "whole", 0),)),)


@given(graphs())
@settings(max_examples=30)
def test_a_graph_is_the_same_in_both_libraries(graph):
    assert portrait(graph.build(CORE), strict=False) == portrait(graph.build(FLAX), strict=False)


def node(*members: tuple[str, tuple[str, object]]) -> tuple[Thing, ...]:
    return (Thing("Node", members),)


OTHERS = {
    "kind": Graph((Cell("Cache", (2,), "float32", 1, ()),), node(("a", ("cell", 0)))),
    "dtype": Graph((Cell("Param", (2,), "int32", 1, ()),), node(("a", ("cell", 0)))),
    "shape": Graph((Cell("Param", (3,), "float32", 1, ()),), node(("a", ("cell", 0)))),
    "value": Graph((Cell("Param", (2,), "float32", 2, ()),), node(("a", ("cell", 0)))),
    "metadata": Graph((Cell("Param", (2,), "float32", 1, (("tag", "x"),)),), node(("a", ("cell", 0)))),
    "name": Graph((CELL,), node(("b", ("cell", 0)))),
    "alias": Graph((CELL,), node(("a", ("cell", 0)), ("b", ("cell", 0)))),
    "no alias": Graph((CELL, CELL), node(("a", ("cell", 0)), ("b", ("cell", 1)))),
    "order": Graph((CELL, CELL), node(("b", ("cell", 1)), ("a", ("cell", 0)))),
    "plain array": Graph((CELL,), node(("a", ("array", 1)))),
    "numpy array": Graph((CELL,), node(("a", ("numpy", 1)))),
    "list": Graph((CELL,), node(("a", ("list", (("cell", 0),))))),
    "tuple": Graph((CELL,), node(("a", ("tuple", (("cell", 0),))))),
}


def test_portraits_tell_every_difference():
    drawn = [portrait(graph.build(CORE)) for graph in (ONE, *OTHERS.values())]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


@given(st.data())
@settings(max_examples=10)
def test_two_runs_of_one_program_are_equal(data):
    program = data.draw(p.programs())
    assert_same(outcome(program, Plain(CORE)), outcome(program, Plain(CORE)), rolled_back=False)
