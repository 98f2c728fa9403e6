"""Where two models part: which row is wrong, which is fed wrong, and what is said of the cause."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge.equivalence import compare
from bridge.equivalence.drawing import Draw
from tests.support.compared_models import X, chain, initialized, linen, linen_stack, native, native_stack

CHEAP = {"gradients": False, "seeds": (0,)}


def verdicts(report):
    return {(row.a, row.call): row.verdict for row in report.rows}


def parted(report):
    return report.first.a, report.first.b, report.first.cause


def test_a_wrong_weight_is_found_in_its_layer_and_what_follows_is_fed_wrong():
    model = native()
    model.b.scale.set_value(model.b.scale.get_value().at[2].set(1.5))
    report = compare(linen(), model, X, **CHEAP)
    assert parted(report) == ("params/bn/scale", "params/b/scale", "parameters")
    assert verdicts(report) == {
        ("(root)", 1): "fed wrong",
        ("up", 1): "equal",
        ("bn", 1): "wrong",
        ("ln", 1): "fed wrong",
        ("down", 1): "fed wrong",
    }
    rows = {row.a: row for row in report.rows}
    assert rows["bn"].kind == "BatchNorm/BatchNorm"
    assert rows["bn"].parameters.absolute == 0.5
    assert rows["bn"].input.absolute == 0.0
    assert rows["ln"].input.absolute == rows["bn"].output.absolute
    assert rows["ln"].alone.absolute < 1e-6 < rows["ln"].output.absolute


def test_numbers_of_a_row_are_those_of_the_layer():
    model = native()
    model.a.bias.set_value(model.a.bias.get_value() + 0.25)
    report = compare(linen(), model, X, **CHEAP)
    [up] = [row for row in report.rows if row.a == "up"]
    np.testing.assert_allclose([up.output.absolute, up.alone.absolute], 0.25, rtol=1e-5)
    kernel = np.asarray(linen()[1]["params"]["up"]["kernel"])
    np.testing.assert_allclose(up.output.scale, np.abs(Draw(0).array(X) @ kernel).max(), rtol=1e-5)


def test_an_option_that_differs_is_named():
    report = compare(linen(epsilon=1e-2), native(), X, **CHEAP)
    assert parted(report) == ("ln", "c", "computation")
    assert "epsilon 0.01 in a, 1e-06 in b" in report.first.text


def test_an_epsilon_that_these_inputs_do_not_show():
    report = compare(linen(epsilon=1.1e-6), native(), X, **CHEAP)
    assert parted(report) == ("ln", "c", "computation")
    [wrong] = [finding for finding in report.findings if not finding.equal]
    assert (wrong.path, wrong.other, wrong.text) == ("ln", "c", "of the layer, fed a thousandth of its input")
    [row] = [row for row in report.rows if row.verdict == "wrong"]
    assert row.output.equal
    assert not row.alone.equal
    assert "epsilon 1.1e-06 in a, 1e-06 in b" in report.first.text


def test_code_between_layers_is_said_of_the_module_around():
    report = compare(linen(), native(activation=jax.nn.sigmoid), X, **CHEAP)
    assert parted(report) == ("", "", "computation")
    assert report.first.text.startswith("before bn, what it is fed differs by")
    assert {row.verdict for row in report.rows if row.a != "(root)"} == {"equal", "fed wrong"}


@pytest.mark.parametrize("n", range(3))
def test_a_step_of_a_scan_is_found(n):
    model = native_stack()
    model.layers[n].bias.set_value(model.layers[n].bias.get_value() + 0.1)
    report = compare(linen_stack(), model, X, **CHEAP)
    wrong = [(row.a, row.b, row.call) for row in report.rows if row.verdict == "wrong"]
    assert wrong == [("rounds/fc", f"layers/{n}", n + 1)]
    assert parted(report) == ("params/rounds/fc/bias", f"params/layers/{n}/bias", "parameters")


def test_a_lane_of_a_vmap_is_found():
    model = native_stack()
    model.heads[1].kernel.set_value(-model.heads[1].kernel.get_value())
    report = compare(linen_stack(), model, X, **CHEAP)
    wrong = [(row.a, row.b, row.call) for row in report.rows if row.verdict == "wrong"]
    assert wrong == [("heads", "heads/1", 2)]


def test_a_step_is_found_in_two_stacks():
    module, variables = linen_stack()
    bias = variables["params"]["rounds"]["fc"]["bias"].at[1].add(0.5)
    fc = {**variables["params"]["rounds"]["fc"], "bias": bias}
    other = {"params": {**variables["params"], "rounds": {"fc": fc}}}
    report = compare((module, variables), (module, other), X, **CHEAP)
    wrong = [(row.a, row.call) for row in report.rows if row.verdict == "wrong"]
    assert wrong == [("rounds/fc", 2)]


def test_layers_in_another_order():
    report = compare(chain(), chain(is_reversed=True), X, **CHEAP)
    assert report.first.cause == "order"
    assert {report.first.a, report.first.b} <= {"first", "second"}
    assert "b calls the two in the other order" in report.first.text


@pytest.mark.parametrize("is_native", [False, True])
def test_layers_with_each_others_variables(is_native):
    if is_native:
        model = native_stack()
        model.layers[0], model.layers[2] = model.layers[2], model.layers[0]
        report = compare(linen_stack(), model, X, **CHEAP)
    else:
        module, variables = chain()
        params = variables["params"]
        swapped = {"params": {"first": params["second"], "second": params["first"]}}
        report = compare((module, variables), (module, swapped), X, **CHEAP)
    assert report.first.cause == "order"
    assert "each other's variables" in report.first.text


class Twice(nn.Module):
    shift: float = 0.0

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="fc")
        return layer(jnp.tanh(layer(x)) + self.shift)


class NativeTwice(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        self.unused(x)  # a dead branch
        return self.fc(jnp.tanh(self.fc(x)))


def test_a_layer_called_twice_has_two_rows():
    variables = initialized(Twice(), jnp.zeros(X.shape))
    report = compare((Twice(), variables), (Twice(shift=0.1), variables), X, **CHEAP)
    assert verdicts(report) == {("(root)", 1): "wrong", ("fc", 1): "equal", ("fc", 2): "fed wrong"}
    assert parted(report) == ("", "", "computation")
    model = NativeTwice(nnx.Rngs(0))
    nnx.update(model.fc, variables["params"]["fc"])
    report = compare((Twice(), variables), model, X, **CHEAP)
    assert report.equal, str(report)
    assert [row.b for row in report.rows if row.verdict == "unpaired"] == ["unused"]
    assert "params/unused/kernel: only in b, and no output depends on it" in report.not_compared


class Branches(nn.Module):
    """Layers in a branch and in a loop."""

    bias: float = 0.0

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="in_branch")
        h = dense(x)
        h = nn.cond(h.sum() < 1e9, lambda m, h: m(h) + self.bias, lambda m, h: h, dense, h)
        return nn.Dense(2, name="out")(h)


def test_a_branch_is_looked_into():
    variables = initialized(Branches(), jnp.zeros(X.shape))
    report = compare((Branches(), variables), (Branches(bias=0.5), variables), X, **CHEAP)
    assert verdicts(report)["in_branch", 2] == "equal"
    assert verdicts(report)["out", 1] == "fed wrong"
    assert report.first.text.startswith("before out")


class Attending(nn.Module):
    masks: bool = True
    rounds: int = 2

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[None, :, 0]) if self.masks else None
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x[None], mask=mask)
        fc = nn.Dense(4, name="fc")
        for _ in range(self.rounds):
            h = nn.tanh(fc(h))
        return nn.Dense(2, name="out")(h)


def attending(**options):
    return Attending(**options), initialized(Attending(), jnp.zeros(X.shape))


@pytest.mark.slow
def test_a_mask_that_one_side_does_not_give_is_the_callers_fault():
    report = compare(attending(), attending(masks=False), X, **CHEAP)
    assert (report.first.a, report.first.b) == ("", "")
    assert verdicts(report)["attention", 1] == "fed wrong"
    assert verdicts(report)["attention/query", 1] == "equal"


def test_a_call_that_is_left_out_is_named():
    report = compare(attending(), attending(rounds=1), X, **CHEAP)
    assert (report.first.a, report.first.cause) == ("", "structure")
    assert report.first.text.startswith("fc is called in a, and nothing in its place in b: before out")
    assert verdicts(report)["fc", 2] == "unpaired"


class _Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        return nn.Dense(5, name="down")(jnp.tanh(nn.Dense(5, name="up")(x * scale)))


def test_a_method_that_hands_on_more_than_it_got_is_not_to_blame():
    def scaled(module, x):
        return module(x, jnp.float32(2))

    module, x = _Scaled(), jax.random.normal(jax.random.key(0), (2, 5))
    variables = module.init(jax.random.key(0), x, method=scaled)
    model = bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(0)), x, method=scaled)
    bridge.load_variables(model, variables)
    model.down.kernel[0, 0] += 1.0
    report = compare((module, variables), model, x, method=scaled)
    assert (report.first.a, report.first.cause) == ("params/down/kernel", "parameters")
