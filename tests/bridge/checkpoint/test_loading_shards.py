"""load_into: every shard goes where the model has it, is read once, and the memory is that of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from bridge.checkpoint.loading import ShardingError, load_into
from bridge.checkpoint.rules.apply import Rule, Rules
from nnx_core import sharding
from tests.support.forked import run_forked
from tests.support.placed_models import BIAS, KERNEL, abstract, assert_untouched, contents, mesh, wide
from tests.support.training import saved
from tests.tolerance import assert_trees_equal

ORDERS = {"in order": None, "interleaved": [0, 4, 1, 5, 2, 6, 3, 7]}
SPECS = [("data", None), (None, "model"), ("model", "data"), (("data", "model"), None), (None, None), ("data",)]


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
    done = run_forked(MEMORY, *paths)
    assert done.returncode == 0, done.stderr
    size, peak, total = map(float, done.stdout.split())
    largest = 1024 * 2048 * 4
    assert size == 32 * largest
    assert total == sum(range(32))
    assert peak < 1.5 * size + largest, f"{peak / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB"
