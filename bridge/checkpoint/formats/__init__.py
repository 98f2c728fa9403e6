"""Checkpoints as bytes: one file a format, one way to write all of them.

Law: nothing is unpickled; nothing at a path looks finished before it is.
Knows trees of leaves; knows nothing of Linen, NNX or optimizers, of rules or plans.
"""
