"""BatchNorm's and LayerNorm's options against Linen's, and the cases where flax.nnx differs from Linen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layers import LAYERS
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

BATCH_NORM = next(layer for layer in LAYERS if layer.name == "BatchNorm")
LAYER_NORM = next(layer for layer in LAYERS if layer.name == "LayerNorm")
MASK = np.arange(6 * 3).reshape(6, 3, 1) % 4 > 0


def norm(row, call=None, shape=None, features=4, **options):
    """`row` with these constructor options, and `call` added to the arguments of both calls."""
    kind = "BatchNorm" if row is BATCH_NORM else "LayerNorm"
    modes = {train: {**row.modes[train], **(call or {})} for train in (True, False)}
    absent = {name for name in ("scale", "bias") if not options.get(f"use_{name}", True)}
    return replace(
        row,
        make=lambda lib, rngs, **d: getattr(lib, kind)(features, rngs=rngs, **options, **d),
        twin=lambda **d: getattr(linen, kind)(**options, **d),
        shape=shape or (6, 3, 4),
        params={path: linen_path for path, linen_path in row.params.items() if path not in absent},
        modes=modes,
        twin_modes=modes,
    )


OPTIONS = {
    "batch-two-pass": norm(BATCH_NORM, use_fast_variance=False),
    "batch-mask": norm(BATCH_NORM, {"mask": MASK}),
    "batch-mask-two-pass": norm(BATCH_NORM, {"mask": MASK}, use_fast_variance=False),
    "batch-mask-of-integers": norm(BATCH_NORM, {"mask": MASK.astype(int)}),
    "batch-axis": norm(BATCH_NORM, axis=1, features=3),
    "batch-no-scale": norm(BATCH_NORM, use_scale=False),
    "batch-no-bias": norm(BATCH_NORM, use_bias=False, momentum=0.5, epsilon=1e-3),
    "batch-bare": norm(BATCH_NORM, use_scale=False, use_bias=False),
    "layer-two-pass": norm(LAYER_NORM, use_fast_variance=False),
    "layer-mask": norm(LAYER_NORM, {"mask": MASK | (np.arange(4) > 1)}),
    "layer-no-scale": norm(LAYER_NORM, use_scale=False),
    "layer-no-bias": norm(LAYER_NORM, use_bias=False, epsilon=1e-3),
    "layer-bare": norm(LAYER_NORM, use_scale=False, use_bias=False),
    "layer-reduce-two": norm(LAYER_NORM, reduction_axes=(1, 2)),
    "layer-reduce-other": norm(LAYER_NORM, reduction_axes=[-2]),
    "layer-feature-axis": norm(LAYER_NORM, feature_axes=1, features=3),
}


@pytest.mark.sample(16)
@pytest.mark.parametrize("inputs", [jnp.float32, jnp.bfloat16, jnp.complex64], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row, inputs):
    if inputs == jnp.complex64:
        forward_equals_twin(row, inputs)
    else:
        assert_equal_to_twin(row, train=True, inputs=inputs)


def forward_equals_twin(row, inputs):
    """Output and statistics only: Linen has no gradient of its complex norms either."""
    values, x = row.variables(), row.example(inputs)
    ours = jax.jit(row.functional(train=True))(values, x)
    theirs = jax.jit(row.functional_twin(train=True))(values, x)
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


@pytest.mark.parametrize("fast", [True, False], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("row", [BATCH_NORM, LAYER_NORM], ids=["batch", "layer"])
def test_statistics_over_a_mapped_axis(row, fast):
    values = row.variables()
    row = norm(row, axis_name="devices", use_fast_variance=fast)
    x = jnp.stack([row.example() * i for i in (1, 2, 3)])
    ours, theirs = (
        jax.jit(jax.vmap(f(train=True), in_axes=(None, 0), axis_name="devices"))(values, x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_groups_of_a_mapped_axis():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    row = norm(BATCH_NORM, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    values = row.variables()
    x = jnp.stack([row.example() * i for i in (1, 2, 3, 4)])
    ours, theirs = (
        jax.pmap(f(train=True), in_axes=(None, 0), axis_name="devices")(values, x)
        for f in (row.functional, row.functional_twin)
    )
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)
    assert np.ptp(ours[1]["batch_stats/mean"], axis=0).max() > 0.001


def test_several_feature_axes_are_counted_together():
    # flax.nnx holds them flat, Linen in their own shape.
    ours = nnx.LayerNorm(12, reduction_axes=(1, 2), feature_axes=(1, 2), rngs=nnx.Rngs(0))
    twin = linen.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2))
    x = LAYER_NORM.example()
    scale = jnp.arange(12.0)
    ours.scale.set_value(scale)
    params = {"scale": scale.reshape(3, 4), "bias": jnp.zeros((3, 4))}
    assert_trees_equal(jax.jit(lambda x: ours(x))(x), jax.jit(lambda x: twin.apply({"params": params}, x))(x))


def test_several_feature_axes_in_batch_norm():
    ours = nnx.BatchNorm(12, axis=(1, 2), rngs=nnx.Rngs(0))
    twin = linen.BatchNorm(use_running_average=False, axis=(1, 2))
    x = jax.random.normal(jax.random.key(0), (8, 3, 4))
    y, updates = twin.apply(twin.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert_trees_close(ours(x), y)
    assert_trees_close(ours.mean[...], updates["batch_stats"]["mean"].ravel())


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm"])
def test_half_precision_does_not_round_the_inputs_first(kind):
    # At mean 30, std 1 flax.nnx 0.12.8 is off by 0.14, because bfloat16 has steps of 0.25 there.
    x = 30 + jax.random.normal(jax.random.key(0), (64, 256))
    exact = getattr(nnx, kind)(256, use_fast_variance=False, rngs=nnx.Rngs(0))(x)
    half = getattr(nnx, kind)(256, dtype=jnp.bfloat16, use_fast_variance=False, rngs=nnx.Rngs(0))(x)
    assert_trees_equal(half, exact.astype(jnp.bfloat16))


def test_float32_statistics_whatever_the_parameters():
    layer = nnx.BatchNorm(4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16  # flax.nnx: float32
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32


def test_custom_promote_dtype_is_applied_to_the_inputs():
    seen = []

    def half(args, *, dtype):
        seen.append((len(args), dtype))
        return tuple(None if a is None else a.astype(jnp.bfloat16) for a in args)

    for layer, count in (
        (nnx.BatchNorm(4, promote_dtype=half, rngs=nnx.Rngs(0)), 5),
        (nnx.LayerNorm(4, promote_dtype=half, rngs=nnx.Rngs(0)), 3),
    ):
        assert layer(jnp.ones((2, 4))).dtype == jnp.bfloat16
        assert seen.pop() == (count, None)


def test_train_and_eval():
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    x = 3 + jax.random.normal(jax.random.key(0), (16, 4))
    layer.eval()
    assert_trees_close(layer(x), x / np.sqrt(1 + 1e-5))
    assert_trees_equal(layer.mean[...], jnp.zeros(4))
    layer.train()
    assert_trees_close(layer(x).mean(0), np.zeros(4))
    assert_trees_close(layer.mean[...], 0.01 * x.mean(0))
    assert_trees_equal(layer(x, use_running_average=True), layer(x, True))  # the call goes before the layer
    layer.set_view(use_running_average=True)
    layer.set_view()
    assert layer.use_running_average is True


def test_metadata():
    options = {"scale_metadata": {"a": 1}, "bias_metadata": {"b": 2}, "rngs": nnx.Rngs(0)}
    for layer in (nnx.BatchNorm(4, **options), nnx.LayerNorm(4, **options)):
        assert (layer.scale.get_metadata()["a"], layer.bias.get_metadata()["b"]) == (1, 2)


def test_options_are_hashable():
    layer = nnx.LayerNorm(12, reduction_axes=[1, 2], feature_axes=[1, 2], rngs=nnx.Rngs(0))
    assert (layer.reduction_axes, layer.feature_axes) == ((1, 2), (1, 2))
    hash(nnx.split(layer)[0])
