"""What is what: by rules, by names, by class and order, and by the numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.equivalence import ComparisonError, compare
from tests.support.compared_models import X, initialized, linen_stack, native_stack

CHEAP = {"seeds": (0,), "layers": False}


class Doubled(nnx.Module):
    """A kernel transposed, and a bias twice as large."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.zeros((3, 4)))
        self.shift = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
        return x @ self.w.get_value().T + self.shift.get_value() / 2


class Rules:
    def convert(self, values):
        return {
            ("params", "w"): values["params", "kernel"].T,
            ("params", "shift"): values["params", "bias"] * 2,
        }

    def pairs(self):
        return [(("params", "kernel"), ("params", "w")), (("params", "bias"), ("params", "shift"))]


def by_rules():
    module = nn.Dense(3, bias_init=nn.initializers.ones)
    variables = initialized(module, jnp.zeros(X.shape))
    model = Doubled(nnx.Rngs(0))
    model.w.set_value(variables["params"]["kernel"].T)
    model.shift.set_value(variables["params"]["bias"] * 2)
    return (module, variables), model


@pytest.mark.parametrize("is_turned", [False, True])
def test_rules_lead_both_ways_and_gradients_through_their_transpose(is_turned):
    a, b = by_rules()
    a, b = (b, a) if is_turned else (a, b)
    report = compare(a, b, X, rules=Rules(), **CHEAP)
    assert report.equal, str(report)
    gradients = {f.path: f.other for f in report.findings if f.what == "gradient"}
    kernel, w = ("params/w", "params/kernel") if is_turned else ("params/kernel", "params/w")
    assert gradients[kernel] == w
    assert len(gradients) == 3  # and that of the input
    assert {f.path for f in report.findings if f.what == "parameter"} >= {kernel}


def test_without_rules_they_have_no_counterpart_and_the_outputs_are_compared():
    report = compare(*by_rules(), X, **CHEAP)
    assert {finding.what for finding in report.findings if not finding.equal} == {"structure"}
    assert report.first.cause == "structure"
    assert "no counterpart was found for params/bias, params/kernel of a" in report.first.text
    report = compare(*by_rules(), X, gradients=False, **CHEAP)
    assert report.equal
    assert "params/kernel of a, and its gradient: no counterpart was found" in report.not_compared
    assert "params/w of b, and its gradient: no counterpart was found" in report.not_compared


def test_rules_of_other_models_are_an_error():
    _, b = by_rules()
    with pytest.raises(ComparisonError, match=r"(?s)the rules are not of these two models.*params/bias.*Derive"):
        compare(linen_stack(), b, X, rules=Rules(), **CHEAP)


@pytest.mark.slow
def test_rules_of_a_stack_pair_its_rounds():
    class Unstack:
        def pairs(self):
            names = [(("rounds", "fc"), "layers", 3), (("heads",), "heads", 2)]
            return [
                (("params", *group, leaf), ("params", layers, str(n), leaf))
                for group, layers, count in names
                for n in range(count)
                for leaf in ("bias", "kernel")
            ]

        def convert(self, values):
            return {target: values[source][int(target[2])] for source, target in self.pairs()}

    model = native_stack()
    model.layers[1].bias.set_value(model.layers[1].bias.get_value() + 0.1)
    report = compare(linen_stack(), model, X, rules=Unstack(), seeds=(0,))
    assert [(row.a, row.b) for row in report.rows if row.verdict == "wrong"] == [("rounds/fc", "layers/1")]
    assert [f.other for f in report.findings if f.what == "parameter" and not f.equal] == ["params/layers/1/bias"]


class Cells(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(3), name="rnn")(x[None])


class NativeCells(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x[None])


@pytest.mark.slow
def test_gates_of_a_cell_are_blocks_of_a_fused_kernel():
    variables = initialized(Cells(), jnp.zeros(X.shape))
    model, params = NativeCells(nnx.Rngs(0)), variables["params"]["OptimizedLSTMCell_0"]
    cell = model.rnn.cell
    cell.dense_i.kernel.set_value(jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in "ifgo"], -1))
    cell.dense_h.kernel.set_value(jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in "ifgo"], -1))
    report = compare((Cells(), variables), model, X, **CHEAP)
    assert report.equal, str(report)
    kernel = cell.dense_h.kernel.get_value()
    cell.dense_h.kernel.set_value(kernel.at[0, 7].add(0.5))  # of the third gate
    report = compare((Cells(), variables), model, X, **CHEAP)
    [wrong] = [finding for finding in report.findings if finding.what == "parameter" and not finding.equal]
    assert (wrong.path, wrong.text) == ("params/OptimizedLSTMCell_0/hg/kernel", "part 3 of 4 in b")
    np.testing.assert_allclose(wrong.difference.absolute, 0.5, rtol=1e-6)


class Unbiased(nnx.Module):
    def __init__(self, rngs, **options):
        self.fc1 = nnx.Linear(4, 5, rngs=rngs)
        self.fc2 = nnx.Linear(5, 2, rngs=rngs, **options)

    def __call__(self, x):
        return self.fc2(jnp.tanh(self.fc1(x)))


def test_a_missing_bias_is_told_and_the_kernel_is_compared():
    module = nn.Sequential([nn.Dense(5), jnp.tanh, nn.Dense(2)])
    variables = initialized(module, jnp.zeros(X.shape))
    model = Unbiased(nnx.Rngs(0), use_bias=False)
    nnx.update(model.fc1, variables["params"]["layers_0"])
    model.fc2.kernel.set_value(variables["params"]["layers_2"]["kernel"])
    report = compare((module, variables), model, X, **CHEAP)
    assert [f.text for f in report.findings if not f.equal] == ["params/layers_2/bias is in a and not in b"]
    assert report.first.cause == "structure"
    assert ("params/layers_2/kernel", "params/fc2/kernel") in {(f.path, f.other) for f in report.findings}


def test_layers_called_in_another_order_are_told_by_their_numbers():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="query")(x) + 2 * nn.Dense(4, name="key")(x)

    class NativeHeads(nnx.Module):
        def __init__(self, rngs):
            self.k, self.q = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return 2 * self.k(x) + self.q(x)

    variables = initialized(Heads(), jnp.zeros(X.shape))
    model = NativeHeads(nnx.Rngs(0))
    nnx.update(model.q, variables["params"]["query"])
    nnx.update(model.k, variables["params"]["key"])
    report = compare((Heads(), variables), model, X, seeds=(0,))
    assert report.equal, str(report)
    assert {(row.a, row.b) for row in report.rows[1:]} == {("query", "q"), ("key", "k")}
    (note,) = report.notes
    assert note.startswith("paired by their numbers, against names or the order of calls: ")
    assert "query = q" in note
    assert "key = k" in note


class Turned(nn.Module):
    is_turned: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (3, 4) if self.is_turned else (4, 3))
        return x @ (kernel.T if self.is_turned else kernel)


def test_a_variable_of_another_shape_is_said_and_the_outputs_decide():
    variables = initialized(Turned(), jnp.zeros(X.shape))
    kernel = variables["params"]["kernel"]
    turned = (Turned(is_turned=True), {"params": {"kernel": kernel.T}})
    report = compare((Turned(), variables), turned, X, **CHEAP)
    assert "no counterpart was found for params/kernel of a" in report.first.text
    report = compare((Turned(), variables), turned, X, gradients=False, **CHEAP)
    assert report.equal
    assert "params/kernel of b, and its gradient: no counterpart was found" in report.not_compared
    turned = (Turned(is_turned=True), {"params": {"kernel": kernel.T + 0.1}})
    assert not compare((Turned(), variables), turned, X, **CHEAP).equal
