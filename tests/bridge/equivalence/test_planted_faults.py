"""Every planted fault is found, located at its layer, and told from what it does to those behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from bridge.equivalence.compare import NotEquivalentError, assert_equivalent
from tests.support.equivalence_pairs import FAULTS, PAIRS

# The suite runs some of each kind; `--grids` all.
_SUITE = {
    *("a wrong weight, one element", "a missing bias", "a transposed block of a kernel"),
    *("another epsilon", "gelu, exact", "a norm in half precision", "exchanged layers"),
    *("layers called in another order", "exchanged towers", "exchanged inputs"),
    *("stop_gradient: only gradients differ", "a missing residual", "an output in another dtype"),
    *("gate and value exchanged", "epsilon of a weight norm", "a state that is not updated"),
    *("another function", "a wrong weight in a ToNNX", "an integer output off by one"),
    *("another padding, another shape", "another padding, same shape", "another momentum"),
    *("stale statistics", "a kernel with its two window axes swapped", "scale and bias exchanged"),
    *("the running average while training", "a kernel without gradient", "dilation"),
    *("a flipped kernel", "query and key exchanged", "another scale", "float16 overflows"),
    *("positions begin at one", "a cache that is not written", "a cache with other keys"),
    *("another order of fused gates", "directions put together the other way"),
    *("a scan in reverse", "swapped outputs", "one layer of a stack", "one member of an ensemble"),
    *("an unused parameter", "a parameter of the branch not taken", "another dropout rate"),
    *("dropout in the wrong mode", "another key", "a product in float32", "a complex parameter"),
    *("another value is sown", "one NaN", "wrong from the second step on", "wrong for a few inputs"),
    *("a wrong bias behind another method", "an output that is not there"),
}


def names():
    parameters = []
    for name in FAULTS:
        marks = [] if name in _SUITE else [pytest.mark.grid]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def at(path):
    """The root has an empty path."""
    return "" if path == "(root)" else path


def is_there(path, layer, finding):
    """Whether `path` is the layer or, where one of its variables shows the fault, that variable."""
    path = at(path)
    if path == layer:
        return True
    _, _, variable = path.partition("/")
    if finding == "output" or not variable:
        return False
    return variable.startswith(f"{layer}/") if layer else "/" not in variable


def around(paths):
    """The modules that hold these layers."""
    return {path.rsplit("/", n)[0] for path in paths for n in range(1, path.count("/") + 1)} | {""}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_fault_is_found_and_located(name):
    fault = FAULTS[name]

    # Gradients cost as much as the rest, and show what the output shows; the equal pairs all have them compared.
    report = fault.sides(PAIRS).compare(gradients=fault.finding == "gradient")

    text = str(report)
    assert not report.equal, text
    first = report.first
    assert first is not None, text
    shown_by = "parameter" if first.cause == "parameters" else fault.finding
    assert is_there(first.a, fault.a, shown_by), text
    assert is_there(first.b, fault.b, shown_by), text
    assert first.cause in fault.causes.split(), text
    wrong_findings = {finding.what for finding in report.findings if not finding.equal}
    assert fault.finding in wrong_findings, text
    planted = {fault.a, *fault.also}
    by_themselves = {at(row.a) for row in report.rows if row.verdict == "wrong"}
    assert by_themselves <= planted | around(planted), text
    fed = {row.a for row in report.rows if row.verdict == "fed wrong"}
    assert set(fault.behind) <= fed, (set(fault.behind) - fed, text)
    verdicts = [row.verdict for row in report.rows if at(row.a) == fault.a != ""]
    verdicts = [verdict for verdict in verdicts if verdict != "equal"]
    if first.cause != "order":  # what is called too early is right by itself
        assert verdicts[:1] != ["fed wrong"], text


def test_there_are_forty_faults_of_every_kind():
    assert len(_SUITE) >= 40
    assert set(FAULTS) >= _SUITE
    causes = {cause for fault in FAULTS.values() for cause in fault.causes.split()}
    assert causes >= {
        *("parameters", "computation", "dtype", "shape", "mode"),
        *("order", "structure", "random", "state", "training"),
    }


# ---- what rounding explains is no fault -----------------------------------------------------------------------


def next_number(model):
    """Every parameter one ulp up."""
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Param):
            x.set_value(jnp.nextafter(x[...], jnp.inf))


def summed_in_another_order(model):
    """The features of the first layer in another order, and back: sums round otherwise."""
    order = np.array([2, 0, 3, 1])

    class Permuted(nnx.Linear):
        def __call__(self, x):
            return jnp.sum(x[..., order, None] * self.kernel[...][order], axis=-2) + self.bias[...]

    stem = Permuted(4, 6, rngs=nnx.Rngs(0))
    stem.kernel, stem.bias = model.stem.kernel, model.stem.bias
    model.stem = stem


def softmax_by_hand(model):
    """Mathematically what `gelu` is, with other operations."""

    def gelu(x):
        return x * jax.nn.sigmoid(2 * (2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))

    for block in model.blocks:
        block.act = gelu


@pytest.mark.slow
@pytest.mark.parametrize("plant", [next_number, summed_in_another_order, softmax_by_hand])
def test_rounding_is_not_reported(plant):
    sides = PAIRS["mlp"].sides()
    plant(sides.b)
    report = sides.compare()
    assert report.equal, str(report)
    assert report.first is None
    assert not report.bit_equal
    assert {row.verdict for row in report.rows} <= {"equal", "unpaired"}


# ---- seeds, streams, training --------------------------------------------------------------------------------


def test_wrong_for_one_seed_is_wrong():
    """A function that only the numbers of one draw lead astray."""
    first, second = (np.asarray(_drawn_with(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)

    def astray(x):
        return jnp.where(jnp.all(x == second), x + 1, x)

    form = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    report = assert_or_report(lambda x: x, astray, form)
    assert not report.equal
    assert {finding.seed for finding in report.findings if not finding.equal} == {1}


def _drawn_with(seed):
    """What `compare` draws for a seed, taken from a function that hands its input out."""
    from bridge.equivalence.compare import compare

    taken = []

    def take(x):
        jax.debug.callback(lambda x: taken.append(np.asarray(x)), x)
        return x * 1.0

    compare(take, take, jax.ShapeDtypeStruct((3, 2), jnp.float32), seeds=(seed,), gradients=False)
    jax.effects_barrier()
    return taken[0]


def assert_or_report(a, b, *inputs, **options):
    with pytest.raises(NotEquivalentError) as caught:
        assert_equivalent(a, b, *inputs, **options)
    return caught.value.report


@pytest.mark.slow
def test_the_error_says_what_the_report_says():
    sides = FAULTS["another epsilon"].sides(PAIRS)
    report = assert_or_report(sides.a, sides.b, *sides.inputs, **sides.options)
    text = str(report)
    assert "LinenFeedForward_1/LayerNorm_0" in text
    assert "blocks/1/norm" in text
    with pytest.raises(NotEquivalentError, match="LinenFeedForward_1/LayerNorm_0"):
        assert_equivalent(sides.a, sides.b, *sides.inputs, **sides.options)


def test_the_equal_pair_is_returned_as_a_report():
    sides = PAIRS["mlp"].sides()
    assert assert_equivalent(sides.a, sides.b, *sides.inputs, **sides.options).equal


@pytest.mark.slow
def test_two_faults_the_first_in_the_order_of_calls_is_named():
    sides = PAIRS["mlp"].sides()
    sides.b.blocks[0].norm.epsilon = 1e-2
    sides.b.head.bias.set_value(sides.b.head.bias[...] + 1)
    report = sides.compare()
    assert (report.first.a, report.first.cause) == ("LinenFeedForward_0/LayerNorm_0", "computation")
    verdicts = {row.a: row.verdict for row in report.rows}
    assert verdicts["Dense_1"] == "wrong"  # by itself too, although it is fed wrong numbers


def test_an_activation_between_functions_is_found():
    """Functions have no layers: the report says which output is off, and claims no place."""
    report = assert_or_report(jax.nn.gelu, functools.partial(jax.nn.gelu, approximate=False), jnp.ones((3, 2)))
    assert (report.first.a, report.first.b) == ("", "")
    assert report.rows == ()
