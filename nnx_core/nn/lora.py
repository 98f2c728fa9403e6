"""LoRA: a trained low-rank addition to a layer that stays as it is.

Law: the addition is x @ lora_a @ lora_b, in this order, and zero at the start. Linen has no such layer: numbers,
names and initial values are flax.nnx's.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.kinds import Param
from nnx_core.module import Module
from nnx_core.nn import dtypes
from nnx_core.nn._affine import new_param
from nnx_core.nn._errors import InputShapeError, OptionError, require_rngs
from nnx_core.nn._options import size, sizes
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, he_uniform, zeros
from nnx_core.nn.linear import Linear
from nnx_core.rngs import Rngs
from nnx_core.variables import A, Variable


class LoRAParam(Param[A]):
    """A parameter of a low-rank addition: `wrt=nnx.LoRAParam` trains these alone."""

    __slots__ = ()


default_a_initializer = he_uniform()
default_b_initializer = zeros


class LoRA(Module):
    """y = x @ lora_a @ lora_b, plus the output of another layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `lora_a` is a LoRAParam of shape `(in_features, lora_rank)`, `lora_b` one of `(lora_rank, out_features)`. The
    alpha / rank of the paper is left to the learning rate, as in flax.nnx.

    Args:
      in_features: size of the last axis of the input.
      lora_rank: size of the axis between the two.
      out_features: size of the last axis of the output.
      base_module: what to add the output of: a module or function of the same input. As in flax.nnx it gets the
        input in the dtype of the products, so a `dtype` of half precision rounds its input too.
      dtype: the dtype of the products (None: promoted from input and parameters).
      param_dtype: the dtype of the parameters.
      a_initializer: initializer of `lora_a`.
      b_initializer: initializer of `lora_b`; with zeros, the layer starts as `base_module`.
      lora_param_type: the type of both parameters.
      promote_dtype: called with `(inputs, lora_a, lora_b)` and `dtype`; returns them in one dtype.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      a_metadata: metadata of `lora_a`.
      b_metadata: metadata of `lora_b`.

    Raises:
      OptionError: `lora_rank` is below 1, or `base_module` cannot be called.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> layer = nnx.LoRA(3, 2, 4, base_module=base, rngs=nnx.Rngs(1))
    >>> layer.lora_a.shape, layer.lora_b.shape
    ((3, 2), (2, 4))
    >>> x = jnp.ones((5, 3))
    >>> bool((layer(x) == base(x)).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Module | Callable[..., jax.Array] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        in_features, out_features = sizes(self, in_features=in_features, out_features=out_features)
        lora_rank = size(self, "lora_rank", lora_rank, least=1)
        if base_module is not None and not callable(base_module):
            raise OptionError(
                self, "base_module", "something to call", type(base_module).__name__, "Give the module a __call__."
            )
        self.in_features, self.out_features, self.base_module = in_features, out_features, base_module
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.lora_param_type = lora_param_type
        shape_a, shape_b = (in_features, lora_rank), (lora_rank, out_features)
        self.lora_a = new_param(rngs, a_initializer, shape_a, param_dtype, a_metadata, lora_param_type)
        self.lora_b = new_param(rngs, b_initializer, shape_b, param_dtype, b_metadata, lora_param_type)

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Apply the layer.

        Args:
          x: `[..., in_features]`, any dtype.
          **kwargs: of `base_module`; without one, ignored.

        Returns:
          `[..., out_features]`, in `dtype` (or the dtype promoted from x and parameters), promoted further by
          the output of `base_module`.

        Raises:
          InputShapeError: the last axis does not fit `lora_a`.
        """
        a, b = self.lora_a[...], self.lora_b[...]
        if jnp.ndim(x) < 1 or jnp.shape(x)[-1] != a.shape[0]:
            raise InputShapeError(
                self,
                f"(..., {a.shape[0]})",
                jnp.shape(x),
                "Give the layer the in_features of its input; features are on the last axis.",
            )
        x, a, b = self.promote_dtype((x, a, b), dtype=self.dtype)
        y: jax.Array = x @ a @ b
        return y if self.base_module is None else y + self.base_module(x, **kwargs)


class LoRALinear(Linear):
    """An nnx.Linear with a low-rank addition: y = x @ kernel + bias + x @ lora.lora_a @ lora.lora_b.

    `kernel` and `bias` are where Linear has them, so its states and checkpoints fit; the addition is in `lora`.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      lora_rank: see `nnx.LoRA`, as for all that follow.
      lora_dtype: its `dtype`.
      lora_param_dtype: its `param_dtype`.
      a_initializer: initializer of `lora.lora_a`.
      b_initializer: initializer of `lora.lora_b`.
      lora_param_type: the type of both.
      lora_promote_dtype: its `promote_dtype`.
      rngs: source of the initial values: kernel, bias, lora_a, lora_b.
      a_metadata: metadata of `lora.lora_a`.
      b_metadata: metadata of `lora.lora_b`.
      **kwargs: of `nnx.Linear`.

    Raises:
      OptionError: `lora_rank` is below 1.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer.lora.lora_a.shape
    ((3, 4), (3, 2))
    >>> x = jnp.ones((5, 3))
    >>> bool((layer(x) == nnx.Linear(3, 4, rngs=nnx.Rngs(0))(x)).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: Dtype | None = None,
        lora_param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        lora_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        numerics = {"dtype": lora_dtype, "param_dtype": lora_param_dtype, "promote_dtype": lora_promote_dtype}
        a = {"a_initializer": a_initializer, "a_metadata": a_metadata}
        b = {"b_initializer": b_initializer, "b_metadata": b_metadata}
        parts: dict[str, Any] = {**numerics, **a, **b, "lora_param_type": lora_param_type}
        self.lora = LoRA(in_features, lora_rank, out_features, rngs=rngs, **parts)

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: `[..., in_features]`, any dtype.
          out_sharding: of the product with the kernel, in JAX's explicit sharding mode.

        Returns:
          `[..., out_features]`, in the dtype promoted from Linear's and LoRA's.

        Raises:
          InputShapeError: the last axis does not fit the kernel.
        """
        y = super().__call__(x, out_sharding=out_sharding)
        return y + self.lora(x)
