"""From disk, three ways, and what each way computes.

Law: every figure is compared with Linen's under Linen's own paths, and is equal only if every bit is: a
shape, a dtype, a NaN or the sign of a zero that differs is a difference.
Both sides are compiled whole (`jax.jit`, `nnx.jit`), so that XLA sees the same arithmetic on both.
Knows the models and the bridge; knows nothing of tables, files or exit codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.serialization import to_state_dict

import bridge
import nnx_core as nnx
from bridge import checkpoint
from bridge.demo import linen_model, native_model
from bridge.demo.native_model import RENAME, DigitsNet
from bridge.demo.task import DROPOUT_RATE, Batch, Digits, cross_entropy
from bridge.equivalence.compare import compare
from bridge.equivalence.numbers import Difference, difference
from bridge.equivalence.report import Report

Tensors = dict[tuple[str, ...], np.ndarray]

TO_NNX = "ToNNX(Linen)"
NATIVE = "native nnx_core"
TO_LINEN = "ToLinen(native)"
RULES = checkpoint.Rules.from_rename(RENAME)


_MISSING = Difference(math.inf, 0.0, None, 0.0, False, "on one side alone")


def differences(found: Tensors, expected: Tensors) -> dict[tuple[str, ...], Difference]:
    """Compare two trees path by path; a path that only one of them has is infinitely far."""
    return {
        path: difference(found[path], expected[path]) if path in found and path in expected else _MISSING
        for path in sorted(found.keys() | expected.keys())
    }


def tensors(tree: Any, rename: Mapping[str, str] | None = None) -> Tensors:
    """Flatten nested mappings to {path: array}; `rename` (Linen's names to those in `tree`) is undone."""
    back = {name: linen_name for linen_name, name in (rename or {}).items()}
    flat: Tensors = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Mapping):
            below = [((*path, back.get(str(key), str(key))), child) for key, child in node.items()]
            pending.extend(reversed(below))
        elif node is not None:
            flat[path] = np.asarray(node)
    return flat


# ------------------------------------------------------------------------------------------- the three ways


def wrapped(directory: Path, dropout_rate: float = DROPOUT_RATE) -> nnx.Module:
    """The Linen model inside ToNNX, its values read from the checkpoint."""
    model = bridge.ToNNX(linen_model.Cnn(dropout_rate), rngs=nnx.Rngs(0))
    bridge.lazy_init(model, np.zeros(linen_model.IMAGE_SHAPE, np.float32), train=False)
    checkpoint.load_into(model, directory)
    return model


def native(directory: Path, dropout_rate: float = DROPOUT_RATE) -> nnx.Module:
    """The same network written in nnx_core, its values read from the checkpoint."""
    model = DigitsNet(dropout_rate, rngs=nnx.Rngs(0))
    checkpoint.load_into(model, directory, RULES)
    return model


def native_in_linen(directory: Path, dropout_rate: float = DROPOUT_RATE) -> tuple[nn.Module, dict[str, Any]]:
    """The native network as a Linen module, and its variables, read from the checkpoint."""
    saved = checkpoint.read_train_state(directory)
    variables = {
        collection: {RENAME[module]: values for module, values in tree.items()}
        for collection, tree in saved.variables.items()
    }
    return bridge.to_linen(DigitsNet, dropout_rate), variables


# --------------------------------------------------------------------------------------- what each computes


@dataclass(frozen=True)
class Measured:
    """What one model computes: logits `float32[360, 10]`, the gradient of each parameter by Linen path."""

    name: str
    logits: np.ndarray
    gradients: Tensors


def measure_linen(
    name: str,
    build: Callable[[float], tuple[nn.Module, Any]],
    digits: Digits,
    rename: Mapping[str, str] | None = None,
) -> Measured:
    """Logits as deployed; gradients in train mode with dropout off, as `build(0.0)` has it."""
    module, variables = build(DROPOUT_RATE)
    logits = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, digits.test_images)
    module, variables = build(0.0)

    @jax.jit
    def gradients(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = module.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels), updated

        return jax.grad(loss_fn, has_aux=True)(variables["params"])[0]

    found = gradients(variables, digits.test_images, digits.test_labels)
    return Measured(name, np.asarray(logits), tensors(found, rename))


def measure_nnx(
    name: str, build: Callable[[float], nnx.Module], digits: Digits, rename: Mapping[str, str] | None = None
) -> Measured:
    """Logits as deployed; gradients in train mode with dropout off, as `build(0.0)` has it."""
    logits = nnx.jit(lambda model, x: model(x, train=False))(build(DROPOUT_RATE), digits.test_images)

    @nnx.jit
    def gradients(model: nnx.Module, images: jax.Array, labels: jax.Array) -> Any:
        return nnx.grad(lambda model: cross_entropy(model(images, train=True), labels))(model)

    found = gradients(build(0.0), digits.test_images, digits.test_labels)
    return Measured(name, np.asarray(logits), tensors(nnx.to_pure_dict(found), rename))


def compare_layers(
    a: tuple[nn.Module, Any], ways: Mapping[str, tuple[Any, Any]], images: np.ndarray
) -> dict[str, Report]:
    """Each of `ways`, {name: (model, rules or None)}, against the Linen model `a`, layer by layer, in train mode.

    `images` are `float32[batch, 8, 8, 1]`. Dropout must be off: its masks are no two models' own.
    """
    return {name: compare(a, model, images, rules=rules, train=True) for name, (model, rules) in ways.items()}


# ---------------------------------------------------------------------------------------- training goes on


@dataclass(frozen=True)
class Continued:
    """More training: the loss of each step `float32[steps]`, and where it ended, by Linen path."""

    name: str
    losses: np.ndarray
    params: Tensors
    batch_stats: Tensors
    opt_state: Tensors
    step: int


def continue_linen(state: linen_model.TrainState, steps: Iterable[Batch]) -> Continued:
    """Train on from a TrainState, dropout off."""
    state = state.replace(apply_fn=linen_model.Cnn(dropout_rate=0.0).apply)
    state, losses = linen_model.train(state, steps, seed=0)
    return Continued(
        "Linen",
        np.asarray(losses, np.float32),
        tensors(state.params),
        tensors(state.batch_stats),
        tensors(to_state_dict(state.opt_state)),
        int(state.step),
    )


def continue_native(directory: Path, tx: optax.GradientTransformation, steps: Iterable[Batch]) -> Continued:
    """Train on from the checkpoint in native nnx_core, optimizer state and step included, dropout off."""
    model = DigitsNet(dropout_rate=0.0, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    checkpoint.load_into(model, directory, RULES, optimizer=optimizer)
    losses = [float(native_model.train_step(model, optimizer, images, labels)) for images, labels in steps]
    trained = nnx.to_pure_dict(nnx.state(optimizer))
    return Continued(
        NATIVE,
        np.asarray(losses, np.float32),
        tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), RENAME),
        tensors(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), RENAME),
        tensors(trained["opt_state"], RENAME),
        int(trained["step"]),
    )
