# %% [markdown]
# # A decoder Transformer: scan, remat, logical axes and a cache, from Linen to native NNX
#
# The Linen model scans over its layers, computes them again in the backward pass, names its axes for sharding, and
# decodes with a cache. The native model has all of that too, takes its weights, and gives its numbers.

# %%
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import bridge
import nnx_core as nnx

QUICK = "--quick" in sys.argv
LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = (2, 8, 2, 5, 11) if QUICK else (6, 64, 4, 16, 64)
RULES = (("layers", None), ("embed", None), ("mlp", "model"), ("vocabulary", "model"))
tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCABULARY)


# %% [markdown]
# ## In Linen


# %%
def named(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class LinenBlock(nn.Module):
    decode: bool

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(HEADS, decode=self.decode, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_0")(x), mask=mask)
        hidden = nn.gelu(
            nn.Dense(4 * WIDTH, kernel_init=named("embed", "mlp"), name="up")(nn.LayerNorm(name="norm_1")(x))
        )
        return x + nn.Dense(WIDTH, kernel_init=named("mlp", "embed"), name="down")(hidden), None


class LinenDecoder(nn.Module):
    decode: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None):
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=named("vocabulary", "embed"), name="embed")(tokens)
        stack = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(self.decode, name="layers")(x, mask)
        return nn.Dense(VOCABULARY, kernel_init=named("embed", "vocabulary"), name="head")(x)


mask = nn.make_causal_mask(tokens)
linen_model = LinenDecoder()
variables = linen_model.init(jax.random.key(1), tokens, mask)
expected = linen_model.apply(variables, tokens, mask)


# %% [markdown]
# ## In NNX
#
# One block's constructor under `nnx.vmap` makes the stack; `nnx.scan` of `nnx.remat` runs it. The parameters are
# stacked as Linen's are, under the same names, so they go in as they are.


# %%
def axes(*names):
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.norm_0, self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, kernel_init=axes("embed", "mlp"), rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, kernel_init=axes("mlp", "embed"), rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_0(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_1(x))))


class Decoder(nnx.Module):
    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs):
            return Block(rngs=rngs)

        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=axes("vocabulary", "embed"), rngs=rngs)
        self.layers = make(rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, kernel_init=axes("embed", "vocabulary"), rngs=rngs)

    def __call__(self, tokens, mask=None):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False)
        def run(x, block):
            return block(x, mask)

        return self.head(run(self.embed(tokens), self.layers))

    def init_cache(self, batch, length):
        """Begin to decode `batch` sequences of up to `length` tokens."""

        @nnx.vmap
        def start(block):
            block.attention.init_cache((batch, length, WIDTH))

        start(self.layers)


model = Decoder(rngs=nnx.Rngs(0))
bridge.load_variables(model, variables)
np.testing.assert_allclose(model(tokens, mask), expected, rtol=1e-5, atol=1e-5)
print("outputs: as in Linen")

# %% [markdown]
# The gradients too, and the names of the axes, which logical rules make axes of a mesh:

# %%
labels = jnp.roll(tokens, -1, axis=1)


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


grads = nnx.grad(lambda model: loss_of(model(tokens, mask)))(model)
linen_grads = nn.unbox(jax.grad(lambda v: loss_of(linen_model.apply(v, tokens, mask)))(variables))
np.testing.assert_allclose(
    grads["layers"]["up"]["kernel"][...], linen_grads["params"]["layers"]["up"]["kernel"], rtol=1e-4, atol=1e-5
)
with nnx.logical_axis_rules(RULES):
    specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
linen_specs = nn.logical_to_mesh(nn.get_partition_spec(variables), RULES)["params"]
for part, name in (("up", "kernel"), ("down", "kernel")):
    assert specs["layers"][part][name][...] == linen_specs["layers"][part][name]
assert specs["embed"]["embedding"][...] == linen_specs["embed"]["embedding"]
print("gradients and partition specs: as in Linen")

# %% [markdown]
# ## Decoding
#
# Token by token with a cache, on both sides:

# %%
cache = LinenDecoder(decode=True).init(jax.random.key(1), tokens)["cache"]
model.init_cache(*tokens.shape)
model.set_attributes(decode=True)
step = nnx.jit(lambda model, token: model(token))
for i in range(LENGTH):
    token = tokens[:, i : i + 1]
    linen_logits, updates = LinenDecoder(decode=True).apply(
        {"params": variables["params"], "cache": cache}, token, mutable=["cache"]
    )
    cache = updates["cache"]
    logits = step(model, token)
    np.testing.assert_allclose(logits, linen_logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[:, 0], expected[:, i], rtol=1e-4, atol=1e-4)
print(f"{LENGTH} tokens decoded: as in Linen, and as the whole sequence at once")
