"""RMSNorm's options against Linen's, and what it says when they do not fit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layer_rows.norms import ROWS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

RMS_NORM = next(row for row in ROWS if row.name == "RMSNorm")
MASK = np.arange(6 * 3).reshape(6, 3, 1) % 4 > 0


def norm(call=None, features=4, **options):
    """The row with these constructor options, and `call` as arguments of both calls."""
    modes = {train: call or {} for train in (True, False)}
    return replace(
        RMS_NORM,
        make=lambda lib, rngs, **d: lib.RMSNorm(features, rngs=rngs, **options, **d),
        twin=lambda **d: linen.RMSNorm(**options, **d),
        shape=(6, 3, 4),
        params=RMS_NORM.params if options.get("use_scale", True) else {},
        modes=modes,
        twin_modes=modes,
    )


OPTIONS = {
    "two-pass": norm(use_fast_variance=False),
    "mask": norm({"mask": MASK | (np.arange(4) > 1)}),
    "mask-two-pass": norm({"mask": MASK | (np.arange(4) > 1)}, use_fast_variance=False),
    "no-scale": norm(use_scale=False, epsilon=1e-3),
    "reduce-two": norm(reduction_axes=(1, 2)),
    "reduce-other": norm(reduction_axes=[-2]),
    "feature-axis": norm(feature_axes=1, features=3),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("inputs", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row, inputs):
    assert_equal_to_twin(row, train=True, inputs=inputs)


def test_complex_input():
    values, x = RMS_NORM.variables(), RMS_NORM.example(jnp.complex64) * (1 + 2j)
    ours, _ = jax.jit(RMS_NORM.functional(train=True))(values, x)
    theirs, _ = jax.jit(RMS_NORM.functional_twin(train=True))(values, x)
    assert_trees_close(ours, theirs)


def test_statistics_over_a_mapped_axis():
    row = norm(axis_name="devices")
    x = jnp.stack([row.example() * i for i in (1, 2, 3)])
    ours, theirs = (
        jax.jit(jax.vmap(f(train=True), in_axes=(None, 0), axis_name="devices"))(RMS_NORM.variables(), x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_a_mapped_axis_of_nnx_vmap():
    layer = nnx.RMSNorm(4, axis_name="shards", use_scale=False, rngs=nnx.Rngs(0))
    x = RMS_NORM.example()
    sharded = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="shards")(layer, x)
    whole = nnx.RMSNorm(4, reduction_axes=(0, 2), use_scale=False, rngs=nnx.Rngs(0))(x)
    assert_trees_close(sharded, whole)


def test_groups_of_a_mapped_axis():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    row = norm(axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    x = jnp.stack([row.example() * i for i in (1, 2, 3, 4)])
    ours, theirs = (
        jax.pmap(f(train=True), in_axes=(None, 0), axis_name="devices")(RMS_NORM.variables(), x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_formula():
    layer = nnx.RMSNorm(8, epsilon=0.5, rngs=nnx.Rngs(0))
    layer.scale.set_value(jnp.arange(8.0))
    x = jax.random.normal(jax.random.key(0), (3, 8))
    assert_trees_close(layer(x), x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * jnp.arange(8.0))


def test_several_feature_axes_are_counted_together():
    # flax.nnx holds them flat, Linen in their own shape.
    layer = nnx.RMSNorm(12, reduction_axes=(1, 2), feature_axes=(1, 2), rngs=nnx.Rngs(0))
    twin = linen.RMSNorm(reduction_axes=(1, 2), feature_axes=(1, 2))
    scale, x = jnp.arange(12.0), RMS_NORM.example()
    layer.scale.set_value(scale)
    params = {"scale": scale.reshape(3, 4)}
    assert_trees_equal(jax.jit(lambda x: layer(x))(x), jax.jit(lambda x: twin.apply({"params": params}, x))(x))


def test_half_precision_does_not_round_the_inputs_first():
    # flax.nnx 0.12.8 does; at mean 30, std 1 bfloat16 has steps of 0.25.
    x = 30 + jax.random.normal(jax.random.key(0), (64, 256))
    layer, twin = nnx.RMSNorm(256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), linen.RMSNorm(dtype=jnp.bfloat16)
    assert_trees_equal(layer(x), nnx.RMSNorm(256, rngs=nnx.Rngs(0))(x).astype(jnp.bfloat16))
    variables = {"params": {"scale": jnp.ones(256)}}
    assert_trees_equal(jax.jit(lambda x: layer(x))(x), jax.jit(lambda x: twin.apply(variables, x))(x))


def test_the_mask_is_the_second_argument():
    layer, x = nnx.RMSNorm(4, rngs=nnx.Rngs(0)), RMS_NORM.example()
    mask = jnp.arange(4) < 3
    assert_trees_equal(layer(x, mask), layer(x, mask=mask))
    assert_trees_close(layer(x, mask), x / jnp.sqrt((x[..., :3] ** 2).mean(-1, keepdims=True) + 1e-6))


def test_custom_promote_dtype_is_applied_to_the_inputs():
    seen = []

    def half(args, *, dtype):
        seen.append((len(args), dtype))
        return tuple(a.astype(jnp.bfloat16) for a in args)

    assert nnx.RMSNorm(4, promote_dtype=half, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).dtype == jnp.bfloat16
    assert seen == [(2, None)]


def test_metadata_and_hashable_options():
    layer = nnx.RMSNorm(
        12,
        reduction_axes=[1, 2],
        feature_axes=[1, 2],
        scale_metadata={"a": 1},
        axis_index_groups=[[0]],
        rngs=nnx.Rngs(0),
    )
    assert layer.scale.get_metadata()["a"] == 1
    assert (layer.reduction_axes, layer.feature_axes, layer.axis_index_groups) == ((1, 2), (1, 2), ((0,),))
    hash(nnx.split(layer)[0])


def test_wrong_number_of_features():
    with pytest.raises(nnx.NnxError, match=r"RMSNorm[\s\S]*shape \(\.\.\., 4\)\n  found    shape \(2, 5\)"):
        nnx.RMSNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))


def test_missing_axis():
    with pytest.raises(ValueError, match=r"RMSNorm[\s\S]*with an axis 2\n  found    shape \(2, 4\)"):
        nnx.RMSNorm(4, reduction_axes=2, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))


def test_missing_rngs():
    with pytest.raises(ValueError, match=r"RMSNorm\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None"):
        nnx.RMSNorm(4, rngs=None)
