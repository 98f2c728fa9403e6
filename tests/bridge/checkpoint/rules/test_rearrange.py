"""Axes by name and added constants in rules: against numpy, and the way back."""

import re
import tomllib

import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import nnx_core as nnx
from bridge.checkpoint.in_memory import nnx_to_train_state, train_state_to_nnx, variables_to_state
from bridge.checkpoint.rules.apply import Rule, Rules, RulesError
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

A, B = ("params", "a"), ("params", "b")


def there_and_back(rule, value, expected):
    rules = Rules.from_table(tomllib.loads(Rules([rule]).to_toml()))
    made = rules.convert({A: value})
    assert_trees_equal(made, {B: np.ascontiguousarray(expected)})
    assert_trees_equal(rules.inverse().convert(made), {A: value})


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((3, 3), {"rearrange": "a b -> b a"}, lambda x: x.T),
        (
            (2, 24),
            {"rearrange": "d (p h k) -> d (h p k)", "lengths": {"p": 3, "h": 2}},
            lambda x: x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(2, 24),
        ),
        (
            (2, 8),
            {"rearrange": "d (p k) -> d (p k)", "lengths": {"p": 4}, "order": {"p": [2, 0, 3, 1]}},
            lambda x: x.reshape(2, 4, 2)[:, [2, 0, 3, 1]].reshape(2, 8),
        ),
        (
            (2, 8),
            {"rearrange": "d (k p) -> (p k) d", "order": {"p": [1, 3, 0, 2]}},
            lambda x: x.reshape(2, 2, 4)[:, :, [1, 3, 0, 2]].transpose(2, 1, 0).reshape(8, 2),
        ),
        ((1, 5, 4), {"rearrange": "1 n d -> n d"}, lambda x: x[0]),
        (
            (3, 2, 4),
            {"rearrange": "a b c -> a (b c)", "lengths": {"b": 2, "c": 4}, "order": {"a": [2, 1, 0]}},
            lambda x: x[::-1].reshape(3, 8),
        ),
    ],
    ids=["transpose", "heads", "gates", "all", "one", "flipped"],
)
def test_axes_by_name(shape, options, expected):
    value = normal(0, *shape)
    there_and_back(Rule("params/a", "params/b", **options), value, expected(value))


def test_parts_that_are_joined_interleaved():
    q, k = normal(0, 2, 6), normal(1, 2, 6)
    rule = Rule(
        ["params/q", "params/k"], "params/b", concat=-1, rearrange="d (p h c) -> d (h p c)", lengths={"p": 2, "h": 3}
    )
    values = {("params", "q"): q, ("params", "k"): k}
    made = Rules([rule]).convert(values)
    assert_trees_equal(made[B], np.stack([q.reshape(2, 3, 2), k.reshape(2, 3, 2)], 2).reshape(2, 12))
    assert_trees_equal(Rules([rule]).inverse().convert(made), values)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rearrange": "a b"}, "two sides with one '->'"),
        ({"rearrange": "a b -> a"}, "each name stands once on either side"),
        ({"rearrange": "a a -> a a"}, "each name stands once"),
        ({"rearrange": "a (b) ] -> a b"}, r"in which ']' is no name"),
        ({"rearrange": "a (2 b) -> a b"}, "'(2 b)' holds no names"),
        ({"rearrange": "a (b c) -> a (c b)"}, "no lengths of b and c"),
        ({"rearrange": "a b -> (a b)"}, "no lengths of a and b"),
        ({"rearrange": "a -> a", "lengths": {"c": 2}}, "lengths of a are expected"),
        ({"rearrange": "a -> a", "lengths": {"a": 0}}, "lengths of a are expected"),
        ({"rearrange": "a -> a", "order": {"a": [0, 0]}}, "each index of a named axis is expected once"),
        ({"rearrange": "a -> a", "order": {"a": [1, 0]}, "lengths": {"a": 3}}, "each index"),
        ({"rearrange": "a -> a", "order": {"b": [1, 0]}}, "each index"),
        ({"rearrange": "a -> a", "lengths": 3}, "lengths = 3, which is no table"),
        ({"rearrange": 3}, "rearrange = 3, which is no text"),
        ({"lengths": {"a": 3}}, "'lengths' or 'order' without 'rearrange'"),
        ({"rearrange": "a b -> b a", "transpose": [1, 0]}, "'rearrange' beside 'transpose'"),
        ({"add": "one"}, "add = 'one', which is no number"),
        ({"add": True}, "add = True, which is no number"),
    ],
)
def test_what_is_no_rearrangement(options, why):
    with pytest.raises(RulesError, match=re.escape(why) if "(" in why else why):
        Rule("params/a", "params/b", **options)


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"rearrange": "a b c -> c b a"}, "float32", "has not the 3 axes of a b c -> c b a"),
        ({"rearrange": "a (b c) -> a (c b)", "lengths": {"b": 5}}, "float32", "a shape of 8 elements"),
        ({"add": 1.0}, "int32", "add does not fit.*floating numbers"),
    ],
)
def test_what_does_not_fit_the_leaf(options, dtype, why):
    with pytest.raises(RulesError, match=why):
        Rules([Rule("params/a", "params/b", **options)]).convert({A: np.zeros((2, 4), dtype)})


class Scaled(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(np.zeros(3, "float32"))


def test_a_constant_is_added_to_params_and_not_to_moments():
    tx = optax.adam(0.1)
    state = TrainState.create(apply_fn=None, params={"gain": normal(0, 3)}, tx=tx)
    state = state.apply_gradients(grads={"gain": normal(1, 3)})
    rules = Rules([Rule("params/gain", "params/scale", add=1.0)])
    model = Scaled()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    report = train_state_to_nnx(state, model, optimizer, rules=rules)
    assert_trees_equal(model.scale[...], state.params["gain"] + 1)
    assert_trees_equal(optimizer.opt_state[0].mu["scale"][...], state.opt_state[0].mu["gain"])
    assert any("shifted" in warning for warning in report.warnings)
    back, _ = nnx_to_train_state(model, optimizer, tx=tx, rules=rules.inverse())
    assert_trees_close(back.params, state.params)
    assert_trees_equal(back.opt_state[0].nu, state.opt_state[0].nu)
    boxed = {"params": {"gain": nn.Partitioned(normal(0, 3), ("x",))}}
    assert ("x",) in variables_to_state(boxed, rules=rules)[0]["scale"].get_metadata().values()
