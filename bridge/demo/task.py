"""The task: 1797 real handwritten digits, 8x8, that scikit-learn carries inside its wheel, and the loss.

Law: the split is fixed, so that every run and every machine measures accuracy on the same 360 images; the
order of the batches depends on the seed and nothing else; every side of the comparison uses this one loss.
Knows arrays; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
import optax

TEST_IMAGES = 360
SPLIT_SEED = 0
DROPOUT_RATE = 0.3

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Digits:
    """Images `float32[n, 8, 8, 1]` in [0, 1] and labels `int32[n]`, split once and for all."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """Read the images from scikit-learn and split them into 1437 for training and 360 for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = (raw.images / 16.0).astype(np.float32)[..., None]
    labels = raw.target.astype(np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    return Digits(images[train], labels[train], images[test], labels[test])


def batches(digits: Digits, *, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` training batches of `size` images; a new order each time all images have been seen."""
    rng = np.random.default_rng(seed)
    per_epoch = len(digits.train_labels) // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(len(digits.train_labels))
        chosen = order[(step % per_epoch) * size :][:size]
        yield digits.train_images[chosen], digits.train_labels[chosen]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of logits `float32[batch, 10]` against labels `int32[batch]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).mean())
