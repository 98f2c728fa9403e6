"""Where new Variables go on eight devices, where flax.nnx is no oracle; where it is, see `test_sharding_as_flax`.

Law: what a mesh does is a matter of places; the numbers are those of one device.
"""

import contextlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core import modes, sharding
from tests.support.placed_layers import (
    AXES,
    TX,
    X,
    keys,
    layer_of,
    linear,
    loss_fn,
    make_mesh,
    numbers,
    places,
    spec_of,
)
from tests.tolerance import assert_trees_close, assert_trees_equal

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param, request.param)


@pytest.fixture
def auto():
    return make_mesh(AxisType.Auto, AxisType.Auto)


@pytest.fixture
def explicit():
    return make_mesh(AxisType.Explicit, AxisType.Explicit)


def test_names_that_the_mesh_has_not_move_nothing(mesh):
    """Rows 7 and 68: flax.nnx raises in each of these."""
    with jax.set_mesh(mesh):
        model = linear(nnx, ("embed", "model"))
        assert spec_of(model.kernel.get_value()) == ()
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        assert set(places(nnx, optimizer).values()) == {()}
        made = nnx.jit(lambda: linear(nnx, (("data", "fsdp"), None)))()
        assert spec_of(made.kernel.get_value()) == ()
        assert nnx.eval_shape(lambda: linear(nnx, ("embed", None))).kernel.shape == (4, 8)
    assert spec_of(linear(nnx).kernel.get_value()) is None
    w = nnx.Param(X, out_sharding=("embed", None), mesh=mesh)
    assert w.get_value() is X


def test_the_older_mesh_context_is_no_ambient_mesh(auto):
    with pytest.warns(DeprecationWarning, match="with mesh:"), auto:
        assert spec_of(linear(nnx).kernel.get_value()) is None


def test_what_does_not_fit_is_named(mesh):
    with jax.set_mesh(mesh):
        text = r"Param with axis names \('data', 'model'\) has more names than axes: its shape is \(4,\)"
        with pytest.raises(ValueError, match=text):
            nnx.Param(jnp.ones(4), out_sharding=AXES)
        text = r"stands for P\('data', 'model'\): axis 1 of shape \(2, 6\) cannot be divided evenly over a mesh of"
        with pytest.raises(ValueError, match=rf"(?s){text} \{{'data': 2, 'model': 4\}}\. Give that axis None"):
            nnx.Param(jnp.ones((2, 6)), out_sharding=AXES)
        with pytest.raises(ValueError, match="one axis for two of them"):
            nnx.Param(jnp.ones((2, 6)), out_sharding=("data", "data"))


def test_a_pytree_is_placed_where_it_has_the_axes(mesh):
    with jax.set_mesh(mesh):
        value = nnx.Param({"kernel": jnp.ones((4, 8)), "scale": jnp.ones(8), "bits": 4}, out_sharding=AXES).get_value()
    assert spec_of(value["kernel"]) == AXES
    assert spec_of(value["scale"]) == ()
    assert value["bits"] == 4


def test_a_name_alone_is_that_of_the_first_axis(mesh):
    with jax.set_mesh(mesh):
        w = nnx.Param(jnp.ones((4, 8)), out_sharding="data")
    assert spec_of(w.get_value()) == ("data",)
    w.add_axis(0)
    assert w.out_sharding == (None, "data")


def test_a_format_says_the_layout_too(mesh):
    at = Format(Layout((1, 0)), NamedSharding(mesh, P("data", "model")))
    w = nnx.Param(jnp.ones((4, 8)), out_sharding=at)
    assert w.get_value().format.layout.major_to_minor == (1, 0)
    assert w.get_value().sharding == at.sharding
    assert sharding.get_var_pspec(w) == P("data", "model")
    with jax.set_mesh(mesh):
        made = nnx.jit(lambda: nnx.Param(jnp.ones((4, 8)), out_sharding=at))()
    assert spec_of(made.get_value()) == AXES


def test_one_device_is_a_place_too():
    device = jax.devices()[3]
    w = nnx.Param(jnp.ones((4, 8)), out_sharding=jax.sharding.SingleDeviceSharding(device))
    assert w.get_value().devices() == {device}
    assert sharding.get_var_pspec(w) == P()


@pytest.mark.parametrize("index", [0, 1, 2, -1])
@pytest.mark.parametrize("name", [None, "layers"])
def test_an_axis_comes_and_goes_in_shardings(auto, index, name):
    """Law 7, where the names are those of a NamedSharding or a Format."""
    at = NamedSharding(auto, P("data", "model"))
    for given in (at, Format(Layout((1, 0)), at)):
        w = nnx.Param(jnp.ones((4, 8)), out_sharding=given)
        w.add_axis(index, name)
        before = [*AXES]
        before.insert(index if index >= 0 else 3 + index, None)
        assert sharding.get_var_pspec(w) == P(*before)
        w.remove_axis(index, name)
        assert w.out_sharding == given


def test_an_axis_of_the_mesh_enters_a_named_sharding(auto):
    w = nnx.Param(jnp.ones((4, 8)), out_sharding=NamedSharding(auto, P(None, "model")))
    w.add_axis(0, "data")
    assert w.out_sharding == NamedSharding(auto, P("data", None, "model"))
    w.remove_axis(0, "data")
    assert w.out_sharding == NamedSharding(auto, P(None, "model"))


@pytest.mark.parametrize("given", ["names", "sharding"])
def test_vmap_over_creation_with_a_named_axis(mesh, given):
    def make(_):
        names = AXES if given == "names" else NamedSharding(mesh, P(*AXES))
        return nnx.Param(jnp.ones((4, 8)), out_sharding=names, optimizer_sharding=("model", None))

    with jax.set_mesh(mesh):
        w = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})(jnp.arange(3))
        assert spec_of(w.get_value()) == (None, *AXES)
        assert w.optimizer_sharding == ("layers", "model", None)
        each = nnx.vmap(lambda w: w[...].sum(), transform_metadata={nnx.PARTITION_NAME: "layers"})(w)
    assert each.tolist() == [32.0] * 3


def test_moments_of_stacked_layers_have_an_axis_more(mesh):
    """Row 15, for the names that are the optimizer's own."""

    def make(key):
        init = nnx.with_partitioning(nnx.initializers.ones, AXES, optimizer_sharding=("model", None))
        return nnx.Linear(4, 8, kernel_init=init, use_bias=False, rngs=nnx.Rngs(key))

    with jax.set_mesh(mesh):
        model = nnx.vmap(make)(keys())
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        moments = nnx.vmap(lambda m: nnx.Optimizer(m, TX, wrt=nnx.Param))(model)
    for each in (optimizer, moments):
        moment = each.opt_state[0].mu["kernel"]
        assert moment.out_sharding == (None, "model", None)
        assert spec_of(moment.get_value()) == (None, "model")


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True], ids=["eager", "jit"])
def test_moments_stay_where_their_own_names_say(mesh, staged):
    """flax.nnx forgets the place at the first step, and raises on explicit axes."""

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    def trained(make):
        model = make()
        optimizer = nnx.Optimizer(model, optax.chain(TX, optax.ema(0.9)), wrt=nnx.Param)
        run = nnx.jit(step) if staged else step
        for _ in range(2):
            run(model, optimizer)
        return model, optimizer

    expected = trained(lambda: linear(nnx))
    with jax.set_mesh(mesh):
        model, optimizer = trained(lambda: linear(nnx, optimizer_sharding=("model", None)))
    assert_trees_close(numbers(nnx, (model, optimizer)), numbers(nnx, expected))
    assert spec_of(model.kernel.get_value()) == AXES
    kernels = {path: spec for path, spec in places(nnx, optimizer).items() if path[-1] == "kernel"}
    assert list(kernels.values()) == [("model",)] * 3


def test_moments_elsewhere_take_the_other_arguments_with_them(mesh):
    tx = optax.polyak_sgd(1.0)
    plain = linear(nnx)
    nnx.Optimizer(plain, tx, wrt=nnx.Param).update(plain, nnx.grad(loss_fn)(plain), value=loss_fn(plain))
    with jax.set_mesh(mesh):
        model = linear(nnx, optimizer_sharding=("model", None))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.grad(loss_fn)(model), value=loss_fn(model))
    assert_trees_close(numbers(nnx, model), numbers(nnx, plain))


def test_factored_moments_stay_where_they_are_made(mesh):
    """flax.nnx raises: they have not the axes of their parameter."""
    metadata = {"out_sharding": AXES}
    with jax.set_mesh(mesh):
        model = nnx.Linear(128, 256, rngs=nnx.Rngs(0), kernel_metadata=metadata)
        optimizer = nnx.Optimizer(model, optax.adafactor(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((2, 128))) ** 2).mean())(model))

        step(model, optimizer)
    assert spec_of(model.kernel.get_value()) == AXES
    assert optimizer.opt_state[0].v_row["kernel"].shape == (128,)


def test_a_model_made_without_a_mesh_gets_placed_moments(mesh):
    model, expected = linear(nnx), linear(nnx)
    with jax.set_mesh(mesh):
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        assert spec_of(optimizer.opt_state[0].mu["kernel"].get_value()) == AXES
        optimizer.update(model, nnx.grad(loss_fn)(model))
    nnx.Optimizer(expected, TX, wrt=nnx.Param).update(expected, nnx.grad(loss_fn)(expected))
    assert_trees_close(numbers(nnx, model), numbers(nnx, expected))


def test_axes_of_two_types():
    both = make_mesh(AxisType.Explicit, AxisType.Auto)
    with jax.set_mesh(both):
        eager, staged = linear(nnx), nnx.jit(linear, static_argnums=0)(nnx)
        tree = nnx.vmap(layer_of(nnx))(keys())
    assert spec_of(eager.kernel.get_value()) == spec_of(staged.kernel.get_value()) == AXES
    assert spec_of(tree.kernel.get_value()) == (None, *AXES)


def test_a_mesh_without_devices_takes_those_of_the_ambient_one(mesh):
    at = NamedSharding(mesh.abstract_mesh, P("data"))
    assert spec_of(nnx.Param(jnp.asarray(X), out_sharding=at).get_value()) is None
    with jax.set_mesh(mesh):
        assert nnx.Param(jnp.asarray(X), out_sharding=at).get_value().sharding == NamedSharding(mesh, P("data"))


def test_inside_shard_map_a_new_value_is_a_shard_already(auto):
    def make(x):
        return nnx.Param(x * 2, out_sharding=AXES), nnx.Param(x * 3, out_sharding=NamedSharding(auto, P(*AXES)))

    with jax.set_mesh(auto):
        twice, thrice = nnx.shard_map(make, mesh=auto, in_specs=P(*AXES), out_specs=P(*AXES))(jnp.asarray(X))
    np.testing.assert_array_equal(twice[...], X * 2)
    np.testing.assert_array_equal(thrice[...], X * 3)
    assert spec_of(twice.get_value()) == AXES


def test_pmap_over_creation_leaves_what_is_one_shard(auto):
    def make(key):
        return nnx.Param(jax.random.uniform(key, (4, 8)), out_sharding=AXES, mesh=auto)

    w = nnx.pmap(make)(jax.random.split(jax.random.key(0), 8))
    assert w.shape == (8, 4, 8)


# ---- abstract models ----


def test_eval_shape_says_where_values_will_be(mesh):
    def make():
        model = linear(nnx)
        return {"model": model, "optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param)}

    with jax.set_mesh(mesh):
        abstract, real = nnx.eval_shape(make), make()
    assert places(nnx, abstract) == places(nnx, real)
    shards = {v.get_value().sharding.mesh for _, v in nnx.to_flat_state(nnx.state(abstract["model"]))}
    assert shards == {mesh}
    with jax.set_mesh(mesh):
        as_abstract = sharding.as_abstract(abstract)
        assert places(nnx, as_abstract) == places(nnx, real)
        with nnx.use_eager_sharding(False):
            off = nnx.eval_shape(make)["model"].kernel.get_value().sharding
    assert off is None or not any(off.spec)
    assert nnx.eval_shape(make)["model"].kernel.get_value().sharding is None


def test_eval_shape_leaves_its_arguments_alone(mesh):
    model = linear(nnx)
    kernel = model.kernel.get_value()
    with jax.set_mesh(mesh):
        out = nnx.eval_shape(lambda m: m, model)
    assert model.kernel.get_value() is kernel
    assert out is not model
    assert spec_of(out.kernel.get_value()) == AXES


def test_what_a_trace_placed_keeps_its_place(explicit):
    @jax.jit
    def with_axes():
        w = nnx.eval_shape(lambda: nnx.Param(jax.sharding.reshard(jnp.ones((4, 8)), P("data"))))
        seen.append(sharding.as_abstract(w).get_value().sharding.spec)
        return 0

    seen = []
    with jax.set_mesh(explicit):
        with_axes()
        w = sharding.as_abstract(nnx.eval_shape(lambda: nnx.Param(jax.sharding.reshard(jnp.ones((4, 8)), P("data")))))
    assert seen == [P("data", None)]
    assert w.get_value().sharding == NamedSharding(explicit, P("data", None))


@pytest.mark.parametrize("inside", [False, True], ids=["mesh given", "mesh around"])
def test_the_sharded_init_recipe_with_and_without_a_mesh_around(mesh, inside):
    """Row 6."""

    def make():
        model = linear(nnx)
        return nnx.state((model, nnx.Optimizer(model, TX, wrt=nnx.Param)))

    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        shardings = sharding.get_named_sharding(jax.eval_shape(make), mesh)
        if inside or AxisType.Auto in mesh.axis_types:
            state = jax.jit(make, out_shardings=shardings)()
            assert spec_of(state[0]["kernel"].get_value()) == AXES
        graphdef, abstract = sharding.get_abstract_model(lambda: linear(nnx), mesh)
    assert abstract["kernel"].get_value().sharding == NamedSharding(mesh, P(*AXES))
    assert nnx.merge(graphdef, abstract).kernel.out_sharding == AXES


# ---- switches ----


def test_the_switch_and_those_of_flax(monkeypatch):
    assert nnx.using_eager_sharding()
    assert modes.use_eager_sharding is nnx.use_eager_sharding
    with flax_nnx.use_eager_sharding(False):
        assert not nnx.using_eager_sharding()
        with nnx.use_eager_sharding(True):
            assert nnx.using_eager_sharding()
    flax.config.update("flax_always_shard_variable", False)
    try:
        assert not nnx.using_eager_sharding()
        assert not nnx.use_eager_sharding.current_value()
        monkeypatch.delitem(sys.modules, "flax.nnx")
        assert not nnx.using_eager_sharding()
    finally:
        flax.config.update("flax_always_shard_variable", True)
    assert nnx.using_eager_sharding()
    monkeypatch.setitem(sys.modules, "flax.nnx", nnx)  # a program that runs on this package under flax.nnx's name
    assert nnx.using_eager_sharding()
    monkeypatch.delitem(sys.modules, "flax.configurations")
    for word, on in {"false": False, "0": False, "True": True}.items():
        monkeypatch.setenv("FLAX_ALWAYS_SHARD_VARIABLE", word)
        assert nnx.using_eager_sharding() == on


def test_without_flax_values_are_placed_too():
    program = """
import sys, jax, jax.numpy as jnp, nnx_core as nnx
with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    print(nnx.Param(jnp.ones(8), out_sharding=("data",)).get_value().sharding.spec, "flax" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.split() in (["P('data',)", "False"], ["PartitionSpec('data',)", "False"])


def test_what_one_variable_says_is_kept(mesh):
    w = nnx.Param(X, out_sharding=AXES, eager_sharding=False)
    assert w.get_metadata("eager_sharding") is False
    assert "eager_sharding" not in nnx.Param(X, out_sharding=AXES).get_metadata()
    init = nnx.with_partitioning(nnx.initializers.ones, AXES, eager_sharding=False)
    with jax.set_mesh(mesh):
        assert spec_of(nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0)).kernel.get_value()) == ()


# ---- layers, and jit with in_shardings ----


@pytest.mark.sample(8)
@pytest.mark.parametrize("broadcast_dims", [(), (0,), (1,)])
@pytest.mark.parametrize("staged", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("ambient", [False, True], ids=["no mesh around", "mesh around"])
def test_dropout_on_a_mesh_drops_what_it_drops_on_one_device(mesh, broadcast_dims, staged, ambient):
    def dropped(x):
        layer = nnx.Dropout(0.5, broadcast_dims=broadcast_dims, rngs=nnx.Rngs(0))
        return (nnx.jit(lambda layer, x: layer(x)) if staged else lambda layer, x: layer(x))(layer, x)

    expected = dropped(jnp.asarray(X))
    x = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P(*AXES)))
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        y = dropped(x)
    np.testing.assert_array_equal(y, expected)
    assert spec_of(y) == AXES


def test_an_argument_stays_where_in_shardings_put_it(mesh):
    kernel = NamedSharding(mesh, P("data", "model"))
    specs = nnx.StateSharding({nnx.PathContains("kernel"): kernel, ...: NamedSharding(mesh, P())})
    traces = []

    @nnx.jit(in_shardings=(specs, None))
    def f(model, x):
        traces.append(1)
        return model(x).sum()

    model = linear(nnx)
    variable, before = model.kernel, np.asarray(model.kernel[...])
    for _ in range(3):
        f(model, jnp.asarray(X[:, :4]))
    assert model.kernel is variable
    assert model.kernel.get_value().sharding == kernel
    assert spec_of(model.bias.get_value()) == ()
    np.testing.assert_array_equal(model.kernel[...], before)
    assert len(traces) == 1
    value = model.kernel.get_value()
    f(model, jnp.asarray(X[:, :4]))
    assert model.kernel.get_value() is value  # what is there already is not moved again


def test_a_call_that_raises_moves_nothing(mesh):
    model = linear(nnx)
    before = model.kernel.get_value()

    @nnx.jit(in_shardings=(nnx.StateSharding({...: NamedSharding(mesh, P())}),))
    def f(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        f(model)
    assert model.kernel.get_value() is before


def test_in_shardings_inside_of_a_trace_write_nothing_outside(auto):
    model = linear(nnx)
    before = model.kernel.get_value()
    specs = nnx.StateSharding({...: NamedSharding(auto, P())})
    inner = nnx.jit(lambda m: m.kernel.sum(), in_shardings=(specs,))
    assert_trees_close(jax.jit(lambda: inner(model))(), before.sum())
    assert model.kernel.get_value() is before
    assert_trees_close(nnx.jit(lambda m: inner(m))(model), before.sum())


def test_a_partition_spec_in_in_shardings(mesh):
    with jax.set_mesh(mesh):
        model = linear(nnx, ("data", None))
        f = nnx.jit(
            lambda m: m.kernel.sum(),
            in_shardings=(nnx.StateSharding({nnx.PathContains("kernel"): P("data"), ...: P()}),),
        )
        for _ in range(2):
            assert_trees_close(f(model), linear(nnx, ()).kernel[...].sum())
    assert spec_of(model.kernel.get_value()) == ("data",)
    with pytest.raises(RuntimeError, match="mesh"):
        f(linear(nnx))


def test_a_training_step_is_that_of_one_device(mesh):
    def train(place):
        model = linear(nnx)
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        step = nnx.jit(lambda m, o: o.update(m, nnx.grad(loss_fn)(m)))
        for _ in range(3):
            step(model, optimizer)
        return numbers(nnx, (model, optimizer))

    expected = train(None)
    with jax.set_mesh(mesh):
        assert_trees_close(train(mesh), expected)
    assert_trees_equal(train(None), expected)
