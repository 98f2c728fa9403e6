"""Dropout.

Law: equal keys give equal masks and equal bits to flax.linen's. Evaluation draws no key.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from nnx_core.graph.objects import data
from nnx_core.module import Module
from nnx_core.nn._axes import as_tuple
from nnx_core.nn._errors import InputDtypeError, MissingRngsError, next_key
from nnx_core.nn._flags import choose_flag, set_flags
from nnx_core.nn._options import probability
from nnx_core.rngs import Rngs, RngStream


def _axes_of(inputs: jax.Array, shape: Sequence[int]) -> NamedSharding | None:
    """The explicit mesh axes of `inputs`, for a mask of this shape: each device makes its part of it."""
    sharding = jax.typeof(inputs).sharding
    if not any(sharding.spec) or sharding.mesh != jax.sharding.get_abstract_mesh():
        return None  # automatic axes are unknown here; without a mesh around it JAX makes nothing on one
    spec = [None if size == 1 else axes for size, axes in zip(shape, sharding.spec, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


class Dropout(Module):
    """Zeroes each value with probability `rate` and divides the others by 1 - rate, so the mean stays.

    Srivastava et al. 2014 (https://jmlr.org/papers/v15/srivastava14a.html). The layer forks its own stream
    from `rngs` (state paths `rngs/key`, `rngs/count`): it draws a key a call in training, none in evaluation.

    Args:
      rate: probability to drop a value, in [0, 1].
      broadcast_dims: axes along which the mask is the same.
      deterministic: True returns the input as it is; False drops; None leaves it to the call.
      rng_collection: the stream of `rngs` to draw from.
      rngs: an Rngs, a stream, or None if each call brings its own.

    Raises:
      OptionError: `rate` is outside [0, 1].
      MissingRngsError: `rngs` is none of the above.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
    >>> sorted(set(layer(jnp.ones(100)).tolist()))
    [0.0, 2.0]
    >>> layer.eval()
    >>> layer(jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: Rngs | RngStream | None = None,
    ):
        self.rate = probability(self, "rate", rate)
        self.broadcast_dims = as_tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.rngs: RngStream | None = data(self._own_stream(rngs))

    def _own_stream(self, rngs: Rngs | RngStream | None) -> RngStream | None:
        if isinstance(rngs, Rngs):
            rngs = rngs[self.rng_collection]
        if isinstance(rngs, RngStream):
            return rngs.fork()
        if rngs is not None:
            raise MissingRngsError(
                "Dropout(..., rngs=...)", "an nnx.Rngs, RngStream or None", rngs, "Write rngs=nnx.Rngs(0)."
            )
        return None

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Apply the layer.

        Args:
          inputs: floating or complex, any shape.
          deterministic: goes before the layer's own.
          rngs: an Rngs, a stream, or a key to use as it is; goes before the layer's own.

        Returns:
          Shape and dtype of `inputs`.

        Raises:
          MissingFlagError: `deterministic` is None here and in the layer.
          MissingRngsError: a key is needed, and there is no source of one.
          InputDtypeError: `inputs` are integers, which cannot be divided by 1 - rate.
        """
        if choose_flag(self, "deterministic", deterministic, self.deterministic) or self.rate == 0:
            return inputs
        inputs = jnp.asarray(inputs)
        if self.rate == 1:  # no key is drawn, and 0 / 0 would make a NaN of the gradient
            return jnp.zeros_like(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.inexact):
            raise InputDtypeError(self, "floating or complex", inputs.dtype, "Cast it: inputs.astype(float).")
        shape = list(inputs.shape)
        for axis in self.broadcast_dims:
            shape[axis] = 1
        keep = 1 - self.rate
        key = next_key(self, rngs, self.rng_collection)
        mask = jax.random.bernoulli(key, keep, tuple(shape), out_sharding=_axes_of(inputs, shape))
        if mask.shape == inputs.shape:
            return lax.select(mask, inputs / keep, jnp.zeros_like(inputs))
        return jnp.where(mask, inputs / keep, jnp.zeros_like(inputs))

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` sets.

        Args:
          deterministic: True returns inputs as they are, False drops, None leaves it as it is.
        """
        set_flags(self, deterministic=deterministic)
