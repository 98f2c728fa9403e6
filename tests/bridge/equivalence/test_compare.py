"""compare: what is equal, how far apart what is not, and that nothing is left out in silence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict

import nnx_core as nnx
from bridge import ToLinen, ToNNX, load_variables
from bridge.equivalence import ComparisonError, NotEquivalentError, assert_equivalent, compare
from bridge.equivalence.drawing import Draw
from bridge.equivalence.weights import weighed
from tests.support.compared_models import (
    LAYERS,
    Chain,
    Dropping,
    NativeDropping,
    NativeNet,
    X,
    chain,
    initialized,
    linen,
    linen_stack,
    native,
    native_stack,
)


class Pair(NamedTuple):
    one: Any
    other: Any


def unequal(report):
    return {(finding.what, finding.path) for finding in report.findings if not finding.equal}


def wrapped(module, variables, *inputs, **options):
    model = ToNNX(module, nnx.Rngs(0), **options).lazy_init(*inputs)
    load_variables(model, variables)
    return model


def in_linen():
    variables = linen()[1]
    renamed = {name: {LAYERS[layer]: values for layer, values in tree.items()} for name, tree in variables.items()}
    return ToLinen(NativeNet), renamed


# ---- what is equal ----


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "b", [native, lambda: wrapped(*linen(), jnp.zeros(X.shape)), in_linen], ids=["native", "ToNNX", "ToLinen"]
)
def test_a_linen_model_and_the_same_in_any_form(b, train):
    report = compare(linen(), b(), X, train=train)
    assert report.equal, str(report)
    assert report.first is None
    assert report.not_compared == ()
    compared = {finding.what for finding in report.findings}
    assert compared == {"output", "gradient", "parameter", "state"}
    assert {row.verdict for row in report.rows} == {"equal"}
    assert [row.a for row in report.rows] == ["(root)", "up", "bn", "ln", "down"]
    assert report.seeds == (0, 1)


def test_bits_are_said_to_be_equal_where_they_are():
    report = compare(linen(), wrapped(*linen(), jnp.zeros(X.shape)), X)
    assert report.bit_equal
    assert not compare(jnp.sin, lambda x: jnp.sin(x) * (1 + 2.0**-22), X).bit_equal


def test_an_error_of_some_ulps_is_no_difference():
    report = compare(jnp.sin, lambda x: jnp.sin(x) * (1 + 2.0**-22), X)
    assert report.equal
    assert 1 <= report.findings[0].difference.ulp <= 5


@pytest.mark.slow
def test_stacks_and_single_layers_are_the_same():
    report = compare(linen_stack(), native_stack(), X)
    assert report.equal, str(report)
    calls = [(row.a, row.b, row.call) for row in report.rows[1:]]
    scanned = [("rounds/fc", f"layers/{n}", n + 1) for n in range(3)]
    assert calls == [*scanned, ("heads", "heads/0", 1), ("heads", "heads/1", 2)]
    assert report.not_compared == ()


def test_nothing_of_the_callers_is_changed():
    module, variables = linen()
    model = native()
    before = [(id(x), x.get_raw_value()) for x in jax.tree.leaves(nnx.state(model), is_leaf=_is_variable)]
    arrays = jax.tree.leaves(variables)
    structure = nnx.graphdef(model)
    compare((module, variables), model, X, train=True)
    after = [(id(x), x.get_raw_value()) for x in jax.tree.leaves(nnx.state(model), is_leaf=_is_variable)]
    assert [x for x, _ in before] == [x for x, _ in after]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    assert all(one is other for one, other in zip(arrays, jax.tree.leaves(variables), strict=True))
    assert nnx.graphdef(model) == structure


def _is_variable(x):
    return isinstance(x, nnx.Variable)


# ---- how far apart ----


def test_the_difference_is_the_largest_of_all_seeds():
    def off(x):
        return jnp.sin(x) + 0.01 * x

    report = compare(jnp.sin, off, X, seeds=(0, 1, 2))
    [output] = [finding for finding in report.findings if finding.what == "output"]
    draws = [Draw(seed).array(X) for seed in range(3)]
    expected = [np.abs(0.01 * x).max() / np.abs(np.sin(x)).max() for x in draws]
    assert output.seed == int(np.argmax(expected))
    np.testing.assert_allclose(output.difference.relative, max(expected), rtol=1e-4)
    assert report.first.cause == "computation"


def test_gradients_are_those_of_one_loss_for_both():
    report = compare(chain(), chain(stops=True), X)
    module, variables = chain()
    wrong = unequal(report)
    assert ("gradient", "params/first/kernel") in wrong
    assert ("output", "") not in wrong
    assert ("gradient", "params/second/kernel") not in wrong
    [kernel] = [finding for finding in report.findings if finding.path == "params/first/bias" and not finding.equal]
    weights = jax.grad(weighed)(jnp.zeros((3, 4)))
    x = Draw(kernel.seed).array(X)

    def loss(bias):
        params = {**variables["params"], "first": {**variables["params"]["first"], "bias": bias}}
        return (weights * module.apply({"params": params}, x)).sum()

    gradient = jax.grad(loss)(variables["params"]["first"]["bias"])
    np.testing.assert_allclose(kernel.difference.absolute, np.abs(gradient).max(), rtol=1e-4)
    assert (report.first.a, report.first.cause) == ("params/first/bias", "computation")


@pytest.mark.slow
def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference():
    class Before(nn.Module):
        order: bool

        @nn.compact
        def __call__(self, x):
            scores = nn.Dense(1, name="scores")(x)[:, 0]  # whose bias a softmax does not see
            shifted = jnp.exp(scores - scores.max())
            total = jnp.flip(shifted).sum() if self.order else shifted.sum()
            return nn.Dense(2, name="out")(x) * (shifted / total)[:, None]

    x = jax.ShapeDtypeStruct((64, 4), "float32")
    variables = Before(False).init(jax.random.key(0), jnp.zeros(x.shape))
    report = compare((Before(False), variables), (Before(True), variables), x)
    [bias] = {f.path: f for f in report.findings if f.path == "params/scores/bias" and f.what == "gradient"}.values()
    assert bias.difference.scale < 1e-6
    assert report.equal, str(report)


def test_state_after_the_call_is_compared():
    report = compare(linen(momentum=0.5), native(), X, train=True)
    assert unequal(report) == {("state", "batch_stats/bn/mean"), ("state", "batch_stats/bn/var")}
    [mean] = [finding for finding in report.findings if finding.path == "batch_stats/bn/mean"]
    _, variables = linen()
    x = Draw(mean.seed).array(X)
    kernel, bias = (variables["params"]["up"][name] for name in ("kernel", "bias"))
    of_batch = np.abs(np.tanh(x @ np.asarray(kernel) + np.asarray(bias)).mean(0)).max()
    np.testing.assert_allclose(mean.difference.absolute, (0.5 - 0.1) * of_batch, rtol=1e-4)
    assert report.first.cause == "state"
    assert report.first.a.startswith("batch_stats/bn/")
    assert "momentum 0.5 in a, 0.9 in b" in report.first.text


def test_stale_statistics_are_found_before_the_call():
    model = native()
    model.b.mean.set_value(model.b.mean.get_value() + 1)
    report = compare(linen(), model, X)
    texts = [finding.text for finding in report.findings if ("state", finding.path) in unequal(report)]
    assert "before the call" in texts
    assert (report.first.a, report.first.b, report.first.cause) == ("bn", "b", "state")
    assert report.first.text.startswith("the values of batch_stats/bn/mean differ by 1")


def test_sown_values_are_compared():
    report = compare(linen(sows=True), native(sows=True), X)
    assert [f.other for f in report.findings if f.path == "intermediates/hidden"] == ["intermediates/hidden"]
    assert report.equal
    report = compare(linen(sows=True), native(), X)
    assert report.equal
    assert report.not_compared == ("state intermediates/hidden: the call makes it in a, and not in b",)


# ---- forms ----


@pytest.mark.parametrize(
    ("b", "what", "cause"),
    [
        (lambda x: (x, x), "structure", "structure"),
        (lambda x: x.astype("bfloat16"), "output", "dtype"),
        (lambda x: x[:1], "output", "shape"),
    ],
)
def test_structure_dtype_and_shape_of_outputs(b, what, cause):
    report = compare(lambda x: x, b, X)
    assert what in {kind for kind, _ in unequal(report)}
    assert report.first.cause == cause


def test_an_output_that_is_missing_does_not_shift_the_others():
    report = compare(lambda x: {"a": x, "b": x + 1}, lambda x: {"b": x + 1}, X)
    assert unequal(report) == {("structure", "")}
    assert report.first.cause == "structure"
    assert "a returns a, b, b returns b" in report.first.text
    assert report.not_compared[0] == "gradients: of other outputs in a than in b"


def test_a_layer_in_another_dtype_is_found_though_the_next_one_casts_back():
    module, variables = linen(norm_dtype=jnp.bfloat16)

    report = compare(linen(), (module, variables), X)
    assert ("structure", "ln") in unequal(report)
    assert (report.first.a, report.first.cause) == ("ln", "dtype")


def test_equal_nans_are_equal():
    def f(x):
        return jnp.where(x > 0, jnp.nan, x)

    def infinite(x):
        return jnp.where(x > 0, jnp.inf, x)

    assert compare(f, f, X).equal
    assert not compare(f, infinite, X).equal
    hollow = compare(lambda x: x * jnp.nan, lambda x: x * jnp.nan, X, gradients=False)
    assert hollow.equal
    assert any("no finite number" in text for text in hollow.not_compared)


def test_what_one_side_alone_has_must_not_matter():
    module, variables = chain()
    extra = {"params": {**variables["params"], "third": {"bias": jnp.ones(3)}}}
    report = compare((module, extra), (module, variables), X)
    assert report.equal
    assert "params/third/bias: only in a, and no output depends on it" in report.not_compared

    class Biased(Chain):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) + self.param("shift", nn.initializers.zeros, (4,))

    shifted = Biased(), {"params": {**variables["params"], "shift": jnp.zeros(4)}}
    report = compare((module, variables), shifted, X)
    assert [finding.text for finding in report.findings if not finding.equal] == ["params/shift is in b and not in a"]


# ---- random streams ----


@pytest.mark.slow
def test_the_same_keys_give_the_same_masks_in_linen_and_tonnx():
    module = Dropping()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = module.init(keys, jnp.zeros(X.shape))
    model = wrapped(module, variables, jnp.zeros(X.shape))
    report = compare((module, variables), model, X, rngs={"dropout": jax.random.key(5)})
    assert report.bit_equal, str(report)
    assert {finding.what for finding in report.findings} == {"output", "gradient", "parameter", "random"}
    report = compare((module, variables), model, X, rngs={"dropout": 5}, deterministic=True)
    assert "random streams: no output of a depends on the keys" in report.not_compared


def dropping():
    module = Dropping()
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, jnp.zeros(X.shape))
    model = NativeDropping(nnx.Rngs(0))
    nnx.update(model.fc, variables["params"]["Dense_0"])
    return (module, variables), model


def test_masks_of_the_two_apis_differ_and_are_told_as_random():
    pair, model = dropping()
    report = compare(pair, model, X, rngs={"dropout": jax.random.key(1)})
    assert (report.first.a, report.first.b, report.first.cause) == ("Dropout_0", "drop", "random")


def test_a_mode_that_was_left_open_is_told_as_mode():
    pair, model = dropping()
    report = compare(pair, model, X, method=(lambda m, x: m(x, deterministic=True), "__call__"))
    assert (report.first.a, report.first.b, report.first.cause) == ("Dropout_0", "drop", "mode")
    report = compare(linen(), native(), X, method=("__call__", lambda m, x: m(x, train=True)))
    assert (report.first.a, report.first.b, report.first.cause) == ("bn", "b", "mode")
    assert "in evaluation mode in a and in training mode in b" in report.first.text


# ---- errors ----


def test_assert_equivalent_raises_with_the_text_of_the_report():
    with pytest.raises(NotEquivalentError) as caught:
        assert_equivalent(jnp.sin, jnp.cos, X)
    assert str(caught.value) == str(caught.value.report)
    assert not caught.value.report.equal
    assert assert_equivalent(jnp.sin, jnp.sin, X).equal


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((Chain(), jnp.sin, X), {}, r"(?s)a cannot be compared.*the Linen module Chain without its variables"),
        ((jnp.sin, Chain, X), {}, r"(?s)b cannot be compared.*the class Chain"),
        ((jnp.sin, 3, X), {}, r"(?s)b cannot be compared.*found: int"),
        (((Chain(), [1]), jnp.sin, X), {}, r"(?s)a cannot be compared.*variables of type list"),
        ((jnp.sin, jnp.sin, X), {"steps": 1}, r"(?s)training was asked for.*tx="),
        ((jnp.sin, jnp.sin, X), {"seeds": ()}, r"(?s)seeds=.*found: \(\)"),
        ((jnp.sin, jnp.sin, X), {"seeds": 3}, r"(?s)seeds=.*found: 3"),
        ((jnp.sin, jnp.sin, X), {"seeds": (-1,)}, r"(?s)seeds=.*found: \(-1,\)"),
        ((jnp.sin, jnp.sin, X), {"steps": -1}, r"(?s)steps=.*found: -1"),
        ((jnp.sin, jnp.sin, X), {"steps": "2"}, r"(?s)steps=.*found: '2'"),
        ((jnp.sin, jnp.sin, X), {"steps": 1, "tx": 3}, r"(?s)tx=.*found: 3"),
        ((jnp.sin, jnp.sin, X), {"method": ("__call__",)}, r"(?s)method=.*one for both"),
        ((jnp.sin, jnp.sin, X), {"rngs": "x"}, r"(?s)rngs=.*found: 'x'"),
        ((lambda x: None, lambda x: None, X), {}, r"(?s)nothing was compared.*the call returns none"),
        ((lambda: None, jnp.sin, X), {}, r"(?s)a \(function <lambda>\) does not run.*TypeError"),
        ((jnp.sin, jnp.sin, "no_such.npz"), {}, r"(?s)the batch file no_such.npz cannot be used.*No such file"),
    ],
)
def test_bad_usage(arguments, options, text):
    with pytest.raises(ComparisonError, match=text):
        compare(*arguments, **options)


def test_a_mode_that_linen_wants_to_be_told():
    class Open(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm()(x)

    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.zeros(X.shape))
    with pytest.raises(ComparisonError, match=r"(?s)a \(Linen Open\) does not run.*a mode flag that is open"):
        compare((Open(), {name: {"BatchNorm_0": tree} for name, tree in variables.items()}), jnp.sin, X)


def test_abstract_variables_are_refused():
    model = nnx.eval_shape(lambda: NativeNet(nnx.Rngs(0)))
    with pytest.raises(ComparisonError, match=r"(?s)a cannot be compared.*the abstract variable .*params/a/bias"):
        compare(model, model, X)


def test_layers_that_cannot_be_traced_are_an_error():
    class Real(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) if float(x.sum()) > 0 else nn.Dense(2)(-x)

    variables = Real().init(jax.random.key(0), jnp.ones(X.shape))
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ComparisonError, match=r"(?s)which layers are which cannot be found out.*Give rules="):
        compare((Real(), variables), model, jnp.ones(X.shape))


def test_what_cannot_be_had_is_said():
    report = compare(np.sin, jnp.sin, X)
    assert report.equal
    assert any(text.startswith("gradients: a has none: TracerArrayConversionError") for text in report.not_compared)
    assert "layers: a function has none" in report.not_compared
    report = compare(chain(), chain(), X, gradients=False, state=False, layers=False)
    assert set(report.not_compared) == {"gradients: gradients=False", "state: state=False", "layers: layers=False"}
    report = compare(lambda x: x > 0, lambda x: x > 0, X)
    assert "gradients: no output is inexact" in report.not_compared


def test_a_path_is_the_own_of_each_leaf():
    def one(tree):
        return {"a": {"b": jnp.sin(tree["a"]["b"])}, "a/b": jnp.cos(tree["a/b"])}

    def other(tree):
        return {"a": {"b": jnp.cos(tree["a/b"])}, "a/b": jnp.sin(tree["a"]["b"])}

    tree = {"a": {"b": X}, "a/b": X}
    assert compare(one, one, tree).equal
    report = compare(one, other, tree)
    assert {("output", "a/b"), ("output", "a\\/b")} <= set(unequal(report))


def test_imaginary_parts_have_gradients_too():
    def stopped(x):
        return jax.lax.complex(jnp.sin(x), jax.lax.stop_gradient(jnp.cos(x)))

    def whole(x):
        return jax.lax.complex(jnp.sin(x), jnp.cos(x))

    assert {what for what, _ in unequal(compare(whole, stopped, X))} == {"gradient"}


def test_large_numbers_that_are_the_same_hide_nothing():
    def masked(x, off):
        return jnp.where(jnp.arange(x.shape[-1]) == 0, -1e9, jnp.tanh(x) + off)

    assert not compare(lambda x: masked(x, 0.0), lambda x: masked(x, 0.1), X).equal
    assert compare(lambda x: masked(x, 0.0), lambda x: masked(x, 0.0) * 1.0, X).equal


def test_what_runs_on_real_numbers_alone_is_compared_too():
    report = compare(lambda x: np.tanh(np.asarray(x)), lambda x: np.sin(np.asarray(x)), X)
    assert not report.equal


def test_collections_without_gradients_are_named():
    class Lora(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.variable("lora", "scale", lambda: jnp.ones(x.shape[-1])).value

    x = jnp.ones((2, 4))
    model = Lora(), Lora().init(jax.random.key(0), x)
    report = compare(model, model, x)
    assert any("the collection 'lora' of a" in text for text in report.not_compared)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (lambda x: (x, x), lambda x: [x, x], False),
        (lambda x: Pair(x, x), lambda x: {"one": x, "other": x}, False),
        (lambda x: {"a": (x,)}, lambda x: {"a": x}, False),
        (lambda x: (x, None), lambda x: (x, ()), False),
        (lambda x: FrozenDict(a=x), lambda x: {"a": x}, True),
    ],
)
def test_what_outputs_stand_in(a, b, same):
    report = compare(a, b, X, gradients=False, seeds=(0,))
    assert report.equal is same
    assert same or (report.first.cause == "structure" and "a returns" in report.first.text)


def test_parameters_without_a_counterpart_are_a_finding():
    class Shapes(nnx.Module):
        def __init__(self, count):
            self.parts = nnx.List([nnx.Param(jnp.full((2,), n + 1.0)) for n in range(count)])
            self.idle = nnx.Param(jnp.ones(2))

        def __call__(self, x):
            return x * sum(part[...].sum() for part in self.parts)

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("weights", lambda key: jnp.arange(1.0, 4.0)).sum() * 7

    module = Other()
    variables = initialized(module, jnp.ones(X.shape))
    report = compare((module, variables), Shapes(6), X, seeds=(0,), layers=False)
    wrong = [finding for finding in report.findings if not finding.equal]
    assert {finding.what for finding in wrong} == {"structure"}
    assert "found for params/parts/0, params/parts/1, params/parts/2" in wrong[1].text
    assert "and 1 more of b, so neither these parameters nor their gradients were compared" in wrong[1].text
    assert "give rules=" in report.first.text
    assert report.first.cause == "structure"
    assert "params/idle of b, and its gradient: no counterpart was found" in report.not_compared
    one_sided = compare((module, variables), lambda x: x * 42.0, X, seeds=(0,))
    assert one_sided.equal
    assert "params/weights of a, and its gradient: no counterpart was found" in one_sided.not_compared


def test_outputs_that_are_zero_but_for_rounding_are_equal():
    def cancels(x):
        return (jax.nn.softmax(x) - jnp.exp(x - jax.nn.logsumexp(x, axis=-1, keepdims=True))).sum()

    def otherwise(x):
        shifted = jnp.exp(x)
        return (shifted / jnp.flip(shifted, -1).sum(-1, keepdims=True) - jax.nn.softmax(x)).mean()

    x = jax.ShapeDtypeStruct((16, 33), "float32")
    report = compare(cancels, otherwise, x)
    assert report.equal, str(report)
    assert any("zero but for rounding" in finding.text for finding in report.findings)
    # A true difference of that size is one.
    report = compare(lambda x: 1e-8 * x, lambda x: 1.1e-8 * x, x)
    assert not report.equal
    assert not compare(cancels, lambda x: cancels(x) + 3e-5, x).equal
