"""The sharded-init recipe gives the shards of pure Linen: whatever is wrapped in what, annotated how, under any mesh.

eval_shape, shardings from axis names, jit of the init with out_shardings: no value is ever whole on one device.
Eight CPU devices (tests/conftest.py forces them).
"""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from bridge import ToNNX, lazy_init, nnx_attrs_to_linen_vars, to_linen, to_linen_class, variables_of
from bridge.variables._errors import AxisNameError
from bridge.variables.mapping import leaves
from tests.tolerance import assert_trees_equal

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

KEY = jax.random.key(0)
X = jnp.asarray(np.ones((4, 8), "float32"))
INIT = nn.initializers.ones  # cheap to compile; that numbers are kept is a test of its own
RULES = (("embed", "data"), ("mlp", "model"), ("pipe", "pipe"))
LAYERS = {
    "variable_axes": {"params": 0},
    "split_rngs": {"params": True},
    "metadata_params": {nn.PARTITION_NAME: "pipe"},
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), ("data", "model", "pipe"), axis_types=(kind,) * 3)


MESHES = {
    "no mesh": lambda mesh: contextlib.nullcontext(),
    "with mesh": lambda mesh: old_style(mesh),
    "set_mesh": jax.set_mesh,
}


@contextlib.contextmanager
def old_style(mesh):
    """`with mesh:`, as the code that we meet has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`with mesh:` context manager", DeprecationWarning)
        mesh.__enter__()
    try:
        yield
    finally:
        mesh.__exit__(None, None, None)


# ---- one layer in every wrapping: names of the mesh, logical names with their own rules, with ambient rules ----

LINEN = {
    "mesh names": nn.with_partitioning(INIT, ("data", "model")),
    "logical": nn.with_logical_partitioning(INIT, ("embed", "mlp"), rules=RULES),
    "ambient rules": nn.with_logical_partitioning(INIT, ("embed", "mlp")),
}
NNX = {
    "mesh names": nnx.with_partitioning(INIT, ("data", "model")),
    "logical": nnx.with_partitioning(INIT, ("embed", "mlp"), sharding_rules=RULES),
    "ambient rules": nnx.with_partitioning(INIT, ("embed", "mlp")),
}
Linear = to_linen_class(nnx.Linear)


class OfLinen(nnx.Module):
    """NNX that owns a wrapped Linen layer."""

    def __init__(self, init, rngs):
        self.inner = ToNNX(nn.Dense(8, kernel_init=init), rngs=rngs)

    def __call__(self, x, _=None):
        return self.inner(x)


class OfNnx(nn.Module):
    """Linen that owns a wrapped NNX layer; a body for nn.scan."""

    kernel_init: object

    @nn.compact
    def __call__(self, x, _=None):
        return Linear(8, 8, kernel_init=self.kernel_init, name="inner")(x), None


class OfDense(nn.Module):
    """The same in Linen alone."""

    kernel_init: object

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(8, kernel_init=self.kernel_init, name="inner")(x), None


def dense(how):
    return nn.Dense(8, kernel_init=LINEN[how])


def scanned(body, init):
    return nn.scan(body, length=4, **LAYERS)(init)


def mapped(layer, **options):
    return nn.vmap(layer, in_axes=None, axis_size=4, **{**LAYERS, **options})


#: What Linen runs -> (ours, Linen's own), both functions of the annotation.
IN_LINEN = {
    "Linen": (dense, dense),
    "ToLinen(NNX)": (lambda how: to_linen(nnx.Linear, 8, 8, kernel_init=NNX[how]), dense),
    "ToLinen(ToNNX(Linen))": (lambda how: to_linen(OfLinen, LINEN[how]), lambda how: OfDense(LINEN[how])),
    "Linen(ToLinen(NNX))": (lambda how: OfNnx(NNX[how]), lambda how: OfDense(LINEN[how])),
    "scan(ToLinen(NNX))": (lambda how: scanned(OfNnx, NNX[how]), lambda how: scanned(OfDense, LINEN[how])),
    "vmap(ToLinen(NNX))": (
        lambda how: mapped(Linear)(8, 8, kernel_init=NNX[how]),
        lambda how: mapped(nn.Dense)(8, kernel_init=LINEN[how]),
    ),
    "vmap(ToLinen(ToNNX(Linen)))": (
        lambda how: mapped(to_linen_class(OfLinen))(LINEN[how]),
        lambda how: mapped(OfDense)(LINEN[how]),
    ),
}
#: What NNX runs.
IN_NNX = {
    "ToNNX(Linen)": (lambda how: ToNNX(dense(how), rngs=nnx.Rngs(0)), dense),
    "ToNNX(ToLinen(NNX))": (
        lambda how: ToNNX(to_linen(nnx.Linear, 8, 8, kernel_init=NNX[how]), rngs=nnx.Rngs(0)),
        dense,
    ),
    "NNX(ToNNX(Linen))": (lambda how: OfLinen(LINEN[how], nnx.Rngs(0)), lambda how: OfDense(LINEN[how])),
    "ToNNX(scan(ToLinen(NNX)))": (
        lambda how: ToNNX(scanned(OfNnx, NNX[how]), rngs=nnx.Rngs(0)),
        lambda how: scanned(OfDense, LINEN[how]),
    ),
}


# ---- the recipe ----


def shardings_of(boxed, mesh):
    """Linen's recipe: `nn.get_sharding`, and for its logical names what translates them."""
    if any(isinstance(x, nn.LogicallyPartitioned) and not x.rules for _, x in leaves(boxed)):
        return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh)
    [rules] = {x.rules for _, x in leaves(boxed) if isinstance(x, nn.LogicallyPartitioned)} or {None}
    if rules:
        return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    return nn.get_sharding(boxed, mesh)


def linen_init(model, mesh):
    boxed = jax.eval_shape(model.init, KEY, X, *extra(model))
    made = jax.jit(model.init, out_shardings=shardings_of(boxed, mesh))(KEY, X, *extra(model))
    return shards(made)


def extra(model):
    """nn.scan wants something to scan over, or None."""
    return (None,) if type(model).__name__.startswith("Scan") else ()


def nnx_state(make):
    def state():
        model = make()
        lazy_init(model, X, *(extra(model.module) if isinstance(model, ToNNX) else ()))
        return nnx.state(model, nnx.Not(nnx.RngState))

    return state


def nnx_init(make, mesh):
    named = nnx.get_named_sharding(nnx.eval_shape(nnx_state(make)), mesh)
    state = jax.jit(nnx_state(make), out_shardings=named)()
    return shards(nnx_attrs_to_linen_vars(state))


def nnx_init_by_linen(make, mesh):
    """NNX outside, but shardings as Linen would take them from the boxes."""

    def init():
        return nnx_attrs_to_linen_vars(nnx_state(make)())

    return shards(jax.jit(init, out_shardings=shardings_of(jax.eval_shape(init), mesh))())


def shards(variables):
    """path -> shape, and which part of the array each device has."""
    found = {}
    for at, x in leaves(meta.map_axis_meta(lambda box: box.value, variables)):
        assert x.committed
        parts = {shard.device.id: (shard.index, shard.data.shape) for shard in x.addressable_shards}
        found[at] = x.shape, parts
    return found


_expected = {}


def expected(name, how, table):
    """Linen's own shards, by an explicit mesh; the same under every mesh context."""
    if (name, how) not in _expected:
        with rules_for(how):
            _expected[name, how] = linen_init(table[name][1](how), mesh_of())
    return _expected[name, how]


def rules_for(how):
    return nn.logical_axis_rules(RULES if how == "ambient rules" else ())


matrix = pytest.mark.parametrize("context", MESHES)
annotations = pytest.mark.parametrize("how", LINEN)


def check_split(found):
    """Every axis of the kernel is halved, the stacked one too, so that equal shards are no equal nothing."""
    [(shape, parts)] = [x for at, x in found.items() if at[-1] == "kernel"]
    assert {part for _, part in parts.values()} == {tuple(n // 2 for n in shape)}


@matrix
@annotations
@pytest.mark.parametrize("name", IN_LINEN)
def test_rows_2_6_7_53_68_linen_outside(name, how, context):
    mesh = mesh_of()
    wanted = expected(name, how, IN_LINEN)
    check_split(wanted)
    with rules_for(how), MESHES[context](mesh):
        assert linen_init(IN_LINEN[name][0](how), mesh) == wanted


@matrix
@annotations
@pytest.mark.parametrize("name", IN_NNX)
def test_rows_2_6_7_68_nnx_outside(name, how, context):
    """By NNX's recipe, and by Linen's from the boxes of the same variables."""
    mesh = mesh_of()
    wanted = expected(name, how, IN_NNX)
    check_split(wanted)
    with rules_for(how), MESHES[context](mesh):
        make = lambda: IN_NNX[name][0](how)  # noqa: E731
        assert nnx_init(make, mesh) == wanted
        if context == "set_mesh":
            assert nnx_init_by_linen(make, mesh) == wanted


# ---- rules that the two libraries read differently ----

#: `mlp` has the first mesh axis, so for `embed` the second rule counts in Linen, and the third never; in NNX the last.
REPEATED = (("mlp", "model"), ("embed", "model"), ("embed", "data"), ("embed", "pipe"))


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed"), ("embed", "other"), ("embed",)], ids=str)
def test_rules_of_a_linen_box_mean_in_nnx_what_they_mean_in_linen(names):
    layer = nn.Dense(8, kernel_init=nn.with_logical_partitioning(INIT, names, rules=REPEATED))
    mesh = mesh_of()
    wanted = linen_init(layer, mesh)
    make = lambda: ToNNX(layer, rngs=nnx.Rngs(0))  # noqa: E731
    assert nnx_init(make, mesh) == wanted
    assert nnx_init_by_linen(make, mesh) == wanted


# ---- numbers, axes, errors ----


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_row6_the_numbers_are_those_of_an_init_on_one_device(kind):
    mesh = mesh_of(kind)
    model = to_linen(nnx.Linear, 8, 8, kernel_init=nnx.with_partitioning(nn.initializers.normal(), ("data", "model")))
    shardings = nn.get_sharding(jax.eval_shape(model.init, KEY, X), mesh)
    made = jax.jit(model.init, out_shardings=shardings)(KEY, X)
    assert made["params"]["kernel"].value.sharding == NamedSharding(mesh, P("data", "model"))
    assert_trees_equal(jax.device_get(made), jax.device_get(jax.jit(model.init)(KEY, X)))


def test_row7_a_train_step_keeps_the_shards():
    """Gradients and new parameters are boxed and sharded as the parameters are, without a mesh in sight."""
    mesh = mesh_of()
    model = IN_LINEN["scan(ToLinen(NNX))"][0]("mesh names")
    shardings = nn.get_sharding(jax.eval_shape(model.init, KEY, X, None), mesh)
    variables = jax.jit(model.init, out_shardings=shardings)(KEY, X, None)

    @jax.jit
    def step(variables):
        grads = jax.grad(lambda v: model.apply(v, X, None)[0].mean())(variables)
        return jax.tree.map(lambda w, g: w - 0.1 * g, variables, grads)

    new = step(variables)
    after, before = (tree["params"]["inner"]["kernel"] for tree in (new, variables))
    assert shards({"params": after}) == shards({"params": before})
    assert after.metadata == before.metadata


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_rows_26_53_the_stacked_axis_is_named_where_it_is(axis):
    """Linen's own Partitioned puts the name of a negative axis one place too early."""
    for names in ((), ("data",), ("data", "model")):
        layer = mapped(to_linen_class(nnx.Linear, use_bias=False), variable_axes={"params": axis})
        model = layer(8, 8, kernel_init=nnx.with_partitioning(INIT, names))
        box = jax.eval_shape(model.init, KEY, X)["params"]["kernel"]
        spec = (*box.get_partition_spec(), None, None)
        assert spec[box.value.shape.index(4)] == "pipe"
        assert [name for name in spec if name not in (None, "pipe")] == [*names]
        again = jax.eval_shape(lambda v, m=model: m.apply(v, X, mutable=["params"])[1], {"params": {"kernel": box}})
        assert again["params"]["kernel"].metadata == box.metadata


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_rows_2_26_33_so_it_is_by_nnx_vmap(axis):
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    named = {"transform_metadata": {nnx.PARTITION_NAME: "pipe"}}
    for names in ((), ("data",), ("data", "model")):
        init = nnx.with_partitioning(INIT, names)
        make = lambda key, init=init: nnx.Linear(8, 8, kernel_init=init, use_bias=False, rngs=nnx.Rngs(key))  # noqa: E731
        model = nnx.eval_shape(lambda make=make: nnx.vmap(make, out_axes=axes, **named)(jax.random.split(KEY, 4)))
        spec = (*nnx.get_partition_spec(model).kernel.get_value(), None, None)
        assert spec[model.kernel.shape.index(4)] == "pipe"
        assert [name for name in spec if name not in (None, "pipe")] == [*names]


def test_rows_2_53_stacks_in_stacks():
    options = {**LAYERS, "metadata_params": {nn.PARTITION_NAME: "stages"}}
    model = nn.vmap(nn.scan(OfNnx, length=3, **LAYERS), in_axes=(None, None), axis_size=4, **options)(NNX["logical"])
    box = jax.eval_shape(model.init, KEY, X, None)["params"]["inner"]["kernel"]
    assert (box.value.shape, box.metadata["out_sharding"]) == ((4, 3, 8, 8), ("stages", "pipe", "embed", "mlp"))
    assert box.get_partition_spec() == P("stages", "pipe", "data", "model")


class Stacks(nn.Module):
    """Two stacks of layers under names of their own, as dense and expert layers of one model."""

    names: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x):
        for i, name in enumerate(self.names):
            options = {**LAYERS, "metadata_params": {} if name is None else {nn.PARTITION_NAME: name}}
            x, _ = nn.scan(OfNnx, length=2 + i, **options)(NNX["mesh names"], name=f"stack_{i}")(x, None)
        return x


def test_row37_each_stack_has_its_own_name_on_every_forward():
    model = Stacks(("dense_layers", "moe_layers"))
    variables = model.init(KEY, X)
    _, updated = model.apply(variables, X, mutable=["params"])
    for tree in (variables, updated):
        specs = {key: stack["inner"]["kernel"].get_partition_spec() for key, stack in tree["params"].items()}
        assert specs == {"stack_0": P("dense_layers", "data", "model"), "stack_1": P("moe_layers", "data", "model")}


def test_row37_a_stack_without_a_name_is_an_error_that_says_which():
    text = r"(?s)axis 0 of a Param of shape \(3, 8, 8\) with axis names.*found: metadata_params=\{\}.*PARTITION_NAME"
    with pytest.raises(AxisNameError, match=text):
        Stacks(("dense_layers", None)).init(KEY, X)
    variables = Stacks(("a", "b")).init(KEY, X)
    with pytest.raises(AxisNameError, match=r"expected: the name 'c'.*\n.*found: 'b'"):
        Stacks(("a", "c")).apply(variables, X)


def test_row15_nnx_stacks_of_wrapped_layers():
    """nnx.vmap gives the new axis no name unless it is told one; boxes say the same."""

    def make(key):
        return ToNNX(dense("mesh names"), rngs=nnx.Rngs(key)).lazy_init(X)

    keys = jax.random.split(KEY, 4)
    for options, name in (({}, None), ({"transform_metadata": {nnx.PARTITION_NAME: "pipe"}}, "pipe")):
        model = nnx.vmap(make, **options)(keys)
        assert model.kernel.out_sharding == (name, "data", "model")
        box = variables_of(model)["params"]["kernel"]
        assert (type(box), box.names) == (nn.Partitioned, (name, "data", "model"))
