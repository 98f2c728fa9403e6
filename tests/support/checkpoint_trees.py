"""Checkpoints in memory, for the tests of plans: the tree that a file would hold, without the file."""

import json

import jax

from bridge.checkpoint.plan.plan import make_plan
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.from_objects import Live, of_object

EMPTY = {"None": None, "Dict": {}, "List": [], "Tuple": ()}


def converted(tree, to, *, metadata=None, known=None, **options):
    """(tree, plan, metadata) of a conversion; metadata as JSON would give it back.

    `tree` is what Orbax gives back, or a live object. Each leaf has the shape and dtype that the plan told.
    """
    live = tree if isinstance(tree, Live) else of_object(tree)
    plan = make_plan(live.tree, to=to, metadata=metadata, known=known, **options)
    made = {path: op.value(lambda at, region: read(live, at, region)) for path, op in plan.made.items()}
    for path, op in plan.made.items():
        assert layout.describe(made[path]) == (op.shape, op.dtype), path
        leaf = plan.target.leaves[path]
        assert (leaf.shape, leaf.dtype) == (op.shape, op.dtype), path
    read_paths = {path for op in plan.made.values() for path in op.sources()}
    assert read_paths | plan.dropped.keys() == live.tree.leaves.keys()
    leaves = {**made, **{path: EMPTY[kind] for path, kind in plan.target.empty.items()}}
    return layout.nest(leaves, plan.target.sequences), plan, json.loads(json.dumps(plan.metadata()))


def read(live, at, region):
    return live.values[at] if region is None else live.values[at][region]


def on_disk(thing):
    """A live object as Orbax gives it back: dicts and lists of arrays, None for what is empty."""
    live = of_object(thing)
    leaves = {**live.values, **{path: EMPTY[kind] for path, kind in live.tree.empty.items()}}
    return layout.nest(leaves, live.tree.sequences)


def clean(plan):
    """Nothing lost, nothing to warn of."""
    return not plan.lost and not plan.warnings


def same_objects(actual, expected):
    """Whether two trees of one structure have the very same leaves: nothing was copied."""
    ours, theirs = jax.tree.flatten(actual), jax.tree.flatten(expected)
    assert ours[1] == theirs[1]
    return all(a is b for a, b in zip(ours[0], theirs[0], strict=True))


def row_rules(row):
    """The rules of a row of `tests.layers`: Linen's locations, fused where the row says so, -> those of nnx_core."""
    rules = []
    for path, names in row.params.items():
        parts = [names] if isinstance(names, str) else list(names)
        linen = [[key.replace("|", "/") for key in name.split("/")] for name in parts]
        target = [linen[0][0], *path.split("/")]
        source = [[escaped(key) for key in keys] for keys in linen]
        rules.append(Rule(source[0], target) if len(source) == 1 else Rule(source, target, concat=-1))
    return Rules(rules, default="error")


def escaped(key):
    return "".join(f"\\{char}" if char in r"\.^$*+?{}[]|()" else char for char in key)
