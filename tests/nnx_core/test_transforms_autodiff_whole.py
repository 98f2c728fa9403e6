"""grad and value_and_grad under graph=False: gradients of the arguments' own type, over all leaves, as flax.nnx."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import NotDifferentiableError, SpecError
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


def normed(n):
    class Normed(n.Module):
        def __init__(self):
            self.linear = n.Linear(2, 3, rngs=n.Rngs(0))
            self.norm = n.BatchNorm(3, rngs=n.Rngs(0))
            self.scale = jnp.arange(1.0, 4.0)
            self.items = n.List([n.Param(jnp.ones(3))])
            self.rate = n.data(2.0)
            self.label = "normed"

        def __call__(self, x):
            return self.norm(self.linear(x) * self.scale) * self.items[0] * self.rate

    return Normed()


def _whole_loss(m, x):
    return (m(x)[0] ** 2).sum()


_X = ramp(4, 2)
WHOLE = {
    "graph": {"graph": False},
    "updates": {"graph_updates": False},
    "both": {"graph": False, "graph_updates": False},
}


@pytest.mark.parametrize("modes", WHOLE.values(), ids=WHOLE)
def test_gradients_of_the_arguments_own_type_as_flax_nnx(modes):
    def story(n):
        m = normed(n)
        gradient = n.grad(_whole_loss, **modes)(m, _X)
        assert type(gradient) is type(m)
        assert (gradient.label, type(gradient.norm.mean)) == ("normed", n.BatchStat)
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, m, gradient)
        assert jax.tree.structure(gradient) == jax.tree.structure(m)
        return [jax.tree.leaves(n.as_pure(n.state(x))) for x in (gradient, stepped, m)]

    assert_trees_close(story(nnx), story(flax_nnx))


def test_own_types_with_aux_and_several_arguments_as_flax_nnx():
    def story(n):
        m, other = normed(n), {"m": normed(n), "s": jnp.array(2.0)}

        def loss(m, x, other):
            return _whole_loss(m, x) + other["s"] * _whole_loss(other["m"], x), {"mean": m.norm.mean[...]}

        (value, aux), (first, second) = n.value_and_grad(loss, argnums=(0, 2), has_aux=True, graph=False)(m, _X, other)
        assert (type(first), type(second["m"])) == (type(m), type(other["m"]))
        gradients = [n.as_pure(n.state(first)), second["s"], n.as_pure(n.state(second["m"]))]
        (of_last,), _ = n.grad(loss, argnums=(-1,), has_aux=True, graph=False)(normed(n), _X, other)
        return value, aux, jax.tree.leaves([*gradients, of_last["s"]])

    assert_trees_close(story(nnx), story(flax_nnx))


def test_own_types_in_a_mode_and_of_a_variable_and_a_state_as_flax_nnx():
    def story(n):
        with n.set_graph_mode(False):
            m = normed(n)
            assert type(n.grad(_whole_loss)(m, _X)) is type(m)
            of_variable = n.grad(lambda v: (v[...] ** 2).sum())(n.Param(jnp.ones(2)))
            of_state = n.grad(lambda s: (s["linear"]["kernel"][...] ** 2).sum())(n.state(m, n.Param))
        assert (type(of_variable), type(of_state)) == (n.Param, n.State)
        return of_variable[...], jax.tree.leaves(n.as_pure(of_state))

    assert_trees_close(story(nnx), story(flax_nnx))


def test_a_part_stays_a_state_and_the_rest_is_written():
    m = normed(nnx)
    both = (nnx.DiffState(0, nnx.Param), 1)
    gradient = nnx.grad(lambda m, o, x: _whole_loss(m, x) + _whole_loss(o, x), argnums=both, graph=False)
    part, whole = gradient(m, normed(nnx), _X)
    assert type(part) is nnx.State
    assert_trees_close(part["linear"]["kernel"][...], whole.linear.kernel[...])
    assert float(abs(m.norm.mean[...]).sum()) > 0


def test_integers_have_no_gradient():
    dropping = nnx.Dict(drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0)), w=nnx.Param(jnp.ones(2)))

    def loss(m):
        return m.w.sum()

    message = r"(?s)real- or complex-valued inputs, found\n  args\[0\]\.drop\.rngs\.count: uint32\n.*nnx\.DiffState\(0"
    before = nnx.to_pure_dict(nnx.state(dropping, nnx.RngCount))
    with pytest.raises(NotDifferentiableError, match=message):
        nnx.grad(loss, graph=False)(dropping)
    with pytest.raises(TypeError, match=r"real- or complex-valued inputs .* got uint32"):
        flax_nnx.grad(lambda m: m["c"].sum() * 1.0, graph=False)({"c": flax_nnx.Param(jnp.ones(2, jnp.uint32))})
    with pytest.raises(NotDifferentiableError, match=r"args\[0\]: int32"):
        nnx.grad(lambda x: x * 1.0)(jnp.arange(2))
    assert nnx.to_pure_dict(nnx.state(dropping, nnx.RngCount)) == before
    gradient = nnx.grad(loss, graph=False, allow_int=True)(dropping)
    assert gradient.drop.rngs.count.get_raw_value().dtype == jax.dtypes.float0
    assert_trees_equal(gradient.w[...], jnp.ones(2))


def test_argnums_are_positions():
    m = normed(nnx)
    for wrong in (m, (0, m), "kernel"):
        with pytest.raises(SpecError, match=r"argnums: expected positions of arguments or DiffStates, found a \w+\."):
            nnx.grad(_whole_loss, argnums=wrong)
    with pytest.raises(ValueError, match="argnums"):
        flax_nnx.grad(_whole_loss, argnums=normed(flax_nnx))(normed(flax_nnx), _X)
