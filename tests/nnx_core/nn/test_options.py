"""Options as users have them: numpy's integers, arrays and lists are the integers and tuples that they hold.

And every number that cannot be meant is an OptionError where it is given, in layers and in functions alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core.nn._errors import OptionError
from nnx_core.nn.attention_dot_product import dot_product_attention_weights
from tests.layers import LAYERS
from tests.support.arrays import noise
from tests.tolerance import assert_trees_equal

N = np.int64


def on_device(values):
    """An array of JAX's, made without a computation."""
    return jax.device_put(np.array(values))


X = noise(0, 2, 6, 6, 4)

# name -> (the layer, its options plainly written, the same options as users have them)
SPELLINGS = {
    "Linear": (nnx.Linear, (4, 3), {}, (N(4), N(3)), {}),
    "LinearGeneral-ints": (nnx.LinearGeneral, (4, 3), {"axis": -1}, (N(4), N(3)), {"axis": N(-1)}),
    "LinearGeneral-arrays": (
        nnx.LinearGeneral,
        ((6, 4), (3, 2)),
        {"axis": (2, 3)},
        (np.array([6, 4]), [3, N(2)]),
        {"axis": 2 + np.arange(2)},
    ),
    "LinearGeneral-jax": (
        nnx.LinearGeneral,
        ((6, 4), 3),
        {"axis": (2, 3)},
        ([6, 4], 3),
        {"axis": on_device([2, 3])},
    ),
    "LinearGeneral-range": (nnx.LinearGeneral, ((6, 4), 3), {"axis": (2, 3)}, ([6, 4], 3), {"axis": range(2, 4)}),
    "LinearGeneral-batch": (nnx.LinearGeneral, (4, 3), {"batch_axis": {0: 2}}, (4, 3), {"batch_axis": {N(0): N(2)}}),
    "Einsum-int": (nnx.Einsum, ("abcd,de->abce", (4, 3), (3,)), {}, ("abcd,de->abce", [4, 3], 3), {}),
    "Einsum-numpy-int": (nnx.Einsum, ("abcd,de->abce", (4, 3), (3,)), {}, ("abcd,de->abce", (4, 3), N(3)), {}),
    "Einsum-arrays": (
        nnx.Einsum,
        ("abcd,de->abce", (4, 3), (3,)),
        {},
        ("abcd,de->abce", np.array([4, 3]), np.array([3])),
        {},
    ),
    "Einsum-vector": (
        nnx.Einsum,
        ("abcd,d->abc", (4,)),
        {"kernel_init": nnx.initializers.normal()},
        ("abcd,d->abc", N(4)),
        {"kernel_init": nnx.initializers.normal()},
    ),
    "Embed": (nnx.Embed, (7, 4), {}, (N(7), np.int8(4)), {}),
    "Conv-arrays": (
        nnx.Conv,
        (4, 8, (3, 3)),
        {"strides": (2, 1), "padding": ((1, 2), (0, 1)), "kernel_dilation": (1, 2), "feature_group_count": 2},
        (N(4), N(8), np.array([3, 3])),
        {
            "strides": np.array([2, 1]),
            "padding": np.array([[1, 2], [0, 1]]),
            "kernel_dilation": [1, N(2)],
            "feature_group_count": N(2),
        },
    ),
    "Conv-lists": (
        nnx.Conv,
        (4, 8, (3, 3)),
        {"strides": 2, "padding": (1, (1, 2)), "input_dilation": (2, 1)},
        (4, 8, [3, 3]),
        {"strides": N(2), "padding": [N(1), [1, N(2)]], "input_dilation": np.array([2, 1])},
    ),
    "Conv-one-axis": (
        nnx.Conv,
        (4, 8, 3),
        {"strides": 2, "padding": 1, "input_dilation": 1, "kernel_dilation": 2},
        (4, 8, N(3)),
        {"strides": N(2), "padding": N(1), "input_dilation": N(1), "kernel_dilation": N(2)},
    ),
    "ConvTranspose": (
        nnx.ConvTranspose,
        (4, 8, (3, 2)),
        {"strides": (2, 1), "padding": ((1, 1), (0, 1)), "kernel_dilation": 2},
        (N(4), N(8), np.array([3, 2])),
        {"strides": np.array([2, 1]), "padding": [[1, 1], [0, 1]], "kernel_dilation": N(2)},
    ),
    "ConvTranspose-one-axis": (nnx.ConvTranspose, (4, 8, 3, 2), {"padding": 1}, (4, 8, N(3), N(2)), {"padding": N(1)}),
    "ConvLocal": (
        nnx.ConvLocal,
        (4, 3, (3, 2), 2),
        {"in_spatial_shape": (6, 6)},
        (N(4), N(3), [3, 2], N(2)),
        {"in_spatial_shape": np.array([6, 6])},
    ),
    "BatchNorm": (
        nnx.BatchNorm,
        (4,),
        {"axis": -1, "momentum": 0.5, "epsilon": 0.25},
        (N(4),),
        {"axis": N(-1), "momentum": np.float32(0.5), "epsilon": np.float32(0.25)},
    ),
    "BatchNorm-axes": (nnx.BatchNorm, (24,), {"axis": (-2, -1)}, (N(24),), {"axis": np.array([-2, -1])}),
    "LayerNorm": (
        nnx.LayerNorm,
        (24,),
        {"reduction_axes": -1, "feature_axes": (-2, -1)},
        (N(24),),
        {"reduction_axes": N(-1), "feature_axes": np.array([-2, -1])},
    ),
    "RMSNorm": (
        nnx.RMSNorm,
        (4,),
        {"reduction_axes": (-2, -1), "feature_axes": -1},
        (N(4),),
        {"reduction_axes": [N(-2), -1], "feature_axes": N(-1)},
    ),
    "GroupNorm": (
        nnx.GroupNorm,
        (4, 2),
        {"reduction_axes": (-2, -1)},
        (N(4), N(2)),
        {"reduction_axes": np.array([-2, -1])},
    ),
    "GroupNorm-size": (nnx.GroupNorm, (4, None, 2), {}, (4, None, N(2)), {}),
    "InstanceNorm": (nnx.InstanceNorm, (4,), {"feature_axes": (-1,)}, (N(4),), {"feature_axes": np.array([-1])}),
    "InstanceNorm-int": (nnx.InstanceNorm, (4,), {"feature_axes": -1}, (4,), {"feature_axes": N(-1)}),
    "MultiHeadAttention": (
        nnx.MultiHeadAttention,
        (2, 4, 6, 5),
        {"num_kv_heads": 1, "dropout_rate": 0.5, "deterministic": False, "decode": False},
        (N(2), N(4), N(6), N(5)),
        {"num_kv_heads": N(1), "dropout_rate": np.float32(0.5), "deterministic": False, "decode": False},
    ),
    "Dropout": (
        nnx.Dropout,
        (0.5,),
        {"broadcast_dims": (1, 2)},
        (np.float32(0.5),),
        {"broadcast_dims": np.array([1, 2])},
    ),
    "LoRA": (nnx.LoRA, (4, 2, 3), {}, (N(4), N(2), N(3)), {}),
    "LoRALinear": (nnx.LoRALinear, (4, 3), {"lora_rank": 2}, (N(4), N(3)), {"lora_rank": N(2)}),
}


def values(module):
    return {"/".join(map(str, path)): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def options_of(module):
    """What a layer keeps besides its state: plain numbers and tuples, with their types."""
    kept = {name: x for name, x in vars(module).items() if isinstance(x, int | float | tuple | np.generic)}
    return {name: (type(x), x) for name, x in kept.items()}


@pytest.mark.sample(10)
@pytest.mark.parametrize(("cls", "args", "kwargs", "own_args", "own_kwargs"), SPELLINGS.values(), ids=SPELLINGS)
def test_options_as_users_have_them(cls, args, kwargs, own_args, own_kwargs):
    plain, own = cls(*args, rngs=nnx.Rngs(0), **kwargs), cls(*own_args, rngs=nnx.Rngs(0), **own_kwargs)
    assert_trees_equal(values(own), values(plain))
    assert options_of(own) == options_of(plain)
    assert nnx.graphdef(own) == nnx.graphdef(plain)  # the key of what is compiled
    x = (X[..., 0] > 0).astype(int) if cls is nnx.Embed else X
    call = nnx.jit(lambda layer, x: layer(x))
    assert_trees_equal(call(own, x), call(plain, x))
    assert_trees_equal(values(own), values(plain))


WRAPPERS = {
    "WeightNorm": lambda axes: nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), feature_axes=axes, rngs=nnx.Rngs(1)),
    "SpectralNorm": lambda n: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), n_steps=n, rngs=nnx.Rngs(1)),
    "BatchApply": lambda n: nnx.BatchApply(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), n),
    "LSTMCell": lambda n: nnx.RNN(nnx.LSTMCell(n * 2, n, rngs=nnx.Rngs(0))),
    "ConvLSTMCell": lambda n: nnx.ConvLSTMCell(4, n, [3], padding="SAME", rngs=nnx.Rngs(0)).ih,
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("number", [N(2), np.uint8(2), np.array(2), on_device(2)], ids=lambda n: type(n).__name__)
def test_layers_that_hold_others(make, number):
    number = int(number) - 1 if make is WRAPPERS["WeightNorm"] else number
    plain, own, x = make(int(number)), make(number), X[:, :, 0]
    assert nnx.graphdef(own) == nnx.graphdef(plain)
    assert_trees_equal(own(x), plain(x))


POOLS = {
    "lists": ([2, 2], {"strides": [2, 1], "padding": [[1, 1], [0, 1]]}),
    "arrays": (np.array([2, 2]), {"strides": np.array([2, 1]), "padding": np.array([[1, 1], [0, 1]])}),
    "integers": ((N(2), N(2)), {"strides": (N(2), N(1)), "padding": ((N(1), N(1)), (N(0), N(1)))}),
    "jax": (
        on_device([2, 2]),
        {"strides": on_device([2, 1]), "padding": on_device([[1, 1], [0, 1]])},
    ),
}


@pytest.mark.parametrize(("window", "options"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("name", ["avg_pool", "max_pool", "min_pool"])
def test_pools(name, window, options):
    pool = getattr(nnx, name)
    assert_trees_equal(pool(X, window, **options), pool(X, (2, 2), strides=(2, 1), padding=((1, 1), (0, 1))))


def test_one_cache_entry_for_all_spellings():
    traces = []

    @nnx.jit
    def call(layer, x):
        traces.append(1)
        return layer(x)

    for size in (3, N(3), np.array([3])):
        call(nnx.Conv(4, 2, size, rngs=nnx.Rngs(0)), X)
    assert len(traces) == 1


# ---- what cannot be meant ------------------------------------------------------------------------------------------


def r():  # short, since the rows below are a table
    return nnx.Rngs(0)


Q = noise(1, 1, 3, 2, 4)
ATTENTION = {
    "attention": nnx.dot_product_attention,
    "weights": lambda q, k, v, **options: dot_product_attention_weights(q, k, **options),
    "rope": lambda q, k, v, **options: nnx.dot_product_attention_with_rope(q, k, v, rope=nnx.RoPE(), **options),
}
BAD_RATES = {"negative": -0.1, "nan": float("nan"), "above": 2, "text": "0.5", "numpy": np.float32(-1.0)}


@pytest.mark.parametrize("rate", BAD_RATES.values(), ids=BAD_RATES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("attend", ATTENTION.values(), ids=ATTENTION)
def test_a_rate_that_is_no_probability(attend, rate, deterministic):
    options = {"dropout_rate": rate, "dropout_rng": jax.random.key(0), "deterministic": deterministic}
    text = rf"^dot_product_attention\(\.\.\., dropout_rate=.*probability in \[0, 1\]\n  found    {rate!r}\n.*to drop"
    with pytest.raises(OptionError, match=f"(?s){text.replace('np.float32(-1.0)', '-1.0')}"):
        attend(Q, Q, Q, **options)


def test_rates_that_are_probabilities():
    options = {"dropout_rng": jax.random.key(0), "broadcast_dropout": False}
    half = nnx.dot_product_attention(Q, Q, Q, dropout_rate=0.5, **options)
    assert_trees_equal(nnx.dot_product_attention(Q, Q, Q, dropout_rate=np.float32(0.5), **options), half)
    assert not nnx.dot_product_attention(Q, Q, Q, dropout_rate=1, **options).any()
    bfloat16 = Q.astype(jnp.bfloat16)
    assert nnx.Dropout(np.float64(0.5), rngs=nnx.Rngs(0))(bfloat16).dtype == jnp.bfloat16


REJECTED = {
    "Linear": (
        lambda: nnx.Linear(-1, 3, rngs=r()),
        r"^Linear\(.*in_features=.*at least 0\n  found    -1\nIt counts",
    ),
    "Linear-float": (lambda: nnx.Linear(3, 4.0, rngs=r()), r"^Linear\(.*out_features=.*an integer.*found    4\.0"),
    "Linear-none": (lambda: nnx.Linear(3, None, rngs=r()), r"^Linear\(.*out_features=.*found    None"),
    "LinearGeneral": (lambda: nnx.LinearGeneral((2, 2.5), 3, axis=(-2, -1), rngs=r()), r"in_features=.*found    2\.5"),
    "Einsum": (lambda: nnx.Einsum("ab,bc->ac", (3, "4"), rngs=r()), r"^Einsum.*kernel_shape=.*found    '4'"),
    "Einsum-bias": (lambda: nnx.Einsum("ab,bc->ac", (3, 4), -4, rngs=r()), r"^Einsum.*bias_shape=.*found    -4"),
    "Embed": (lambda: nnx.Embed(-2, 3, rngs=r()), r"^Embed.*num_embeddings=.*found    -2"),
    "Embed-features": (lambda: nnx.Embed(2, 0.5, rngs=r()), r"^Embed.*features=.*found    0\.5"),
    "Conv-kernel": (lambda: nnx.Conv(3, 4, (3, 0), rngs=r()), r"^Conv.*kernel_size=.*a positive integer\n  found    0"),
    "Conv-stride": (lambda: nnx.Conv(3, 4, (3, 3), strides=0, rngs=r()), r"strides=.*all positive\n  found    0"),
    "Conv-dilation": (lambda: nnx.Conv(3, 4, 3, kernel_dilation=-1, rngs=r()), r"kernel_dilation=.*found    -1"),
    "Conv-stride-text": (lambda: nnx.Conv(3, 4, 3, strides="2", rngs=r()), r"strides=.*found    2"),
    "Conv-groups": (lambda: nnx.Conv(3, 4, 3, feature_group_count=0, rngs=r()), r"feature_group_count=.*found    0"),
    "Conv-padding": (lambda: nnx.Conv(3, 4, 3, padding=((0.5, 1),), rngs=r()), r"padding=.*found    \(\(0\.5, 1\),\)"),
    "ConvTranspose": (lambda: nnx.ConvTranspose(3, 4, 3, -2, rngs=r()), r"^ConvTranspose.*strides=.*found    -2"),
    "ConvLocal": (lambda: nnx.ConvLocal(3, 4, 3, in_spatial_shape=-5, rngs=r()), r"in_spatial_shape=.*found    -5"),
    "BatchNorm": (lambda: nnx.BatchNorm(-4, rngs=r()), r"^BatchNorm.*num_features=.*found    -4"),
    "momentum": (lambda: nnx.BatchNorm(4, momentum=1.5, rngs=r()), r"momentum=.*in \[0, 1\]\n  found    1\.5.*usual"),
    "momentum-nan": (lambda: nnx.BatchNorm(4, momentum=np.float32("nan"), rngs=r()), r"momentum=.*found    nan"),
    "epsilon": (
        lambda: nnx.LayerNorm(4, epsilon=-1e-6, rngs=r()),
        r"^LayerNorm.*epsilon=.*0 or more\n.*-1e-06",
    ),
    "epsilon-nan": (lambda: nnx.RMSNorm(4, epsilon=float("nan"), rngs=r()), r"^RMSNorm.*epsilon=.*found    nan"),
    "epsilon-inf": (lambda: nnx.GroupNorm(4, 2, epsilon=float("inf"), rngs=r()), r"^GroupNorm.*epsilon=.*found    inf"),
    "epsilon-text": (
        lambda: nnx.InstanceNorm(4, epsilon="1e-6", rngs=r()),
        r"^InstanceNorm.*epsilon=.*division",
    ),
    "WeightNorm": (
        lambda: nnx.WeightNorm(nnx.Linear(2, 2, rngs=r()), epsilon=-1.0, rngs=r()),
        r"^WeightNorm.*epsilon=.*found    -1\.0",
    ),
    "SpectralNorm": (
        lambda: nnx.SpectralNorm(nnx.Linear(2, 2, rngs=r()), n_steps=1.5, rngs=r()),
        r"^SpectralNorm.*n_steps=.*a positive integer\n  found    1\.5",
    ),
    "heads": (lambda: nnx.MultiHeadAttention(2.5, 4, rngs=r()), r"^MultiHeadAttention.*num_heads=.*found    2\.5"),
    "kv-heads": (lambda: nnx.MultiHeadAttention(2, 4, num_kv_heads=-1, rngs=r()), r"num_kv_heads=.*found    -1"),
    "attention": (
        lambda: nnx.MultiHeadAttention(2, 4, dropout_rate=float("nan"), rngs=r()),
        r"dropout_rate=.*found    nan",
    ),
    "cell": (lambda: nnx.GRUCell(3, -4, rngs=r()), r"^GRUCell.*hidden_features=.*found    -4"),
    "dropout": (lambda: nnx.Dropout(float("nan"), rngs=r()), r"^Dropout.*rate=.*found    nan"),
    "dropout-text": (lambda: nnx.Dropout("0.5", rngs=r()), r"^Dropout.*rate=.*found    '0\.5'.*not to keep"),
    "causal-mask": (
        lambda: nnx.make_causal_mask(jnp.ones((2, 3)), extra_batch_dims=-1),
        r"^make_attention_mask.*extra_batch_dims=.*found    -1",
    ),
    "rope-odd": (
        lambda: nnx.RoPE(embedding_size=7, max_seq_len=3),
        r"^RoPE.*embedding_size=.*an even.*found    7.*pairs",
    ),
    "rope-zero": (lambda: nnx.RoPE(embedding_size=0, max_seq_len=3), r"^RoPE.*embedding_size=.*above 0\n  found    0"),
    "rope-one": (lambda: nnx.RoPE(max_seq_len=3), r"^RoPE.*both or neither\n.*embedding_size=None, max_seq_len=3\nThe"),
    "rope-length": (lambda: nnx.RoPE(embedding_size=4, max_seq_len=-3), r"^RoPE.*max_seq_len=.*found    -3"),
    "rope-theta": (lambda: nnx.RoPE(theta=-1.0), r"^RoPE.*theta=.*above 0\n  found    -1\.0\nIt is the base"),
}


@pytest.mark.parametrize(("act", "text"), REJECTED.values(), ids=REJECTED)
def test_what_cannot_be_meant(act, text):
    with pytest.raises(OptionError, match=f"(?s){text}"):
        act()


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_rank_promotion():
    """Arrays of different rank do not broadcast: what users set to find errors of their own."""
    with jax.numpy_rank_promotion("raise"):
        yield


def test_masks_and_biases_under_strict_ranks(no_rank_promotion):
    mask = noise(2, 3, 3) > 0
    options = {"bias": noise(3, 3, 3), "mask": mask, "is_causal": True}
    wide = {"bias": options["bias"][None, None], "mask": (mask & jnp.tril(jnp.ones((3, 3), bool)))[None, None]}
    assert_trees_equal(nnx.dot_product_attention(Q, Q, Q, **options), nnx.dot_product_attention(Q, Q, Q, **wide))
    assert_trees_equal(
        nnx.dot_product_attention_with_rope(Q, Q, Q, rope=nnx.RoPE(), **options),
        nnx.dot_product_attention_with_rope(Q, Q, Q, rope=nnx.RoPE(embedding_size=4, max_seq_len=3), **wide),
    )


@pytest.mark.sample(8)
@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_every_layer_under_strict_ranks(row, no_rank_promotion):
    layer = row.make(nnx, nnx.Rngs(0))
    for mode in row.modes.values():
        if isinstance(row.method, str):
            getattr(layer, row.method)(row.example(), **mode)
        else:
            row.method(layer, row.example(), **mode)
