"""Derived rules without a proof: refused wherever they would change or write something, and told where they may not."""

import json

import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge.checkpoint.conversion import convert, open_conversion
from bridge.checkpoint.derivation.derive import UnsureDerivationWarning, derive
from bridge.checkpoint.formats.open import open_source
from bridge.checkpoint.in_memory import (
    nnx_to_train_state,
    state_to_variables,
    train_state_to_nnx,
    train_state_to_states,
    variables_to_state,
)
from bridge.checkpoint.loading import load_into
from bridge.checkpoint.options import UnprovenRulesError
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.save import save_as_linen
from tests.support.numbers import normal

X = jnp.ones((1, 4))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) - nn.Dense(4)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.left, self.right = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.left(x) - self.right(x)


@pytest.fixture
def unproven():
    with pytest.warns(UnsureDerivationWarning):
        return derive(Linen(), Nnx, X, check=False)


@pytest.fixture
def params():
    layers = ("Dense_0", "Dense_1")
    return {layer: {"kernel": normal(n, 4, 4), "bias": normal(n, 4)} for n, layer in enumerate(layers)}


def test_the_rules_say_that_they_are_not_proven(unproven):
    assert unproven.unproven == unproven.inverse().unproven == unproven.rules().unproven == "check=False"
    assert unproven.rules().inverse().unproven == Rules().then(unproven.rules()).unproven == "check=False"
    assert unproven.to_toml().startswith("# not proven: check=False\ndefault")
    assert str(unproven).endswith("not proven: check=False")
    assert Rules.from_rename({"a": "b"}).unproven == ""


def test_nothing_is_changed_or_written(unproven, params, tmp_path):
    tx = optax.sgd(0.1)
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    save_as_linen(model, None, tmp_path / "linen", rules=unproven, unproven=True)
    back = unproven.inverse()
    calls = [
        lambda **options: variables_to_state({"params": params}, rules=unproven, **options)[1],
        lambda **options: state_to_variables(model, rules=back, **options)[1],
        lambda **options: train_state_to_states(state, model, optimizer, rules=unproven, **options)[2],
        lambda **options: train_state_to_nnx(state, model, optimizer, rules=unproven, **options),
        lambda **options: nnx_to_train_state(model, optimizer, tx=tx, rules=back, **options)[1],
        lambda **options: load_into(model, tmp_path / "linen", unproven, **options),
        lambda **options: save_as_linen(model, optimizer, tmp_path / "saved", rules=unproven, **options),
        lambda **options: convert(tmp_path / "linen", tmp_path / "nnx", to="nnx", rules=unproven, **options).plan,
    ]
    for call in calls:
        with pytest.raises(UnprovenRulesError, match=r"(?s)found: check=False.*unproven=True \(--unproven\)"):
            call()
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "nnx").exists()
    for call in calls:
        assert call(unproven=True).unproven == "check=False"


def test_reports_and_the_target_say_so(unproven, params, tmp_path):
    save_as_linen(Nnx(nnx.Rngs(0)), None, tmp_path / "linen", rules=unproven, unproven=True)
    report = convert(tmp_path / "linen", tmp_path / "nnx", to="nnx", rules=unproven, unproven=True)
    assert report.verified
    assert report.unproven == "check=False"
    assert "NOT PROVEN" in report.plan.summary()
    assert "nothing has shown that these rules are right: check=False" in str(report.plan.report())
    with open_source(tmp_path / "nnx") as source:
        assert json.loads(json.dumps(dict(source.metadata)))["unproven"] == "check=False"
    proven = derive(Linen(), Nnx, X)
    with open_conversion(tmp_path / "linen", to="nnx", rules=proven) as conversion:
        assert conversion.plan.unproven == ""
