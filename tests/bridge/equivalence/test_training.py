"""Training steps compared: against optax by hand, and where the two are trained otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bridge.equivalence import ComparisonError, compare
from tests.support.compared_models import X, linen, linen_stack, native, native_stack

CHEAP = {"layers": False, "seeds": (0,), "gradients": False}


def of(report, what):
    return {(finding.path, finding.step): finding for finding in report.findings if finding.what == what}


def test_steps_with_statistics_are_the_same_in_both():
    report = compare(linen(), native(), X, steps=3, tx=optax.adamw(1e-2), train=True, **CHEAP)
    assert report.equal, str(report)
    assert [step for _, step in of(report, "loss")] == [1, 2, 3]
    assert ("params/ln/scale", 3) in of(report, "trained parameter")
    slots = {(f.path, f.text) for f in report.findings if f.what == "optimizer state"}
    assert {("params/ln/scale", "0/mu"), ("params/ln/scale", "0/nu"), ("0/count", "")} <= slots


def test_stacked_layers_are_trained_as_single_ones():
    report = compare(linen_stack(), native_stack(), X, steps=2, tx=optax.sgd(0.1, momentum=0.9), **CHEAP)
    assert report.equal, str(report)
    others = {finding.other for finding in report.findings if finding.what == "optimizer state"}
    assert {f"params/layers/{n}/kernel" for n in range(3)} <= others


def test_another_learning_rate_is_training():
    report = compare(linen(), native(), X, steps=1, tx=(optax.sgd(0.1), optax.sgd(0.2)), **CHEAP)
    assert report.first.cause == "training"
    assert {finding.what for finding in report.findings if not finding.equal} == {"trained parameter"}


def test_the_difference_of_trained_parameters_is_that_of_the_steps():
    def loss(output, x):
        return (output * x[:, :2]).sum()

    x = jnp.ones(X.shape)
    options = {"steps": 1, "tx": (optax.sgd(0.1), optax.sgd(0.3)), "loss": loss}
    report = compare(linen(), native(), x, **options, **CHEAP)
    module, variables = linen()

    def of_bias(bias):
        params = {**variables["params"], "down": {**variables["params"]["down"], "bias": bias}}
        return loss(module.apply({**variables, "params": params}, x), x)

    gradient = jax.grad(of_bias)(variables["params"]["down"]["bias"])
    off = of(report, "trained parameter")["params/down/bias", 1].difference
    np.testing.assert_allclose(off.absolute, 0.2 * np.abs(gradient).max(), rtol=1e-5)


def test_what_only_the_optimizers_state_shows():
    # After one step Adam's correction hides b2 from the parameters.
    optimizers = optax.adam(1e-2, b2=0.999), optax.adam(1e-2, b2=0.99)
    report = compare(linen(), native(), X, steps=1, tx=optimizers, **CHEAP)
    wrong = {(finding.what, finding.text) for finding in report.findings if not finding.equal}
    assert wrong == {("optimizer state", "0/nu")}
    assert report.first.cause == "training"


def test_optimizers_of_another_structure_are_said():
    report = compare(linen(), native(), X, steps=1, tx=(optax.sgd(0.1), optax.sgd(0.1, momentum=0.0)), **CHEAP)
    [wrong] = [finding for finding in report.findings if not finding.equal]
    assert (wrong.what, report.first.cause) == ("optimizer state", "training")
    assert wrong.text.startswith("it has another structure on each side: in a alone nothing, in b")


def test_gradients_that_are_rounding_are_left_out_and_said():
    # Adam makes a step of full size of the sign of a gradient: of a bias before a norm it is rounding.
    class Shifted(nn.Module):
        factor: float = 1.0

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(6, name="fc")(x) * self.factor
            return nn.LayerNorm(name="ln", epsilon=1e-30)(h) * jnp.arange(6.0)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), "float32")
    variables = Shifted().init(jax.random.key(0), x)
    report = compare((Shifted(), variables), (Shifted(factor=3.0), variables), x, steps=1, tx=optax.adam(0.1), **CHEAP)
    assert not [finding for finding in report.findings if finding.what == "trained parameter" and not finding.equal]


def test_training_that_cannot_be_is_an_error_or_said():
    report = compare(jnp.sin, jnp.sin, X, steps=1, tx=optax.sgd(0.1))
    assert "training: there are no parameters" in report.not_compared
    with pytest.raises(ComparisonError, match=r"(?s)a \(Linen LinenNet\) cannot be trained.*loss="):
        compare(linen(), native(), X, steps=1, tx=optax.sgd(0.1), loss=lambda output, x: output, **CHEAP)


@pytest.mark.parametrize("other", [optax.adam(2e-5), optax.set_to_zero()], ids=["twice the rate", "frozen"])
def test_parameters_that_hardly_move_must_move_alike(other):
    def start():
        module, variables = linen()
        return module, jax.tree.map(lambda x: x + 0.3, variables)

    model = start()
    report = compare(model, model, X, steps=2, tx=(optax.adam(1e-5), other), **CHEAP)
    assert "trained parameter" in {finding.what for finding in report.findings if not finding.equal}
    assert compare(model, model, X, steps=2, tx=optax.adam(1e-5), **CHEAP).equal
