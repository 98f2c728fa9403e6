"""Layers, activations and initializers.

Law: a layer is a Module whose numbers are flax.linen's; names, signatures and layouts are flax.nnx's.
"""

from nnx_core.nn import activations, initializers
from nnx_core.nn.activations import PReLU
from nnx_core.nn.conv import Conv
from nnx_core.nn.dropout import Dropout
from nnx_core.nn.embed import Embed
from nnx_core.nn.linear import Linear
from nnx_core.nn.norm import BatchNorm, LayerNorm

__all__ = [
    "BatchNorm",
    "Conv",
    "Dropout",
    "Embed",
    "LayerNorm",
    "Linear",
    "PReLU",
    "activations",
    "initializers",
]
