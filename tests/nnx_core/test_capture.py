"""capture: what is sown comes back as a result, and the module is left as it was."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import StateMismatchError, TraceError
from nnx_core.capture import capture
from tests.strategies import portrait
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")
X = ramp(1, 2)
OF_FLAX = {cls: dict(vars(cls)) for cls in (flax_nnx.Module, flax_nnx.Linear)}  # as imported, before any test


@pytest.fixture(autouse=True)
def flax_as_imported():
    """With `method_outputs`, flax.nnx.capture wraps methods of classes in place, and forgets to unwrap those of a class
    whose module left the graph meanwhile. One test that does so, and each later `sow` of flax.nnx calls itself."""
    as_imported()
    yield
    as_imported()


def as_imported():
    for cls, members in OF_FLAX.items():
        for name, member in members.items():
            if vars(cls).get(name) is not member:
                setattr(cls, name, member)


def model(n):
    class Layer(n.Module):
        def __init__(self, rngs):
            self.linear = n.Linear(2, 2, rngs=rngs)
            self.calls = n.Variable(jnp.array(0))

        def features(self, x):
            y = self.linear(x)
            self.sow(n.Intermediate, "f", y)
            return y

        def __call__(self, x):
            self.calls[...] += 1
            y = self.features(x)
            self.sow(n.Intermediate, "y", 2 * y)
            self.sow(n.Cache, "c", y)
            return self.perturb("p", y)

    class Model(n.Module):
        def __init__(self):
            self.layers = n.List([Layer(n.Rngs(0)), Layer(n.Rngs(1))])
            self.shared = self.layers[0]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            self.flag = True
            return self.shared(x)

    return Model()


def plain(n, states):
    return [n.to_pure_dict(state) for state in states]


BOTH = [(nnx, capture), (flax_nnx, flax_nnx.capture)]


def both(story):
    """The story told by both packages, which must agree."""
    ours, theirs = (story(n, n_capture) for n, n_capture in BOTH)
    assert_trees_close(ours, theirs)
    return ours


def test_sown_values_as_flax_nnx():
    out = both(lambda n, cap: (r := cap(model(n), n.Intermediate, n.Cache)(X))[:1] + tuple(plain(n, r[1:])))
    assert set(out[1]["layers"][0]) == {"f", "y"}
    assert len(out[1]["layers"][0]["y"]) == 2  # the shared layer ran twice
    assert set(out[2]["layers"][1]) == {"c"}


def test_forms_of_fn_as_flax_nnx():
    both(lambda n, cap: plain(n, cap(lambda m, x: m(x), n.Intermediate)(model(n), X)[1:]))
    both(lambda n, cap: plain(n, cap(n.Intermediate)(lambda m, x: m(x))(model(n), X)[1:]))
    both(lambda n, cap: plain(n, cap(model(n).layers[1].features, n.Intermediate)(X)[1:]))
    both(lambda n, cap: plain(n, cap(lambda ms: ms[0](X), n.Intermediate)([model(n)])[1:]))
    both(lambda n, cap: cap(model(n))(X))  # no types: the result alone


def test_a_function_without_a_module():
    assert capture(lambda: 1, nnx.Intermediate)()[0] == 1
    y, state = capture(lambda x: x, nnx.Intermediate)(3)
    assert (y, len(state)) == (3, 0)
    assert len(capture(lambda m: m(X), nnx.Intermediate)(m=model(nnx))[1]) == 1


def test_the_module_is_not_touched_but_by_what_it_does_itself():
    m, twin = model(nnx), model(nnx)
    calls, kind = m.layers[0].calls, type(m.layers[0])
    capture(m, nnx.Intermediate, nnx.Cache)(X)
    for layer in twin.layers:
        layer.calls[...] += 1
    twin.layers[0].calls[...] += 1
    twin.flag = True
    assert portrait(m) == portrait(twin)
    assert m.layers[0].calls is calls
    assert type(m.layers[0]) is kind


@pytest.mark.filterwarnings("ignore:(?s).*outside of 'nnx.capture:DeprecationWarning")  # flax.nnx's, outside of capture
def test_what_was_sown_before_stays_and_does_not_mix_in():
    def story(n, cap):
        m = model(n)
        m(X)
        before = n.to_pure_dict(n.state(m, n.Intermediate))
        state = cap(m, n.Intermediate)(X)[1]
        assert_trees_equal(n.to_pure_dict(n.state(m, n.Intermediate)), before)
        return n.to_pure_dict(state)["layers"][1]["y"]

    assert len(both(story)) == 1


def test_an_exception_leaves_the_module_alone():
    m = model(nnx)
    before = portrait(m)

    def fail(m):
        m(X)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        capture(fail, nnx.Intermediate)(m)
    assert portrait(m) == before


def test_modules_come_back_as_what_they_were():
    m = model(nnx)
    out, _ = capture(lambda m: (m, nnx.clone(m)), nnx.Intermediate)(m)
    assert out[0] is m
    assert type(out[1]) is type(m)
    assert type(out[1].layers[0]) is type(m.layers[0])


# ---- perturbations -----------------------------------------------------------------------------------------------


class Perturbed(nnx.Module):
    def __call__(self, x):
        return 3 * self.perturb("x", x)


def test_gradients_of_intermediates_as_flax_nnx():
    def story(n, cap):
        m = model(n)
        _, p = cap(lambda m, x: m(x), n.Perturbation)(m, X)

        def loss(m, p, x):
            return cap(lambda m, x: (m(x) ** 2).sum(), n.Intermediate, init=p)(m, x)

        grads, sown = n.grad(loss, argnums=n.DiffState(1, n.Perturbation), has_aux=True)(m, p, X)
        return plain(n, (p, grads, sown))

    _, grads, _ = both(story)
    assert set(grads["layers"]) == {0, 1}


def test_a_perturbation_begins_at_zero_whatever_the_value():
    net, x = nnx.Module(), jnp.array([-1.0, jnp.inf, jnp.nan])
    assert_trees_equal(net.perturb("x", x), x)
    assert_trees_equal(net.x[...], jnp.zeros(3))


def test_perturb_without_a_place_does_nothing():
    assert_trees_equal(capture(Perturbed(), nnx.Intermediate)(X)[0], 3 * X)


def test_init():
    init = nnx.State({"x": nnx.Perturbation(jnp.ones((1, 2)))})
    y, p = capture(Perturbed(), nnx.Perturbation, init=init)(X)
    assert_trees_equal(y, 3 * (X + 1))
    assert_trees_equal(p["x"][...], jnp.ones((1, 2)))
    assert_trees_equal(capture(Perturbed(), init={"x": jnp.ones((1, 2))})(X), 3 * (X + 1))
    with pytest.raises(StateMismatchError, match=r"(?s)In the state, but not in the graph.*zz\.q"):
        capture(Perturbed(), init=nnx.State({"zz": {"q": nnx.Perturbation(1.0)}}))(X)


def test_init_of_intermediates_as_flax_nnx():
    def story(n, cap):
        class Sow(n.Module):
            def __call__(self, x):
                self.sow(n.Intermediate, "x", x)

        return plain(n, cap(Sow(), n.Intermediate, init=n.State({"x": n.Intermediate((1,))}))(X)[1:])

    assert both(story)[0]["x"][0] == 1


# ---- outputs of methods ------------------------------------------------------------------------------------------


def test_what_flax_nnx_leaves_wrapped_is_put_right():
    class Holder(flax_nnx.Module):
        def __init__(self):
            self.inner = flax_nnx.Module()

    def drop(module):
        del module.inner

    flax_nnx.capture(drop, flax_nnx.Intermediate, method_outputs=flax_nnx.Intermediate)(Holder())
    assert vars(flax_nnx.Module)["sow"] is not OF_FLAX[flax_nnx.Module]["sow"]  # else this file needs no fixture
    as_imported()
    assert dict(vars(flax_nnx.Module)) == OF_FLAX[flax_nnx.Module]


def test_method_outputs_as_flax_nnx():
    def story(n, cap):
        return plain(n, cap(model(n).layers[0], n.Intermediate, method_outputs=n.Intermediate)(X)[1:])

    assert set(both(story)[0]) == {"__call__", "features", "f", "y", "linear"}


def test_method_outputs_alone_and_inherited():
    class Base(nnx.Module):
        def helper(self, x):
            return x

        def _private(self, x):
            return x

        def __call__(self, x):
            return self._private(self.helper(x)) + 1

    class Sub(Base):
        def __init_subclass__(cls, *, wanted):
            raise AssertionError("capture must not look like a subclass to the user")

        def __call__(self, x):
            return super().__call__(x) * 2

    y, sown = capture(Sub(), method_outputs=nnx.Intermediate)(X)
    assert_trees_equal(y, (X + 1) * 2)
    assert set(sown) == {"__call__", "helper"}
    assert len(sown["__call__"][...]) == 1


def test_each_of_two_captures_gets_what_is_its_own():
    class Inner(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "x", x)
            self.sow(nnx.Cache, "c", 2 * x)
            return x

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = Inner()

        def __call__(self, x):
            self.inner(x)
            self.kept = nnx.capture(self.inner, nnx.Intermediate)(3 * x)[1]
            return x

    _, sown, cached = capture(Outer(), nnx.Intermediate, nnx.Cache)(X)
    assert_trees_equal(nnx.to_pure_dict(sown), {"inner": {"x": (X,)}})
    assert_trees_equal(nnx.to_pure_dict(cached), {"inner": {"c": (2 * X,)}})
    model = Outer()
    capture(model, method_outputs=nnx.Intermediate)(X)
    assert_trees_equal(nnx.to_pure_dict(model.kept), {"x": (3 * X,)})


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_inside_and_around_jit():
    expected = nnx.to_pure_dict(capture(model(nnx), nnx.Intermediate)(X)[1])
    inside = nnx.jit(lambda m, x: capture(m, nnx.Intermediate)(x))(model(nnx), X)[1]
    around = capture(nnx.jit(lambda m, x: m(x)), nnx.Intermediate)(model(nnx), X)[1]
    assert_trees_close(nnx.to_pure_dict(inside), expected)
    assert_trees_close(nnx.to_pure_dict(around), expected)


def test_under_another_trace():
    m = Perturbed()  # of the outer trace: a plain sow would be refused
    g = jax.grad(lambda x: capture(m, nnx.Perturbation)(x)[0].sum())(X)
    assert_trees_equal(g, jnp.full((1, 2), 3.0))
    model_of_calls = model(nnx)
    with pytest.raises(TraceError, match=r"Variable at .*calls"):
        jax.jit(lambda x: capture(model_of_calls, nnx.Intermediate)(x)[0])(X)


def test_compiled_once():
    traced = []

    def forward(m, x):
        traced.append(1)
        return m(x)

    jitted, m = nnx.jit(forward), model(nnx)
    for _ in range(3):
        capture(jitted, nnx.Intermediate)(m, X)
    assert len(traced) <= 2  # `flag` is new after the first call


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match="needs a module, a method or a function, found int"):
        capture(5, nnx.Intermediate)
    with pytest.raises(TypeError, match=r"needs Variable types, such as nnx.Intermediate; found 'intermediates'"):
        capture(model(nnx), "intermediates")
    with pytest.raises(TypeError, match="found 3"):
        capture(model(nnx), method_outputs=3)
