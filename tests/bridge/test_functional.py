"""functional(cls): `init` and `apply` of an NNX class, as flax.nnx.bridge has them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import bridge
import nnx_core as nnx
from bridge.modules._errors import NotReadyError
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(1, 4, 3))
LIBRARIES = [(nnx, bridge), (flax_nnx, flax_nnx.bridge)]


def values(state, n=nnx):
    return {"/".join(map(str, path)): jnp.asarray(v.get_value()) for path, v in n.to_flat_state(state)}


def run(n, b):
    """The same program with either library: what a Linen user writes."""
    linear = b.functional(n.Linear)(3, 4)
    state = linear.init(rngs=n.Rngs(0))
    y, (_, after) = linear.apply(state)(X)
    norm = b.functional(n.BatchNorm)(3)
    params, rest = n.split_state(norm.init(rngs=n.Rngs(0)), n.Param, ...)
    z, (_, moved) = norm.apply(params, rest)(X)
    same = {f"after/{k}": v for k, v in values(after, n).items()}
    return {"y": y, "z": z, **values(state, n), **same, **{f"moved/{k}": v for k, v in values(moved, n).items()}}


def test_same_program_same_numbers():
    ours, theirs = (run(*library) for library in LIBRARIES)
    assert_trees_close(ours, theirs)
    assert_trees_equal({k: ours[k] for k in ("kernel", "bias")}, {k: theirs[k] for k in ("kernel", "bias")})


def test_state_is_not_changed_and_methods_are_reached():
    class Model(nnx.Module):
        def __init__(self, size, *, rngs):
            self.inner = nnx.BatchNorm(size, rngs=rngs)

        def encode(self, x):
            return self.inner(x) * 2

    model = bridge.functional(Model)(3)
    state = model.init(rngs=nnx.Rngs(0))
    before = values(state)
    y, (graphdef, after) = model.apply(state).encode(X)
    assert_trees_equal(values(state), before)
    assert not jnp.array_equal(values(after)["inner/mean"], before["inner/mean"])
    assert_trees_close(nnx.merge(graphdef, state).encode(X), y)
    assert_trees_close(model.apply(state).inner(X)[0] * 2, y)


def test_under_jit_and_grad():
    model = bridge.functional(nnx.Linear)(3, 1)
    state = model.init(rngs=nnx.Rngs(0))
    gradients = jax.jit(jax.grad(lambda s: model.apply(s)(X)[0].sum()))(state)
    assert_trees_close(gradients["kernel"].get_value(), X.sum(0)[:, None])


def test_fields_and_arguments_are_theirs():
    f = bridge.functional(nnx.Linear)(3, out_features=4)
    assert (f.module_type, f.graphdef, f.args, f.kwargs) == (nnx.Linear, None, (3,), {"out_features": 4})
    assert bridge.functional(nnx.Dropout)(0.5).init() == nnx.State({})


def test_init_without_rngs_says_what_the_class_says():
    with pytest.raises(TypeError, match="rngs"):
        bridge.functional(nnx.Linear)(3, 4).init()


def test_apply_before_init():
    with pytest.raises(NotReadyError, match=r"functional\(Linear\)\.apply before init.*\n.*structure.*\n.*none\nCall"):
        bridge.functional(nnx.Linear)(3, 4).apply(nnx.State({}))
