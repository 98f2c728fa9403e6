"""The way back: what rules made is taken apart to the last bit, or the inverse is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint.rules.apply import Rule, Rules, RulesError
from bridge.checkpoint.tree.ops import Read
from tests.support.rule_cases import arrays, assert_same, at, problems_of, reads, run
from tests.tolerance import assert_trees_equal


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
