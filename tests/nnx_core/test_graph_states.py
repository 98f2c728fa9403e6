"""GraphState, GraphDef.apply, State beside dicts, and properties that only ever raise AttributeError."""

import copy
import pickle
import typing

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.oracle import same
from tests.tolerance import assert_trees_equal


def linear(lib):
    return lib.Linear(2, 3, rngs=lib.Rngs(0))


# ---- GraphState --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`flax.nnx.State` will be deprecated:DeprecationWarning")  # flax's
def test_a_graph_state_has_the_attributes_and_key_paths_of_its_state():
    def program(lib):
        state = lib.unpack(lib.Sequential(linear(lib), linear(lib)))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        return state.layers[0].kernel, paths, list(state.flat_state().paths), state == state

    same(program)


def test_a_graph_state_is_written_by_attribute():
    def program(lib):
        state = lib.unpack(linear(lib))
        state.bias = lib.Param(jnp.ones(3))
        return lib.merge(state).bias

    same(program)


def test_a_graph_state_survives_what_states_survive():
    state = nnx.unpack(nnx.Sequential(linear(nnx), linear(nnx)))
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert type(doubled) is nnx.GraphState
    assert_trees_equal(nnx.merge(doubled).layers[1].kernel[...], 2 * state.layers[1].kernel[...])
    for twin in (copy.copy(state), copy.deepcopy(state), jax.jit(lambda s: s)(state)):
        assert_trees_equal(nnx.to_pure_dict(twin), nnx.to_pure_dict(state))
        assert type(nnx.merge(twin)) is nnx.Sequential
    small = pickle.loads(pickle.dumps(nnx.unpack(nnx.Dict(a=nnx.Param(jnp.ones(2))))))
    assert_trees_equal(nnx.merge(small).a[...], jnp.ones(2))
    del state.layers
    assert not state
    with pytest.raises(AttributeError, match="State has no attribute or key 'layers'"):
        state.layers  # noqa: B018


def test_a_graph_state_of_a_lone_variable():
    state = nnx.unpack(nnx.Param(jnp.ones(2)))
    assert_trees_equal(nnx.merge(jax.tree.map(lambda x: x + 1, state))[...], jnp.full(2, 2.0))


# ---- GraphDef ----------------------------------------------------------------------------------------------------


class Counter(nnx.Module):
    def __init__(self):
        self.count = nnx.Variable(jnp.zeros(()))


def test_apply():
    def program(lib):
        class Counter(lib.Module):
            def __init__(self):
                self.count = lib.Variable(jnp.zeros(()))
                self.layers = [] if lib is nnx else lib.List()
                self.linear = linear(lib)

            def increase(self, by):
                self.count[...] += by
                return self.count * 2

        graphdef, params, rest = lib.split(Counter(), lib.Param, ...)
        out, (new_graphdef, state) = graphdef.apply(params, rest).increase(3)
        y, (_, after) = graphdef.apply(params, rest).linear(jnp.ones((1, 2)))
        return out, new_graphdef == graphdef, state["count"], y, sorted(after)

    same(program)


def test_apply_does_not_write_to_the_states():
    # flax's does: here `merge` copies outside of a transform (REQUIREMENTS row 66)
    graphdef, state = nnx.split({"bias": nnx.Variable(jnp.zeros(2)), "norm": nnx.BatchNorm(2, rngs=nnx.Rngs(0))})
    before = nnx.to_pure_dict(state)
    _, (_, after) = graphdef.apply(state)["norm"](jnp.ones((4, 2)) * 3)
    assert_trees_equal(nnx.to_pure_dict(state), before)
    assert float(after["norm"]["mean"][0]) != 0


def test_pure_state_of_a_model():
    for lib in (nnx, flax.nnx):
        graphdef, state = typing.get_args(lib.PureState[Counter])
        assert typing.get_origin(graphdef) is lib.GraphDef
        assert typing.get_args(graphdef) == (Counter,)
        assert state is lib.State


# ---- States and dicts --------------------------------------------------------------------------------------------


def test_a_state_equals_a_dict_of_the_same():
    def program(lib):
        state = lib.State({"a": 1, "b": {"c": 2}})
        others = [{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, {"a": 1}, {}, None, 3, "a"]
        return [state == x for x in others] + [x == state for x in others] + [state != x for x in others]

    same(program)
    same(lambda lib: (lib.State({}) == {}, lib.State({}) == {}))


def test_arrays_in_a_state_are_compared_by_value():
    assert nnx.State({"a": jnp.ones(2)}) == {"a": jnp.ones(2)}
    assert nnx.State({"a": jnp.ones(2)}) != {"a": jnp.zeros(2)}


@pytest.mark.parametrize("as_state", [dict, nnx.State])
def test_digit_strings_stand_for_indices(as_state):
    # what Orbax restores without a target
    model = nnx.Sequential(linear(nnx), linear(nnx))
    graphdef, state = nnx.split(model)
    values = {str(i): jax.tree.map(lambda x: x + 1, layer) for i, layer in nnx.to_pure_dict(state)["layers"].items()}
    restored = as_state({"layers": values})
    merged = nnx.merge(graphdef, restored)
    assert_trees_equal(merged.layers[1].kernel[...], model.layers[1].kernel[...] + 1)
    nnx.update(model, restored)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(merged)))


# ---- properties --------------------------------------------------------------------------------------------------

INSTANCES = {
    "Param": lambda: nnx.Param(jnp.ones(1)),
    "Variable of None": lambda: nnx.Variable(None),
    "Variable of a dict": lambda: nnx.Variable({}),
    "Variable of a string": lambda: nnx.Variable("a"),
    "Variable in a Ref": lambda: nnx.Variable(jnp.ones(1), ref=True),
    "abstract Variable": lambda: nnx.Variable(jax.ShapeDtypeStruct((1,), "float32")),
    "empty Variable": lambda: nnx.Param.__new__(nnx.Param),
    "VariableMetadata": lambda: nnx.VariableMetadata(1),
    "Rngs": lambda: nnx.Rngs(0),
    "RngStream": lambda: nnx.RngStream(0, tag="a"),
    "State": lambda: nnx.State({}),
    "FlatState": lambda: nnx.to_flat_state(nnx.State({})),
    "GraphDef": lambda: nnx.graphdef(linear(nnx)),
    "GraphState": lambda: nnx.unpack(linear(nnx)),
    "List": lambda: nnx.List([]),
    "Dict": lambda: nnx.Dict(),
    "Sequential": lambda: nnx.Sequential(),
    "Linear": lambda: linear(nnx),
    "Module": lambda: nnx.Module(),
}


@pytest.mark.parametrize("make", INSTANCES.values(), ids=INSTANCES)
def test_no_property_raises_anything_but_attribute_error(make):
    x = make()
    for name in dir(type(x)):
        if name != "__abstractmethods__":
            hasattr(x, name)  # raises what is no AttributeError


@pytest.mark.filterwarnings("ignore:'sharding_names' is deprecated:DeprecationWarning")  # flax's
def test_axis_names_of_a_variable_without_names():
    same(lambda lib: lib.Param(jnp.ones(1)).sharding_names)


def test_a_property_with_a_setter_is_set_through_it():
    def program(lib):
        class Scaled(lib.Module):
            def __init__(self):
                self.stored = lib.Param(jnp.ones(2))
                self.scale = jnp.zeros(2)

            @property
            def scale(self):
                return self.stored * 2

            @scale.setter
            def scale(self, value):
                self.stored.set_value(value / 2)

        m = Scaled()
        m.scale = jnp.full(2, 5.0)
        lib.jit(lambda m: setattr(m, "scale", m.scale + 1))(m)
        return m, m.scale, sorted(lib.state(m))

    same(program)


def test_a_property_without_a_setter_is_not_set():
    class Fixed(nnx.Module):
        @property
        def size(self):
            return 1

    with pytest.raises(AttributeError, match="no setter"):
        Fixed().size = 2
