"""Where new Variables go on eight devices: with nnx_core as with flax.nnx, on automatic and on explicit axes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from tests.support.placed_layers import (
    AXES,
    RULES,
    TX,
    X,
    keys,
    layer_of,
    linear,
    loss_fn,
    make_mesh,
    numbers,
    places,
    unplaced,
)
from tests.tolerance import assert_trees_close

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param, request.param)


PROGRAMS = {}


def program(f):
    """Into the table, under its name; called with a library and a mesh, it gives a tree of modules and Variables."""
    PROGRAMS[f.__name__] = f
    return f


@program
def all_axes(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=AXES)}


@program
def few_names(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=("data",))}


@program
def a_partition_spec(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=P(None, "model"))}


@program
def a_numpy_value(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(X, out_sharding=AXES)}


@program
def logical_names(lib, mesh):
    with jax.set_mesh(mesh), lib.logical_axis_rules(RULES):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=("embed", "mlp"))}


@program
def rules_of_its_own(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=("embed", None), sharding_rules=tuple(RULES))}


@program
def two_axes_for_one(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": lib.Param(jnp.asarray(X), out_sharding=(None, AXES))}


@program
def a_mesh_in_the_metadata(lib, mesh):
    return {"w": lib.Param(jnp.asarray(X), out_sharding=AXES, mesh=mesh)}


@program
def a_named_sharding(lib, mesh):
    return {"w": lib.Param(jnp.asarray(X), out_sharding=NamedSharding(mesh, P("data")))}


@program
def no_names(lib, mesh):
    given = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        return {"none": lib.Param(given, out_sharding=None), "empty": lib.Param(given, out_sharding=())}


@program
def a_layer(lib, mesh):
    with jax.set_mesh(mesh):
        return linear(lib)


@program
def a_layer_and_its_moments(lib, mesh):
    with jax.set_mesh(mesh):
        model = linear(lib)
        return {"model": model, "optimizer": lib.Optimizer(model, TX, wrt=lib.Param)}


@program
def moments_elsewhere(lib, mesh):
    with jax.set_mesh(mesh):
        model = linear(lib, optimizer_sharding=("model", None))
        return {"model": model, "optimizer": lib.Optimizer(model, TX, wrt=lib.Param)}


@program
def made_in_jit(lib, mesh):
    def make():
        model = linear(lib)
        return {"model": model, "optimizer": lib.Optimizer(model, TX, wrt=lib.Param)}

    with jax.set_mesh(mesh):
        return lib.jit(make)()


@program
def made_in_vmap(lib, mesh):
    with jax.set_mesh(mesh):
        return lib.vmap(layer_of(lib))(keys())


@program
def made_in_vmap_in_jit(lib, mesh):
    with jax.set_mesh(mesh):
        return lib.jit(lib.vmap(layer_of(lib)))(keys())


@program
def made_in_scan(lib, mesh):
    with jax.set_mesh(mesh):
        return lib.scan(layer_of(lib), in_axes=0, out_axes=0)(keys())


@program
def made_in_remat(lib, mesh):
    with jax.set_mesh(mesh):
        return lib.remat(lambda: linear(lib))()


@program
def named_later(lib, mesh):
    with jax.set_mesh(mesh):
        w = lib.Param(jnp.asarray(X))
        w.set_metadata(out_sharding=AXES)
        return {"w": w}


@program
def updated_with_what_is_everywhere(lib, mesh):
    with jax.set_mesh(mesh):
        model = linear(lib)
        lib.update(model, {"kernel": jnp.ones((4, 8))})
        return model


@program
def updated_from_a_state(lib, mesh):
    with jax.set_mesh(mesh):
        model = linear(lib)
        lib.update(model, lib.state(unplaced(lib)))
        return model


@program
def merged_and_cloned(lib, mesh):
    model = unplaced(lib)
    with jax.set_mesh(mesh):
        placed = linear(lib)
        parts = {"merged": model, "placed": placed}
        return {name: (lib.merge(*lib.split(m)), lib.clone(m)) for name, m in parts.items()}


@program
def copied_with_another_value(lib, mesh):
    with jax.set_mesh(mesh):
        return {"w": linear(lib).kernel.replace(jnp.ones((4, 8)))}


@program
def mapped_over(lib, mesh):
    with jax.set_mesh(mesh):
        state = lib.state(linear(lib))
        return lib.merge(lib.graphdef(linear(lib)), jax.tree.map(lambda x: x * 2, state))


@program
def switched_off(lib, mesh):
    with jax.set_mesh(mesh), lib.use_eager_sharding(False):
        off = {"names": AXES, "sharding": NamedSharding(mesh, P("data"))}
        return {name: lib.Param(jnp.asarray(X), out_sharding=names) for name, names in off.items()}


@program
def switched_for_one(lib, mesh):
    with jax.set_mesh(mesh):
        off = lib.Param(jnp.asarray(X), out_sharding=AXES, eager_sharding=False)
        with lib.use_eager_sharding(False):
            on = lib.Param(jnp.asarray(X), out_sharding=AXES, eager_sharding=True)
        return {"off": off, "on": on, "moments of off": lib.Optimizer({"w": off}, TX, wrt=lib.Param)}


@program
def trained_in_jit(lib, mesh):
    @lib.jit
    def step(model, optimizer):
        optimizer.update(model, lib.grad(loss_fn)(model))

    with jax.set_mesh(mesh):
        model = linear(lib)
        optimizer = lib.Optimizer(model, TX, wrt=lib.Param)
        for _ in range(2):
            step(model, optimizer)
        return {"model": model, "optimizer": optimizer}


@pytest.mark.sample(18)
@pytest.mark.parametrize("name", PROGRAMS)
def test_new_variables_are_where_flax_puts_them(name, mesh):
    ours, theirs = PROGRAMS[name](nnx, mesh), PROGRAMS[name](flax_nnx, mesh)
    assert places(nnx, ours) == places(flax_nnx, theirs)
    assert_trees_close(numbers(nnx, ours), numbers(flax_nnx, theirs))
