"""WeightNorm: a layer whose weights are directions, times trained lengths.

Law: the numbers are flax.linen's, and so is what is stored: a call writes nothing into the layer, and the
scales are Params, which gradients and optimizers reach. (In flax.nnx a call overwrites the kernel, and the
scales are arrays that no optimizer sees.)

What Linen keeps under one key, `<layer>/<path>/scale`, is here a Param at `scales/<path>`:

  Linen  params/WeightNorm_0/'Dense_0/kernel/scale'             params/Dense_0/kernel
         params/'layer_instance/kernel/scale' (at the top)      params/layer_instance/kernel
  here   scales/kernel                                          layer_instance/kernel
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core import filters as filterlib
from nnx_core._errors import Path, show_path
from nnx_core.graph.objects import data
from nnx_core.kinds import Param
from nnx_core.module import Dict, Module
from nnx_core.nn import dtypes, statistics, substitute
from nnx_core.nn._axes import Axes, as_tuple, hashable
from nnx_core.nn._errors import OptionError
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn, canonicalize_dtype
from nnx_core.nn.initializers import Initializer, ones
from nnx_core.rngs import Rngs


class WeightNorm(substitute.Wrapper):
    """Calls a layer with w / |w| * scale in place of w (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    `scales` is an nnx.Dict of Params, one for each normalized parameter of the layer and at the same path; its
    shape is that of the feature axes. Without a scale, `scales` is None.

    Args:
      layer_instance: the layer; it is held, not copied, and keeps its own values.
      feature_axes: axes along which lengths differ: |w| is taken over all others (None: over all).
      use_scale: whether to multiply by a scale.
      scale_init: initializer of the scales.
      epsilon: added to |w|².
      dtype: the dtype of the normalized parameters (None: promoted from parameter and scale).
      param_dtype: the dtype of the scales.
      variable_filter: which Params of the layer are normalized, by path below the layer and value; an nnx filter.
      promote_dtype: the default rounds nothing but the result. Another function is called with
        `(parameter, scale)` and `dtype`, and what it returns is used in their place.
      rngs: source of the initial values; the stream `params`, one key a scale.

    Raises:
      OptionError: the layer is no module, or a chosen parameter has not the feature axes.
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = nnx.WeightNorm(nnx.Linear(2, 1, use_bias=False, rngs=rngs), rngs=rngs)
    >>> layer.layer_instance.kernel[...] = jnp.array([[3.0], [4.0]])
    >>> layer.scales["kernel"][...] = jnp.array([10.0])
    >>> layer(jnp.eye(2)).ravel(), layer.layer_instance.kernel[...].ravel()
    (Array([6., 8.], dtype=float32), Array([3., 4.], dtype=float32))
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: filterlib.Filter = filterlib.PathContains("kernel"),
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
    ):
        self._nnx_wrap(layer_instance, rngs, epsilon, dtype, param_dtype)
        self.feature_axes = hashable(feature_axes)
        self.use_scale, self.scale_init = use_scale, scale_init
        self.variable_filter, self.promote_dtype = variable_filter, promote_dtype
        # `data`: without scales the place stays one where they may be put later.
        self.scales: Dict[Any] | None = data(self._initial_scales(rngs) if use_scale else None)

    def __call__(self, x: jax.Array | Any, *args: Any, **kwargs: Any) -> jax.Array | Any:
        """Call the layer with normalized parameters.

        Args:
          x, *args, **kwargs: of the layer.

        Returns:
          What the layer returns.

        Raises:
          OptionError: the filter chooses a parameter that has no scale.
        """
        return substitute.call_with(self, WeightNorm._values, x, *args, **kwargs)

    def _chosen(self) -> list[tuple[Path, Param]]:
        return substitute.parameters(self.layer_instance, filterlib.to_predicate(self.variable_filter))

    def _initial_scales(self, rngs: Rngs) -> Dict[Any]:
        shapes = {path: substitute.stored(v).shape for path, v in self._chosen()}
        features = {path: self._features(path, shape) for path, shape in shapes.items()}
        return substitute.mirror(
            (path, Param(self.scale_init(rngs.params(), [shape[i] for i in features[path]], self.param_dtype)))
            for path, shape in shapes.items()
        )

    def _features(self, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The feature axes of the parameter at `path`, counted from the front, in order."""
        axes = () if self.feature_axes is None else as_tuple(self.feature_axes)
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise OptionError(
                    self,
                    "feature_axes",
                    f"axes of every parameter that is normalized, such as {show_path(path)} of shape {shape}",
                    self.feature_axes,
                    "Give axes that all of them have, or a variable_filter that leaves this one out.",
                )
        return tuple(sorted({axis % len(shape) for axis in axes}))

    def _values(self) -> list[tuple[Param, jax.Array]]:
        return [(variable, self._normalized(path, variable)) for path, variable in self._chosen()]

    def _normalized(self, path: Path, variable: Param) -> jax.Array:
        value, scale = substitute.stored(variable), None
        if self.scales is not None:
            scale = substitute.mirrored(self.scales, path)
            if scale is None:
                raise OptionError(
                    self,
                    "variable_filter",
                    f"only parameters that have a scale: {_paths(self.scales)}",
                    f"{show_path(path)}, which has none",
                    "Wrap the layer once all of its parameters are there, or add the Param to `scales`.",
                )
            scale = scale[...]
        features = self._features(path, value.shape)
        value, scale = statistics.promote(self, value, scale)
        others = tuple(axis for axis in range(value.ndim) if axis not in features)
        y = l2_normalized(value, others, self.epsilon)
        if scale is not None:
            y = y * scale.reshape(statistics.broadcastable(value.shape, features))
        return jnp.asarray(y, canonicalize_dtype(value, scale, dtype=self.dtype))


def l2_normalized(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """x / sqrt(sum(x²) + epsilon), the sum over `axes`, in the dtype of `x`."""
    return x * lax.rsqrt((x * x).sum(axes, keepdims=True) + epsilon)


def _paths(tree: Any, prefix: Path = ()) -> list[str]:
    if not isinstance(tree, Mapping):
        return [show_path(prefix)]
    return [path for key, value in tree.items() for path in _paths(value, (*prefix, key))]
