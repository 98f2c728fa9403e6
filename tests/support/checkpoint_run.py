"""One training run, in Linen and in NNX, as checkpoints of every format: what the tests of `convert` move across.

`linen_step` and `native_step` compute the same to the last bit; `RULES` says which name is which.
"""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import safetensors.numpy
from flax import linen as nn
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge.checkpoint.tree import layout
from tests.support.numbers import normal

X = normal(0, 8, 5)
Y = np.arange(8) % 3
RULES = """
[[rule]]
from = "*/dense/**"
to = "*/first/**"
[[rule]]
from = "*/norm/**"
to = "*/middle/**"
[[rule]]
from = "params/out/**"
to = "params/readout/**"
"""
BACK = """
[[rule]]
from = "*/first/**"
to = "*/dense/**"
[[rule]]
from = "*/middle/**"
to = "*/norm/**"
[[rule]]
from = "params/readout/**"
to = "params/out/**"
"""


class Net(nn.Module):
    """Dense, BatchNorm, Dense."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="out")(nn.relu(x))


class Native(nnx.Module):
    """The same in NNX."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.middle = nnx.BatchNorm(4, rngs=rngs)
        self.readout = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.relu(self.middle(self.first(x))))


class State(TrainState):
    """A TrainState with a collection beside the params."""

    batch_stats: dict


@functools.cache
def adamw():
    """What both sides are trained with; one object, or each step would be compiled anew."""
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(0.1, 0.01, 6)))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


@jax.jit
def linen_step(state):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = Net().apply(variables, X, mutable=["batch_stats"])
        return loss_of(logits), updated

    (_, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updated)


@nnx.jit
def native_step(model, optimizer):
    grads = nnx.grad(lambda model: loss_of(model(X)))(model)
    optimizer.update(model, grads)


@functools.cache
def linen_state(steps):
    """The TrainState after so many steps."""
    if steps:
        return linen_step(linen_state(steps - 1))
    variables = Net().init(jax.random.key(1), X)
    return State.create(
        apply_fn=Net().apply, params=variables["params"], tx=adamw(), batch_stats=variables["batch_stats"]
    )


def native(seed=0):
    """(model, optimizer), as they begin."""
    model = Native(rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, adamw(), wrt=nnx.Param)


def native_state(steps):
    """`{"model": State, "optimizer": State}` after so many steps, from the Linen run's beginning."""
    model, optimizer = native()
    begin = flat(linen_state(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = {"first": "dense", "middle": "norm", "readout": "out"}
        collection = "batch_stats" if path[-1] in ("mean", "var") else "params"
        variable.set_value(jnp.asarray(begin[collection, names[path[0]], path[1]]))
    for _ in range(steps):
        native_step(model, optimizer)
    return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}


def continued_in_nnx(leaves, steps):
    """The run in NNX after so many more steps, from the leaves of a checkpoint: by path, whatever wrote them."""
    model, optimizer = native(seed=1)
    for name, node in (("model", model), ("optimizer", optimizer)):
        for path, variable in nnx.to_flat_state(nnx.state(node)):
            value = leaves.pop((name, *map(str, path), "value"))
            variable.set_value(jnp.asarray(value, variable.dtype))
    assert not leaves
    for _ in range(steps):
        native_step(model, optimizer)
    return flat({"model": nnx.state(model), "optimizer": nnx.state(optimizer)})


def continued_in_linen(leaves, steps):
    """The same in Linen."""
    state = linen_state(1)
    expected = flat(state)
    assert sorted(leaves) == sorted(expected)
    values = [jnp.asarray(leaves[path], array.dtype) for path, array in expected.items()]
    state = jax.tree.unflatten(jax.tree.structure(state), values)
    for _ in range(steps):
        state = linen_step(state)
    return flat(state)


def flat(tree):
    """Path -> array or number, without what is empty; a Variable's array is at the path of its `value`."""
    return {path: value for path, value in layout.flatten(tree).items() if not layout.is_empty(value)}


def save(tree, path, format):
    """Write a live tree with the tool that people write that format with. Returns the path of the checkpoint."""
    if format == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif format == "orbax-v1":
        ocp_v1.save(path, tree)
    elif format == "manager":
        with ocp.CheckpointManager(path) as manager:
            manager.save(7, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
    elif format == "msgpack":
        path = path.with_suffix(".msgpack")
        path.write_bytes(flax.serialization.to_bytes(tree))
    elif format == "safetensors":
        path = path.with_suffix(".safetensors")
        arrays = {".".join(at): np.array(value) for at, value in flat(tree).items()}
        safetensors.numpy.save_file(arrays, path)
    elif format == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, **{"/".join(at): np.array(value) for at, value in flat(tree).items()})
    return path


def load(path, format):
    """The paths and leaves of a checkpoint, read with the tool that people read that format with."""
    if format == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            return flat(checkpointer.restore(path))
    if format == "orbax-v1":
        return flat(ocp_v1.load(path))
    if format == "msgpack":
        return flat(flax.serialization.msgpack_restore(path.read_bytes()))
    loaded = safetensors.numpy.load_file(path)
    return {tuple(name.split(".")): value for name, value in loaded.items()}
