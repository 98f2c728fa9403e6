"""How many floating point operations a call takes, forward and backward.

Law: XLA's own count of the call as it is written, before it is optimized; nothing is compiled or run, and no code of
the model's is called.
Knows equations; knows neither objects nor tables.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.inspect.packed import Equations


def forward_flops(call: Equations) -> int | None:
    """Of the outputs of a call; None if XLA does not say, or cannot see them here."""
    return _count(call.outputs, call.inputs, call.closure)


def vjp_flops(call: Equations) -> int | None:
    """Of the outputs and of their gradients with respect to all real arrays: parameters and inputs."""
    where = [i for i, x in enumerate(call.inputs) if _is_inexact(x)]

    def inexact(inputs: Any, closure: Any) -> list[jax.Array]:
        return [y for y in call.outputs(inputs, closure) if _is_inexact(y)]

    def pull(inputs: Any, closure: Any, cotangents: list[Any]) -> Any:
        def differentiable(chosen: list[Any]) -> list[jax.Array]:
            full = list(inputs)
            for i, x in zip(where, chosen, strict=True):
                full[i] = x
            return inexact(full, closure)

        outputs, pullback = jax.vjp(differentiable, [inputs[i] for i in where])
        return outputs, pullback(cotangents)

    cotangents = jax.eval_shape(inexact, call.inputs, call.closure)
    return _count(pull, call.inputs, call.closure, cotangents)


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _count(f: Callable[..., Any], *args: Any) -> int | None:
    traced = jax.jit(f).trace(*args)  # says what has no gradient
    try:
        lowered = traced.lower()
    except Exception:  # noqa: BLE001  a kernel may be for another platform; any rule, any library's, may fail in its way
        return None
    cost = lowered.cost_analysis()
    flops = (cost or {}).get("flops")
    return None if flops is None or flops < 0 else int(flops)
