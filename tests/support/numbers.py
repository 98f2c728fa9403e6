"""Inputs of tests, drawn by numpy: `jax.random` would compile a program for each shape while tests are collected."""

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed float32."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")
