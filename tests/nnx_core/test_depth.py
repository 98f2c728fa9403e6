"""As deep as what users build: a chain of 1,000 modules under Python's own recursion limit."""

import sys
import threading

import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._depth import ROOM
from nnx_core._errors import DepthError
from tests.support.arrays import ones

DEPTH = 1_000


class Link(nnx.Module):
    def __init__(self, child):
        self.weight = nnx.Param(ones(1))
        self.array = ones(1)
        self.child = child

    def __call__(self, x):
        return x * self.weight[...]


def chain(depth=DEPTH):
    link = None
    for _ in range(depth):
        link = Link(link)
    return link


def links(m):
    while m is not None:
        yield m
        m = m.child


def total(m):
    return sum(link.weight[0] + link.array[0] for link in links(m))


def double(m):
    for link in links(m):
        link.weight[...] = link.weight[...] * 2
        link.array = link.array * 3


def normalized_below(m):
    """`m` with its deepest Param normalized."""
    return nnx.WeightNorm(m, variable_filter=lambda path, x: len(path) == DEPTH, rngs=nnx.Rngs(0))


PROGRAMS = {
    "split and merge": lambda m: nnx.merge(*nnx.split(m)),
    "clone": nnx.clone,
    "update": lambda m: (nnx.update(m, nnx.state(m)), m)[1],
    "recursive_map": lambda m: nnx.recursive_map(lambda path, x: x, m),
    "jit": lambda m: nnx.jit(lambda m: m)(m),
    "jit of a copy": lambda m: nnx.jit(nnx.clone)(m),
    "scan": lambda m: nnx.scan(lambda m, x: (m, x))(m, ones(2))[0],
    "eval_shape": lambda m: (nnx.eval_shape(lambda: chain()), m)[1],
    "weight norm": lambda m: (normalized_below(m)(ones(1)), m)[1],
    "tabulate": lambda m: (nnx.tabulate(m, ones(1), depth=1, compute_flops=True), m)[1],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_chain_of_a_thousand(name):
    limit = sys.getrecursionlimit()
    m = PROGRAMS[name](chain())
    assert sum(1 for _ in links(m)) == DEPTH
    assert float(sum(link.weight[...].sum() for link in list(links(m))[:3])) == 3
    assert sys.getrecursionlimit() == limit


def test_its_structure_is_hashed_and_compared():
    a, b = nnx.graphdef(chain()), nnx.graphdef(chain())
    assert a == b
    assert hash(a) == hash(b)
    assert a != nnx.graphdef(chain(DEPTH - 1))


def test_it_is_visited_without_recursion():
    m = chain()
    paths = [path for path, x in nnx.iter_graph(m) if isinstance(x, nnx.Variable)]
    assert len(paths) == DEPTH
    assert max(map(len, paths)) == DEPTH
    m.child.child.twin = m.weight
    [shared] = nnx.find_duplicates(m)
    assert shared == [("weight",), ("child", "child", "twin")] or shared == [("child", "child", "twin"), ("weight",)]


def test_its_gradient():
    m = chain()
    gradients = nnx.grad(lambda m: m.weight[0] * 2.0)(m)
    assert gradients["weight"][0] == 2


def holds_itself():
    m = nnx.Module()
    m.items = nnx.data([jnp.ones(1)])
    m.items.append(m.items)
    return m


@pytest.mark.parametrize(
    "f", [nnx.state, nnx.split, nnx.jit(lambda m: None), nnx.clone], ids=["state", "split", "jit", "clone"]
)
def test_a_list_that_holds_itself(f):
    with pytest.raises(DepthError, match=r"(?s)nested without end.*plain containers may not: use nnx\.List"):
        f(holds_itself())
    assert nnx.jit(lambda m: m.weight[0])(Link(None)) == 1  # Python has its frames back


def test_a_list_that_comes_to_hold_itself_after_a_call():
    m = nnx.Module()
    m.items = nnx.data([jnp.ones(1)])
    f = nnx.jit(lambda m: m.items[0])
    f(m)
    m.items.append(m.items)
    with pytest.raises(DepthError):
        f(m)
    m.items.pop()
    assert f(m).shape == (1,)


def test_the_limit_is_one_for_all_threads():
    limit, inside = sys.getrecursionlimit(), []
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ROOM:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    with ROOM:
        inside.append(sys.getrecursionlimit())
    inside.append(sys.getrecursionlimit())  # the other thread is still in there
    leave.set()
    thread.join()
    assert inside[0] == inside[1] > limit
    assert sys.getrecursionlimit() == limit


def test_the_users_function_has_the_users_limit():
    limits = []
    nnx.jit(lambda m: limits.append(sys.getrecursionlimit()))(Link(None))
    assert limits == [sys.getrecursionlimit()]
