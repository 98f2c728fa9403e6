"""The same models are never reported as different, and comparing them changes nothing of theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.support.equivalence_pairs import PAIRS
from tests.tolerance import assert_trees_equal

# The suite runs one of each kind; `--grids` all.
_REST = {
    *("mlp without rules", "cnn, training", "gpt, trained for two steps", "gpt against its ToNNX"),
    *("scanned layers against their ToNNX", "written out in linen, scanned in nnx"),
    *("written out in both", "mlp with derived rules", "lstm", "two towers"),
    *("dropout with a key as input", "cnn, evaluating", "native mlp against its ToLinen"),
}


def names():
    return [pytest.param(name, marks=[pytest.mark.grid] * (name in _REST)) for name in PAIRS]


def held(side):
    """What a side holds: of a module its state, with counters and caches; of Linen the variables."""
    if isinstance(side, nnx.Module):
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(side, nnx.Not(nnx.RngKey))))
    return jax.tree.map(np.asarray, side[1]) if isinstance(side, tuple) else None


@pytest.mark.parametrize("name", names())
def test_the_same_model_is_equal(name):
    pair = PAIRS[name]
    sides = pair.sides()
    before = held(sides.a), held(sides.b)

    report = sides.compare()

    assert report.equal, str(report)
    assert report.first is None, str(report)
    left_out = [text for text in report.not_compared if not any(map(text.__contains__, pair.left_out))]
    assert not left_out, left_out
    wrong = [row for row in report.rows if row.verdict in ("wrong", "fed wrong")]
    assert not wrong, wrong
    paired = {(row.a, row.b) for row in report.rows}
    assert set(pair.layers.items()) <= paired, paired
    assert_trees_equal((held(sides.a), held(sides.b)), before)


def test_there_are_thirty_pairs_of_every_kind():
    assert len(set(PAIRS) - _REST) >= 30
    assert set(PAIRS) >= _REST


def test_what_is_compared_is_said():
    """Outputs, gradients, parameters and updated statistics of a network that has them all."""
    report = PAIRS["cnn, training"].sides().compare()
    assert {"output", "gradient", "parameter", "state"} <= {finding.what for finding in report.findings}
    assert report.equal
    assert report.seeds == (0,)  # its inputs are arrays: another seed would draw nothing else


def test_training_is_compared_step_by_step():
    report = PAIRS["a counter"].sides().compare()
    assert {finding.step for finding in report.findings if finding.what == "loss"} == {1, 2, 3}
    assert {"loss", "trained parameter"} <= {finding.what for finding in report.findings}


def test_what_has_no_gradient_is_listed():
    """A model of integers alone: nothing is left out in silence."""
    sides = PAIRS["two functions"].sides()
    sides.a = sides.b = lambda x: jnp.argmax(x, axis=-1)
    report = sides.compare()
    assert report.equal
    assert any("gradient" in text for text in report.not_compared), report.not_compared
