"""Rules: every operation against numpy, every violation by the text of its error, and the way back to the last bit."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint.rules.apply import Rule, Rules, RulesError, apply_rules, read_rules
from bridge.checkpoint.rules.patterns import Pattern, PatternError, Template, escape, escape_template, invert
from bridge.checkpoint.tree.ops import Fill, Read
from bridge.variables.load import renaming
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


# ---- patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "location", "groups", "wild"),
    [
        ("params/a", "params/a", (), ()),
        (r"params/layers_(\d+)/(kernel|bias)", "params/layers_12/bias", ("12", "bias"), ()),
        ("*/a", "batch_stats/a", (), (("batch_stats",),)),
        ("**/kernel", "params/a/b/kernel", (), (("params", "a", "b"),)),
        ("params/**", "params", (), ((),)),
        ("**", "params/a", (), (("params", "a"),)),
        ("**/a/**", "a/a/a", (), ((), ("a", "a"))),
        ("params/**/(x)/*/**", "params/1/x/2/3", ("x",), (("1",), ("2",), ("3",))),
        (r"params/(a)?b", "params/b", ("",), ()),
    ],
)
def test_pattern_matches(pattern, location, groups, wild):
    found = Pattern.parse(pattern).match(at(location))
    assert (found.groups, found.wild) == (groups, wild)


@pytest.mark.parametrize(
    ("pattern", "location"),
    [
        ("params/a", "params/a/b"),
        ("params/a", "params"),
        (r"params/layers_\d", "params/layers_12"),
        ("params/.*", "params/a/b"),
        ("*", "params/a"),
        ("a/**/a", "a"),
        ("**/b/**/b", "a/b"),
    ],
)
def test_pattern_does_not_match(pattern, location):
    assert Pattern.parse(pattern).match(at(location)) is None


def test_a_key_with_a_slash_goes_in_a_list():
    pattern = Pattern.parse(["params", r"(\w+)/kernel/scale"])
    found = pattern.match(("params", "Dense_0/kernel/scale"))
    assert Template.parse(["params", r"\1", "scale"]).fill(found) == ("params", "Dense_0", "scale")
    assert pattern.match(at("params/Dense_0/kernel/scale")) is None


def test_template_escapes():
    match = Pattern.parse("(a)").match(("a",))
    assert Template.parse(r"\g<1>0/\{i}/\\1/\*/x{").fill(match) == ("a0", "{i}", r"\1", "*", "x{")


any_key = st.text(st.sampled_from("ab1_./*+\\{}i()[]|^$?-"), min_size=1, max_size=6)


@given(any_key)
def test_escaped_keys_stand_for_themselves(key):
    pattern = Pattern.parse([escape(key)])
    assert pattern.literal == (key,)
    assert Template.parse([escape_template(key)]).fill(pattern.match((key,))) == (key,)


@pytest.mark.parametrize(
    ("pattern", "template", "location"),
    [
        (r"params/layers_(\d+)/**", r"params/layers/\1/**", "params/layers_3/a/b"),
        (r"params/(\w+)_(\d+)/bias", r"params/\2/\1/b", "params/fc_7/bias"),
        (r"*/x\.y/([^)(]+)2", r"*/\g<1>0/a{b", "params/x.y/k2"),
        (r"**/(?P<name>a|b)/*", r"**/at/\1/*", "params/x/a/k"),
    ],
)
def test_inverse_of_a_pair(pattern, template, location):
    pattern, template = Pattern.parse(pattern), Template.parse(template)
    back, home = invert(pattern, template)
    there = template.fill(pattern.match(at(location)))
    assert home.fill(back.match(there)) == at(location)


@pytest.mark.parametrize(
    ("pattern", "template", "why"),
    [
        (r"layers_\d+", "layer", "outside of groups"),
        ("a.", "b", "outside of groups"),
        ("(?:a|b)", "c", "outside of groups"),
        ("((a)b)", r"\1\2", "outside of groups"),
        ("(a)+", r"\1", "outside of groups"),
        (r"(\d+)/(\d+)", r"\1/\1", "exactly once"),
        (r"(\d+)", "a", "exactly once"),
    ],
)
def test_pairs_without_inverse(pattern, template, why):
    with pytest.raises(PatternError, match=why):
        invert(Pattern.parse(pattern), Template.parse(template))


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


# ---- rules that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"from": "a", "too": "b"}, r"'too' \(did you mean 'to'\?\)"),
        ({"from": "a"}, "a rule with 'to' has no 'to'"),
        ({"to": "a"}, "has no 'from'"),
        ({"from": "a", "to": "b", "drop": True}, "'drop' has a 'to'"),
        ({"from": "a", "drop": True, "keep": True}, "'drop' and 'keep' in one rule"),
        ({"from": "a", "drop": True, "cast": "float32"}, "'cast' in a rule with 'drop'"),
        ({"from": "a", "keep": True, "stack": 0}, "'stack' in a rule with 'keep'"),
        ({"from": "a", "drop": "yes"}, "neither true nor false"),
        ({"from": "a", "to": "b", "stack": True}, "stack = True, which is no axis"),
        ({"from": "a", "to": "b", "transpose": [0, "1"]}, "no list of whole numbers"),
        ({"from": "a", "to": "b", "reshape": []}, "no list of whole numbers"),
        ({"from": "a", "to": "b", "cast": "float31"}, "'float31' is not the name of a number type"),
        ({"from": "a", "to": "b", "cast": 32}, "32 is not the name"),
        ({"from": "a(", "to": "b"}, r"'a\(' is no regex: .*cut at each '/'"),
        ({"from": "[^/]+", "to": "b"}, "cut at each '/'"),
        ({"from": "a//b", "to": "b"}, "an empty key in 'a//b'"),
        ({"from": 3, "to": "b"}, "found 3"),
        ({"from": [], "to": "b"}, r"found \[\]"),
        ({"from": "a/**/**", "to": "b/**/**"}, "twice in a row"),
        ({"from": "a", "to": "b\\"}, "a lone backslash"),
        ({"from": "(a)", "to": r"\2"}, r"asks for group 2, and \(a\) has 1"),
        ({"from": "(a)", "to": r"\0"}, "asks for group 0"),
        ({"from": "a/**", "to": "b"}, r"b has other wildcards than a/\*\*: \*\*"),
        ({"from": "a", "to": "b/*"}, "other wildcards than a: none"),
        ({"from": "a", "to": "b", "concat": 0}, "'concat' needs a list of two or more in 'from'"),
        ({"from": "a", "to": ["b"], "split": 0}, "'split' needs a list of two or more in 'to'"),
        ({"from": ["(a)", "b"], "to": r"\1", "concat": 0}, r"b has 0 groups and \(a\) has 1"),
        ({"from": "a", "to": "b", "unstack": 0}, "no {i} for the index"),
        ({"from": "a", "to": "b{i}"}, "{i} without 'unstack'"),
        ({"from": "a", "to": "{i}/{i}", "unstack": 0}, "{i} stands 2 times"),
        ({"from": "a", "to": "b", "stack": 0}, "exactly one group .* 0 of 0 are left out"),
        ({"from": "(a)(b)", "to": "b", "stack": 0}, "2 of 2 are left out"),
        ({"from": "a", "to": "b", "sizes": [1]}, "for no parts"),
        ({"from": "a", "to": ["b", "c"], "split": 0, "sizes": [1]}, r"sizes = \[1\], for 2 parts"),
        ({"from": "a", "to": ["b", "c"], "split": 0, "sizes": [0, 1]}, r"sizes = \[0, 1\]"),
        ({"to": "b", "new": "model"}, "where 'target' or value, shape and dtype are expected"),
        ({"to": "b", "new": {"value": 1}}, "value, shape and dtype"),
        ({"to": "b.", "new": {"value": 0, "shape": [1], "dtype": "int32"}}, "which is not one location"),
        ({"to": "b", "new": {"value": "0", "shape": [1], "dtype": "int32"}}, "which is no number"),
        ({"to": "b", "new": {"value": 0, "shape": [-1], "dtype": "int32"}}, "no list of sizes"),
        ({"to": "b", "new": {"value": 0, "shape": [1], "dtype": "int"}, "from": "a"}, "'new' has a 'from'"),
        ({}, "a rule without keys"),
    ],
)
def test_malformed_rules_name_the_rule(row, why):
    good = {"from": "params/a", "drop": True}
    with pytest.raises(RulesError, match=why) as caught:
        Rules.from_table({"rule": [good, row]})
    assert [problem.rule for problem in caught.value.problems] == [2]


def test_malformed_files(tmp_path):
    file = tmp_path / "rules.toml"
    with pytest.raises(RulesError, match="No such file"):
        read_rules(file)
    file.write_text("[[rule]\n")
    with pytest.raises(RulesError, match=r"(?s)" + re.escape(str(file)) + r".*line 1"):
        read_rules(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RulesError, match="utf-8"):
        read_rules(file)
    file.write_text('defualt = "keep"\n[rule]\nfrom = "a"\n')
    with pytest.raises(RulesError, match=r"(?s)2 problems.*'defualt'.*rule = {'from': 'a'}"):
        read_rules(file)
    file.write_text('default = "drop"\n')
    with pytest.raises(RulesError, match="default = 'drop'"):
        read_rules(file)


def test_a_malformed_rule_in_python():
    with pytest.raises(RulesError, match=r'(?s)from = "a".*has no .to.'):
        Rule("a")


EVERYTHING = r"""
default = "error"
[[rule]]
from = "params/encoder/layers_(\\d+)/kernel"
to = "params/encoder/layers/\\1/linear/kernel"
[[rule]]
from = ["params", "WeightNorm_0", "Dense_0/kernel/scale"]
to = "params/norm/scale"
[[rule]]
from = ["params/gru/ir", ["params", "gru/x", "iz"]]
to = "params/gru/dense_i"
concat = -1
sizes = [1, 2]
[[rule]]
from = "params/x/*"
to = ["params/x/*/a", "params/x/*/b"]
split = 0
transpose = [1, 0]
optional = true
[[rule]]
from = "opt/**"
drop = true
[[rule]]
to = "params/new"
new = {value = 0.0, shape = [2, 3], dtype = "float32"}
[[rule]]
to = "params/**/hn_bias"
new = "target"
[[rule]]
from = "params/**"
keep = true
cast = "bfloat16"
"""


def test_toml_there_and_back(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(EVERYTHING)
    rules = read_rules(file)
    assert (len(rules.rules), rules.default, rules.name) == (8, "error", str(file))
    file.write_text(rules.to_toml())
    again = read_rules(file)
    assert again.to_toml() == rules.to_toml()
    assert [rule.patterns for rule in again.rules] == [rule.patterns for rule in rules.rules]
    assert [rule.templates for rule in again.rules] == [rule.templates for rule in rules.rules]


# ---- the way back ------------------------------------------------------------------------------------------


def test_what_cannot_be_undone_is_listed():
    rules = Rules(
        [
            Rule("params/a", drop=True),
            Rule("params/b", "params/c"),
            Rule("params/d", "params/e", cast="bfloat16"),
            Rule("params/f", "params/g", reshape=[-1]),
            Rule(target="params/h", new="target"),
            Rule(r"params/\d", "params/n"),
            Rule([r"params/(\d)x", r"params/(.)y"], r"params/\1", concat=0),
        ]
    )
    with pytest.raises(RulesError, match="inverted: 6 problems") as caught:
        rules.inverse()
    assert [problem.rule for problem in caught.value.problems] == [1, 3, 4, 5, 6, 7]


def test_ambiguous_names_are_refused_on_the_way_back():
    """Both rules would take params/a/x on the way there, so params/b/x came from nowhere."""
    rules = Rules([Rule("params/a/x", "params/c/x", optional=True), Rule("params/a/**", "params/b/**")])
    text = problems_of(rules.inverse(), arrays(params__b__x=(1,), params__b__y=(1,)))
    assert "params/b/x itself when the rules is applied to what it becomes" in text
    assert "found: params/c/x: it can be read in several ways" in text


def test_the_way_back_to_what_the_rules_refuse():
    rules = Rules([Rule("params/a/x", "params/c/x", optional=True), Rule("params/a/**", "params/b/**")])
    text = problems_of(rules.inverse(), arrays(params__b__x=(1,)))
    assert "expected: what the rules can be applied to" in text
    assert "none that is left: rule 1, which comes before, takes params/a/x" in text


def test_names_that_trade_places():
    rules = Rules([Rule("params/a/**", "params/b/**"), Rule("params/b/**", "params/c/**")])
    values = arrays(params__b__x=(1,), params__c__x=(2,))
    b, c = values.values()
    assert_same(run(rules.inverse(), values), {at("params/a/x"): b, at("params/b/x"): c})


letters = st.text("abc", min_size=1, max_size=3)


@st.composite
def conversions(draw):
    """Random leaves, and rules that can be undone: each module of the tree has a rule of some kind of its own."""
    rules, values = [], {}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(["float32", "float16", "int32"]))

    def leaf(path, shape):
        values[path] = rng.integers(-100, 100, shape).astype(dtype)

    names = draw(st.lists(letters, min_size=1, max_size=5, unique=True))
    for number, name in enumerate(names):
        kind = draw(st.sampled_from(["rename", "keep", "none", "concat", "split", "stack", "unstack", "both", "parts"]))
        shape = tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
        axis, count = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.integers(2, 3))
        perm = draw(st.none() | st.permutations(range(len(shape)))) if kind in ("rename", "keep", "concat") else None
        old, new = f"params/{name}", f"params/{number}/{name[::-1]}"
        sizes = None
        if kind in ("rename", "keep", "none"):
            for deep in range(draw(st.integers(1, 2))):
                leaf((*at(old), *"xy"[:deep], "k"), shape)
        if kind == "rename":
            rules.append(Rule(rf"params/({name})/**", rf"params/{number}-\1/**", transpose=perm))
        elif kind == "keep":
            rules.append(Rule(f"{old}/**", keep=True, transpose=perm))
        elif kind == "concat":
            sizes = draw(st.none() | st.lists(st.integers(1, 3), min_size=count, max_size=count))
            for layer in range(2):
                for part in range(count):
                    part_shape = list(shape)
                    part_shape[axis] = sizes[part] if sizes else shape[axis]
                    leaf((*at(old), str(layer), f"p/{part}"), part_shape)
            parts = [["params", name, r"(\d)", f"p/{part}"] for part in range(count)]
            rules.append(Rule(parts, rf"{new}/\1", concat=axis, sizes=sizes, transpose=perm))
        elif kind == "split":
            sizes = draw(st.none() | st.lists(st.integers(1, 3), min_size=count, max_size=count))
            whole = list(shape)
            whole[axis] = sum(sizes) if sizes else count * shape[axis]
            leaf(at(f"{old}/k"), whole)
            rules.append(Rule(f"{old}/*", [f"{new}/{part}/*" for part in range(count)], split=axis, sizes=sizes))
        elif kind == "stack":
            for layer in draw(st.permutations(range(count))):
                leaf(at(f"{old}/l_{layer}/k"), shape)
                leaf(at(f"{old}/l_{layer}/b"), shape[:1])
            rules.append(Rule(rf"{old}/l_(\d+)/**", f"{new}/ls/**", stack=draw(st.sampled_from([0, 1, -1]))))
        elif kind == "unstack":
            leaf(at(f"{old}/k"), shape)
            rules.append(Rule(f"{old}/(.)", rf"{new}/l_{{i}}/\1", unstack=axis))
        elif kind == "both":
            for layer in range(count):
                leaf(at(f"{old}/{layer}/x"), shape)
                leaf(at(f"{old}/{layer}/y"), shape)
            rules.append(Rule([rf"{old}/(\d+)/x", rf"{old}/(\d+)/y"], f"{new}/xy", concat=axis, stack=0))
        else:
            whole = list(shape)
            whole[axis] *= count
            leaf(at(f"{old}/k"), (*whole, 2))
            axis %= len(shape)
            targets = [f"{new}/{{i}}/{part}" for part in range(count)]
            rules.append(Rule(f"{old}/k", targets, unstack=-1, split=axis))
    order = draw(st.permutations(list(values)))
    return Rules(rules), {path: values[path] for path in order}


@given(conversions())
def test_there_and_back_is_the_identity_to_the_bit(conversion):
    rules, values = conversion
    there = run(rules, values)
    assert sum(value.size for value in there.values()) == sum(value.size for value in values.values())
    back = run(rules.inverse(), there)
    assert back.keys() == values.keys()
    assert_trees_equal({path: back[path] for path in values}, values)
    assert_same(run(rules.inverse().inverse(), values), there)


@given(conversions())
def test_composed_expressions_read_regions(conversion):
    """The inverse over the expressions, not over values: regions of the composed ones are regions of the leaves."""
    rules, values = conversion
    made = rules.inverse().apply(rules.apply(reads(values)).made).made
    for path, op in made.items():
        region = tuple(slice(size // 2, size) for size in op.shape)
        found = op.value(lambda at, region: values[at] if region is None else values[at][region], region)
        assert_trees_equal(np.asarray(found), values[path][region])


def test_ten_thousand_leaves_and_a_hundred_rules():
    import time

    leaves = {}
    for block in range(100):
        for layer in range(100):
            location = ("params", f"enc{block}", f"layers_{layer}", "Dense_0", "kernel")
            leaves[location] = Read(location, (4, 4), "float32")
    rules = Rules([Rule(rf"params/enc{n}/layers_(\d+)/**", rf"params/enc/{n}/\1/**") for n in range(100)])
    start = time.perf_counter()
    made = rules.apply(leaves).made
    assert len(made) == 10_000
    assert time.perf_counter() - start < 10  # 0.3 s, on a machine that does nothing else
