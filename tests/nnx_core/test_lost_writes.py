"""Modules in plain JAX transforms: a write that nothing hands back is named; one that is returned or read is not."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import TraceError
from tests.support.arrays import ones
from tests.support.freed import collect

X = ones(3, 2)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.BatchNorm(2, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.blocks[0](x))


def mean_moves(m):
    m.blocks[0].mean[...] += 1.0


LOSES = {
    "jit": lambda net: jax.jit(lambda m, x: m(x))(net, X),
    "grad": lambda net: jax.grad(lambda m, x: m(x).sum(), allow_int=True)(net, X),
    "vmap": lambda net: jax.vmap(mean_moves)(jax.tree.map(lambda x: jnp.stack([x, x]), net)),
    "remat": lambda net: jax.checkpoint(lambda m, x: m(x))(net, X),
    "nnx.jit inside jax.jit": lambda net: jax.jit(lambda m, x: nnx.jit(lambda m, x: m(x))(m, x))(net, X),
    "jit inside jit": lambda net: jax.jit(lambda m, x: jax.jit(lambda m, x: m(x))(m, x))(net, X),
}


@pytest.mark.parametrize("name", LOSES)
def test_a_lost_write_is_named(name):
    net = Net(nnx.Rngs(0))
    with pytest.warns(nnx.LostWriteWarning, match=r"BatchStat.* at Net\.blocks\[0\]\.mean(.|\n)*writes back"):
        LOSES[name](net)


def test_a_lost_attribute_is_named():
    with pytest.warns(nnx.LostWriteWarning, match=r"wrote to\n  attribute 'cache' of Net\n"):
        jax.jit(lambda m: setattr(m, "cache", nnx.Cache(jnp.zeros(2))))(Net(nnx.Rngs(0)))


def test_many_lost_writes_are_one_warning():
    net = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0)) for _ in range(4)])
    with pytest.warns(nnx.LostWriteWarning, match=r"and 3 more") as seen:
        jax.jit(lambda m, x: [layer(x) for layer in m])(net, X)
    assert len(seen) == 1


def test_what_was_read_again_takes_no_place_in_the_list():
    def f(layers):
        for layer in layers:
            layer.bias[...] += 1.0
        for layer in layers[:-1]:
            layer.bias[...]

    net = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(7)])
    with pytest.warns(nnx.LostWriteWarning, match=r"wrote to\n  Param of shape \(1,\)"):
        jax.jit(f)(net)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (m(x), m),
        lambda m, x: (m(x), nnx.state(m)),
        lambda m, x: (m(x), nnx.split(m)),
        lambda m, x: (m(x), nnx.to_pure_dict(nnx.state(m))),
        lambda m, x: (mean_moves(m), m.blocks[0].mean[...] * x),
        lambda m, x: nnx.view(m, use_running_average=True, deterministic=True)(x),
        lambda m, x: nnx.clone(m)(x),  # a copy that the function itself asked for
    ],
    ids=["module", "state", "split", "pure dict", "read", "nothing written", "clone"],
)
def test_what_is_returned_or_read_is_not_lost(f):
    jax.jit(f)(Net(nnx.Rngs(0)), X)  # warnings are errors here
    collect()


def test_nnx_transforms_never_warn():
    net = Net(nnx.Rngs(0))
    nnx.jit(lambda m, x: m(x))(net, X)
    nnx.grad(lambda m, x: m(x).sum())(net, X)
    assert int(net.drop.rngs.count[...]) == 2


def test_a_captured_variable_is_named_with_path_and_creation_site():
    net = Net(nnx.Rngs(0))
    with pytest.raises(
        TraceError,
        match=r"BatchStat of shape \(2,\) at Net\.blocks\[0\]\.mean .*test_lost_writes\.py:\d+ in Net\.__init__",
    ):
        nnx.jit(lambda x: net(x))(X)
    with pytest.raises(TraceError, match=r"attribute 'a' of Dropout at Net\.drop"):
        nnx.jit(lambda: setattr(net.drop, "a", 1))()
    with pytest.raises(TraceError, match=r"an item of List at Net\.blocks"):
        nnx.jit(lambda: net.blocks.append(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))()
