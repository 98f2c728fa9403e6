"""load, to_state and from_state: models, States and optimizers of both libraries, either way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge import flax_nnx as both
from tests.support.both_libraries import OurBlock, TheirBlock, inputs, plain
from tests.tolerance import assert_trees_close, assert_trees_equal

BLOCKS = {nnx: OurBlock, flax_nnx: TheirBlock}
WAYS = [(nnx, flax_nnx), (flax_nnx, nnx)]
each_way = pytest.mark.parametrize(("here", "there"), WAYS, ids=["to flax.nnx", "to nnx_core"])
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


def seeded(lib, seed, make):
    return make(lib, lib.Rngs(seed))


#: Layers that the two libraries lay out otherwise, or whose keys are no strings.
LAYERS = {
    "Sequential": lambda lib, rngs: lib.Sequential(lib.Linear(4, 3, rngs=rngs), lib.relu, lib.Linear(3, 2, rngs=rngs)),
    "GRUCell": lambda lib, rngs: lib.GRUCell(4, 3, rngs=rngs),
    "RNN": lambda lib, rngs: lib.RNN(lib.GRUCell(4, 3, rngs=rngs)),
    "WeightNorm": lambda lib, rngs: lib.WeightNorm(lib.Linear(4, 3, rngs=rngs), rngs=rngs),
    "SpectralNorm": lambda lib, rngs: lib.SpectralNorm(lib.Linear(4, 3, rngs=rngs), rngs=rngs),
    "MultiHeadAttention": lambda lib, rngs: lib.MultiHeadAttention(2, 4, decode=False, rngs=rngs),
}


def call(name, layer):
    x = inputs()
    if name == "GRUCell":
        return layer(jnp.ones((3, 3)), x)[1]
    return layer(x[None]) if name == "RNN" else layer(x)


@each_way
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_other_layout_compute_the_same(here, there, name):
    source, target = seeded(here, 0, LAYERS[name]), seeded(there, 1, LAYERS[name])
    report = both.load(target, source)
    assert not report.missing
    back = seeded(here, 2, LAYERS[name])
    both.load(back, target)
    assert_trees_equal(plain(here, back), plain(here, source))
    assert_trees_close(call(name, target), call(name, source))  # which writes the kernels of norms of weights


@each_way
def test_a_training_run_is_handed_over_in_the_middle(here, there):
    x = inputs()

    def make(lib, seed):
        model = BLOCKS[lib](lib.Rngs(seed))
        return model, lib.Optimizer(model, optax.adamw(1e-2), wrt=lib.Param)

    def train(lib, model, optimizer, steps):
        @lib.jit
        def step(model, optimizer, x):
            grads = lib.grad(lambda model: (model(x) ** 2).mean())(model)
            optimizer.update(model, grads)

        for _ in range(steps):
            step(model, optimizer, x)

    model, optimizer = make(here, 0)
    train(here, model, optimizer, 2)
    other, other_optimizer = make(there, 1)
    both.load(other, model)
    both.load(other_optimizer, optimizer)
    train(here, model, optimizer, 2)
    train(there, other, other_optimizer, 2)
    kept = [lib.All(lib.Not(lib.RngKey), lib.Not(lib.Intermediate)) for lib in (there, here)]
    assert_trees_equal(plain(there, other, kept[0]), plain(here, model, kept[1]))
    assert_trees_equal(plain(there, other_optimizer), plain(here, optimizer))


@each_way
def test_states_and_what_checkpoints_hold(here, there):
    make = LAYERS["Sequential"]
    source = seeded(here, 0, make)
    want = plain(here, source)

    def with_values(tree):
        return {str(k): with_values(x) if isinstance(x, dict) else {"value": np.asarray(x)} for k, x in tree.items()}

    for given in (here.state(source), want, with_values(want)):
        target = seeded(there, 1, make)
        state = there.state(target)
        both.load(target, given)
        assert_trees_equal(plain(there, target), want)
        assert_trees_equal(there.to_pure_dict(state), want)  # the Variables of the model itself


def test_states_there_and_back():
    state = nnx.state(OurBlock(nnx.Rngs(0)))
    theirs = both.to_state(state)
    assert type(theirs["layers"][0]["kernel"]) is flax_nnx.Param
    assert theirs["drop"]["rngs"]["key"].tag == "dropout" or theirs["drop"]["rngs"]["key"].tag == "default"
    assert both.from_state(theirs) == state


def test_keys_may_be_given_as_their_data_and_streams_elsewhere_are_left_out():
    target = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    key = jax.random.key(7)
    both.load(target, {"rngs": {"key": jax.random.key_data(key), "count": jnp.uint32(3)}})
    assert target.rngs.key[...] == key
    assert int(target.rngs.count[...]) == 3
    report = both.load(target, flax_nnx.state(flax_nnx.Dict(rngs=flax_nnx.Rngs(default=0))))
    assert report.left_out == (("rngs", "default", "count"), ("rngs", "default", "key"))


def test_what_does_not_fit_is_one_error_and_writes_nothing():
    target = flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))
    before = plain(flax_nnx, target)
    source = nnx.Dict(kernel=nnx.Param(jnp.ones((3, 3))), more=nnx.Param(jnp.ones(1)))
    with pytest.raises(
        both._errors.StateMismatchError, match=r"(?s)1 missing, 1 unexpected, 1 of another.*bias.*more"
    ) as e:
        both.load(target, source)
    assert e.value.different == [(("kernel",), "float32[2,3]", "float32[3,3]")]
    assert_trees_equal(plain(flax_nnx, target), before)
    report = both.load(target, {"layer": {"bias": jnp.ones(3)}}, strict=False, rename={"layer": ""})
    assert (report.loaded, report.missing) == ((("bias",),), (("kernel",),))
    with pytest.raises(TypeError, match="load takes a module, a State or an optimizer as the source"):
        both.load(target, 3)


def test_a_bias_that_the_other_library_has_not_must_be_zero():
    ours = LAYERS["GRUCell"](nnx, nnx.Rngs(0))
    ours.hn_bias[...] = jnp.ones(3)
    with pytest.raises(ValueError, match="hn_bias"):
        both.load(LAYERS["GRUCell"](flax_nnx, flax_nnx.Rngs(0)), ours)
    both.load(ours, LAYERS["GRUCell"](flax_nnx, flax_nnx.Rngs(0)))
    assert not ours.hn_bias[...].any()
