"""load_into: checkpoints of either layout into models with values and without, on the shardings that they have."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bridge
import nnx_core as nnx
from bridge._errors import CheckpointCorruptError, CheckpointLayoutError, VariablesMismatchError
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.formats.orbax.read import OrbaxSource
from bridge.checkpoint.loading import ShardingError, load_into
from bridge.checkpoint.rules.apply import Rule, Rules
from nnx_core import sharding
from nnx_core._errors import TraceError
from tests.bridge.checkpoint.test_restore import Native, native_step
from tests.bridge.checkpoint.test_resume import OPTIMIZERS, RULES, STEPS, linen_state, native
from tests.tolerance import assert_trees_close, assert_trees_equal

ROOT = Path(__file__).parents[3]
KERNEL = np.arange(16 * 32, dtype="float32").reshape(16, 32)
BIAS = np.linspace(-1, 1, 32, dtype="float32")


def saved(path, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)
    return path


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


@pytest.fixture
def dense(tmp_path):
    return saved(tmp_path / "dense", {"params": {"dense": {"kernel": KERNEL, "bias": BIAS}}})


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


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


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


# ---- where shards go ---------------------------------------------------------------------------------------------

ORDERS = {"in order": None, "interleaved": [0, 4, 1, 5, 2, 6, 3, 7]}
SPECS = [("data", None), (None, "model"), ("model", "data"), (("data", "model"), None), (None, None), ("data",)]


@pytest.fixture
def reads(monkeypatch):
    """Every array that is read, as (path, bytes)."""
    found = []
    read = OrbaxSource.read

    def recorded(self, path, region=None):
        value = read(self, path, region)
        found.append((path, np.asarray(value).nbytes))
        return value

    monkeypatch.setattr(OrbaxSource, "read", recorded)
    return found


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("names", SPECS, ids=str)
def test_shards(dense, reads, names, order):
    model = abstract(wide(*names), mesh(order=order))
    wanted = model.dense.kernel.get_raw_value().sharding
    load_into(model, dense)
    kernel = model.dense.kernel.get_raw_value()
    assert kernel.sharding == wanted
    assert kernel.committed
    assert len(kernel.addressable_shards) == 8
    for shard in kernel.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), KERNEL[shard.index])
    assert model.dense.bias.get_raw_value().sharding.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(model.dense.bias[...]), BIAS)
    assert dict(reads) == {("params", "dense", "kernel"): KERNEL.nbytes, ("params", "dense", "bias"): BIAS.nbytes}
    assert len(reads) == 2


def test_some_of_the_devices(dense):
    half = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    model = wide(None, None)()
    whole = NamedSharding(half, P("data"))
    model.dense.kernel.set_raw_value(jax.device_put(jnp.zeros((16, 32)), whole))
    load_into(model, dense)
    assert model.dense.kernel.get_raw_value().sharding == whole
    np.testing.assert_array_equal(np.asarray(model.dense.kernel[...]), KERNEL)


def test_a_real_model_keeps_its_places_and_variables(dense):
    model = wide("data", "model")()
    over = NamedSharding(mesh(), P("data", "model"))
    third = jax.devices()[3]
    model.dense.kernel.set_raw_value(jax.device_put(model.dense.kernel.get_raw_value(), over))
    model.dense.bias.set_raw_value(jax.device_put(model.dense.bias.get_raw_value(), third))
    kernel, bias, metadata = model.dense.kernel, model.dense.bias, dict(model.dense.kernel.get_metadata())
    load_into(model, dense)
    assert model.dense.kernel is kernel
    assert model.dense.bias is bias
    assert kernel.get_metadata() == metadata
    assert kernel.get_raw_value().sharding == over
    assert bias.get_raw_value().devices() == {third}
    np.testing.assert_array_equal(np.asarray(kernel[...]), KERNEL)
    np.testing.assert_array_equal(np.asarray(bias[...]), BIAS)


def test_a_model_that_was_traced_under_a_mesh(dense):
    over = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def make():
        model = wide(None, None)()
        model.dense.kernel[...] = jax.reshard(model.dense.kernel[...], P("data", "model"))
        return model

    with jax.set_mesh(over):
        model = nnx.eval_shape(make)
        before = contents(model)
        other = jax.make_mesh((8,), ("other",), axis_types=(AxisType.Explicit,))
        match = r"(?s)dense/.*expected: a mesh of devices.*jax.set_mesh"
        with jax.set_mesh(other), pytest.raises(ShardingError, match=match):
            load_into(model, dense)
        assert_untouched([model], before)
        load_into(model, dense)
    assert model.dense.kernel.get_raw_value().sharding == NamedSharding(over, P("data", "model"))
    np.testing.assert_array_equal(np.asarray(model.dense.kernel[...]), KERNEL)


def test_get_abstract_model(dense):
    graphdef, state = sharding.get_abstract_model(wide("data", "model"), mesh())
    model = nnx.merge(graphdef, state)
    load_into(model, dense)
    assert model.dense.kernel.get_raw_value().sharding.spec == P("data", "model")
    np.testing.assert_array_equal(np.asarray(model.dense.kernel[...]), KERNEL)


def test_bfloat16(tmp_path):
    kernel, bias = KERNEL.astype(jnp.bfloat16), BIAS.astype(jnp.bfloat16)
    path = saved(tmp_path / "half", {"params": {"dense": {"kernel": kernel, "bias": bias}}})
    model = abstract(wide("data", "model", dtype=jnp.bfloat16), mesh())
    load_into(model, path)
    assert model.dense.kernel.get_raw_value().dtype == jnp.bfloat16
    assert_trees_equal(np.asarray(model.dense.kernel[...]), kernel)


def test_a_cast_in_the_rules(dense):
    model = abstract(wide("data", "model", dtype=jnp.bfloat16), mesh())
    load_into(model, dense, Rules([Rule("params/dense/*", keep=True, cast="bfloat16")]))
    assert_trees_equal(np.asarray(model.dense.kernel[...]), KERNEL.astype(jnp.bfloat16))


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


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.zeros((4, 8, 8)), out_sharding=("model", "data"))
        self.bias = nnx.Param(jnp.zeros((4, 8)), out_sharding=("model", None))


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


@pytest.mark.parametrize("over", [None, mesh()], ids=["one device", "mesh"])
def test_streams_of_an_nnx_checkpoint(tmp_path, over):
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


# ---- what does not fit -------------------------------------------------------------------------------------------


def refused(error, match, things, path, rules=None, **options):
    before = contents(*things)
    with pytest.raises(error, match=match) as caught:
        load_into(things[0], path, rules, optimizer=things[1] if len(things) > 1 else None, **options)
    assert_untouched(things, before)
    return caught.value


@pytest.mark.parametrize("over", [None, mesh()], ids=["real", "abstract"])
def test_everything_that_does_not_fit_is_one_error(tmp_path, reads, over):
    path = saved(tmp_path / "linen", linen_state(optax.adam(0.1), 1))

    def make():
        model = Native(width=6, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    things = make() if over is None else abstract(make, over)
    error = refused(VariablesMismatchError, "Nothing was changed", things, path, RULES)
    assert (("params", "first", "kernel"), (5, 6), (5, 4)) in error.wrong_shape
    assert any(row[0][:4] == ("opt_state", "0", "mu", "first") for row in error.wrong_shape)
    rules = Rules.from_rename({"hidden": "first", "norm": "bn", "head": "tail"})
    error = refused(VariablesMismatchError, "did you mean params/tail/kernel", things, path, rules)
    assert ("params", "last", "bias") in error.missing
    assert ("params", "tail", "bias") in error.unexpected
    assert reads == []


def test_a_checkpoint_without_an_optimizer(tmp_path):
    path = saved(tmp_path / "linen", {"params": linen_state(optax.adam(0.1)).params})
    model = nnx.Dict(hidden=nnx.Linear(5, 4, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    rules = Rules([Rule("params/norm/*", drop=True)])
    error = refused(VariablesMismatchError, "opt_state/0/count", [model, optimizer], path, rules)
    assert ("step",) in error.missing


@pytest.mark.parametrize("over", [None, mesh()], ids=["real", "abstract"])
def test_a_damaged_file(dense, over):
    model = wide("data", None)() if over is None else abstract(wide("data", None), over)
    for file in (dense / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    for process in dense.glob("ocdbt.process_*/d/*"):
        process.write_bytes(b"\0" * process.stat().st_size)
    refused(CheckpointCorruptError, "damaged", [model], dense)


def test_an_array_that_is_damaged_is_found_before_anything_is_written(tmp_path, monkeypatch):
    path = saved(tmp_path / "linen", linen_state(optax.adam(0.1), 1))

    read, count = OrbaxSource.read, itertools.count(1)

    def damaged(self, path, region=None):
        if next(count) % 9 == 0:
            raise CheckpointCorruptError("the checkpoint is damaged", path, expected="numbers", found="none")
        return read(self, path, region)

    monkeypatch.setattr(OrbaxSource, "read", damaged)
    refused(CheckpointCorruptError, "expected: numbers", native(optax.adam(0.1)), path, RULES)
    over = abstract(lambda: native(optax.adam(0.1)), mesh())
    refused(CheckpointCorruptError, "expected: numbers", over, path, RULES)


def test_an_axis_that_does_not_divide(tmp_path, reads):
    path = saved(tmp_path / "odd", {"params": {"kernel": np.zeros((6, 9), "float32")}})
    model = nnx.Dict(kernel=nnx.Param(jnp.zeros((6, 9)), out_sharding=("data", "model")))
    model = abstract(lambda: model, mesh())
    error = refused(
        ShardingError, r"(?s)^kernel/value cannot be sharded.*expected: shards.*9.*axis names", [model], path
    )
    assert error.path == ("kernel", "value")
    assert reads == []


def test_a_placeholder_is_never_left(dense):
    def make():
        model = wide(None, None)()
        model.dense.sow(nnx.Intermediate, "seen", jnp.ones(3))
        return model

    model = abstract(make)
    refused(
        CheckpointLayoutError, r"(?s)no value for a Variable.*expected: a value for dense/seen/value", [model], dense
    )
    real = make()
    load_into(real, dense)
    np.testing.assert_array_equal(np.asarray(real.dense.kernel[...]), KERNEL)


def test_a_model_of_another_trace(dense, reads):
    model = wide(None, None)()

    @jax.jit
    def inside():
        load_into(model, dense)

    before = contents(model)
    with pytest.raises(TraceError):
        inside()
    assert_untouched([model], before)
    assert reads == []


# ---- memory ------------------------------------------------------------------------------------------------------

MEMORY = """
import os, re, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, nnx_core as nnx
from jax.sharding import AxisType
from bridge.checkpoint.loading import load_into

def high_water():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

class Model(nnx.Module):
    def __init__(self):
        for index in range(32):
            setattr(self, f"w{index}", nnx.Param(jnp.zeros((1024, 2048)), out_sharding=("data", "model")))

def model(count):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    made = nnx.eval_shape(Model)
    for index in range(count, 32):
        delattr(made, f"w{index}")
    with jax.set_mesh(mesh):
        return nnx.as_abstract(made)

load_into(model(1), sys.argv[1])  # compiles and imports what it needs
start = high_water()
whole = model(32)
load_into(whole, sys.argv[2])
size = sum(x.get_raw_value().nbytes for _, x in nnx.to_flat_state(nnx.state(whole)))
print(size, high_water() - start, sum(float(x[...][0, 0]) for _, x in nnx.to_flat_state(nnx.state(whole))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_memory_is_that_of_the_model(tmp_path, format):
    def make(count):
        return {f"w{i}": np.full((1024, 2048), i, "float32") for i in range(count)}

    paths = []
    for count in (1, 32):
        paths.append(tmp_path / f"{count}{'' if format == 'orbax' else '.safetensors'}")
        if format == "orbax":
            saved(paths[-1], {"params": make(count)})
        else:
            safetensors.numpy.save_file({f"params/{name}": x for name, x in make(count).items()}, paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    size, peak, total = map(float, done.stdout.split())
    largest = 1024 * 2048 * 4
    assert size == 32 * largest
    assert total == sum(range(32))
    assert peak < 1.5 * size + largest, f"{peak / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB"
