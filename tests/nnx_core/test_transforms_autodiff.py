"""grad, value_and_grad and remat of functions of objects; the oracle is jax.grad of the same arithmetic."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Count, Node, Tied, assert_no_tracer, portrait, reachable
from tests.support.arrays import ramp
from tests.support.freed import collect
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3, over=6)


def loss_fn(m, x=X):
    return (m(x) ** 2).sum()


def kernel_grad(kernel, x=X):
    return jax.grad(lambda k: ((x @ k) ** 2).sum())(kernel)


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_gradients_are_a_state_of_params_at_the_paths_of_the_model():
    m = Affine()
    grads = nnx.grad(loss_fn)(m)
    assert isinstance(grads, nnx.State)
    assert nnx.to_flat_state(grads).paths == (("kernel",),)
    assert isinstance(grads["kernel"], nnx.Param)
    assert grads["kernel"] is not m.kernel
    assert_trees_close(grads["kernel"].get_value(), kernel_grad(m.kernel[...]))


def test_value_and_grad_returns_both():
    m = Affine()
    value, grads = nnx.value_and_grad(loss_fn)(m)
    assert_trees_close(value, ((X @ m.kernel[...]) ** 2).sum())
    assert_trees_close(grads["kernel"].get_value(), kernel_grad(m.kernel[...]))


def test_aux_comes_back_concrete():
    m = Affine()

    def with_aux(m, x):
        y = m(x)
        return (y**2).sum(), {"y": y, "n": 3, "made": Affine(2, 2)}

    (value, aux), grads = nnx.value_and_grad(with_aux, has_aux=True)(m, X)
    assert_trees_close(aux["y"], X @ m.kernel[...])
    assert int(aux["n"]) == 3
    assert_no_tracer(aux["made"])
    assert_trees_close(value, (aux["y"] ** 2).sum())
    grads_again, _ = nnx.grad(with_aux, has_aux=True)(m, X)
    assert_trees_equal(nnx.to_pure_dict(grads_again), nnx.to_pure_dict(grads))


def test_aux_may_be_an_argument_object():
    m = Affine()
    _, out = nnx.grad(lambda m: (loss_fn(m), m), has_aux=True)(m)
    assert out is m


def test_gradients_of_lists_have_int_keys():
    m = nnx.Sequential(Affine(), jnp.tanh, Affine(seed=1))
    grads = nnx.grad(loss_fn)(m)
    assert nnx.to_flat_state(grads).paths == (("layers", 0, "kernel"), ("layers", 2, "kernel"))


def test_gradients_keep_the_metadata_of_the_parameter():
    m = Affine()
    m.kernel.set_metadata(note="mine")
    assert nnx.grad(loss_fn)(m)["kernel"].note == "mine"


def test_a_model_without_parameters_has_empty_gradients():
    m = Node()
    m.calls = Count(jnp.float32(2.0))
    assert len(nnx.grad(lambda m: m.calls[...] ** 2)(m)) == 0


# ---- argnums and wrt -----------------------------------------------------------------------------------------------


def test_several_argnums_give_a_tuple():
    m = Affine()
    grads, gx = nnx.grad(lambda m, x: loss_fn(m, x), argnums=(0, 1))(m, X)
    assert_trees_close(grads["kernel"].get_value(), kernel_grad(m.kernel[...]))
    assert_trees_close(gx, jax.grad(lambda x: ((x @ m.kernel[...]) ** 2).sum())(X))


def test_a_tuple_of_one_gives_a_tuple_of_one():
    m = Affine()
    out = nnx.grad(loss_fn, argnums=(0,))(m)
    assert isinstance(out, tuple)
    assert len(out) == 1


def test_a_loose_array_argument():
    m = Affine()
    gx = nnx.grad(lambda m, x: loss_fn(m, x), argnums=1)(m, X)
    assert_trees_close(gx, jax.grad(lambda x: ((x @ m.kernel[...]) ** 2).sum())(X))
    assert int(m.calls[...]) == 1


def test_loose_pytrees_of_arrays():
    tree = {"a": jnp.ones(2), "b": [jnp.ones(3)]}
    grads = nnx.grad(lambda t: (t["a"] * 2).sum() + (t["b"][0] * 3).sum())(tree)
    assert_trees_equal(grads, {"a": jnp.full(2, 2.0), "b": [jnp.full(3, 3.0)]})


def test_a_lone_variable():
    v = nnx.Param(jnp.arange(3.0))
    g = nnx.grad(lambda v: (v[...] ** 2).sum())(v)
    assert isinstance(g, nnx.Param)
    assert_trees_equal(g.get_value(), jnp.arange(3.0) * 2)


def test_a_parameter_shared_with_an_argument_that_is_not_differentiated_is_an_alias_error():
    a = Affine()
    b = Node()
    b.kernel = a.kernel
    with pytest.raises(ValueError, match=r"(?s)Param.*args\[0\]\.kernel.*args\[1\]\.kernel"):
        nnx.grad(lambda a, b: loss_fn(a) + b.kernel.sum())(a, b)


def test_a_parameter_shared_between_two_differentiated_arguments():
    a = Affine()
    b = Node()
    b.kernel = a.kernel
    ga, gb = nnx.grad(lambda a, b: loss_fn(a) + b.kernel.sum(), argnums=(0, 1))(a, b)
    assert_trees_close(ga["kernel"].get_value(), kernel_grad(a.kernel[...]) + 1)
    assert len(gb) == 0


@pytest.mark.parametrize(
    ("wrt", "paths"),
    [
        (nnx.Param, [("bias",), ("kernel",)]),
        (nnx.Cache, [("cache",)]),
        ((nnx.Param, nnx.Cache), [("bias",), ("cache",), ("kernel",)]),
        (nnx.PathContains("bias"), [("bias",)]),
        (nnx.All(nnx.Param, nnx.Not(nnx.PathContains("bias"))), [("kernel",)]),
        (lambda path, v: path[-1] == "kernel", [("kernel",)]),
    ],
)
def test_diff_state_chooses_by_filter(wrt, paths):
    m = Node()
    m.kernel, m.bias, m.cache = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2)), nnx.Cache(jnp.ones(2))
    f = lambda m: (m.kernel * 1.0 + m.bias * 2.0 + m.cache * 3.0).sum()  # noqa: E731
    grads = nnx.grad(f, argnums=nnx.DiffState(0, wrt))(m)
    assert list(nnx.to_flat_state(grads).paths) == paths
    factor = {"kernel": 1.0, "bias": 2.0, "cache": 3.0}
    for path, g in nnx.to_flat_state(grads):
        assert_trees_equal(g.get_value(), jnp.full(2, factor[path[-1]]))


def test_diff_state_of_two_arguments():
    a, b = Affine(), Affine(seed=1)
    argnums = (nnx.DiffState(0, nnx.Param), nnx.DiffState(1, nnx.Param))
    ga, gb = nnx.grad(lambda a, b: (b(a(X)) ** 2).sum(), argnums=argnums)(a, b)
    pure = jax.grad(lambda p: ((X @ p[0] @ p[1]) ** 2).sum())
    want = pure((a.kernel[...], b.kernel[...]))
    assert_trees_close((ga["kernel"].get_value(), gb["kernel"].get_value()), want)


def test_argnums_counts_among_keywords_and_defaults():
    m = Affine()
    grads = nnx.grad(lambda m, x, scale=1.0: loss_fn(m, x) * scale)(m, x=X, scale=2.0)
    assert_trees_close(grads["kernel"].get_value(), 2 * kernel_grad(m.kernel[...]))


# ---- sharing and effects -------------------------------------------------------------------------------------------


def test_a_tied_parameter_is_counted_once_with_the_whole_gradient():
    m = Tied()
    grads = nnx.grad(loss_fn)(m)
    assert nnx.to_flat_state(grads).paths == (("decode", "kernel"), ("layers", 1, "kernel"))
    want = jax.grad(lambda k: ((X @ k @ k) ** 2).sum())(m.encode.kernel[...])
    assert_trees_close(grads["decode"]["kernel"].get_value(), want)
    assert_trees_equal(grads["layers"][1]["kernel"].get_value(), jnp.zeros((3, 3)))


def test_state_updates_propagate_and_parameters_stay():
    m = Tied()
    members = reachable(m)
    kernel = m.encode.kernel.get_value()
    nnx.value_and_grad(loss_fn)(m)
    assert int(m.encode.calls[...]) == 2
    assert m.encode.kernel.get_value() is kernel
    assert [id(x) for x in reachable(m)] == [id(x) for x in members]
    assert_no_tracer(m)


def test_structure_changes_propagate():
    m = Affine()

    def loss(m):
        y = m(X)
        m.sow(nnx.Intermediate, "seen", y)
        m.extra = nnx.Cache(y.sum())
        return (y**2).sum()

    nnx.grad(loss)(m)
    assert_trees_close(m.seen.get_value()[0], X @ m.kernel[...])
    assert_no_tracer(m)


def test_a_parameter_written_inside_is_differentiated_at_its_old_value():
    m = Affine()
    kernel = m.kernel.get_value()

    def loss(m):
        value = loss_fn(m)
        m.kernel[...] = m.kernel * 2
        return value

    grads = nnx.grad(loss)(m)
    assert_trees_close(grads["kernel"].get_value(), kernel_grad(kernel))
    assert_trees_close(m.kernel.get_value(), kernel * 2)


def test_batch_statistics_get_no_gradient():
    m = Affine()
    m.mean = nnx.BatchStat(jnp.zeros(3))

    def loss(m):
        y = m(X)
        m.mean[...] = jax.lax.stop_gradient(y.mean(0))
        return (y**2).sum()

    grads = nnx.grad(loss)(m)
    assert nnx.to_flat_state(grads).paths == (("kernel",),)
    assert_trees_close(m.mean.get_value(), (X @ m.kernel[...]).mean(0))


def test_an_exception_leaves_the_model_as_it_was():
    m = Affine()
    before = portrait(m)

    def loss(m):
        m(X)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        nnx.grad(loss)(m)
    assert portrait(m) == before


# ---- with other transforms -----------------------------------------------------------------------------------------


def test_second_order():
    m = Node()
    m.w = nnx.Param(jnp.float32(3.0))

    def slope(m):
        return nnx.grad(lambda m: m.w[...] ** 3)(m)["w"][...]

    assert_trees_close(nnx.grad(slope)(m)["w"].get_value(), jnp.float32(18.0))


def test_inside_and_around_jit():
    m, twin = Affine(), Affine()
    inside = nnx.jit(lambda m: nnx.grad(loss_fn)(m))(m)
    around = nnx.grad(nnx.jit(loss_fn))(twin)
    want = kernel_grad(m.kernel[...])
    assert_trees_close(inside["kernel"].get_value(), want)
    assert_trees_close(around["kernel"].get_value(), want)
    assert portrait(m) == portrait(twin)


def test_inside_jax_jit_on_split_state():
    graphdef, params, rest = nnx.split(Affine(), nnx.Param, ...)

    @jax.jit
    def step(params, rest):
        m = nnx.merge(graphdef, params, rest)
        grads = nnx.grad(loss_fn)(m)
        return nnx.state(m, nnx.Param), grads

    _, grads = step(params, rest)
    assert_trees_close(grads["kernel"].get_value(), kernel_grad(params["kernel"][...]))


def test_a_training_loop_on_a_tied_model_learns():
    m = Tied()

    @nnx.jit
    def step(m, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(m)
        params = nnx.state(m, nnx.Param)
        nnx.update(m, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return loss

    losses = [float(step(m, X)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert int(m.encode.calls[...]) == 40
    assert m.encode is m.decode


def test_as_a_decorator_with_and_without_options():
    @nnx.grad
    def plain(m):
        return loss_fn(m)

    @nnx.value_and_grad(has_aux=True)
    def with_aux(m):
        return loss_fn(m), 1

    m = Affine()
    want = kernel_grad(m.kernel[...])
    assert_trees_close(plain(m)["kernel"].get_value(), want)
    assert_trees_close(with_aux(m)[1]["kernel"].get_value(), want)


# ---- remat ---------------------------------------------------------------------------------------------------------


def test_remat_is_the_function_itself():
    m, twin = Tied(), Tied()
    assert_trees_close(nnx.remat(lambda m, x: m(x))(m, X), twin(X))
    assert portrait(m) == portrait(twin)


def test_remat_as_a_decorator_with_options():
    class Net(Affine):
        @nnx.remat(policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        def forward(self, x):
            return jnp.sin(self(x))

    m = Net()
    grads = nnx.grad(lambda m: m.forward(X).sum())(m)
    assert_trees_close(grads["kernel"].get_value(), jax.grad(lambda k: jnp.sin(X @ k).sum())(m.kernel[...]))
    assert int(m.calls[...]) == 1


def test_remat_with_static_arguments():
    m = Affine()
    out = nnx.remat(lambda m, x, twice: m(m(x)) if twice else m(x), static_argnums=(2,))(m, X, True)
    assert_trees_close(out, X @ m.kernel[...] @ m.kernel[...])


def test_remat_recomputes():
    m = Affine()
    jaxpr = str(jax.make_jaxpr(lambda k: nnx.grad(lambda m, x: remat_sin(m, x))(with_kernel(k), X))(m.kernel[...]))
    assert "checkpoint" in jaxpr or "remat" in jaxpr


def with_kernel(k):
    m = Node()
    m.kernel = nnx.Param(k)
    return m


def remat_sin(m, x):
    return nnx.remat(lambda m, x: jnp.sin(x @ m.kernel[...]).sum())(m, x)


# ---- wrong use -----------------------------------------------------------------------------------------------------


def test_a_loss_must_be_a_scalar():
    with pytest.raises(TypeError, match=r"scalar-output.*\(2, 3\)"):
        nnx.grad(lambda m: m(X))(Affine())


def test_a_loss_must_be_real():
    with pytest.raises(TypeError, match=r"real-valued|float"):
        nnx.grad(lambda m: 1)(Affine())


def test_integer_parameters_cannot_be_differentiated():
    m = Node()
    m.w = nnx.Param(jnp.int32(1))
    with pytest.raises(TypeError, match=r"(?s)int32"):
        nnx.grad(lambda m: m.w * 1.0)(m)


def test_of_a_state_or_a_variable_everything_is_differentiated():
    state = nnx.State({"a": nnx.BatchStat(jnp.ones(2)), "b": nnx.Param(jnp.ones(2))})
    grads = nnx.grad(lambda s: (s["a"][...] * 3 + s["b"][...]).sum())(state)
    assert_trees_equal(nnx.to_pure_dict(grads), {"a": jnp.full(2, 3.0), "b": jnp.ones(2)})
    grad = nnx.grad(lambda v: (v[...] * 2).sum())(nnx.BatchStat(jnp.ones(2)))
    assert type(grad) is nnx.BatchStat
    assert_trees_equal(grad[...], jnp.full(2, 2.0))


def test_of_a_state_with_arrays_and_variables():
    state = nnx.State({"a": jnp.array([1.0, 2.0]), "b": {"c": nnx.Param(jnp.array([3.0])), "d": jnp.array(4.0)}})
    grads = nnx.grad(lambda s: (s["a"] ** 2).sum() + (s["b"]["c"] * s["b"]["d"]).sum())(state)
    assert isinstance(grads, nnx.State)
    expected = {"a": jnp.array([2.0, 4.0]), "b": {"c": jnp.array([4.0]), "d": jnp.array(3.0)}}
    assert_trees_close(nnx.to_pure_dict(grads), expected)
    assert isinstance(grads["b"]["c"], nnx.Param)


def test_argnums_of_a_method_count_from_either_end_without_its_object():
    class Loss(Affine):
        def of(self, x):
            return loss_fn(self, x)

    m = Loss()
    kernel = m.kernel.get_value()
    expected = jax.grad(lambda x: ((x @ kernel) ** 2).sum())(X)
    for argnums in (0, -1, nnx.DiffState(-1, ...)):
        assert_trees_close(nnx.grad(m.of, argnums=argnums)(X), expected)


# ---- what a transformed function closes over -----------------------------------------------------------------------

TRANSFORMED = {
    "jit": lambda f, m: nnx.jit(f)(m),
    "grad": lambda f, m: nnx.grad(f)(m),
    "vjp": lambda f, m: nnx.vjp(f, m),
    "remat": lambda f, m: nnx.remat(f)(m),
    "vmap": lambda f, m: nnx.vmap(f, in_axes=None, axis_size=2)(m),
}


@pytest.mark.parametrize("use", TRANSFORMED.values(), ids=TRANSFORMED)
def test_it_goes_with_the_function(use):
    class Data:
        x = X

    def closed_over():
        data = Data()
        use(lambda m: loss_fn(m, data.x), Affine())
        return weakref.ref(data)

    collect()
    gc.disable()  # counting references has to be enough
    try:
        assert closed_over()() is None
    finally:
        gc.enable()


def test_remat_of_a_constant_gives_an_array_of_jax():
    count = Count(jnp.zeros(2))

    def f(count):
        count[...] = 2.0
        return jnp.float32(3)

    out = nnx.remat(f)(count)
    assert isinstance(out, jax.Array)
    assert isinstance(count.get_value(), jax.Array)
    assert count.get_value().at[0].set(1.0).tolist() == [1.0, 2.0]
