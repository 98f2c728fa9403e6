"""Models without values on meshes of devices, and what they hold: for the tests of what loads into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import nnx_core as nnx
from bridge.checkpoint.loading import load_into
from nnx_core import sharding

KERNEL = np.arange(16 * 32, dtype="float32").reshape(16, 32)
BIAS = np.linspace(-1, 1, 32, dtype="float32")


def mesh(shape=(2, 4), order=None):
    devices = np.array(jax.devices())
    devices = devices if order is None else devices[order]
    return Mesh(devices.reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def abstract(make, over=None):
    """What `make` makes, without values, with the shardings of its axis names."""
    made = nnx.eval_shape(make)
    if over is None:
        return made
    with jax.set_mesh(over):
        return nnx.as_abstract(made)


def contents(*things):
    """Every raw value by path: arrays, keys and placeholders."""
    return [{path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(thing))} for thing in things]


def assert_untouched(things, before):
    now = contents(*things)
    assert [list(x) for x in now] == [list(x) for x in before]
    assert all(a[path] is b[path] for a, b in zip(now, before, strict=True) for path in a)


class Wide(nnx.Module):
    """One kernel with axis names, and a bias without."""

    def __init__(self, *names, rngs, dtype=None):
        init = sharding.with_partitioning(nnx.initializers.lecun_normal(), names)
        self.dense = nnx.Linear(16, 32, kernel_init=init, param_dtype=dtype or jnp.float32, rngs=rngs)


def wide(*names, **options):
    return lambda: Wide(*names, rngs=nnx.Rngs(0), **options)


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.zeros((4, 8, 8)), out_sharding=("model", "data"))
        self.bias = nnx.Param(jnp.zeros((4, 8)), out_sharding=("model", None))


def refused(error, match, things, path, rules=None, **options):
    before = contents(*things)
    with pytest.raises(error, match=match) as caught:
        load_into(things[0], path, rules, optimizer=things[1] if len(things) > 1 else None, **options)
    assert_untouched(things, before)
    return caught.value
