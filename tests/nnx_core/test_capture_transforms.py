"""capture around transforms, __captures__ inside of it, and captures in captures: as flax.nnx where it can."""

import dataclasses

import jax
import pytest

import nnx_core as nnx
from tests.strategies import portrait
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")
X = ramp(2, 3)


def layer_class(n):
    class Layer(n.Module):
        def __init__(self, rngs):
            self.linear = n.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            y = self.linear(x)
            self.sow(n.Intermediate, "h", y)
            return self.perturb("p", y)

    return Layer


def layer(n):
    return layer_class(n)(n.Rngs(0))


def stack(n):
    cls = layer_class(n)
    return n.vmap(lambda key: cls(n.Rngs(key)))(jax.random.split(jax.random.key(0), 4))


def pure(n, states):
    return [n.to_pure_dict(state) for state in states]


# ---- transforms --------------------------------------------------------------------------------------------------


def scanned(n, m, x, **modes):
    return n.scan(lambda x, m: m(x), in_axes=(n.Carry, 0), out_axes=n.Carry, **modes)(x, m)


TRANSFORMS = {
    "scan": (stack, scanned),
    "vmap": (stack, lambda n, m, x, **modes: n.vmap(lambda m, x: m(x), in_axes=(0, None), **modes)(m, x)),
    "jit": (layer, lambda n, m, x, **modes: n.jit(lambda m, x: m(x), **modes)(m, x)),
    "remat": (layer, lambda n, m, x, **modes: n.remat(lambda m, x: m(x), **modes)(m, x)),
    "cond": (layer, lambda n, m, x, **modes: n.cond(True, lambda m, x: m(x), lambda m, x: 2 * m(x), m, x, **modes)),
    "value_and_grad": (
        layer,
        lambda n, m, x, **modes: n.value_and_grad(lambda m, x: m(x).sum(), **modes)(m, x)[0],
    ),
}
MODES = ({}, {"graph_updates": False}, {"graph": False}, {"graph": False, "graph_updates": False})


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize(("make", "run"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_sown_passes_through_as_in_flax_nnx(make, run, modes):
    def story(n):
        m = make(n)

        def forward(m, x):
            return run(n, m, x, **modes)

        # one type at a time: of two flax.nnx mixes up the names
        y, sown = n.capture(forward, n.Intermediate)(m, X)
        _, perturbations = n.capture(forward, n.Perturbation)(m, X)
        return y, pure(n, (sown, perturbations)), list(n.to_pure_dict(n.state(m)))

    (y, states, names), (their_y, their_states, their_names) = story(nnx), story(flax_nnx)
    assert names == their_names == ["linear"]
    assert_trees_close((y, states), (their_y, their_states))


@pytest.mark.parametrize("run", [scanned, TRANSFORMS["vmap"][1]], ids=["scan", "vmap"])
def test_gradients_of_perturbations_through_a_map_as_flax_nnx(run):
    def story(n):
        m = stack(n)

        def forward(m, x):
            return run(n, m, x)

        _, starts = n.capture(forward, n.Perturbation)(m, X)

        def loss(m, starts, x):
            return n.capture(lambda m, x: forward(m, x).sum(), n.Intermediate, init=starts)(m, x)

        gradients, sown = n.grad(loss, argnums=n.DiffState(1, n.Perturbation), has_aux=True)(m, starts, X)
        return pure(n, (starts, gradients, sown))

    assert_trees_close(story(nnx), story(flax_nnx))


def test_gradients_of_their_own_type_leave_no_trace_of_capture():
    m = layer(nnx)
    gradient, sown = nnx.capture(nnx.grad(lambda m, x: m(x).sum(), graph=False), nnx.Intermediate)(m, X)
    assert (type(gradient), list(vars(gradient))) == (type(m), ["linear"])
    assert set(sown) == {"h"}
    assert jax.tree.structure(gradient) == jax.tree.structure(m)


# ---- inside ------------------------------------------------------------------------------------------------------


def test_captures_as_a_module_sees_them_in_flax_nnx():
    def story(n):
        seen = []

        class Looking(n.Module):
            def __init__(self):
                self.inner = n.Linear(3, 3, rngs=n.Rngs(0))

            def __call__(self, x):
                seen.append([(type(v).__name__, dict(v.get_raw_value())) for v in self.__captures__])
                kept = self.sow(n.Intermediate, "x", x), self.sow(n.Cache, "x", x)
                seen.append([sorted(v.get_raw_value()) for v in self.__captures__])
                seen.append([type(v).__name__ for v in self.inner.__captures__])
                return kept

        m = Looking()
        kept, *_ = n.capture(m, n.Intermediate, n.Perturbation)(X)
        return seen, kept, hasattr(m, "__captures__"), hasattr(m.inner, "__captures__")

    assert story(nnx) == story(flax_nnx)


def test_one_name_under_two_types_as_flax_nnx():
    def story(n):
        class Both(n.Module):
            def __call__(self, x):
                self.sow(n.Intermediate, "y", x, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
                self.sow(n.Intermediate, "y", x, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
                self.sow(n.Cache, "y", 2 * x)

        alone = n.capture(Both(), n.Cache)(X)[1], n.capture(Both(), n.Intermediate)(X)[1]
        return pure(n, alone), pure(n, n.capture(Both(), n.Intermediate, n.Cache)(X)[1:])

    (alone, together), (their_alone, their_together) = story(nnx), story(flax_nnx)
    assert_trees_close(alone, their_alone)
    assert_trees_close(together, list(reversed(alone)))
    assert their_together[0] == {}  # flax.nnx loses the first of the two


def test_containers_keep_their_items():
    class Bag(nnx.Dict):
        def __call__(self, x):
            keys = list(self)
            self.sow(nnx.Intermediate, "x", x)
            return keys

    class Row(nnx.List):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "x", x)
            return len(self)

    bag, row = Bag(a=nnx.Param(X)), Row([nnx.Param(X)])
    keys, sown = nnx.capture(bag, nnx.Intermediate)(X)
    assert (keys, list(bag), set(sown)) == (["a"], ["a"], {"x"})
    length, sown = nnx.capture(row, nnx.Intermediate)(X)
    assert (length, len(row), set(sown)) == (1, 1, {"x"})


def test_a_class_that_refuses_attributes_is_recorded_too():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Frozen(nnx.Module):
        factor: float

        def __call__(self, x):
            self.sow(nnx.Intermediate, "x", x)
            return self.factor * x

    frozen = Frozen.__new__(Frozen)
    vars(frozen)["factor"] = 2.0
    y, sown = nnx.capture(frozen, nnx.Intermediate)(X)
    assert_trees_equal((y, sown["x"][...]), (2 * X, (X,)))
    assert list(vars(frozen)) == ["factor"]


# ---- captures in captures ----------------------------------------------------------------------------------------


def test_a_capture_in_a_capture_takes_only_its_own():
    class Outer(nnx.Module):
        def __init__(self):
            self.inner, self.other = layer(nnx), layer(nnx)

        def both(self, first, second):
            return first(X) + second(X)

        def __call__(self, x):
            y = self.inner(x)
            _, self.kept = nnx.capture(self.both, nnx.Intermediate)(self.inner, self.other)
            _, self.part = nnx.capture(lambda a, b: self.both(a, b), nnx.Intermediate)(self.inner, self.other)
            return self.other(y)

    model = Outer()
    before = portrait(model.inner)
    y, sown = nnx.capture(model, nnx.Intermediate)(X)
    assert y.shape == X.shape
    assert (set(model.kept), set(model.part)) == ({"inner", "other"}, {"h"})
    # what ran in the first inner capture is not of the outer one; `other` of the second was no part of its root
    assert len(sown["inner"]["h"][...]) == 1
    assert len(sown["other"]["h"][...]) == 2
    assert portrait(model.inner) == before
    assert not any(name.startswith("__captures") for _, m in nnx.iter_modules(model) for name in vars(m))
