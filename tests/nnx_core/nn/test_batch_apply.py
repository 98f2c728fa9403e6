"""BatchApply against Linen's, with arguments of every kind; its errors. Sequential's rules for several arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from nnx_core._errors import NnxError
from nnx_core.nn._errors import InputShapeError, OptionError
from nnx_core.nn.batch_apply import MergedAxisError
from tests.support.arrays import noise, ones, ramp
from tests.tolerance import assert_trees_equal

X = noise(0, 2, 3, 4)
CASES = {
    "one": (lambda x: x.sum(-1), (X,), {}),
    "small-array": (lambda x, y: x @ y, (X, ramp(4)), {}),
    "number": (lambda x, y: x + y, (X, 2), {}),
    "flag": (lambda x, flag: -x if flag else x, (X, True), {}),
    "none": (lambda x, mask: x if mask is None else x * mask, (X, None), {}),
    "keyword": (lambda x, scale: x * scale, (X,), {"scale": noise(1, 2, 3, 4)}),
    "broadcast": (lambda x, y: x + y, (X, ones(1, 1, 4)), {}),
    "trees": (lambda d: {"a": (d["a"], d["b"][:, None]), "c": None}, ({"a": X, "b": noise(1, 2, 3)},), {}),
    "numpy": (lambda x: x * 2, (np.ones((2, 3)),), {}),
    "empty": (lambda x: x * 2, (ones(0, 3, 4),), {}),
}


@pytest.mark.parametrize(("f", "args", "kwargs"), CASES.values(), ids=CASES)
def test_against_linen(f, args, kwargs):
    assert_trees_equal(nnx.BatchApply(f)(*args, **kwargs), linen.BatchApply(f)(*args, **kwargs))


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_number_of_axes(num_dims):
    shapes = []
    assert_trees_equal(nnx.BatchApply(lambda x: shapes.append(x.shape) or x, num_dims)(X), X)
    assert shapes == [{1: (2, 3, 4), 2: (6, 4), 3: (24,)}[num_dims]]


def test_the_order_of_broadcast_arguments_does_not_matter():
    # Linen splits the result like its first argument, and fails here.
    assert_trees_equal(nnx.BatchApply(lambda y, x: x + y)(jnp.ones((1, 1, 4)), X), X + 1)
    assert nnx.BatchApply(lambda x: x)(X[:1, :1]).shape == (1, 1, 4)


def test_a_module_under_it_is_state_and_has_modes():
    model = nnx.BatchApply(nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0)))
    assert model(X).shape == X.shape
    assert_trees_equal(model.f.mean[...], X.reshape(6, 4).mean(0))
    model.eval()
    assert model.f.use_running_average
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))} == {"f"}


def test_random_streams_and_modules_are_passed_as_they_are():
    rngs, layer = nnx.Rngs(0), nnx.Linear(4, 5, rngs=nnx.Rngs(1))

    def f(x, layer, *, rngs):
        rngs.dropout()
        return layer(x)

    assert_trees_equal(nnx.BatchApply(f)(X, layer, rngs=rngs), layer(X.reshape(6, 4)).reshape(2, 3, 5))
    assert rngs.default.count[...] == 1


def test_variables_and_keys_are_arrays():
    keys = jax.random.split(jax.random.key(0), (2, 3))
    draw = nnx.BatchApply(lambda keys, scale: jax.vmap(jax.random.normal)(keys) * scale)
    y = draw(keys, nnx.Variable(jnp.full((2, 3), 2.0)))
    assert_trees_equal(y, jax.vmap(jax.vmap(jax.random.normal))(keys) * 2)


def test_options():
    with pytest.raises(OptionError, match=r"(?s)^BatchApply\(\.\.\., f=.*a module or function.*found +int"):
        nnx.BatchApply(3)
    for bad in (0, 1.5):
        with pytest.raises(OptionError, match=rf"(?s)num_dims=.*a positive integer.*found +{bad}"):
            nnx.BatchApply(lambda x: x, num_dims=bad)


def test_too_few_axes():
    with pytest.raises(InputShapeError, match=r"(?s)^BatchApply at .*at least 4 axes.*found +shape \(\(2, 3, 4\),\)"):
        nnx.BatchApply(lambda x: x, num_dims=4)(X)
    with pytest.raises(InputShapeError, match=r"(?s)at least 2 axes.*found +shape \(\)"):
        nnx.BatchApply(lambda x: x)(3.0)


def test_leading_axes_that_differ():
    # Linen pairs element [0, 1] of one with [1, 0] of the other.
    with pytest.raises(
        InputShapeError, match=r"(?s)\(2, 3, \.\.\.\), as in another.*found +shape \(3, 2\).*close over"
    ):
        nnx.BatchApply(lambda x, y: x)(X, jnp.ones((3, 2)))


def test_results_without_the_merged_axis():
    with pytest.raises(
        MergedAxisError, match=r"(?s)^BatchApply at BatchApply, result:.*\(6, \.\.\.\).*found +shape \(\)"
    ):
        nnx.BatchApply(jnp.sum)(X)
    message = (
        r"(?s)result\['a'\]\[1\]:.*6 are the merged axes \(2, 3\).*found +shape \(4,\).*must keep the leading axis"
    )
    with pytest.raises(MergedAxisError, match=message):
        nnx.BatchApply(lambda x: {"a": (x, x[0])})(X)
    assert issubclass(MergedAxisError, NnxError)
    assert issubclass(MergedAxisError, ValueError)


# ---- Sequential ------------------------------------------------------------------------------------------------

CHAINS = {
    "tuple": (lambda x: (x, 2.0), lambda x, y: x * y),
    "dict": (lambda x: {"b": x, "a": 2.0}, lambda a, b: b / a),
    "list-is-one-argument": (lambda x: [x, x], lambda pair: pair[0] + pair[1]),
    "result": (lambda x: {"a": (x, 2 * x)},),
}


class Chain(linen.Module):
    layers: tuple

    @linen.compact
    def __call__(self, *args):
        return linen.Sequential(self.layers)(*args)


@pytest.mark.parametrize("layers", CHAINS.values(), ids=CHAINS)
def test_sequential_against_linen(layers):
    assert_trees_equal(nnx.Sequential(*layers)(X), Chain(layers).apply({}, X))
