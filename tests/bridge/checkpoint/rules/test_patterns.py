"""Patterns and templates: what they match, and their inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint.rules.patterns import Pattern, PatternError, Template, escape, escape_template, invert
from tests.support.rule_cases import at


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
