"""Rules that cannot be used, in Python and in files: the error names the rule and says why."""

import re

import pytest

from bridge.checkpoint.rules.apply import Rule, Rules, RulesError, read_rules


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
