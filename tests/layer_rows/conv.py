"""Rows of the layers that slide a window, and of the combinators that call other layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from tests.twins import Layer


class BatchDense(linen.Module):
    """Linen's BatchApply is a function, not a module: this one holds what it calls."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.BatchApply(linen.Dense(5, dtype=self.dtype, param_dtype=self.param_dtype), num_dims=3)(x)


ROWS = (
    Layer(
        "ConvTranspose",
        make=lambda lib, rngs, **d: lib.ConvTranspose(4, 6, (3, 2), 2, rngs=rngs, **d),
        twin=lambda **d: linen.ConvTranspose(6, (3, 2), 2, **d),
        shape=(2, 3, 5, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
    ),
    Layer(
        "ConvLocal",
        make=lambda lib, rngs, **d: lib.ConvLocal(4, 6, (3, 2), 2, in_spatial_shape=(3, 5), rngs=rngs, **d),
        twin=lambda **d: linen.ConvLocal(6, (3, 2), 2, **d),
        shape=(2, 3, 5, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
        in_flax_nnx=False,
    ),
    Layer(
        "BatchApply",
        make=lambda lib, rngs, **d: lib.BatchApply(lib.Linear(4, 5, rngs=rngs, **d), num_dims=3),
        twin=lambda **d: BatchDense(**d),
        shape=(2, 3, 1, 4),
        params={"f/kernel": "params/Dense_0/kernel", "f/bias": "params/Dense_0/bias"},
        in_flax_nnx=False,
    ),
    Layer(
        "Sequential",
        make=lambda lib, rngs, **d: lib.Sequential(
            lib.Linear(4, 5, rngs=rngs, **d),
            lambda x: (x, 2.0),
            lambda x, factor: x * factor,
            lib.LayerNorm(5, rngs=rngs, **d),
        ),
        twin=lambda **d: linen.Sequential(
            [linen.Dense(5, **d), lambda x: (x, 2.0), lambda x, factor: x * factor, linen.LayerNorm(**d)]
        ),
        shape=(2, 3, 4),
        params={
            "layers/0/kernel": "params/layers_0/kernel",
            "layers/0/bias": "params/layers_0/bias",
            "layers/3/scale": "params/layers_3/scale",
            "layers/3/bias": "params/layers_3/bias",
        },
    ),
)
