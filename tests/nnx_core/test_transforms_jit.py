"""jit and eval_shape: functions of objects, compiled and abstract."""

import collections
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Count, Node, Tied, assert_no_tracer, portrait
from tests.support.arrays import ramp
from tests.support.freed import collect
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3)


@pytest.fixture
def traced():
    """A compiled call of a module that records its traces: (f, traces)."""
    traces = []

    @nnx.jit
    def f(m, x):
        traces.append(1)
        return m(x)

    return f, traces


# ---- results and effects -------------------------------------------------------------------------------------------


def test_it_writes_back_into_the_same_variables_and_compiles_once(traced):
    f, traces = traced
    m = Affine()
    kernel, calls = m.kernel, m.calls
    want = X @ m.kernel[...]
    assert_trees_close(f(m, X), want)
    assert_trees_close(f(m, X), want)
    assert int(m.calls[...]) == 2
    assert m.kernel is kernel
    assert m.calls is calls
    assert len(traces) == 1


def test_another_object_of_the_same_structure_does_not_retrace(traced):
    f, traces = traced
    a, b = Affine(), Affine(seed=1)
    f(a, X)
    assert_trees_close(f(b, X), X @ b.kernel[...])
    f(a, X)
    assert len(traces) == 1
    assert (int(a.calls[...]), int(b.calls[...])) == (2, 1)


def test_eager_writes_do_not_retrace(traced):
    f, traces = traced
    m = Affine()
    f(m, X)
    m.kernel[...] = jnp.ones((3, 3))
    assert_trees_close(f(m, X), X @ jnp.ones((3, 3)))
    m.kernel.set_value(jnp.zeros((3, 3)))
    assert_trees_close(f(m, X), jnp.zeros((2, 3)))
    assert len(traces) == 1


def test_a_new_shape_or_dtype_retraces(traced):
    f, traces = traced
    m = Affine()
    f(m, X)
    f(m, X[:1])
    m.kernel.set_value(jnp.ones((3, 5)))
    assert f(m, X).shape == (2, 5)
    assert len(traces) == 3


def test_same_object_in_same_object_out():
    m = Tied()
    assert nnx.jit(lambda m: m)(m) is m
    assert nnx.jit(lambda m: m.encode)(m) is m.encode
    out = nnx.jit(lambda m: {"k": m.encode.kernel, "m": [m]})(m)
    assert out["k"] is m.encode.kernel
    assert out["m"][0] is m


def test_new_objects_come_out():
    made = nnx.jit(lambda: Affine(2, 4, seed=3))()
    assert isinstance(made, Affine)
    assert (made.n_in, made.n_out) == (2, 4)
    assert_trees_close(made.kernel.get_value(), Affine(2, 4, seed=3).kernel[...])
    made.kernel[...] = jnp.zeros((2, 4))  # it belongs to the caller's trace
    assert_no_tracer(made)


def test_a_class_can_be_compiled():
    assert nnx.jit(Affine)().kernel.shape == (3, 3)


def test_structure_changes_propagate():
    m = Affine()
    kernel = m.kernel

    @nnx.jit
    def grow(m, x):
        m.cache = nnx.Cache(x.sum())
        m.alias = m.kernel
        m.tag = "grown"
        m.child = Affine(2, 2)
        m.table = x
        del m.calls
        m.kernel.set_metadata(seen=True)

    grow(m, X)
    assert float(m.cache[...]) == float(X.sum())
    assert m.alias is m.kernel is kernel
    assert m.tag == "grown"
    assert m.child.kernel.shape == (2, 2)
    assert_trees_equal(m.table, X)
    assert not hasattr(m, "calls")
    assert kernel.seen
    assert_no_tracer(m)


def test_swapped_children_stay_the_same_objects():
    m = Node()
    m.a, m.b = Affine(), Affine(seed=1)
    a, b = m.a, m.b

    @nnx.jit
    def swap(m):
        m.a, m.b = m.b, m.a

    swap(m)
    assert (m.a, m.b) == (b, a)
    swap(m)
    assert (m.a, m.b) == (a, b)


def test_list_and_dict_changes_propagate():
    m = Node()
    m.items = nnx.List([nnx.Param(jnp.ones(1))])
    m.table = nnx.Dict(a=nnx.Param(jnp.ones(1)))
    first = m.items[0]

    @nnx.jit
    def change(m):
        m.items.append(nnx.Param(m.items[0] * 2))
        m.table["b"] = m.items[0]
        del m.table["a"]

    change(m)
    assert m.items[0] is first is m.table["b"]
    assert_trees_equal(m.items[1].get_value(), jnp.full(1, 2.0))
    assert list(m.table) == ["b"]


def test_plain_containers_keep_their_members():
    m = Node()
    m.layers = [Affine(), Affine(seed=1)]
    first, second = m.layers

    @nnx.jit
    def f(m, x):
        for layer in m.layers:
            x = layer(x)
        return x

    f(m, X)
    f(m, X)
    assert m.layers[0] is first
    assert m.layers[1] is second
    assert int(first.calls[...]) == int(second.calls[...]) == 2


def test_a_plain_array_attribute_is_read_and_written():
    m = Node()
    m.table = jnp.arange(3.0)
    kept = m.table
    assert float(nnx.jit(lambda m: m.table.sum())(m)) == 3.0
    assert m.table is kept  # law 4: it was not written

    @nnx.jit
    def f(m):
        m.table = m.table + 1

    f(m)
    assert_trees_equal(m.table, jnp.arange(3.0) + 1)


def test_containers_that_are_changed_inside_are_changed_outside():
    m = Node()
    m.listed, m.mapped = [jnp.ones(1)], {"a": jnp.ones(1)}
    m.ordered, m.state = collections.OrderedDict(a=jnp.ones(1)), nnx.State({"a": nnx.Param(jnp.ones(1))})

    @nnx.jit
    def f(m):
        m.listed.append(m.listed[0] * 2)
        m.mapped["b"] = m.mapped["a"] * 2
        m.ordered["a"] = m.ordered["a"] * 2
        m.state["b"] = nnx.Param(m.state["a"] * 2)

    f(m)
    two = jnp.full(1, 2.0)
    assert_trees_equal((m.listed[1], m.mapped["b"], m.ordered["a"]), (two, two, two))
    assert_trees_equal(m.state["b"].get_value(), two)


# ---- sharing -------------------------------------------------------------------------------------------------------


def test_sharing_within_and_across_arguments():
    m = Tied()

    @nnx.jit
    def f(a, b, x, *, c):
        assert a is b
        assert a.encode is a.decode is c[0] is a.layers[0]
        return a(x)

    f(m, m, X, c=[m.encode])
    assert m.encode is m.decode
    assert int(m.encode.calls[...]) == 2


def test_one_variable_as_two_arguments():
    v = nnx.Param(jnp.ones(2))

    @nnx.jit
    def f(a, b):
        assert a is b
        a[...] += 1
        return b[...]

    assert_trees_equal(f(v, v), jnp.full(2, 2.0))
    assert_trees_equal(v.get_value(), jnp.full(2, 2.0))


def test_another_sharing_pattern_retraces():
    seen = []

    @nnx.jit
    def f(a, b):
        seen.append(a is b)

    x, y = Affine(), Affine(seed=1)
    f(x, x)
    f(x, y)
    f(y, y)
    f(y, x)
    assert seen == [True, False]


def test_a_cycle():
    m = Affine()
    m.me = m
    nnx.jit(lambda m, x: m.me.me(x))(m, X)
    assert m.me is m
    assert int(m.calls[...]) == 1


def test_objects_inside_containers_among_arguments():
    a, b = Affine(), Affine(seed=1)

    @nnx.jit
    def f(layers, table):
        return table["b"](layers[0](X))

    assert_trees_close(f([a, b], {"b": b}), X @ a.kernel[...] @ b.kernel[...])
    assert int(b.calls[...]) == 1


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_keyword_arguments(traced):
    f, _ = traced
    m = Affine()
    assert_trees_equal(f(m=m, x=X), f(m, x=X))
    assert int(m.calls[...]) == 2


def test_numbers_are_traced_as_arguments_and_static_on_objects():
    traces = []

    @nnx.jit
    def f(m, n):
        traces.append(1)
        assert m.width == 8
        return n + m.width

    m = Node()
    m.width = 8
    assert (int(f(m, 1)), int(f(m, 2))) == (9, 10)
    assert len(traces) == 1


@pytest.mark.parametrize("options", [{"static_argnums": 1}, {"static_argnums": (1,)}, {"static_argnames": "n"}])
@pytest.mark.parametrize("by_name", [False, True])
def test_static_arguments(options, by_name):
    traces = []

    @nnx.jit(**options)
    def f(m, n):
        traces.append(n)
        return m(X) if n == "call" else m.kernel.sum()

    m = Affine()
    for n in ("call", "sum", "call"):
        f(m, n=n) if by_name else f(m, n)
    assert traces == ["call", "sum"]
    assert int(m.calls[...]) == 2


def test_static_argument_before_the_module():
    m = Affine()
    out = nnx.jit(lambda mode, m: m(X) * mode, static_argnums=0)(2, m)
    assert_trees_close(out, X @ m.kernel[...] * 2)
    assert int(m.calls[...]) == 1


def test_a_static_argument_need_not_be_hashable():
    f = nnx.jit(lambda m, n: n[0], static_argnums=1)
    assert [int(f(Affine(), [n])) for n in (1, 2, 1)] == [1, 2, 1]


def test_default_and_variadic_arguments():
    @nnx.jit
    def f(m, *xs, scale=2.0, **more):
        return sum(m(x) for x in xs) * scale + more.get("shift", 0.0)

    m = Affine()
    assert_trees_close(f(m, X, X, shift=1.0), 4 * (X @ m.kernel[...]) + 1)
    assert int(m.calls[...]) == 2


def test_as_a_decorator_of_methods():
    class Net(Affine):
        @nnx.jit
        def forward(self, x):
            return self(x)

        @nnx.jit(static_argnames="times")
        def repeat(self, x, *, times):
            for _ in range(times):
                x = self(x)
            return x

    m = Net()
    assert_trees_close(m.forward(X), X @ m.kernel[...])
    m.repeat(X, times=3)
    assert int(m.calls[...]) == 4


def test_bound_methods_and_modules_are_arguments_like_others():
    m = Affine()
    assert_trees_close(nnx.jit(m.__call__)(X), X @ m.kernel[...])
    assert_trees_close(nnx.jit(m)(X), X @ m.kernel[...])
    assert int(m.calls[...]) == 2


def test_static_results_come_back():
    text, nothing, function = nnx.jit(lambda m: ("text", None, jnp.tanh))(Affine())
    assert (text, nothing, function) == ("text", None, jnp.tanh)


def test_a_captured_module_cannot_be_written_through_a_compiled_function():
    m = Affine()
    f = nnx.jit(lambda m, x: m(x))
    f(m, X)
    f(m, X)
    with pytest.raises(ValueError, match=r"args\[0\]\.calls"):
        jax.jit(lambda x: f(m, x))(X)
    assert int(m.calls[...]) == 2
    assert_no_tracer(m)


def test_more_modules_than_plans_are_kept():
    f = nnx.jit(lambda m, x: m(x).sum())
    modules = [Affine(1, 1) for _ in range(600)]
    for _ in range(2):
        for m in modules:
            f(m, jnp.ones((1, 1)))
    assert {int(m.calls[...]) for m in modules} == {2}


def test_name_and_doc_are_kept():
    def f(m):
        """Doc."""

    assert nnx.jit(f).__name__ == "f"
    assert nnx.jit(f).__doc__ == "Doc."
    assert nnx.jit(f).__wrapped__ is f


@pytest.mark.parametrize("options", [{"donate_argnums": 0}, {"donate_argnames": "m"}])
def test_donated_objects_travel_back_whole(options):
    @nnx.jit(**options)
    def f(m, x):
        m.calls[...] += 1
        return x

    m = Affine()
    before = np.asarray(m.kernel)
    old = m.calls.get_value()
    for _ in range(3):
        f(m, X)
    assert int(m.calls[...]) == 3
    np.testing.assert_array_equal(np.asarray(m.kernel), before)  # unwritten, and still there
    assert old.is_deleted()


def test_a_donated_array_is_consumed_and_the_module_is_not():
    m, x = Affine(), jnp.ones((2, 3))
    nnx.jit(lambda m, x: x + 1, donate_argnums=1)(m, x)
    assert x.is_deleted()
    assert not m.kernel.get_value().is_deleted()


def test_lower_and_compile():
    m = Affine()
    compiled = nnx.jit(lambda m, x: m(x)).lower(m, X).compile()
    assert_trees_close(compiled(m, X), X @ m.kernel[...])
    assert int(m.calls[...]) == 1


# ---- law 4: what leaves the trace ----------------------------------------------------------------------------------


def test_law4_an_unwritten_variable_keeps_its_array():
    m = Affine()
    kernel = m.kernel.get_value()
    f = nnx.jit(lambda m, x: m(x))
    f(m, X)
    f(m, X)
    assert m.kernel.get_value() is kernel


def outputs_of_inner_jit(f, *args):
    (equation,) = [e for e in jax.make_jaxpr(f)(*args).eqns if e.primitive.name in ("jit", "pjit")]
    return len(equation.outvars)


def test_law4_reads_leave_nothing():
    m = Affine()
    assert outputs_of_inner_jit(lambda x: nnx.jit(lambda m, x: x @ m.kernel[...])(m, x), X) == 1


def test_law4_only_the_written_variable_leaves():
    @jax.jit
    def outer(x):
        m = Affine()
        m.big = nnx.BatchStat(jnp.ones((4, 4)))
        return nnx.jit(lambda m, x: m(x))(m, x)

    jaxpr = jax.make_jaxpr(outer.__wrapped__)(X)
    inner = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit") and "lambda" in str(e.params.get("name"))]
    assert [len(e.outvars) for e in inner] == [2]  # the result and the count


def test_a_variable_written_with_its_own_value_is_not_lost():
    m = Affine()

    @nnx.jit
    def f(m):
        m.calls[...] = m.calls[...]
        return m.calls[...]

    assert int(f(m)) == 0
    assert int(m.calls[...]) == 0


# ---- plans and memory ----------------------------------------------------------------------------------------------


def test_a_dropped_module_is_freed_while_the_function_lives(traced):
    f, traces = traced
    m = Tied()
    f(m, X)
    f(m, X)
    gone, inner, array = weakref.ref(m), weakref.ref(m.encode.kernel), weakref.ref(m.encode.kernel.get_value())
    del m
    collect()
    assert gone() is None
    assert inner() is None
    assert array() is None
    f(Tied(), X)
    assert len(traces) == 1


def test_a_reused_address_is_not_mistaken_for_the_old_module(traced):
    f, _ = traced
    for i in range(20):
        m = Affine(seed=i)
        assert_trees_close(f(m, X), X @ m.kernel[...])
        del m


# ---- trace safety --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, lambda f: nnx.grad(lambda x: f(x).sum()), nnx.vmap])
def test_writing_a_captured_variable_names_it_and_what_to_do(transform):
    m = Affine()
    with pytest.raises(ValueError, match=r"(?s)Count.*[Pp]ass"):
        transform(lambda x: m(x))(X)
    assert int(m.calls[...]) == 0
    assert_no_tracer(m)


def test_reading_a_captured_variable_is_allowed():
    m = Affine()
    assert_trees_close(nnx.jit(lambda x: x @ m.kernel[...])(X), X @ m.kernel[...])


# ---- eval_shape ----------------------------------------------------------------------------------------------------


def test_eval_shape_makes_an_abstract_module():
    m = nnx.eval_shape(lambda: Affine(2, 5))
    assert isinstance(m, Affine)
    assert isinstance(m.kernel.get_value(), jax.ShapeDtypeStruct)
    assert (m.kernel.shape, m.kernel.dtype) == ((2, 5), jnp.float32)
    assert (m.n_in, m.n_out) == (2, 5)


def test_an_abstract_module_takes_real_values():
    abstract = nnx.eval_shape(lambda: Tied())
    assert abstract.encode is abstract.decode
    real = Tied()
    nnx.update(abstract, nnx.state(real))
    assert portrait(abstract) == portrait(real)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Tied()))
    assert nnx.to_flat_state(state).paths == nnx.to_flat_state(nnx.state(real)).paths
    assert portrait(nnx.merge(graphdef, nnx.state(real))) == portrait(real)


def test_eval_shape_computes_and_changes_nothing():
    m = Affine()
    before = portrait(m)
    out = nnx.eval_shape(lambda m, x: m(x), m, X)
    assert (out.shape, out.dtype) == ((2, 3), jnp.float32)
    assert portrait(m) == before


def test_eval_shape_that_returns_its_argument_leaves_it_alone():
    m = Affine()
    out = nnx.eval_shape(lambda m: m, m)
    assert out is not m
    assert isinstance(out.kernel.get_value(), jax.ShapeDtypeStruct)
    assert isinstance(m.kernel.get_value(), jax.Array)


def test_eval_shape_takes_keywords_and_abstract_arguments():
    out = nnx.eval_shape(lambda m, *, x: m(x), Affine(), x=jax.ShapeDtypeStruct((7, 3), jnp.float32))
    assert out.shape == (7, 3)


def test_eval_shape_of_an_abstract_module():
    m = nnx.eval_shape(lambda: Affine())
    assert nnx.eval_shape(lambda m, x: m(x), m, X).shape == (2, 3)


def test_counting_variables_of_an_abstract_module():
    m = nnx.eval_shape(lambda: Tied())
    assert sum(v.size for _, v in nnx.to_flat_state(nnx.state(m, nnx.Param))) == 18
    assert len(nnx.to_flat_state(nnx.state(m, Count))) == 2


# ---- the modes of flax.nnx -----------------------------------------------------------------------------------------


def test_graph_false_forbids_shared_references():
    with pytest.raises(ValueError, match=r"(?s)kernel|decode|encode"):
        nnx.jit(lambda m, x: m(x), graph=False)(Tied(), X)
    m = Affine()
    assert_trees_close(nnx.jit(lambda m, x: m(x), graph=False)(m, X), X @ m.kernel[...])
    assert int(m.calls[...]) == 1


def test_graph_updates_false_still_writes_variables():
    m = Affine()
    nnx.jit(lambda m, x: m(x), graph_updates=False)(m, X)
    assert int(m.calls[...]) == 1


def test_lists_in_metadata_stay_lists():
    v = nnx.Param(jnp.ones(2), names=["a", "b"])

    @nnx.jit
    def f(v):
        assert v.names == ["a", "b"]
        v.set_metadata(names=[*v.names, "c"], other=("d",))

    f(v)
    assert v.get_metadata() == {"names": ["a", "b", "c"], "other": ("d",)}
    assert jax.tree.map(lambda x: x, v).names == ["a", "b", "c"]
    assert nnx.merge(*nnx.split(nnx.List([v])))[0].names == ["a", "b", "c"]
