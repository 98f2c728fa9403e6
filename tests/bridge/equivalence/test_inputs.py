"""Inputs: given, drawn and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence import ComparisonError, compare
from bridge.equivalence.inputs import inputs_of

S = jax.ShapeDtypeStruct


def test_a_seed_decides_and_arrays_are_given():
    inputs = inputs_of([{"x": S((4,), "float32"), "ids": S((50,), "int32")}, np.ones(2)], {"train": True})
    (drawn, ones), kwargs = inputs.drawn(1)
    (again, _), _ = inputs.drawn(1)
    (other, _), _ = inputs.drawn(2)
    np.testing.assert_array_equal(drawn["x"], again["x"])
    assert not np.array_equal(drawn["x"], other["x"])
    assert set(np.unique(drawn["ids"])) == {0, 1}
    assert (ones.sum(), kwargs) == (2, {"train": True})
    assert inputs.is_drawn
    assert not inputs_of([np.ones(2)], {}).is_drawn


def test_arrays_are_run_once():
    assert compare(jnp.sin, jnp.sin, jnp.ones(3)).seeds == (0,)


def test_a_batch_file(tmp_path):
    path = tmp_path / "batch.npz"
    np.savez(path, np.full(2, 3.0, "float32"), np.full(2, 5.0, "float32"), scale=np.float32(2))
    inputs = inputs_of([path], {"train": False})
    assert [float(x[0]) for x in inputs.args] == [3.0, 5.0]
    assert float(inputs.kwargs["scale"]) == 2.0
    assert inputs.kwargs["train"] is False
    report = compare(lambda x, y, scale: x * y * scale, lambda x, y, scale: x * y * 2, path)
    assert [finding.path for finding in report.findings if not finding.equal] == ["inputs/1/scale"]


def test_a_file_that_is_none(tmp_path):
    broken, empty = tmp_path / "broken.npz", tmp_path / "empty.npz"
    broken.write_bytes(b"PK no")
    np.savez(empty)
    with pytest.raises(ComparisonError, match=r"(?s)the batch file .*broken\.npz cannot be used.*numpy\.savez"):
        inputs_of([broken], {})
    with pytest.raises(ComparisonError, match=r"(?s)empty\.npz cannot be used.*found: no array in it"):
        inputs_of([str(empty)], {})
