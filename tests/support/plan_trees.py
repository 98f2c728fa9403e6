"""Checkpoints of small models, as Orbax gives them back: what the tests of plans begin with."""

import jax
import jax.numpy as jnp
import numpy as np

import nnx_core as nnx
from bridge.checkpoint.rules.apply import Rule, Rules
from tests.support.checkpoint_trees import on_disk

F32 = np.float32


def layers(*names, size=4):
    draw = np.random.default_rng(0)
    return {
        name: {"kernel": draw.normal(size=(size, size)).astype(F32), "bias": draw.normal(size=size).astype(F32)}
        for name in names
    }


def state_tree(params, tx=None, **fields):
    tree = {"step": jnp.int32(3), "params": params}
    if tx is not None:
        _, tree["opt_state"] = tx.update(params, tx.init(params), params)
    return on_disk({**tree, **fields})


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


class Net(nnx.Module):
    def __init__(self, seed=0, width=4):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def net_tree(model=None, tx=None):
    model = model or Net()
    tree = {"model": model}
    if tx is not None:
        tree["optimizer"] = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return on_disk(tree if tx is not None else model)


def sources(plan):
    return {target: list(op.sources()) for target, op in plan.made.items()}


#: Numbered layers of Linen as one stack.
STACK = Rules([Rule(r"params/layers_(\d+)/(kernel|bias)", r"params/layers/\2", stack=0)])
