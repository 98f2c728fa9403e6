"""Classes of flax.nnx as they are: in ToLinen, to_linen, to_linen_class, nnx_in_bridge_mdl and compare."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from flax import nnx as flax_nnx

import bridge
import nnx_core as nnx
from bridge.cli.models import nnx_module
from bridge.equivalence import compare
from bridge.flax_nnx import load
from tests.support.both_libraries import inputs
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY = jax.random.key(0)
KEYS = {"params": KEY, "dropout": KEY}


class Net(flax_nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = flax_nnx.Linear(4, width, rngs=rngs)
        self.norm = flax_nnx.BatchNorm(width, rngs=rngs)
        self.drop = flax_nnx.Dropout(0.5, rngs=rngs)
        self.kept = rngs

    def __call__(self, x):
        return self.drop(self.norm(self.first(x)))

    def encode(self, x):
        return self.first(x)


def test_initial_values_are_linens_and_outputs_flax_nnx_s():
    x = inputs()
    module = bridge.to_linen(flax_nnx.Linear, 4, 3)
    variables = module.init(KEY, x)
    assert_trees_equal(variables, nn.Dense(3).init(KEY, x))
    theirs = flax_nnx.Linear(4, 3, rngs=flax_nnx.Rngs(1))
    load(theirs, variables["params"])
    assert_trees_equal(module.apply(variables, x), theirs(x))
    grads = jax.grad(lambda p: module.apply({"params": p}, x).sum())(variables["params"])
    assert_trees_close(grads["bias"], np.full(3, 3.0))


def test_collections_streams_methods_and_modes():
    x = inputs()
    module = bridge.to_linen_class(Net)(3)
    assert type(module).__name__ == "NetToLinen"
    variables = module.init(KEYS, x)
    assert sorted(variables) == ["batch_stats", "params"]

    def masks(seed):
        y, updates = module.apply(variables, x, rngs={"dropout": jax.random.key(seed)}, mutable=["batch_stats"])
        assert updates["batch_stats"]["norm"]["mean"].any()
        return y == 0

    assert_trees_equal(masks(0), masks(0))
    assert not np.array_equal(masks(0), masks(1))
    assert_trees_close(
        module.apply(variables, x, method="encode"),
        nn.Dense(3).apply({"params": variables["params"]["first"]}, x),
    )
    quiet = module.eval()
    assert_trees_equal(quiet.apply(variables, x), quiet.apply(variables, x))


def test_linens_rules_hold():
    x = inputs()
    module = bridge.ToLinen(Net, args=(3,))
    variables = module.init(KEYS, x)
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        module.apply(variables, x, mutable=["batch_stats"])
    with pytest.raises(errors.ScopeCollectionNotFound, match="bias"):
        module.apply({"params": {}}, x)
    more = {**variables, "params": {**variables["params"], "more": jnp.ones(1)}}
    with pytest.raises(ValueError, match="params/more"):
        module.apply(more, x, rngs={"dropout": KEY}, mutable=["batch_stats"])
    with pytest.raises(errors.ModifyScopeVariableError, match="batch_stats"):
        module.apply(variables, x, rngs={"dropout": KEY})


def test_in_a_linen_model_under_vmap_and_jit():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bridge.to_linen(Net, 4, name="net")(x)

    x = inputs()
    variables = Model().init(KEYS, x)
    run = jax.jit(lambda v, x: Model().apply(v, x, rngs={"dropout": KEY}, mutable=["batch_stats"]))
    assert run(variables, x)[0].shape == (3, 4)
    assert "net" in Model().tabulate(KEYS, x)
    layer = bridge.to_linen_class(flax_nnx.Linear)
    ensemble = nn.vmap(layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)(4, 3)
    kernel = ensemble.init(KEY, x)["params"]["kernel"]
    assert kernel.shape == (2, 4, 3)
    assert not np.array_equal(kernel[0], kernel[1])


def make_net(rngs: flax_nnx.Rngs) -> Net:
    return Net(3, rngs=rngs)


def test_functions_that_make_them():
    x = inputs()
    for make in (make_net, lambda rngs: flax_nnx.Linear(4, 3, rngs=rngs)):
        module = bridge.ToLinen(make)
        assert module.init(KEYS, x)["params"]


class Plain(flax_nnx.Module):
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_a_constructor_without_streams_gets_none():
    assert_trees_equal(bridge.to_linen(Plain, 2.0).apply({}, inputs()), inputs() * 2)
    assert_trees_equal(bridge.to_linen(functools.partial(Plain, factor=2.0)).apply({}, inputs()), inputs() * 2)


def test_in_a_bridge_module():
    class Model(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            x = bridge.nnx_in_bridge_mdl(lambda rngs: flax_nnx.Linear(4, 4, rngs=rngs))(x)
            return bridge.nnx_in_bridge_mdl(make_net)(x)

    x = inputs()
    variables = Model().init(nnx.Rngs(0), x)
    assert sorted(variables["params"]) == ["Linear_0", "Net_0"]
    y, updates = Model().apply(variables, x, rngs={"dropout": KEY}, mutable=["batch_stats"])
    assert y.shape == (3, 3)
    assert updates["batch_stats"]["Net_0"]["norm"]["mean"].any()


def test_the_command_takes_classes_of_flax_nnx(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = nnx_module(f"{__name__}:make_net", abstract=True)
    assert model.first["kernel"].shape == (4, 3)


def test_compare_takes_modules_of_flax_nnx():
    x = inputs()
    ours, theirs = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), flax_nnx.Linear(4, 3, rngs=flax_nnx.Rngs(1))
    load(theirs, ours)
    report = compare(ours, theirs, x)
    assert report.equal
    assert "flax.nnx Linear" in str(report)
    linen = (nn.Dense(3), {"params": nnx.to_pure_dict(nnx.state(ours))})
    assert compare(linen, theirs, x).equal
    theirs.kernel[...] *= 1.1
    assert not compare(ours, theirs, x).equal
