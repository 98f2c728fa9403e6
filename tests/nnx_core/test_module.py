"""Module: sowing that waits for a capture. Sequential: iteration, and keywords for the layers that take them."""

import inspect
import os
import subprocess
import sys

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import NnxError
from nnx_core.module import KeywordTwiceError
from tests.support.arrays import noise
from tests.tolerance import assert_trees_equal

X = noise(0, 2, 3)
#: flax.nnx has what is tested here from 0.12.12 on; before, the oracle is what is written in the test.
FLAX_HAS_IT = "capture_noop" in inspect.signature(flax.nnx.Module.sow).parameters
LIBS = [nnx, flax.nnx] if FLAX_HAS_IT else [nnx]
BOTH = pytest.mark.parametrize("lib", LIBS, ids=[lib.__name__ for lib in LIBS])


def sower(lib, **options):
    """A module that sows and perturbs with these options, and what `sow` answered."""
    answers = []

    class Sower(lib.Module):
        def __call__(self, x):
            answers.append(self.sow(lib.Intermediate, "seen", x, **options))
            return 2 * self.perturb("grad", x, **options)

    return Sower(), answers


def attributes(lib, module):
    return sorted("/".join(map(str, path)) for path, _ in lib.to_flat_state(lib.state(module)))


@pytest.mark.filterwarnings("ignore:Using 'Module")  # flax.nnx would rather have captures
@BOTH
@pytest.mark.parametrize("options", [{}, {"capture_noop": None}, {"capture_noop": False}], ids=str)
def test_sown_outside_of_a_capture(lib, options):
    module, answers = sower(lib, **options)
    assert_trees_equal(module(X), 2 * X)
    assert attributes(lib, module) == ["grad", "seen"]
    assert answers == [True]


@BOTH
def test_capture_noop_does_nothing_outside_of_a_capture(lib):
    module, answers = sower(lib, capture_noop=True)
    assert_trees_equal(module(X), 2 * X)
    assert attributes(lib, module) == []
    assert answers == [False]


@BOTH
@pytest.mark.parametrize("options", [{}, {"capture_noop": True}, {"capture_noop": False}], ids=str)
def test_inside_of_a_capture_it_makes_no_difference(lib, options):
    module, answers = sower(lib, **options)
    y, sown = lib.capture(module, lib.Intermediate)(X)
    assert_trees_equal((y, sown["seen"].get_raw_value()), (2 * X, (X,)))
    y, perturbations = lib.capture(module, lib.Perturbation)(X)
    assert_trees_equal((y, perturbations["grad"].get_raw_value()), (2 * X, jnp.zeros_like(X)))
    assert answers == [True, False]
    assert attributes(lib, module) == []


def test_the_default_can_be_set():
    module, answers = sower(nnx)
    with nnx.set_sow_capture_noop(True):
        module(X)
        assert answers == [False]
        _, sown = nnx.capture(module, nnx.Intermediate)(X)
        assert list(sown) == ["seen"]
        explicit, _ = sower(nnx, capture_noop=False)
        explicit(X)
        assert attributes(nnx, explicit) == ["grad", "seen"]
    assert attributes(nnx, module) == []
    module(X)
    assert attributes(nnx, module) == ["grad", "seen"]


@pytest.mark.slow
@pytest.mark.parametrize(("value", "expected"), [("true", "True"), ("1", "True"), ("0", "False"), ("", "False")])
def test_the_default_comes_from_the_environment(value, expected):
    # The variable, and what it takes for yes, are those of flax's flag.
    program = "from nnx_core import modes; print(modes.sowing_needs_capture(None))"
    environment = {**os.environ, "NNX_SOW_CAPTURE_NOOP": value}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected


def test_outputs_of_methods_are_sown_whatever_the_default_is():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with nnx.set_sow_capture_noop(True):
        _, sown = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(X)
    assert_trees_equal(sown["__call__"][...], (model(X),))


# ---- Sequential ----------------------------------------------------------------------------------------------------


def test_sequential_is_iterable():
    layers = [nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.relu]
    model = nnx.Sequential(*layers)
    assert list(model) == layers
    assert [first is second for first, second in zip(model, model.layers, strict=True)] == [True, True]
    assert list(nnx.Sequential()) == []


class Scale(nnx.Module):
    def __call__(self, x, *, factor, other=None):
        return x * factor


def everything(x, **keywords):
    return x * len(keywords)


KEYWORDS = {
    "the first layer": ((Scale(), jnp.negative), {"factor": 2.0}, -2.0 * X),
    "a later layer": ((jnp.negative, Scale()), {"factor": 2.0}, -2.0 * X),
    "every layer that takes it": ((Scale(), nnx.identity, Scale()), {"factor": 2.0}, 4.0 * X),
    "layers that take all": ((everything, Scale(), everything), {"factor": 2.0, "more": 1}, 8.0 * X),
    "no layer": ((nnx.identity,), {"unknown": 1}, X),
    "beside a tuple": ((lambda x: (x, 2.0), lambda x, by, *, factor: x * by * factor), {"factor": 2.0}, 4.0 * X),
    "beside a dict": ((lambda x: {"x": x}, Scale()), {"factor": 2.0}, 2.0 * X),
    "by position only": ((lambda factor, /: factor,), {"factor": 2.0}, X),
    "rngs": ((lambda x, rngs: x * rngs, lambda x: x, everything), {"rngs": 5.0}, 5.0 * X),
    "rngs and more": ((lambda x, rngs=None: x * rngs, Scale()), {"rngs": 4.0, "factor": 2.0}, 8.0 * X),
    "no layers": ((), {"factor": 2.0}, X),
}


@pytest.mark.parametrize(("layers", "keywords", "expected"), KEYWORDS.values(), ids=KEYWORDS)
def test_keywords_go_to_the_layers_that_take_them(layers, keywords, expected):
    assert_trees_equal(nnx.Sequential(*layers)(X, **keywords), expected)
    if FLAX_HAS_IT:
        assert_trees_equal(flax.nnx.Sequential(*layers)(X, **keywords), expected)


def test_keywords_of_layers_of_this_library():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    call = nnx.jit(lambda model, x: model(x, rngs=nnx.Rngs(1), deterministic=False, use_running_average=True))
    dropped = model.layers[1](model.layers[0](X), deterministic=False, rngs=nnx.Rngs(1))
    assert_trees_equal(call(model, X), jax.jit(lambda x: model.layers[2](x, use_running_average=True))(dropped))


def test_one_keyword_from_two_sides():
    model = nnx.Sequential(lambda x: {"x": x, "factor": 2.0}, Scale())
    text = r"(?s)^Sequential\.layers\[1\] gets 'factor' twice:.*expected each keyword once\n  found .*Leave it out"
    with pytest.raises(KeywordTwiceError, match=text):
        model(X, factor=3.0)
    assert issubclass(KeywordTwiceError, NnxError)
    assert issubclass(KeywordTwiceError, TypeError)
    if FLAX_HAS_IT:
        with pytest.raises(TypeError, match="multiple values"):
            flax.nnx.Sequential(lambda x: {"x": x, "factor": 2.0}, Scale())(X, factor=3.0)


def test_a_layer_whose_signature_python_cannot_tell():
    assert nnx.Sequential(max)(1, 2, key=lambda x: -x) == 1
    assert nnx.Sequential(lambda x: x, max)([1, 2], key=lambda x: -x) == 2
