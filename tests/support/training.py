"""One small model in Linen and in NNX, trained: what the tests move across in the middle of a run.

Law: `linen_step` and `native_step` compute the same to the last bit, for every optimizer of OPTIMIZERS.
"""

import functools

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge.checkpoint.rules.apply import Rules
from tests.support.numbers import normal

X = normal(0, 8, 5)
Y = np.arange(8) % 3
NAMES = {"hidden": "first", "norm": "bn", "head": "last"}
RULES = Rules.from_rename(NAMES)
STEPS = 3


class Net(nn.Module):
    """Dense, BatchNorm, Dense."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(4, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x))


NET = Net()  # a bound method equals another of the same object only, and is part of what JAX's caches go by


class Native(nnx.Module):
    """The same in NNX, under other names."""

    def __init__(self, width=4, *, rngs):
        self.first = nnx.Linear(5, width, rngs=rngs)
        self.bn = nnx.BatchNorm(width, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.bn(self.first(x))))


class State(TrainState):
    """A TrainState with a collection beside the params."""

    batch_stats: dict


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


@jax.jit
def linen_step(state):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = Net().apply(variables, X, mutable=["batch_stats"])
        return loss_of(logits), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updated), loss


@nnx.jit
def native_step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda model: loss_of(model(X)))(model)
    optimizer.update(model, grads)
    return loss


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_rank(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


_OPTIMIZERS = {
    "adamw chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10))
    ),
    "masked": lambda: optax.adamw(1e-2, mask=is_kernel),
    "masked, inner": lambda: optax.masked(optax.adam(1e-2), is_kernel),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2, 0.9)}, by_rank
    ),
    "sgd, without a state": lambda: optax.sgd(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}
# One object of each, or each test would trace its steps anew.
OPTIMIZERS = {name: functools.cache(make) for name, make in _OPTIMIZERS.items()}


@functools.cache
def linen_state(tx, steps=0, wrap=dict):
    variables = Net().init(jax.random.key(1), X)
    state = State.create(
        apply_fn=NET.apply, params=wrap(variables["params"]), tx=tx, batch_stats=wrap(variables["batch_stats"])
    )
    for _ in range(steps):
        state, _ = linen_step(state)
    return state


def native(tx, seed=9):
    model = Native(rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def saved(path, tree):
    """Save a live tree with Orbax; gives the path back."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)
    return path


def on_host(tree):
    """The same tree with arrays of numpy."""
    return jax.tree.map(np.asarray, tree)
