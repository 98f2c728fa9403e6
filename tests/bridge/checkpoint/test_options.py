"""Options of a conversion: checked once, by name; the doors that take them by keyword agree with them."""

import inspect
from dataclasses import MISSING, fields

import numpy as np
import pytest
import safetensors.numpy

from bridge.checkpoint import ConversionOptions, OptionError, convert, load_into, make_plan
from bridge.checkpoint.conversion import Conversion, LossyConversionError

DEFAULTS = {field.name: field.default for field in fields(ConversionOptions)}
#: Keywords of a door that are another's business, or have another default for a reason.
OTHERS = {
    make_plan: {"layout", "metadata"},
    load_into: {"optimizer", "extras", "format", "rng"},  # a model that is loaded keeps the checkpoint's random streams
    convert: {"job"},
}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("to", "jax", "expected 'nnx' or 'linen'"),
        ("rng", "fresh", "expected 'drop', 'keep' or a seed"),
        ("rng", True, "expected 'drop', 'keep' or a seed"),
        ("kind", "params only", "expected a bridge.checkpoint.Kind"),
        ("empty", "List", "expected 'None', 'Dict' or nothing"),
        ("max_memory", 0, "expected a number of bytes"),
    ],
)
def test_a_wrong_option_is_named(option, value, expected):
    with pytest.raises(OptionError, match=rf"(?s)the option {option} has .*{expected}.*found {value!r}") as caught:
        ConversionOptions(**{"to": "nnx", option: value})
    assert caught.value.option == option


def test_a_seed_may_be_of_numpy():
    assert ConversionOptions(to="nnx", rng=np.int64(3)).seed == 3
    assert ConversionOptions(to="nnx", rng="keep").seed is None


@pytest.mark.parametrize("door", OTHERS, ids=lambda door: door.__name__)
def test_keywords_of_a_door_are_the_options_with_their_defaults(door):
    keywords = [
        p
        for p in inspect.signature(door).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in OTHERS[door]
    ]
    assert keywords
    for parameter in keywords:
        default = DEFAULTS[parameter.name]
        assert parameter.default == (parameter.empty if default is MISSING else default), parameter.name


def test_nothing_is_opened_with_a_wrong_option(tmp_path):
    with pytest.raises(OptionError, match="max_memory"):
        convert(tmp_path / "no such checkpoint", tmp_path / "out", to="nnx", max_memory=-1)


def test_a_run_takes_the_options_that_the_conversion_was_opened_with(tmp_path):
    source = tmp_path / "linen.safetensors"
    weights = {"params/Dense_0/kernel": np.ones((2, 3), "float32"), "nnx_rngs/count": np.zeros((), "uint32")}
    safetensors.numpy.save_file(weights, source)
    seen = []
    options = ConversionOptions(
        to="nnx",
        target_format="msgpack",
        target={"Dense_0": {"kernel": {"value": np.zeros((2, 3), "float32")}}},
        verify=False,
        progress=lambda doing, done, total: seen.append(doing),
    )
    with Conversion.open(source, options) as conversion:
        assert conversion.target_format == "msgpack"
        first = conversion.run(tmp_path / "a.msgpack")
        second = conversion.run(tmp_path / "b.msgpack", verify=True)
    assert (first.verified, second.verified) == (False, True)
    assert seen == ["converting", "converting", "verifying"]


def test_lossy_may_be_said_when_it_runs(tmp_path):
    source = tmp_path / "linen.safetensors"
    safetensors.numpy.save_file({"params/kernel": np.ones(3, "float32"), "opt_state/0/count": np.zeros(1)}, source)
    target = {"kernel": {"value": np.zeros(3, "float32")}}
    options = ConversionOptions(to="nnx", target=target, target_format="safetensors")
    with Conversion.open(source, options) as conversion:
        with pytest.raises(LossyConversionError, match="opt_state"):
            conversion.run(tmp_path / "a.safetensors")
        assert conversion.run(tmp_path / "a.safetensors", lossy=True).leaves == 1
