"""Initial values: functions (key, shape, dtype) -> array, by flax.nnx's names.

Law: the functions are JAX's own, so the same key gives the numbers it gives everywhere.
"""

from jax.nn.initializers import (
    Initializer,
    constant,
    delta_orthogonal,
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    normal,
    ones,
    orthogonal,
    truncated_normal,
    uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
    zeros,
)
from jax.typing import DTypeLike as DtypeLikeInexact

__all__ = [
    "DtypeLikeInexact",
    "Initializer",
    "constant",
    "default_bias_init",
    "default_embed_init",
    "default_kernel_init",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "ones_init",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
    "zeros_init",
]

default_kernel_init = lecun_normal()
default_embed_init = variance_scaling(1.0, "fan_in", "normal", out_axis=0)
default_bias_init = zeros


def zeros_init() -> Initializer:
    """The initializer that fills with zeros, whatever the key.

    >>> import jax
    >>> zeros_init()(jax.random.key(0), (2, 3)).sum().item()
    0.0
    """
    return zeros


def ones_init() -> Initializer:
    """The initializer that fills with ones, whatever the key.

    >>> import jax
    >>> ones_init()(jax.random.key(0), (2, 3)).sum().item()
    6.0
    """
    return ones
