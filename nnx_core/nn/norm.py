"""Normalization over the batch, or over features: statistics, then scale and shift.

Law: the numbers are flax.linen's (`statistics`): inputs are never rounded before their statistics are taken.
flax.nnx rounds first: at mean 30, std 1, bfloat16 that is an error of 0.14 in values of at most 4.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.kinds import BatchStat
from nnx_core.nn import dtypes, statistics
from nnx_core.nn._axes import Axes, hashable
from nnx_core.nn._errors import require_rngs
from nnx_core.nn._flags import choose_flag, set_flags
from nnx_core.nn._options import share, size
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, ones, zeros
from nnx_core.nn.norm_base import Norm
from nnx_core.rngs import Rngs


class BatchNorm(Norm):
    """Normalizes each feature over the batch (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).

    In training (`use_running_average=False`) with the statistics of the batch, of which `mean` and `var` keep
    an exponential moving average; in evaluation with that average. `mean`, `var` are BatchStats of shape
    `(num_features,)` and dtype float32, `scale` and `bias` Params of that shape or None.

    Args:
      num_features: size of the feature axis; of several axes, the product.
      use_running_average: True in evaluation, False in training, None leaves it to the call. `train()` and
        `eval()` of any module that holds this one set it.
      axis: the feature axis, or several.
      momentum: share of the old average that stays.
      epsilon: added to the variance.
      dtype: the dtype of the result (None: promoted from input, scale and bias, as in Linen).
      param_dtype: the dtype of scale and bias.
      use_bias: whether to add a bias (beta).
      use_scale: whether to multiply by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: average the statistics over this mapped axis too (pmap, vmap, shard_map).
      axis_index_groups: groups of indices of that axis which average among themselves.
      use_fast_variance: E[x²] - E[x]² in one pass, instead of E[(x - E[x])²] in two; it cancels where
        |mean| >> std (Chan, Golub & LeVeque 1983).
      promote_dtype: the default rounds nothing but the result. Another function is called with
        `(inputs, mean, var, scale, bias)` and `dtype`, and what it returns is used in their place.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.0, 4.0], [3.0, 4.0]])
    >>> layer(x).round(3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    >>> layer.mean[...].tolist(), layer.var[...].tolist()
    ([1.0, 2.0], [1.0, 0.5])
    >>> layer.eval()
    >>> layer(x)[0].round(3)
    Array([0.   , 2.828], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        # float32 whatever param_dtype is: 1 - momentum is below the resolution of bfloat16.
        num_features = size(self, "num_features", num_features)
        self.mean = BatchStat(jnp.zeros(num_features, jnp.float32))
        self.var = BatchStat(jnp.ones(num_features, jnp.float32))
        self._nnx_keep_options(num_features, epsilon, dtype, param_dtype, promote_dtype)
        self._nnx_keep_averaging(axis_name, axis_index_groups, use_fast_variance)
        self._nnx_make_scale(rngs, use_scale, scale_init, scale_metadata)
        self._nnx_make_bias(rngs, use_bias, bias_init, bias_metadata)
        self.use_running_average = use_running_average
        fix = "It is the share of the old average that stays: 0.9 to 0.999 are usual."
        self.axis, self.momentum = hashable(axis), share(self, "momentum", momentum, "a number in [0, 1]", fix)

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Apply the layer; in training, move the running averages.

        Args:
          x: any shape with `num_features` along `axis`.
          use_running_average: goes before the layer's own.
          mask: broadcasts to `x`; where it is true, a value counts in the statistics. All are normalized.

        Returns:
          Shape of `x`, in `dtype`, or the dtype promoted from x, scale and bias.

        Raises:
          MissingFlagError: `use_running_average` is None here and in the layer.
          InputShapeError: the feature axis does not exist or does not fit.
        """
        evaluate = choose_flag(self, "use_running_average", use_running_average, self.use_running_average)
        x = jnp.asarray(x)
        running_mean, running_var = self.mean[...], self.var[...]
        feature_axes = statistics.checked_axes(self, x.shape, self.axis, running_mean.shape[0])
        axes = tuple(i for i in range(x.ndim) if i not in feature_axes)
        scale, bias = statistics.values(self)
        x, mean, var, scale, bias = statistics.promote(self, x, running_mean, running_var, scale, bias)
        if not evaluate:
            mean, var = statistics.moments(self, x, axes, mask)
            stored = running_mean.shape
            keep, move = self.momentum, 1 - self.momentum
            new_mean = keep * running_mean + move * mean.reshape(stored)
            if jnp.iscomplexobj(new_mean):
                self.mean.set_value(new_mean)  # as Linen: the first complex input makes the average complex
            else:
                self.mean[...] = new_mean
            self.var[...] = keep * running_var + move * var.reshape(stored)
        shape = statistics.broadcastable(x.shape, feature_axes)
        sizes = [x.shape[axis] for axis in feature_axes]
        mean, var = (jnp.expand_dims(moment.reshape(sizes), axes) for moment in (mean, var))
        return statistics.normalize(self, x, mean, var, scale, bias, shape)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets.

        Args:
          use_running_average: True in evaluation, False in training, None leaves it as it is.
        """
        set_flags(self, use_running_average=use_running_average)


class LayerNorm(Norm):
    """Normalizes each example over its features (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    `scale` and `bias` are Params of shape `(num_features,)` or None.

    Args:
      num_features: size of the feature axis; of several axes, the product.
      epsilon: added to the variance.
      dtype: the dtype of the result (None: promoted from input, scale and bias).
      param_dtype: the dtype of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axes the statistics are taken over.
      feature_axes: axes along which scale and bias differ.
      axis_name: average the statistics over this mapped axis too: needed where features are sharded.
      axis_index_groups: groups of indices of that axis which average among themselves.
      use_fast_variance: E[x²] - E[x]² in one pass, instead of E[(x - E[x])²] in two; it cancels where
        |mean| >> std (Chan, Golub & LeVeque 1983).
      promote_dtype: the default rounds nothing but the result. Another function is called with
        `(inputs, scale, bias)` and `dtype`, and what it returns is used in their place.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 2.0, 3.0], [6.0, 6.0, 6.0]])).round(3)
    Array([[-1.225,  0.   ,  1.225],
           [ 0.   ,  0.   ,  0.   ]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(num_features, epsilon, dtype, param_dtype, promote_dtype)
        self._nnx_keep_averaging(axis_name, axis_index_groups, use_fast_variance)
        self._nnx_make_scale(rngs, use_scale, scale_init, scale_metadata)
        self._nnx_make_bias(rngs, use_bias, bias_init, bias_metadata)
        self.reduction_axes, self.feature_axes = hashable(reduction_axes), hashable(feature_axes)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: any shape with `num_features` along `feature_axes`.
          mask: broadcasts to `x`; where it is true, a value counts in the statistics. All are normalized.

        Returns:
          Shape of `x`, in `dtype`, or the dtype promoted from x, scale and bias.

        Raises:
          InputShapeError: an axis does not exist, or the feature axes do not fit scale and bias.
        """
        x = jnp.asarray(x)
        scale, bias = statistics.values(self)
        # Without parameters there is nothing the features must fit, and flax.nnx takes any number.
        features = statistics.checked_axes(self, x.shape, self.feature_axes, statistics.features_of(scale, bias))
        axes = statistics.checked_axes(self, x.shape, self.reduction_axes, None)
        return statistics.normalize_over(self, x, scale, bias, axes, features, mask)
