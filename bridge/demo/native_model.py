"""The NNX half: the same network and the same training step, written as an NNX user writes them.

Law: nothing here imports Linen. Attribute names are this file's own choice; `RENAME` is the one place that
says which Linen module each of them was.
"""

from __future__ import annotations

import jax

import nnx_core as nnx
from bridge.demo.task import DROPOUT_RATE, cross_entropy

RENAME = {
    "Conv_0": "conv1",
    "BatchNorm_0": "bn1",
    "Conv_1": "conv2",
    "BatchNorm_1": "bn2",
    "Dense_0": "hidden",
    "Dense_1": "head",
}


class DigitsNet(nnx.Module):
    """`float32[batch, 8, 8, 1]` -> logits `float32[batch, 10]`."""

    def __init__(self, dropout_rate: float = DROPOUT_RATE, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.bn2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        x = nnx.relu(self.bn2(self.conv2(x), use_running_average=not train))
        x = x.reshape((x.shape[0], -1))
        x = nnx.relu(self.hidden(x))
        x = self.dropout(x, deterministic=not train)
        return self.head(x)


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """One step, in place; returns the loss."""

    def loss_fn(model: nnx.Module) -> jax.Array:
        return cross_entropy(model(images, train=True), labels)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss
