"""Rules: every operation against numpy, and every violation by the text of its error."""

import jax.numpy as jnp
import numpy as np
import pytest

from bridge.checkpoint.rules.apply import Rule, Rules, RulesError
from bridge.checkpoint.tree.ops import Fill
from bridge.variables.load import renaming
from tests.support.rule_cases import arrays, assert_same, at, problems_of, reads, run, values_of
from tests.tolerance import assert_trees_equal

# ---- renaming ----------------------------------------------------------------------------------------------


def test_rename_passes_the_same_expression_on_in_order():
    leaves = reads(arrays(params__b__kernel=(2,), params__a__kernel=(2,), step=()))
    result = Rules([Rule("params/a/**", "params/z/**"), Rule("params/b/(kernel)", r"params/y/\1")]).apply(leaves)
    assert list(result.made) == [at("params/y/kernel"), at("params/z/kernel"), at("step")]
    assert result.made[at("params/z/kernel")] is leaves[at("params/a/kernel")]


def test_the_first_rule_that_matches_takes_a_leaf():
    values = arrays(params__a=(1,), params__b=(2,))
    found = run([Rule("params/a", "params/first"), Rule("params/**", "params/rest/**")], values)
    assert list(found) == [at("params/first"), at("params/rest/b")]


def test_drop_keep_and_default():
    values = arrays(params__a=(1,), params__b=(1,), batch_stats__c=(1,))
    result = Rules([Rule("params/a", drop=True), Rule("params/*", keep=True)]).apply(reads(values))
    assert result.dropped == {at("params/a"): "rule 1 drops it"}
    assert list(result.made) == [at("params/b"), at("batch_stats/c")]
    assert "none for batch_stats/c" in problems_of(Rules([Rule("params/**", keep=True)], default="error"), values)


def test_optional_rules_may_match_nothing():
    values = arrays(params__a=(1,))
    assert list(run([Rule("params/x", "params/y", optional=True)], values)) == [at("params/a")]


def test_from_rename_renames_as_load_variables_does():
    rename = {"blocks_0": "blocks/0", "blocks_0/Dense_0": ("blocks", 0, "fc"), ("a.b", "c*"): ("x{i}", "\\1")}
    paths = [at("blocks_0/Dense_0/bias"), at("blocks_0/other"), ("a.b", "c*", "kernel"), at("else")]
    values = {(collection, *path): np.ones(1) for path in paths for collection in ("params", "batch_stats")}
    found = Rules.from_rename(rename).apply(reads(values)).made
    assert list(found) == [(location[0], *renaming(rename)(location[1:])) for location in values]


def test_then_lets_the_first_rules_win():
    values = arrays(params__a=(1,), params__b=(1,))
    derived = Rules([Rule("params/a", "params/derived_a"), Rule("params/b", "params/derived_b")], default="error")
    assert list(run(Rules([Rule("params/a", "params/mine")]).then(derived), values)) == [
        at("params/mine"),
        at("params/derived_b"),
    ]


# ---- values ------------------------------------------------------------------------------------------------


def test_transpose_reshape_cast_in_this_order():
    values = arrays(params__a=(2, 3, 4))
    rule = Rule("params/a", "params/b", cast="bfloat16", reshape=[4, -1], transpose=[2, 0, 1])
    expected = np.asarray(values[at("params/a")].transpose(2, 0, 1).reshape(4, 6).astype(jnp.bfloat16))
    assert_same(run([rule], values), {at("params/b"): expected})


def test_keep_may_rework():
    values = arrays(params__a=(2, 3))
    found = run([Rule("params/**", keep=True, cast="float16", transpose=[1, 0])], values)
    assert_same(found, {at("params/a"): values[at("params/a")].T.astype("float16")})


def test_concat_binds_groups():
    values = arrays(params__l0__b=(2, 3), params__l1__a=(2, 3), params__l0__a=(2, 3), params__l1__b=(2, 3))
    rule = Rule([r"params/l(\d)/a", r"params/l(\d)/b"], r"params/\1/ab", concat=-1)

    def joined(layer):
        return np.concatenate([values[at(f"params/{layer}/{part}")] for part in "ab"], axis=-1)

    assert_same(run([rule], values), {at("params/0/ab"): joined("l0"), at("params/1/ab"): joined("l1")})


def test_split_into_equal_parts_and_given_sizes():
    values = arrays(params__a=(2, 6))
    whole = values[at("params/a")]
    equal = run([Rule("params/a", ["params/x", "params/y", "params/z"], split=1)], values)
    assert_same(equal, {at(f"params/{n}"): whole[:, 2 * i : 2 * i + 2] for i, n in enumerate("xyz")})
    given_sizes = run([Rule("params/a", ["params/x", "params/y"], split=-1, sizes=[1, 5])], values)
    assert_same(given_sizes, {at("params/x"): whole[:, :1], at("params/y"): whole[:, 1:]})


def test_concat_of_unequal_parts_needs_sizes():
    values = arrays(params__a=(2, 1), params__b=(2, 3))
    rule = Rule(["params/a", "params/b"], "params/ab", concat=1, sizes=[1, 3])
    assert_same(run([rule], values), {at("params/ab"): np.concatenate(list(values.values()), axis=1)})
    text = problems_of([Rule(["params/a", "params/b"], "params/ab", concat=1)], values)
    assert "have sizes [1, 3]: not equal parts" in text


def test_stack_sorts_by_number():
    names = [f"layers_{n}" for n in (10, 2, 0, 1, *range(3, 10))]
    values = arrays(**{f"params__{name}__kernel": (2, 3) for name in names})
    found = run([Rule(r"params/layers_(\d+)/**", "params/layers/**", stack=1)], values)
    expected = np.stack([values[at(f"params/layers_{n}/kernel")] for n in range(11)], axis=1)
    assert_same(found, {at("params/layers/kernel"): expected})


def test_unstack_and_a_wildcard():
    values = arrays(params__layers__kernel=(2, 3, 4))
    found = run([Rule("params/layers/**", "params/layers_{i}/**", unstack=-2)], values)
    whole = values[at("params/layers/kernel")]
    assert_same(found, {at(f"params/layers_{n}/kernel"): whole[:, n] for n in range(3)})


def test_gates_of_unrolled_cells_into_a_scan():
    values = arrays(**{f"params__cell_{n}__{gate}": (2, 3) for gate in ("ir", "iz") for n in (0, 1)})
    rule = Rule([r"params/cell_(\d+)/ir", r"params/cell_(\d+)/iz"], "params/cells/dense_i", concat=-1, stack=0)
    layers = [np.concatenate([values[at(f"params/cell_{n}/{gate}")] for gate in ("ir", "iz")], axis=-1) for n in (0, 1)]
    assert_same(run([rule], values), {at("params/cells/dense_i"): np.stack(layers)})
    back = Rules([rule]).inverse()
    assert str(back.rules[0]) == (
        'from = "params/cells/dense_i", to = ["params/cell_{i}/ir", "params/cell_{i}/iz"], unstack = 0, split = -1'
    )


def test_new_values_and_those_of_the_target():
    values = arrays(params__a=(1,))
    rules = Rules(
        [
            Rule(target="params/zero", new={"value": 0.5, "shape": [2], "dtype": "bfloat16"}),
            Rule(target="params/**/hn_bias", new="target"),
            Rule(target="params/b", new="target", optional=True),
        ]
    )
    result = rules.apply(reads(values), target=[at("params/a"), at("params/x/hn_bias"), at("params/hn_bias")])
    assert result.new == (at("params/x/hn_bias"), at("params/hn_bias"))
    assert isinstance(result.made[at("params/zero")], Fill)
    filled = values_of(result.made, values)[at("params/zero")]
    assert_trees_equal(filled, np.full(2, 0.5, jnp.bfloat16))
    text = problems_of(rules, values)
    assert "expected: a target model, in which the pattern is looked for" in text
    assert Rules([Rule(target="params/b", new="target")]).apply(reads(values)).new == (at("params/b"),)


# ---- what does not fit the leaves --------------------------------------------------------------------------

TREE = {"params__enc__layers_0__kernel": (2, 3), "params__enc__layers_1__kernel": (2, 3), "params__enc__bias": (3,)}


@pytest.mark.parametrize(
    ("rules", "texts"),
    [
        (
            [Rule(r"params/enc/layer_(\d+)/kernel", r"params/\1")],
            ["rule 1, from = ", "none of 3 leaves (did you mean params/enc/layers_1/kernel"],
        ),
        ([Rule("enc/**", "dec/**")], ["a location begins with its collection"]),
        (
            [Rule("params/**", keep=True), Rule("params/enc/bias", drop=True)],
            ["rule 2", "rule 1, which comes before, takes params/enc/bias"],
        ),
        (
            [Rule(r"params/enc/layers_\d/kernel", "params/k")],
            [
                "one leaf for params/k",
                "rule 1 (from params/enc/layers_0/kernel) makes it, and rule 1 (from params/enc/la",
            ],
        ),
        (
            [Rule("params/enc/bias", "params/enc/layers_0/kernel")],
            ["a leaf that no rule takes (from params/enc/layers_0/kernel)"],
        ),
        (
            [Rule("params/enc/bias", "params/enc")],
            ["no leaf inside another", "params/enc and params/enc/layers_0/kernel"],
        ),
        ([Rule("params/enc/bias", "params/b", transpose=[1, 0])], ["params/enc/bias: transpose does not fit"]),
        ([Rule("params/enc/bias", "params/b", reshape=[2, -1])], ["params/enc/bias: reshape does not fit"]),
        (
            [Rule("params/enc/bias", ["params/x", "params/y"], split=0)],
            ["of shape (3,) along axis 0: not 2 equal parts"],
        ),
        ([Rule("params/enc/bias", ["params/x", "params/y"], split=0, sizes=[1, 1])], ["not sizes = [1, 1]"]),
        ([Rule("params/enc/bias", ["params/x", "params/y"], split=1)], ["along axis 1"]),
        ([Rule("params/enc/bias", "params/b/{i}", unstack=1)], ["params/enc/bias of shape (3,): no axis 1"]),
        ([Rule(r"params/enc/(.*)", "params/b", stack=0)], ["the index 'bias' of params/enc/bias, which is no number"]),
        (
            [Rule(r"params/enc/layers_([1])/**", "params/b/**", stack=0)],
            ["no layer 0 beside params/enc/layers_1/kernel"],
        ),
        (
            [Rule(["params/enc/bias", "params/no"], "params/b", concat=0)],
            ["no params/no that goes with params/enc/bias"],
        ),
        (
            [Rule(["params/enc/layers_./kernel", "params/enc/bias"], "params/b", concat=0)],
            ["two leaves for one place: params/enc/layers_0/kernel and params/enc/layers_1/kernel"],
        ),
        (
            [Rule(["params/enc/layers_0/kernel", "params/enc/bias"], "params/b", concat=0)],
            ["params/enc/bias: float32[3]"],
        ),
        (
            [Rule(target="params/enc/bias", new={"value": 0, "shape": [], "dtype": "int32"})],
            ["that nothing else makes"],
        ),
        ([Rule(target="params/enc/bias", new="target")], ["leaves of the target that no rule makes"]),
    ],
)
def test_violations(rules, texts):
    found = problems_of(rules, arrays(**TREE))
    for text in texts:
        assert text in found, found
    assert found.endswith("Nothing was read or written. Mend the rules named above.")


def test_all_violations_in_one_error():
    rules = [Rule("params/no", drop=True), Rule("params/enc/bias", "params/enc"), Rule("params/nor", drop=True)]
    with pytest.raises(RulesError, match="the rules: 4 problems") as caught:
        run(rules, arrays(**TREE))
    assert [problem.rule for problem in caught.value.problems] == [1, 3, 2, 2]


def test_the_same_index_twice():
    values = arrays(params__l_0=(2,), params__l_00=(2,), params__l_1=(2,))
    text = problems_of([Rule(r"params/l_(\d+)", "params/l", stack=0)], values)
    assert "two leaves for one place: params/l_0 and params/l_00" in text
