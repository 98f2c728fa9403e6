"""Rules and derived rules on values: numbers by location, traceable by JAX, and what is made of what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.derivation.derive import derive
from bridge.checkpoint.rules.apply import Rule, Rules, RulesError
from tests.tolerance import assert_trees_equal

KERNEL = np.arange(6, dtype="float32").reshape(2, 3)
Q, K = ("params", "q"), ("params", "k")


def test_values_are_converted_and_gradients_flow():
    rules = Rules(
        [Rule(["params/q", "params/k"], "params/qk", concat=-1), Rule("params/w", "params/v", transpose=[1, 0])]
    )
    values = {Q: KERNEL, K: KERNEL + 1, ("params", "w"): KERNEL}
    expected = {("params", "qk"): np.concatenate([KERNEL, KERNEL + 1], -1), ("params", "v"): KERNEL.T}
    assert_trees_equal(rules.convert(values), expected)

    def loss(q):
        made = rules.convert({**values, Q: q})
        return (made["params", "qk"] * jnp.arange(6.0)).sum()

    assert_trees_equal(np.asarray(jax.grad(loss)(jnp.asarray(KERNEL))), np.tile(np.float32([0, 1, 2]), (2, 1)))


def test_what_is_made_of_what():
    rules = Rules([Rule(["params/q", "params/k"], "params/qk", concat=-1), Rule("params/w", keep=True)])
    pairs = [(Q, ("params", "qk")), (K, ("params", "qk")), (("params", "w"), ("params", "w"))]
    assert rules.pairs() == pairs
    assert rules.pairs({at[0]: KERNEL for at in pairs}) == pairs
    assert Rules([Rule("params/a", drop=True), Rule(target="params/b", new="target")]).pairs() == []


def test_patterns_need_values():
    rules = Rules([Rule("params/*/kernel", "params/*/weight")])
    with pytest.raises(RulesError, match=r"no values to look it up in: give pairs\(values\)"):
        rules.pairs()
    at = ("params", "a", "kernel")
    assert rules.pairs({at: KERNEL}) == [(at, ("params", "a", "weight"))]


def test_derived_rules_convert_and_pair():
    x = jnp.ones((1, 2))
    derived = derive(nn.Dense(3), lambda rngs: nnx.Linear(2, 3, rngs=rngs), x)
    values = {("params", "kernel"): KERNEL, ("params", "bias"): KERNEL[0]}
    assert_trees_equal(derived.convert(values), values)
    assert sorted(derived.pairs()) == sorted(derived.inverse().pairs()) == [(at, at) for at in sorted(values)]
