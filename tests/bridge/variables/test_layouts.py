"""The layouts against Linen itself: its own variables in, its own numbers out, and every error."""

from types import MappingProxyType

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from bridge._errors import VariablesMismatchError
from bridge.variables.layouts import Entry, Layout, LayoutError, layout_for, layout_of
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal


def new_rngs():
    return nnx.Rngs(0)


class LinenModel(linen.Module):
    """Every layer whose tree differs, and some that do not, named after attributes."""

    def setup(self):
        self.seq = linen.Sequential([linen.Dense(3), linen.relu, linen.Sequential([linen.Dense(3)])])
        self.blocks = [linen.Dense(3), linen.BatchNorm(use_running_average=True)]
        self.heads = {"a": linen.Dense(3), "b": [linen.Dense(3)]}
        self.both = linen.Bidirectional(linen.RNN(linen.GRUCell(4)), linen.RNN(linen.LSTMCell(4)))
        self.rnns = [linen.RNN(linen.SimpleCell(4)), linen.RNN(linen.MGUCell(4))]
        self.fused = linen.RNN(linen.OptimizedLSTMCell(4))
        self.plain = linen.RNN(linen.MGUCell(4, reset_gate=False))
        self.conv = linen.RNN(linen.ConvLSTMCell(2, (3,)))
        self.weight = linen.WeightNorm(linen.Dense(3))
        self.spectral = linen.SpectralNorm(linen.Dense(3))

    def __call__(self, x):
        for block in (self.seq, *self.blocks, self.heads["a"], self.heads["b"][0]):
            x = block(x)
        x = self.plain(self.fused(self.rnns[1](self.rnns[0](self.both(x)))))
        x = self.conv(x[..., None])
        return self.spectral(self.weight(x), update_stats=False)


class Model(nnx.Module):
    """The same in nnx_core."""

    def __init__(self, rngs):
        self.seq = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.relu, nnx.Sequential(nnx.Linear(3, 3, rngs=rngs)))
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, use_running_average=True, rngs=rngs)])
        self.heads = nnx.Dict(a=nnx.Linear(3, 3, rngs=rngs), b=nnx.List([nnx.Linear(3, 3, rngs=rngs)]))
        self.both = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)), nnx.RNN(nnx.LSTMCell(3, 4, keep_rngs=True, rngs=rngs))
        )
        self.rnns = [
            nnx.RNN(nnx.SimpleCell(8, 4, dtype=None, rngs=rngs)),
            nnx.RNN(nnx.MGUCell(4, 4, rngs=rngs)),
        ]
        self.fused = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))
        self.plain = nnx.RNN(nnx.MGUCell(4, 4, reset_gate=False, rngs=rngs))
        self.conv = nnx.RNN(nnx.ConvLSTMCell(1, 2, (3,), rngs=rngs))
        self.weight = nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(3, 3, rngs=rngs), update_stats=False, rngs=rngs)

    def __call__(self, x):
        for block in (self.seq, *self.blocks, self.heads["a"], self.heads["b"][0]):
            x = block(x)
        x = self.plain(self.fused(self.rnns[1](self.rnns[0](self.both(x)))))
        x = self.conv(x[..., None])
        return self.spectral(self.weight(x))


X = jnp.asarray(normal(1, 2, 3, 3))


@pytest.fixture(scope="module")
def linen_flat():
    """Linen's variables, with random contents."""
    shapes = flatten_dict(jax.eval_shape(LinenModel().init, jax.random.key(0), X))
    keys = jax.random.split(jax.random.key(2), len(shapes))
    return {at: jax.random.uniform(k, x.shape) for k, (at, x) in zip(keys, shapes.items(), strict=True)}


@pytest.fixture(scope="module")
def layout():
    return layout_for(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))


def flat_state(module):
    state = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    return {path: variable[...] for path, variable in state}


@pytest.mark.slow
def test_every_path_of_linen_and_of_the_module_has_its_place(layout, linen_flat):
    assert {at for entry in layout.entries for at in entry.linen} == set(linen_flat)
    assert {entry.nnx for entry in layout.entries} == set(flat_state(Model(nnx.Rngs(0))))


def test_variables_of_linen_give_its_numbers(layout, linen_flat):
    model = Model(nnx.Rngs(0))
    nnx.update(model, nnx.from_flat_state(layout.from_linen(linen_flat).items()))
    assert_trees_equal(flat_state(model), layout.from_linen(linen_flat))
    y = jax.jit(LinenModel().apply)(unflatten_dict(linen_flat), X)
    assert_trees_close(nnx.jit(lambda m, x: m(x))(model, X), y)


@pytest.mark.parametrize("kind", ["jax", "numpy", "abstract"])
def test_round_trips_are_exact(layout, linen_flat, kind):
    flat = {
        "jax": linen_flat,
        "numpy": {at: np.asarray(x).astype(jnp.bfloat16) for at, x in linen_flat.items()},
        "abstract": {at: jax.ShapeDtypeStruct(x.shape, x.dtype) for at, x in linen_flat.items()},
    }[kind]
    state = layout.from_linen(MappingProxyType(flat))
    assert {type(x) for x in state.values()} == {type(x) for x in flat.values()}
    back = layout.to_linen(state)
    assert sorted(back) == sorted(flat)
    if kind == "abstract":
        assert back == flat
        assert layout.from_linen(back) == state
    else:
        assert_trees_equal(unflatten_dict(back), unflatten_dict(flat))


def test_keys_may_be_strings(layout, linen_flat):
    state = layout.from_linen(linen_flat)
    strings = {tuple(map(str, path)): value for path, value in state.items()}
    assert strings.keys() != state.keys()
    assert_trees_equal(unflatten_dict(layout.to_linen(strings)), unflatten_dict(layout.to_linen(state)))


CELLS = [
    (nnx.LSTMCell, linen.LSTMCell, 2),
    (nnx.OptimizedLSTMCell, linen.OptimizedLSTMCell, 2),
    (nnx.GRUCell, linen.GRUCell, 1),
    (nnx.SimpleCell, linen.SimpleCell, 1),
    (nnx.MGUCell, linen.MGUCell, 1),
]


@pytest.mark.parametrize(("cls", "twin", "states"), CELLS, ids=lambda x: getattr(x, "__name__", None))
def test_layout_of_a_class(cls, twin, states):
    h = jnp.ones((2, 4))
    carry = h if states == 1 else (h, h)
    shapes = flatten_dict(jax.eval_shape(twin(4).init, jax.random.key(0), carry, X[0, :2]))
    layout = layout_of(cls)
    assert {at for entry in layout.entries for at in entry.linen} == set(shapes)
    cell = cls(3, 4, rngs=new_rngs())
    assert {at: x.shape for at, x in layout.to_linen(flat_state(cell)).items()} == {
        at: x.shape for at, x in shapes.items()
    }
    assert layout_for(cell).to_linen(flat_state(cell)).keys() == shapes.keys()


def test_layout_of_a_class_without_an_optional_parameter():
    cell = nnx.MGUCell(3, 4, reset_gate=False, rngs=new_rngs())
    there = layout_of(nnx.MGUCell).to_linen(flat_state(cell))
    assert ("params", "hn", "bias") not in there
    assert layout_of(nnx.MGUCell).from_linen(there).keys() == flat_state(cell).keys()


def test_classes_inherit_and_most_have_none():
    class Mine(nnx.LSTMCell):
        def __init__(self, *args, rngs, **options):
            super().__init__(*args, rngs=rngs, **options)
            self.extra = nnx.Param(jnp.ones(2))

    assert layout_of(Mine) is layout_of(nnx.LSTMCell)
    assert layout_of(nnx.Linear) is layout_of(nnx.RNN) is None
    entries = {entry.nnx: entry.linen for entry in layout_for(Mine(3, 4, rngs=new_rngs())).entries}
    assert entries["extra",] == (("params", "extra"),)
    assert entries["if_", "kernel"] == (("params", "if", "kernel"),)


def test_collections_follow_the_type_of_the_variable():
    class Frozen(nnx.Variable):
        pass

    cell = nnx.GRUCell(3, 4, rngs=new_rngs())
    cell.dense_h.kernel = Frozen(cell.dense_h.kernel[...])
    cell.counts = nnx.Dict(steps=nnx.BatchStat(jnp.zeros(())))
    entries = {entry.nnx: entry.linen for entry in layout_for(cell).entries}
    assert entries["dense_h", "kernel"][0] == ("Frozen", "hr", "kernel")
    assert entries["counts", "steps"] == (("batch_stats", "counts", "steps"),)


def test_a_shared_layer_is_there_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.b = self.a = nnx.GRUCell(4, 4, rngs=rngs)
            self.z = self.a.dense_i

    model = Tied(new_rngs())
    assert {entry.nnx for entry in layout_for(model).entries} == set(flat_state(model))


def test_scales_of_a_fused_kernel_are_those_of_its_gates():
    class Normed(linen.Module):
        def setup(self):
            self.norm = linen.WeightNorm(linen.OptimizedLSTMCell(4))

        def __call__(self, carry, x):
            return self.norm(carry, x)

    class NnxNormed(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.WeightNorm(nnx.OptimizedLSTMCell(3, 4, rngs=rngs), rngs=rngs)

    carry, x = (jnp.ones((2, 4)), jnp.ones((2, 4))), X[0, :2]
    variables = Normed().init(jax.random.key(0), carry, x)
    model = NnxNormed(new_rngs())
    state = layout_for(model).from_linen(flatten_dict(variables))
    nnx.update(model, nnx.from_flat_state(state.items()))
    assert_trees_close(model.norm(carry, x), Normed().apply(variables, carry, x))


# ---- flax.nnx ----


def test_flax_nnx_has_no_hn_bias():
    theirs = flax.nnx.RNN(flax.nnx.GRUCell(3, 4, rngs=flax.nnx.Rngs(0)))
    flat = {path: v[...] for path, v in flax.nnx.to_flat_state(flax.nnx.state(theirs, flax.nnx.Param))}
    ours = nnx.RNN(nnx.GRUCell(3, 4, bias_init=nnx.initializers.ones, rngs=new_rngs()))
    layout = layout_for(ours)
    with pytest.raises(VariablesMismatchError, match=r"(?s)1 missing.*cell/hn_bias"):
        layout.to_linen(flat)
    for values in (flat, {path: np.asarray(x) for path, x in flat.items()}, jax.eval_shape(lambda: flat)):
        full = layout.from_flax_nnx(values)
        assert (full["cell", "hn_bias"].shape, full["cell", "hn_bias"].dtype) == ((4,), jnp.float32)
        assert layout.from_flax_nnx(full) == full
    full = layout.from_flax_nnx(flat)
    assert layout.to_flax_nnx(full).keys() == flat.keys()
    nnx.update(ours, nnx.from_flat_state(full.items()))
    assert_trees_close(ours(X), theirs(X))


def test_a_bias_that_flax_nnx_has_no_place_for_is_refused():
    cell = nnx.GRUCell(3, 4, bias_init=nnx.initializers.ones, rngs=new_rngs())
    layout = layout_of(nnx.GRUCell)
    with pytest.raises(LayoutError, match=r"(?s)hn_bias.*expected zeros.*found    other values.*at zero"):
        layout.to_flax_nnx(flat_state(cell))
    with pytest.raises(LayoutError, match=r"(?s)hn_bias.*found    an abstract ShapeDtypeStruct"):
        layout.to_flax_nnx(jax.eval_shape(lambda: flat_state(cell)))
    with pytest.raises(VariablesMismatchError, match=r"(?s)flax.nnx state and the layout.*dense_h/kernel"):
        layout.from_flax_nnx({})


# ---- errors ----


def test_missing_and_unexpected_paths():
    layout = layout_of(nnx.SimpleCell)
    flat = flat_state(nnx.SimpleCell(3, 4, rngs=new_rngs()))
    wrong = {("dense_x", *path[1:]) if path == ("dense_i", "bias") else path: x for path, x in flat.items()}
    message = r"(?s)the NNX state and the layout do not match: 1 missing, 1 unexpected.*dense_i/bias.*dense_x/bias"
    with pytest.raises(VariablesMismatchError, match=message):
        layout.to_linen(wrong)
    there = layout.to_linen(flat)
    del there["params", "h", "kernel"]
    with pytest.raises(VariablesMismatchError, match=r"(?s)the Linen variables and .*1 missing.*params/h/kernel"):
        layout.from_linen(there)


def test_values_that_do_not_fit():
    layout = layout_of(nnx.GRUCell)
    flat = flat_state(nnx.GRUCell(3, 4, rngs=new_rngs()))
    there = layout.to_linen(flat)
    message = r"(?s)dense_i/bias.*expected an axis -1 of 3 equal parts: params/ir/bias.*found    shape \(13,\)"
    with pytest.raises(LayoutError, match=message):
        layout.to_linen({**flat, ("dense_i", "bias"): jnp.ones(13)})
    for bad in (jnp.ones(5), jnp.ones(4, jnp.bfloat16)):
        with pytest.raises(
            LayoutError, match=r"(?s)params/iz/bias.*expected shape and dtype of params/ir/bias.*dense_i"
        ):
            layout.from_linen({**there, ("params", "iz", "bias"): bad})


def test_layers_without_a_counterpart():
    cell = nnx.GRUCell(3, 4, rngs=new_rngs())
    cell.hn_bias = None
    with pytest.raises(LayoutError, match=r"(?s)^hn_bias:.*params/hn/bias in Linen.*found    none.*flax.nnx has not"):
        layout_for(cell)
    fused = nnx.GRUCell(3, 4, rngs=new_rngs())
    with pytest.raises(
        LayoutError, match=r"(?s)batch_stats/dense_h/kernel/.*params|batch_stats.*one kernel for each gate"
    ):
        layout_for(nnx.SpectralNorm(fused, rngs=new_rngs()))
    with pytest.raises(LayoutError, match=r"(?s)scales/dense_h/kernel.*feature_axes=-1.*found    feature_axes=None"):
        layout_for(nnx.WeightNorm(fused, feature_axes=None, rngs=new_rngs()))

    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = nnx.WeightNorm(self.a, rngs=rngs)

    with pytest.raises(LayoutError, match=r"(?s)b/scales/kernel.*parameter kernel in the wrapped layer.*is shared"):
        layout_for(Shared(new_rngs()))


def test_a_layout_of_your_own():
    layout = Layout((Entry(("w",), (("params", "a"), ("params", "b")), axis=0),)).at(("x", 0), ("x_0",))
    flat = {("params", "x_0", "a"): np.zeros((1, 2)), ("params", "x_0", "b"): np.ones((1, 2))}
    assert layout.from_linen(flat)["x", 0, "w"].tolist() == [[0, 0], [1, 1]]
    assert_trees_equal(unflatten_dict(layout.to_linen(layout.from_linen(flat))), unflatten_dict(flat))
