"""Module.partial_init and with_rngs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core import modes
from nnx_core._errors import SharedReferenceError, StateMismatchError
from nnx_core.rngs import RngRuleError, with_rngs
from tests.strategies import Tied, portrait
from tests.tolerance import assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


class Model(nnx.Module):
    def __init__(self, n, *, init, rngs):
        self.a = nnx.Linear(2, n, kernel_init=init, rngs=rngs)
        self.b = nnx.Linear(n, 2, rngs=rngs)
        self.tied = self.a
        self.table = jnp.arange(3.0)
        self.n = n


def counted():
    """An initializer that counts how often it is computed, not how often it is traced."""
    computed = []

    def init(key, shape, dtype=jnp.float32):
        def numbers():
            computed.append(shape)
            return np.ones(shape, dtype)

        return jax.pure_callback(numbers, jax.ShapeDtypeStruct(shape, dtype))

    return computed, init


def whole(n=3):
    return nnx.state(Model(n, init=nnx.initializers.ones, rngs=nnx.Rngs(1)))


def test_equals_the_constructor_and_an_update():
    state = whole()
    twin = Model(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    nnx.update(twin, state)
    model = Model.partial_init(state)(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    assert portrait(model) == portrait(twin)
    assert model.tied is model.a


def test_a_part_of_the_state():
    state = nnx.State({"a": {"kernel": nnx.Param(jnp.full((2, 3), 7.0), note=1)}})
    twin = Model(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    nnx.update(twin, state)
    model = Model.partial_init(state)(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    assert portrait(model) == portrait(twin)
    assert model.a.kernel.note == 1
    two = Model.partial_init({"a": {"kernel": jnp.ones((2, 3))}}, {"table": jnp.zeros(3)})
    assert_trees_equal(two(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0)).table, jnp.zeros(3))


def test_no_initializer_runs_for_what_is_given():
    computed, init = counted()
    rngs = nnx.Rngs(0)
    Model.partial_init(whole())(3, init=init, rngs=rngs)
    assert computed == []
    assert int(rngs.params.count[...]) == 4  # the keys are drawn all the same: the rest gets the numbers it gets
    Model.partial_init(nnx.State({"b": whole()["b"]}))(3, init=init, rngs=rngs)
    assert computed == [(2, 3)]


@pytest.mark.usefixtures("no_compile_cache")  # a program from the cache need not have a text
def test_the_compiled_constructor_draws_nothing():
    state = whole()

    def build(state, key):
        return nnx.state(Model.partial_init(state)(3, init=nnx.initializers.normal(), rngs=nnx.Rngs(key)))

    text = jax.jit(build).lower(state, jax.random.key(0)).compile().as_text()
    assert "erf" not in text  # a normal initializer ends in the inverse error function
    partial = nnx.State({"b": state["b"]})
    assert "erf" in jax.jit(build).lower(partial, jax.random.key(0)).compile().as_text()


def test_abstract_values_may_be_given():
    abstract = nnx.state(nnx.eval_shape(lambda: Model(3, init=nnx.initializers.ones, rngs=nnx.Rngs(0))))
    model = Model.partial_init(abstract)(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    assert isinstance(model.a.kernel.get_value(), jax.ShapeDtypeStruct)


def test_arguments_reach_the_constructor_as_they_are():
    seen = []

    class Takes(nnx.Module):
        def __init__(self, n, table):
            seen.append((type(n), type(table)))
            self.w = nnx.Param(jnp.zeros((n, len(table))))

    Takes.partial_init(nnx.State({}))(2, np.ones(3))
    assert seen == [(int, np.ndarray)]
    assert Takes.partial_init(nnx.State({})).__name__ == "Takes"


def test_what_the_module_has_not():
    with pytest.raises(StateMismatchError, match=r"(?s)not in the graph.*nope"):
        Model.partial_init(nnx.State({"nope": 1}))(3, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))


# ---- with_rngs -----------------------------------------------------------------------------------------------------


def streams(rngs):
    return {name: (s.key[...], s.count[...]) for name, s in rngs.items()}


RULES = {
    "split": {"split": 4},
    "split shape": {"split": (2, 3)},
    "split by filter": {"split": {"params": 4}},
    "split and fork": {"split": {"params": 4}, "fork": "dropout"},
    "fork several": {"fork": ("params", "dropout")},
    "broadcast": {"broadcast": 3},
    "broadcast by filter": {"broadcast": {"params": (2, 2)}, "fork": ...},
    "split before broadcast": {"split": {"params": 2}, "broadcast": {...: 5}},
    "broadcast before fork": {"fork": ..., "broadcast": {"params": 2}},
    "only": {"split": 2, "only": "params"},
    "split everything before what fork names": {"split": 2, "fork": "params"},
    "broadcast everything but what split names": {"split": {"params": 3}, "broadcast": 2},
    "two catch-alls": {"split": 2, "broadcast": 3, "fork": ...},
    "the first filter of one kind": {"split": {"params": 3, ("default", "params"): 2}},
    "one kind names all": {"split": {...: 2, "params": 3}, "fork": "params"},
    "only the one that is named once": {"split": {"params": 2}, "fork": "params", "only": "dropout"},
    "nothing": {},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_with_rngs_as_flax_nnx(rule):
    ours, theirs = nnx.Rngs(0, params=1, dropout=2), flax_nnx.Rngs(0, params=1, dropout=2)
    new = with_rngs(ours, **rule)
    their_new = flax_nnx.with_rngs(theirs, **rule, graph=True, graph_updates=False)
    assert_trees_equal(streams(new), streams(their_new))
    assert_trees_equal(streams(ours), streams(theirs))


CLASHES = {
    "split and fork": {"split": {"params": 2}, "fork": "params"},
    "split and broadcast": {"split": {"params": 2}, "broadcast": {"params": 3}},
    "broadcast and fork": {"broadcast": {"params": 2}, "fork": ("params", "dropout")},
    "one that other filters have": {"fork": ("dropout", "params"), "broadcast": {("dropout", "x"): 3}},
}


@pytest.mark.parametrize("rule", CLASHES.values(), ids=CLASHES)
def test_two_rules_for_one_stream(rule):
    ours, theirs = nnx.Rngs(0, params=1, dropout=2), flax_nnx.Rngs(0, params=1, dropout=2)
    before = streams(ours)
    with pytest.raises(ValueError, match="matches multiple rules"):
        flax_nnx.with_rngs(theirs, **rule, graph=True, graph_updates=False)
    text = r"(?s)^RngStream at path \('(params|dropout)',\) .*one of split, broadcast and fork\n.*found    .*Narrow"
    with pytest.raises(RngRuleError, match=text):
        with_rngs(ours, **rule)
    assert_trees_equal(streams(ours), before)


def test_with_rngs_copies_and_shares():
    model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))])
    model.append(model[1])
    new = with_rngs(model, split=2)
    assert new[1] is new[2] is not model[1]
    assert new[0].kernel is model[0].kernel
    assert new[1].rngs.key.shape == (2,)
    assert model[1].rngs.key.shape == ()


def test_with_rngs_around_a_call():
    rngs = nnx.Rngs(0)
    assert with_rngs(split=3)(lambda r: r.default.key.shape)(rngs) == (3,)
    assert with_rngs(lambda *, r: r.default.key.shape, split=3)(r=rngs) == (3,)
    assert rngs.default.key.shape == ()
    assert int(rngs.default.count[...]) == 2


def test_with_rngs_may_forbid_sharing():
    with pytest.raises(SharedReferenceError, match="graph=False"):
        with_rngs(Tied(), split=2, graph=False)
    with modes.set_graph_mode(False), pytest.raises(SharedReferenceError, match="graph=False"):
        with_rngs(Tied(), split=2)
