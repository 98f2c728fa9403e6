"""Options and errors of LinearGeneral and Einsum, against Linen where it has them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from nnx_core.nn._errors import InputShapeError, MissingRngsError, OptionError
from tests.layer_rows.linear_general import ROWS
from tests.support.arrays import noise
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

GENERAL, _, EINSUM = ROWS
X = noise(0, 2, 3, 4)


def general(in_features, out_features, shape=(2, 3, 4), batch=None, **options):
    batch = batch or {}
    return replace(
        GENERAL,
        make=lambda lib, rngs, **d: lib.LinearGeneral(
            in_features, out_features, batch_axis=batch, rngs=rngs, **options, **d
        ),
        twin=lambda **d: linen.DenseGeneral(out_features, batch_dims=tuple(batch), **options, **d),
        shape=shape,
        params={"kernel": "params/kernel"} | ({} if options.get("use_bias") is False else {"bias": "params/bias"}),
    )


def einsum(equation, kernel_shape, bias_shape, shape=(2, 3, 4)):
    return replace(
        EINSUM,
        make=lambda lib, rngs, **d: lib.Einsum(equation, kernel_shape, bias_shape, rngs=rngs, **d),
        twin=lambda **d: linen.Einsum(kernel_shape, equation, use_bias=bias_shape is not None, **d),
        shape=shape,
        params={"kernel": "params/kernel"} | ({"bias": "params/bias"} if bias_shape else {}),
    )


OPTIONS = {
    "one-axis": general(4, 5),
    "only-features": general(4, (5, 2), shape=(4,)),
    "all-axes": general((2, 3, 4), 5, axis=(0, 1, 2)),
    "axes-in-any-order": general((3, 4), 5, axis=(-1, 1)),
    "first-axis": general(2, 5, axis=0),
    "no-bias": general(4, 5, use_bias=False),
    "batch-axes": general(4, 5, batch={0: 2, 1: 3}),
    "batch-without-free-axes": general((3, 4), 5, axis=(1, 2), batch={0: 2}),
    "batch-without-bias": general(4, 5, batch={0: 2}, use_bias=False),
    "einsum-no-bias": einsum("nta,hab->nthb", (5, 4, 2), None),
    "einsum-permuted": einsum("nta,hab->bnht", (5, 4, 2), (2, 5)),
    "einsum-summed": einsum("nta,hab->nth", (5, 4, 2), (5,)),
    "einsum-shared-axis": einsum("nta,nab->tnb", (2, 4, 3), (2, 3)),
    "einsum-ellipsis": einsum("...a,ab->...b", (4, 2), (2,)),
}


@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row):
    assert_equal_to_twin(row, train=False)


def test_einsum_with_an_ellipsis_anywhere():
    random = nnx.initializers.normal()
    behind = nnx.Einsum("...a,ab->b...", (4, 2), (2,), bias_init=random, rngs=nnx.Rngs(0))
    expected = jnp.einsum("...a,ab->b...", X, behind.kernel[...]) + behind.bias[...][:, None, None]
    assert_trees_equal(behind(X), expected)
    kernel_has_it = nnx.Einsum("...ta,...ab->t...b", (2, 4, 5), (2, 5), bias_init=random, rngs=nnx.Rngs(0))
    expected = jnp.einsum("nta,nab->tnb", X, kernel_has_it.kernel[...]) + kernel_has_it.bias[...]
    assert_trees_close(kernel_has_it(X), expected)


def test_the_equation_of_the_call_goes_first():
    layer = nnx.Einsum("nta,ab->ntb", (4, 5), (5,), rngs=nnx.Rngs(0))
    assert_trees_equal(layer(X, "nta, ab -> tnb"), layer(X).swapaxes(0, 1))
    assert_trees_equal(nnx.Einsum(None, (4, 5), (5,), rngs=nnx.Rngs(0))(X, "nta,ab->ntb"), layer(X))
    assert nnx.Einsum("n t a , a b -> n t b", (4, 5), rngs=nnx.Rngs(0)).einsum_str == "nta,ab->ntb"


def test_a_bias_of_another_shape_and_the_same_size_is_reshaped():
    # flax.nnx takes it; checkpoints have it.
    layer = nnx.Einsum("nta,hab->nthb", (5, 4, 2), (10,), bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    without = nnx.Einsum("nta,hab->nthb", (5, 4, 2), rngs=nnx.Rngs(0))
    assert_trees_equal(layer(X), without(X) + layer.bias[...].reshape(5, 2))


def test_what_einsum_op_gets():
    calls = []

    def record(*args, **kwargs):
        calls.append((args[0], kwargs))
        return jnp.einsum(*args, **kwargs)

    for element_type in (None, jnp.float32):
        layer = nnx.Einsum(
            "nta,ab->ntb", (4, 5), einsum_op=record, preferred_element_type=element_type, rngs=nnx.Rngs(0)
        )
        layer(X)
    plain = {"precision": None, "out_sharding": None}
    assert calls == [("nta,ab->ntb", plain), ("nta,ab->ntb", plain | {"preferred_element_type": jnp.float32})]


def test_what_dot_general_gets():
    calls = []

    def record(lhs, rhs, dimension_numbers, **kwargs):
        calls.append((dimension_numbers, kwargs))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)

    options = {"axis": (2,), "batch_axis": {0: 2}, "rngs": nnx.Rngs(0)}
    nnx.LinearGeneral(4, 5, dot_general=record, **options)(X)
    nnx.LinearGeneral(4, 5, dot_general=record, preferred_element_type=jnp.float32, **options)(X)
    # A class is called for each call of the layer, and goes first: both as flax.nnx does it.
    nnx.LinearGeneral(4, 5, dot_general=None, dot_general_cls=lambda: record, **options)(X)
    nnx.LinearGeneral(4, 5, dot_general=jax.lax.dot_general, dot_general_cls=lambda: record, **options)(X)
    numbers, plain = (((2,), (1,)), ((0,), (0,))), {"precision": None, "out_sharding": None}
    typed = plain | {"preferred_element_type": jnp.float32}
    assert calls == [(numbers, plain), (numbers, typed), (numbers, plain), (numbers, plain)]


LAYERS = {
    "LinearGeneral": lambda **o: nnx.LinearGeneral((3, 4), 5, axis=(1, 2), **{"rngs": nnx.Rngs(0)} | o),
    "Einsum": lambda **o: nnx.Einsum("nta,tab->nb", (3, 4, 5), (5,), **{"rngs": nnx.Rngs(0)} | o),
}
MAKE = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@MAKE
def test_custom_promote_dtype(make):
    seen = []

    def no_promotion(args, *, dtype):
        seen.append((tuple(a.dtype for a in args), dtype))
        return args

    assert make(dtype=jnp.bfloat16, promote_dtype=no_promotion)(X).dtype == jnp.float32
    assert seen == [((jnp.float32,) * 3, jnp.bfloat16)]


@MAKE
def test_integers_and_host_arrays_are_promoted(make):
    assert_trees_equal(make()(np.ones((2, 3, 4), np.int32)), make()(jnp.ones((2, 3, 4))))


@MAKE
def test_metadata(make):
    init = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "in", "out"))
    layer = make(kernel_init=init, kernel_metadata={"a": 1}, bias_init=init, bias_metadata={"b": 2})
    kernel, bias = layer.kernel.get_metadata(), layer.bias.get_metadata()
    assert (kernel["out_sharding"], kernel["a"], bias["b"]) == ((None, "in", "out"), 1, 2)
    assert (layer.kernel.shape, layer.bias.shape) == ((3, 4, 5), (5,))
    assert_trees_equal(layer.kernel[...], jnp.ones((3, 4, 5)))


@MAKE
def test_a_bias_can_be_removed_and_added_later(make):
    layer = make(bias_init=nnx.initializers.ones)
    with_bias = layer(X)
    layer.bias = None
    without = layer(X)
    assert_trees_equal(without + 1, with_bias)
    layer.bias = nnx.Param(jnp.ones(5))
    assert_trees_equal(nnx.jit(lambda m, x: m(x))(layer, X), with_bias)


@MAKE
def test_the_kernel_decides_what_fits(make):
    # Inside shard_map the layer holds a shard; `in_features` and `kernel_shape` still say (3, 4).
    layer = make()
    layer.kernel = nnx.Param(layer.kernel[...][:, :2])
    assert layer(X[..., :2]).shape == (2, 5)


@MAKE
def test_explicit_sharding_of_the_result(make):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = make()
    spec = jax.sharding.PartitionSpec("d", None)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: layer(x, out_sharding=spec))(X)
    assert y.sharding.spec == spec
    assert_trees_close(np.asarray(y), np.asarray(layer(X)))


def test_batch_axis_is_part_of_the_structure():
    layer = nnx.LinearGeneral(4, 5, batch_axis={1: 3, 0: 2}, rngs=nnx.Rngs(0))
    assert layer.batch_axis == {0: 2, 1: 3}
    assert (list(layer.batch_axis), layer.batch_axis[1], repr(layer.batch_axis)) == ([0, 1], 3, "{0: 2, 1: 3}")
    other = nnx.LinearGeneral(4, 5, batch_axis={0: 2, 1: 3}, rngs=nnx.Rngs(1))
    assert nnx.graphdef(layer) == nnx.graphdef(other)
    assert hash(nnx.graphdef(layer)) == hash(nnx.graphdef(other))
    assert layer.kernel.shape == (2, 3, 4, 5)


# ---- errors ------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, layer):
        self.layers = nnx.List([layer])

    def __call__(self, x):
        return self.layers[0](x)


SHAPES = {
    "features": (
        lambda: nnx.LinearGeneral(4, 5, rngs=nnx.Rngs(0)),
        (2, 3),
        r"\(\.\.\., 4\).*found +shape \(2, 3\).*in_features",
    ),
    "scalar": (lambda: nnx.LinearGeneral(4, 5, rngs=nnx.Rngs(0)), (), r"\(\.\.\., 4\).*found +shape \(\)"),
    "axes": (
        lambda: nnx.LinearGeneral((3, 4), 5, axis=(1, -1), rngs=nnx.Rngs(0)),
        (2, 4, 3),
        r"sizes \(3, 4\) on axes \(1, -1\).*order of the input.*found +shape \(2, 4, 3\)",
    ),
    "twice": (
        lambda: nnx.LinearGeneral((3, 3), 5, axis=(1, -1), rngs=nnx.Rngs(0)),
        (2, 3),
        r"sizes \(3, 3\) on axes \(1, -1\)",
    ),
    "no-such-axis": (lambda: nnx.LinearGeneral(4, 5, axis=2, rngs=nnx.Rngs(0)), (2, 4), r"sizes \(4,\) on axes \(2,\)"),
    "batch": (
        lambda: nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=nnx.Rngs(0)),
        (3, 7, 4),
        r"batch sizes \(2,\) in front.*found +shape \(3, 7, 4\)",
    ),
    "einsum-rank": (
        lambda: nnx.Einsum("nta,hab->nthb", (5, 4, 2), rngs=nnx.Rngs(0)),
        (3, 4),
        r"shape \(n, t, 4\).*found +shape \(3, 4\).*'nta,hab->nthb'; its first operand is the input",
    ),
    "einsum-features": (
        lambda: nnx.Einsum("...a,ab->...b", (4, 2), rngs=nnx.Rngs(0)),
        (3, 5),
        r"shape \(\.\.\., 4\).*found +shape \(3, 5\)",
    ),
}


@pytest.mark.parametrize(("make", "shape", "message"), SHAPES.values(), ids=SHAPES)
def test_input_shapes(make, shape, message):
    model = Model(make())
    with pytest.raises(InputShapeError, match=rf"(?s)^(LinearGeneral|Einsum) at Model\.layers\[0\]:.*{message}"):
        model(jnp.ones(shape))


EQUATION = r"einsum_str=.*two operands and a result.*found +"
REJECTED = {
    "axis": (
        nnx.LinearGeneral,
        ((3, 4), 5),
        {},
        r"axis=.*as many axes as in_features \(3, 4\).*found +\(-1,\).*one size for each axis",
    ),
    "batch": (
        nnx.LinearGeneral,
        (4, 5),
        {"batch_axis": {1: 3}},
        r"batch_axis=.*leading axes 0, 1, .*found +\{1: 3\}.*Move",
    ),
    "three-operands": (nnx.Einsum, ("a,b,c->abc", (2,)), {}, EQUATION + "a,b,c->abc"),
    "one-operand": (nnx.Einsum, ("ab->a", (2,)), {}, EQUATION + "ab->a"),
    "no-result": (nnx.Einsum, ("ab,bc", (2, 3)), {}, EQUATION + "ab,bc"),
    "new-letter": (nnx.Einsum, ("ab,bc->az", (2, 3)), {}, EQUATION + "ab,bc->az"),
    "twice": (nnx.Einsum, ("ab,bc->aa", (2, 3)), {}, EQUATION + "ab,bc->aa"),
    "two-dots": (nnx.Einsum, ("..a,ab->..b", (2, 3)), {}, EQUATION),
    "kernel-rank": (
        nnx.Einsum,
        ("ab,bc->ac", (2, 3, 4)),
        {},
        r"kernel_shape=.*one size for each letter of 'bc'.*found +\(2, 3, 4\).*The equation is 'ab,bc->ac'",
    ),
    "bias": (
        nnx.Einsum,
        ("nta,hab->bnht", (5, 4, 2), (5,)),
        {},
        r"bias_shape=.*the shape \(2, 5\).*found +\(5,\).*The equation is .*from the kernel",
    ),
    "bias-ellipsis": (nnx.Einsum, ("...a,...ab->...b", (3, 4, 2), (2,)), {}, r"the shape \(3, 2\)"),
}


@pytest.mark.parametrize(("layer", "args", "options", "message"), REJECTED.values(), ids=REJECTED)
def test_rejected_options(layer, args, options, message):
    with pytest.raises(OptionError, match=f"(?s)^{layer.__name__}.*{message}"):
        layer(*args, **options, rngs=nnx.Rngs(0))


def test_einsum_without_any_equation():
    with pytest.raises(OptionError, match=r"(?s)einsum_str=.*found +None.*to the layer or to the call"):
        nnx.Einsum(None, (4, 5), rngs=nnx.Rngs(0))(X)


@MAKE
def test_no_rngs_to_initialize_from(make):
    with pytest.raises(MissingRngsError, match=r"(?s)rngs=.*expected rngs to be an nnx.Rngs.*found +None"):
        make(rngs=None)
