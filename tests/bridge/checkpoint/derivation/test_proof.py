"""No mapping without a proof: the right one is found where the first guess is wrong, or there is an error."""

import tomllib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.derivation.derive import UnprovenDerivationError, UnsureDerivationWarning, derive, prove
from bridge.checkpoint.derivation.forward import ForwardMismatchError, compare_forward
from bridge.checkpoint.rules.apply import Rules
from bridge.variables.mapping import tree_of
from tests.support.derive_cases import check, located, random_variables
from tests.support.derive_pairs import RIGHT, SHIFTED, TIED, WRONG
from tests.tolerance import assert_trees_close, assert_trees_equal


def by_location(values):
    return dict(sorted(values.items()))


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_mapping_is_found(name):
    """`check` runs both models on numbers of its own, and the way back; the rules of a file do the same."""
    pair = RIGHT[name]
    derived = check(pair.linen, pair.make, *pair.inputs, same_bits=False)
    assert pair.says in str(derived)
    assert derived.proof is not None
    assert derived.unproven == ""
    values = random_variables(pair.linen, *pair.inputs)
    rules = Rules.from_table(tomllib.loads(derived.to_toml()))
    made = rules.convert(values)
    assert_trees_equal(by_location(made), by_location(derived.convert(values)))
    assert_trees_equal(by_location(rules.inverse().convert(made)), by_location(values))


@pytest.mark.slow
def test_a_norm_of_one_plus_scale():
    derived = derive(SHIFTED.linen, SHIFTED.make, *SHIFTED.inputs)
    assert str(derived).count(", +1") == 2
    values = random_variables(SHIFTED.linen, *SHIFTED.inputs)
    made = derived.convert(values)
    model = SHIFTED.make(nnx.Rngs(0))
    for at, variable in located(model).items():
        variable.set_value(jax.numpy.asarray(made[at]))
    expected = SHIFTED.linen.apply(tree_of(values.items()), *SHIFTED.inputs)
    assert_trees_close(model(*SHIFTED.inputs), expected)
    assert_trees_close(by_location(derived.inverse().convert(made)), by_location(values))
    assert "add = 1.0" in derived.to_toml()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_models_that_differ_are_refused(name):
    pair = WRONG[name]
    with pytest.raises(UnprovenDerivationError, match=f"(?s)not compute the same under any.*{pair.says}") as error:
        derive(pair.linen, pair.make, *pair.inputs)
    assert "do not compute the same" in error.value.derived.unproven
    with pytest.warns(UnsureDerivationWarning, match="not proven"):
        assert derive(pair.linen, pair.make, *pair.inputs, unproven=True).unproven


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_what_no_output_tells_apart_asks_for_a_rule(name):
    pair = TIED[name]
    with pytest.raises(UnprovenDerivationError, match=f"(?s)as good either way.*{pair.says}.*rename="):
        derive(pair.linen, pair.make, *pair.inputs)
    with pytest.warns(UnsureDerivationWarning, match=pair.says):
        assert derive(pair.linen, pair.make, *pair.inputs, unproven=True).unproven


def test_the_proof_says_what_it_has_compared():
    pair = RIGHT["axial embeddings"]
    derived = derive(pair.linen, pair.make, jax.ShapeDtypeStruct((2, 4, 4, 8), "float32"))
    assert derived.exchanged == (("col", "across"), ("row", "down"))
    assert "col -> across: against the order of calls\n" in str(derived)
    assert derived.proof.seeds == (0, 1, 2)
    assert (derived.proof.outputs, derived.proof.gradients) == (1, 4)
    assert derived.proof.worst <= 1
    assert derived.to_toml().startswith("# proven: 1 outputs and 4 gradients on 3 draws of random numbers agree, ")
    assert derived.inverse().proof is derived.proof


@pytest.mark.slow
def test_rules_that_somebody_wrote_are_proven_too():
    pair = RIGHT["towers"]
    derived = derive(pair.linen, pair.make, *pair.inputs)
    rules = Rules.from_table(tomllib.loads(derived.to_toml()))
    for right in (rules, derived, derived.inverse()):
        assert str(prove(pair.linen, pair.make, right, *pair.inputs)).startswith(
            "proven: 1 outputs and 12 gradients on 3"
        )
    with pytest.warns(UnsureDerivationWarning):
        wrong = derive(pair.linen, pair.make, *pair.inputs, check=False).rules()
    with pytest.raises(UnprovenDerivationError, match=r"(?s)under these rules.*output: off by .*gradient of params/"):
        prove(pair.linen, pair.make, wrong, *pair.inputs)


def test_a_loop_without_gradients_is_proven_by_its_outputs():
    pair = RIGHT["axial embeddings"]

    def looped(module, x):
        return jax.lax.while_loop(lambda y: jnp.abs(y).max() < 0, lambda y: y, module(x))

    with pytest.raises(UnprovenDerivationError, match="output: off by"):  # and without gradients nothing is looked for
        derive(pair.linen, pair.make, *pair.inputs, method=looped)
    proof = derive(pair.linen, pair.make, *pair.inputs, method=looped, rename={"row": "down", "col": "across"}).proof
    assert proof.gradients == 0
    assert "gradients were not compared: ValueError: Reverse-mode" in str(proof)


class Statistics(nn.Module):
    """A norm with statistics, and a head that the call leaves alone."""

    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            nn.Dense(2, name="aside")(x)
        return nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3, name="up")(x))


class NativeStatistics(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.aside = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


def test_a_proof_names_what_it_does_not_cover():
    proof = derive(Statistics(), NativeStatistics, jax.ShapeDtypeStruct((5, 4), "float32")).proof
    assert "2 arrays of state on 3 draws" in str(proof)
    assert "not all compared" not in str(proof)
    assert "no output depends on" in str(proof)
    assert "params/aside/kernel" in str(proof)


def test_what_a_call_writes_is_part_of_the_proof():
    class Slower(NativeStatistics):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

    class Late(NativeStatistics):
        def __call__(self, x):
            y = super().__call__(x)
            self.norm.mean.set_value(self.norm.mean.get_value() + 1e-2)
            return y

    x = jax.ShapeDtypeStruct((5, 4), "float32")
    for other in (Slower, Late):
        with pytest.raises(UnprovenDerivationError, match="the call writes batch_stats/norm/mean: off by"):
            derive(Statistics(), other, x)


def test_ids_are_drawn_as_far_as_the_table_reaches():
    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(7, 3, name="table")(ids)

    class NativeLookup(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(7, 3, rngs=rngs)

        def __call__(self, ids):
            # Wrong in the last row alone.
            return self.table(ids) * jnp.where(ids == 6, 2.0, 1.0)[..., None]

    ids = jax.ShapeDtypeStruct((20,), "int32")
    with pytest.raises(UnprovenDerivationError, match="output: off by"):
        derive(Lookup(), NativeLookup, ids)
    with pytest.raises(ForwardMismatchError):
        compare_forward(Lookup(), NativeLookup, Rules.from_rename({}), ids)
