"""SpectralNorm: a layer whose weights have spectral norm 1.

Law: the numbers are flax.linen's, and so is what is stored: a call writes nothing into the layer (in flax.nnx it
overwrites the kernel), and into `batch_stats` only with `update_stats`.

What Linen keeps under keys `<layer>/<path>/u` is here at `batch_stats/<path>/u`:

  Linen  batch_stats/SpectralNorm_0/'Dense_0/kernel/u'          params/Dense_0/kernel
         batch_stats/'layer_instance/kernel/u' (at the top)     params/layer_instance/kernel
  here   batch_stats/kernel/u                                   layer_instance/kernel

and the same for `sigma`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import Path, show_path
from nnx_core.kinds import BatchStat, Param
from nnx_core.module import Module
from nnx_core.nn import substitute
from nnx_core.nn._errors import OptionError
from nnx_core.nn._flags import choose_flag
from nnx_core.nn._options import size
from nnx_core.nn.dtypes import Dtype, canonicalize_dtype
from nnx_core.nn.initializers import normal
from nnx_core.nn.weight_norm import l2_normalized
from nnx_core.rngs import Rngs


class SpectralNorm(substitute.Wrapper):
    """Calls a layer with w / sigma in place of w (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

    sigma, the largest singular value of w, comes from power iteration, which goes on from call to call. All
    Params of the layer with two or more axes are divided; one of more axes counts as the matrix
    `[product of the others, last]`. `batch_stats` is an nnx.Dict that has, at the path of each of these, the
    BatchStats `u` of shape `(1, last)`, the singular vector so far, and `sigma` of shape `()`.

    Args:
      layer_instance: the layer; it is held, not copied, and keeps its own values.
      n_steps: steps of power iteration a call.
      epsilon: added to the squared lengths of the vectors.
      dtype: the dtype of the divided parameters (None: promoted from parameter and sigma).
      param_dtype: the initial dtype of `u` and `sigma`.
      error_on_non_matrix: raise for a parameter of more than two axes.
      update_stats: whether calls keep what they found in `u` and `sigma`; `train()` and `eval()` of any module
        that holds this one set it (as `use_running_average`, which is its opposite).
      rngs: source of the initial `u`; the stream `params`, one key a parameter.

    Raises:
      OptionError: the layer is no module, `n_steps` is below 1, or a parameter is no matrix and shall be one.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = nnx.SpectralNorm(nnx.Linear(2, 2, rngs=rngs), n_steps=20, rngs=rngs)
    >>> layer.layer_instance.kernel[...] = jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> layer(jnp.eye(2)).round(3)
    Array([[1.  , 0.  ],
           [0.  , 0.25]], dtype=float32)
    >>> layer.batch_stats["kernel"]["sigma"][...].round(3)
    Array(4., dtype=float32)
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: Rngs,
    ):
        self._nnx_wrap(layer_instance, rngs, epsilon, dtype, param_dtype)
        self.n_steps, self.error_on_non_matrix = size(self, "n_steps", n_steps, least=1), error_on_non_matrix
        self.use_running_average = not update_stats
        self.batch_stats = substitute.mirror(
            ((*path, name), value) for path, v in self._chosen() for name, value in self._initial(path, v, rngs)
        )

    def __call__(self, x: jax.Array, update_stats: bool | None = None) -> jax.Array:
        """Call the layer with divided parameters.

        Args:
          x: of the layer.
          update_stats: goes before the layer's own.

        Returns:
          What the layer returns.

        Raises:
          OptionError: the layer has got a parameter that has no statistics.
          MissingFlagError: neither the call nor the layer says whether to update them.
        """
        own = None if self.use_running_average is None else not self.use_running_average
        update = choose_flag(self, "update_stats", update_stats, own)
        return substitute.call_with(self, lambda norm: norm._values(update), x)

    def _chosen(self) -> list[tuple[Path, Param]]:
        return substitute.parameters(self.layer_instance, lambda _, v: jnp.ndim(substitute.stored(v)) > 1)

    def _initial(self, path: Path, variable: Param, rngs: Rngs) -> list[tuple[str, BatchStat[Any]]]:
        shape = substitute.stored(variable).shape
        if len(shape) > 2 and self.error_on_non_matrix:
            raise OptionError(
                self,
                "error_on_non_matrix",
                "parameters of at most two axes",
                f"{show_path(path)} of shape {shape}",
                "Pass error_on_non_matrix=False to count it as a matrix [product of the other axes, last axis].",
            )
        u = normal()(rngs.params(), (1, shape[-1]), self.param_dtype)
        return [("u", BatchStat(u)), ("sigma", BatchStat(jnp.ones((), self.param_dtype)))]

    def _values(self, update: bool) -> list[tuple[Param, jax.Array]]:
        return [(variable, self._divided(path, variable, update)) for path, variable in self._chosen()]

    def _divided(self, path: Path, variable: Param, update: bool) -> jax.Array:
        statistics = substitute.mirrored(self.batch_stats, path)
        if statistics is None:
            raise OptionError(
                self,
                "layer_instance",
                "a layer with the parameters that it had when it was wrapped",
                f"{show_path(path)}, which has no statistics",
                "Wrap the layer once all of its parameters are there.",
            )
        value = substitute.stored(variable)
        matrix = value.reshape(-1, value.shape[-1])
        u = statistics["u"][...]
        for _ in range(self.n_steps):
            v = l2_normalized(jnp.matmul(u, matrix.T), (0, 1), self.epsilon)
            u = l2_normalized(jnp.matmul(v, matrix), (0, 1), self.epsilon)
        u, v = jax.lax.stop_gradient(u), jax.lax.stop_gradient(v)
        sigma = jnp.matmul(jnp.matmul(v, matrix), u.T)[0, 0]
        if update:
            statistics["u"].set_value(u)  # as in Linen, in the dtype that the arithmetic gives
            statistics["sigma"].set_value(sigma)
        y = (matrix / jnp.where(sigma != 0, sigma, 1)).reshape(value.shape)
        return jnp.asarray(y, canonicalize_dtype(y, dtype=self.dtype))
