"""What all norms share: the options they keep, and the scale and bias that follow the normalization.

Law: the scale draws its key before the bias, as in flax.linen. Knows no particular norm; the arithmetic is that
of `statistics`.
"""

from typing import Any

from nnx_core.kinds import Param
from nnx_core.module import Module
from nnx_core.nn._affine import Metadata, optional_param
from nnx_core.nn._axes import hashable
from nnx_core.nn._options import epsilon as checked_epsilon
from nnx_core.nn._options import size
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer
from nnx_core.rngs import Rngs


class Norm(Module):
    """Normalization, then `scale` and, of most norms, `bias`: Params of shape `(num_features,)` or None."""

    num_features: int
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    promote_dtype: PromoteDtypeFn
    axis_name: str | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    use_fast_variance: bool
    scale: Param | None
    bias: Param | None  # of those that have one

    def _nnx_keep_options(
        self,
        num_features: int,
        epsilon: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        promote_dtype: PromoteDtypeFn,
    ) -> None:
        self.num_features, self.epsilon = size(self, "num_features", num_features), checked_epsilon(self, epsilon)
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype

    def _nnx_keep_averaging(self, axis_name: str | None, axis_index_groups: Any, use_fast_variance: bool) -> None:
        self.axis_name, self.axis_index_groups = axis_name, hashable(axis_index_groups)
        self.use_fast_variance = use_fast_variance

    def _nnx_make_scale(self, rngs: Rngs, use_scale: bool, init: Initializer, metadata: Metadata) -> None:
        self.use_scale = use_scale
        self.scale = optional_param(use_scale, rngs, init, (self.num_features,), self.param_dtype, metadata)

    def _nnx_make_bias(self, rngs: Rngs, use_bias: bool, init: Initializer, metadata: Metadata) -> None:
        self.use_bias = use_bias
        self.bias = optional_param(use_bias, rngs, init, (self.num_features,), self.param_dtype, metadata)
