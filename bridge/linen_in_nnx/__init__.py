"""A Linen module as an NNX module: ToNNX and lazy_init.

Law: outputs, gradients and updates are those of `module.apply`; every Variable stays the same object.
Of `nnx_in_linen` it knows `host` alone: the Linen module that may be around.
"""
