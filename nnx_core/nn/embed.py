"""Embedding tables.

Law: looking up and attending are one table read two ways; numbers and dtypes are flax.linen's.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.module import Module
from nnx_core.nn import dtypes
from nnx_core.nn._affine import new_param
from nnx_core.nn._errors import InputDtypeError, InputShapeError, require_rngs
from nnx_core.nn._options import sizes
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_embed_init
from nnx_core.rngs import Rngs


class Embed(Module):
    """A vector for each integer in [0, num_embeddings).

    `embedding` is a Param of shape `(num_embeddings, features)`. Integers from -num_embeddings to -1 count
    from the end; others out of range give NaN. A table of one row answers every integer with that row.

    Args:
      num_embeddings: number of rows.
      features: size of a vector.
      dtype: the dtype of the result (None: the table's; in `attend`, promoted from query and table).
      param_dtype: the dtype of the table.
      embedding_init: initializer of the table.
      promote_dtype: called with `(embedding,)` or, in `attend`, `(query, embedding)`, and `dtype`; the lookup
        also passes `inexact=False`.
      rngs: source of the initial values; one key of the stream `params`.
      embedding_metadata: metadata of the table.

    Raises:
      OptionError: a size is no whole number.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> table = nnx.Embed(26, 2, rngs=nnx.Rngs(0))
    >>> word = jnp.array([2, 0, 19])
    >>> table(word).shape, bool((table(word - 26) == table(word)).all())
    ((3, 2), True)
    >>> table.attend(table(word)).shape
    (3, 26)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        num_embeddings, features = sizes(self, num_embeddings=num_embeddings, features=features)
        shape = (num_embeddings, features)
        self.embedding = new_param(rngs, embedding_init, shape, param_dtype, embedding_metadata)
        self.num_embeddings, self.features = num_embeddings, features
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The vectors of `inputs`.

        Args:
          inputs: integers of any shape.
          out_sharding: of the result, in JAX's explicit sharding mode.

        Returns:
          `[*inputs.shape, features]`.

        Raises:
          InputDtypeError: `inputs` are not integers.
        """
        if not jnp.issubdtype(jnp.result_type(inputs), jnp.integer):
            raise InputDtypeError(
                self, "integer or unsigned integer", jnp.result_type(inputs), "Cast it: inputs.astype(int)."
            )
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        if table.shape[0] == 1:
            rows = jnp.broadcast_to(table, (*jnp.shape(inputs), table.shape[1]))
            return rows if out_sharding is None else jax.sharding.reshard(rows, out_sharding)
        if out_sharding is None:
            return jnp.take(table, inputs, axis=0)
        return table.at[inputs].get(mode="fill", out_sharding=out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Inner products of `query` with every row: logits that share their weights with the lookup.

        Press & Wolf 2017 (https://arxiv.org/abs/1608.05859).

        Args:
          query: `[..., features]`.
          out_sharding: of the product, in JAX's explicit sharding mode.

        Returns:
          `[..., num_embeddings]`.

        Raises:
          InputShapeError: the last axis does not fit the table.
        """
        table = self.embedding[...]
        if jnp.ndim(query) < 1 or jnp.shape(query)[-1] != table.shape[1]:
            raise InputShapeError(
                self, f"(..., {table.shape[1]})", jnp.shape(query), "The last axis of a query holds features."
            )
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return jnp.dot(query, table.T, out_sharding=out_sharding)
