"""Layers, activations and initializers.

Law: a layer is a Module whose numbers are flax.linen's; names, signatures and layouts are flax.nnx's. Names are
exported by `nnx_core/__init__.py` alone, which loads a file of this room when its first name is used.
"""
