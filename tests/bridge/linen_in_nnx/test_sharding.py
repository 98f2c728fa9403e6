"""ToNNX on a mesh of eight devices: every way to create it sharded gives the shards of pure Linen."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from tests.support.linen_models import KEY, equal
from tests.tolerance import assert_trees_equal

DEVICES = 8
WIDE = jnp.asarray(np.ones((2, 8), "float32"))
pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 8 devices")


def kernel(*names, box=nn.with_partitioning):
    return box(nn.initializers.lecun_normal(), names)


class Layer(nn.Module):
    box: Any = nn.with_partitioning

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(8, kernel_init=kernel("a", "b", box=self.box))(x)
        return nn.BatchNorm(use_running_average=True)(x), None


class Net(nn.Module):
    """A layer, and a stack of layers that is sharded along its axis too."""

    box: Any = nn.with_partitioning

    @nn.compact
    def __call__(self, x):
        x, _ = Layer(self.box)(x)
        axes, names = {"params": 0, "batch_stats": 0}, {nn.PARTITION_NAME: "layers"}
        stack = nn.scan(Layer, axes, split_rngs={"params": True}, length=2, metadata_params=names)
        return stack(self.box)(x, None)[0]


RULES = (("a", "data"), ("b", "model"), ("layers", None))
BOXES = {"names of the mesh": nn.with_partitioning, "logical names": nn.with_logical_partitioning}
boxes = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)


def mesh_for(box):
    names = ("a", "b") if box is nn.with_partitioning else ("data", "model")
    extra = ("layers",) if box is nn.with_partitioning else ("rest",)
    return jax.make_mesh((2, 2, 2), (*names, *extra), axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def rules_for(box):
    rules = RULES if box is nn.with_logical_partitioning else ()
    with nnx.logical_axis_rules(rules), nn.logical_axis_rules(rules):
        yield


def linen_variables(box, mesh):
    """Pure Linen's recipe: eval_shape, shardings from the boxes, jit with out_shardings."""
    module = Net(box)
    abstract = jax.eval_shape(module.init, KEY, WIDE)
    if box is nn.with_partitioning:
        shardings = nn.get_sharding(abstract, mesh)
    else:
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    return jax.jit(module.init, out_shardings=shardings)(KEY, WIDE)


def assert_same_shards(model, variables):
    ours, theirs = (nn.meta.unbox(x) for x in (variables_of(model), variables))
    assert_trees_equal(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        for mine, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert (mine.device, mine.index) == (other.device, other.index)
            assert_trees_equal(np.asarray(mine.data), np.asarray(other.data))


def wrapped(box):
    return ToNNX(Net(box), KEY, parity=True).lazy_init(WIDE)


def from_out_shardings(box, mesh):
    abstract = nnx.eval_shape(lambda: wrapped(box))
    shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)
    return nnx.merge(nnx.graphdef(abstract), jax.jit(lambda: nnx.state(wrapped(box)), out_shardings=shardings)())


def from_constraint(box, mesh):
    @nnx.jit
    def make():
        model = wrapped(box)
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_named_sharding(state, mesh)))
        return model

    return make()


def from_lifted_out_shardings(box, mesh):
    abstract = nnx.eval_shape(lambda: wrapped(box))
    shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)
    by_path = {path: v.get_value() for path, v in nnx.to_flat_state(shardings)}
    at = nnx.StateSharding({nnx.PathIn(path): sharding for path, sharding in by_path.items()})
    return nnx.jit(lambda: wrapped(box), out_shardings=at)()


def from_shapes(box, mesh):
    shapes = jax.ShapeDtypeStruct(WIDE.shape, WIDE.dtype)
    make = nnx.jit(lambda: nnx.state(ToNNX(Net(box), KEY, parity=True).lazy_init(shapes)))
    abstract = nnx.eval_shape(lambda: wrapped(box))
    shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)
    return nnx.merge(nnx.graphdef(abstract), jax.jit(make, out_shardings=shardings)())


WAYS = [from_out_shardings, from_constraint, from_lifted_out_shardings, from_shapes]


@pytest.mark.sample(6)
@boxes
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("ambient", [False, True], ids=["mesh given", "mesh around"])
def test_sharded_creation_gives_linens_shards_row_6(box, way, ambient):
    mesh = mesh_for(box)
    expected = linen_variables(box, mesh)
    with rules_for(box), jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        model = way(box, mesh)
    assert_same_shards(model, expected)


@boxes
def test_a_call_on_a_mesh_is_linens(box):
    mesh = mesh_for(box)
    variables = linen_variables(box, mesh)
    with rules_for(box), jax.set_mesh(mesh):
        model = from_out_shardings(box, mesh)
        expected = jax.jit(Net(box).apply)(variables, WIDE)
        y = nnx.jit(lambda m, x: m(x))(model, WIDE)
    equal(np.asarray(y), np.asarray(expected))


def test_a_model_around_is_created_sharded_row_6():
    mesh = mesh_for(nn.with_partitioning)

    def make():
        model = nnx.Sequential(ToNNX(Net(), KEY, parity=True), nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        return bridge.lazy_init(model, WIDE)

    abstract = nnx.eval_shape(make)
    shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)
    model = nnx.merge(nnx.graphdef(abstract), jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())
    assert_same_shards(model.layers[0], linen_variables(nn.with_partitioning, mesh))
    assert nnx.get_partition_spec(nnx.state(abstract))["layers"][0]["ScanLayer_0"]["Dense_0"][
        "kernel"
    ].get_value() == P("layers", "a", "b")


class Named(nn.Module):
    """One kernel with axis names."""

    names: tuple

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, self.names)
        return nn.Dense(8, kernel_init=init)(x)


def test_lazy_init_under_a_mesh_places_what_it_makes():
    """Rows 7 and 68: as NNX's own Variables; names that are no axes of the mesh move nothing."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def kernel(names, rules=(("embed", "a"), ("mlp", "b"))):
        model = nnx.Sequential(ToNNX(Named(names), rngs=nnx.Rngs(0)), nnx.relu)
        with nn.logical_axis_rules(rules):
            bridge.lazy_init(model, jnp.ones((2, 4)))
        return model.layers[0].Dense_0.kernel.get_value()

    with jax.set_mesh(mesh):
        assert kernel(("embed", "mlp")).sharding == NamedSharding(mesh, P("a", "b"))
        assert kernel((None, "unknown")).sharding.is_fully_replicated
        assert kernel(("embed", "mlp"), [("embed", "a"), ("mlp", "a")]).shape == (4, 8)
        with nnx.use_eager_sharding(False):
            assert kernel(("embed", "mlp")).sharding.is_fully_replicated
    assert len(kernel(("embed", "mlp")).devices()) == 1
