"""scan over functions of objects: carries, stacked layers, variables that are read or written on no axis."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Count, Node, Tied, assert_no_tracer, portrait, reachable, stack_of_affine
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3, over=6)
XS = ramp(5, 2, 3, over=30)


def through_layers(kernels, x=X):
    for k in kernels:
        x = x @ k
    return x


# ---- plain arrays ----------------------------------------------------------------------------------------------------


def test_the_default_is_a_carry_and_axis_0():
    got = nnx.scan(lambda c, x: (c + x, c * x))(jnp.float32(0.0), jnp.arange(4.0))
    want = jax.lax.scan(lambda c, x: (c + x, c * x), jnp.float32(0.0), jnp.arange(4.0))
    assert_trees_equal(got, want)


def test_reverse_unroll_and_other_axes():
    f = lambda c, x: (c + x.sum(), c * x)  # noqa: E731
    xs = jnp.arange(12.0).reshape(3, 4)
    got = nnx.scan(f, in_axes=(nnx.Carry, 1), out_axes=(nnx.Carry, 1), reverse=True, unroll=2)(jnp.float32(0.0), xs)
    carry, ys = jax.lax.scan(f, jnp.float32(0.0), xs.T, reverse=True)
    assert_trees_equal(got, (carry, ys.T))


def test_carry_only():
    f = nnx.scan(lambda c: c + 1.0, in_axes=nnx.Carry, out_axes=nnx.Carry, length=3)
    assert_trees_equal(f(jnp.float32(0.0)), jnp.float32(3.0))
    g = nnx.scan(lambda c: (c + 1.0, c), in_axes=(nnx.Carry,), length=3)
    assert_trees_equal(g(jnp.float32(0.0)), (jnp.float32(3.0), jnp.arange(3.0)))


def test_no_carry_is_a_map():
    assert_trees_equal(nnx.scan(lambda x: x * 2, in_axes=0, out_axes=0)(jnp.arange(3.0)), jnp.arange(3.0) * 2)


def test_carry_in_another_position():
    f = lambda x, c: (x * 2, c + x)  # noqa: E731
    ys, c = nnx.scan(f, in_axes=(0, nnx.Carry), out_axes=(0, nnx.Carry))(jnp.arange(3.0), jnp.float32(0.0))
    assert_trees_equal((ys, c), (jnp.arange(3.0) * 2, jnp.float32(3.0)))


def test_a_broadcast_argument_needs_a_length():
    f = nnx.scan(lambda c, x: (c + x, c), in_axes=(nnx.Carry, None), length=3)
    assert_trees_equal(f(jnp.float32(0.0), jnp.float32(2.0)), (jnp.float32(6.0), jnp.array([0.0, 2.0, 4.0])))


def test_several_scanned_arguments_and_results():
    f = lambda c, a, b: (c + a, a * b, a - b)  # noqa: E731
    c, p, d = nnx.scan(f, in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0, 0))(
        jnp.float32(0.0), jnp.arange(3.0), jnp.ones(3)
    )
    assert_trees_equal((c, p, d), (jnp.float32(3.0), jnp.arange(3.0), jnp.arange(3.0) - 1))


def test_a_carry_that_is_a_tree():
    f = lambda c, x: ({"n": c["n"] + 1, "s": c["s"] + x}, x)  # noqa: E731
    c, _ = nnx.scan(f)({"n": jnp.int32(0), "s": jnp.float32(0.0)}, jnp.arange(3.0))
    assert_trees_equal(c, {"n": jnp.int32(3), "s": jnp.float32(3.0)})


# ---- over layers -----------------------------------------------------------------------------------------------------


def test_over_the_layers_of_a_stack():
    stack = stack_of_affine(4)
    members = reachable(stack)
    y = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stack)
    assert_trees_close(y, through_layers(stack.kernel[...]))
    assert_trees_equal(stack.calls.get_value(), jnp.ones(4, jnp.int32))
    assert [id(x) for x in reachable(stack)] == [id(x) for x in members]


def test_layers_first_and_outputs_of_each():
    stack = stack_of_affine(4)
    f = lambda layer, x: (layer(x), x.sum())  # noqa: E731
    y, sums = nnx.scan(f, in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))(stack, X)
    assert_trees_close(y, through_layers(stack.kernel[...]))
    assert sums.shape == (4,)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_layers_on_other_axes(axis):
    stack = stack_of_affine(4)
    kernels = stack.kernel.get_value()
    stack.kernel.set_value(jnp.moveaxis(kernels, 0, axis))
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    y = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(X, stack)
    assert_trees_close(y, through_layers(kernels))
    assert stack.kernel.shape == jnp.moveaxis(kernels, 0, axis).shape


def test_scanned_variables_that_are_written_come_back_stacked():
    stack = stack_of_affine(4)
    kernels = stack.kernel.get_value()

    def f(x, layer):
        layer.kernel[...] = layer.kernel * 2
        return layer(x)

    nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stack)
    assert_trees_equal(stack.kernel.get_value(), kernels * 2)


def test_row47_read_only_parameters_are_not_stacked_in_the_outputs():
    stack = stack_of_affine(4)
    kernel = stack.kernel.get_value()
    run = lambda x, m: nnx.scan(lambda x, l: x @ l.kernel[...], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, m)  # noqa: E731
    run(X, stack)
    assert stack.kernel.get_value() is kernel
    jaxpr = jax.make_jaxpr(lambda x: run(x, stack))(X)
    (scan,) = [e for e in _all_equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert [v.aval.shape for v in scan.outvars] == [(2, 3)]  # the carry, and no (4, 3, 3)


def _all_equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for p in e.params.values():
            if hasattr(p, "jaxpr"):
                yield from _all_equations(p.jaxpr)


def test_state_axes_with_a_carried_counter():
    stack = stack_of_affine(4)
    stack.calls.set_value(jnp.int32(0))
    axes = nnx.StateAxes({nnx.Param: 0, ...: nnx.Carry})
    seen = nnx.scan(lambda x, layer: (layer(x), layer.calls[...]), in_axes=(nnx.Carry, axes))(X, stack)[1]
    assert_trees_equal(seen, jnp.arange(1, 5, dtype=jnp.int32))
    assert int(stack.calls[...]) == 4


def test_gradients_through_a_scan_over_layers():
    stack = stack_of_affine(3)

    def loss(m):
        y = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, m)
        return (y**2).sum()

    def pure(kernels):
        x = X
        for k in kernels:
            x = jnp.tanh(x @ k)
        return (x**2).sum()

    grads = nnx.grad(loss)(stack)
    assert_trees_close(grads["kernel"].get_value(), jax.grad(pure)(stack.kernel[...]))
    assert_trees_equal(stack.calls.get_value(), jnp.ones(3, jnp.int32))


def test_remat_inside_scan_inside_jit():
    stack = stack_of_affine(4)

    @nnx.jit
    def forward(x, stack):
        return nnx.scan(nnx.remat(lambda x, l: l(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    assert_trees_close(forward(X, stack), through_layers(stack.kernel[...]))
    assert_trees_equal(stack.calls.get_value(), jnp.ones(4, jnp.int32))


# ---- modules as carry ------------------------------------------------------------------------------------------------


def test_a_module_as_carry():
    m = Affine()
    kernel = m.kernel.get_value()
    out, ys = nnx.scan(lambda m, x: (m, m(x)))(m, XS)
    assert out is m
    assert_trees_close(ys, XS @ kernel)
    assert int(m.calls[...]) == 5


def test_sharing_inside_a_carried_module():
    m = Tied()
    out, _ = nnx.scan(lambda m, x: (m, m(x)))(m, XS)
    assert out is m
    assert m.encode is m.decode is m.layers[0]
    assert int(m.encode.calls[...]) == 10


def test_a_carry_of_module_and_array():
    m = Affine()

    def f(carry, x):
        m, total = carry
        return (m, total + m(x).sum()), None

    (out, total), _ = nnx.scan(f)((m, jnp.float32(0.0)), XS)
    assert out is m
    assert_trees_close(total, (XS @ m.kernel[...]).sum())


def test_the_training_loop_as_a_scan():
    m = Affine()

    def step(m, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).mean())(m)
        m.kernel[...] = m.kernel - 0.1 * grads["kernel"]
        return m, (m(x) ** 2).mean()

    twin = Affine()
    want = [step(twin, x)[1] for x in XS]
    _, losses = nnx.scan(step)(m, XS)
    assert_trees_close(losses, jnp.stack(want))
    assert_trees_close(m.kernel.get_value(), twin.kernel.get_value())
    assert int(m.calls[...]) == int(twin.calls[...])


def test_rngs_as_carry_draw_the_keys_that_eager_draws():
    rngs, eager = nnx.Rngs(0), nnx.Rngs(0)
    _, keys = nnx.scan(lambda r, _: (r, r.params()))(rngs, jnp.arange(3))
    assert_trees_equal(list(keys), [eager.params() for _ in range(3)])
    assert int(rngs.default.count[...]) == 3


# ---- axis None -------------------------------------------------------------------------------------------------------


def test_axis_none_read_only():
    m = Affine()
    kernel = m.kernel.get_value()
    f = lambda c, m, x: (c, x @ m.kernel[...])  # noqa: E731
    _, ys = nnx.scan(f, in_axes=(nnx.Carry, None, 0))(jnp.float32(0.0), m, XS)
    assert_trees_close(ys, XS @ kernel)
    assert m.kernel.get_value() is kernel


def test_axis_none_written_threads_through():
    # DESIGN: "threads through as flax.nnx does it" with graph_updates=False; its other mode drops the write.
    m = Affine()
    f = lambda c, m, x: (c, (m(x), m.calls[...]))  # noqa: E731
    _, (ys, seen) = nnx.scan(f, in_axes=(nnx.Carry, None, 0))(jnp.float32(0.0), m, XS)
    assert_trees_equal(seen, jnp.arange(1, 6, dtype=jnp.int32))
    assert int(m.calls[...]) == 5
    assert_trees_close(ys, XS @ m.kernel[...])


def test_axis_none_by_filter_written_threads_through():
    stack = stack_of_affine(4)
    stack.calls.set_value(jnp.int32(10))
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(X, stack)
    assert int(stack.calls[...]) == 14


# ---- metadata --------------------------------------------------------------------------------------------------------


def test_row15_axis_names_lose_and_regain_the_scanned_axis():
    m = Node()
    m.w = nnx.Param(jnp.ones((4, 3)), out_sharding=("layers", "embed"))
    m.n = Count(jnp.zeros(4), out_sharding=("layers",))
    seen = []

    def f(x, m):
        seen.append((m.w.out_sharding, m.n.out_sharding))
        m.n[...] += 1.0
        return x + m.w

    options = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
    nnx.scan(f, **options, transform_metadata={nnx.PARTITION_NAME: "layers"})(jnp.zeros(3), m)
    assert set(seen) == {(("embed",), ())}
    assert m.w.out_sharding == ("layers", "embed")
    assert m.n.out_sharding == ("layers",)
    assert m.n.shape == (4,)


def test_row37_a_name_that_is_not_there_is_an_error():
    m = Node()
    m.w = nnx.Param(jnp.ones((4, 3)), out_sharding=("blocks", "embed"))
    run = nnx.scan(
        lambda x, m: x + m.w,
        in_axes=(nnx.Carry, 0),
        out_axes=nnx.Carry,
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    with pytest.raises(ValueError, match=r"(?s)layers.*blocks|blocks.*layers"):
        run(jnp.zeros(3), m)


# ---- wrong use -------------------------------------------------------------------------------------------------------


def test_a_carry_must_keep_its_structure():
    with pytest.raises((ValueError, TypeError), match=r"(?is)carry"):
        nnx.scan(lambda m, x: (Affine(2, 2), x))(Affine(), XS)


def test_a_carry_must_keep_its_types():
    with pytest.raises((ValueError, TypeError), match=r"(?is)carry"):
        nnx.scan(lambda c, x: (c.astype(jnp.int32), x))(jnp.float32(1.0), XS)


def test_a_carried_variable_must_keep_its_shape():
    m = Node()
    m.v = nnx.Cache(jnp.zeros(2))

    def f(m, x):
        m.v.set_value(jnp.zeros(3))
        return m, x

    with pytest.raises((ValueError, TypeError), match=r"(?is)carry|\bv\b"):
        nnx.scan(f)(m, XS)
    assert m.v.shape == (2,)
    assert_no_tracer(m)


def test_only_one_carry():
    with pytest.raises(ValueError, match=r"(?s)[Cc]arry"):
        nnx.scan(lambda a, b, x: (a, x), in_axes=(nnx.Carry, nnx.Carry, 0))(X, X, XS)


def test_carry_in_and_out_go_together():
    with pytest.raises(ValueError, match=r"(?s)[Cc]arry"):
        nnx.scan(lambda x: x, in_axes=0, out_axes=nnx.Carry)(XS)


def test_lengths_that_do_not_agree():
    with pytest.raises(ValueError, match=r"(?s)length|sizes|shape"):
        nnx.scan(lambda c, layer, x: (c, x), in_axes=(nnx.Carry, 0, 0))(X, stack_of_affine(4), XS)


def test_inconsistent_aliases_name_both_paths():
    stack = stack_of_affine(4)
    run = nnx.scan(lambda c, a, b: (c, None), in_axes=(nnx.Carry, 0, None))
    with pytest.raises(ValueError, match=r"(?s)args\[1\].*axis 0.*args\[2\]"):
        run(X, stack, stack)


def test_an_exception_leaves_the_arguments_as_they_were():
    stack = stack_of_affine(4)
    before = portrait(stack)

    def f(x, layer):
        layer(x)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stack)
    assert portrait(stack) == before
