"""MultiHeadAttention and its functions: options, decoding and errors, against Linen where it has them."""

from dataclasses import replace

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from nnx_core.nn._errors import InputShapeError, MissingFlagError, MissingRngsError, OptionError
from nnx_core.nn.attention import MissingCacheError, MissingInputError
from nnx_core.nn.attention_dot_product import AttentionShapeError, dot_product_attention_weights
from nnx_core.nn.dtypes import promote_dtype
from tests.layer_rows.attention import NORMS, PRODUCTS, ROWS
from tests.support.arrays import noise, ones
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import KEY, Layer, assert_equal_to_twin

MHA, _ = ROWS
X = noise(0, 2, 3, 4)
MASK = np.array([[[[1, 0, 1], [1, 1, 0], [0, 0, 0]]], [[[0, 1, 0], [1, 1, 1], [1, 0, 0]]]], np.int32)


def attention(**options):
    """Two heads of three features, two inputs in a batch, four features."""
    return nnx.MultiHeadAttention(2, 4, 6, **{"decode": False, "rngs": nnx.Rngs(0)} | options)


def weights_of(module):
    """All parameters as Linen's tree."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"params": unflatten_dict({path: leaf[...] for path, leaf in flat})}


# ---- options, against Linen --------------------------------------------------------------------------------


def option(call=None, twin_call=None, params=PRODUCTS, **options):
    """A row without dropout in which both sides get the same options."""
    row = replace(
        MHA,
        make=lambda lib, rngs, **d: lib.MultiHeadAttention(2, 4, 6, 5, decode=False, rngs=rngs, **options, **d),
        twin=lambda **d: linen.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5, **options, **d),
        params=params,
        modes={True: {}, False: {}},
        twin_modes={True: {}, False: {}},
    )
    return replace(row, method=call) if call else row


class Crossed(linen.Module):
    """Linen's module, called with three inputs of different sizes."""

    def setup(self):
        self.attention = linen.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5)

    def __call__(self, x):
        return self.attention(*three_inputs(x))


def three_inputs(x):
    keys = jnp.concatenate([x, x], axis=-2)[..., :3]
    return x, keys, keys * 2


CROSSED = Layer(
    "crossed",
    make=lambda lib, rngs, **d: lib.MultiHeadAttention(2, 4, 6, 5, in_kv_features=3, decode=False, rngs=rngs, **d),
    twin=lambda **d: Crossed(**d),
    shape=(2, 3, 4),
    params={ours: theirs.replace("params/", "params/attention/") for ours, theirs in PRODUCTS.items()},
)
NO_BIAS = {ours: theirs for ours, theirs in PRODUCTS.items() if "bias" not in ours}
OPTIONS = {
    "no-bias": option(use_bias=False, params=NO_BIAS),
    "no-batch": replace(option(), shape=(3, 4)),
    "batch-axes": replace(option(normalize_qk=True, params=PRODUCTS | NORMS), shape=(2, 2, 3, 4)),
    "one-token": replace(option(), shape=(1, 4)),
    "mask": replace(
        option(),
        make=lambda lib, rngs, **d: lib.MultiHeadAttention(2, 4, 6, 5, decode=False, rngs=rngs, **d),
        modes={False: {"mask": MASK}},
        twin_modes={False: {"mask": MASK}},
    ),
    "unbroadcast-dropout": replace(
        option(dropout_rate=0.5, broadcast_dropout=False),
        modes={False: {"deterministic": False, "rngs": KEY}},
        twin_modes={False: {"deterministic": False, "dropout_rng": KEY}},
    ),
}


@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row):
    assert_equal_to_twin(row, train=False)


def test_three_inputs():
    values, x = CROSSED.variables(), CROSSED.example()

    def ours(values, x):
        module = CROSSED.make(nnx, nnx.Rngs(0))
        CROSSED.write(module, values)
        return module(*three_inputs(x))

    theirs = CROSSED.functional_twin(train=False)
    assert_trees_equal(jax.jit(ours)(values, x), jax.jit(theirs)(values, x)[0])


def test_keys_are_queries_and_values_are_keys_unless_given():
    layer, keys = attention(), jnp.cos(jnp.arange(40.0)).reshape(2, 5, 4)
    assert_trees_equal(layer(X), layer(X, X, X))
    assert_trees_equal(layer(X, keys), layer(X, keys, keys))


def test_sown_weights():
    layer = attention(dropout_rate=0.5, deterministic=False)
    twin = linen.MultiHeadDotProductAttention(2, qkv_features=6, dropout_rate=0.5, deterministic=False)
    y = layer(X, rngs=KEY, sow_weights=True)
    expected, updates = twin.apply(weights_of(layer), X, dropout_rng=KEY, sow_weights=True, mutable="intermediates")
    assert_trees_equal(y, expected)
    assert_trees_equal(layer.attention_weights.get_value(), updates["intermediates"]["attention_weights"])
    assert isinstance(layer.attention_weights, nnx.Intermediate)
    assert not hasattr(attention(), "attention_weights")


# ---- the function, against Linen's -------------------------------------------------------------------------

Q, K, V = (noise(seed, 2, 3, 2, 4) for seed in (1, 2, 3))
BIAS = noise(4, 2, 1, 3, 3)
FUNCTION = {
    "plain": {},
    "bias": {"bias": BIAS},
    "mask": {"mask": MASK},
    "float-mask": {"mask": MASK.astype(jnp.float32), "bias": BIAS},
    "no-heads-in-mask": {"mask": MASK[0, 0]},
    "dropout": {"dropout_rate": 0.3, "dropout_rng": KEY},
    "own-dropout": {"dropout_rate": 0.3, "dropout_rng": KEY, "broadcast_dropout": False},
    "deterministic": {"dropout_rate": 0.3, "deterministic": True},
    "bfloat16": {"dtype": jnp.bfloat16, "mask": MASK, "dropout_rate": 0.3, "dropout_rng": KEY},
    "precision": {"precision": "highest"},
}


@pytest.mark.parametrize("options", FUNCTION.values(), ids=FUNCTION)
def test_dot_product_attention(options):
    assert_trees_equal(nnx.dot_product_attention(Q, K, V, **options), linen.dot_product_attention(Q, K, V, **options))
    assert_trees_equal(
        dot_product_attention_weights(Q, K, **options), linen.dot_product_attention_weights(Q, K, **options)
    )


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 3, 2, 4)], ids=["no-batch", "batch-axes"])
def test_dot_product_attention_under_any_batch_axes(shape):
    q = jax.random.normal(KEY, shape, jnp.complex64)
    v = q[..., :3]  # values of another depth
    assert_trees_equal(nnx.dot_product_attention(q, q, v), linen.dot_product_attention(q, q, v))
    q, v = q.real.astype(jnp.bfloat16), v.real
    assert_trees_equal(nnx.dot_product_attention(q, q, v), linen.dot_product_attention(q, q, v))


def test_is_causal_is_a_mask():
    causal = nnx.make_causal_mask(Q[..., 0, 0])
    expected = linen.dot_product_attention(Q, K, V, mask=causal)
    assert_trees_equal(nnx.dot_product_attention(Q, K, V, is_causal=True), expected)
    expected = linen.dot_product_attention(Q, K, V, mask=linen.combine_masks(causal, MASK))
    assert_trees_equal(nnx.dot_product_attention(Q, K, V, mask=MASK, is_causal=True), expected)
    assert_trees_equal(attention()(X, is_causal=True), attention()(X, mask=nnx.make_causal_mask(X[..., 0])))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries(kv_heads):
    q = jax.random.normal(KEY, (2, 5, 4, 3))
    k, v = (jax.random.normal(key, (2, 3, kv_heads, 3)) for key in jax.random.split(KEY))
    options = {"mask": MASK[:, :, :1], "dropout_rate": 0.3, "dropout_rng": KEY}
    ours = nnx.dot_product_attention(q, k, v, **options)
    k4, v4 = (jnp.repeat(x, 4 // kv_heads, axis=-2) for x in (k, v))
    assert_trees_close(ours, linen.dot_product_attention(q, k4, v4, **options))
    assert_trees_close(ours, flax.nnx.dot_product_attention(q, k, v, **options))
    assert_trees_close(nnx.dot_product_attention(q, k, v), jax.nn.dot_product_attention(q, k, v))
    # The keys are not copied for each query head.
    jaxpr = str(jax.make_jaxpr(nnx.dot_product_attention)(q, k, v))
    assert "f32[2,3,4,3]" not in jaxpr


@pytest.mark.slow
def test_grouped_queries_in_the_layer():
    layer = nnx.MultiHeadAttention(4, 4, 8, num_kv_heads=2, decode=True, rngs=nnx.Rngs(0))
    assert (layer.key.kernel.shape, layer.value.bias.shape) == ((4, 2, 2), (2, 2))
    theirs = flax.nnx.MultiHeadAttention(4, 4, 8, num_kv_heads=2, decode=False, rngs=flax.nnx.Rngs(0))
    expected = theirs(X, is_causal=True)
    assert_trees_close(layer(X, is_causal=True, decode=False), expected)
    layer.init_cache(X.shape)
    assert layer.cached_key.shape == (2, 3, 2, 2)
    steps = [layer(X[:, i : i + 1]) for i in range(3)]
    assert_trees_close(jnp.concatenate(steps, axis=1), expected)


def test_masks():
    positions, other = jnp.array([[0, 1, 2, 3]]), jnp.array([[2, 0, 1]])
    for options in ({}, {"pairwise_fn": jnp.greater, "dtype": bool}, {"extra_batch_dims": 2, "dtype": jnp.int32}):
        assert_trees_equal(
            nnx.make_attention_mask(positions, other, **options), linen.make_attention_mask(positions, other, **options)
        )
    for options in ({}, {"extra_batch_dims": 1, "dtype": bool}):
        assert_trees_equal(nnx.make_causal_mask(X[..., 0], **options), linen.make_causal_mask(X[..., 0], **options))
    a, b = jnp.array([[0.0, 0.5, 2.0]]), jnp.array([[True], [False]])
    for masks in ((), (None, None), (a,), (None, b), (a, b, None, a)):
        for dtype in (jnp.float32, bool):
            assert_trees_equal(nnx.combine_masks(*masks, dtype=dtype), linen.combine_masks(*masks, dtype=dtype))


# ---- decoding ----------------------------------------------------------------------------------------------

DECODE = {
    "plain": {},
    "normalize_qk": {"normalize_qk": True},
    "bfloat16": {"dtype": jnp.bfloat16},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("options", DECODE.values(), ids=DECODE)
@pytest.mark.parametrize(
    "mask", [None, np.array([[[[1, 0, 1, 1]]], [[[0, 1, 1, 0]]]], np.int32)], ids=["no-mask", "mask"]
)
def test_decoding_step_by_step(options, mask):
    x = jax.random.normal(jax.random.key(7), (2, 4, 4))
    layer = attention(decode=True, bias_init=nnx.initializers.normal(), **options)
    twin = linen.MultiHeadDotProductAttention(2, qkv_features=6, decode=True, **options)
    layer.init_cache(x.shape, options.get("dtype", jnp.float32))
    cache = twin.init(KEY, x)["cache"]
    params = weights_of(layer)
    step = jax.jit(lambda cache, x: twin.apply(params | {"cache": cache}, x, mask=mask, mutable="cache"))
    before = [layer.cached_key, layer.cached_value, layer.cache_index]
    own_step = nnx.jit(lambda layer, x: layer(x, mask=mask))
    for i in (0, 1, 2, 3, 3):  # one more than there is room for: the last is replaced
        expected, updates = step(cache, x[:, i : i + 1])
        cache = updates["cache"]
        assert_trees_equal(own_step(layer, x[:, i : i + 1]), expected)
        ours = {"/".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Cache))}
        assert_trees_equal(ours, flatten_dict(cache, sep="/"))
    after = [layer.cached_key, layer.cached_value, layer.cache_index]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_the_program_of_a_step_has_no_more_equations():
    layer = attention(decode=True)
    twin = linen.MultiHeadDotProductAttention(2, qkv_features=6, decode=True)
    layer.init_cache(X.shape)
    variables = weights_of(layer) | {"cache": twin.init(KEY, X)["cache"]}
    graphdef, state = nnx.split(layer)

    def ours(state, x):
        module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        return module(x), nnx.state(module, nnx.Cache)

    own = jax.make_jaxpr(ours)(state, X[:, :1])
    theirs = jax.make_jaxpr(lambda variables, x: twin.apply(variables, x, mutable="cache"))(variables, X[:, :1])
    assert len(own.eqns) <= len(theirs.eqns)


def test_decoding_equals_a_causal_mask():
    layer = attention()
    expected = layer(X, is_causal=True)
    layer.init_cache(X.shape)
    # `is_causal` changes nothing here: in flax.nnx it hides every key but the first.
    steps = [layer(X[:, i : i + 1], decode=True, is_causal=i % 2 == 0) for i in range(3)]
    assert_trees_close(jnp.concatenate(steps, axis=1), expected)
    layer.init_cache(X.shape)
    assert_trees_equal(layer(X[:, :1], decode=True), steps[0])
    assert int(layer.cache_index[...]) == 1


def test_batch_axes_of_the_cache():
    layer = attention(decode=True)
    for shape in ((3, 4), (1, 2, 3, 4)):
        layer.init_cache(shape)
        assert layer.cached_key.shape == (*shape[:-1], 2, 3)
        assert layer(jnp.ones((*shape[:-2], 1, 4))).shape == (*shape[:-2], 1, 4)


def test_a_cache_of_less_precision():
    layer = attention(decode=True)
    layer.init_cache(X.shape, jnp.bfloat16)
    y = layer(X[:, :1])
    assert (y.dtype, layer.cached_key.dtype, layer.cached_value.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    expected = layer.value(X[:, :1]).astype(jnp.bfloat16).astype(jnp.float32)
    assert_trees_equal(y, layer.out(expected))  # one key: its weight is 1


def test_views():
    layer = attention(dtype=jnp.bfloat16, dropout_rate=0.5)
    view = nnx.view(layer, decode=True, deterministic=True, batch_size=2, max_length=5)
    assert (view.cached_key.shape, view.cached_key.dtype) == ((2, 5, 2, 3), jnp.bfloat16)
    assert (layer.cached_key, layer.decode, layer.deterministic) == (None, False, None)
    assert view(X[:, :1]).shape == (2, 1, 4)
    assert view.query.kernel is layer.query.kernel
    layer.set_view(decode=True, batch_size=(1, 2), max_length=5)
    assert layer.cached_value.shape == (1, 2, 5, 2, 3)
    other = attention()
    other.set_view(batch_size=2, max_length=5)
    other.set_view(decode=True, max_length=5)
    assert (other.cached_key, other.decode) == (None, True)


# ---- dropout and modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [{"default": 1}, {"params": 2, "dropout": 1}], ids=lambda s: "+".join(s))
def test_same_dropout_as_flax_nnx(seeds):
    options = {"decode": False, "dropout_rate": 0.5, "deterministic": False}
    ours = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(**seeds), **options)
    theirs = flax.nnx.MultiHeadAttention(2, 4, rngs=flax.nnx.Rngs(**seeds), **options)
    for _ in range(2):
        assert_trees_equal(ours(X), theirs(X))


def test_what_may_be_given_as_rngs():
    layer = attention(dropout_rate=0.5, deterministic=False)
    expected = layer(X, rngs=nnx.Rngs(dropout=3).dropout())
    assert_trees_equal(layer(X, rngs=nnx.Rngs(dropout=3)), expected)
    assert_trees_equal(layer(X, rngs=nnx.Rngs(3)), expected)
    assert_trees_equal(layer(X, rngs=nnx.Rngs(dropout=3).dropout), expected)
    assert int(layer.rngs.count[...]) == 0  # the call's go first
    layer(X)
    layer(X, deterministic=True)
    assert int(layer.rngs.count[...]) == 1  # and no key is drawn where nothing is dropped


def test_only_dropout_keeps_rngs():
    rngs = nnx.Rngs(params=0)  # no stream to drop with
    assert attention(rngs=rngs).rngs is None
    assert attention(rngs=rngs, dropout_rate=0.5, keep_rngs=False).rngs is None
    assert attention(dropout_rate=0.5).rngs.tag == "default"


def test_everything_is_dropped():
    layer = attention(dropout_rate=1, deterministic=False)
    assert_trees_equal(layer(X), jnp.zeros((2, 3, 4)))


def test_train_and_eval():
    layer = attention(dropout_rate=0.5)
    layer.eval()
    quiet = layer(X)
    assert_trees_equal(quiet, attention()(X))
    layer.train()
    assert (layer(X) != quiet).any()
    layer.set_attributes(deterministic=True)
    assert_trees_equal(layer(X), quiet)


# ---- what users put in place -------------------------------------------------------------------------------


def test_what_attention_fn_gets():
    calls = []

    def record(query, key, value, **options):
        calls.append((query.shape, key.shape, value.shape, options))
        return value

    layer = attention(attention_fn=record, dropout_rate=0.5, precision="high", dtype=jnp.float32)
    layer(X, mask=MASK, rngs=KEY, deterministic=False, sow_weights=True, is_causal=True)
    layer(X, deterministic=True)
    ((*shapes, options), (*_, plain)) = calls
    assert shapes == [(2, 3, 2, 3)] * 3
    assert options.pop("mask") is MASK
    assert options.pop("dropout_rng") is KEY
    assert options.pop("module") is layer
    same = {"dropout_rate": 0.5, "broadcast_dropout": True, "dtype": jnp.float32, "precision": "high"}
    assert options == same | {"deterministic": False, "is_causal": True}
    assert plain == same | {
        "deterministic": True,
        "is_causal": False,
        "mask": None,
        "dropout_rng": None,
        "module": None,
    }


def test_custom_products_and_promotions():
    calls = []

    def recording(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    product, promote = jax.lax.dot_general, promote_dtype
    options = {f"{part}_dot_general": recording(f"{part} product", product) for part in ("qkv", "out")}
    options |= {f"{part}_promote_dtype": recording(f"{part} promote", promote) for part in ("qkv", "out", "ln")}
    layer = attention(normalize_qk=True, **options)
    assert_trees_close(layer(X), attention(normalize_qk=True)(X))
    assert calls == ["qkv promote", "qkv product"] * 3 + ["ln promote"] * 2 + ["out promote", "out product"]
    calls.clear()
    classes = {f"{part}_dot_general_cls": lambda part=part: recording(part, product) for part in ("qkv", "out")}
    attention(**classes)(X)
    assert calls == ["qkv"] * 3 + ["out"]


def test_initializers_and_metadata():
    zeros, ones, twos = (nnx.initializers.constant(i) for i in range(3))
    layer = attention(
        normalize_qk=True,
        kernel_init=ones,
        out_kernel_init=twos,
        bias_init=twos,
        out_bias_init=zeros,
        kernel_metadata={"m": "kernel"},
        out_kernel_metadata={"m": "out kernel"},
        bias_metadata={"m": "bias"},
        out_bias_metadata={"m": "out bias"},
        query_ln_scale_metadata={"m": "query scale"},
        key_ln_scale_metadata={"m": "key scale"},
    )
    found = {
        "/".join(path): (float(leaf[...].mean()), leaf.get_metadata()["m"])
        for path, leaf in nnx.to_flat_state(nnx.state(layer))
    }
    expected = {"out/kernel": (2, "out kernel"), "out/bias": (0, "out bias")}
    expected |= {"query_ln/scale": (1, "query scale"), "key_ln/scale": (1, "key scale")}
    for name in ("query", "key", "value"):
        expected |= {f"{name}/kernel": (1, "kernel"), f"{name}/bias": (2, "bias")}
    assert found == expected
    shared = attention(bias_init=twos, kernel_metadata={"m": "kernel"}, bias_metadata={"m": "bias"}).out
    assert (shared.kernel.m, shared.bias.m, float(shared.bias[0])) == ("kernel", "bias", 2)


def test_explicit_sharding():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer, spec = attention(), jax.sharding.PartitionSpec
    seen = []

    def record(query, key, value, **options):
        seen.extend(jax.typeof(x).sharding.spec for x in (query, key, value))
        return value

    layer.attention_fn = record
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x: layer(x, qkv_sharding=spec("d", None, None, None), out_sharding=spec("d", None, None)))
        assert f(X).sharding.spec == spec("d", None, None)
    assert seen == [spec("d", None, None, None)] * 3


# ---- errors ------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, **options):
        self.layers = nnx.List([attention(**options)])

    def __call__(self, *args, **kwargs):
        return self.layers[0](*args, **kwargs)


AT = r"(?s)^MultiHeadAttention at Model\.layers\[0\]"
WRONG_INPUTS = {
    "query-features": ([(2, 3, 5)], r"\(\*batch, length, 4\) as inputs_q.*found +shape \(2, 3, 5\)"),
    "rank": ([(4,)], r"\(\*batch, length, 4\) as inputs_q.*found +shape \(4,\)"),
    "key-features": ([(2, 3, 4), (2, 3, 5)], r"\(2, length, 4\) as inputs_k.*\(2, 3, 5\).*in_kv_features"),
    "key-batch": ([(2, 3, 4), (1, 3, 4)], r"\(2, length, 4\) as inputs_k.*found +shape \(1, 3, 4\)"),
    "value-features": ([(2, 3, 4), (2, 3, 4), (2, 3, 5)], r"\(2, 3, 4\) as inputs_v.*\(2, 3, 5\).*same tokens"),
    "value-length": ([(2, 3, 4), (2, 3, 4), (2, 1, 4)], r"\(2, 3, 4\) as inputs_v.*found +shape \(2, 1, 4\)"),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_input_shapes(shapes, message):
    with pytest.raises(InputShapeError, match=f"{AT}:.*{message}"):
        Model()(*map(jnp.ones, shapes))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 4)], r"\(2, 1, 4\) as inputs_q.*found +shape \(2, 3, 4\).*one token a call"),
        ([(3, 1, 4)], r"\(2, 1, 4\) as inputs_q.*found +shape \(3, 1, 4\).*init_cache"),
        ([(2, 1, 4), (2, 3, 4)], r"\(2, 1, 4\) as inputs_k.*found +shape \(2, 3, 4\).*one token a call"),
        ([(1, 4)], r"\(2, 1, 4\) as inputs_q.*found +shape \(1, 4\)"),
    ],
    ids=["length", "batch", "key-length", "rank"],
)
def test_shapes_against_the_cache(shapes, message):
    model = Model(decode=True)
    model.layers[0].init_cache((2, 5, 4))
    with pytest.raises(InputShapeError, match=f"{AT}:.*{message}"):
        model(*map(jnp.ones, shapes))


def test_no_cache():
    with pytest.raises(MissingCacheError, match=f"{AT}:.*autoregressive cache.*found +None.*init_cache"):
        Model(decode=True)(X[:, :1])
    with pytest.raises(InputShapeError, match=r"(?s)\(\*batch, max_length, features\).*found +shape \(4,\)"):
        attention().init_cache((4,))


def test_values_without_keys():
    with pytest.raises(MissingInputError, match=f"{AT}:.*expected inputs_k.*found +None.*as inputs_k alone"):
        Model()(X, None, X)


def test_flags_that_nobody_gives():
    with pytest.raises(MissingFlagError, match=r"(?s)`decode`.*MultiHeadAttention at Model\.layers\[0\].*None in both"):
        Model(decode=None)(X)
    with pytest.raises(MissingFlagError, match=r"(?s)`deterministic`.*MultiHeadAttention at Model\.layers\[0\]"):
        Model(dropout_rate=0.5)(X)


def test_no_rngs():
    with pytest.raises(MissingRngsError, match=r"(?s)^MultiHeadAttention\(.*expected rngs to be an nnx.Rngs.*None"):
        attention(rngs=None)
    model = Model(dropout_rate=0.5, deterministic=False, keep_rngs=False)
    with pytest.raises(MissingRngsError, match=f"{AT} is not deterministic.*found +None.*keep_rngs=True"):
        model(X)
    with pytest.raises(MissingRngsError, match=r"(?s)dropout_rate=0\.5.*a key.*found +None.*deterministic=True"):
        nnx.dot_product_attention(Q, K, V, dropout_rate=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads=.*a divisor of qkv_features 8.*found +3.*in_features unless given"),
        ({"num_heads": 0}, r"num_heads=.*a divisor of qkv_features 8.*found +0"),
        ({"num_kv_heads": 3}, r"num_kv_heads=.*a divisor of num_heads 4.*found +3.*query heads"),
        ({"num_kv_heads": 0}, r"num_kv_heads=.*a divisor of num_heads 4.*found +0"),
        ({"dropout_rate": 1.5}, r"dropout_rate=.*\[0, 1\].*found +1\.5.*not to keep"),
    ],
    ids=str,
)
def test_rejected_options(options, message):
    with pytest.raises(OptionError, match=f"(?s)^MultiHeadAttention.*{message}"):
        nnx.MultiHeadAttention(**{"num_heads": 4, "in_features": 8} | options, rngs=nnx.Rngs(0))


WRONG_ARRAYS = {
    "rank": (
        (Q, ones(3, 2, 4), ones(3, 2, 4)),
        {},
        r"query and key:.*found +query \(2, 3, 2, 4\).*found +key \(3, 2, 4\)",
    ),
    "batch": (
        (Q, ones(1, 3, 2, 4), ones(1, 3, 2, 4)),
        {},
        r"query and key:.*found +key \(1, 3, 2, 4\).*nothing is broadcast",
    ),
    "depth": ((Q, ones(2, 3, 2, 3), V), {}, r"query and key:.*found +key \(2, 3, 2, 3\)"),
    "heads": ((ones(2, 3, 1, 4), K, V), {}, r"query and key:.*kv_heads divides.*found +query \(2, 3, 1, 4\)"),
    "value": ((Q, K, ones(2, 2, 2, 4)), {}, r"key and value:.*up to the depth.*found +value \(2, 2, 2, 4\)"),
    "mask": (
        (Q, K, V),
        {"mask": ones(3, 3, 3)},
        r"mask:.*broadcasts to \[\*batch, heads, q_length, kv_length\] = \(2, 2, 3, 3\).*found +mask \(3, 3, 3\)"
        r".*make_attention_mask",
    ),
    "mask-rank": ((Q, K, V), {"mask": MASK[None]}, r"mask:.*found +mask \(1, 2, 1, 3, 3\)"),
    "bias": ((Q, K, V), {"bias": ones(4)}, r"bias:.*found +bias \(4,\)"),
}


@pytest.mark.parametrize(("arrays", "options", "message"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_arrays_that_do_not_fit(arrays, options, message):
    with pytest.raises(AttentionShapeError, match=f"(?s)^Attention, {message}"):
        nnx.dot_product_attention(*arrays, **options)


def test_masks_of_different_ranks():
    with pytest.raises(
        AttentionShapeError, match=r"(?s)same rank.*masks\[0\] \(3,\).*masks\[1\] \(1, 3\).*extra_batch"
    ):
        nnx.combine_masks(jnp.ones(3), None, jnp.ones((1, 3)))
