"""Ratios against flax.nnx, Linen and bare JAX, measured in one process.

Law: variants that are timed against each other compute the same numbers, which is asserted before the clock
starts. A benchmark reports whether a goal is met; it never fails on time: machines differ, and CI is shared.
"""
