"""Models whose variables cannot all be paired: what the errors say, and what helps."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import VariablesMismatchError
from bridge.checkpoint.derivation.derive import DerivationError, UnknownPathError, derive
from bridge.demo.linen_model import Cnn
from bridge.demo.native_model import DigitsNet
from tests.support.derive_cases import Chain, NestedCalls, X, check, located, random_variables, reads
from tests.tolerance import assert_trees_equal


class Wide(nnx.Module):
    width = 6

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(4, self.width, rngs=rngs), nnx.Linear(self.width, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.fc1(x))


def mlp(*widths):
    return nn.Sequential([nn.Dense(width) for width in widths])


@pytest.mark.parametrize(
    ("linen", "counts", "text"),
    [
        (
            mlp(5, 3),
            (4, 4),
            r"layers_0/kernel float32\[4, 5\], of Dense, call 1; nearest: params/fc1/kernel float32\[4, 6\]",
        ),
        (mlp(3), (2, 4), r"params/fc2/bias float32\[3\], of Linear, call 2"),
        (mlp(6, 3, 2), (2, 0), r"2 of Linen.*params/layers_2/bias float32\[2\], of Dense, call 3"),
    ],
    ids=["width", "missing", "extra"],
)
def test_models_that_differ(linen, counts, text):
    with pytest.raises(DerivationError, match=f"(?s){text}.*say what is what") as error:
        derive(linen, Wide, X)
    assert (len(error.value.linen), len(error.value.nnx)) == counts


def test_the_error_says_what_to_write():
    with pytest.raises(DerivationError) as error:
        derive(mlp(5, 3), Wide, X)
    assert """derive(..., rename={'layers_0': 'fc1'}), or in a rules file (--rules):
  [[rule]]
  from = "*/layers_0/**"
  to = "*/fc1/**"
""" in str(error.value)
    assert "rename={'layers_0': None}) drops" in str(error.value)
    assert "fresh=['fc1']) leaves" in str(error.value)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k = nn.Dense(4, name="query")(x), nn.Dense(4, name="key")(x)
        return nn.softmax(q @ k.mT)


class NnxAttention(nnx.Module):
    """Calls the key first."""

    def __init__(self, rngs):
        self.query, self.key = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        k = self.key(x)
        return nnx.softmax(self.query(x) @ k.mT)


def test_names_against_the_order_of_calls():
    text = r"(?s)2 ambiguous.*query \(Dense\): by the order of calls it is key, by its name query"
    with pytest.raises(DerivationError, match=text):
        derive(Attention(), NnxAttention, X)
    check(Attention(), NnxAttention, X, options={"rename": {"query": "query"}})


class Twins(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("a", nn.initializers.ones, (4,)) + self.param("b", nn.initializers.ones, (4,))


class NnxTwins(nnx.Module):
    def __init__(self, rngs):
        self.u, self.v = nnx.Param(jnp.ones(4)), nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return x * self.u + self.v


def test_parameters_alike_with_other_names():
    with pytest.raises(DerivationError, match="2 of Linen, 2 of NNX"):
        derive(Twins(), NnxTwins, X)
    check(Twins(), NnxTwins, X, options={"rename": {"a": "u"}})


class Crossed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("u", nn.initializers.ones, (4,)) + self.param("v", nn.initializers.ones, (1,))


class NnxCrossed(nnx.Module):
    def __init__(self, rngs):
        self.u, self.v = nnx.Param(jnp.ones(1)), nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return x * self.v + self.u


def test_names_against_shapes():
    text = r"(?s)params/u float32\[4\]: by its shape it is params/v float32\[4\], by its name params/u"
    with pytest.raises(DerivationError, match=text) as error:
        derive(Crossed(), NnxCrossed, X)
    assert {(doubt.linen, doubt.nnx) for doubt in error.value.ambiguous} == {(("u",), ("v",)), (("v",), ("u",))}
    check(Crossed(), NnxCrossed, X, options={"rename": {"u": "v"}})


def test_leaves_that_do_not_fit():
    derived = derive(NestedCalls(), Chain, X)
    values = random_variables(NestedCalls(), X)
    del values["params", "Dense_0", "bias"]
    values["params", "extra"] = jnp.ones(1)
    values["params", "Dense_1", "bias"] = jnp.ones(9)
    values["intermediates", "x"] = jnp.ones(1)
    with pytest.raises(VariablesMismatchError, match="1 missing, 1 unexpected, 1 wrong shape"):
        derived.apply(reads(values))


@pytest.mark.slow
def test_a_collection_may_be_left_out_as_a_whole():
    x = jnp.ones((1, 8, 8, 1))
    derived = derive(Cnn(), lambda rngs: DigitsNet(rngs=rngs), x, train=False)
    params = {at: x for at, x in random_variables(Cnn(), x, train=False).items() if at[0] == "params"}
    assert {at[0] for at in derived.apply(reads(params)).made} == {"params"}


def test_nothing_is_changed_and_nothing_computed():
    model = Chain(nnx.Rngs(0))
    before = nnx.state(model)
    derive(NestedCalls(), model, jax.ShapeDtypeStruct((1, 4), "float32"))
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(before))
    assert type(model) is Chain
    assert not any(x.get_metadata() for x in located(model).values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rename": {"Dense_7": "first"}}, r"(?s)Dense_7: not in the Linen model.*Dense_0"),
        ({"rename": {"Dense_0": "frist"}}, r"(?s)frist: not in the NNX model.*there are first"),
        ({"fresh": ["first", "first/bias"]}, r"(?s)first/bias: not in the NNX model.*another entry has it already"),
    ],
    ids=["linen", "nnx", "twice"],
)
def test_paths_that_there_are_not(options, text):
    with pytest.raises(UnknownPathError, match=text):
        derive(NestedCalls(), Chain, X, **options)


class ChainAndMore(Chain):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.aux = nnx.Linear(4, 4, rngs=rngs)


def test_only_what_is_never_called_is_left():
    with pytest.raises(DerivationError, match="2 of NNX") as error:
        derive(NestedCalls(), ChainAndMore, X)
    assert error.value.nnx == (("params", "aux", "bias"), ("params", "aux", "kernel"))
    assert "fresh=['aux']" in str(error.value)


def test_a_long_list_is_cut():
    with pytest.raises(DerivationError, match=r"\.\.\. and 56 more"):
        derive(mlp(*range(1, 49)), Chain, X)
