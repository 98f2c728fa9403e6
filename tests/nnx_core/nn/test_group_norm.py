"""GroupNorm's and InstanceNorm's options against Linen's, and what they say when these do not fit."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layer_rows.norms import ROWS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

GROUP_NORM = next(row for row in ROWS if row.name == "GroupNorm")
INSTANCE_NORM = next(row for row in ROWS if row.name == "InstanceNorm")
SHAPE = (3, 5, 2, 6)
MASK = np.arange(3 * 5).reshape(3, 5, 1, 1) % 4 > 0


def _row(row, kind, args, call, shape, features, options):
    modes = {train: call or {} for train in (True, False)}
    absent = {name for name in ("scale", "bias") if not options.get(f"use_{name}", True)}
    return replace(
        row,
        make=lambda lib, rngs, **d: getattr(lib, kind)(features, *args, rngs=rngs, **options, **d),
        twin=lambda **d: getattr(linen, kind)(*args, **options, **d),
        shape=shape,
        params={path: linen_path for path, linen_path in row.params.items() if path not in absent},
        modes=modes,
        twin_modes=modes,
    )


def group(*args, call=None, shape=SHAPE, **options):
    """The row of GroupNorm with these constructor options, and `call` as arguments of both calls."""
    return _row(GROUP_NORM, "GroupNorm", args, call, shape, 6, options)


def instance(call=None, shape=SHAPE, features=6, **options):
    return _row(INSTANCE_NORM, "InstanceNorm", (), call, shape, features, options)


OPTIONS = {
    "group-size": group(None, 3),
    "group-of-one": group(None, 1),
    "one-group": group(1),
    "group-two-pass": group(2, use_fast_variance=False),
    "group-mask": group(2, call={"mask": np.broadcast_to(MASK, SHAPE)}),
    "group-mask-two-pass": group(2, call={"mask": np.broadcast_to(MASK, SHAPE)}, use_fast_variance=False),
    "group-no-scale": group(2, use_scale=False, epsilon=1e-3),
    "group-no-bias": group(2, use_bias=False),
    "group-bare": group(2, use_scale=False, use_bias=False),
    "group-channels-only": group(2, reduction_axes=-1),
    "group-over-the-batch": group(2, reduction_axes=[0, -1]),
    "group-positive-axes": group(2, reduction_axes=(1, 3)),
    "group-flat": group(3, shape=(4, 6)),
    "group-without-batch": group(3, shape=(6,)),
    "instance-two-pass": instance(use_fast_variance=False),
    "instance-mask": instance({"mask": MASK}),
    "instance-no-scale": instance(use_scale=False, epsilon=1e-3),
    "instance-no-bias": instance(use_bias=False),
    "instance-feature-axis": instance(feature_axes=1, features=5),
    "instance-flat": instance(shape=(4, 6)),
}


@pytest.mark.sample(14)
@pytest.mark.parametrize("inputs", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row, inputs):
    assert_equal_to_twin(row, train=True, inputs=inputs)


@pytest.mark.parametrize("row", [group(2), instance()], ids=["group", "instance"])
def test_complex_input(row):
    values, x = row.variables(), row.example(jnp.complex64) * (1 + 2j)
    ours, theirs = (jax.jit(f(train=True))(values, x) for f in (row.functional, row.functional_twin))
    assert_trees_close(ours, theirs)


@pytest.mark.parametrize("fast", [True, False], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("make", [lambda **o: group(2, **o), instance], ids=["group", "instance"])
def test_statistics_over_a_mapped_axis(make, fast):
    row = make(axis_name="devices", use_fast_variance=fast)
    x = jnp.stack([row.example() * i for i in (1, 2, 3)])
    ours, theirs = (
        jax.jit(jax.vmap(f(train=True), in_axes=(None, 0), axis_name="devices"))(make().variables(), x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_sharded_positions_under_nnx_vmap():
    # 2, 3, 2, 6: the axis of size 3 is sharded. Around 0: sums are taken in another order, and E[x²] - E[x]² would
    # magnify what that changes by (mean / std)².
    x = GROUP_NORM.example() - 3
    for kind, args in ((nnx.GroupNorm, (6, 3)), (nnx.InstanceNorm, (6,))):
        layer = kind(*args, axis_name="shards", rngs=nnx.Rngs(0))
        sharded = nnx.vmap(lambda m, x: m(x), in_axes=(None, 1), out_axes=1, axis_name="shards")(layer, x)
        assert_trees_close(sharded, kind(*args, rngs=nnx.Rngs(0))(x))


def test_groups_of_a_mapped_axis():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    row = group(2, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    x = jnp.stack([row.example() * i for i in (1, 2, 3, 4)])
    ours, theirs = (
        jax.pmap(f(train=True), in_axes=(None, 0), axis_name="devices")(group(2).variables(), x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_special_cases_of_each_other():
    x = GROUP_NORM.example()
    rngs = nnx.Rngs(0)
    layer_norm = nnx.LayerNorm(6, reduction_axes=(1, 2, 3), rngs=rngs)
    assert_trees_close(nnx.GroupNorm(6, 1, rngs=rngs)(x), layer_norm(x))
    assert_trees_close(nnx.GroupNorm(6, None, 1, rngs=rngs)(x), nnx.InstanceNorm(6, rngs=rngs)(x))


def test_a_mask_broadcasts():
    # In Linen and flax.nnx it must have all channels.
    layer, x = nnx.GroupNorm(6, 3, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), SHAPE)
    assert_trees_equal(layer(x, mask=MASK), layer(x, mask=np.broadcast_to(MASK, SHAPE)))
    first = jnp.arange(5)[:, None, None] < 2
    assert_trees_close(layer(x, mask=first)[:, :2], layer(x[:, :2]))


def test_several_feature_axes_are_counted_together():
    # flax.nnx holds them flat, Linen in their own shape.
    layer = nnx.InstanceNorm(12, feature_axes=(2, 3), rngs=nnx.Rngs(0))
    twin = linen.InstanceNorm(feature_axes=(2, 3))
    scale, x = jnp.arange(12.0), jax.random.normal(jax.random.key(0), SHAPE)
    layer.scale.set_value(scale)
    params = {"scale": scale.reshape(2, 6), "bias": jnp.zeros((2, 6))}
    assert_trees_equal(jax.jit(lambda x: layer(x))(x), jax.jit(lambda x: twin.apply({"params": params}, x))(x))


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm"])
def test_half_precision_does_not_round_the_inputs_first(kind):
    # flax.nnx 0.12.8 does, and is off by 0.125: at mean 30, std 1 bfloat16 has steps of 0.25.
    x = 30 + jax.random.normal(jax.random.key(0), (16, 64, 32))
    exact = getattr(nnx, kind)(32, use_fast_variance=False, rngs=nnx.Rngs(0))
    half = getattr(nnx, kind)(32, dtype=jnp.bfloat16, use_fast_variance=False, rngs=nnx.Rngs(0))
    assert_trees_equal(half(x), exact(x).astype(jnp.bfloat16))
    twin = getattr(linen, kind)(dtype=jnp.bfloat16, use_fast_variance=False)
    variables = {"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
    assert_trees_equal(jax.jit(lambda x: half(x))(x), jax.jit(lambda x: twin.apply(variables, x))(x))


def test_custom_promote_dtype_is_applied_to_the_inputs():
    seen = []

    def half(args, *, dtype):
        seen.append((len(args), dtype))
        return tuple(a.astype(jnp.bfloat16) for a in args)

    for layer in (
        nnx.GroupNorm(4, 2, promote_dtype=half, rngs=nnx.Rngs(0)),
        nnx.InstanceNorm(4, promote_dtype=half, rngs=nnx.Rngs(0)),
    ):
        assert layer(jnp.ones((2, 3, 4))).dtype == jnp.bfloat16
        assert seen.pop() == (3, None)


def test_initial_values_and_metadata():
    random = nnx.initializers.normal()
    for kind, args in ((nnx.GroupNorm, (4, 2)), (nnx.InstanceNorm, (4,))):
        layer = kind(
            *args,
            scale_init=random,
            bias_init=random,
            scale_metadata={"a": 1},
            bias_metadata={"b": 2},
            rngs=nnx.Rngs(3),
        )
        keys = nnx.Rngs(3)  # the scale draws first
        assert_trees_equal(layer.scale[...], random(keys.params(), (4,), jnp.float32))
        assert_trees_equal(layer.bias[...], random(keys.params(), (4,), jnp.float32))
        assert (layer.scale.get_metadata()["a"], layer.bias.get_metadata()["b"]) == (1, 2)


def test_options_are_hashable():
    for layer in (
        nnx.GroupNorm(4, 2, reduction_axes=[1, -1], axis_index_groups=[[0, 1]], rngs=nnx.Rngs(0)),
        nnx.InstanceNorm(12, feature_axes=[1, 2], axis_index_groups=[[0, 1]], rngs=nnx.Rngs(0)),
    ):
        hash(nnx.split(layer)[0])
        assert layer.axis_index_groups == ((0, 1),)


def test_number_and_size_of_groups():
    assert (nnx.GroupNorm(12, 3, rngs=nnx.Rngs(0)).group_size, nnx.GroupNorm(64, rngs=nnx.Rngs(0)).group_size) == (4, 2)
    assert nnx.GroupNorm(12, None, 3, rngs=nnx.Rngs(0)).num_groups == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (4, 2, 2),
            r"num_groups=\.\.\., group_size=.*\n  expected one of the two.*\n.*'num_groups': 2, 'group_size': 2",
        ),
        ((4, None), r"num_groups=.*\n  expected one of.*\n  found.*None, .*None.*\n.*pass num_groups=None"),
        ((6, 4), r"num_groups=.*\n  expected a divisor of num_features=6\n  found    4\n.*\[1, 2, 3, 6\]"),
        ((4,), r"num_groups=.*\n  expected a divisor of num_features=4\n  found    32"),
        ((4, 0), r"num_groups=.*\n  expected a divisor of num_features=4\n  found    0"),
        ((4, -2), r"num_groups=.*\n  expected a divisor of num_features=4\n  found    -2"),
        ((4, None, 0), r"group_size=.*\n  expected a divisor of num_features=4\n  found    0"),
        ((4, None, 3), r"group_size=.*\n  expected a divisor of num_features=4\n  found    3"),
    ],
)
def test_groups_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=r"^GroupNorm\(\.\.\., " + message):
        nnx.GroupNorm(*args, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (partial(nnx.GroupNorm, 4, 2), (2, 6), r"GroupNorm[\s\S]*\(\.\.\., 4\)\n  found    shape \(2, 6\)"),
        (partial(nnx.GroupNorm, 4, 2), (), r"GroupNorm[\s\S]*with an axis -1\n  found    shape \(\)"),
        (
            partial(nnx.GroupNorm, 4, 2, use_bias=False, use_scale=False),
            (2, 6),
            r"GroupNorm[\s\S]*\(\.\.\., 4\)\n  found    shape \(2, 6\)",
        ),
        (
            partial(nnx.GroupNorm, 4, 2, reduction_axes=(1,)),
            (2, 3, 4),
            r"reduction_axes=.*\n  expected axes with -1 or 2.*\n  found    \(1,\)\nAdd -1",
        ),
        (
            partial(nnx.GroupNorm, 4, 2, reduction_axes=(5, -1)),
            (2, 3, 4),
            r"GroupNorm[\s\S]*with an axis 5\n  found    shape \(2, 3, 4\)",
        ),
        (partial(nnx.InstanceNorm, 4), (2, 6), r"InstanceNorm[\s\S]*\(\.\.\., 4\)\n  found    shape \(2, 6\)"),
        (
            partial(nnx.InstanceNorm, 4),
            (4,),
            r"feature_axes=.*\n  expected axes other than the first.*\n  found    -1 with an input of shape \(4,\)",
        ),
        (
            partial(nnx.InstanceNorm, 2, feature_axes=-3),
            (2, 3, 4),
            r"feature_axes=.*\n  expected axes other than the first.*\n  found    -3 with",
        ),
    ],
)
def test_input_that_does_not_fit(make, shape, message):
    layer = make(rngs=nnx.Rngs(0))
    with pytest.raises(nnx.NnxError, match=message):
        layer(jnp.ones(shape))


@pytest.mark.parametrize("make", [lambda r: nnx.GroupNorm(4, 2, rngs=r), lambda r: nnx.InstanceNorm(4, rngs=r)])
def test_missing_rngs(make):
    with pytest.raises(ValueError, match=r"Norm\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None"):
        make(None)
