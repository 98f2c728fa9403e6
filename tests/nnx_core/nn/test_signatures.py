"""Names, signatures, attributes and initial values are flax.nnx's."""

import inspect

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core.nn import activations, initializers
from tests.layers import LAYERS
from tests.tolerance import assert_trees_equal

IN_FLAX = [row for row in LAYERS if row.in_flax_nnx]
ROWS = pytest.mark.parametrize("row", IN_FLAX, ids=lambda row: row.name)
SAME_VALUES = pytest.mark.parametrize(
    "row", [row for row in IN_FLAX if row.same_initial_values], ids=lambda row: row.name
)


def signature(function):
    """Names, kinds and defaults; of a function as default its name, since each library has its own."""
    return [
        (p.name, p.kind, getattr(p.default, "__name__", p.default))
        for p in inspect.signature(function).parameters.values()
    ]


#: What flax has, or has not any more, from 0.12.12 on: here is what takes the calls of both.
LATER = {("MultiHeadAttention", "__call__"): "input_positions", ("Sequential", "__call__"): "rngs"}


@pytest.mark.sample(16)
@ROWS
@pytest.mark.parametrize("method", ["__init__", None], ids=["init", "call"])
def test_signature(row, method):
    ours, theirs = type(row.make(nnx, nnx.Rngs(0))), type(row.make(flax.nnx, flax.nnx.Rngs(0)))
    method = method or (row.method if isinstance(row.method, str) else "__call__")
    mine, other = signature(getattr(ours, method)), signature(getattr(theirs, method))
    later = LATER.get((row.name.partition(".")[0], method))
    if mine != other:  # an earlier flax
        mine, other = ([p for p in parameters if p[0] != later] for parameters in (mine, other))
    assert mine == other


@ROWS
def test_public_attributes(row):
    ours, theirs = row.make(nnx, nnx.Rngs(0)), row.make(flax.nnx, flax.nnx.Rngs(0))
    public = {name for name in vars(theirs) if not name.startswith("_")}
    assert public <= set(vars(ours))


@pytest.mark.sample(12)
@SAME_VALUES
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_initial_values(row, param_dtype):
    ours = row.make(nnx, nnx.Rngs(5), param_dtype=param_dtype)
    theirs = row.make(flax.nnx, flax.nnx.Rngs(5), param_dtype=param_dtype)
    assert_trees_equal(values(nnx, ours), values(flax.nnx, theirs))


RANDOM = initializers.normal()


@pytest.mark.parametrize(
    "make",
    [
        lambda lib, rngs: lib.Linear(3, 4, bias_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.Linear(3, 4, use_bias=False, rngs=rngs),
        lambda lib, rngs: lib.Conv(3, 4, (2, 3), bias_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.Conv(4, 4, 3, feature_group_count=2, use_bias=False, rngs=rngs),
        lambda lib, rngs: lib.BatchNorm(4, scale_init=RANDOM, bias_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.BatchNorm(4, use_scale=False, bias_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.LayerNorm(4, scale_init=RANDOM, bias_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.LayerNorm(4, use_bias=False, scale_init=RANDOM, rngs=rngs),
        lambda lib, rngs: lib.Embed(4, 3, rngs=rngs),
        lambda lib, rngs: lib.Dropout(0.5, rngs=rngs),
    ],
)
@pytest.mark.parametrize("seeds", [{"default": 0}, {"params": 0, "dropout": 1}], ids=["default", "streams"])
def test_as_many_keys_in_the_same_order(make, seeds):
    rngs, flax_rngs = nnx.Rngs(**seeds), flax.nnx.Rngs(**seeds)
    for _ in range(2):  # the second layer's values depend on how many keys the first one drew
        assert_trees_equal(values(nnx, make(nnx, rngs)), values(flax.nnx, make(flax.nnx, flax_rngs)))
    assert_trees_equal(values(nnx, rngs), values(flax.nnx, flax_rngs))


def values(lib, module):
    """State as a dict path -> array."""
    return {"/".join(map(str, path)): leaf[...] for path, leaf in lib.to_flat_state(lib.state(module))}


# What a base keeps comes to it by position: each option must arrive under its own name.
OPTIONS = {
    "epsilon": 0.25,
    "dtype": jnp.float16,
    "param_dtype": jnp.bfloat16,
    "precision": "highest",
    "promote_dtype": lambda arrays, dtype=None, inexact=True: arrays,
    "preferred_element_type": jnp.float64,
    "axis_name": "shards",
    "axis_index_groups": ((0, 1), (2, 3)),
    "use_fast_variance": False,
    "gate_fn": jnp.sin,
    "activation_fn": jnp.cos,
    "carry_init": RANDOM,
    "strides": (2, 1),
    "padding": ((1, 2), (3, 4)),
    "kernel_dilation": (1, 3),
    "input_dilation": (3, 1),
}
LAYER_ARGUMENTS = {
    "Linear": {"in_features": 3, "out_features": 4},
    "LinearGeneral": {"in_features": (3,), "out_features": (4,)},
    "Einsum": {"einsum_str": "ab,bc->ac", "kernel_shape": (3, 4)},
    "Embed": {"num_embeddings": 3, "features": 4},
    "LoRA": {"in_features": 3, "lora_rank": 2, "out_features": 4},
    "Conv": {"in_features": 3, "out_features": 4, "kernel_size": (3, 2)},
    "ConvTranspose": {"in_features": 3, "out_features": 4, "kernel_size": (3, 2)},
    "ConvLocal": {"in_features": 3, "out_features": 4, "kernel_size": (3, 2), "in_spatial_shape": (9, 8)},
    "BatchNorm": {"num_features": 4, "momentum": 0.5},
    "LayerNorm": {"num_features": 4, "reduction_axes": (1, 2), "feature_axes": 2},
    "GroupNorm": {"num_features": 4, "num_groups": 2, "reduction_axes": (1, 2)},
    "InstanceNorm": {"num_features": 4, "feature_axes": 2},
    "RMSNorm": {"num_features": 4, "reduction_axes": (1, 2), "feature_axes": 2},
    "LSTMCell": {"in_features": 3, "hidden_features": 4},
    "OptimizedLSTMCell": {"in_features": 3, "hidden_features": 4},
    "GRUCell": {"in_features": 3, "hidden_features": 4},
    "MGUCell": {"in_features": 3, "hidden_features": 4, "reset_gate": False},
    "SimpleCell": {"in_features": 3, "hidden_features": 4, "residual": True},
    "ConvLSTMCell": {"in_features": 3, "hidden_features": 4, "kernel_size": (3, 2)},
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LAYER_ARGUMENTS)
def test_options_are_kept_under_their_names(name):
    layer_class = getattr(nnx, name)
    parameters = inspect.signature(layer_class).parameters
    options = {option: value for option, value in OPTIONS.items() if option in parameters}
    options |= LAYER_ARGUMENTS[name]
    layer = layer_class(**options, rngs=nnx.Rngs(0))
    options.pop("lora_rank", None)  # the shapes of its parameters say it
    assert {option: getattr(layer, option) for option in options} == options


@pytest.mark.parametrize("name", LAYER_ARGUMENTS)
def test_no_constructor_hides_its_parameters(name):
    kinds = {p.kind for p in inspect.signature(getattr(nnx, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def test_every_activation():
    names = flax.nnx.nn.activations.__all__
    assert [name for name in names if getattr(nnx, name) is not getattr(activations, name)] == []
    assert [name for name in names if getattr(activations, name) is not getattr(flax.nnx, name)] == ["PReLU"]
    assert set(activations.__all__) == set(flax.nnx.nn.activations.__all__)


def test_every_initializer():
    theirs = {name for name in dir(flax.nnx.initializers) if not name.startswith("_")} - {"tp"}
    assert theirs <= set(initializers.__all__)
    assert nnx.initializers is initializers
    for name in theirs - {"DtypeLikeInexact", "Initializer"}:
        assert getattr(initializers, name).__name__ == getattr(flax.nnx.initializers, name).__name__
    key = jax.random.key(0)
    for init in (initializers.ones_init(), initializers.zeros_init(), initializers.default_kernel_init):
        assert init(key, (2, 3), jnp.bfloat16).dtype == jnp.bfloat16
