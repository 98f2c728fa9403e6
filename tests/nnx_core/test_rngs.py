"""Rngs: named streams of keys, bit-equal to flax.nnx's for the same seed."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.strategies import Node, Record, portrait
from tests.support.arrays import key
from tests.tolerance import assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


def draws(rngs, n=3):
    return [rngs.params(), rngs.dropout(), *(rngs() for _ in range(n))]


# ---- the same keys as flax.nnx -------------------------------------------------------------------------------------

SEEDS = {
    "int": ((7,), {}),
    "default by name": ((), {"default": 7}),
    "key": ((key(7),), {}),
    "raw key": ((jax.device_put(np.array([0, 7], np.uint32)),), {}),
    "streams": ((0,), {"params": 1, "dropout": 2}),
    "stream of key": ((0,), {"params": key(5)}),
    "mapping": (({"default": 3, "dropout": 4},), {}),
}


@pytest.mark.parametrize(("args", "kwargs"), SEEDS.values(), ids=SEEDS)
def test_keys_are_flax_nnx_keys(args, kwargs):
    assert_trees_equal(draws(nnx.Rngs(*args, **kwargs)), draws(flax_nnx.Rngs(*args, **kwargs)))


@pytest.mark.parametrize(("args", "kwargs"), SEEDS.values(), ids=SEEDS)
def test_forks_give_flax_nnx_keys(args, kwargs):
    ours, theirs = nnx.Rngs(*args, **kwargs), flax_nnx.Rngs(*args, **kwargs)
    assert_trees_equal(draws(ours.fork()), draws(theirs.fork()))
    assert_trees_equal(draws(ours), draws(theirs))  # what the fork took from its parent


@pytest.mark.parametrize("split", [3, (2, 3), {"params": 3, "default": (2, 2)}, {...: 2}], ids=str)
def test_split_forks_give_flax_nnx_keys(split):
    def keys(module):
        rngs = module.Rngs(0, params=1).split(split)
        return {name: stream.key.get_value() for name, stream in rngs.items()}

    assert_trees_equal(keys(nnx), keys(flax_nnx))


def test_a_stream_alone_gives_flax_nnx_keys():
    ours, theirs = nnx.RngStream(3, tag="a"), flax_nnx.RngStream(3, tag="a")
    assert_trees_equal([ours(), ours()], [theirs(), theirs()])


DISTRIBUTIONS = {
    "normal": lambda r: r.normal((2, 3)),
    "uniform": lambda r: r.uniform((2, 3), minval=-1.0),
    "bernoulli": lambda r: r.bernoulli(0.3, (4,)),
    "randint": lambda r: r.randint((4,), 0, 9),
    "categorical": lambda r: r.categorical(jnp.zeros(5)),
    "permutation": lambda r: r.permutation(5),
    "truncated_normal": lambda r: r.truncated_normal(-1.0, 1.0, (3,)),
    "lecun_normal": lambda r: r.lecun_normal()((3, 4)),
    "orthogonal": lambda r: r.orthogonal(3),
}


@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_distributions_draw_flax_nnx_numbers(draw):
    ours, theirs = nnx.Rngs(0, params=1), flax_nnx.Rngs(0, params=1)
    assert_trees_equal([draw(ours), draw(ours.params)], [draw(theirs), draw(theirs.params)])


# ---- streams ---------------------------------------------------------------------------------------------------


def test_a_key_is_fold_in_of_the_count():
    rngs = nnx.Rngs(3)
    want = [jax.random.fold_in(jax.random.key(3), i) for i in range(2)]
    assert_trees_equal([rngs(), rngs()], want)
    assert int(rngs.default.count[...]) == 2


def test_unknown_streams_come_from_the_default():
    rngs = nnx.Rngs(0)
    assert rngs.params is rngs.default
    assert rngs["dropout"] is rngs.default


def test_streams_count_separately():
    rngs = nnx.Rngs(0, params=1)
    rngs.params()
    rngs.params()
    assert (int(rngs.params.count[...]), int(rngs.default.count[...])) == (2, 0)


def test_a_missing_stream_without_default():
    rngs = nnx.Rngs(params=0)
    with pytest.raises(AttributeError, match=r"No RngStream named 'dropout'"):
        rngs.dropout()
    with pytest.raises(KeyError, match=r"No RngStream named 'dropout'"):
        rngs["dropout"]
    with pytest.raises(AttributeError, match=r"default"):
        rngs()


def test_hasattr_tells_whether_a_stream_is_there():
    assert hasattr(nnx.Rngs(0), "dropout")
    assert not hasattr(nnx.Rngs(params=0), "dropout")


def test_it_is_a_mapping_of_its_own_streams():
    rngs = nnx.Rngs(0, params=1)
    assert sorted(rngs) == ["default", "params"]
    assert len(rngs) == 2
    assert "params" in rngs
    assert "dropout" not in rngs
    assert dict(rngs.items())["params"] is rngs.params


@pytest.mark.parametrize("seed", ["a", 1.5, None, object()])
def test_something_that_is_no_seed(seed):
    with pytest.raises((ValueError, TypeError), match=r"(?i)rng|seed|key"):
        nnx.Rngs(params=seed)


def test_state_of_a_stream_is_key_and_count_with_its_name_as_tag():
    rngs = nnx.Rngs(0, params=1)
    assert nnx.to_flat_state(nnx.state(rngs)).paths == (
        ("default", "count"),
        ("default", "key"),
        ("params", "count"),
        ("params", "key"),
    )
    assert isinstance(rngs.params.key, nnx.RngKey)
    assert isinstance(rngs.params.count, nnx.RngCount)
    assert rngs.params.key.tag == rngs.params.count.tag == rngs.params.tag == "params"
    assert list(nnx.state(rngs, "params")) == ["params"]
    assert list(nnx.to_flat_state(nnx.state(rngs, nnx.RngKey)).paths) == [("default", "key"), ("params", "key")]


# ---- fork, split, reseed -------------------------------------------------------------------------------------------


def test_a_fork_is_separate_and_takes_one_key_of_each_stream():
    rngs = nnx.Rngs(0, params=1)
    fork = rngs.fork()
    assert (int(rngs.params.count[...]), int(fork.params.count[...])) == (1, 0)
    assert_trees_equal(fork.params.key.get_value(), nnx.Rngs(1)())
    fork.params()
    assert int(rngs.params.count[...]) == 1


def test_a_split_fork_has_one_key_for_each_lane():
    rngs = nnx.Rngs(0, params=1)
    fork = rngs.fork(split={"params": 3})
    assert (fork.params.key.shape, fork.params.count.shape) == ((3,), (3,))
    assert fork.default.key.shape == ()
    assert_trees_equal(fork.params.key.get_value(), jax.random.split(nnx.Rngs(1)(), 3))


def test_split_is_fork_with_split():
    assert portrait(nnx.Rngs(0, a=2).split(3)) == portrait(nnx.Rngs(0, a=2).fork(split=3))


def test_drawing_from_a_split_stream_needs_vmap():
    rngs = nnx.Rngs(0).fork(split=3)
    keys = nnx.vmap(lambda r: r.params())(rngs)
    assert keys.shape == (3,)
    assert len({tuple(k) for k in jax.random.key_data(keys).tolist()}) == 3
    assert rngs.default.count[...].tolist() == [1, 1, 1]


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return x + self.rngs.noise.normal(x.shape)


def test_reseed_resets_key_and_count_of_the_named_streams():
    m = Noisy(nnx.Rngs(0, noise=1))
    x = jnp.zeros(3)
    nnx.reseed(m, noise=5)
    assert int(m.rngs.noise.count[...]) == 0
    first = m(x)
    assert float(jnp.abs(first - m(x)).max()) > 0
    nnx.reseed(m, noise=5)
    assert_trees_equal(m(x), first)
    nnx.reseed(m, noise=jax.random.key(5))
    assert_trees_equal(m(x), first)


def test_reseed_of_a_split_stream_needs_a_policy():
    rngs = nnx.Rngs(0).fork(split=3)
    with pytest.raises(ValueError, match=r"scalar"):
        nnx.reseed(rngs, default=1)
    nnx.reseed(rngs, default=1, policy="match_shape")
    assert rngs.default.key.shape == (3,)
    nnx.reseed(rngs, default=1, policy=lambda path, key, shape: jnp.broadcast_to(key, shape))
    assert len({tuple(k) for k in jax.random.key_data(rngs.default.key[...]).tolist()}) == 1


def test_reseed_leaves_other_streams_alone():
    m = Noisy(nnx.Rngs(0, noise=1))
    m.rngs()
    before = portrait(m.rngs.default)
    nnx.reseed(m, noise=3)
    assert portrait(m.rngs.default) == before


def test_reseed_gives_flax_nnx_keys():
    def keys(module):
        rngs = module.Rngs(0, a=1)
        rngs.a()
        module.reseed(rngs, a=9)
        return [rngs.a(), rngs()]

    assert_trees_equal(keys(nnx), keys(flax_nnx))


WAYS = {
    "nothing": None,
    "an int": 3,
    "a shape": (2, 3),
    "one stream": {"params": 3},
    "a shape for one stream": {"params": (2, 2)},
    "one stream and the others": {"params": 3, ...: 2},
    "two streams": {("params", "dropout"): 3},
    "not this one": {"params": None, ...: 2},
    "the first that matches": {...: 2, "params": 3},
}


def drawn(rngs):
    """Keys and counts of all streams."""
    return {name: (stream.key[...], stream.count[...]) for name, stream in rngs.items()}


def theirs_and_ours():
    both = [lib.Rngs(0, params=1, dropout=2) for lib in (flax_nnx, nnx)]
    for rngs in both:
        rngs.params()
    return both


@pytest.mark.filterwarnings("ignore:The 'split' argument of 'fork' is deprecated")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_fork_is_flax_nnx_fork(way):
    theirs, ours = theirs_and_ours()
    assert_trees_equal(drawn(ours.fork(split=way)), drawn(theirs.fork(split=way)))
    assert_trees_equal(drawn(ours), drawn(theirs))


@pytest.mark.parametrize("way", [None, {"params": 3}, {"params": None, "noise": 2}], ids=["all", "one", "none of two"])
def test_a_fork_repeats_no_number_of_its_parent(way):
    _, parent = theirs_and_ours()
    new = parent.fork(split=way)
    first = [jax.random.key_data(parent.dropout()).tolist() for _ in range(4)]
    again = [jax.random.key_data(new.dropout()).tolist() for _ in range(4)]
    assert not [key for key in again if key in first]


@pytest.mark.parametrize("way", [way for way in WAYS.values() if way], ids=[name for name in WAYS if WAYS[name]])
@pytest.mark.parametrize("name", ["split", "broadcast"])
def test_split_and_broadcast_are_flax_nnx_own(name, way):
    theirs, ours = (lib.Rngs(0, params=1, dropout=2) for lib in (flax_nnx, nnx))
    assert_trees_equal(drawn(getattr(ours, name)(way)), drawn(getattr(theirs, name)(way)))
    assert_trees_equal(drawn(ours), drawn(theirs))


IN_PLACE = [
    name for name in WAYS if name not in ("one stream and the others", "the first that matches", "not this one")
]


@pytest.mark.filterwarnings("ignore:The 'split' argument of 'fork' is deprecated")
@pytest.mark.parametrize("way", IN_PLACE)
def test_fork_rngs_is_flax_nnx_own(way):
    # Those left out raise in flax.nnx, or fork a stream twice.
    theirs, ours = theirs_and_ours()
    for _ in range(2):
        backups = [lib.fork_rngs(rngs, split=WAYS[way]) for lib, rngs in ((flax_nnx, theirs), (nnx, ours))]
        assert_trees_equal(drawn(ours), drawn(theirs))
        flax_nnx.restore_rngs(backups[0])
        nnx.restore_rngs(backups[1])
        assert_trees_equal(drawn(ours), drawn(theirs))
        copies = [
            lib.fork_rngs(rngs, split=WAYS[way], graph=False, graph_updates=False)
            for lib, rngs in ((flax_nnx, theirs), (nnx, ours))
        ]
        assert_trees_equal(drawn(copies[1]), drawn(copies[0]))
        assert_trees_equal(drawn(ours), drawn(theirs))


def test_fork_rngs_takes_the_first_rule_of_a_stream():
    rngs, forked = nnx.Rngs(0, params=1, dropout=2), nnx.Rngs(0, params=1, dropout=2)
    nnx.fork_rngs(rngs, split={"params": None, "dropout": 3, ...: 2})
    want = {"default": forked.default.split(2), "params": forked.params.fork(), "dropout": forked.dropout.split(3)}
    assert_trees_equal(drawn(rngs), drawn(want))


def test_split_rngs_as_a_decorator_restores_afterwards():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0, None))
    def f(rngs, x):
        return rngs.noise.normal(()) + x

    rngs = nnx.Rngs(0)
    out = f(rngs, 1.0)
    assert out.shape == (3,)
    assert len(set(out.tolist())) == 3
    assert rngs.default.key.shape == ()


def test_fork_rngs_as_a_decorator_restores_afterwards():
    @nnx.fork_rngs(split={"noise": 3})
    @nnx.vmap(in_axes=(nnx.StateAxes({"noise": 0, ...: None}),))
    def f(rngs):
        return rngs.noise.normal(())

    rngs = nnx.Rngs(noise=0)
    assert f(rngs).shape == (3,)
    assert rngs.noise.key.shape == ()
    assert int(rngs.noise.count[...]) == 1


# ---- inside transforms ---------------------------------------------------------------------------------------------


def test_jit_draws_the_keys_that_eager_draws():
    eager, compiled = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    f = nnx.jit(lambda m, x: m(x))
    for _ in range(3):
        assert_trees_equal(f(compiled, jnp.zeros(2)), eager(jnp.zeros(2)))
    assert int(compiled.rngs.default.count[...]) == 3


def test_the_count_does_not_retrace():
    traces = []

    @nnx.jit
    def f(rngs):
        traces.append(1)
        return rngs.params()

    rngs, eager = nnx.Rngs(0), nnx.Rngs(0)
    assert_trees_equal([f(rngs) for _ in range(3)], [eager.params() for _ in range(3)])
    assert len(traces) == 1


def test_two_owners_of_one_rngs_draw_different_keys():
    m = Node()
    rngs = nnx.Rngs(0)
    m.a, m.b = Noisy(rngs), Noisy(rngs)
    a, b = nnx.jit(lambda m: (m.a(jnp.zeros(2)), m.b(jnp.zeros(2))))(m)
    assert float(jnp.abs(a - b).max()) > 0
    assert int(rngs.default.count[...]) == 2


def test_law4_reading_moves_no_counter():
    m = Record()
    m.rngs = nnx.Rngs(0)
    before = m.rngs.default.count.get_value()
    nnx.jit(lambda m: m.rngs.default.key[...])(m)
    assert m.rngs.default.count.get_value() is before


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax", "nnx"])
def test_a_deep_copy_inside_of_a_trace_draws_what_the_model_outside_would(jit):
    model = Node()
    model.rngs = nnx.Rngs(0)
    model.again = model.rngs

    def f(x):
        copied = copy.deepcopy(model)
        assert copied.again is copied.rngs
        return x + jax.random.uniform(copied.rngs.noise())

    expected = 1 + jax.random.uniform(nnx.Rngs(0).noise())
    assert float(jit(f)(1.0)) == float(expected)
    assert int(model.rngs.default.count[...]) == 0
    assert float(f(1.0)) == float(expected)
