# %% [markdown]
# # A flax.nnx trainer around a Linen model
#
# A trainer that was written for flax.nnx knows nothing of Linen. `bridge.ToNNX` makes a module of nnx_core of a Linen
# model, and `AsFlax` makes a flax.nnx module of that: the trainer takes it as it is.

# %%
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.training import train_state

import bridge
import nnx_core as nnx
from bridge.flax_nnx import AsFlax

STEPS = 3 if "--quick" in sys.argv else 50


# %% [markdown]
# ## The trainer, as one finds it


# %%
class Trainer:
    """Written for flax.nnx: an optimizer, metrics, a step in flax.nnx.jit."""

    def __init__(self, model: flax_nnx.Module, tx: optax.GradientTransformation):
        self.model = model
        self.optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
        self.metrics = flax_nnx.metrics.Average("loss")

    @staticmethod
    @flax_nnx.jit
    def _step(model, optimizer, metrics, x, y):
        loss, grads = flax_nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        metrics.update(loss=loss)
        return loss

    def step(self, x, y):
        return self._step(self.model, self.optimizer, self.metrics, x, y)


# %% [markdown]
# ## The Linen model, with batch statistics


# %%
class Regressor(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(1)(x)


x = jax.random.normal(jax.random.key(0), (32, 4))
y = jnp.sin(x.sum(-1, keepdims=True))
variables = Regressor().init(jax.random.key(1), x)

wrapped = bridge.ToNNX(Regressor(), rngs=nnx.Rngs(0)).lazy_init(x)
bridge.load_variables(wrapped, variables)
trainer = Trainer(AsFlax(wrapped), optax.adam(1e-2))

# %% [markdown]
# ## Both train alike
#
# The same model in Linen's own TrainState gives the same losses, step by step.

# %%


class TrainState(train_state.TrainState):
    batch_stats: dict


@jax.jit
def linen_step(state, x, y):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


state = TrainState.create(
    apply_fn=Regressor().apply,
    params=variables["params"],
    tx=optax.adam(1e-2),
    batch_stats=variables["batch_stats"],
)
for i in range(STEPS):
    state, expected = linen_step(state, x, y)
    loss = trainer.step(x, y)
    assert loss == expected, f"step {i}: {loss} in flax.nnx, {expected} in Linen"
print(f"{STEPS} steps: loss {loss:.4f}, as in Linen; average {trainer.metrics.compute():.4f}")

# %% [markdown]
# What was trained comes back as Linen's variables:

# %%
back = bridge.variables_of(trainer.model.to_nnx_core())
jax.tree.map(np.testing.assert_array_equal, back["params"], dict(state.params))
jax.tree.map(np.testing.assert_array_equal, back["batch_stats"], dict(state.batch_stats))
