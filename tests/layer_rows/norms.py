"""Rows of the table of layers: norms, and the layers that normalize another one's weights."""

from typing import Any

from flax import linen

from tests.twins import Layer, Modes

_UPDATES: Modes = {train: {"update_stats": train} for train in (True, False)}


def _weight_norm(name: str, inner: Any, twin: Any, shape: tuple[int, ...]) -> Layer:
    return Layer(
        name,
        make=lambda lib, rngs, **d: lib.WeightNorm(inner(lib, rngs, **d), rngs=rngs, **d),
        twin=lambda **d: linen.WeightNorm(twin(**d), **d),
        shape=shape,
        params={
            "layer_instance/kernel": "params/layer_instance/kernel",
            "layer_instance/bias": "params/layer_instance/bias",
            "scales/kernel": "params/layer_instance|kernel|scale",
        },
        in_flax_nnx=False,  # its scales are no Variables, and its keys are tuples
    )


def _spectral_norm(name: str, inner: Any, twin: Any, shape: tuple[int, ...]) -> Layer:
    return Layer(
        name,
        make=lambda lib, rngs, **d: lib.SpectralNorm(inner(lib, rngs, **d), rngs=rngs, **d),
        twin=lambda **d: linen.SpectralNorm(twin(**d), **d),
        shape=shape,
        params={
            "layer_instance/kernel": "params/layer_instance/kernel",
            "layer_instance/bias": "params/layer_instance/bias",
            "batch_stats/kernel/u": "batch_stats/layer_instance|kernel|u",
            "batch_stats/kernel/sigma": "batch_stats/layer_instance|kernel|sigma",
        },
        modes=_UPDATES,
        twin_modes=_UPDATES,
        in_flax_nnx=False,  # its keys are tuples
    )


_LINEAR = (lambda lib, rngs, **d: lib.Linear(4, 5, rngs=rngs, **d), lambda **d: linen.Dense(5, **d), (2, 3, 4))
_CONV = (
    lambda lib, rngs, **d: lib.Conv(2, 3, (2, 3), rngs=rngs, **d),
    lambda **d: linen.Conv(3, (2, 3), **d),
    (1, 4, 5, 2),
)

ROWS = (
    Layer(
        "RMSNorm",
        make=lambda lib, rngs, **d: lib.RMSNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.RMSNorm(**d),
        shape=(2, 3, 4),
        params={"scale": "params/scale"},
    ),
    Layer(
        "GroupNorm",
        make=lambda lib, rngs, **d: lib.GroupNorm(6, 3, rngs=rngs, **d),
        twin=lambda **d: linen.GroupNorm(3, **d),
        shape=(2, 3, 2, 6),
        params={"scale": "params/scale", "bias": "params/bias"},
    ),
    Layer(
        "InstanceNorm",
        make=lambda lib, rngs, **d: lib.InstanceNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.InstanceNorm(**d),
        shape=(2, 3, 5, 4),
        params={"scale": "params/scale", "bias": "params/bias"},
    ),
    _weight_norm("WeightNorm", *_LINEAR),
    _weight_norm("WeightNorm.Conv", *_CONV),
    _spectral_norm("SpectralNorm", *_LINEAR),
    _spectral_norm("SpectralNorm.Conv", *_CONV),
)
