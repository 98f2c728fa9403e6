"""What the wrappers and loading leave alive without the cyclic collector: nothing."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
import nnx_core as nnx
from bridge import checkpoint
from tests.support.live_arrays import left_alive


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
        self.sow("intermediates", "hidden", x)
        return x


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def x():
    return jnp.ones((2, 3))


def wrapped():
    model = bridge.ToNNX(Linen(), rngs=nnx.Rngs(0))
    bridge.lazy_init(model, x())
    return model


def called():
    model = wrapped()
    model(x()), model(x())


def to_linen():
    model = bridge.to_linen(Norm)
    variables = model.init({"params": jax.random.key(0)}, x())
    model.apply(variables, x(), mutable=["batch_stats"])


def failed():
    with pytest.raises(Exception, match=r"."):
        wrapped()(jnp.ones((2, 7)))


ACTS = {
    "lazy_init": wrapped,
    "call": called,
    "jit": lambda: nnx.jit(lambda m: m(x()))(wrapped()),
    "grad": lambda: nnx.grad(lambda m: m(x()).sum())(wrapped()),
    "variables_of": lambda: bridge.variables_of(wrapped()),
    "to_linen": to_linen,
    "an error": failed,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_nothing_stays_alive(act):
    assert left_alive(act) == 0


def test_nothing_stays_alive_of_a_checkpoint(tmp_path):
    variables = jax.tree.map(np.asarray, Linen().init({"params": jax.random.key(0)}, x()))
    variables.pop("intermediates", None)
    path = tmp_path / "variables.msgpack"
    path.write_bytes(flax.serialization.to_bytes(variables))
    assert left_alive(lambda: checkpoint.load_into(wrapped(), path)) == 0
