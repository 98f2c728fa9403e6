"""LoRA: its formula, flax.nnx as oracle bit for bit, what is trained, and its errors."""

import inspect

import flax.nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import nnx_core as nnx
from tests.support.arrays import noise
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import equations

X = noise(5, 2, 6, 3)
F32, BF16 = jnp.float32, jnp.bfloat16
RANDOM = nnx.initializers.normal(1.0)

MAKE = {
    "LoRA": lambda lib, rngs, dtype=None, param_dtype=F32: lib.LoRA(
        3, 2, 4, dtype=dtype, param_dtype=param_dtype, b_initializer=RANDOM, rngs=rngs
    ),
    "LoRA-base": lambda lib, rngs, dtype=None, param_dtype=F32: lib.LoRA(
        3,
        2,
        4,
        base_module=lib.Linear(3, 4, dtype=dtype, rngs=rngs),
        dtype=dtype,
        param_dtype=param_dtype,
        b_initializer=RANDOM,
        rngs=rngs,
    ),
    "LoRALinear": lambda lib, rngs, dtype=None, param_dtype=F32: lib.LoRALinear(
        3, 4, lora_rank=2, lora_dtype=dtype, lora_param_dtype=param_dtype, b_initializer=RANDOM, rngs=rngs
    ),
    "LoRALinear-half": lambda lib, rngs, dtype=None, param_dtype=F32: lib.LoRALinear(
        3, 4, lora_rank=2, dtype=dtype, param_dtype=param_dtype, use_bias=False, b_initializer=RANDOM, rngs=rngs
    ),
}


def functional(lib, make, **dtypes):
    """(values, function of values and input) of the layer."""
    graphdef, state = lib.split(make(lib, lib.Rngs(3), **dtypes))
    values = {path: v[...] for path, v in lib.to_flat_state(state)}

    def loss(values, x):
        leaves = [(path, v.replace(values[path])) for path, v in lib.to_flat_state(state)]
        y = lib.merge(graphdef, lib.from_flat_state(leaves))(x)
        return (y.astype(F32) * jnp.cos(jnp.arange(y.size, dtype=F32)).reshape(y.shape)).sum(), y

    return values, jax.grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("inputs", "dtype", "param_dtype"), [(F32, None, F32), (F32, BF16, F32), (BF16, None, BF16), (F32, None, BF16)]
)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_bits_and_program_are_those_of_flax_nnx(make, inputs, dtype, param_dtype):
    x = X.astype(inputs)
    values, ours = functional(nnx, make, dtype=dtype, param_dtype=param_dtype)
    expected, theirs = functional(flax.nnx, make, dtype=dtype, param_dtype=param_dtype)
    assert_trees_equal(values, expected)  # the same keys, in the same order
    compare = assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close
    compare(jax.jit(ours)(values, x), jax.jit(theirs)(values, x))
    assert equations(jax.make_jaxpr(ours)(values, x).jaxpr) <= equations(jax.make_jaxpr(theirs)(values, x).jaxpr)


@pytest.mark.parametrize("name", ["LoRA", "LoRALinear"])
def test_names_are_those_of_flax_nnx(name):
    for method in ("__init__", "__call__"):
        ours, theirs = (
            [
                (p.name, p.kind, getattr(p.default, "__name__", p.default))
                for p in inspect.signature(getattr(getattr(lib, name), method)).parameters.values()
            ]
            for lib in (nnx, flax.nnx)
        )
        assert ours == theirs
    ours, theirs = MAKE[name](nnx, nnx.Rngs(0)), MAKE[name](flax.nnx, flax.nnx.Rngs(0))
    assert {attribute for attribute in vars(theirs) if not attribute.startswith("_")} <= set(vars(ours))
    assert issubclass(nnx.LoRAParam, nnx.Param)


def test_formula():
    # Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3, with alpha / rank = 1.
    base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer = nnx.LoRA(3, 2, 4, base_module=base, b_initializer=RANDOM, rngs=nnx.Rngs(1))
    a, b = layer.lora_a[...], layer.lora_b[...]
    assert (a.shape, b.shape) == ((3, 2), (2, 4))
    assert_trees_close(layer(X), base(X) + (X @ a) @ b)
    linear = nnx.LoRALinear(3, 4, lora_rank=2, b_initializer=RANDOM, rngs=nnx.Rngs(1))
    kernel = linear.kernel[...] + linear.lora.lora_a[...] @ linear.lora.lora_b[...]
    assert_trees_close(linear(X), X @ kernel + linear.bias[...])


def test_zero_at_the_start():
    base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert_trees_equal(nnx.LoRA(3, 2, 4, base_module=base, rngs=nnx.Rngs(1))(X), base(X))
    assert_trees_equal(nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(1))(X), jnp.zeros((2, 6, 4)))
    assert_trees_equal(nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))(X), base(X))


def test_training_the_addition_alone():
    layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    before = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(layer))}
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(layer, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(layer, nnx.grad(lambda m: ((m(X) - 1) ** 2).mean(), argnums=wrt)(layer))

    for _ in range(2):
        step(layer, optimizer)
    moved = {path for path, v in nnx.to_flat_state(nnx.state(layer)) if (v[...] != before[path]).any()}
    assert moved == {("lora", "lora_a"), ("lora", "lora_b")}


def test_a_state_of_linear_fits():
    linear = nnx.Linear(3, 4, rngs=nnx.Rngs(7))
    layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(linear))
    assert_trees_equal(layer(X), linear(X))


def test_keywords_and_functions_of_the_base():
    class Scaled(nnx.Module):
        def __call__(self, x, *, factor):
            return x[..., :1] * factor

    layer = nnx.LoRA(3, 2, 4, base_module=Scaled(), rngs=nnx.Rngs(0))
    assert_trees_equal(layer(X, factor=2.0), jnp.broadcast_to(X[..., :1] * 2, (2, 6, 4)))
    layer = nnx.LoRA(3, 2, 3, base_module=jnp.sin, rngs=nnx.Rngs(0))
    assert_trees_equal(layer(X), jnp.sin(X))
    assert_trees_equal(nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0))(X, factor=2.0), jnp.zeros((2, 6, 4)))


def test_type_metadata_and_promotion():
    class Low(nnx.Param):
        pass

    seen = []

    def promote(args, *, dtype):
        seen.append((len(args), dtype))
        return args

    options = {"lora_param_type": Low, "a_metadata": {"a": 1}, "b_metadata": {"b": 2}, "rngs": nnx.Rngs(0)}
    for layer, call in (
        ((inner := nnx.LoRA(3, 2, 4, dtype=F32, promote_dtype=promote, **options)), inner),
        (
            (outer := nnx.LoRALinear(3, 4, lora_rank=2, lora_dtype=F32, lora_promote_dtype=promote, **options)).lora,
            outer,
        ),
    ):
        assert (type(layer.lora_a), type(layer.lora_b)) == (Low, Low)
        assert (layer.lora_a.get_metadata()["a"], layer.lora_b.get_metadata()["b"]) == (1, 2)
        call(X)
        assert seen.pop() == (3, F32)


def test_an_ensemble():
    @nnx.vmap(in_axes=0, out_axes=0)
    def many(key):
        return nnx.LoRALinear(3, 4, lora_rank=2, b_initializer=RANDOM, rngs=nnx.Rngs(key))

    layers = many(jax.random.split(jax.random.key(0), 5))
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, X)
    kernels = layers.kernel[...] + layers.lora.lora_a[...] @ layers.lora.lora_b[...]
    assert_trees_close(ys, jnp.einsum("bti,nio->nbto", X, kernels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5))),
            r"LoRA at LoRA:\n  expected an input of shape \(\.\.\., 3\)\n  found    shape \(2, 5\)",
        ),
        (
            lambda: nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0))(jnp.ones(())),
            r"LoRA at LoRA:\n  expected an input of shape \(\.\.\., 3\)\n  found    shape \(\)",
        ),
        (
            lambda: nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))(jnp.ones((2, 5))),
            r"LoRALinear at LoRALinear:\n  expected an input of shape \(\.\.\., 3\)\n  found    shape \(2, 5\)",
        ),
        (
            lambda: nnx.LoRA(3, 0, 4, rngs=nnx.Rngs(0)),
            r"LoRA\(\.\.\., lora_rank=.*\n  expected a positive integer\n  found    0",
        ),
        (
            lambda: nnx.LoRA(3, 2, 4, base_module=nnx.Module(), rngs=nnx.Rngs(0)),
            r"LoRA\(\.\.\., base_module=.*\n  expected something to call\n  found    Module",
        ),
        (lambda: nnx.LoRA(3, 2, 4, rngs=None), r"LoRA\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None"),
        (
            lambda: nnx.LoRALinear(3, 4, lora_rank=2, rngs=None),
            r"LoRALinear\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None",
        ),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
