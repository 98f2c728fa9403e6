"""Flops in `nnx.tabulate`: each call is traced once more, alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.support.tables import table

RUNS = []


class Nested(nnx.Module):
    """A model in a model in a model; RUNS has the calls of all of them, `calls` counts all but second looks."""

    calls = 0

    def __init__(self, depth):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(depth))
        self.inner = Nested(depth - 1) if depth > 1 else None

    def __call__(self, x):
        RUNS.append(x.shape)
        Nested.calls += 1
        y = jnp.tanh(self.linear(x))
        return y if self.inner is None else self.inner(y)


def rows_of(model, *args, flops=True):
    rows = []
    options = {"compute_flops": flops, "compute_vjp_flops": flops}
    table(model, *args, row_filter=lambda row: rows.append(row) or True, **options)
    return rows


@pytest.mark.parametrize("depth", [1, 4])
def test_counting_flops_runs_each_call_alone_once(depth):
    x = jnp.ones((1, 2))
    RUNS.clear()
    Nested.calls = 0
    rows = [row for row in rows_of(Nested(depth), x) if row.type is Nested]
    assert len(RUNS) == depth + sum(range(1, depth + 1))  # the model; then each call, with those inside of it
    assert Nested.calls == depth
    # Each row's numbers are those of its object alone, also as JAX counts them for the function without nnx.
    for left, row in zip(range(depth, 0, -1), rows, strict=True):
        alone = rows_of(Nested(left), x)[0]
        assert (row.flops, row.vjp_flops) == (alone.flops, alone.vjp_flops)
    graphdef, state = nnx.split(Nested(depth))
    cost = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).cost_analysis()
    assert rows[0].flops == cost["flops"]


@pytest.mark.slow
def test_equal_calls_are_traced_alone_once():
    runs = []

    class Layer(nnx.Module):
        def __init__(self, rngs, scale):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.scale = scale

        def __call__(self, x, kept=None):
            runs.append(x.shape)
            return self.linear(x) * self.scale

    class Notes:
        """No pytree, and equal to nothing but itself: what is in it now may not be in it later."""

    class Model(nnx.Module):
        def __init__(self, scales, kept):
            self.layers = [Layer(nnx.Rngs(i), scale) for i, scale in enumerate(scales)]
            self.kept = nnx.static(kept)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x, self.kept)
            return x

    def runs_of(scales, kept=None):
        runs.clear()
        rows = rows_of(Model(scales, kept), jnp.ones((1, 2)))
        alone = len(runs) - 2 * len(scales)  # beside the model and its own row
        return alone, [row.flops for row in rows if row.type is Layer]

    assert runs_of([2.0] * 5) == (1, [12] * 5)
    assert runs_of([2.0, 3.0, 2.0]) == (2, [12] * 3)
    assert runs_of([2, 2.0, 2]) == (2, [12] * 3)
    assert runs_of([2.0] * 3, kept=lambda x: x) == (1, [12] * 3)
    assert runs_of([2.0] * 3, kept=Notes()) == (3, [12] * 3)


# What leaves a call by another way than as its result. The numbers are those of the functions without nnx: a Linear of
# (2, 4) takes 72, what is added to the result 8, and the gradients of the two 204 and 220.

SEEN = []


def linear():
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class FilledDict(nnx.Module):
    def __init__(self):
        self.a = linear()

    def attend(self, x, cache):
        cache["k"] = self.a(x)
        return x

    def __call__(self, x):
        cache = {}
        y = self.attend(x, cache)
        return y + cache["k"]


class FilledList(FilledDict):
    def attend(self, x, kept):
        kept.append(self.a(x))
        return x

    def __call__(self, x):
        kept = []
        y = self.attend(x, kept)
        return y + kept[0]


class ReturnedList(FilledDict):
    def attend(self, x, kept):
        kept.append(self.a(x))
        return kept

    def __call__(self, x):
        kept = []
        returned = self.attend(x, kept)
        assert returned is kept
        return x + returned[0]


class FilledObject(FilledDict):
    def attend(self, x, tape):
        tape.y = self.a(x)
        return x

    def __call__(self, x):
        class Tape:
            def __repr__(self):
                return "tape"

        tape = Tape()
        return self.attend(x, tape) + tape.y


class Nonlocal(FilledDict):
    def attend(self, f, x):
        return f(x)

    def __call__(self, x):
        y = None

        def f(x):
            nonlocal y
            y = self.a(x)
            return x

        return self.attend(f, x) + y


class GlobalList(FilledDict):
    def attend(self, x):
        SEEN.append(self.a(x))
        return x

    def __call__(self, x):
        SEEN.clear()
        return self.attend(x) + SEEN[0]


class Callback(FilledDict):
    def attend(self, x, see):
        see(self.a(x))
        return x

    def __call__(self, x):
        seen = []
        return self.attend(x, seen.append) + seen[0]


class Raised(FilledDict):
    def attend(self, x):
        raise ValueError(self.a(x))

    def __call__(self, x):
        try:
            self.attend(x)
        except ValueError as error:
            return x + error.args[0]


@pytest.mark.parametrize(
    "kind", [FilledDict, FilledList, ReturnedList, FilledObject, Nonlocal, GlobalList, Callback, Raised]
)
def test_flops_where_values_leave_a_call_by_another_way(kind):
    x = jnp.ones((2, 4))
    rows = rows_of(kind(), x)
    flops = {row.path: (row.flops, row.vjp_flops) for row in rows}
    within = [("attend",)] if kind is not Raised else []
    assert list(flops) == [(), *within, ("a",)]
    assert flops[()] == (80, 220)
    assert flops[("a",)] == (72, 204)
    if kind is ReturnedList:
        assert flops[("attend",)] == (72, 204)
    elif within:  # x itself
        assert flops[("attend",)][0] is None
    plain = rows_of(kind(), x, flops=False)
    assert [(row.path, row.outputs) for row in rows] == [(row.path, row.outputs) for row in plain]


class Numpy(nnx.Module):
    """Its methods compute with numpy, and __call__ with what they return: as numbers."""

    def __init__(self):
        self.a = linear()

    def table(self, n):
        return np.arange(n)

    def reversed(self, table):
        return table[::-1]

    def scales(self):
        return np.linspace(1.0, 2.0, 4)

    def names(self):
        return np.array(["a", "b"])

    def of_values(self, x, table):
        return x[:, np.argsort(table)]

    def __call__(self, x):
        order = np.argsort(self.reversed(self.table(4)))
        assert self.names()[0] == "a"
        return self.of_values(self.a(x)[:, order], order) * float(self.scales().sum())


def test_methods_that_compute_with_numpy():
    rows = {row.path[-1:]: row for row in rows_of(Numpy(), jnp.ones((2, 4)))}
    dtypes = {path: str(row.outputs.dtype) for path, row in rows.items()}
    assert dtypes[("table",)] == dtypes[("reversed",)] == "int64"
    assert dtypes[("scales",)] == "float64"
    assert (rows[()].flops, rows[()].vjp_flops) == (80, 236)
    assert rows[("of_values",)].flops is None  # it needs the values of an array
    assert rows[("a",)].flops == 72


def test_rows_are_the_same_with_flops_and_without():
    class Box:
        """No pytree: what is in it, no walk sees."""

        def __init__(self, x):
            self.x = x

    class Part(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.total = nnx.Variable(jnp.zeros((1, 2)))

        def boxed(self, x):
            self.total[...] += x
            return Box(self.linear(x))

        def later(self, x):
            y = self.linear(x)
            return lambda: self.linear(y) + y

        def note(self, x):
            self.noted = Box(self.linear(x))
            self.made = nnx.Param(x)

        def shaped(self, like, f, scale):
            assert type(like) is jax.ShapeDtypeStruct  # itself: no array was passed
            return f(self.linear(jnp.ones(like.shape))) * scale, self

        def fails(self, x):
            self.linear(x)
            raise ValueError("no")

    class Whole(nnx.Module):
        def __init__(self, rngs):
            self.part = Part(rngs)

        def __call__(self, x):
            y = self.part.boxed(x).x + self.part.later(x)()
            self.part.note(y)
            z, part = self.part.shaped(jax.ShapeDtypeStruct((1, 2), x.dtype), lambda z: z + y, np.float32(2))
            assert part is self.part
            for _ in range(2):
                with pytest.raises(ValueError, match="no"):
                    self.part.fails(x)
            return z + self.part.noted.x + self.part.made[...] + self.part.total[...]

    model, x = Whole(nnx.Rngs(0)), jnp.ones((1, 2))
    counted, plain = rows_of(model, x), rows_of(model, x, flops=False)
    assert [(r.path, r.inputs_repr, r.outputs) for r in counted] == [(r.path, r.inputs_repr, r.outputs) for r in plain]
    assert [row.path[-1:] for row in plain] == [(), ("boxed",), ("linear",), ("later",), ("note",), ("shaped",)]
    flops = {row.path[-1:]: row.flops for row in counted}
    assert flops[("linear",)] == 10  # (1, 2) @ (2, 2), and the bias
    assert flops[("shaped",)] == 14  # z + y and * scale, where y comes from outside
    assert (flops[("boxed",)], flops[("later",)]) == (None, None)  # JAX sees no output
    assert flops[()] > 4 * 10


def test_inside_of_a_trace():
    seen = []
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    jax.jit(lambda x: seen.append(table(model, x)))(jnp.ones((1, 2)))
    assert seen == [table(model, jnp.ones((1, 2)))]
