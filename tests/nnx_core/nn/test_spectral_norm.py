"""SpectralNorm against Linen's and flax.nnx's, when it writes and when not, and its errors."""

import inspect
from dataclasses import replace

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import nnx_core as nnx
from tests.layer_rows.norms import ROWS
from tests.support.arrays import noise
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

DENSE = next(row for row in ROWS if row.name == "SpectralNorm")
X = noise(5, 2, 4)


def make(lib=nnx, **options):
    rngs = lib.Rngs(0)
    return lib.SpectralNorm(lib.Linear(4, 3, rngs=rngs), rngs=rngs, **options)


@pytest.mark.parametrize("options", [{"n_steps": 3}, {"epsilon": 1e-2}], ids=str)
def test_option(options):
    row = replace(
        DENSE,
        make=lambda lib, rngs, **d: lib.SpectralNorm(lib.Linear(4, 5, rngs=rngs, **d), rngs=rngs, **options, **d),
        twin=lambda **d: linen.SpectralNorm(linen.Dense(5, **d), **options, **d),
    )
    assert_equal_to_twin(row, train=True)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["none", "bfloat16"])
@pytest.mark.parametrize(("kernel", "u"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)])
def test_dtypes_that_differ(dtype, kernel, u):
    row = replace(
        DENSE,
        make=lambda lib, rngs: lib.SpectralNorm(lib.Linear(4, 5, rngs=rngs), dtype=dtype, rngs=rngs),
        twin=lambda: linen.SpectralNorm(linen.Dense(5), dtype=dtype),
    )
    values = {path: value.astype(kernel if "params" in path else u) for path, value in DENSE.variables().items()}
    ours, theirs = (jax.jit(f(train=True))(values, row.example()) for f in (row.functional, row.functional_twin))
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def test_names_and_initial_values_are_those_of_flax_nnx():
    for method in ("__init__", "__call__"):
        ours, theirs = (
            [
                (p.name, p.kind, p.default)
                for p in inspect.signature(getattr(lib.SpectralNorm, method)).parameters.values()
            ]
            for lib in (nnx, flax.nnx)
        )
        assert ours == theirs
    ours, theirs = make(nnx, param_dtype=jnp.bfloat16), make(flax.nnx, param_dtype=jnp.bfloat16)
    assert {name for name in vars(theirs) if not name.startswith("_")} <= set(vars(ours))
    for name in ("u", "sigma"):
        assert_trees_equal(ours.batch_stats["kernel"][name][...], theirs.batch_stats["kernel", name][...])


def test_the_singular_value_is_found():
    layer = make(n_steps=5)
    kernel = layer.layer_instance.kernel[...]
    for _ in range(20):
        y = layer(X)
    sigma = np.linalg.norm(np.asarray(kernel, np.float64), ord=2)
    assert_trees_close(layer.batch_stats["kernel"]["sigma"][...], sigma)
    assert_trees_close(y, X @ (kernel / sigma))


def test_a_kernel_of_zeros_is_divided_by_one():
    layer = make()
    layer.layer_instance.kernel[...] = jnp.zeros((4, 3))
    assert_trees_equal(layer(X), jnp.zeros((2, 3)))


def test_what_is_divided():
    class Mixed(nnx.Module):
        def __init__(self):
            self.scalar = nnx.Param(jnp.float32(2))
            self.vector = nnx.Param(jnp.arange(3.0))
            self.tensor = nnx.Param(jnp.arange(12.0).reshape(2, 2, 3))
            self.buffer = nnx.BatchStat(jnp.ones((2, 2)))

        def __call__(self, x):
            return x, self.scalar[...], self.vector[...], self.tensor[...], self.buffer[...]

    layer = nnx.SpectralNorm(Mixed(), n_steps=50, rngs=nnx.Rngs(0))
    assert dict(layer.batch_stats) == {"tensor": layer.batch_stats["tensor"]}
    assert layer.batch_stats["tensor"]["u"].shape == (1, 3)
    _, scalar, vector, tensor, buffer = layer(X)
    assert_trees_equal((scalar, vector, buffer), (jnp.float32(2), jnp.arange(3.0), jnp.ones((2, 2))))
    values = jnp.arange(12.0).reshape(2, 2, 3)
    assert_trees_close(tensor, values / jnp.linalg.norm(values.reshape(4, 3), ord=2))


# ---- when the statistics are written ----


def stats(layer):
    return {name: layer.batch_stats["kernel"][name] for name in ("u", "sigma")}


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_only_update_stats_writes(wrap):
    call = wrap(lambda m, x: m(x))
    layer = make()
    variables, kernel = stats(layer), layer.layer_instance.kernel[...]
    before = {name: v[...] for name, v in variables.items()}

    def moved():
        assert all(v is variables[name] for name, v in stats(layer).items())
        assert layer.layer_instance.kernel[...] is kernel
        found = {v[...] is not before[name] for name, v in variables.items()}
        before.update({name: v[...] for name, v in variables.items()})
        return found

    call(layer, X)
    assert moved() == {True}
    layer.eval()
    assert layer.use_running_average is True
    y = call(layer, X)
    assert moved() == {False}
    assert_trees_close(wrap(lambda m, x: m(x, update_stats=True))(layer, X), y)  # what it divides by is the same
    assert moved() == {True}
    layer.train()
    wrap(lambda m, x: m(x, False))(layer, X)
    assert moved() == {False}
    call(layer, X)
    assert moved() == {True}


def test_a_plain_jax_transform_may_only_read():
    layer = make()
    with pytest.raises(nnx.NnxError, match=r"Cannot write BatchStat"):
        jax.jit(lambda x: layer(x))(X)
    before = {name: v[...] for name, v in stats(layer).items()}
    y = jax.jit(lambda x: layer(x, update_stats=False))(X)
    assert_trees_close(y, layer(X, False))
    assert_trees_equal({name: v[...] for name, v in stats(layer).items()}, before)


def test_gradients_and_steps_under_nnx_transforms():
    layer, twin = make(), linen.SpectralNorm(linen.Dense(3))
    variables = {
        "params": {"layer_instance": {name: getattr(layer.layer_instance, name)[...] for name in ("kernel", "bias")}},
        "batch_stats": {f"layer_instance/kernel/{name}": v[...] for name, v in stats(layer).items()},
    }

    def loss(params, variables):
        y, updates = twin.apply({**variables, "params": params}, X, update_stats=True, mutable=["batch_stats"])
        return (y**3).sum(), updates

    grads, updates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], variables)
    ours = nnx.jit(nnx.grad(lambda m: (m(X) ** 3).sum()))(layer)
    assert_trees_close(ours["layer_instance"]["kernel"][...], grads["layer_instance"]["kernel"])
    for name, variable in stats(layer).items():
        assert_trees_close(variable[...], updates["batch_stats"][f"layer_instance/kernel/{name}"])


def test_every_layer_of_an_ensemble_has_its_own():
    @nnx.vmap(in_axes=0, out_axes=0)
    def many(key):
        rngs = nnx.Rngs(key)
        return nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), n_steps=50, rngs=rngs)

    layers = many(jax.random.split(jax.random.key(0), 3))
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, X)
    kernels = layers.layer_instance.kernel[...]
    norms = jnp.linalg.norm(kernels, ord=2, axis=(1, 2))
    assert_trees_close(layers.batch_stats["kernel"]["sigma"][...], norms)
    assert_trees_close(ys, jnp.einsum("bi,nio->nbo", X, kernels / norms[:, None, None]))


def test_split_and_merge():
    layer = make()
    layer(X)
    merged = nnx.merge(*nnx.split(layer))
    assert_trees_equal(merged(X, False), layer(X, False))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.BatchStat))}
    assert paths == {("batch_stats", "kernel", "u"), ("batch_stats", "kernel", "sigma")}


# ---- errors ----


def conv(**options):
    return nnx.SpectralNorm(nnx.Conv(2, 3, (2, 2), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(n_steps=0), r"SpectralNorm\(\.\.\., n_steps=.*\n  expected a positive integer\n  found    0"),
        (
            lambda: conv(error_on_non_matrix=True),
            r"error_on_non_matrix=.*\n  expected parameters of at most two axes\n.*kernel of shape \(2, 2, 2, 3\)",
        ),
        (lambda: nnx.SpectralNorm(nnx.relu, rngs=nnx.Rngs(0)), r"layer_instance=.*\n  expected a module"),
        (
            lambda: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=None),
            r"SpectralNorm\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None",
        ),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_parameter_that_came_later():
    layer = make()
    layer.layer_instance.extra = nnx.Param(jnp.ones((2, 2)))
    message = r"layer_instance=.*\n  expected a layer with the parameters.*\n  found    extra, which has no statistics"
    with pytest.raises(ValueError, match=message):
        layer(X)


def test_neither_call_nor_layer_says_whether_to_update():
    layer = make()
    layer.use_running_average = None
    with pytest.raises(ValueError, match=r"No `update_stats` argument was provided to SpectralNorm"):
        layer(X)
