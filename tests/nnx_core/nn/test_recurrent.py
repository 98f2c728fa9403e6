"""Options of the recurrent layers, against Linen where it has them; loops against the loop in Python."""

import itertools
import logging
from dataclasses import replace

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.nn import initializers

import nnx_core as nnx
from nnx_core.nn.recurrent import flip_sequences, modified_orthogonal
from nnx_core.nn.recurrent_base import per_gate
from nnx_core.transforms import programs
from tests.layer_rows.recurrent import ROWS
from tests.support.arrays import noise
from tests.support.jaxprs import scans
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

BY_NAME = {row.name: row for row in ROWS}
X = noise(1, 2, 5, 3)
RANDOM = initializers.normal()


def values(module, filter=nnx.Param):
    return {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(module, filter))}


def lstm(**options):
    return nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0), **options)


# ---- cells ----


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell"])
def test_activations_and_no_batch_axis(name):
    functions = {"activation_fn": jnp.sin} | ({} if name == "SimpleCell" else {"gate_fn": jax.nn.relu})
    row = replace(
        BY_NAME[name],
        make=lambda lib, rngs, **d: getattr(lib, name)(3, 4, rngs=rngs, **functions, **d),
        twin=lambda **d: getattr(linen, name)(4, **functions, **d),
        shape=(3,),
    )
    assert_equal_to_twin(row, train=False)


def test_residual():
    row = replace(
        BY_NAME["SimpleCell"],
        make=lambda lib, rngs, **d: lib.SimpleCell(3, 4, residual=True, rngs=rngs, **d),
        twin=lambda **d: linen.SimpleCell(4, residual=True, **d),
    )
    assert_equal_to_twin(row, train=False)


def test_mgu_without_reset_gate():
    row = BY_NAME["MGUCell"]
    row = replace(
        row,
        make=lambda lib, rngs, **d: lib.MGUCell(3, 4, reset_gate=False, rngs=rngs, **d),
        twin=lambda **d: linen.MGUCell(4, reset_gate=False, **d),
        params={path: names for path, names in row.params.items() if path != "hn/bias"},
    )
    assert_equal_to_twin(row, train=False)


def test_conv_lstm_in_two_dimensions_without_bias():
    row = replace(
        BY_NAME["ConvLSTMCell"],
        make=lambda lib, rngs, **d: lib.ConvLSTMCell(
            3, 4, (3, 2), strides=(1, 1), padding=((1, 1), (0, 1)), use_bias=False, rngs=rngs, **d
        ),
        twin=lambda **d: linen.ConvLSTMCell(4, (3, 2), strides=(1, 1), padding=((1, 1), (0, 1)), use_bias=False, **d),
        shape=(2, 3, 4, 3),
        params={"ih/kernel": "params/ih/kernel", "hh/kernel": "params/hh/kernel"},
    )
    assert_equal_to_twin(row, train=False)


def test_a_gru_without_hn_bias_is_that_of_flax_nnx():
    cell, theirs = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), flax.nnx.GRUCell(3, 4, rngs=flax.nnx.Rngs(0))
    state = {path: v[...] for path, v in flax.nnx.to_flat_state(flax.nnx.state(theirs))}
    nnx.update(cell, nnx.from_flat_state(state.items()))  # hn_bias stays zero
    h = jnp.ones((2, 4))
    expected = theirs(h, X[:, 0])
    assert_trees_close(cell(h, X[:, 0]), expected)
    cell.hn_bias = nnx.Param(jnp.ones(4))
    assert not np.allclose(cell(h, X[:, 0])[0], expected[0])
    cell.hn_bias = None
    assert_trees_close(cell(h, X[:, 0]), expected)


def test_promote_dtype_and_metadata_reach_every_layer():
    seen = []

    def record(args, *, dtype):
        seen.append(len(args))
        return nnx.nn.dtypes.promote_dtype(args, dtype=dtype)

    metadata = {"kernel_metadata": {"m": 1}, "recurrent_kernel_metadata": {"m": 2}, "bias_metadata": {"m": 3}}
    for cls in (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.MGUCell, nnx.SimpleCell):
        seen.clear()
        cell = cls(3, 4, promote_dtype=record, rngs=nnx.Rngs(0), **metadata)
        cell(cell.initialize_carry((2, 3)), X[:, 0])
        layers = [x for _, x in nnx.iter_graph(cell) if isinstance(x, nnx.Linear)]
        assert seen == [3] * len(layers) + [2] * (cls is nnx.GRUCell)
        marks = {path: v.m for path, v in nnx.to_flat_state(nnx.state(cell))}
        for path, mark in marks.items():
            of_input = path[0] == "dense_i" or path[0][0] == "i"
            assert mark == (3 if "bias" in path[-1] else 1 if of_input else 2), path
    conv = nnx.ConvLSTMCell(3, 4, 3, rngs=nnx.Rngs(0), **metadata)
    assert [conv.ih.kernel.m, conv.hh.kernel.m, conv.ih.bias.m, conv.hh.bias.m] == [1, 2, 3, 3]


# ---- initial values ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_gate_is_orthogonal(dtype):
    for cell, gates in (
        (nnx.OptimizedLSTMCell(3, 4, param_dtype=dtype, rngs=nnx.Rngs(0)), 4),
        (nnx.GRUCell(3, 4, param_dtype=dtype, rngs=nnx.Rngs(0)), 3),
    ):
        assert cell.dense_h.kernel.dtype == dtype
        parts = jnp.split(cell.dense_h.kernel[...], gates, axis=-1)
        for part in parts:
            wide = part.astype(jnp.float32)
            assert_trees_close((wide.T @ wide).astype(dtype) + 1, jnp.eye(4, dtype=dtype) + 1)
        assert len({part.tobytes() for part in map(np.asarray, parts)}) == gates


def test_simple_cell_has_the_initial_values_of_flax_nnx():
    theirs = flax.nnx.SimpleCell(3, 4, bias_init=RANDOM, rngs=flax.nnx.Rngs(5))
    expected = {"/".join(path): v[...] for path, v in flax.nnx.to_flat_state(flax.nnx.state(theirs))}
    assert_trees_equal(values(nnx.SimpleCell(3, 4, bias_init=RANDOM, rngs=nnx.Rngs(5))), expected)


def test_modified_orthogonal_is_that_of_flax_nnx():
    from flax.nnx.nn.recurrent import modified_orthogonal as theirs

    for dtype in (jnp.float32, jnp.bfloat16):
        assert_trees_equal(
            modified_orthogonal(jax.random.key(3), (4, 4), dtype), theirs(jax.random.key(3), (4, 4), dtype)
        )


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"])
@pytest.mark.parametrize("keep_rngs", [False, True])
@pytest.mark.filterwarnings("ignore:keep_rngs argument is deprecated")
def test_as_many_keys_as_flax_nnx(name, keep_rngs):
    def after(lib):
        rngs = lib.Rngs(0)
        getattr(lib, name)(3, 4, bias_init=RANDOM, keep_rngs=keep_rngs, rngs=rngs)
        lib.RNN(getattr(lib, name)(3, 4, rngs=rngs), rngs=rngs)
        return rngs.default.count[...]

    assert_trees_equal(after(nnx), after(flax.nnx))


def test_initializers_see_the_shape_of_one_gate():
    shapes = []

    def record(key, shape, dtype):
        shapes.append(shape)
        return jax.random.normal(key, shape, dtype)

    cell = nnx.GRUCell(3, 4, kernel_init=record, recurrent_kernel_init=record, bias_init=record, rngs=nnx.Rngs(0))
    assert shapes == [(3, 4)] * 3 + [(4,)] * 3 + [(4, 4)] * 3 + [(4,)]
    biases = [*jnp.split(cell.dense_i.bias[...], 3), cell.hn_bias[...]]
    assert len({np.asarray(b).tobytes() for b in biases}) == 4


def test_metadata_from_initializers():
    init = nnx.with_metadata(initializers.ones, origin="test")
    cell = nnx.GRUCell(3, 4, recurrent_kernel_init=init, bias_init=init, rngs=nnx.Rngs(0))
    marks = {cell.dense_h.kernel.origin, cell.dense_i.bias.origin, cell.hn_bias.origin}
    assert marks == {"test"}
    assert_trees_equal(cell.dense_h.kernel[...], jnp.ones((4, 12)))
    assert per_gate(initializers.zeros, initializers.ones)(jax.random.key(0), (2,)).tolist() == [0, 1]


def test_forget_bias_of_the_mgu():
    cell = nnx.MGUCell(3, 4, activation_bias_init=initializers.constant(5.0), rngs=nnx.Rngs(0))
    assert [cell.if_.bias[0], cell.in_.bias[0], cell.hn.bias[0], cell.hf.bias] == [1, 5, 5, None]


# ---- carries ----


def test_a_carry_of_zeros_needs_no_key():
    rngs = nnx.Rngs(params=0)
    for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell"):
        cell = getattr(nnx, name)(3, 4, param_dtype=jnp.bfloat16, rngs=rngs)
        carry = jax.tree.leaves(cell.initialize_carry((2, 7, 3), rngs))
        assert {(c.shape, c.dtype.name, float(abs(c).sum())) for c in carry} == {((2, 7, 4), "bfloat16", 0.0)}
    conv = nnx.ConvLSTMCell(3, 4, (2, 2), rngs=rngs)
    assert (conv.num_feature_axes, conv.initialize_carry((7, 6, 5, 3))[0].shape) == (3, (7, 6, 5, 4))
    rnn = nnx.RNN(lstm(), rngs=rngs)
    assert rnn.rngs is None  # flax.nnx raises AttributeError: no stream named carry
    rnn(X, rngs=nnx.Rngs(params=0))
    own = nnx.RNN(lstm())
    own(X)
    assert own.rngs.count[...] == 0


def test_random_carries_are_those_of_flax_nnx():
    ours, theirs = lstm(), flax.nnx.LSTMCell(3, 4, rngs=flax.nnx.Rngs(0))
    for seeds in ({"default": 0}, {"default": 0, "carry": 3}):
        assert_trees_equal(
            ours.initialize_carry((2, 3), nnx.Rngs(**seeds), RANDOM),
            theirs.initialize_carry((2, 3), flax.nnx.Rngs(**seeds), RANDOM),
        )
    stream = nnx.Rngs(carry=3).carry
    assert_trees_equal(ours.initialize_carry((2, 3), stream, RANDOM)[0], RANDOM(nnx.Rngs(carry=3).carry(), (2, 4)))
    assert stream.count[...] == 2


def test_where_random_carries_get_their_keys():
    cell = lstm(carry_init=RANDOM)
    first = jax.tree.leaves(nnx.RNN(cell, return_carry=True, rngs=nnx.Rngs(carry=1))(X))
    assert_trees_equal(first, jax.tree.leaves(nnx.RNN(cell, return_carry=True, rngs=nnx.Rngs(carry=1))(X)))
    rnn = nnx.RNN(cell, rngs=nnx.Rngs(1).carry)
    assert not np.array_equal(rnn(X), rnn(X))  # the stream goes on
    kept = nnx.LSTMCell(3, 4, keep_rngs=True, carry_init=RANDOM, rngs=nnx.Rngs(0))
    assert kept.initialize_carry((3,))[0].shape == (4,)
    assert nnx.RNN(kept, rngs=False)(X).shape == (2, 5, 4)
    both = nnx.Bidirectional(nnx.RNN(cell, rngs=False), nnx.RNN(cell, rngs=False), rngs=nnx.Rngs(4))
    assert_trees_equal(both(X, rngs=nnx.Rngs(7)), both(X, rngs=nnx.Rngs(7)))
    assert both.rngs.count[...] == 0
    both(X)
    assert both.rngs.count[...] == 4
    with pytest.raises(nnx.NnxError, match="No RngStream named 'carry'"):
        cell.initialize_carry((3,), nnx.Rngs(params=0))


# ---- RNN ----


def in_python(cell, x, carry, lengths, reverse, keep_order):
    """One sequence after another, one step after another."""
    carries, outputs = [], []
    for row in range(len(x)):
        length = len(x[row]) if lengths is None else int(lengths[row])
        turn = -1 if reverse else 1  # padding stays behind what it pads
        sequence = [*x[row][:length][::turn], *x[row][length:][::turn]]
        h, last, ys = jax.tree.map(lambda c, row=row: c[row], carry), None, []
        for i, step in enumerate(sequence):
            h, y = cell(h, step)
            last = h if i == length - 1 else last
            ys.append(y)
        if reverse and keep_order:
            ys = [*ys[:length][::-1], *ys[length:][::-1]]
        carries.append(last)
        outputs.append(jnp.stack(ys))
    return jax.tree.map(lambda *c: jnp.stack(c), *carries), jnp.stack(outputs)


FLAGS = list(itertools.product([False, True], repeat=3))


@pytest.mark.sample(6)
@pytest.mark.parametrize("lengths", [None, [2, 5]], ids=["full", "padded"])
@pytest.mark.parametrize(("time_major", "reverse", "keep_order"), FLAGS)
def test_flags_against_linen_and_a_python_loop(time_major, reverse, keep_order, lengths):
    lengths = None if lengths is None else jnp.array(lengths, jnp.uint8)
    flags = {"time_major": time_major, "reverse": reverse, "keep_order": keep_order, "return_carry": True}
    cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    x = jnp.swapaxes(X, 0, 1) if time_major else X
    rnn = nnx.RNN(cell, unroll=2, **flags)
    carry, y = jax.jit(lambda x: rnn(x, seq_lengths=lengths))(x)
    params = {"h": {"kernel": cell.dense_h.kernel[...]}, "i": values(cell.dense_i)}
    twin = linen.RNN(linen.SimpleCell(4), unroll=2)
    signed = None if lengths is None else lengths.astype(jnp.int32)
    expected = jax.jit(lambda x: twin.apply({"params": {"cell": params}}, x, seq_lengths=signed, **flags))(x)
    assert_trees_equal((carry, y), expected)
    plain = in_python(cell, X, jnp.zeros((2, 4)), lengths, reverse, keep_order)
    assert_trees_close((carry, jnp.swapaxes(y, 0, 1) if time_major else y), plain)
    off = dict.fromkeys(flags, False)
    assert_trees_equal(nnx.RNN(cell, unroll=2, **off)(x, seq_lengths=lengths, **flags), rnn(x, seq_lengths=lengths))


@pytest.mark.parametrize("time_major", [False, True])
def test_any_number_of_batch_axes(time_major):
    rnn = nnx.RNN(lstm(), reverse=True, return_carry=True)
    x = jax.random.normal(jax.random.key(2), (2, 3, 5, 3))
    lengths = jnp.array([[1, 2, 5], [3, 4, 5]])
    expected = rnn(x.reshape(6, 5, 3), seq_lengths=lengths.ravel())
    given = jnp.moveaxis(x, 2, 0) if time_major else x
    (c, h), y = rnn(given, seq_lengths=lengths, time_major=time_major)
    y = jnp.moveaxis(y, 0, 2) if time_major else y
    assert_trees_close(((c.reshape(6, 4), h.reshape(6, 4)), y.reshape(6, 5, 4)), expected)
    alone = rnn(x[1, 0], seq_lengths=jnp.array(3))
    assert_trees_close(alone, jax.tree.map(lambda leaf: leaf[3], expected))
    assert_trees_close(rnn(x, seq_lengths=jnp.array([4])), rnn(x, seq_lengths=jnp.full((2, 3), 4)))


def test_lengths_of_zero_and_beyond_count_as_in_linen():
    cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    params = {"h": {"kernel": cell.dense_h.kernel[...]}, "i": values(cell.dense_i)}
    for reverse, lengths in ((False, [0, 7]), (True, [0, 5])):
        options = {"seq_lengths": jnp.array(lengths), "return_carry": True, "reverse": reverse}
        expected = linen.RNN(linen.SimpleCell(4)).apply({"params": {"cell": params}}, X, **options)
        assert_trees_close(nnx.RNN(cell)(X, **options), expected)


def test_no_steps_and_no_sequences():
    for shape in ((2, 0, 3), (0, 5, 3)):
        (c, _), y = nnx.RNN(lstm(), return_carry=True)(jnp.ones(shape))
        assert (c.shape, y.shape) == ((shape[0], 4), (*shape[:2], 4))


def test_flip_sequences():
    from flax.nnx.nn.recurrent import flip_sequences as theirs

    for shape, lengths, axes, major in (
        ((2, 5), [0, 3], 1, False),
        ((5, 2, 3), [1, 5], 1, True),
        ((2, 2, 5), [[1, 2], [3, 4]], 2, False),
        ((5,), None, 0, True),
    ):
        x = jnp.arange(np.prod(shape)).reshape(shape)
        lengths = None if lengths is None else jnp.array(lengths)
        assert_trees_equal(flip_sequences(x, lengths, axes, major), theirs(x, lengths, axes, major))


def test_a_second_eager_call_compiles_no_loop():
    rnns = [nnx.RNN(nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))) for _ in range(2)]
    rnns[0](X)
    known = set(programs._programs)
    rnns[0](X)
    rnns[1](X)
    assert known
    assert set(programs._programs) == known


def test_parameters_are_no_part_of_the_loops_carry():
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
    (loop,) = scans(jax.make_jaxpr(lambda x: rnn(x))(X).jaxpr)
    assert [v.aval.shape for v in loop.outvars] == [(2, 4), (2, 4), (5, 2, 4)]  # c, h, and the outputs
    assert len(loop.invars) == 3 + 2 + 1  # the parameters, c and h, and the inputs


class StatefulCell(nnx.RNNCellBase):
    """Dropout, batch statistics and a counter around a SimpleCell."""

    def __init__(self, rngs):
        self.cell = nnx.SimpleCell(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.steps = nnx.Variable(jnp.array(0))

    num_feature_axes = 1

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return self.cell.initialize_carry(input_shape, rngs, carry_init)

    def __call__(self, carry, inputs):
        self.steps[...] += 1
        return self.cell(carry, self.drop(self.norm(inputs)))


def test_state_in_a_cell_goes_from_step_to_step():
    looped, stepped = StatefulCell(nnx.Rngs(0, dropout=4)), StatefulCell(nnx.Rngs(0, dropout=4))
    step = nnx.jit(lambda cell, carry, x: cell(carry, x))
    rnn = nnx.RNN(looped, return_carry=True, state_axes={nnx.BatchStat: None})
    for _ in range(2):
        h, ys = stepped.initialize_carry((2, 3)), []
        for i in range(X.shape[1]):
            h, y = step(stepped, h, X[:, i])
            ys.append(y)
        assert_trees_close(nnx.jit(lambda rnn, x: rnn(x))(rnn, X), (h, jnp.stack(ys, axis=1)))
        kinds = nnx.Any(nnx.BatchStat, nnx.RngCount)
        assert_trees_close(values(looped, kinds), values(stepped, kinds))
    assert (int(looped.steps[...]), int(looped.drop.rngs.count[...])) == (10, 10)
    rnn.eval()
    assert_trees_equal(rnn(X), rnn(X))


def test_gradients_reach_through_a_stateful_loop():
    rnn = nnx.RNN(StatefulCell(nnx.Rngs(0)))
    grads = nnx.grad(lambda rnn: rnn(X).sum())(rnn)
    assert all(abs(g).sum() > 0 for g in jax.tree.leaves(grads))
    assert int(rnn.cell.steps[...]) == 5


class Mask(nnx.RNNCellBase):
    """What dropout zeroed, step by step."""

    num_feature_axes = 1

    def __init__(self, lib, rngs):
        self.drop = lib.Dropout(0.5, rngs=rngs)

    def initialize_carry(self, *_, **__):
        return jnp.zeros(())

    def __call__(self, carry, inputs):
        return carry, self.drop(jnp.ones(inputs.shape)) == 0


class FlaxMask(flax.nnx.RNNCellBase):
    num_feature_axes = 1
    __init__, __call__, initialize_carry = Mask.__init__, Mask.__call__, Mask.initialize_carry


@pytest.mark.parametrize("which", [None, "dropout", "params", ..., "RngState", ["dropout"]], ids=str)
def test_broadcast_rngs_give_the_masks_of_flax_nnx(which):
    def masks(lib, cls):
        chosen = getattr(lib, which) if which == "RngState" else which
        cell = cls(lib, lib.Rngs(0, dropout=4))
        rnn = lib.RNN(cell, broadcast_rngs=tuple(chosen) if isinstance(chosen, list) else chosen)
        x = jnp.ones((1, 4, 8))
        return [rnn(x), rnn(x), cell.drop.rngs.count[...]]

    ours = masks(nnx, Mask)
    assert_trees_equal(ours, masks(flax.nnx, FlaxMask))
    same = bool((ours[0][0] == ours[0][0, :1]).all())
    assert same is (which not in (None, "params"))
    assert not np.array_equal(ours[0], ours[1])


def test_state_with_one_slice_for_each_step():
    class Slices(Mask):
        def __init__(self):
            self.weight = nnx.Param(jnp.arange(4.0))
            self.seen = nnx.Cache(jnp.zeros((4, 1, 2)))

        def __call__(self, carry, inputs):
            self.seen[...] = inputs
            return carry, inputs * self.weight[...]

    cell = Slices()
    x = jnp.arange(8.0).reshape(1, 4, 2)
    for axes in ({nnx.Param: 0, nnx.Cache: 0}, nnx.StateAxes({(nnx.Param, nnx.Cache): 0, ...: nnx.Carry})):
        rnn = nnx.RNN(cell, state_axes=axes)
        assert_trees_equal(rnn(x), x * jnp.arange(4.0)[:, None])
        assert_trees_equal(cell.seen[...], jnp.swapaxes(x, 0, 1))
    assert nnx.RNN(cell).state_axes == nnx.StateAxes({...: nnx.Carry})


# ---- Bidirectional ----


def test_bidirectional_is_two_rnns():
    forward, backward = nnx.RNN(lstm(), time_major=True), nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(1)))
    lengths = jnp.array([2, 5])
    layer = nnx.Bidirectional(forward, backward, merge_fn=jnp.subtract, return_carry=True)
    (there, back), y = layer(X, seq_lengths=lengths, reverse=True, keep_order=False)
    options = {"seq_lengths": lengths, "return_carry": True, "time_major": False}
    (a, first), (b, second) = forward(X, **options), backward(X, reverse=True, keep_order=True, **options)
    assert_trees_equal(((there, back), y), ((a, b), first - second))
    major = nnx.Bidirectional(forward, backward, time_major=True)(jnp.swapaxes(X, 0, 1), seq_lengths=lengths)
    assert_trees_close(jnp.swapaxes(major, 0, 1), jnp.concatenate([first, second], -1))
    carries = jax.tree.map(jnp.ones_like, (there, back))
    assert_trees_equal(
        layer(X, initial_carry=carries)[0][0],
        forward(X, initial_carry=carries[0], return_carry=True, time_major=False)[0],
    )


def test_one_rnn_for_both_directions_is_reported(caplog):
    rnn = nnx.RNN(lstm())
    with caplog.at_level(logging.WARNING, logger="nnx_core"):
        nnx.Bidirectional(rnn, nnx.RNN(lstm()))(X)
        assert not caplog.records
        nnx.Bidirectional(rnn, rnn)(X)
    assert "both directions share their parameters" in caplog.text


# ---- names ----


def test_names_are_where_flax_nnx_has_them():
    theirs = flax.nnx.nn.recurrent
    names = [
        name
        for name, x in vars(theirs).items()
        if getattr(x, "__module__", "") == theirs.__name__ and not name.startswith("_") and callable(x)
    ]
    assert {"RNN", "flip_sequences", "modified_orthogonal"} <= set(names)
    for name in set(names) - {"A"}:  # a TypeVar
        assert hasattr(nnx.nn.recurrent, name), name
        assert getattr(nnx, name, None) is (getattr(nnx.nn.recurrent, name) if hasattr(flax.nnx, name) else None)


def test_layouts_of_linen_and_nnx_cells_have_as_many_values():
    for row in ROWS:
        ours = sum(x.size for x in values(row.make(nnx, nnx.Rngs(0))).values())
        assert ours == sum(x.size for x in row.variables().values()), row.name


# ---- errors ----


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell", "ConvLSTMCell"])
def test_missing_rngs(name):
    with pytest.raises(nnx.NnxError, match=rf"(?s){name}\(..., rngs=...\).*nnx.Rngs.*found    0"):
        getattr(nnx, name)(3, 4, *([3] if name == "ConvLSTMCell" else []), rngs=0)


def test_rngs_of_an_rnn():
    for make in (lambda: nnx.RNN(lstm(), rngs=3), lambda: nnx.Bidirectional(None, None, rngs=3)):
        with pytest.raises(nnx.NnxError, match=r"(?s)\(..., rngs=...\):.*an nnx.Rngs, RngStream or bool.*found    3"):
            make()
    rnn = nnx.RNN(lstm(carry_init=RANDOM), rngs=False)
    with pytest.raises(ValueError, match=r"(?s)RNN\.cell: initialize_carry with a carry_init.*found    None.*nnx.RNN"):
        rnn(X)


def test_carries_of_the_wrong_form():
    model = nnx.List([lstm()])
    for carry, found in (
        (jnp.zeros((2, 4)), r"an array of shape \(2, 4\)"),
        ((jnp.zeros(4),), r"\(Array"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s)LSTMCell at .*expected the carry \(c, h\).*\(\*batch, 4\).*{found}"
        ):
            model[0](carry, X[:, 0])
    gru = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(nnx.NnxError, match=r"(?s)Linear at GRUCell.dense_h.*expected .*\(..., 4\).*\(2, 3\)"):
        gru(jnp.zeros((2, 3)), X[:, 0])


def test_inputs_of_the_wrong_shape():
    cell = lstm()
    with pytest.raises(nnx.NnxError, match=r"(?s)Linear at LSTMCell.ii.*\(..., 3\).*\(2, 2\)"):
        cell((jnp.zeros((2, 4)),) * 2, jnp.ones((2, 2)))
    with pytest.raises(nnx.NnxError, match=r"(?s)RNN at RNN:.*\(\*batch, time, features\).*found    shape \(3,\)"):
        nnx.RNN(lstm())(X[0, 0])
    conv = nnx.RNN(nnx.ConvLSTMCell(3, 4, (3,), rngs=nnx.Rngs(0)))
    with pytest.raises(nnx.NnxError, match=r"\(time, \*batch, feature_0, feature_1\)"):
        conv(X[0], time_major=True)
    with pytest.raises(
        nnx.NnxError, match=r"(?s)ConvLSTMCell at .*\(\*batch, spatial_0, features\).*found    shape \(3,\)"
    ):
        conv.cell.initialize_carry((3,))


def test_lengths_of_the_wrong_shape():
    for bad in (jnp.ones(3), jnp.ones((2, 5))):
        with pytest.raises(nnx.NnxError, match=r"(?s)RNN\(..., seq_lengths=...\).*shape \(2,\).*found    shape \("):
            nnx.RNN(lstm())(X, seq_lengths=bad)


def test_a_carry_that_changes_its_dtype():
    rnn = nnx.RNN(nnx.GRUCell(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    message = r"(?s)RNN\(..., initial_carry=...\).*keeps its shapes and dtypes.*begins as bfloat16\[2, 4\].*cast them"
    with pytest.raises(nnx.NnxError, match=message):
        rnn(X)
    assert rnn(X, initial_carry=jnp.zeros((2, 4))).dtype == jnp.float32
    assert rnn(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    class Broken(nnx.SimpleCell):
        def __call__(self, carry, inputs):
            raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine"):
        nnx.RNN(Broken(3, 4, rngs=nnx.Rngs(0)))(X)


def test_convolutions_that_change_the_size():
    for options in ({"padding": "VALID"}, {"strides": 2}):
        cell = nnx.ConvLSTMCell(3, 4, (3,), rngs=nnx.Rngs(0), **options)
        with pytest.raises(
            nnx.NnxError, match=r"(?s)padding=...\).*keep the spatial shape \(6,\).*found    \(\d,\).*SAME"
        ):
            cell(cell.initialize_carry((2, 6, 3)), jnp.ones((2, 6, 3)))


def test_a_cell_without_its_methods():
    class Empty(nnx.RNNCellBase):
        pass

    for use, name in (
        (lambda: Empty()(0, 0), r"__call__\(carry, inputs\)"),
        (lambda: Empty().initialize_carry((2,)), "initialize_carry"),
        (lambda: Empty().num_feature_axes, "num_feature_axes"),
    ):
        with pytest.raises(NotImplementedError, match=f"Empty is a cell: it must define .*{name}"):
            use()
