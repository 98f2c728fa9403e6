"""EMA: the recurrence, what it shares with whom, and flax.nnx as oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from tests.strategies import Tied, portrait
from tests.tolerance import assert_trees_close, assert_trees_equal

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


class Model(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (3, 2), dtype), out_sharding=("in", "out"))
        self.b = nnx.Param(jnp.zeros(2, dtype))
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.rngs = nnx.Rngs(0)
        self.name = "model"

    def __call__(self, x):
        return x @ self.w + self.b


def flax_model(dtype):
    class Model(flax_nnx.Module):
        def __init__(self):
            self.w = flax_nnx.Param(jax.random.normal(jax.random.key(0), (3, 2), dtype))
            self.b = flax_nnx.Param(jnp.zeros(2, dtype))
            self.mean = flax_nnx.BatchStat(jnp.zeros(2))

    return Model()


def averages(ema):
    return nnx.to_pure_dict(ema.params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_updates_equal_flax(dtype):
    def run(library, model):
        ema = library.EMA(model, 0.99, only=library.Param)
        for i in range(3):
            model.w[...] = model.w[...] + jnp.asarray(i + 1, dtype)
            model.b[...] = model.b[...] - jnp.asarray(0.1, dtype)
            ema.update(model)
        return library.to_pure_dict(ema.params)

    assert_trees_equal(run(nnx, Model(dtype)), run(flax_nnx, flax_model(dtype)))


def test_it_equals_the_recurrence_and_optax():
    model = Model()
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    want = np.asarray(model.w[...], np.float64)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    by_optax = params
    for i in range(4):
        model.w[...] += i
        ema.update(model)
        want = 0.9 * want + 0.1 * np.asarray(model.w[...], np.float64)
        by_optax = optax.incremental_update(nnx.to_pure_dict(nnx.state(model, nnx.Param)), by_optax, 1 - 0.9)
    assert_trees_close(ema.params.w[...], want)
    assert_trees_close(averages(ema), by_optax)


def test_a_compiled_training_step_moves_the_view():
    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    view = ema.apply_to(model)
    variable, want, traces = ema.params.w, model.w[...], []
    x = jnp.arange(6.0).reshape(2, 3)

    @nnx.jit
    def step(model, optimizer, ema):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))
        ema.update(model)

    for _ in range(3):
        step(model, optimizer, ema)
        want = 0.9 * want + (1 - 0.9) * model.w[...]
    assert len(traces) == 1
    assert ema.params.w is variable is view.w
    assert_trees_close(view(x), x @ want + view.b[...])
    assert not bool((view.w == model.w).any())


def test_a_view_has_the_averages_and_all_else_of_the_model():
    model = Model()
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    view = ema.apply_to(model)
    assert type(view) is Model
    assert view is not model
    assert view.name == "model"
    assert view.w is ema.params.w
    assert view.b is ema.params.b
    assert view.mean is model.mean
    assert view.rngs.default.key is model.rngs.default.key
    assert type(ema.params.w) is nnx.Param
    assert ema.params.w.out_sharding == ("in", "out")
    assert model.w is not ema.params.w


def test_a_tied_parameter_has_one_average():
    model = Tied()
    ema = nnx.EMA(model, 0.5, only=nnx.Param)
    view = ema.apply_to(model)
    assert view.encode is view.decode
    assert view.encode.kernel is view.decode.kernel
    model.encode.kernel[...] += 2
    before = view.encode.kernel[...]
    ema.update(model)
    assert_trees_close(view.decode.kernel[...], before + 1)
    with pytest.raises(ValueError, match="graph=False"):
        nnx.EMA(model, 0.5, graph=False)


def test_arrays_are_not_shared_so_either_may_be_donated():
    model = Model()
    ema = nnx.EMA(model, 0.5)  # so that the average of equal numbers is that number, to the last bit
    nnx.jit(lambda m: None, donate_argnums=0)(model)
    nnx.jit(lambda m, e: e.update(m), donate_argnums=(0, 1))(model, ema)
    assert_trees_equal(averages(ema)["w"], Model().w[...])


def test_keys_and_counts_are_the_newest():
    model = Model()
    model.steps = nnx.Variable(jnp.array(5))
    ema = nnx.EMA(model, 0.9)
    model.rngs()
    model.steps[...] += 1
    ema.update(model)
    assert int(ema.params.steps[...]) == 6
    assert int(ema.params.rngs.default["count"][...]) == 1
    assert_trees_equal(ema.params.rngs.default.key[...], model.rngs.default.key[...])


def test_states_refs_and_trees_are_averaged():
    state = nnx.state(Model(), nnx.Param)
    ema = nnx.EMA(state, 0.5)
    ema.update(state.map(lambda _, v: v.replace(v * 3)))
    assert_trees_close(ema.params["w"][...], state["w"][...] * 2)
    ema.update(nnx.pure(state))  # plain arrays
    assert_trees_close(ema.params["w"][...], state["w"][...] * 1.5)
    tree = {"a": nnx.Param({"x": jnp.ones(2)}), "b": nnx.Param(jnp.ones(3), ref=True)}
    ema = nnx.EMA(tree, 0.5)
    tree["a"].set_value({"x": jnp.zeros(2)})
    tree["b"][...] = jnp.full(3, 3.0)
    ema.update(tree)
    assert_trees_equal(averages(ema), {"a": {"x": jnp.full(2, 0.5)}, "b": jnp.full(3, 2.0)})


def test_a_decay_that_is_an_array_is_data():
    model, traces = Model(), []
    ema = nnx.EMA(model, jnp.float32(0.9), only=nnx.Param)
    model.b[...] += 1

    @nnx.jit
    def update(ema, model):
        traces.append(1)
        ema.update(model)

    update(ema, model)
    assert_trees_close(ema.params.b[...], jnp.full(2, 0.1))
    ema.decay = jnp.float32(0.0)
    update(ema, model)
    assert_trees_equal(ema.params.b[...], model.b[...])
    assert len(traces) == 1


@pytest.mark.parametrize("copied", [nnx.clone, lambda e: nnx.merge(*nnx.split(e))], ids=["clone", "split and merge"])
def test_it_is_copied_and_restored(copied):
    model = Model()
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    twin = copied(ema)
    model.w[...] += 1
    ema.update(model)
    restored = nnx.EMA(Model(), 0.9, only=nnx.Param)
    nnx.update(restored, nnx.state(ema), strict=True)
    twin.update(model)
    assert_trees_equal(averages(twin), averages(ema))
    assert_trees_equal(averages(restored), averages(ema))
    assert nnx.graphdef(twin) == nnx.graphdef(ema)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_averages_are_placed_like_the_parameters():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    model = {"w": nnx.Param(jax.device_put(jnp.arange(16.0), sharding))}
    ema = nnx.EMA(model, 0.5)
    for _ in range(2):
        assert ema.params["w"].get_value().sharding.is_equivalent_to(sharding, 1)
        ema.update(model)


def test_what_does_not_fit_is_listed_and_nothing_is_written():
    model = Model()
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    before = portrait(ema)
    other = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"(?s)Missing from the state:\n  b\n  w.*not in the graph:\n  bias\n  kernel"):
        ema.update(other)
    with pytest.raises(
        ValueError, match=r"(?s)Missing from the state:\n  b\n  w\n.*not in the graph:(?=.*\n  bias).*\n  kernel"
    ):
        nnx.EMA(other, 0.9).apply_to({"b": model.b, "w": model.w})
    model.w.set_value(jnp.ones((4, 2)))
    model.b[...] += 1
    with pytest.raises(ValueError, match=r"w: expected shape \(3, 2\), found shape \(4, 2\)"):
        ema.update(model)
    assert portrait(ema) == before


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"follows Variables, found ArrayImpl at a\[0\].*only=nnx\.Param"):
        nnx.EMA({"a": [jnp.ones(2)]}, 0.9)
    with pytest.raises(TypeError, match=r"(?s)number in \[0, 1\].*found    1\.5"):
        nnx.EMA(Model(), 1.5)


def test_it_is_not_written_under_another_trace():
    model = Model()
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    with pytest.raises(ValueError, match="Cannot write"):
        nnx.jit(lambda m: ema.update(m))(model)


@pytest.mark.parametrize("method", ["__init__", "update", "apply_to"])
def test_signatures_are_those_of_flax(method):
    def parameters(library):
        signature = inspect.signature(getattr(library.EMA, method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(nnx) == parameters(flax_nnx)
