"""The private paths of flax.nnx that real clients reach for (PUBLIC_NAMES.md)."""

import copy
import importlib

import jax
import pytest

import nnx_core as nnx
from nnx_core import _compat_paths as paths
from nnx_core._late_names import late_names

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")

WANTED = """
graph.iter_graph graph.GraphDef graph.NodeDef graph.split graph.merge graph.flatten graph.unflatten graph.RefMap
graph.UpdateContext graph.to_tree graph.State graph.Variable graphlib.iter_graph graphlib.set_graph_mode
statelib.State statelib.filter_state statelib.merge_state statelib.FlatState
filterlib.Not filterlib.Filter filterlib.PathParts filterlib.to_predicate filterlib.filters_to_predicates
variablelib.Variable variablelib.variable_type_from_name variablelib.variable_name_from_type variablelib.VariableState
variablelib.Param variablelib.with_metadata variablelib.var_defaults
rnglib.Rngs rnglib.RngStream rnglib.with_rngs module.Module module.view module.capture module.with_attributes
tracers.TraceState tracers.current_jax_trace spmd.get_var_pspec spmd.get_partition_spec
pytreelib.PytreeState pytreelib.Pytree pytreelib.check_pytree object.ObjectState object.Object object.data
training.metrics training.ema metrics.Average optimizer.Optimizer helpers.TrainState
compat.jit compat.split deprecations.deprecated proxy_caller.call
helpers.List helpers.Dict helpers.Sequential helpers.Rngs extract.to_tree extract.from_tree
""".split()


@pytest.mark.parametrize("name", WANTED)
def test_path_is_there(name):
    room, attribute = name.split(".")
    assert hasattr(getattr(paths, room), attribute)
    assert hasattr(importlib.import_module(f"nnx_core.{room}"), attribute)


def test_they_are_the_rooms_own_objects():
    from nnx_core.graphlib import iter_graph
    from nnx_core.statelib import State
    from nnx_core.variablelib import Param

    assert (iter_graph, State, Param) == (nnx.iter_graph, nnx.State, nnx.Param)
    assert paths.VariableState is nnx.Variable
    assert paths.M.__name__ == "M"


@pytest.mark.parametrize("library", [nnx, flax_nnx])
def test_first_from(library):
    first_from = importlib.import_module(f"{library.__name__}.module").first_from
    assert first_from(None, False, True, error_msg="") is False
    with pytest.raises(ValueError, match=r"^say it$"):
        first_from(None, None, error_msg="say it")


def test_default_embed_init():
    from nnx_core.nn.linear import default_embed_init

    assert default_embed_init is nnx.initializers.default_embed_init


def test_trace_state_as_flax_nnx():
    for tracers in (paths.tracers, flax_nnx.tracers):
        here = tracers.TraceState()
        assert here.is_valid()
        assert here == tracers.TraceState()
        inside = []
        jax.jit(lambda x, here=here, inside=inside: (inside.append(here.is_valid()), x)[1])(1.0)
        assert inside == [False]
        assert copy.deepcopy(here) == here
        assert here.jax_trace == tracers.current_jax_trace()


def test_a_trace_state_may_be_given_to_a_variable():
    v = nnx.Param(1.0)
    object.__setattr__(v, "_trace_state", paths.TraceState())  # as Keras does
    v.set_value(2.0)
    assert v.get_value() == 2.0


def test_pytree_state_of_an_object():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    attributes = set(vars(layer))
    assert (layer._pytree__state.initializing, layer._pytree__state._initializing) == (False, False)
    assert layer._pytree__state.is_setup
    assert layer._pytree__state.trace_state.is_valid()
    object.__setattr__(layer, "_pytree__state", paths.PytreeState(True))  # as Keras does
    assert set(vars(layer)) == attributes
    assert paths.PytreeState() == paths.PytreeState() != paths.PytreeState(True)
    assert hash(paths.PytreeState()) == hash(paths.PytreeState())
    assert isinstance(nnx.Linear._pytree__state, paths._StateOfObject)


def test_a_deprecated_name_warns_and_calls():
    old = nnx.deprecations.deprecated(nnx.state)
    with pytest.warns(DeprecationWarning, match="call state"):
        assert list(old(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))) == ["bias", "kernel"]
    assert old.__name__ == "state"


def test_compat_is_the_one_mode():
    assert (nnx.compat.jit, nnx.compat.split, nnx.compat.view) == (nnx.jit, nnx.split, nnx.view)


def test_bridge_is_the_package_beside():
    import bridge

    assert nnx.bridge is nnx.wrappers is bridge
    with pytest.raises(AttributeError, match="no attribute 'brigde'"):
        nnx.brigde  # noqa: B018


def test_a_room_keeps_its_own_names_when_it_takes_more():
    own = {"split": 1}
    late_names(own)(split=2, merge=3)
    assert own == {"split": 1, "merge": 3}


def test_our_own_path_of_before():
    from nnx_core.transforms.differentials import NoRuleError, custom_vjp, jvp, vjp

    assert (custom_vjp, jvp, vjp) == (nnx.custom_vjp, nnx.jvp, nnx.vjp)
    assert nnx.transforms.differentials.vjp is vjp
    assert issubclass(NoRuleError, AttributeError)
