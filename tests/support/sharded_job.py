"""One process of a job that loads a Linen checkpoint over all devices, checks its shards, and saves it as Linen again.

    python -m tests.support.sharded_job PORT COUNT INDEX SOURCE KNOWN TARGET [DIES]

KNOWN is an npz file with the arrays that the model must get; the process whose index is DIES ends in the middle.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh

import nnx_core as nnx
from bridge.checkpoint.formats.orbax.read import OrbaxSource
from bridge.checkpoint.loading import load_into
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.save import save_as_linen
from nnx_core import sharding
from tests.support.training import State

RULES = Rules.from_rename({"hidden": "first", "norm": "bn", "head": "last"})
MESHES = {"rows": ((2, 4), "in order"), "interleaved": ((8, 1), "interleaved")}


def make_tx():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


class Net(nn.Module):
    """The model in Linen."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(64, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(8, name="head")(nn.relu(x))


def linen_state(seed=1):
    """Its TrainState, as it begins."""
    variables = Net().init(jax.random.key(seed), jnp.zeros((1, 16)))
    return State.create(apply_fn=None, tx=make_tx(), **variables)


class Sharded(nnx.Module):
    """The same in NNX, its kernels over both axes of a mesh."""

    def __init__(self, rngs):
        def over(*names):
            return {"kernel_init": sharding.with_partitioning(nnx.initializers.lecun_normal(), names), "rngs": rngs}

        self.first = nnx.Linear(16, 64, **over("data", "model"))
        self.bn = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(64, 8, **over("data", None))


def make():
    model = Sharded(nnx.Rngs(0))
    return model, nnx.Optimizer(model, make_tx(), wrt=nnx.Param)


def abstract(mesh):
    with jax.set_mesh(mesh):
        return nnx.as_abstract(nnx.eval_shape(make))


def make_mesh(shape, order):
    """A mesh of all devices; interleaved: its neighbours are of different processes."""
    devices = np.array(jax.devices())
    if order == "interleaved":
        devices = devices.reshape(2, -1).T
    return Mesh(devices.reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def counted(read):
    """`OrbaxSource.read`, and the list to which it adds the bytes of each array that it reads."""
    sizes = []

    def reader(self, path, region=None):
        value = read(self, path, region)
        sizes.append(np.asarray(value).nbytes)
        return value

    return reader, sizes


def check_shards(model, optimizer, known):
    """Every shard on this process's devices has the known numbers."""
    seen = 0
    for root, thing in (("model", model), ("optimizer", optimizer)):
        for path, variable in nnx.to_flat_state(nnx.state(thing)):
            name = "/".join([root, *map(str, path)])
            if isinstance(variable, nnx.RngState):
                continue
            value = variable.get_raw_value()
            assert (value.shape, value.dtype) == (known[name].shape, known[name].dtype), name
            assert len(value.addressable_shards) == 4, name
            for shard in value.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), known[name][shard.index], err_msg=name)
            seen += 1
    assert seen == len(known.files), (seen, len(known.files))


def main(port, count, index, source, known, target, dies=-1):
    """Load twice, over two meshes; save from the first."""
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    if int(index) == int(dies):
        os._exit(7)
    assert (jax.process_count(), len(jax.devices())) == (2, 8)
    OrbaxSource.read, sizes = counted(OrbaxSource.read)
    arrays = np.load(known)
    total = sum(arrays[name].nbytes for name in arrays.files)
    for name, mesh in MESHES.items():
        sizes.clear()
        model, optimizer = abstract(make_mesh(*mesh))
        load_into(model, source, RULES, optimizer=optimizer, rng=0)
        check_shards(model, optimizer, arrays)
        share = sum(sizes) / total
        assert 0.4 < share < 0.6, f"{name}: read {share:.2f} of all bytes"
        print(f"{name}: read {share:.3f} of all bytes")
        save_as_linen(model, optimizer, f"{target}-{name}", rules=RULES, like=linen_like())


def linen_like():
    """The TrainState that the Linen code has, abstract: no boxes, though the kernels have axis names."""
    return jax.eval_shape(linen_state)


if __name__ == "__main__":
    main(*sys.argv[1:])
