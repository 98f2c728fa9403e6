"""What the wrappers and loading leave alive without the cyclic collector: nothing."""

import itertools
from contextlib import closing

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bridge
import nnx_core as nnx
from bridge import checkpoint
from bridge._errors import VariablesMismatchError
from tests.support.live_arrays import left_alive, left_in_cycles


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


class WithSetup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3)

    def __call__(self, x):
        return self.dense(x)


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


def no_such_attribute():
    model = bridge.ToNNX(WithSetup(), rngs=nnx.Rngs(0))
    bridge.lazy_init(model, x())
    assert not hasattr(model, "nosuch")


def variables_missing():
    with pytest.raises(Exception, match="Missing are"):
        bridge.to_linen(Norm).apply({}, x())


ACTS = {
    "lazy_init": wrapped,
    "call": called,
    "jit": lambda: nnx.jit(lambda m: m(x()))(wrapped()),
    "grad": lambda: nnx.grad(lambda m: m(x()).sum())(wrapped()),
    "variables_of": lambda: bridge.variables_of(wrapped()),
    "to_linen": to_linen,
    "an error": failed,
    "no such attribute": no_such_attribute,
    "variables missing": variables_missing,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_nothing_stays_alive(act):
    assert left_alive(act) == 0


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_nothing_of_ours_is_in_a_cycle(act):
    assert left_in_cycles(act) == []


# ---- checkpoints -------------------------------------------------------------------------------------------

TX = optax.adam(0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Linen training state in a file."""
    variables = jax.tree.map(np.asarray, Linen().init({"params": jax.random.key(0)}, x()))
    opt_state = flax.serialization.to_state_dict(TX.init(variables["params"]))
    tree = {"step": 3, "params": variables["params"], "batch_stats": variables["batch_stats"], "opt_state": opt_state}
    path = tmp_path_factory.mktemp("trained") / "state.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    return path


def converted(source, target, format):
    checkpoint.convert(source, target, to="nnx", target_format=format)
    return target


def with_optimizer():
    model = wrapped()
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def load(path):
    model, optimizer = with_optimizer()
    checkpoint.load_into(model, path, optimizer=optimizer)


def load_refused(path):
    with pytest.raises(VariablesMismatchError, match="Nothing was changed"):
        checkpoint.load_into(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), path)


def look(path):
    with closing(checkpoint.open_source(path)) as source:
        tree = source.tree
        assert tree.layout.kind.value != "unknown"
        assert len(tree.order) == len(tree.leaves)


def take_a_part(path):
    with closing(checkpoint.open_source(path)) as source:
        leaf = next(at for at, leaf in source.tree.leaves.items() if leaf.shape == (3, 3))
        source.read(leaf, (slice(0, 1), slice(0, 3)))


READS = {
    "inspect": look,
    "load_into": load,
    "load_into refused": load_refused,
    "read a part": take_a_part,
    "read back": checkpoint.verify,
}


def test_nothing_stays_alive_of_a_checkpoint(trained):
    assert left_alive(lambda: load(trained)) == 0


@pytest.mark.parametrize("format", ["msgpack", "safetensors", "orbax"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_reader_is_in_a_cycle(read, format, trained, tmp_path):
    path = converted(trained, tmp_path / "converted", format)
    assert left_in_cycles(lambda: read(path)) == []


@pytest.mark.parametrize("format", ["msgpack", "safetensors", "orbax"])
def test_no_conversion_is_in_a_cycle(format, trained, tmp_path):
    numbers = itertools.count()
    assert left_in_cycles(lambda: converted(trained, tmp_path / f"{next(numbers)}", format)) == []
