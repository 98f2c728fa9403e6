"""`compare` on networks that nobody here wrote: each against its ToNNX, and against one with a wrong weight.

Needs packages that the ordinary environment lacks: `nox -s models`.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
import nnx_core as nnx
from bridge.equivalence.compare import compare
from tests.third_party.models import KEY, MODELS
from tests.third_party.transformers_models import ARCHITECTURES

ROWS = [*MODELS, *ARCHITECTURES]
if not any(importlib.util.find_spec(row.package) for row in ROWS):
    pytest.skip("no package with Linen networks is installed: nox -s models", allow_module_level=True)

# What these packages and what they import warn about is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def case(request):
    return request.param.case()


@pytest.fixture(scope="module")
def variables(case):
    """Other values than `init` makes: biases and statistics start as constants, which would hide a mix-up."""
    keys = {"params": KEY, **case.keys}
    made = jax.jit(lambda: case.module.init(keys, *case.args, method=case.method))()
    return jax.tree.map(lambda x: x + 0.01 * (jnp.arange(x.size).reshape(x.shape) % 7).astype(x.dtype), made)


@pytest.fixture(scope="module")
def wrapped(case, variables):
    @nnx.jit
    def make():
        model = bridge.ToNNX(case.module, rngs={"params": KEY, **case.keys}, parity=True)
        return bridge.lazy_init(model, *case.args, method=case.method)

    model = make()
    assert bridge.load_variables(model, variables).complete
    return model


def options(case):
    given = {"rngs": case.keys} if case.keys else {}
    return given if case.method is None else given | {"method": case.method}


def test_a_network_equals_its_wrapper(case, variables, wrapped):
    report = compare((case.module, variables), wrapped, *case.args, **options(case))
    assert report.equal, str(report)
    assert report.first is None
    assert {"parameter", "output", "gradient"} <= {finding.what for finding in report.findings}
    assert not [row for row in report.rows if row.verdict in ("wrong", "fed wrong")]
    layers = {row.a for row in report.rows} - {""}
    assert len(layers) >= 2
    assert all(row.a == row.b for row in report.rows if row.verdict != "unpaired")


def test_a_wrong_weight_is_found_in_its_layer(case, variables, wrapped):
    """The largest kernel of the network, one element off."""
    model = nnx.clone(wrapped)
    params = [(path, x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)]
    path, chosen = max(params, key=lambda entry: entry[1].size)
    numbers = np.array(chosen[...])
    numbers.flat[numbers.size // 2] += 0.5 * np.abs(numbers).max() + 0.1
    chosen.set_value(jnp.asarray(numbers))
    report = compare((case.module, variables), model, *case.args, **options(case))
    assert not report.equal
    assert report.first.cause == "parameters", str(report)
    layer = "/".join(map(str, path[:-1]))
    assert report.first.a.removeprefix("params/").startswith(layer), (layer, str(report))
