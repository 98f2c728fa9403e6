"""Rules applied to arrays in memory: what the tests of every operation share.

Law: what an operation makes has the shape and dtype that it told before anything was read.
"""

import numpy as np
import pytest

from bridge.checkpoint.rules.apply import Rules, RulesError, apply_rules
from bridge.checkpoint.tree.ops import Read
from tests.tolerance import assert_trees_equal


def at(text):
    return tuple(text.split("/"))


def arrays(**shapes):
    """`params__a__b=(2, 3)` -> {("params", "a", "b"): random array}."""
    draw = np.random.default_rng(0)
    return {tuple(name.split("__")): draw.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def reads(values):
    return {path: Read(path, value.shape, str(value.dtype)) for path, value in values.items()}


def values_of(made, values):
    def read(path, region=None):
        return values[path] if region is None else values[path][region]

    found = {path: op.value(read) for path, op in made.items()}
    for path, op in made.items():
        assert found[path].shape == op.shape, path
        assert str(found[path].dtype) == op.dtype, path
    return found


def run(rules, values, **options):
    rules = rules if isinstance(rules, Rules) else Rules(rules)
    return values_of(apply_rules(rules, reads(values), **options).made, values)


def assert_same(actual, expected):
    """The same leaves in the same order, to the bit."""
    assert list(actual) == list(expected)
    assert_trees_equal(list(actual.values()), list(expected.values()))


def problems_of(rules, values, **options):
    with pytest.raises(RulesError) as caught:
        run(rules, values, **options)
    return str(caught.value)
