"""load_into: what does not fit or is damaged is an error that changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from bridge._errors import CheckpointCorruptError, CheckpointLayoutError, VariablesMismatchError
from bridge.checkpoint.formats.orbax.read import OrbaxSource
from bridge.checkpoint.loading import ShardingError, load_into
from bridge.checkpoint.rules.apply import Rule, Rules
from nnx_core._errors import TraceError
from tests.support.placed_models import (
    KERNEL,
    abstract,
    assert_untouched,
    contents,
    mesh,
    refused,
    wide,
)
from tests.support.training import RULES, Native, linen_state, native, saved


@pytest.mark.parametrize("make_mesh", [lambda: None, mesh], ids=["real", "abstract"])
def test_everything_that_does_not_fit_is_one_error(tmp_path, reads, make_mesh):
    over = make_mesh()
    path = saved(tmp_path / "linen", linen_state(optax.adam(0.1), 1))

    def make():
        model = Native(width=6, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    things = make() if over is None else abstract(make, over)
    error = refused(VariablesMismatchError, "Nothing was changed", things, path, RULES)
    assert (("params", "first", "kernel"), (5, 6), (5, 4)) in error.wrong_shape
    assert any(row[0][:4] == ("opt_state", "0", "mu", "first") for row in error.wrong_shape)
    rules = Rules.from_rename({"hidden": "first", "norm": "bn", "head": "tail"})
    error = refused(VariablesMismatchError, "did you mean params/tail/kernel", things, path, rules)
    assert ("params", "last", "bias") in error.missing
    assert ("params", "tail", "bias") in error.unexpected
    assert reads == []


def test_a_checkpoint_without_an_optimizer(tmp_path):
    path = saved(tmp_path / "linen", {"params": linen_state(optax.adam(0.1)).params})
    model = nnx.Dict(hidden=nnx.Linear(5, 4, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    rules = Rules([Rule("params/norm/*", drop=True)])
    error = refused(VariablesMismatchError, "opt_state/0/count", [model, optimizer], path, rules)
    assert ("step",) in error.missing


@pytest.mark.parametrize("make_mesh", [lambda: None, mesh], ids=["real", "abstract"])
def test_a_damaged_file(dense, make_mesh):
    over = make_mesh()
    model = wide("data", None)() if over is None else abstract(wide("data", None), over)
    for file in (dense / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    for process in dense.glob("ocdbt.process_*/d/*"):
        process.write_bytes(b"\0" * process.stat().st_size)
    refused(CheckpointCorruptError, "damaged", [model], dense)


def test_an_array_that_is_damaged_is_found_before_anything_is_written(tmp_path, monkeypatch):
    path = saved(tmp_path / "linen", linen_state(optax.adam(0.1), 1))

    read, count = OrbaxSource.read, itertools.count(1)

    def damaged(self, path, region=None):
        if next(count) % 9 == 0:
            raise CheckpointCorruptError("the checkpoint is damaged", path, expected="numbers", found="none")
        return read(self, path, region)

    monkeypatch.setattr(OrbaxSource, "read", damaged)
    refused(CheckpointCorruptError, "expected: numbers", native(optax.adam(0.1)), path, RULES)
    over = abstract(lambda: native(optax.adam(0.1)), mesh())
    refused(CheckpointCorruptError, "expected: numbers", over, path, RULES)


def test_an_axis_that_does_not_divide(tmp_path, reads):
    path = saved(tmp_path / "odd", {"params": {"kernel": np.zeros((6, 9), "float32")}})
    model = nnx.Dict(kernel=nnx.Param(jnp.zeros((6, 9)), out_sharding=("data", "model")))
    model = abstract(lambda: model, mesh())
    error = refused(
        ShardingError, r"(?s)^kernel/value cannot be sharded.*expected: shards.*9.*axis names", [model], path
    )
    assert error.path == ("kernel", "value")
    assert reads == []


def test_a_placeholder_is_never_left(dense):
    def make():
        model = wide(None, None)()
        model.dense.sow(nnx.Intermediate, "seen", jnp.ones(3))
        return model

    model = abstract(make)
    refused(
        CheckpointLayoutError, r"(?s)no value for a Variable.*expected: a value for dense/seen/value", [model], dense
    )
    real = make()
    load_into(real, dense)
    np.testing.assert_array_equal(np.asarray(real.dense.kernel[...]), KERNEL)


def test_a_model_of_another_trace(dense, reads):
    model = wide(None, None)()

    @jax.jit
    def inside():
        load_into(model, dense)

    before = contents(model)
    with pytest.raises(TraceError):
        inside()
    assert_untouched([model], before)
    assert reads == []
