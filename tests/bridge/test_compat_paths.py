"""Names without underscore in flax.nnx.bridge's files that its list has not: what public trainers reach for."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.nnx import bridge as flax_bridge

import bridge
import nnx_core as nnx
from tests.tolerance import assert_trees_equal

NAMES = ("linen_rngs_dict", "is_vanilla_variable", "get_col_name")
HOME = {"linen_rngs_dict": "wrappers", "is_vanilla_variable": "variables", "get_col_name": "variables"}
STREAMS = {
    "params": ("params",),
    "two": ("params", "dropout"),
    "with default": ("params", "default", "dropout"),
}


@pytest.mark.parametrize("name", NAMES)
def test_one_function_under_every_path(name):
    ours, theirs = getattr(bridge, name), getattr(getattr(flax_bridge, HOME[name]), name)
    assert ours is getattr(bridge.wrappers, name) is getattr(getattr(bridge, HOME[name]), name)
    assert name not in bridge.__all__
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]


def test_modules_under_the_names_that_wrappers_imports_them_by():
    assert (bridge.wrappers.bv, bridge.wrappers.bdg_module) == (bridge.variables, bridge.module)


@pytest.mark.parametrize("names", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("options", [{}, {"add_default": True}], ids=str)
def test_linen_rngs_dict(names, options):
    def keys_of(rngs_dict):
        class Model(nn.Module):
            @nn.compact
            def __call__(self):
                return rngs_dict(self, **options)

        keys, _ = Model().init_with_output({name: jax.random.key(i) for i, name in enumerate(names)})
        return keys

    assert_trees_equal(keys_of(bridge.linen_rngs_dict), keys_of(flax_bridge.wrappers.linen_rngs_dict))


VARIABLES = {
    "plain": lambda lib: lib.Param(1.0),
    "another kind": lambda lib: lib.BatchStat(1.0),
    "metadata": lambda lib: lib.Param(1.0, note=1),
    "metadata that is None": lambda lib: lib.Param(1.0, note=None),
    "a tag": lambda lib: lib.RngKey(jax.random.key(0), tag="a"),
}


@pytest.mark.parametrize("make", VARIABLES.values(), ids=VARIABLES)
def test_is_vanilla_variable(make):
    expected = flax_bridge.variables.is_vanilla_variable(make(flax_nnx))
    assert bridge.is_vanilla_variable(make(nnx)) is expected


def test_get_col_name():
    paths, _ = jax.tree_util.tree_flatten_with_path({"params": {"a": 1}, "batch_stats": {"b": {"c": 2}}})
    ours = [bridge.get_col_name(path) for path, _ in paths]
    assert ours == [flax_bridge.variables.get_col_name(path) for path, _ in paths] == ["batch_stats", "params"]


# ---- MODULE_CONTEXT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", [bridge, flax_bridge], ids=["bridge", "flax"])
def test_the_stack_of_modules_that_run(lib):
    seen = []

    def look():
        stack = lib.module.MODULE_CONTEXT.module_stack
        names = [None if entry is None else type(entry.module).__name__ for entry in stack]
        seen.append(list(dict.fromkeys(names)))  # one method may run inside another of the same module

    class Inner(lib.Module):
        @lib.compact
        def __call__(self, x):
            look()
            entry = lib.module.MODULE_CONTEXT.module_stack[-1]
            assert entry.module is self is lib.current_module()
            assert entry is lib.current_context()
            return x

    class Outer(lib.Module):
        @lib.compact
        def __call__(self, x):
            look()
            return Inner()(x)

    look()
    Outer().init(0, jnp.ones((1, 2)))
    look()
    assert [names for i, names in enumerate(seen) if names not in seen[:i]] == [
        [None],
        [None, "Outer"],
        [None, "Outer", "Inner"],
    ]
    assert seen[-1] == [None]


def test_the_stack_can_be_written():
    stack = bridge.module.MODULE_CONTEXT.module_stack
    module = bridge.Module()
    entry = bridge.module.ModuleStackEntry(module, "call")
    stack.append(entry)
    try:
        assert bridge.current_module() is module
        assert list(bridge.module.MODULE_CONTEXT.module_stack) == [None, entry]
        stack[-1] = None  # what flax.nnx.bridge puts there where Linen takes over
        assert bridge.current_context() is None
    finally:
        stack.pop()
    assert bridge.current_module() is None
    assert repr(bridge.module.MODULE_CONTEXT) == "ModuleContext(module_stack=[None])"
