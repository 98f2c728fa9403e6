# %% [markdown]
# # An NNX layer in a Linen model
#
# A Linen code base takes one layer from NNX and keeps everything else: `init`, `nn.vmap`, `sow`, `TrainState`.

# %%
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import bridge
import nnx_core as nnx

STEPS = 3 if "--quick" in sys.argv else 50


# %% [markdown]
# ## The layer
#
# A gated layer in NNX, with a value that it shows (`sow`).


# %%
class Gated(nnx.Module):
    def __init__(self, features, hidden, *, rngs):
        self.up = nnx.Linear(features, hidden, rngs=rngs)
        self.gate = nnx.Linear(features, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, features, rngs=rngs)

    def __call__(self, x):
        gate = nnx.sigmoid(self.gate(x))
        self.sow(nnx.Intermediate, "openness", gate)
        return x + self.down(gate * self.up(x))


# %% [markdown]
# ## In a Linen model
#
# `bridge.to_linen` makes a Linen module of the class and its arguments. Its variables are in Linen's collections, so
# that `nn.vmap` makes an ensemble of it as of any Linen module.


# %%
class Model(nn.Module):
    members: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        ensemble = nn.vmap(
            bridge.ToLinen,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.members,
        )
        votes = ensemble(Gated, args=(8, 16), name="ensemble")(x)
        return nn.Dense(1, name="head")(votes.mean(0))


model = Model(members=3)
x = jax.random.normal(jax.random.key(0), (32, 4))
target = jnp.sin(x.sum(-1, keepdims=True))
variables = model.init(jax.random.key(1), x)
params = variables["params"]
assert params["ensemble"]["up"]["kernel"].shape == (3, 8, 16)
assert not np.array_equal(*params["ensemble"]["up"]["kernel"][:2])  # each member has initial values of its own

# %% [markdown]
# What the layer sows comes out of `apply` as Linen's intermediates do:

# %%
_, shown = model.apply({"params": params}, x, mutable=["intermediates"])
(gates,) = jax.tree.leaves(shown["intermediates"])
assert gates.shape == (3, 32, 16)
print(f"gates of 3 members between {gates.min():.2f} and {gates.max():.2f}")

# %% [markdown]
# ## Training is Linen's

# %%
state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))


@jax.jit
def step(state):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - target) ** 2))(state.params)
    return state.apply_gradients(grads=grads), loss


losses = []
for _ in range(STEPS):
    state, loss = step(state)
    losses.append(float(loss))
print(f"{STEPS} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0]
