"""Arrays that test modules keep as constants: made by numpy, put on the device, never computed there.

Law: importing a test module compiles nothing. `jnp.arange` or `jax.random.normal` at the top of a file costs every
worker its compilation while tests are only collected; so does `jnp.asarray`, for each new shape.
"""

import jax
import numpy as np


def ramp(*shape: int, over: float = 1) -> jax.Array:
    """0, 1, 2, ... in float32, divided by `over`."""
    steps = np.arange(np.prod(shape), dtype=np.float32)
    return jax.device_put(steps.reshape(shape) / np.float32(over))


def ones(*shape: int, dtype: object = np.float32) -> jax.Array:
    return jax.device_put(np.ones(shape, dtype))


def noise(seed: int, *shape: int, mean: float = 0) -> jax.Array:
    """Normal numbers of variance 1 in float32, the same for the same seed."""
    return jax.device_put(np.random.default_rng(seed).normal(mean, size=shape).astype(np.float32))


def key(seed: int) -> jax.Array:
    """`jax.random.key(seed)`, without the program that makes it of the seed: threefry's two words."""
    return _of_words([0, seed])


def keys(*seeds: int) -> jax.Array:
    return _of_words([(0, seed) for seed in seeds])


def _of_words(words: list) -> jax.Array:
    return jax.random.wrap_key_data(jax.device_put(np.array(words, np.uint32)), impl="threefry2x32")
