"""vmap over functions of objects: axes by filter, constructors, aliasing, metadata."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Count, Node, Tied, assert_no_tracer, portrait, reachable, stack_of_affine
from tests.support.arrays import keys, ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3)
XS = ramp(4, 2, 3)


# ---- axes of arguments -----------------------------------------------------------------------------------------------


def test_a_stack_of_modules_over_axis_0():
    stack = stack_of_affine(4)
    members = reachable(stack)
    out = nnx.vmap(lambda m, x: m(x))(stack, XS)
    assert_trees_close(out, jnp.einsum("nij,njk->nik", XS, stack.kernel[...]))
    assert_trees_equal(stack.calls.get_value(), jnp.ones(4, jnp.int32))
    assert [id(x) for x in reachable(stack)] == [id(x) for x in members]


def test_inside_each_lane_sees_one_module():
    def f(m, x):
        assert m.kernel.shape == (3, 3)
        assert m.calls.shape == ()
        return m(x)

    nnx.vmap(f)(stack_of_affine(4), XS)


def test_a_module_that_is_not_mapped():
    m = Affine()
    kernel = m.kernel.get_value()
    out = nnx.vmap(lambda m, x: x @ m.kernel[...], in_axes=(None, 0))(m, XS)
    assert_trees_close(out, XS @ m.kernel[...])
    assert m.kernel.get_value() is kernel


def test_an_unmapped_variable_may_be_written_with_an_unmapped_value():
    m = Affine()
    nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, XS)
    assert int(m.calls[...]) == 1


def test_an_unmapped_variable_written_with_a_mapped_value_is_an_error():
    m = Node()
    m.n = Count(jnp.float32(0.0))

    def f(m, x):
        m.n[...] = x

    with pytest.raises(ValueError, match=r"(?s)\bn\b"):
        nnx.vmap(f, in_axes=(None, 0))(m, jnp.arange(3.0))
    assert float(m.n[...]) == 0.0
    assert_no_tracer(m)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_other_axes_of_modules_and_arrays(axis):
    stack = stack_of_affine(4)
    kernels = stack.kernel.get_value()
    stack.kernel.set_value(jnp.moveaxis(kernels, 0, axis))
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    out = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 1), out_axes=1)(stack, jnp.moveaxis(XS, 0, 1))
    assert_trees_close(out, jnp.moveaxis(jnp.einsum("nij,njk->nik", XS, kernels), 0, 1))
    assert_trees_equal(stack.calls.get_value(), jnp.ones(4, jnp.int32))


def test_a_written_variable_comes_back_on_its_own_axis():
    m = Node()
    m.w = nnx.Param(jnp.arange(6.0).reshape(2, 3))

    def f(m):
        m.w[...] = m.w * 2

    nnx.vmap(f, in_axes=(nnx.StateAxes({nnx.Param: 1}),))(m)
    assert_trees_equal(m.w.get_value(), jnp.arange(6.0).reshape(2, 3) * 2)


# ---- StateAxes -------------------------------------------------------------------------------------------------------


def test_state_axes_by_type():
    m = stack_of_affine(4)
    m.calls.set_value(jnp.int32(0))
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    out = nnx.vmap(lambda m, x: m(x), in_axes=(axes, None))(m, X)
    assert out.shape == (4, 2, 3)
    assert int(m.calls[...]) == 1


@pytest.mark.parametrize(
    "axes",
    [
        {nnx.PathContains("kernel"): 0, ...: None},
        [(nnx.Param, 0), (Count, None)],
        {(nnx.Param, nnx.Cache): 0, Count: None},
        {lambda path, v: path == ("kernel",): 0, ...: None},
    ],
)
def test_state_axes_take_any_filter(axes):
    m = stack_of_affine(4)
    m.calls.set_value(jnp.int32(0))
    assert nnx.vmap(lambda m, x: m(x), in_axes=(nnx.StateAxes(axes), None))(m, X).shape == (4, 2, 3)


def test_state_axes_are_values():
    make = lambda: nnx.StateAxes({nnx.Param: 0, ...: None})  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != nnx.StateAxes({nnx.Param: 1, ...: None})


def test_state_axes_that_do_not_cover_a_variable():
    with pytest.raises(ValueError, match=r"(?s)calls|Count"):
        nnx.vmap(lambda m: None, in_axes=(nnx.StateAxes({nnx.Param: 0}),))(stack_of_affine(4))


def test_a_plain_array_attribute_follows_its_filter():
    m = Affine()
    m.table = jnp.arange(12.0).reshape(4, 3)
    axes = nnx.StateAxes({nnx.Variable: None, ...: 0})
    out = nnx.vmap(lambda m: m.table.sum(), in_axes=(axes,))(m)
    assert_trees_equal(out, jnp.array([3.0, 12.0, 21.0, 30.0]))
    assert m.table.shape == (4, 3)


def test_specs_inside_containers():
    stack, shared = stack_of_affine(4), Affine()
    f = lambda args, x: args["b"](args["a"](x))  # noqa: E731
    out = nnx.vmap(f, in_axes=({"a": 0, "b": None}, 0))({"a": stack, "b": shared}, XS)
    assert_trees_close(out, jnp.einsum("nij,njk->nik", XS, stack.kernel[...]) @ shared.kernel[...])


def test_keyword_arguments_take_the_axis_of_their_position():
    m = Affine()
    out = nnx.vmap(lambda m, x: x @ m.kernel[...], in_axes=(None, 0))(m, x=XS)
    assert_trees_close(out, XS @ m.kernel[...])


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_vmapped_constructor():
    stack = nnx.vmap(lambda key: keyed(key))(jax.random.split(jax.random.key(0), 5))
    assert isinstance(stack, Affine)
    assert stack.kernel.shape == (5, 3, 3)
    assert stack.calls.shape == (5,)
    want = jnp.stack([jax.random.normal(k, (3, 3)) for k in jax.random.split(jax.random.key(0), 5)])
    assert_trees_close(stack.kernel.get_value(), want)


def keyed(key):
    m = Affine()
    m.kernel[...] = jax.random.normal(key, (3, 3))
    return m


def test_out_axes_of_constructed_modules():
    axes = nnx.StateAxes({nnx.Param: 1, ...: None})
    stack = nnx.vmap(lambda key: keyed(key), out_axes=axes)(jax.random.split(jax.random.key(0), 5))
    assert stack.kernel.shape == (3, 5, 3)
    assert stack.calls.shape == ()


def test_a_constructor_with_axis_size_and_no_arguments():
    stack = nnx.vmap(lambda: Affine(), axis_size=5)()
    assert stack.kernel.shape == (5, 3, 3)


def test_split_rngs_give_different_layers():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(rngs.params.normal((3,)))

    stack = nnx.vmap(Noise)(nnx.Rngs(0).fork(split=4))
    assert len({float(x) for x in stack.w[:, 0]}) == 4


def test_several_results_on_several_axes():
    a, b = nnx.vmap(lambda x: (x, x.sum()), out_axes=(1, 0))(XS[:, 0])
    assert (a.shape, b.shape) == ((3, 4), (4,))


def test_a_result_that_is_not_mapped():
    assert_trees_equal(nnx.vmap(lambda x: jnp.float32(7.0), out_axes=None)(XS), jnp.float32(7.0))


def test_an_argument_returned_is_the_argument():
    stack = stack_of_affine(4)
    assert nnx.vmap(lambda m: m)(stack) is stack


def test_structure_changes_propagate_with_the_new_axis():
    stack = stack_of_affine(4)

    def f(m, x):
        m.cache = nnx.Cache(m(x))
        m.alias = m.kernel
        m.note = "seen"

    nnx.vmap(f)(stack, XS)
    assert stack.cache.shape == (4, 2, 3)
    assert stack.alias is stack.kernel
    assert stack.note == "seen"


def test_collectives_over_the_named_axis():
    m = Node()
    m.mean = nnx.BatchStat(jnp.zeros(3))

    def f(m, x):
        m.mean[...] = jax.lax.pmean(x, "batch")
        return x - m.mean

    xs = jnp.arange(12.0).reshape(4, 3)
    out = nnx.vmap(f, in_axes=(None, 0), axis_name="batch")(m, xs)
    assert_trees_close(m.mean.get_value(), xs.mean(0))
    assert_trees_close(out, xs - xs.mean(0, keepdims=True))


# ---- sharing ---------------------------------------------------------------------------------------------------------


def test_sharing_inside_a_mapped_module():
    stack = nnx.vmap(lambda: Tied(), axis_size=4)()
    assert stack.encode is stack.decode is stack.layers[0]

    def f(m, x):
        assert m.encode is m.decode
        return m(x)

    nnx.vmap(f)(stack, XS)
    assert_trees_equal(stack.encode.calls.get_value(), jnp.full(4, 2, jnp.int32))


def test_one_module_as_two_arguments_with_the_same_axis():
    stack = stack_of_affine(4)

    def f(a, b, x):
        assert a is b
        return a(b(x))

    nnx.vmap(f)(stack, stack, XS)
    assert_trees_equal(stack.calls.get_value(), jnp.full(4, 2, jnp.int32))


@pytest.mark.parametrize("shared", ["module", "variable", "variable and owner"])
def test_inconsistent_aliases_name_both_paths(shared):
    m = stack_of_affine(4)
    a, b = {"module": (m, m), "variable": (m.kernel, m.kernel), "variable and owner": (m, m.kernel)}[shared]
    with pytest.raises(ValueError, match=r"(?s)(Affine|Param|Count).*args\[0\].*axis 0.*args\[1\].*not mapped"):
        nnx.vmap(lambda a, b: None, in_axes=(0, None))(a, b)


def test_inconsistent_aliases_within_one_argument():
    m = Node()
    m.a = nnx.Param(jnp.ones(4))
    m.b = m.a
    axes = nnx.StateAxes({nnx.PathContains("a"): 0, ...: None})
    with pytest.raises(ValueError, match=r"(?s)Param.*args\[0\]\.a.*axis 0.*args\[0\]\.b.*not mapped"):
        nnx.vmap(lambda m: None, in_axes=(axes,), axis_size=4)(m)


def test_an_argument_returned_under_another_axis_is_an_alias_error():
    stack = stack_of_affine(4)
    with pytest.raises(ValueError, match=r"(?s)axis 0.*(axis 1|not mapped)"):
        nnx.vmap(lambda m: m, in_axes=0, out_axes=1)(stack)


# ---- metadata --------------------------------------------------------------------------------------------------------


def annotated(key, names=("in", "out")):
    m = Node()
    m.w = nnx.Param(jax.random.normal(key, (2, 3)), out_sharding=names)
    return m


KEYS = keys(0, 1, 2, 3)


def test_row15_a_new_axis_is_unnamed_by_default():
    assert nnx.vmap(annotated)(KEYS).w.out_sharding == (None, "in", "out")


def test_the_new_axis_gets_the_partition_name():
    stack = nnx.vmap(annotated, transform_metadata={nnx.PARTITION_NAME: "layers"})(KEYS)
    assert stack.w.out_sharding == ("layers", "in", "out")


@pytest.mark.parametrize(
    ("axis", "names"),
    [(0, ("layers", "in", "out")), (1, ("in", "layers", "out")), (2, ("in", "out", "layers"))],
)
@pytest.mark.parametrize("negative", [False, True])
def test_row26_the_name_stands_where_the_axis_is(axis, names, negative):
    out_axes = axis - 3 if negative else axis
    stack = nnx.vmap(annotated, out_axes=out_axes, transform_metadata={nnx.PARTITION_NAME: "layers"})(KEYS)
    assert stack.w.shape[axis] == 4
    assert stack.w.out_sharding == names


def test_inside_the_name_is_gone_and_outside_it_is_back():
    stack = nnx.vmap(annotated, transform_metadata={nnx.PARTITION_NAME: "layers"})(KEYS)
    seen = []

    def f(m):
        seen.append(m.w.out_sharding)
        m.w[...] = m.w * 2

    nnx.vmap(f, transform_metadata={nnx.PARTITION_NAME: "layers"})(stack)
    assert seen == [("in", "out")]
    assert stack.w.out_sharding == ("layers", "in", "out")


def test_row33_empty_names_are_symmetric():
    m = Node()
    m.w = nnx.Param(jnp.ones(4), out_sharding=())
    nnx.vmap(lambda m: None)(m)
    assert m.w.out_sharding == ()


def test_variables_without_names_stay_without():
    stack = nnx.vmap(lambda: Affine(), axis_size=4, transform_metadata={nnx.PARTITION_NAME: "layers"})()
    assert not stack.kernel.has_metadata("out_sharding")


# ---- nesting, failures -----------------------------------------------------------------------------------------------


def test_vmap_of_vmap():
    m = Node()
    m.total = Count(jnp.zeros((2, 3)))

    def f(m, x):
        m.total[...] += x
        return x * 2

    x = jnp.arange(6.0).reshape(2, 3)
    out = nnx.vmap(nnx.vmap(f))(m, x)
    assert_trees_equal(m.total.get_value(), x)
    assert_trees_equal(out, x * 2)


def test_gradients_of_a_stack():
    stack = stack_of_affine(4)
    grads = nnx.grad(lambda m: nnx.vmap(lambda m, x: (m(x) ** 2).sum())(m, XS).sum())(stack)
    want = jax.grad(lambda k: (jnp.einsum("nij,njk->nik", XS, k) ** 2).sum())(stack.kernel[...])
    assert_trees_close(grads["kernel"].get_value(), want)
    assert_trees_equal(stack.calls.get_value(), jnp.ones(4, jnp.int32))


def test_an_exception_leaves_the_arguments_as_they_were():
    stack = stack_of_affine(4)
    before = portrait(stack)

    def f(m, x):
        m(x)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        nnx.vmap(f)(stack, XS)
    assert portrait(stack) == before


def test_sizes_that_do_not_agree():
    with pytest.raises(ValueError, match=r"(?s)inconsistent sizes.*4.*5"):
        nnx.vmap(lambda m, x: m(x))(stack_of_affine(4), jnp.ones((5, 2, 3)))


def test_in_axes_that_do_not_fit_the_arguments():
    with pytest.raises((ValueError, TypeError), match=r"(?s)in_axes|args"):
        nnx.vmap(lambda a, b: None, in_axes=(0,))(XS, XS)


def test_as_a_decorator_of_a_method():
    class Net(Affine):
        @nnx.vmap(in_axes=(None, 0))
        def each(self, x):
            return self(x)

    m = Net()
    assert_trees_close(m.each(XS), XS @ m.kernel[...])
    assert int(m.calls[...]) == 1


def test_transform_metadata_names_the_axis():
    m = Node()
    m.w = nnx.Param(jnp.ones((4, 3)), out_sharding=("layers", "embed"))

    def f(m, x):
        assert m.w.out_sharding == ("embed",)
        m.new = nnx.Param(m.w[...] + x, out_sharding=("embed",))
        return m.w.sum()

    named = nnx.transform_metadata(f, in_axes=(0, None), partition="layers")
    nnx.vmap(named, in_axes=(0, None))(m, 1.0)
    assert m.new.out_sharding == ("layers", "embed")
    assert named.__name__ == "f"
