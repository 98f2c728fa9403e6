"""A small layer with names on its axes, the mesh it is made on, and where its values are: for both libraries.

`lib` is nnx_core or flax.nnx, which share their public names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXES = ("data", "model")
RULES = [("embed", "data"), ("mlp", "model")]
TX = optax.adam(0.1)
X = np.arange(32, dtype=np.float32).reshape(4, 8) / 32


def make_mesh(*types):
    return jax.make_mesh((2, 4), AXES, axis_types=types)


def ramp_init(key, shape, dtype=jnp.float32):
    """Cheap to compile, and of another value in every place."""
    return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape) / 32 - 0.5


def spec_of(x):
    """The spec without the Nones at its end; None on one device."""
    if isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
        return None
    spec = tuple(x.sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def places(lib, tree):
    return {path: spec_of(v.get_value()) for path, v in lib.to_flat_state(lib.state(tree))}


def numbers(lib, tree):
    return {path: np.asarray(v.get_value()) for path, v in lib.to_flat_state(lib.state(tree))}


def linear(lib, names=AXES, **metadata):
    init = lib.with_partitioning(ramp_init, names, **metadata)
    return lib.Linear(4, 8, kernel_init=init, rngs=lib.Rngs(0))


def unplaced(lib):
    with lib.use_eager_sharding(False):
        return linear(lib)


def loss_fn(model):
    return (model(jnp.asarray(X[:, :4])) ** 2).mean()


def layer_of(lib):
    """A function of a key."""
    init = lib.with_partitioning(ramp_init, AXES)
    return lambda key: lib.Linear(4, 8, kernel_init=init, rngs=lib.Rngs(key))


def keys():
    return jax.random.split(jax.random.key(0), 3)
