"""Programs on eight devices: each gives what it gives with flax.nnx, in the same places."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.oracle import same
from tests.support.arrays import ramp

X = ramp(16, 4, over=64)
PROGRAMS = {}


def program(f):
    """Into the table, under its name."""
    PROGRAMS[f.__name__] = f
    return f


def mesh():
    """Four ways of data, two of model."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def make(lib):
    """Two layers."""

    class Net(lib.Module):
        def __init__(self, rngs):
            self.up = lib.Linear(4, 8, use_bias=False, rngs=rngs)
            self.down = lib.Linear(8, 4, use_bias=False, rngs=rngs)
            self.calls = lib.Variable(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.down(jax.nn.relu(self.up(x)))

    return Net(lib.Rngs(0))


def places(lib, m):
    """Where each Variable lives."""
    return {
        str(path): str(getattr(v.get_value().sharding, "spec", "one device"))
        for path, v in lib.to_flat_state(lib.state(m))
    }


@program
def jit_with_state_sharding(lib):
    m, devices = make(lib), mesh()
    by_path = {
        lib.PathContains("up"): NamedSharding(devices, P(None, "model")),
        lib.PathContains("down"): NamedSharding(devices, P("model", None)),
        ...: NamedSharding(devices, P()),
    }
    sharding = lib.StateSharding(by_path)
    data = NamedSharding(devices, P("data"))
    f = lib.jit(lambda m, x: m(x), in_shardings=(sharding, data), out_shardings=data)
    y = f(m, X)
    return y, str(y.sharding.spec), places(lib, m), m


@program
def jit_returns_a_model_by_state_sharding(lib):
    devices = mesh()
    sharding = lib.StateSharding(
        {
            lib.PathContains("kernel"): NamedSharding(devices, P("model")),
            ...: NamedSharding(devices, P()),
        }
    )
    m = lib.jit(lambda: make(lib), out_shardings=sharding)()
    return places(lib, m), m


@program
def shard_map_by_state_sharding(lib):
    m, devices = make(lib), mesh()
    specs = lib.StateSharding(
        {
            lib.PathContains("up"): P(None, "model"),
            lib.PathContains("down"): P("model", None),
            ...: P(),
        }
    )

    @lib.shard_map(mesh=devices, in_specs=(specs, P("data")), out_specs=P("data"))
    def f(m, x):
        return jax.lax.psum(m(x), "model")

    return f(m, X), m


@program
def shard_map_data_parallel(lib):
    m, devices, x = make(lib), mesh(), jnp.round(X * 8)
    for layer in (m.up, m.down):  # whole numbers: sums are exact in any order, and eager calls compile as JAX likes
        layer.kernel[...] = jnp.round(layer.kernel[...] * 4)

    @lib.shard_map(mesh=devices, in_specs=(P(), P(("data", "model"))), out_specs=P())
    def f(m, x):
        y = m(x)
        return jax.lax.pmean((y**2).sum(), ("data", "model"))

    return f(m, x), lib.jit(f)(m, x), m


@program
def pmap_over_a_stack(lib):
    @lib.pmap
    def create(key):
        return lib.Linear(4, 2, rngs=lib.Rngs(key))

    m = create(jax.random.split(jax.random.key(0), 8))
    f = lib.pmap(lambda m, x: jax.lax.psum(m(x), "i"), axis_name="i", in_axes=(0, 0))
    return f(m, X.reshape(8, 2, 4)), m


@program
def pmap_by_state_axes(lib):
    m = make(lib)
    axes = lib.StateAxes({...: None})
    f = lib.pmap(lambda m, x: m.down(m.up(x)), in_axes=(axes, 0), out_axes=0)
    return f(m, X.reshape(8, 2, 4)), m


@program
def names_become_shardings(lib):
    devices = mesh()
    init = lib.initializers.lecun_normal()
    m = lib.Linear(4, 8, kernel_init=lib.with_partitioning(init, (None, "model")), rngs=lib.Rngs(0))
    specs = lib.get_partition_spec(lib.state(m))
    shardings = lib.get_named_sharding(lib.state(m), devices)
    return (
        {str(p): str(v.get_value()) for p, v in lib.to_flat_state(specs)},
        {str(p): str(v.get_value().spec) for p, v in lib.to_flat_state(shardings)},
        m,
    )


@program
def training_on_a_mesh(lib):
    m, devices = make(lib), mesh()
    kernels = NamedSharding(devices, P(None, "model"))
    sharding = lib.StateSharding({lib.Param: kernels, ...: NamedSharding(devices, P())})

    @lib.jit(in_shardings=(sharding, NamedSharding(devices, P("data"))))
    def step(m, x):
        value, grads = lib.value_and_grad(lambda m, x: (m(x) ** 2).mean())(m, x)
        lib.update(m, jax.tree.map(lambda p, g: p - 0.25 * g, lib.state(m, lib.Param), grads))
        return value

    return [step(m, X) for _ in range(3)], places(lib, m), m


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_it_gives_with_flax(name):
    assert jax.device_count() >= 8
    same(PROGRAMS[name])
