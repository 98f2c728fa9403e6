"""Pairs of models of unusual values, and faults planted: dtypes, complex, NaN, several outputs.

Knows models; knows nothing of how they are compared.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import nnx_core as nnx
from tests.support.arrays import noise
from tests.support.pairs.pair import Fault, Pair, Sides, drawn, native, rules, twins

BF16 = jnp.dtype("bfloat16")

# ---- computed in bfloat16, kept in float32 -------------------------------------------------------


class LinenMixed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(dtype=jnp.float32, name="norm")(nn.Dense(8, dtype=BF16, name="up")(x))
        return nn.Dense(3, name="down")(nn.relu(x))


class Mixed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 8, dtype=BF16, rngs=rngs)
        self.norm = nnx.LayerNorm(8, dtype=jnp.float32, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.norm(self.up(x))))


# ---- complex numbers -----------------------------------------------------------------------------


class LinenComplex(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = nn.Dense(4, param_dtype=jnp.complex64, name="turn")(x)
        z = z * self.param("phase", nn.initializers.ones, (4,), jnp.complex64)
        return nn.Dense(2, name="head")(jnp.abs(z))


class Complex(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.turn = nnx.Linear(4, 4, param_dtype=jnp.complex64, rngs=rngs)
        self.phase = nnx.Param(jnp.ones(4, jnp.complex64))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.abs(self.turn(x) * self.phase))


# ---- a variational autoencoder: several outputs, by name; what it sows; integers -----------------


class LinenVAE(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        h = nn.tanh(nn.Dense(5, name="encode")(x))
        self.sow("intermediates", "hidden", h)
        mean, log_variance = nn.Dense(2, name="mean")(h), nn.Dense(2, name="log_variance")(h)
        decoded = nn.Dense(4, name="decode")(mean)
        return {"decoded": decoded, "latent": (mean, log_variance), "code": jnp.argmax(h, axis=-1)}


class VAE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encode, self.decode = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(2, 4, rngs=rngs)
        self.mean, self.log_variance = nnx.Linear(5, 2, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, Any]:
        h = jnp.tanh(self.encode(x))
        self.sow(nnx.Intermediate, "hidden", h)
        mean, log_variance = self.mean(h), self.log_variance(h)
        decoded = self.decode(mean)
        return {"decoded": decoded, "latent": (mean, log_variance), "code": jnp.argmax(h, axis=-1)}


class VAEOfExchangedLatents(VAE):
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        out = super().__call__(x)
        return out | {"latent": out["latent"][::-1]}


class VAEThatSowsLess(VAE):
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        h = jnp.tanh(self.encode(x))
        self.sow(nnx.Intermediate, "hidden", h * 0.5)
        mean, log_variance = self.mean(h), self.log_variance(h)
        decoded = self.decode(mean)
        return {"decoded": decoded, "latent": (mean, log_variance), "code": jnp.argmax(h, axis=-1)}


class VAEWithoutCode(VAE):
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        out = super().__call__(x)
        return {"decoded": out["decoded"], "latent": out["latent"]}


class VAEFromTheOtherLatent(VAE):
    """The decoder gets the variance."""

    def __call__(self, x: jax.Array) -> dict[str, Any]:
        h = jnp.tanh(self.encode(x))
        self.sow(nnx.Intermediate, "hidden", h)
        mean, log_variance = self.mean(h), self.log_variance(h)
        decoded = self.decode(log_variance)
        return {"decoded": decoded, "latent": (mean, log_variance), "code": jnp.argmax(h, axis=-1)}


# ---- not finite ----------------------------------------------------------------------------------


class LinenInfinite(nn.Module):
    """Logarithms of zero and of negative numbers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nn.Dense(4, use_bias=False, name="first")(x)
        return nn.Dense(2, name="second")(y), jnp.log(y)


class Infinite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = self.first(x)
        return self.second(y), jnp.log(y)


class InfiniteButOne(Infinite):
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, log = super().__call__(x)
        return y, jnp.where(jnp.isneginf(log), 0.0, log)


class OneNaN(Infinite):
    """One NaN among numbers."""

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, log = super().__call__(x)
        return y.at[1, 1].set(jnp.nan), log


def _x_with_zeros() -> tuple[jax.Array]:
    return (noise(1, 4, 4).at[0].set(0),)


# ---- a counter that changes what is computed -----------------------------------------------------


class LinenWarm(nn.Module):
    """Its scale grows with the number of calls: the first says nothing of the second."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable("cache", "calls", lambda: jnp.zeros((), jnp.float32))
        y = nn.Dense(3, name="dense")(x) * (1 + calls.value)
        if not self.is_initializing():
            calls.value = calls.value + 1
        return y


class Warm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense, self.calls = nnx.Linear(4, 3, rngs=rngs), nnx.Cache(jnp.zeros(()))

    def scale(self) -> jax.Array:
        return 1 + self.calls[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.dense(x) * self.scale()
        self.calls[...] += 1
        return y


class WarmInOneStep(Warm):
    def scale(self) -> jax.Array:
        return 1 + 2 * self.calls[...]


# ---- a gate that opens for few inputs only -------------------------------------------------------


class LinenThreshold(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="dense")(x)


class Threshold(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


class ThresholdForSomeInputs(Threshold):
    """Wrong where the first number is above 1.5, which few normal numbers are."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        return jnp.where(x[:, :1] > 1.5, y + 1, y)


# ---- a method that is no call --------------------------------------------------------------------


class LinenTwoMethods(nn.Module):
    def setup(self) -> None:
        self.encoder, self.decoder = nn.Dense(3), nn.Dense(4)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.encoder(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encode(x))


class TwoMethods(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder, self.decoder = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

    def embed(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.encoder(x))


def _methods(make: Any = None) -> Sides:
    """A method under another name on the other side, which leaves half of the parameters unused."""
    module, inputs = LinenTwoMethods(), _x()
    variables = drawn(module, *inputs)
    how = rules()
    model = native(make or TwoMethods, how, variables)
    return Sides((module, variables), model, inputs, {"rules": how, "method": ("encode", "embed")})


def _x() -> tuple[jax.Array]:
    return (noise(1, 5, 4),)


def _form_of_x() -> tuple[Any]:
    return (jax.ShapeDtypeStruct((64, 4), jnp.float32),)


PAIRS = (
    twins("bfloat16 on float32", LinenMixed, Mixed, _x, layers={"norm": "norm"}),
    twins("complex", LinenComplex, Complex, _x, layers={"turn": "turn", "head": "head"}),
    twins(
        "several outputs, and what is sown", LinenVAE, VAE, _x,
        layers={"mean": "mean", "decode": "decode"},
    ),
    twins(
        "not finite on both sides", LinenInfinite, Infinite, _x_with_zeros,
        layers={"second": "second"},
    ),
    twins(
        "a counter", LinenWarm, Warm, _x, layers={"dense": "dense"}, left_out=("rounding",),
        steps=3, tx=optax.sgd(0.1),
    ),
    twins(
        "inputs by their shape", LinenThreshold, Threshold, _form_of_x, layers={"dense": "dense"},
    ),
    Pair("other methods than the call", _methods, {"encoder": "encoder"}),
)  # fmt: skip


# ---- faults --------------------------------------------------------------------------------------


def _norm_in_half(model: Mixed) -> None:
    model.norm.dtype = BF16


def _full_precision(model: Mixed) -> None:
    model.up.dtype = jnp.float32


def _conjugated(model: Complex) -> None:
    model.phase.set_value(jnp.conj(model.phase[...] + 0.5j))


def _half_weights(model: Mixed) -> None:
    """Parameters rounded on their way: less than bfloat16 shows, and still not the same values."""
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Param):
            x.set_value(x[...].astype(BF16))


def _far_away(model: TwoMethods) -> None:
    model.encoder.bias.set_value(model.encoder.bias[...] + 1e-2)


FAULTS = (
    Fault(
        "a norm in bfloat16", "bfloat16 on float32", "norm", "norm", "dtype", _norm_in_half,
        finding="structure",
    ),
    Fault("a product in float32", "bfloat16 on float32", "up", "up", "dtype", _full_precision),
    Fault(
        "parameters of another dtype", "bfloat16 on float32", "up", "up", "dtype parameters",
        _half_weights, also=("norm", "down"), finding="parameter",
    ),
    Fault(
        "a complex parameter", "complex", "", "", "parameters", _conjugated, finding="parameter",
        behind=("head",),
    ),
    Fault(
        "outputs exchanged in a dict", "several outputs, and what is sown", "", "",
        "computation order", model=VAEOfExchangedLatents,
    ),
    Fault(
        "another value is sown", "several outputs, and what is sown", "", "", "state",
        model=VAEThatSowsLess, finding="state",
    ),
    Fault(
        "an output that is not there", "several outputs, and what is sown", "", "", "structure",
        model=VAEWithoutCode, finding="structure",
    ),
    Fault(
        "a decoder that gets the other latent", "several outputs, and what is sown", "", "",
        "computation order", model=VAEFromTheOtherLatent, behind=("decode",),
    ),
    Fault(
        "a zero in place of an infinity", "not finite on both sides", "", "", "computation",
        model=InfiniteButOne,
    ),
    Fault("one NaN", "not finite on both sides", "", "", "computation", model=OneNaN),
    Fault(
        "wrong from the second step on", "a counter", "", "", "training", model=WarmInOneStep,
        finding="loss",
    ),
    Fault(
        "wrong for a few inputs", "inputs by their shape", "", "", "computation",
        model=ThresholdForSomeInputs,
    ),
    Fault(
        "a wrong bias behind another method", "other methods than the call", "encoder", "encoder",
        "parameters", _far_away,
    ),
)  # fmt: skip
