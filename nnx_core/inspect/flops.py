"""How many floating point operations a recorded call takes, forward and backward.

Law: XLA's own count of the call as it is written, before it is optimized; nothing is compiled or run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.inspect.recording import Packed


def forward_flops(name: str, packed: Packed) -> int | None:
    """Of the outputs of a call; None where the call makes sense only inside a transform that names an axis."""
    return _count(_outputs(name, packed), packed.arrays)


def vjp_flops(name: str, packed: Packed) -> int | None:
    """Of the outputs and of their gradients with respect to all real arrays: parameters and inputs."""
    call = _outputs(name, packed)
    where = [i for i, x in enumerate(packed.arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def inexact(arrays: tuple[Any, ...]) -> list[Any]:
        return [y for y in call(arrays) if jnp.issubdtype(y.dtype, jnp.inexact)]

    def pull(arrays: tuple[Any, ...], cotangents: list[Any]) -> Any:
        def differentiable(chosen: list[Any]) -> list[Any]:
            full = list(arrays)
            for i, x in zip(where, chosen, strict=True):
                full[i] = x
            return inexact(tuple(full))

        outputs, pullback = jax.vjp(differentiable, [arrays[i] for i in where])
        return outputs, pullback(cotangents)

    try:
        cotangents = jax.eval_shape(inexact, packed.arrays)
    except NameError:  # as in _count
        return None
    return _count(pull, packed.arrays, cotangents)


def _outputs(name: str, packed: Packed) -> Callable[[tuple[Any, ...]], list[Any]]:
    def call(arrays: tuple[Any, ...]) -> list[Any]:
        (owner, *args), kwargs = packed.thaw(arrays)
        leaves = jax.tree.leaves(getattr(owner, name)(*args, **kwargs))
        return [jnp.asarray(x) for x in leaves if hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)]

    return call


def _count(f: Callable[..., Any], *args: Any) -> int | None:
    try:
        cost = jax.jit(f).lower(*args).cost_analysis()
    except NameError:  # JAX's error for a collective over an axis that only a vmap or shard_map around it names
        return None
    flops = (cost or {}).get("flops")
    return None if flops is None or flops < 0 else int(flops)
