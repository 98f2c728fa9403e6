"""Optimizers: optax transformations on the Variables of a module."""
