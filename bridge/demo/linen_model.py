"""The Linen half: the network, its TrainState and its training step, written as Linen users write them.

Law: nothing here knows that NNX exists. This is the code a team has before it starts to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from bridge.demo.task import DROPOUT_RATE, Batch, cross_entropy

IMAGE_SHAPE = (1, 8, 8, 1)


class Cnn(nn.Module):
    """`float32[batch, 8, 8, 1]` -> logits `float32[batch, 10]`."""

    dropout_rate: float = DROPOUT_RATE

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(32, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Conv(64, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(64)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """Step, params and optimizer state, and the running statistics of BatchNorm."""

    batch_stats: Any


def adamw(steps: int) -> optax.GradientTransformation:
    """AdamW whose rate falls along a cosine over `steps` steps to a tenth, where it stays."""
    return optax.adamw(optax.cosine_decay_schedule(3e-3, steps, alpha=0.1), weight_decay=1e-3)


def fresh_state(tx: optax.GradientTransformation, *, seed: int) -> TrainState:
    """A TrainState at step 0, on initial values that depend on `seed` alone."""
    model = Cnn()
    variables = model.init(jax.random.key(seed), jnp.zeros(IMAGE_SHAPE), train=False)
    return TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
    )


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step; `key` drives the dropout of this step."""
    key = jax.random.fold_in(key, state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return cross_entropy(logits, labels), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def train(
    state: TrainState,
    steps: Iterable[Batch],
    *,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[TrainState, list[float]]:
    """Train over the batches; returns the last state and the loss of each step."""
    key, losses = jax.random.key(seed), []
    for images, labels in steps:
        state, loss = train_step(state, images, labels, key)
        losses.append(float(loss))
        on_step(losses[-1])
    return state, losses


def save(state: TrainState, directory: Path) -> None:
    """Write the whole TrainState to `directory`, which must not exist, in Orbax's standard layout."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), state)


def restore(directory: Path, like: TrainState) -> TrainState:
    """Read the TrainState back as a Linen user does: into the structure of `like`."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
