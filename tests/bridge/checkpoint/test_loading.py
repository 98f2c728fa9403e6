"""load_into: checkpoints of either layout into models with values and without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
import nnx_core as nnx
from bridge._errors import CheckpointLayoutError
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.loading import load_into
from bridge.checkpoint.rules.apply import Rule, Rules
from nnx_core import sharding
from tests.support.placed_models import BIAS, KERNEL, Scanned, abstract, assert_untouched, contents, mesh, wide
from tests.support.training import OPTIMIZERS, RULES, STEPS, Native, linen_state, native, native_step, on_host, saved
from tests.tolerance import assert_trees_close, assert_trees_equal

# ---- training goes on --------------------------------------------------------------------------------------------


def trained_on(path, make, over=None):
    """The variables after STEPS more steps in NNX, under Linen's names."""
    model, optimizer = abstract(lambda: native(make()), over)
    load_into(model, path, RULES, optimizer=optimizer)
    for _ in range(STEPS):
        native_step(model, optimizer)
    assert int(optimizer.step[...]) == 2 * STEPS
    values = bridge.variables_of(model, rename={"hidden": "first", "norm": "bn", "head": "last"})
    return on_host({"params": values["params"], "batch_stats": values["batch_stats"]})


def linen_variables(state):
    return on_host({"params": state.params, "batch_stats": state.batch_stats})


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_linen_from_disk_then_nnx(tmp_path, make):
    path = saved(tmp_path / "linen", linen_state(make(), STEPS))
    assert_trees_equal(trained_on(path, make), linen_variables(linen_state(make(), 2 * STEPS)))


@pytest.mark.slow
def test_linen_from_disk_then_nnx_on_a_mesh(tmp_path):
    make = OPTIMIZERS["adamw chain"]
    path = saved(tmp_path / "linen", linen_state(make(), STEPS))
    # not to the bit: it is another program, which XLA compiles for eight devices
    assert_trees_close(trained_on(path, make, mesh()), linen_variables(linen_state(make(), 2 * STEPS)))


def test_an_optimizer_with_several_arrays_of_one_param(tmp_path):
    def make():
        return optax.sm3(1e-2)

    state = linen_state(make(), 1)
    model, optimizer = native(make())
    report = load_into(model, saved(tmp_path / "linen", state), RULES, optimizer=optimizer)
    kernel = state.opt_state[0].mu["hidden"]["kernel"]
    assert len(kernel) == 2
    found = {tuple(row["sources"][0]): row["target"] for row in report.rows if row["sources"]}
    assert ("opt_state", "0", "mu", "hidden", "kernel", "0") in found
    again, fresh = native(make())
    load_into(again, saved(tmp_path / "nnx", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}), None)
    load_into(again, tmp_path / "nnx", optimizer=fresh)
    assert_trees_equal(on_host(nnx.to_pure_dict(nnx.state(fresh))), on_host(nnx.to_pure_dict(nnx.state(optimizer))))


# ---- layers that are laid out otherwise --------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(x), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="layers")(x, None)[0]


class Layers(nnx.Module):
    def __init__(self, rngs):
        init = sharding.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        self.layers = nnx.List([nnx.Linear(8, 8, kernel_init=init, rngs=rngs) for _ in range(4)])


def scanned_state():
    params = Stacked().init(jax.random.key(0), jnp.zeros((2, 8)))["params"]
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).apply_gradients(
        grads=jax.tree.map(lambda x: x * 0.5, params)
    )


def test_a_stack_into_layers(tmp_path):
    state = scanned_state()

    def make():
        model = Layers(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    model, optimizer = abstract(make, mesh())
    rules = Rules([Rule("params/layers/Dense_0/**", "params/layers/{i}/**", unstack=0)])
    load_into(model, saved(tmp_path / "scan", state), rules, optimizer=optimizer)
    stacks = state.params["layers"]["Dense_0"], state.opt_state[0].mu["layers"]["Dense_0"]
    for index in range(4):
        moments = nnx.state(optimizer)["opt_state"][0]["mu"]["layers"][index]
        for name in ("kernel", "bias"):
            assert_trees_equal(*on_host((getattr(model.layers[index], name)[...], stacks[0][name][index])))
            assert_trees_equal(*on_host((moments[name][...], stacks[1][name][index])))
        assert model.layers[index].kernel.get_raw_value().sharding.spec == P("data", "model")


def test_layers_into_a_stack(tmp_path):
    numbers = np.arange(4 * 8 * 8, dtype="float32").reshape(4, 8, 8)
    layers = {f"Dense_{i}": {"kernel": numbers[i], "bias": numbers[i, 0]} for i in range(4)}
    model = abstract(lambda: Scanned(nnx.Rngs(0)), mesh())
    rules = Rules([Rule(r"params/Dense_(\d+)/*", "params/*", stack=0)])
    load_into(model, saved(tmp_path / "layers", {"params": layers}), rules)
    assert model.kernel.get_raw_value().sharding.spec == P("model", "data")
    np.testing.assert_array_equal(np.asarray(model.kernel[...]), numbers)
    np.testing.assert_array_equal(np.asarray(model.bias[...]), numbers[:, 0])


@pytest.mark.slow
def test_gates_that_are_fused(tmp_path):
    cell = nn.OptimizedLSTMCell(16)
    x = jnp.zeros((2, 8))
    variables = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(1), x.shape), x)
    path = saved(tmp_path / "lstm", variables)

    def make():
        return nnx.OptimizedLSTMCell(8, 16, rngs=nnx.Rngs(0))

    carry = cell.initialize_carry(jax.random.key(1), x.shape)
    rules = derive(cell, abstract(make), carry, x)
    model = make()
    over = NamedSharding(mesh(), P("data", "model"))
    model.dense_i.kernel.set_raw_value(jax.device_put(model.dense_i.kernel.get_raw_value(), over))
    load_into(model, path, rules)
    x = jax.random.normal(jax.random.key(3), (2, 8))
    params = variables["params"]
    gates = [params[f"i{gate}"]["kernel"] for gate in "ifgo"]
    np.testing.assert_array_equal(np.asarray(model.dense_i.kernel[...]), np.concatenate(gates, axis=1))
    assert model.dense_i.kernel.get_raw_value().sharding == over


def test_a_value_from_the_rules(tmp_path):
    path = saved(tmp_path / "linen", {"params": {"dense": {"kernel": KERNEL}}})
    new = {"value": 7.0, "shape": [32], "dtype": "float32"}
    model = abstract(wide("data", None), mesh())
    load_into(model, path, Rules([Rule(target="params/dense/bias", new=new)]))
    np.testing.assert_array_equal(np.asarray(model.dense.bias[...]), np.full(32, 7, "float32"))
    own, bias = wide("data", None)(), np.asarray(model.dense.bias[...])
    own.dense.bias[...] = bias
    load_into(own, path, Rules([Rule(target="params/dense/bias", new="target")]))
    np.testing.assert_array_equal(np.asarray(own.dense.bias[...]), bias)
    np.testing.assert_array_equal(np.asarray(own.dense.kernel[...]), KERNEL)


# ---- random streams ----------------------------------------------------------------------------------------------


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def dropping(seed=0):
    return Dropping(nnx.Rngs(seed))


def stream(model):
    return jax.random.key_data(model.drop.rngs.key[...]), model.drop.rngs.count[...]


def test_a_real_model_keeps_its_streams(dense):
    model = dropping(5)
    load_into(model, dense)
    assert_trees_equal(stream(model), stream(dropping(5)))


def test_an_abstract_model_needs_a_seed(dense):
    model = abstract(dropping, mesh())
    before = contents(model)
    with pytest.raises(CheckpointLayoutError, match=r"drop/rngs/(count|key)"):
        load_into(model, dense)
    assert_untouched([model], before)
    load_into(model, dense, rng=7)
    assert model.drop.rngs.key.get_raw_value().sharding.is_fully_replicated
    assert str(model.drop.rngs.key.get_raw_value().dtype) == "key<fry>"
    one, other = abstract(dropping), abstract(dropping)
    load_into(one, dense, rng=7)
    load_into(other, dense, rng=8)
    assert_trees_equal(on_host(stream(one)), on_host(stream(model)))
    assert not np.array_equal(*(stream(x)[0] for x in (one, other)))


@pytest.mark.parametrize("make_mesh", [lambda: None, mesh], ids=["one device", "mesh"])
def test_streams_of_an_nnx_checkpoint(tmp_path, make_mesh):
    over = make_mesh()
    origin = dropping(11)
    origin.drop(jnp.ones((3,)))
    path = saved(tmp_path / "nnx", nnx.state(origin))
    model = abstract(dropping, over)
    load_into(model, path)
    assert_trees_equal(on_host(stream(model)), on_host(stream(origin)))
    assert int(model.drop.rngs.count[...]) == 1
    own = dropping(5)
    load_into(own, path, rng="drop")
    assert_trees_equal(stream(own), stream(dropping(5)))
    assert_trees_equal(*on_host((own.dense.kernel[...], origin.dense.kernel[...])))


# ---- other models ------------------------------------------------------------------------------------------------


def test_a_wrapped_linen_module(tmp_path):
    module = nn.Dense(32)
    path = saved(tmp_path / "linen", {"params": {"kernel": KERNEL, "bias": BIAS}})

    def make():
        return bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(0)), jnp.zeros((2, 16)))

    for model in (make(), nnx.eval_shape(make)):
        load_into(model, path, rng=0)
        expected = module.apply({"params": {"kernel": KERNEL, "bias": BIAS}}, jnp.ones((2, 16)))
        assert_trees_equal(model(jnp.ones((2, 16))), expected)


def test_a_model_of_flax_nnx(dense):
    class Model(flax_nnx.Module):
        def __init__(self):
            self.dense = flax_nnx.Linear(16, 32, rngs=flax_nnx.Rngs(0))

    for model in (Model(), flax_nnx.eval_shape(Model)):
        load_into(model, dense, rng=0)
        np.testing.assert_array_equal(np.asarray(model.dense.kernel[...]), KERNEL)


def test_a_ref_is_written_into(dense):
    model = wide(None, None)()
    model.dense.kernel = nnx.Param(model.dense.kernel.get_raw_value(), ref=True)
    ref = model.dense.kernel.get_raw_value()
    load_into(model, dense)
    assert model.dense.kernel.get_raw_value() is ref
    np.testing.assert_array_equal(np.asarray(ref[...]), KERNEL)


def test_a_number_stays_one(tmp_path):
    class Counted(nnx.Module):
        def __init__(self):
            self.seen = nnx.BatchStat(3)

    model = Counted()
    load_into(model, saved(tmp_path / "numbers", {"params": {}, "batch_stats": {"seen": jnp.int32(7)}}))
    assert model.seen.get_raw_value() == 7
    assert type(model.seen.get_raw_value()) is int


def test_other_formats_are_not_mapped_into_the_model(tmp_path):
    """JAX would take an aligned view of the file as the array itself: what is written there later would be seen."""
    file = tmp_path / "linen.safetensors"
    kernel = np.ones((512, 512), "float32")
    content = safetensors.numpy.save({"params/dense/kernel": kernel, "params/dense/bias": kernel[0]})
    length = int.from_bytes(content[:8], "little")
    padding = -(8 + length) % 64
    header = (length + padding).to_bytes(8, "little") + content[8 : 8 + length] + b" " * padding
    file.write_bytes(header + content[8 + length :])
    model = nnx.eval_shape(lambda: nnx.Dict(dense=nnx.Linear(512, 512, rngs=nnx.Rngs(0))))
    with jax.set_mesh(mesh()):
        model = nnx.as_abstract(model)
    load_into(model, file)
    with file.open("r+b") as opened:
        opened.seek(len(header))
        opened.write(b"\0" * (file.stat().st_size - len(header)))
    np.testing.assert_array_equal(np.asarray(model["dense"].kernel[...]), kernel)
    np.testing.assert_array_equal(np.asarray(model["dense"].bias[...]), kernel[0])


def test_the_report(tmp_path):
    path = saved(tmp_path / "linen", linen_state(optax.adam(0.1), 1))
    model = Native(rngs=nnx.Rngs(0))
    report = load_into(model, path, RULES)
    assert len(report.rows) == 8
    assert report.source_layout == "Linen TrainState"
    assert {row["source"][0] for row in report.dropped} == {"opt_state", "step"}
