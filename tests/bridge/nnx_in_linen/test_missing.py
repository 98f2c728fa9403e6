"""ToLinen.apply with a collection missing: the error, or the values, of the same module written in Linen."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.linen_in_nnx.wrapper import ToNNX
from bridge.nnx_in_linen.wrapper import to_linen
from tests.support.numbers import normal
from tests.tolerance import assert_trees_equal

KEY = jax.random.key(0)
X = jnp.asarray(normal(7, 4, 3))


class Linen(nn.Module):
    def setup(self):
        self.linear = nn.Dense(3)
        self.norm = nn.BatchNorm(False)
        self.drop = nn.Dropout(0.5, deterministic=False)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Native(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Holder(nnx.Module):
    def __init__(self, rngs):
        self.inner = ToNNX(Linen(), rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class LinenHolder(nn.Module):
    def setup(self):
        self.inner = Linen()

    def __call__(self, x):
        return self.inner(x)


PAIRS = {"native": (to_linen(Native), Linen()), "wrapped": (to_linen(Holder), LinenHolder())}
MUTABLE = [False, True, [], ["batch_stats"], ["params"], ["batch_stats", "params"], ["other"]]
GIVEN = [(), ("dropout",), ("params", "dropout")]


def outcome(model, variables, rngs, mutable):
    try:
        return model.apply(variables, X, mutable=mutable, rngs=dict.fromkeys(rngs, KEY))
    except Exception as error:  # noqa: BLE001  # which one it is is compared
        return error


@pytest.mark.parametrize("rngs", GIVEN, ids="+".join)
@pytest.mark.parametrize("missing", ["batch_stats", "params"])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_missing_collection_is_what_it_is_in_linen(kind, missing, rngs):
    ours, theirs = PAIRS[kind]
    variables = theirs.init({"params": KEY, "dropout": KEY}, X)
    variables = {name: tree for name, tree in variables.items() if name != missing}
    for mutable in MUTABLE:
        found, wanted = (outcome(model, variables, rngs, mutable) for model in (ours, theirs))
        if isinstance(wanted, Exception):
            assert type(found) is type(wanted), (mutable, repr(found), repr(wanted))
            if kind == "wrapped":  # the message too, except which of several missing params comes first
                assert str(found).replace('"bias"', '"kernel"') == str(wanted), mutable
        else:
            assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted), mutable
            if missing == "batch_stats" and mutable:  # missing params are made from other keys
                assert_trees_equal(found[1], wanted[1])


@pytest.mark.parametrize("mutable", [False, ["batch_stats"], ["other"]], ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_no_variables_at_all(kind, mutable):
    ours, theirs = (outcome(model, {}, ("params", "dropout"), mutable) for model in PAIRS[kind])
    assert type(ours) is type(theirs) is not tuple
    assert isinstance(ours, Exception)
    assert 'collection "params"' in str(ours)
    assert 'collection "params"' in str(theirs)
