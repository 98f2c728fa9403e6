"""Kernels, scales and biases: how layers make their parameters, and what layers with a kernel share.

Law: a parameter draws one key of the stream `params`, and one that is not wanted draws none: the order of the
calls is the order of the keys. Knows no particular layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax

from nnx_core.graph.objects import data
from nnx_core.kinds import Param
from nnx_core.module import Module
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer
from nnx_core.rngs import Rngs
from nnx_core.variables import Variable

Metadata = Mapping[str, Any]


def new_param(
    rngs: Rngs,
    init: Initializer,
    shape: Sequence[int],
    dtype: Dtype,
    metadata: Metadata,
    kind: type[Variable[Any]] = Param,
) -> Any:
    """A Param, or Variable of another kind, of this shape and dtype, from one key of `rngs.params`."""
    return kind(init(rngs.params(), shape, dtype), **metadata)


def optional_param(
    wanted: bool, rngs: Rngs, init: Initializer, shape: Sequence[int], dtype: Dtype, metadata: Metadata
) -> Param | None:
    """`new_param` for an attribute of a layer, or None, which draws no key."""
    # `data`: without a parameter the attribute stays a place where a Param may be put later.
    return data(new_param(rngs, init, shape, dtype, metadata) if wanted else None)


class KernelLayer(Module):
    """A layer whose result is a product of its input with `kernel`, and perhaps a `bias`."""

    kernel: Param
    bias: Param | None
    dtype: Dtype | None
    param_dtype: Dtype
    precision: lax.PrecisionLike
    promote_dtype: PromoteDtypeFn
    preferred_element_type: Dtype | None  # of those that have one

    def _nnx_keep_numerics(
        self, dtype: Dtype | None, param_dtype: Dtype, precision: lax.PrecisionLike, promote_dtype: PromoteDtypeFn
    ) -> None:
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision, self.promote_dtype = precision, promote_dtype

    def _nnx_product_options(self, out_sharding: Any) -> dict[str, Any]:
        """Keyword arguments of the product."""
        options: dict[str, Any] = {"precision": self.precision, "out_sharding": out_sharding}
        if self.preferred_element_type is not None:  # else left out: a product of the user's need not take it
            options["preferred_element_type"] = self.preferred_element_type
        return options
