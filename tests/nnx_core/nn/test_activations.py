"""Activations against Linen's and against their formulas in float64; PReLU's options."""

import inspect

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from scipy import special

import nnx_core as nnx
from nnx_core.nn import activations, initializers
from tests.tolerance import assert_trees_close, assert_trees_equal

X = np.array([[-7.0, -3.0, -1.2, -0.4], [0.0, 0.3, 2.5, 6.5]])
SELU = (1.0507009873554805, 1.6732632423543772)  # scale, alpha (Klambauer et al. 2017)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


FORMULAS = {
    "celu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "glu": lambda x: x[..., :2] * special.expit(x[..., 2:]),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "identity": lambda x: x,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "log_sigmoid": special.log_expit,
    "log_softmax": lambda x: np.log(softmax(x)),
    "logsumexp": special.logsumexp,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: SELU[0] * np.where(x > 0, x, SELU[1] * np.expm1(x)),
    "sigmoid": special.expit,
    "silu": lambda x: x * special.expit(x),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "softmax": softmax,
    "softplus": lambda x: np.logaddexp(x, 0),
    "standardize": lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "swish": lambda x: x * special.expit(x),
    "tanh": np.tanh,
}


def test_every_activation_has_a_formula():
    assert set(FORMULAS) | {"PReLU", "one_hot"} == set(activations.__all__)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    assert_trees_close(getattr(nnx, name)(jnp.asarray(X, jnp.float32)), FORMULAS[name](X))


def test_one_hot():
    expected = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], np.float32)
    assert_trees_equal(nnx.one_hot(jnp.array([0, 2, 5]), 4), expected)


def public_functions(library):
    return {name: f for name, f in vars(library).items() if inspect.isfunction(f) or hasattr(f, "__wrapped__")}


def test_every_activation_of_linen_and_flax_nnx_is_the_same_function():
    """The names in flax's libraries that are functions of jax, wherever they come from."""
    for library in (linen, flax.nnx):
        theirs = {
            name: f
            for name, f in public_functions(library).items()
            if getattr(f, "__module__", "").startswith("jax.") and hasattr(jax.nn, name)
        }
        assert len(theirs) > 20
        same = {name for name, f in theirs.items() if getattr(nnx, name, None) is f}
        assert same | {"dot_product_attention", "normalize"} >= set(theirs)  # no activations


# Types, and what flax.nnx has beside each layer that uses it.
ELSEWHERE = {"DtypeLikeInexact", "Initializer", "default_bias_init", "default_embed_init", "default_kernel_init"}


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", sorted(set(initializers.__all__) - ELSEWHERE))
def test_initializer_gives_the_values_of_flax_nnx(name):
    assert_trees_equal(drawn(getattr(initializers, name)), drawn(getattr(flax.nnx.initializers, name)))


def drawn(init):
    """Values of an initializer, or of what makes one, for a kernel of a convolution."""
    arguments = (jax.random.key(3), (3, 3, 4, 4), jnp.float32)
    first = next(iter(inspect.signature(init).parameters), None)
    if first == "key":
        return init(*arguments)
    required = {"value": 0.5, "scale": 2.0, "mode": "fan_avg", "distribution": "uniform"}
    parameters = inspect.signature(init).parameters.values()
    return init(**{p.name: required[p.name] for p in parameters if p.default is p.empty})(*arguments)


# ---- PReLU -----------------------------------------------------------------------------------------------------


def test_prelu_of_integers_and_its_options():
    layer = nnx.PReLU(0.5, param_dtype=jnp.bfloat16, negative_slope_metadata={"a": 1})
    assert (layer.negative_slope.dtype, layer.negative_slope.a) == (jnp.bfloat16, 1)
    assert_trees_equal(nnx.PReLU(0.5)(jnp.array([-4, 2])), jnp.array([-2.0, 2.0]))
    assert nnx.PReLU(dtype=jnp.float16)(jnp.ones(2)).dtype == jnp.float16


def test_prelu_gradient_with_respect_to_the_slope():
    grads = nnx.grad(lambda layer, x: layer(x).sum())(nnx.PReLU(), jnp.array([-4.0, 0.0, -1.0, 2.0]))
    assert_trees_equal(grads["negative_slope"][...], jnp.array(-5.0))
