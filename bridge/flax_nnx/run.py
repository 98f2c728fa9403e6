"""run: a function of a wrapped module, run on the module itself.

Law: as a call of the wrapper: the module has the values of now, and what the function writes is written back.
Knows both wrappers; knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.flax_nnx._errors import NotAModuleError
from bridge.flax_nnx.as_flax import AsFlax
from bridge.flax_nnx.from_flax import FromFlax


def run(model: FromFlax | AsFlax, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`f(module, *args, **kwargs)` with the module that `model` wraps: for calls of its parts, and changes in it.

    Args:
      model: a FromFlax or an AsFlax.
      f: a function of the module of flax.nnx, or of nnx_core, that is in it.
      *args, **kwargs: what else it takes.

    Raises:
      NotAModuleError: if `model` is neither.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> from flax import nnx as flax_nnx
    >>> rngs = flax_nnx.Rngs(0)
    >>> model = FromFlax(flax_nnx.Sequential(flax_nnx.Linear(2, 3, rngs=rngs), flax_nnx.Linear(3, 1, rngs=rngs)))
    >>> run(model, lambda module, x: module.layers[0](x), jnp.ones((1, 2))).shape
    (1, 3)
    """
    if isinstance(model, FromFlax):
        return model._flax_run(f, args, kwargs)
    if isinstance(model, AsFlax):
        return model._as_flax_run(f, args, kwargs)
    raise NotAModuleError("run", "either library, wrapped", model)
