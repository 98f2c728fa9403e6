"""Layers with the first generation's signature: `ctx=` in place of `rngs=`.

Law: arithmetic and parameters are those of the layer in `nnx_core.nn`, key for key.
"""

from typing import Any

from nnx_core.legacy._errors import ContextError
from nnx_core.legacy.context import Context
from nnx_core.legacy.module import Module
from nnx_core.nn import linear


class Linear(linear.Linear, Module):
    """y = x @ kernel + bias over the last axis, both of collection 'params'.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      ctx: source of the initial values; the stream `params`.
      **options: those of `nnx_core.Linear` (use_bias, dtype, kernel_init, ...).

    Raises:
      ContextError: if `ctx` is no Context.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> import jax.numpy as jnp
      >>> layer = nnx.Linear(3, 4, ctx=nnx.Context(0))
      >>> layer(jnp.ones((2, 3))).shape, list(layer.filter("params"))
      ((2, 4), [('bias',), ('kernel',)])
    """

    def __init__(self, in_features: int, out_features: int, *, ctx: Context, **options: Any):
        if not isinstance(ctx, Context):
            raise ContextError(type(self).__name__, ctx)
        super().__init__(in_features, out_features, rngs=ctx.rngs, **options)
