"""A module with Variables of several kinds, and a function of it that writes two of them."""

import jax.numpy as jnp

import nnx_core as nnx
from tests.strategies import Node


def pair(x=1.0, y=2.0):
    m = Node()
    m.x, m.y, m.n, m.i = (
        nnx.Param(jnp.array(x)),
        nnx.Param(jnp.array(y)),
        nnx.BatchStat(jnp.array(0.0)),
        nnx.Cache(jnp.array(0)),
    )
    return m


def counted(m, x):
    m.n[...] += 1.0
    m.i[...] += 1
    return jnp.sin(m.x) * m.y * x
