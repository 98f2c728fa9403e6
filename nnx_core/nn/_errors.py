"""What can go wrong at a layer, and how to say where the layer is.

Law: a message names the layer by its path, says what was expected, what was found and what to do. All work
happens once something has failed: a check that passes costs one comparison. Knows no particular layer.
"""

import jax

from nnx_core._errors import NnxError
from nnx_core.graph.walk import locate
from nnx_core.module import Module
from nnx_core.rngs import Rngs, RngStream


def place(layer: Module) -> str:
    """Where `layer` is, as one would type it: `Encoder.blocks[0].up`, or its own type where nothing holds it."""
    return locate(layer) or type(layer).__name__


class InputShapeError(NnxError, ValueError, TypeError):
    """A layer was called with the wrong rank or number of features; JAX raises either, depending on the operation."""

    def __init__(self, layer: Module, expected: str, found: tuple[int, ...], fix: str):
        super().__init__(
            f"{type(layer).__name__} at {place(layer)}:\n"
            f"  expected an input of shape {expected}\n  found    shape {found}\n{fix}"
        )


class InputDtypeError(NnxError, ValueError, TypeError):
    """A layer was called with a dtype it cannot compute with."""

    def __init__(self, layer: Module, expected: str, found: object, fix: str):
        super().__init__(
            f"{type(layer).__name__} at {place(layer)}:\n"
            f"  expected an input of {expected} dtype\n  found    {found}\n{fix}"
        )


class OptionError(NnxError, ValueError):
    """A layer or function was given an option that makes no sense, or does not fit the others."""

    def __init__(self, owner: Module | str, option: str, expected: str, found: object, fix: str):
        name = owner if isinstance(owner, str) else type(owner).__name__
        super().__init__(f"{name}(..., {option}=...):\n  expected {expected}\n  found    {found}\n{fix}")


class MissingFlagError(NnxError, ValueError):
    """Neither the layer nor the call says whether this is training or evaluation."""

    def __init__(self, layer: Module, flag: str):
        super().__init__(
            f"No `{flag}` argument was provided to {type(layer).__name__} at {place(layer)}:\n"
            f"  expected True or False, in the constructor or in the call\n  found    None in both\n"
            f"Construct it with {flag}=True/False, call it with {flag}=True/False,"
            f" or call .set_attributes({flag}=True/False) on the model (.train() and .eval() set the usual flags)."
        )


class MissingRngsError(NnxError, ValueError, TypeError):
    """A layer needs random numbers and was given no source of them."""

    def __init__(self, where: str, expected: str, found: object, fix: str):
        super().__init__(f"{where}:\n  expected rngs to be {expected}\n  found    {found!r}\n{fix}")


def require_rngs(layer: Module, rngs: object) -> None:
    """Raise MissingRngsError unless `rngs` can initialize the parameters of `layer`."""
    if not isinstance(rngs, Rngs):
        name = type(layer).__name__
        raise MissingRngsError(
            f"{name}(..., rngs=...)",
            "an nnx.Rngs",
            rngs,
            f"Write {name}(..., rngs=nnx.Rngs(0)), or hand on the rngs of the module that holds it.",
        )


def next_key(layer: Module, rngs: Rngs | RngStream | jax.Array | None, stream: str) -> jax.Array:
    """The key to drop with: from the call's source, or the layer's own; MissingRngsError if there is neither."""
    source = layer.rngs if rngs is None else rngs
    if isinstance(source, Rngs):
        source = source[stream]
    if isinstance(source, RngStream):
        return source()
    if isinstance(source, jax.Array):
        return source
    raise MissingRngsError(
        f"{type(layer).__name__} at {place(layer)} is not deterministic",
        "an nnx.Rngs, RngStream or key, in the constructor or in the call",
        source,
        "Construct it with an Rngs to keep (MultiHeadAttention: keep_rngs=True), call it with rngs=..., or call"
        " .eval() on the model.",
    )
