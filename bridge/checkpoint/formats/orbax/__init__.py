"""Orbax's checkpoints, v0 and v1: `read`, `write`, where what lies (`files`), and the tables beside the arrays.

Law: what is written here, Orbax itself restores.
"""
