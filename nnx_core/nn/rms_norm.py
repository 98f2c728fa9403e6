"""RMSNorm: division by the root mean square, without a mean.

Law: the numbers are flax.linen's (`statistics`): inputs are never rounded before their statistics are taken.
Subtracts no mean, where Linen subtracts zeros: the bits are the same.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.nn import dtypes, statistics
from nnx_core.nn._axes import Axes, hashable
from nnx_core.nn._errors import require_rngs
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, ones
from nnx_core.nn.norm_base import Norm
from nnx_core.rngs import Rngs


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + epsilon) * scale (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    `scale` is a Param of shape `(num_features,)` or None.

    Args:
      num_features: size of the feature axis; of several axes, the product.
      epsilon: added to the mean square.
      dtype: the dtype of the result (None: promoted from input and scale).
      param_dtype: the dtype of the scale.
      use_scale: whether to multiply by a scale.
      scale_init: initializer of the scale.
      reduction_axes: axes the mean square is taken over.
      feature_axes: axes along which the scale differs.
      axis_name: average the mean square over this mapped axis too: needed where features are sharded.
      axis_index_groups: groups of indices of that axis which average among themselves.
      use_fast_variance: changes nothing: without a mean, both ways of LayerNorm are this one.
      promote_dtype: the default rounds nothing but the result. Another function is called with
        `(inputs, scale)` and `dtype`, and what it returns is used in their place.
      rngs: source of the initial values; the stream `params`, one key.
      scale_metadata: metadata of the scale.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.RMSNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0.0, 4.0], [5.0, 5.0]])).round(3)
    Array([[0.   , 1.414],
           [1.   , 1.   ]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(num_features, epsilon, dtype, param_dtype, promote_dtype)
        self._nnx_keep_averaging(axis_name, axis_index_groups, use_fast_variance)
        self._nnx_make_scale(rngs, use_scale, scale_init, scale_metadata)
        self.reduction_axes, self.feature_axes = hashable(reduction_axes), hashable(feature_axes)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: any shape with `num_features` along `feature_axes`.
          mask: broadcasts to `x`; where it is true, a value counts in the mean square. All are normalized.

        Returns:
          Shape of `x`, in `dtype`, or the dtype promoted from x and scale.

        Raises:
          InputShapeError: an axis does not exist, or the feature axes do not fit the scale.
        """
        x = jnp.asarray(x)
        scale = None if self.scale is None else self.scale[...]
        features = statistics.checked_axes(self, x.shape, self.feature_axes, statistics.features_of(scale))
        axes = statistics.checked_axes(self, x.shape, self.reduction_axes, None)
        x, scale = statistics.promote(self, x, scale)
        square = jnp.expand_dims(statistics.mean_of_squares(self, x, axes, mask), axes)
        return statistics.normalize(self, x, None, square, scale, None, statistics.broadcastable(x.shape, features))
