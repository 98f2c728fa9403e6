"""Lifted transforms: JAX's transforms for functions of objects."""
