"""What a call leaves behind besides its output: each side alone, and both."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.equivalence import compare

X = jax.ShapeDtypeStruct((3,), "float32")
CHEAP = {"layers": False, "gradients": False, "seeds": (0,)}


class Noted(nnx.Module):
    """Doubles its input; what else it does is an argument."""

    def __init__(self, act=None):
        self.act = act
        self.calls, self.name = 0, "idle"
        self.kept, self.factor = nnx.BatchStat(jnp.ones(3)), nnx.Param(jnp.array(2.0))
        self.rngs = nnx.Rngs(0, other=1)

    def __call__(self, x):
        y = x * self.factor[...]
        if self.act is not None:
            self.act(self)
        return y


class LinenNoted(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "kept", jnp.ones, 3)
        return x * self.param("factor", lambda key: jnp.array(2.0))


def counts(model):
    model.calls += 1


def names(model):
    model.name = "called"


def empties(model):
    model.kept = None


def unsets(model):
    model.kept.set_value(None)


def deletes(model):
    del model.kept


def adds(model):
    model.more = nnx.BatchStat(jnp.zeros(2))


def sows(model):
    model.sow(nnx.Intermediate, "seen", jnp.zeros(2))


def draws(model):
    model.rngs.other()


@pytest.mark.parametrize(
    ("act", "what", "path", "text"),
    [
        (counts, "structure", "attributes/calls", "the call sets the attribute calls of b to 1, and not in a"),
        (names, "structure", "attributes/name", "the call sets the attribute name of b to 'called', and not in a"),
        (empties, "state", "batch_stats/kept", "1 arrays in a and none in b"),
        (unsets, "state", "batch_stats/kept", "1 arrays in a and none in b"),
        (deletes, "state", "batch_stats/kept", "1 arrays in a and none in b"),
        (adds, "state", "batch_stats/more", "state batch_stats/more: the call makes it in b, and not in a"),
        (sows, "state", "intermediates/seen", "state intermediates/seen: the call makes it in b, and not in a"),
        (draws, "random", "other", "the call takes 0 keys from the stream other in a, and 1 in b"),
    ],
)
def test_what_one_call_alone_does_is_found(act, what, path, text):
    report = compare(Noted(), Noted(act), X, **CHEAP)
    wrong = {(finding.what, finding.other, finding.text) for finding in report.findings if not finding.equal}
    assert (what, path, text) in wrong
    assert report.first.cause == what
    assert text in report.first.text


@pytest.mark.parametrize("act", [counts, unsets, adds, draws])
def test_what_both_calls_do_is_equal(act):
    report = compare(Noted(act), Noted(act), X, **CHEAP)
    assert report.equal, str(report)
    assert report.not_compared == ("gradients: gradients=False", "layers: layers=False")


def test_what_a_linen_model_cannot_do_is_listed():
    module = LinenNoted()
    variables = module.init(jax.random.key(0), jnp.ones(3))

    def act(model):
        counts(model)
        draws(model)

    report = compare((module, variables), Noted(act), X, **CHEAP)
    assert report.equal, str(report)
    assert "the call sets the attribute calls of b to 1, and not in a" in report.not_compared
    assert any("how many keys the call takes" in line for line in report.not_compared)


def test_a_random_key_is_not_the_numbers_that_it_is_made_of():
    key = jax.random.key(0)
    report = compare(lambda: key, lambda: jax.random.key_data(key), gradients=False)
    [output] = report.findings
    assert (output.equal, report.first.cause) == (False, "dtype")
    assert output.difference.forms == "uint32[2], expected key<fry>[]"
    assert compare(lambda: key, lambda: key, gradients=False).equal
