"""The two models of `linen-nnx compare`: with which values each is compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import VariablesMismatchError
from bridge.cli.sides import Source, any_two, linen_and_nnx
from tests.support import checkpoint_run
from tests.tolerance import assert_trees_close, assert_trees_equal

HERE = __name__
RUN = "tests.support.checkpoint_run"
SHAPE = jax.ShapeDtypeStruct((8, 5), "float32")


class Dense(nn.Module):
    """Of two layers, without names."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


class Renamed(nn.Module):
    """The same with names."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(4, name="hidden")(x)))


class Native(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))

    def encode(self, x):
        return self.hidden(x)


class Later(Native):
    """The same again."""


class Other(nnx.Module):
    """With another name."""

    def __init__(self, rngs):
        self.first, self.out = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.first(x)))


def fresh_linen():
    return Dense()


def trained_pair():
    variables = Dense().init(jax.random.key(3), jnp.ones((1, 5)))
    return Dense(), variables


def trained_native():
    return Native(rngs=nnx.Rngs(7))


def fresh_native(rngs):
    return Native(rngs)


def twice(x):
    return 2 * x


TEXT = "neither"


def source(**given):
    return Source(**{"inputs": (SHAPE,), "keywords": {}, "methods": ("__call__", "__call__"), **given})


def outputs(sides, x=None):
    """What both models give on the same numbers."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)).astype("float32")) if x is None else x
    return [run(side, x) for side in (sides.a, sides.b)]


def run(side, x):
    return side.model.apply(side.variables, x) if side.is_linen else side.model(x)


def leaves_of(side):
    return side.variables if side.is_linen else nnx.to_pure_dict(nnx.state(side.model))


def test_linen_values_go_to_nnx_and_are_random_everywhere():
    sides = linen_and_nnx(f"{HERE}:Dense", f"{HERE}:Native", source())
    assert_trees_close(*outputs(sides))
    bias = sides.a.variables["params"]["Dense_1"]["bias"]
    assert len(np.unique(bias)) == bias.size, "as Linen makes them, biases are zeros and say nothing"
    assert_trees_equal(sides.b.model.hidden.bias[...], bias)
    assert sides.notes == (
        "values: random ones near those that init makes, seed 0",
        "rules: derived from both models and proven on random numbers",
    )


def test_a_checkpoint_has_the_values(tmp_path):
    path = checkpoint_run.save(checkpoint_run.linen_state(2), tmp_path / "ck", "orbax")
    rules = tmp_path / "rules.toml"
    rules.write_text(checkpoint_run.RULES)
    sides = linen_and_nnx(f"{RUN}:Net", f"{RUN}:Native", source(checkpoint=path, rules=rules))
    assert_trees_equal(sides.a.variables["params"], checkpoint_run.linen_state(2).params)
    assert_trees_equal(sides.a.variables["batch_stats"], checkpoint_run.linen_state(2).batch_stats)
    assert_trees_equal(sides.b.model.first.kernel[...], checkpoint_run.linen_state(2).params["dense"]["kernel"])
    assert sides.notes == (f"values: those of {path}", f"rules: {rules}")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = checkpoint_run.save({"params": {"dense": {"kernel": np.ones((2, 2), "float32")}}}, tmp_path / "ck", "orbax")
    with pytest.raises(VariablesMismatchError, match=r"(?s)missing.*Dense_0/kernel.*unexpected.*dense/kernel"):
        linen_and_nnx(f"{HERE}:Dense", f"{HERE}:Native", source(checkpoint=path))


@pytest.mark.parametrize(
    ("a", "b", "note"),
    [
        ("Dense", "Native", "random ones near those that init makes"),
        ("fresh_linen", "fresh_native", "random ones near those that init makes"),
        ("Native", "Dense", "random ones near those that init makes"),
        ("trained_pair", "Native", f"those of {HERE}:trained_pair"),
        ("trained_native", "Dense", f"those of {HERE}:trained_native"),
        ("Dense", "fresh_linen", f"random ones near those of {HERE}:Dense"),
        ("trained_pair", "Dense", f"those of {HERE}:trained_pair"),
        ("Dense", "trained_pair", f"those of {HERE}:trained_pair"),
        ("Native", "Later", f"random ones near those of {HERE}:Native"),
        ("trained_native", "Later", f"those of {HERE}:trained_native"),
        ("Later", "trained_native", f"those of {HERE}:trained_native"),
    ],
)
def test_a_model_without_values_takes_those_of_the_other(a, b, note):
    sides = any_two(f"{HERE}:{a}", f"{HERE}:{b}", source())
    assert_trees_close(*outputs(sides))
    assert note in sides.notes[0]
    assert (sides.rules is None) == (sides.a.is_linen == sides.b.is_linen)


def test_models_with_values_of_their_own_keep_them():
    sides = any_two(f"{HERE}:trained_pair", f"{HERE}:trained_native", source())
    assert sides.notes[0] == "values: of each model its own"
    assert sides.rules is not None
    assert_trees_equal(leaves_of(sides.a), trained_pair()[1])
    assert_trees_equal(leaves_of(sides.b), nnx.to_pure_dict(nnx.state(trained_native())))


def test_functions_are_taken_as_they_are():
    sides = any_two("jax.nn:relu", f"{HERE}:twice", source())
    assert sides.a.subject is jax.nn.relu
    assert sides.b.subject is twice
    beside = any_two(f"{HERE}:twice", f"{HERE}:Dense", source())
    assert set(beside.b.variables["params"]) == {"Dense_0", "Dense_1"}


def test_nnx_models_of_other_names_are_refused():
    with pytest.raises(VariablesMismatchError, match=r"(?s)missing.*first/kernel.*unexpected.*hidden/kernel"):
        any_two(f"{HERE}:Native", f"{HERE}:Other", source())


@pytest.mark.parametrize(
    ("a", "b", "given", "text"),
    [
        ("Dense", "Renamed", {"rules": "x.toml"}, "--rules lead from a Linen model to an NNX model"),
        ("trained_pair", "Native", {"checkpoint": "x"}, "--checkpoint is for a Linen module without variables"),
        ("TEXT", "Native", {}, "is str; to be compared are Linen modules"),
        ("Dense", "Native", {"inputs": (jax.ShapeDtypeStruct((), "float32"),)}, "cannot be called with these inputs"),
    ],
)
def test_what_cannot_be_honoured_is_wrong_usage(a, b, given, text):
    with pytest.raises(typer.BadParameter, match=text):
        any_two(f"{HERE}:{a}", f"{HERE}:{b}", source(**given))
