"""The same thing twice among the arguments: one treatment, however it is spelled. Oracle: flax.nnx."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core._errors import AliasError
from tests.support.arrays import noise, ones
from tests.tolerance import assert_trees_close, assert_trees_equal

X = noise(0, 3, 2)
LIBS = (nnx, flax_nnx)


def tied(lib):
    class Tied(lib.Module):
        def __init__(self):
            self.a = lib.Linear(2, 2, rngs=lib.Rngs(0))
            self.head = lib.Linear(2, 2, rngs=lib.Rngs(1))
            self.head.kernel = self.a.kernel

        def __call__(self, x):
            return (self.head(self.a(x)) ** 2).sum()

    return Tied()


def gradients(lib, f, argnums, *args):
    """For each argument, its gradients by path; a lone Variable's under no path."""
    result = lib.grad(f, argnums=argnums)(*args)
    parts = result if isinstance(result, tuple) else (result,)
    return [lib.to_pure_dict(part) if isinstance(part, lib.State) else {"": part[...]} for part in parts]


PROGRAMS = {
    "one module twice": lambda lib, m: gradients(lib, lambda a, b: a(X) + 2 * b(X), (0, 1), m, m),
    "one Variable twice": lambda lib, m: gradients(lib, lambda a, b: (a * b).sum(), (0, 1), *[lib.Param(X)] * 2),
    "a path to the second place of a tied weight": lambda lib, m: gradients(
        lib, lambda m: m(X), lib.DiffState(0, lib.PathContains("head")), m
    ),
    "a path to the first place of a tied weight": lambda lib, m: gradients(
        lib, lambda m: m(X), lib.DiffState(0, lib.PathContains("a")), m
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_those_of_flax(name):
    ours, flax = (PROGRAMS[name](lib, tied(lib)) for lib in LIBS)
    assert_trees_close(ours, flax)


def test_the_gradient_of_a_module_in_two_places_of_one_argument():
    ours, flax = (
        [jax.tree.map(jnp.asarray, jax.tree.leaves(lib.grad(lambda ms: ms[0](X) + ms[1](X))([m, m])))]
        for lib in LIBS
        for m in [tied(lib)]
    )
    assert_trees_close(ours, flax)


class Holder(nnx.Module):
    def __init__(self):
        self.p = nnx.Param(ones(3, 3))
        self.array = ones(3, 3)


SPELLINGS = [
    0,
    nnx.StateAxes({...: 0}),
    nnx.StateAxes({nnx.Param: 0, ...: 0}),
    nnx.StateAxes({"array": 0, nnx.Not("array"): 0}),
    nnx.StateAxes({nnx.PathContains("p"): 0, ...: 0}),
]


@pytest.mark.parametrize("second", SPELLINGS[1:], ids=repr)
@pytest.mark.parametrize("first", SPELLINGS[:2], ids=repr)
def test_equal_treatments_spelled_differently(first, second):
    m = Holder()
    result = nnx.vmap(lambda a, b: a.p[...] + b.array, in_axes=(first, second))(m, m)
    assert_trees_equal(result, ones(3, 3) * 2)


@pytest.mark.parametrize(
    "second", [1, None, nnx.StateAxes({nnx.Param: 0, ...: None}), nnx.StateAxes({nnx.Param: None, ...: 0})], ids=repr
)
def test_another_treatment_of_any_leaf_is_an_alias(second):
    m = Holder()
    with pytest.raises(AliasError, match=r"Holder is reached twice with different treatment:\n  args\[0\]: axis 0"):
        nnx.vmap(lambda a, b: None, in_axes=(0, second))(m, m)


def test_aux_of_any_kind():
    for lib in LIBS:
        for aux in ({1, 2}, "text", None, {"k": (1, {2})}):
            (_, got), _ = lib.value_and_grad(lambda m, aux=aux: (m(X), aux), has_aux=True)(tied(lib))
            assert got == aux
