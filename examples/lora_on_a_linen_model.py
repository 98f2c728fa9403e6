# %% [markdown]
# # LoRA on a wrapped Linen model
#
# A trained Linen model is frozen, and its dense layers get low-rank additions, chosen by a rule over paths. The Linen
# source is not touched: an interceptor adds what the NNX modules compute.

# %%
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import bridge
import nnx_core as nnx

STEPS = 3 if "--quick" in sys.argv else 100


# %%
class Classifier(nn.Module):
    """The model that somebody trained."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(16, name=f"block_{i}")(nn.relu(nn.LayerNorm(name=f"norm_{i}")(x)))
        return nn.Dense(3, name="head")(x)


x = jax.random.normal(jax.random.key(0), (64, 16))
labels = jnp.argmax(x[:, :3] @ jax.random.normal(jax.random.key(1), (3, 3)), axis=-1)
trained = Classifier().init(jax.random.key(2), x)


# %% [markdown]
# ## The adapted model
#
# `bridge.ToNNX` holds the trained weights. For every Dense layer that the rule names there is an `nnx.LoRA`; inside
# of the call, Linen's interceptor finds the layer by its path and adds the product.


# %%
class Adapted(nnx.Module):
    def __init__(self, linen_model, variables, rule, rank, *, rngs):
        self.base = bridge.ToNNX(linen_model, rngs=rngs).lazy_init(x)
        bridge.load_variables(self.base, variables)
        self.adapters = nnx.Dict()
        for path, kernel in nnx.to_flat_state(nnx.state(self.base, nnx.Param)):
            name = "/".join(map(str, path[:-1]))
            if path[-1] == "kernel" and re.fullmatch(rule, name):
                n_in, n_out = kernel.shape
                self.adapters[name] = nnx.LoRA(n_in, rank, n_out, rngs=rngs)

    def __call__(self, x):
        def add(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            name = "/".join(context.module.path)
            return y + self.adapters[name](*args) if name in self.adapters else y

        with nn.intercept_methods(add):
            return self.base(x)


model = Adapted(Classifier(), trained, r"block_\d+", 2, rngs=nnx.Rngs(0))
assert sorted(model.adapters) == ["block_0", "block_1"]
np.testing.assert_array_equal(model(x), Classifier().apply(trained, x))  # lora_b starts as zeros

# %% [markdown]
# ## Only the additions are trained
#
# `wrt=nnx.LoRAParam` says which Variables the gradient and the optimizer see.

# %%
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)


@nnx.jit
def step(model, optimizer, x, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss


losses = [float(step(model, optimizer, x, labels)) for _ in range(STEPS)]
print(f"{STEPS} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0]
jax.tree.map(np.testing.assert_array_equal, bridge.variables_of(model.base), dict(trained))  # untouched

# %% [markdown]
# ## What is saved
#
# The additions alone, a few numbers for each layer:

# %%
additions = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
n_additions, n_all = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (additions, trained))
print(f"{n_additions} numbers, beside {n_all} of the model")
