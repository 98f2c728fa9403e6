"""Several batch axes for a function that takes one.

Law: `BatchApply(f)(x)` is `f` of `x` with its leading axes merged, with the leading axis of the result split
again. Knows nothing of what `f` computes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import NnxError
from nnx_core.graph.objects import Object
from nnx_core.module import Module
from nnx_core.nn._errors import InputShapeError, OptionError, place
from nnx_core.nn._options import size
from nnx_core.variables import Variable


class MergedAxisError(NnxError, ValueError):
    """A function under BatchApply returned something that does not start with the merged axis."""

    def __init__(self, layer: Module, merged: int, leading: tuple[int, ...], path: str, found: object):
        super().__init__(
            f"BatchApply at {place(layer)}, result{path}:\n"
            f"  expected an array of shape ({merged}, ...): {merged} are the merged axes {leading}\n"
            f"  found    {found}\n"
            "The function must keep the leading axis. Compute what has none outside of BatchApply."
        )


class BatchApply(Module):
    """Calls `f` with the leading axes of its arguments merged into one, and splits that axis of the result again.

    For a module or function that takes one batch axis where the data has several, such as `[time, batch, ...]`.
    Unlike `jax.vmap` it runs `f` once, on a larger batch: statistics over the batch are over all of it.
    The counterpart of `flax.linen.BatchApply`, which flax.nnx does not have.

    Args:
      f: a module or function; called with the arguments and keyword arguments of the call.
      num_dims: how many leading axes are merged, at least 1.

    Raises:
      OptionError: `num_dims` is not a positive integer, or `f` cannot be called.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> model = nnx.BatchApply(nnx.Conv(3, 4, kernel_size=(3, 3), rngs=nnx.Rngs(0)))
    >>> model(jnp.ones((2, 5, 8, 8, 3))).shape
    (2, 5, 8, 8, 4)
    >>> model.f.kernel.shape
    (3, 3, 3, 4)
    """

    def __init__(self, f: Callable[..., Any], num_dims: int = 2):
        if not callable(f):
            raise OptionError(self, "f", "a module or function", type(f).__name__, "It is called with the arguments.")
        self.f = f
        self.num_dims = size(self, "num_dims", num_dims, least=1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `f` on merged arguments.

        Args:
          *args: pytrees. Arrays `[*leading, ...]` with at least `num_dims` axes are merged; arrays with fewer,
            numbers, None, and objects such as Rngs or modules are passed as they are. The `num_dims` leading axes
            of all merged arrays are the same, or all 1.
          **kwargs: more of them.

        Returns:
          What `f` returns: a pytree of arrays `[*leading, ...]`; None in it stays None.

        Raises:
          InputShapeError: no array has `num_dims` axes, or their leading axes differ.
          MergedAxisError: an array that `f` returned does not start with the merged axis.
        """
        leading = self._leading((args, kwargs))
        args, kwargs = jax.tree.map(self._merge, (args, kwargs), is_leaf=_is_object)
        merged = math.prod(leading)

        def split(path: Any, y: Any) -> jax.Array:
            if jnp.ndim(y) < 1 or jnp.shape(y)[0] != merged:
                raise MergedAxisError(self, merged, leading, jax.tree_util.keystr(path), f"shape {jnp.shape(y)}")
            return jnp.reshape(y, (*leading, *jnp.shape(y)[1:]))

        return jax.tree_util.tree_map_with_path(split, self.f(*args, **kwargs))

    def _leading(self, arguments: Any) -> tuple[int, ...]:
        n = self.num_dims
        shapes = [x.shape for x in jax.tree.leaves(arguments, is_leaf=_is_object) if self._merges(x)]
        if not shapes:
            found = tuple(jnp.shape(x) for x in jax.tree.leaves(arguments) if hasattr(x, "shape"))
            fix = f"num_dims={n} leading axes are merged; call the function itself where there are fewer."
            raise InputShapeError(self, f"with at least {n} axes, in at least one argument", found, fix)
        # An argument with axes of size 1 broadcasts against the others, merged as before.
        ones = (1,) * n
        leading = next((shape[:n] for shape in shapes if shape[:n] != ones), ones)
        for shape in shapes:
            if shape[:n] not in (leading, ones):
                axes = ", ".join(map(str, leading))
                fix = (
                    f"The {n} leading axes of all arguments with {n} or more are merged: close over what has no batch."
                )
                raise InputShapeError(self, f"({axes}, ...), as in another argument", shape, fix)
        return leading

    def _merge(self, x: Any) -> Any:
        if not self._merges(x):
            return x
        return jnp.reshape(x, (math.prod(x.shape[: self.num_dims]), *x.shape[self.num_dims :]))

    def _merges(self, x: Any) -> bool:
        return not isinstance(x, Object) and getattr(x, "ndim", 0) >= self.num_dims


def _is_object(x: Any) -> bool:
    """Rngs and modules keep their identity; a Variable is one array."""
    return isinstance(x, Object | Variable)
