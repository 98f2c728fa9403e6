"""Law 6 through the wrappers: whatever Linen allows to be called, boxed or nested, ToNNX and ToLinen carry.

The trees come from real Linen modules, drawn by hypothesis; the trees alone are in test_mapping.py.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import nnx_core as nnx
from bridge import (
    NNXMeta,
    ToNNX,
    linen_vars_to_nnx_attrs,
    load_variables,
    nnx_attrs_to_linen_vars,
    to_linen,
    variables_of,
)
from bridge.variables.mapping import leaves
from tests.tolerance import assert_trees_equal

KEY = jax.random.key(0)
X = jnp.asarray(np.arange(6, dtype="float32").reshape(2, 3))

# ---- Linen modules with any names --------------------------------------------------------------------------

METHODS = (
    "module", "rngs", "train", "eval", "sow", "perturb", "set_attributes", "lazy_init", "init", "apply",
    "__call__", "variables", "scope", "name", "parent", "bind", "clone", "items", "keys", "get", "update",
    "_nnx_variables", "_nnx_wrapped", "to_nnx__module", "__dict__", "__class__", "self", "method", "mutable",
)  # fmt: skip
SHAPES = ("a/b", "a.b", "/", ".", "0", "12", "-1", "w@ema", "@", "w@", "value", "é", " ", "kernel")
COLLECTIONS = ("params", "batch_stats", "ema", "cache", "a@b", "a/b", "train")
BOXES = {
    "plain": lambda f: f,
    "partitioned": lambda f: nn.with_partitioning(f, ("a",)),
    "logical": lambda f: nn.with_logical_partitioning(f, ("a",), rules=(("a", "x"),)),
    "nnx": lambda f: lambda *args: NNXMeta(nnx.Param, f(*args), {"out_sharding": ("a",), "unit": "m"}),
}


class Hostile(nn.Module):
    """Variables and submodules under the names of `tree`: ((collection, name, box), ...), ((name, tree), ...)."""

    tree: Any
    field: Any = None

    @nn.compact
    def __call__(self, x):
        entries, children = self.tree
        for collection, name, box in entries:
            x = x * 0.5 + self.read(collection, name, BOXES[box])
        for name, tree in children:
            x = Hostile(tree, name=name)(x) + 1
        return x

    def read(self, collection, name, box):
        if collection == "params":
            return self.param(name, box(nn.initializers.normal(1.0)), (3,))
        variable = self.variable(collection, name, box(lambda: jnp.full(3, 2.0)))
        value = variable.value
        if self.is_mutable_collection(collection) and not self.is_initializing():
            variable.value = value + 1
        return value


names = st.sampled_from(METHODS + SHAPES)
one_entry = st.tuples(st.sampled_from(COLLECTIONS), names, st.sampled_from(list(BOXES)))


@st.composite
def linen_trees(draw, depth=2):
    """Linen forbids one name for a variable and a submodule; everything else goes."""
    entries = draw(st.lists(one_entry, max_size=4, unique_by=lambda entry: entry[:2]))
    used = {name for _, name, _ in entries}
    inner = draw(st.lists(names.filter(lambda name: name not in used), max_size=2, unique=True)) if depth else []
    return tuple(entries), tuple((name, draw(linen_trees(depth - 1))) for name in inner)


FIELDS = (None, [1, {"a": [2]}], (1, (2, [3])), {"b": {"c": 1}, "train": 2}, FrozenDict({"d": [1]}), {1: "x"})
few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
EVERY_METHOD = tuple(("params", name, "plain") for name in METHODS), tuple((name, ((), ())) for name in SHAPES)
TWICE = tuple((collection, "w", box) for collection, box in zip(COLLECTIONS, [*BOXES] * 2, strict=False)), ()


def writable(variables):
    return [collection for collection in variables if collection != "params"]


def linen_step(module, variables):
    return module.apply(variables, X, mutable=writable(variables))


def wrapped(module, variables):
    model = ToNNX(module, rngs=nnx.Rngs(1))
    if variables:
        model.lazy_init(X)
    report = load_variables(model, variables)
    assert report.complete
    return model


def form(tree: Any) -> Any:
    """What a tree is made of, by identity: to see that nobody has touched it."""
    if isinstance(tree, Mapping):
        return type(tree), [(key, form(child)) for key, child in tree.items()]
    return (type(tree), {k: id(v) for k, v in vars(tree).items()}) if hasattr(tree, "__dict__") else id(tree)


@pytest.mark.slow
@few
@given(linen_trees(), st.sampled_from(FIELDS))
@example(EVERY_METHOD, None)
@example(TWICE, [1])
@example(((), ()), {"a": 1})
def test_law6_rows_16_17_18_variables_to_attributes_to_variables(tree, field):
    """Through a ToNNX: the same tree comes out, apply equals Linen's, and what was passed in is as it was."""
    module = Hostile(tree, field)
    variables = module.init(KEY, X)
    before = form(variables)
    model = wrapped(module, variables)
    assert_trees_equal(variables_of(model), variables)
    out, updates = linen_step(module, variables)
    assert_trees_equal(model(X) if variables else module.apply({}, X), out)
    assert_trees_equal(variables_of(model), {**variables, **updates})
    assert form(variables) == before


@few
@given(linen_trees())
@example(EVERY_METHOD)
@example(TWICE)
def test_law6_rows_17_18_through_split_merge_clone_and_state(tree):
    module = Hostile(tree)
    variables = module.init(KEY, X)
    model = wrapped(module, variables)
    for copy in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert_trees_equal(variables_of(copy), variables)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    assert_trees_equal(nnx_attrs_to_linen_vars(state), variables)
    assert_trees_equal(nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(variables)), variables)


@pytest.mark.slow
@few
@given(linen_trees())
@example(EVERY_METHOD)
@example(TWICE)
def test_law6_rows_17_18_through_linen_in_nnx_in_linen(tree):
    class Owner(nnx.Module):
        def __init__(self, rngs):
            self.inner = ToNNX(Hostile(tree), rngs=rngs)

        def __call__(self, x):
            return self.inner(x)

    module = Hostile(tree)
    variables = module.init(KEY, X)
    outer = to_linen(Owner)
    inside = {collection: {"inner": tree} for collection, tree in variables.items()}
    assert shapes(outer.init(KEY, X)) == shapes(inside)
    out, updates = linen_step(module, variables)
    assert_trees_equal(outer.apply(inside, X, mutable=writable(variables))[0], out)
    found = outer.apply(inside, X, mutable=writable(variables))[1]
    assert_trees_equal({collection: tree["inner"] for collection, tree in found.items()}, updates)


def shapes(tree):
    """Order-free: paths, boxes and shapes."""
    return {at: (type(x), jax.tree.map(jnp.shape, meta.unbox(x))) for at, x in leaves(tree)}


@pytest.mark.parametrize("name", METHODS)
def test_row17_a_name_that_is_a_method_leaves_the_method_alone(name):
    """For a parameter, a variable and a submodule: methods of the wrapper, and jit, work as for any other name."""
    for tree in ((("params", name, "plain"),), ()), ((("ema", name, "plain"),), ()), ((), ((name, TWICE),)):
        module = Hostile(tree)
        variables = module.init(KEY, X)
        model = wrapped(module, variables)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no flag to set
            nnx.Module.train(model)
            nnx.Module.eval(model)
        model.note = 3
        assert isinstance(model.rngs, nnx.Rngs)
        assert_trees_equal(variables_of(model), variables)
        assert_trees_equal(model(X, mutable=False), module.apply(variables, X))
        assert (model.note, model.module) == (3, module)


def test_row17_all_those_names_at_once_under_jit_and_grad():
    module = Hostile((EVERY_METHOD[0], ()))
    variables = module.init(KEY, X)
    model = wrapped(module, variables)
    assert_trees_equal(nnx.jit(lambda m, x: m(x))(model, X), jax.jit(module.apply)(variables, X))
    grads = nnx.grad(lambda m: m(X).sum())(model)
    wanted = jax.grad(lambda v: module.apply(v, X).sum())(variables)
    assert_trees_equal(nnx_attrs_to_linen_vars(grads), wanted)


# ---- mappings of any kind ----------------------------------------------------------------------------------


class Whatever(Mapping):
    """A Mapping that is neither dict nor FrozenDict, and cannot be written to."""

    def __init__(self, content):
        self._content = {k: Whatever(v) if isinstance(v, Mapping) else v for k, v in content.items()}

    def __getitem__(self, key):
        return self._content[key]

    def __iter__(self):
        return iter(self._content)

    def __len__(self):
        return len(self._content)


KINDS = {"FrozenDict": freeze, "any Mapping": Whatever}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "tree", [EVERY_METHOD, TWICE, ((), (("a", TWICE), ("b", TWICE)))], ids=["names", "two", "deep"]
)
def test_row31_any_mapping_goes_in(kind, tree):
    module = Hostile(tree)
    variables = module.init(KEY, X)
    given = kind(variables)
    before = form(given)
    assert_trees_equal(nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(given)), variables)
    model = wrapped(module, given)
    assert_trees_equal(variables_of(model), variables)
    assert_trees_equal(model(X), linen_step(module, variables)[0])
    assert form(given) == before


def test_row31_frozen_variables_in_to_linen():
    model = to_linen(nnx.BatchNorm, 3)
    variables = model.init(KEY, X)
    out, updates = model.apply(variables, X, mutable=["batch_stats"])
    again = model.apply(freeze(variables), X, mutable=["batch_stats"])
    assert_trees_equal(again[0], out)
    assert_trees_equal(meta.unbox(dict(again[1])), dict(updates))


def test_empty_collections_and_levels_are_no_variables():
    module = Hostile(TWICE)
    variables = module.init(KEY, X)
    empty = {**variables, "nothing": {}, "params": {**variables["params"], "empty": {}}}
    assert_trees_equal(nnx_attrs_to_linen_vars(linen_vars_to_nnx_attrs(empty)), empty)
    model = ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    load_variables(model, {**variables, "nothing": {}})
    assert_trees_equal(variables_of(model), variables)


# ---- NNX modules with any names, in Linen ------------------------------------------------------------------


def nnx_with(names, keys):
    """An NNX class with Params under attribute `names`, and under `keys` of a Dict and of a List."""

    class Model(nnx.Module):
        def __init__(self):
            for i, name in enumerate(names):
                setattr(self, name, nnx.Param(jnp.full(3, float(i + 1))))
            self.table = nnx.Dict({key: nnx.BatchStat(jnp.full(3, float(i))) for i, key in enumerate(keys)})
            self.items_ = nnx.List([nnx.Cache(jnp.zeros(3)), nnx.Dict({"0": nnx.Param(jnp.ones(3))})])

        def __call__(self, x):
            for name in names:
                x = x * 0.5 + vars(self)[name].get_value()
            for key in keys:
                self.table[key].set_value(self.table[key].get_value() + 1)
                x = x + self.table[key].get_value()
            return x + self.items_[1]["0"].get_value()

    return Model


OF_LINEN = ("name", "parent", "scope", "variables", "init", "apply", "bind", "clone", "module_class", "args", "kwargs")


@few
@given(
    st.lists(st.sampled_from((*OF_LINEN, "train", "eval", "sow", "nnx_class", "w")), max_size=5, unique=True),
    st.lists(st.sampled_from((*SHAPES, *OF_LINEN)), max_size=4, unique=True),
)
@example(list(OF_LINEN), list(SHAPES))
def test_law6_rows_17_21_nnx_names_in_linen_and_back(names, keys):
    """Keys are strings in Linen; the numbers and the updates are those of the NNX module."""
    kind = nnx_with(names, keys)
    native, model = kind(), to_linen(kind)
    variables = model.init(KEY, X)
    assert set(variables["params"]) == {*names, "items_"}
    assert set(variables["params"]["items_"]) == {"1"}
    assert set(variables.get("batch_stats", {}).get("table", {})) == set(keys)
    out, updates = model.apply(variables, X, mutable=["batch_stats"])
    assert_trees_equal(out, native(X))
    assert_trees_equal({**variables, **updates}, variables_of(native))
    back = kind()
    load_variables(back, {**variables, **updates})
    assert_trees_equal(variables_of(back), variables_of(native))
