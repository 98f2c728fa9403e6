# %% [markdown]
# # A Linen ResNet, replaced stage by stage while it trains
#
# A small ResNet with BatchNorm is trained in Linen, wrapped, and rewritten one stage after the other. After each
# stage the training goes on, and its losses are those of the Linen original, to the last bit.

# %%
import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import bridge
import nnx_core as nnx
from bridge.equivalence import assert_equivalent

QUICK = "--quick" in sys.argv
STEPS, BATCH, CHANNELS = (2, 16, 8) if QUICK else (20, 64, 16)
digits = load_digits()
images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
labels = jnp.asarray(digits.target, jnp.int32)


def batch(step):
    """Images (batch, 8, 8, 1) and labels (batch,)."""
    rows = jnp.arange(step * BATCH, (step + 1) * BATCH) % len(labels)
    return images[rows], labels[rows]


# %% [markdown]
# ## The Linen model and its training loop


# %%
class Stage(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return nn.relu(x + y)


class ResNet(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.channels, (3, 3), name="stem")(x)
        for i in range(3):
            x = Stage(self.channels, name=f"stage_{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: dict


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def linen_step(state, x, y):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, y), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


linen_model = ResNet(CHANNELS)
variables = linen_model.init(jax.random.key(0), images[:1], train=False)
tx = optax.adam(1e-2)
state = TrainState.create(
    apply_fn=linen_model.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
)
for step in range(STEPS):
    state, loss = linen_step(state, *batch(step))
print(f"Linen, {STEPS} steps: loss {loss:.4f}")


# %% [markdown]
# ## The outer module becomes NNX
#
# Its children are still Linen's, in `bridge.ToNNX`. The weights, the statistics and the optimizer's moments go in.


# %%
class NNXResNet(nnx.Module):
    def __init__(self, channels, *, rngs):
        self.stem = bridge.ToNNX(nn.Conv(channels, (3, 3)), rngs=rngs)
        for i in range(3):
            setattr(self, f"stage_{i}", bridge.ToNNX(Stage(channels), rngs=rngs))
        self.head = bridge.ToNNX(nn.Dense(10), rngs=rngs)

    def __call__(self, x, train: bool):
        x = self.stem(x)
        for i in range(3):
            x = getattr(self, f"stage_{i}")(x, train)
        return self.head(x.mean((1, 2)))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x, train=True), y))(model)
    optimizer.update(model, grads)
    return loss


model = bridge.lazy_init(NNXResNet(CHANNELS, rngs=nnx.Rngs(0)), images[:1], train=False)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
bridge.checkpoint.train_state_to_nnx(state, model, optimizer)


# %% [markdown]
# ## One stage after the other
#
# A native stage has the same parameters. `assert_equivalent` proves that it computes what the old one does (outputs,
# gradients, statistics), before it takes its place. The names are Linen's, so the optimizer's moments stay where they
# are.


# %%
class NativeStage(nnx.Module):
    def __init__(self, channels, *, rngs):
        self.Conv_0 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.BatchNorm_0 = nnx.BatchNorm(channels, rngs=rngs)
        self.Conv_1 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.BatchNorm_1 = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(self, x, train: bool):
        y = nnx.relu(self.BatchNorm_0(self.Conv_0(x), use_running_average=not train))
        y = self.BatchNorm_1(self.Conv_1(y), use_running_average=not train)
        return nnx.relu(x + y)


def go_on(what):
    """A few steps on both sides; every loss must be the same to the last bit."""
    global state, step
    for _ in range(STEPS):
        step += 1
        state, expected = linen_step(state, *batch(step))
        loss = nnx_step(model, optimizer, *batch(step))
        assert loss == expected, f"step {step}: {loss} in NNX, {expected} in Linen"
    print(f"{what}, {STEPS} steps: loss {loss:.4f}, as in Linen")


go_on("all stages wrapped")
for i in range(3):
    old, native = getattr(model, f"stage_{i}"), NativeStage(CHANNELS, rngs=nnx.Rngs(0))
    bridge.load_variables(native, bridge.variables_of(old))
    assert_equivalent(old, native, jnp.ones((2, 8, 8, CHANNELS)), train=True)
    setattr(model, f"stage_{i}", native)
    go_on(f"stage {i} native")

# %% [markdown]
# The last two children are single layers. Then nothing of Linen is left.

# %%
for name, native in {
    "stem": nnx.Conv(1, CHANNELS, (3, 3), rngs=nnx.Rngs(0)),
    "head": nnx.Linear(CHANNELS, 10, rngs=nnx.Rngs(0)),
}.items():
    bridge.load_variables(native, bridge.variables_of(getattr(model, name)))
    setattr(model, name, native)
go_on("all native")
assert not any(isinstance(module, bridge.ToNNX) for _, module in nnx.iter_modules(model))
