# %% [markdown]
# # A CheckpointManager run, converted and resumed
#
# A Linen run saved its training state with Orbax's CheckpointManager. The whole folder is converted, a
# CheckpointManager restores it into NNX, training goes on with the same losses, and the old code can still read what
# comes back.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState

import bridge
import nnx_core as nnx

STEPS = 3 if "--quick" in sys.argv else 20
folder = Path(tempfile.mkdtemp())


# %% [markdown]
# ## The Linen run


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(1)(x)


x = jax.random.normal(jax.random.key(0), (32, 4))
y = jnp.sin(x.sum(-1, keepdims=True))
tx = optax.adamw(1e-2)
state = TrainState.create(apply_fn=Net().apply, params=Net().init(jax.random.key(1), x)["params"], tx=tx)


@jax.jit
def linen_step(state):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2))(state.params)
    return state.apply_gradients(grads=grads), loss


with ocp.CheckpointManager(folder / "linen", options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
    for _ in range(2):
        for _ in range(STEPS):
            state, loss = linen_step(state)
        manager.save(int(state.step), args=ocp.args.StandardSave(state))
print(f"Linen, step {state.step}: loss {loss:.4f}")


# %% [markdown]
# ## The command
#
# Every step of the folder is converted, read again and compared by hashes; the names of the two models differ, so
# rules say which is which. (`--linen` and `--nnx` derive them, see the guide's page on checkpoints.)

# %%
rules = folder / "names.toml"
rules.write_text("""
[[rule]]
from = "*/Dense_0/**"
to = "*/hidden/**"

[[rule]]
from = "*/Dense_1/**"
to = "*/out/**"
""")


def linen_nnx(*words):
    """The command `linen-nnx`; raises if it does not end with 0."""
    subprocess.run([sys.executable, "-m", "linen_nnx", *map(str, words)], check=True)


linen_nnx("convert", folder / "linen", folder / "nnx", "--to", "nnx", "--rules", rules, "--all-steps", "-q")


# %% [markdown]
# ## Resumed in NNX


# %%
class NNXNet(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


model = NNXNet(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
abstract = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
with ocp.CheckpointManager(folder / "nnx") as manager:
    assert list(manager.all_steps()) == [STEPS, 2 * STEPS]
    restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
nnx.update(model, restored["model"])
nnx.update(optimizer, restored["optimizer"])

for _ in range(STEPS):
    state, expected = linen_step(state)
    loss = nnx_step(model, optimizer)
    assert loss == expected, f"{loss} in NNX, {expected} in Linen"
print(f"NNX, step {optimizer.step[...]}: loss {loss:.4f}, as in Linen")

# %% [markdown]
# ## And back
#
# The run goes on in NNX, and the old code restores what it saves.

# %%
bridge.checkpoint.save_as_linen(model, optimizer, folder / "back", rules=bridge.checkpoint.read_rules(rules))
with ocp.StandardCheckpointer() as reader:
    back = reader.restore(folder / "back", jax.tree.map(jnp.zeros_like, state))
jax.tree.map(np.testing.assert_array_equal, back.params, state.params)
assert int(back.step) == 3 * STEPS
print(f"Linen again, step {back.step}")
