"""Sharded init, jit with shardings, restoring and eager sharding on eight devices (tests/conftest.py forces them)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core import sharding
from tests.tolerance import assert_trees_close, assert_trees_equal

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

RULES = [("embed", "data"), ("mlp", "model")]
TX = optax.adam(0.1)  # one object: two calls of adam are two static attributes, and modules with them differ


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def explicit():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


class Block(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(
            4, 8, kernel_init=sharding.with_partitioning(init, ("data", "model")), use_bias=False, rngs=rngs
        )
        self.down = nnx.Linear(8, 4, kernel_init=sharding.with_partitioning(init, ("model", None)), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


SPECS = {"up": P("data", "model"), "down": P("model", None)}


def block():
    return Block(nnx.Rngs(0))


def training_state():
    model = block()
    return nnx.state((model, nnx.Optimizer(model, TX, wrt=nnx.Param)))


def placed(mesh, spec, x):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def assert_sharded(mesh, state):
    for path, v in nnx.to_flat_state(state):
        spec = next((SPECS[part] for part in SPECS if part in path and path[-1] == "kernel"), P())
        assert placed(mesh, spec, v.get_value()), (path, v.get_value().sharding)


# ---- the sharded-init recipe ----


def test_sharded_init_of_a_training_state(mesh):
    """Abstract model, shardings, jit of the init: no value is ever whole on one device (row 6)."""
    shardings = sharding.get_named_sharding(jax.eval_shape(training_state), mesh)
    state = jax.jit(training_state, out_shardings=shardings)()
    assert_sharded(mesh, state)
    assert_trees_equal(nnx.to_pure_dict(state), nnx.to_pure_dict(training_state()))


def test_sharded_init_of_a_module(mesh):
    model = jax.jit(block, out_shardings=sharding.get_named_sharding(nnx.eval_shape(block), mesh))()
    assert_sharded(mesh, nnx.state(model))


def test_sharded_init_of_a_module_and_its_optimizer(mesh):
    def both():
        model = block()
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    made = jax.jit(both, out_shardings=sharding.get_named_sharding(nnx.eval_shape(both), mesh))()
    assert_sharded(mesh, nnx.state(made))


def test_the_recipe_of_flax_with_constraints_inside(mesh):
    @nnx.jit
    def create():
        model = block()
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, sharding.get_partition_spec(state)))
        return model

    with jax.set_mesh(mesh):
        assert_sharded(mesh, nnx.state(create()))


def test_device_put_of_a_model(mesh):
    model = block()
    nnx.update(model, jax.device_put(nnx.state(model), sharding.get_named_sharding(nnx.state(model), mesh)))
    assert_sharded(mesh, nnx.state(model))


def test_logical_names_on_the_mesh_of_flax(mesh):
    def specs(library, functions):
        layer = library.Linear(4, 8, rngs=library.Rngs(0), kernel_metadata={"out_sharding": ("embed", "mlp")})
        with functions.logical_axis_rules(RULES):
            return functions.get_named_sharding(library.state(layer), mesh)["kernel"].get_value()

    with flax_nnx.use_eager_sharding(False):
        assert specs(nnx, sharding) == specs(flax_nnx, flax_nnx) == NamedSharding(mesh, P("data", "model"))


def test_factored_moments_can_be_initialised_sharded(mesh):
    metadata = {"kernel_metadata": {"out_sharding": ("data", "model")}, "bias_metadata": {"out_sharding": ("model",)}}

    def init():
        model = nnx.Linear(128, 256, rngs=nnx.Rngs(0), **metadata)
        return nnx.state((model, nnx.Optimizer(model, optax.adafactor(), wrt=nnx.Param)))

    state = jax.jit(init, out_shardings=sharding.get_named_sharding(jax.eval_shape(init), mesh))()
    assert placed(mesh, P("data", "model"), state[0]["kernel"].get_value())
    assert placed(mesh, P("model"), state[1]["opt_state"][0]["v"]["bias"].get_value())


# ---- nnx.jit with shardings ----


def double(model):
    model.up.kernel[...] *= 2
    return model.up.kernel.max()  # the same to the bit however it is split, as a sum is not


def forms(state, mesh):
    named = sharding.get_named_sharding(state, mesh)
    return {
        "StateSharding": lambda: nnx.StateSharding(named),
        "State": lambda: named,
        "StateSharding of plain": lambda: nnx.StateSharding(named.map(lambda _, v: v.get_value())),
        "State of plain": lambda: named.map(lambda _, v: v.get_value()),
        "by filter": lambda: nnx.StateSharding(
            {nnx.PathContains("up"): NamedSharding(mesh, P("data", "model")), ...: NamedSharding(mesh, P())}
        ),
    }


FORMS = [
    "StateSharding",
    "State",
    "StateSharding of plain",
    "State of plain",
    "by filter",
]


@pytest.mark.parametrize("form", FORMS)
def test_jit_writes_back_where_the_shardings_say(mesh, form):
    model, expected = block(), block()
    spec = forms(nnx.state(model), mesh)[form]()
    kernel = model.up.kernel
    largest = nnx.jit(double, in_shardings=(spec,))(model)
    assert_trees_equal(largest, double(expected))
    assert model.up.kernel is kernel
    np.testing.assert_array_equal(kernel[...], expected.up.kernel[...])
    assert placed(mesh, P("data", "model"), kernel.get_value())


@pytest.mark.parametrize("form", FORMS)
def test_jit_returns_a_model_where_the_shardings_say(mesh, form):
    spec = forms(nnx.state(block()), mesh)[form]()
    model = nnx.jit(block, out_shardings=spec)()
    assert placed(mesh, P("data", "model"), model.up.kernel.get_value())
    assert placed(mesh, P() if form == "by filter" else P("model"), model.down.kernel.get_value())


def test_jit_of_a_state_with_its_shardings(mesh):
    state = nnx.state(block())
    named = sharding.get_named_sharding(state, mesh)
    out = nnx.jit(lambda s: jax.tree.map(lambda x: x + 1, s), in_shardings=(named,), out_shardings=named)(state)
    assert_sharded(mesh, out)


def test_training_keeps_the_shardings_and_the_numbers(mesh):
    def train(model, optimizer, x):
        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
            optimizer.update(model, grads)

        for _ in range(3):
            step(model, optimizer, x)
        return nnx.state((model, optimizer))

    x = jax.random.normal(jax.random.key(1), (8, 4))
    model = block()
    expected = train(model, nnx.Optimizer(model, TX, wrt=nnx.Param), x)

    model = block()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.device_put(state, sharding.get_named_sharding(state, mesh)))
    state = train(model, optimizer, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_trees_close(nnx.to_pure_dict(state), nnx.to_pure_dict(expected))
    for path, v in nnx.to_flat_state(state):
        if path[-1] == "kernel":
            part = next(part for part in path if part in SPECS)
            assert placed(mesh, SPECS[part], v.get_value()), path


def test_stacked_layers_and_their_moments_are_sharded(mesh):
    """Row 15: the axis that vmap adds has no name, so that nobody shards the layers by mistake."""

    def init():
        model = nnx.vmap(Block)(nnx.Rngs(0).fork(split=3))
        return nnx.state((model, nnx.Optimizer(model, TX, wrt=nnx.Param)))

    state = jax.jit(init, out_shardings=sharding.get_named_sharding(jax.eval_shape(init), mesh))()
    for values in (state[0]["up"], state[1]["opt_state"][0]["mu"]["up"], state[1]["opt_state"][0]["nu"]["up"]):
        assert values["kernel"].shape == (3, 4, 8)
        assert placed(mesh, P(None, "data", "model"), values["kernel"].get_value())


# ---- restoring ----


def restored(abstract, checkpoint):
    """What a checkpoint library does: makes each shard on its own device, from the sharding of the target."""

    def restore(path, v):
        target = v.get_value()
        return v.replace(jax.make_array_from_callback(target.shape, target.sharding, lambda i: checkpoint[path][i]))

    return abstract.map(restore)


def test_a_checkpoint_goes_straight_to_its_devices(mesh):
    """Row 39: the target of a restore is abstract and knows where each shard lives."""
    model = block()
    checkpoint = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}
    graphdef, abstract = sharding.get_abstract_model(block, mesh)
    back = nnx.merge(graphdef, restored(abstract, checkpoint))
    assert_sharded(mesh, nnx.state(back))
    np.testing.assert_array_equal(back.down.kernel[...], model.down.kernel[...])

    with jax.set_mesh(mesh):
        target = nnx.state(sharding.as_abstract(nnx.eval_shape(block)))
    assert_sharded(mesh, restored(target, checkpoint))


# ---- eager sharding ----


def annotated(**options):
    return nnx.Param(jnp.ones((4, 8)), out_sharding=("data", "model"), **options)


@pytest.mark.parametrize("kind", ["mesh", "explicit"])
def test_placing_by_names(kind, request):
    where = request.getfixturevalue(kind)
    v = annotated()
    with jax.set_mesh(where):
        assert sharding.place_eagerly(v, v[...], asked=True).sharding == NamedSharding(where, P("data", "model"))
        traced = jax.jit(lambda: sharding.place_eagerly(v, jnp.zeros((4, 8)), asked=True))()
        assert placed(where, P("data", "model"), traced)
        tree = sharding.place_eagerly(nnx.Variable(None, out_sharding=("data",)), {"a": jnp.ones(4), "b": 3}, True)
        assert placed(where, P("data"), tree["a"])
        assert tree["b"] == 3
        shape = sharding.place_eagerly(v, jax.ShapeDtypeStruct((4, 8), jnp.float32), asked=True)
        assert shape.sharding.spec == P("data", "model")
    kept = sharding.place_eagerly(annotated(mesh=where), v[...], asked=True)
    assert kept.sharding == NamedSharding(where, P("data", "model"))


def test_inside_shard_map_a_value_is_a_shard_already(mesh):
    def shard(x):
        return sharding.place_eagerly(nnx.Variable(None, out_sharding=("data",)), x, asked=True) * 2

    with jax.set_mesh(mesh):
        out = jax.jit(jax.shard_map(shard, in_specs=P("data"), out_specs=P("data")))(jnp.arange(4.0))
    np.testing.assert_array_equal(out, [0, 2, 4, 6])


def test_eager_sharding_places_new_variables(mesh):
    with jax.set_mesh(mesh):
        assert placed(mesh, P("data", "model"), annotated(eager_sharding=True).get_value())
        with sharding.use_eager_sharding(True):
            assert placed(mesh, P("data", "model"), annotated().get_value())
            assert placed(mesh, P(), annotated(eager_sharding=False).get_value())
            assert_sharded(mesh, nnx.state(block(), nnx.PathContains("kernel")))
            assert_sharded(mesh, nnx.state(nnx.jit(block)()))
    with sharding.use_eager_sharding(True):
        assert placed(mesh, P("data", "model"), annotated(mesh=mesh).get_value())
        assert len(annotated().get_value().devices()) == 1


def test_eager_sharding_is_that_of_flax(mesh):
    def values(library, use):
        with jax.set_mesh(mesh), use(True):
            v = library.Param(jnp.ones((4, 8)), out_sharding=("data",), mesh=mesh)
            return v.get_value().sharding

    assert values(nnx, sharding.use_eager_sharding) == values(flax_nnx, flax_nnx.use_eager_sharding)
