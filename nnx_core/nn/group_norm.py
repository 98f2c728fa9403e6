"""Normalization of each example: over groups of channels, or over each channel alone.

Law: the numbers are flax.linen's (`statistics`): inputs are never rounded before their statistics are taken.
Axis 0 is the batch; nothing is ever averaged over it unless `reduction_axes` says so.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.nn import dtypes, statistics
from nnx_core.nn._axes import Axes, hashable
from nnx_core.nn._errors import OptionError, require_rngs
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, ones, zeros
from nnx_core.nn.norm_base import Norm
from nnx_core.rngs import Rngs


class GroupNorm(Norm):
    """Normalizes each example over groups of channels (Wu & He 2018, https://arxiv.org/abs/1803.08494).

    `scale` and `bias` are Params of shape `(num_features,)` or None. LayerNorm over all axes but the first is
    the case of one group, InstanceNorm that of one channel a group.

    Args:
      num_features: number of channels, the size of the last axis.
      num_groups: into how many groups of neighbours the channels are divided.
      group_size: channels of a group, in place of `num_groups`, which must be None then.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init: as in LayerNorm.
      reduction_axes: axes the statistics are taken over, the last one among them (None: all but the first).
      axis_name: average the statistics over this mapped axis too: needed where positions are sharded.
      axis_index_groups, use_fast_variance, promote_dtype, rngs, bias_metadata, scale_metadata: as in LayerNorm.

    Raises:
      OptionError: `num_groups` and `group_size` are both given, or neither, or do not divide the channels.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3)
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
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
        self.num_groups, self.group_size = _groups(self, self.num_features, num_groups, group_size)
        self._nnx_keep_averaging(axis_name, axis_index_groups, use_fast_variance)
        self._nnx_make_scale(rngs, use_scale, scale_init, scale_metadata)
        self._nnx_make_bias(rngs, use_bias, bias_init, bias_metadata)
        self.feature_axis, self.reduction_axes = -1, hashable(reduction_axes)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: `[batch, ..., num_features]`; `[num_features]` is one example.
          mask: broadcasts to `x`; where it is true, a value counts in the statistics. All are normalized.

        Returns:
          Shape of `x`, in `dtype`, or the dtype promoted from x, scale and bias.

        Raises:
          InputShapeError: the last axis does not fit, or an axis of `reduction_axes` does not exist.
          OptionError: the last axis is not among `reduction_axes`.
        """
        x = jnp.asarray(x)
        features = statistics.checked_axes(self, x.shape, (-1,), self.num_features)
        others = self._reduced_positions(x.shape)
        x, scale, bias = statistics.promote(self, x, *statistics.values(self))
        grouped = (*x.shape[:-1], self.num_groups, self.group_size)
        if mask is not None:
            mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape).reshape(grouped)
        of_groups = statistics.moments(self, x.reshape(grouped), (*others, x.ndim), mask)
        of_channels = [jnp.repeat(moment, self.group_size, axis=-1) for moment in of_groups]
        mean, var = (jnp.expand_dims(moment, others) for moment in of_channels)
        return statistics.normalize(self, x, mean, var, scale, bias, statistics.broadcastable(x.shape, features))

    def _reduced_positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes the statistics are taken over, without that of the channels."""
        last = len(shape) - 1
        if self.reduction_axes is None:
            return tuple(range(1, last))
        axes = statistics.checked_axes(self, shape, self.reduction_axes, None)
        if last not in axes:
            raise OptionError(
                self,
                "reduction_axes",
                f"axes with -1 or {last}, the last one, among them: a group is channels",
                self.reduction_axes,
                "Add -1. To normalize without groups, use nnx.LayerNorm(reduction_axes=..., feature_axes=...).",
            )
        return tuple(axis for axis in axes if axis != last)


class InstanceNorm(Norm):
    """Normalizes each channel of each example (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022).

    Statistics are taken over all axes but the first, the batch, and those of the features. `scale` and `bias`
    are Params of shape `(num_features,)` or None.

    Args:
      num_features: size of the feature axis; of several axes, the product.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init: as in LayerNorm.
      feature_axes: axes along which statistics, scale and bias differ; not the first.
      axis_name: average the statistics over this mapped axis too: needed where positions are sharded.
      axis_index_groups, use_fast_variance, promote_dtype, rngs, bias_metadata, scale_metadata: as in LayerNorm.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[[1.0, 7.0], [3.0, 5.0]]])).round(3).tolist()
    [[[-1.0, 1.0], [1.0, -1.0]]]
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
        self.feature_axes = hashable(feature_axes)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: `[batch, ...]` with `num_features` along `feature_axes`.
          mask: broadcasts to `x`; where it is true, a value counts in the statistics. All are normalized.

        Returns:
          Shape of `x`, in `dtype`, or the dtype promoted from x, scale and bias.

        Raises:
          InputShapeError: the feature axes do not exist, or do not fit scale and bias.
          OptionError: the first axis is among the feature axes.
        """
        x = jnp.asarray(x)
        scale, bias = statistics.values(self)
        # Without parameters there is nothing the features must fit, and flax.nnx takes any number.
        features = statistics.checked_axes(self, x.shape, self.feature_axes, statistics.features_of(scale, bias))
        if 0 in features:
            raise OptionError(
                self,
                "feature_axes",
                "axes other than the first, which is the batch",
                f"{self.feature_axes} with an input of shape {x.shape}",
                "Give the input a leading batch axis: x[None].",
            )
        axes = tuple(axis for axis in range(1, x.ndim) if axis not in features)
        return statistics.normalize_over(self, x, scale, bias, axes, features, mask)


def _groups(layer: GroupNorm, num_features: int, num_groups: int | None, group_size: int | None) -> tuple[int, int]:
    """(number of groups, channels of each)."""
    given: dict[str, Any] = {"num_groups": num_groups, "group_size": group_size}
    if (num_groups is None) == (group_size is None):
        raise OptionError(
            layer,
            "num_groups=..., group_size",
            "one of the two, the other None",
            given,
            "num_groups is 32 unless told: to give a group_size, pass num_groups=None.",
        )
    option, number = next((name, n) for name, n in given.items() if n is not None)
    number = hashable(number)
    if not isinstance(number, int) or number < 1 or num_features % number:
        raise OptionError(
            layer,
            option,
            f"a divisor of num_features={num_features}",
            number,
            "Each group has the same number of channels; choose one of "
            f"{[n for n in range(1, num_features + 1) if num_features % n == 0]}.",
        )
    return (number, num_features // number) if option == "num_groups" else (num_features // number, number)
