"""Inputs of tests. Arrays of numpy: a module that is imported computes nothing with JAX yet."""

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed float32."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")
