"""WeightNorm against Linen's, what it does to the layer it wraps (nothing), and its errors."""

import copy
import inspect
import threading
from dataclasses import replace

import flax.nnx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen

import nnx_core as nnx
from tests.layer_rows.norms import ROWS
from tests.support.arrays import noise
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import assert_equal_to_twin

DENSE = next(row for row in ROWS if row.name == "WeightNorm")
CONV = next(row for row in ROWS if row.name == "WeightNorm.Conv")
X = noise(5, 2, 4)


def weight_norm(row=DENSE, filters=None, absent=(), extra=None, **options):
    """`row` with these constructor options; `filters` are the two libraries' own variable filters."""
    ours, theirs = ({"variable_filter": f} for f in filters) if filters else ({}, {})
    layer, twin = (
        (lambda lib, rngs, **d: lib.Linear(4, 5, rngs=rngs, **d), lambda **d: linen.Dense(5, **d))
        if row is DENSE
        else (
            lambda lib, rngs, **d: lib.Conv(2, 3, (2, 3), rngs=rngs, **d),
            lambda **d: linen.Conv(3, (2, 3), **d),
        )
    )
    return replace(
        row,
        make=lambda lib, rngs, **d: lib.WeightNorm(layer(lib, rngs, **d), rngs=rngs, **options, **ours, **d),
        twin=lambda **d: linen.WeightNorm(twin(**d), **options, **theirs, **d),
        params={path: p for path, p in row.params.items() if path not in absent} | (extra or {}),
    )


OPTIONS = {
    "no-scale": weight_norm(use_scale=False, absent=("scales/kernel",)),
    "one-length": weight_norm(feature_axes=None, epsilon=1e-3),
    "other-axis": weight_norm(feature_axes=0),
    "every-axis": weight_norm(feature_axes=[0, 1]),
    "every-parameter": weight_norm(filters=(..., None), extra={"scales/bias": "params/layer_instance|bias|scale"}),
    "bias-only": weight_norm(
        filters=(nnx.PathContains("bias"), ("bias",)),
        absent=("scales/kernel",),
        extra={"scales/bias": "params/layer_instance|bias|scale"},
    ),
    "conv-axes": weight_norm(CONV, feature_axes=(0, -1)),
    "conv-axes-in-another-order": weight_norm(CONV, feature_axes=(-1, 0)),
}


@pytest.mark.parametrize("row", OPTIONS.values(), ids=OPTIONS)
def test_option(row):
    assert_equal_to_twin(row, train=True)


def test_dtype_of_the_normalized_parameters():
    # A float32 kernel, which Linen's own init would have stored as bfloat16.
    row = weight_norm(dtype=jnp.bfloat16)
    values = DENSE.variables()
    ours, theirs = (jax.jit(f(train=True))(values, row.example()) for f in (row.functional, row.functional_twin))
    assert_trees_equal(ours, theirs)
    assert ours[1]["params/layer_instance/kernel"].dtype == jnp.float32


def test_names_are_those_of_flax_nnx():
    ours, theirs = (signature(lib.WeightNorm.__init__) for lib in (nnx, flax.nnx))
    filters = ours.pop("variable_filter")[1], theirs.pop("variable_filter")[1]
    assert {(f.key, f.exact) for f in filters} == {("kernel", True)}
    assert ours == theirs
    assert signature(nnx.WeightNorm.__call__) == signature(flax.nnx.WeightNorm.__call__)
    layers = make(nnx), make(flax.nnx)
    assert {name for name in vars(layers[1]) if not name.startswith("_")} <= set(vars(layers[0]))
    assert_trees_equal(layers[0].layer_instance.kernel[...], layers[1].layer_instance.kernel[...])


def signature(function):
    """Kind and default by name; of a function as default its name, since each library has its own."""
    parameters = inspect.signature(function).parameters
    return {name: (p.kind, getattr(p.default, "__name__", p.default)) for name, p in parameters.items()}


def make(lib=nnx, **options):
    rngs = lib.Rngs(0)
    return lib.WeightNorm(lib.Linear(4, 3, rngs=rngs), rngs=rngs, **options)


def test_scales_are_params_at_the_path_of_the_parameter():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layers[1](self.layers[0](x)))

    random = nnx.initializers.normal()
    layer = nnx.WeightNorm(Pair(nnx.Rngs(0)), scale_init=random, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    keys = nnx.Rngs(3)
    for path, size in ((("layers", 0, "kernel"), 3), (("layers", 1, "kernel"), 2)):
        scale = nnx.state(layer, nnx.Param)["scales"]
        for key in path:
            scale = scale[key]
        assert type(scale) is nnx.Param
        assert_trees_equal(scale[...], random(keys.params(), (size,), jnp.bfloat16))
    assert len(nnx.to_flat_state(nnx.state(layer.scales))) == 2
    assert layer(X).shape == (2, 2)


def test_five_steps_of_sgd_are_those_of_linen():
    # flax.nnx 0.12.8: scales are no Params, and stay 1.
    twin = linen.WeightNorm(linen.Dense(3))
    target = jnp.arange(6.0).reshape(2, 3)
    layer = make()
    params = {
        "layer_instance": {"kernel": layer.layer_instance.kernel[...], "bias": layer.layer_instance.bias[...]},
        "layer_instance/kernel/scale": layer.scales["kernel"][...],
    }
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    tx = optax.sgd(0.1)
    opt_state = tx.init(params)

    @nnx.jit
    def step(layer, optimizer):
        grads = nnx.grad(lambda m: ((m(X) - target) ** 2).mean())(layer)
        optimizer.update(layer, grads)

    @jax.jit
    def twin_step(params, opt_state):
        grads = jax.grad(lambda p: ((twin.apply({"params": p}, X) - target) ** 2).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(5):
        step(layer, optimizer)
        params, opt_state = twin_step(params, opt_state)
    assert_trees_close(layer.layer_instance.kernel[...], params["layer_instance"]["kernel"])
    assert_trees_close(layer.layer_instance.bias[...], params["layer_instance"]["bias"])
    assert_trees_close(layer.scales["kernel"][...], params["layer_instance/kernel/scale"])
    assert abs(layer.scales["kernel"][...] - 1).max() > 0.05


# ---- the layer is not touched ----


def test_a_call_leaves_every_value_and_variable_as_it_was():
    layer = make()
    variables = dict(nnx.to_flat_state(nnx.state(layer)))
    before = {path: v.get_raw_value() for path, v in variables.items()}
    calls = {
        "eager": lambda: layer(X),
        "jax.jit": lambda: jax.jit(lambda x: layer(x))(X),
        "nnx.jit": lambda: nnx.jit(lambda m, x: m(x))(layer, X),
        "nnx.grad": lambda: nnx.grad(lambda m, x: m(x).sum())(layer, X),
        "nnx.vmap": lambda: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(layer, X),
        "nnx.remat": lambda: nnx.grad(nnx.remat(lambda m, x: m(x).sum()))(layer, X),
        "nnx.eval_shape": lambda: nnx.eval_shape(lambda m, x: m(x), layer, X),
    }
    for call in calls.values():
        call()
        after = dict(nnx.to_flat_state(nnx.state(layer)))
        assert after.keys() == before.keys()
        for path, variable in after.items():
            assert variable is variables[path]
            assert variable.get_raw_value() is before[path]


class Fails(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.full((4, 3), 2.0))

    def __call__(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_call_that_fails_leaves_every_value(wrap):
    layer = nnx.WeightNorm(Fails(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="on purpose"):
        wrap(lambda x: layer(x))(X)
    assert_trees_equal(layer.layer_instance.kernel[...], jnp.full((4, 3), 2.0))


class Meets(nnx.Module):
    """Waits, in the middle of a call, for the same call in another thread."""

    def __init__(self, barrier):
        self.kernel = nnx.Param(jnp.full((4, 3), 2.0))
        self.wait = barrier.wait

    def __call__(self, x):
        before = x @ self.kernel
        self.wait(timeout=30)
        return before, x @ self.kernel


def test_two_threads_do_not_meet():
    barrier = threading.Barrier(2)
    layer = nnx.WeightNorm(Meets(barrier), rngs=nnx.Rngs(0))
    results = {}

    def trace(name):
        results[name] = jax.jit(lambda x: layer(x))(X)

    threads = [threading.Thread(target=trace, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = X @ jnp.full((4, 3), 0.5)
    for i in range(2):
        assert_trees_close(results[i], (expected, expected))
    assert_trees_equal(layer.layer_instance.kernel[...], jnp.full((4, 3), 2.0))


# ---- what the call does to the layer otherwise, is done ----


class Busy(nnx.Module):
    """Writes to statistics, a random stream, a new attribute and, once, to its own kernel."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.full((4, 3), 2.0))
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), int))

    def __call__(self, x, scale=1, *, rngs=None, reset=False):
        self.calls[...] += 1
        y = self.drop(self.norm(x @ self.kernel), rngs=rngs) * scale
        self.sow(nnx.Intermediate, "features", y)
        if reset:
            self.kernel[...] = jnp.zeros((4, 3))
        return {"y": y, "kernel": self.kernel[...], "name": "busy"}


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_other_writes_of_the_layer_stay(wrap):
    call = wrap(lambda m, x: m(x)["y"])
    layer = nnx.WeightNorm(Busy(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    inner = layer.layer_instance
    call(layer, X)
    y = call(layer, X)
    assert int(inner.calls[...]) == 2
    assert int(inner.drop.rngs.count[...]) == 2
    assert abs(inner.norm.mean[...]).max() > 0
    assert len(inner.features[...]) == 2
    assert_trees_equal(inner.features[...][1], y)
    assert_trees_equal(inner.kernel[...], jnp.full((4, 3), 2.0))


def test_arguments_and_result_pass_through():
    layer = nnx.WeightNorm(Busy(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(dropout=1)
    out = layer(X, 3, rngs=rngs)
    assert out["name"] == "busy"
    assert_trees_close(out["kernel"], jnp.full((4, 3), 0.5))
    assert int(rngs.dropout.count[...]) == 1  # the caller's own stream moved
    assert int(layer.layer_instance.drop.rngs.count[...]) == 0


def test_a_layer_that_writes_its_own_kernel_does_so():
    layer = nnx.WeightNorm(Busy(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    layer(X, reset=True)
    assert_trees_equal(layer.layer_instance.kernel[...], jnp.zeros((4, 3)))


def test_capture_finds_what_the_layer_sows():
    layer = nnx.WeightNorm(Busy(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    out, sown = nnx.capture(layer, nnx.Intermediate)(X)
    assert_trees_equal(sown["layer_instance"]["features"][...], (out["y"],))


# ---- sharing, nesting, structure ----


def test_a_shared_kernel_is_normalized_once():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.b = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    layer = nnx.WeightNorm(Twice(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert len(nnx.to_flat_state(nnx.state(layer, nnx.Param))) == 2  # one kernel, one scale
    kernel = layer.layer_instance.a.kernel[...]
    unit = kernel / jnp.sqrt((kernel**2).sum(0))
    assert_trees_close(layer(X), X @ unit @ unit)


def test_nested_in_each_other():
    inner = nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), feature_axes=None, rngs=nnx.Rngs(0))
    layer = nnx.SpectralNorm(inner, n_steps=50, rngs=nnx.Rngs(0))
    before = inner.layer_instance.kernel[...]
    y = layer(X)
    kernel = before / jnp.linalg.norm(before, ord=2)
    kernel = kernel / jnp.linalg.norm(kernel)
    assert_trees_close(y, X @ kernel)
    assert inner.layer_instance.kernel[...] is before


def test_split_merge_copy_and_static_filters():
    layer = make(variable_filter=[nnx.PathContains("kernel"), "tag"])
    layer.scales["kernel"][...] = jnp.arange(3.0)
    y = layer(X)
    assert_trees_equal(nnx.merge(*nnx.split(layer))(X), y)
    assert_trees_equal(copy.deepcopy(layer)(X), y)
    assert_trees_equal(nnx.clone(layer)(X), y)


def test_an_ensemble():
    @nnx.vmap(in_axes=0, out_axes=0)
    def many(key):
        rngs = nnx.Rngs(key)
        return nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)

    layers = many(jax.random.split(jax.random.key(0), 3))
    assert layers.scales["kernel"].shape == (3, 3)
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, X)
    kernel = layers.layer_instance.kernel[...]
    unit = kernel / jnp.sqrt((kernel**2).sum(1, keepdims=True))
    assert_trees_close(ys, jnp.einsum("bi,nio->nbo", X, unit))


def test_values_in_references():
    layer = nnx.with_vars(make(), ref=True)
    kernel = layer.layer_instance.kernel
    before = kernel[...]
    unit = before / jnp.sqrt((before**2).sum(0))
    assert_trees_close(layer(X), X @ unit)
    assert kernel.has_ref
    assert_trees_equal(kernel[...], before)


def test_custom_promote_dtype_gets_parameter_and_scale():
    seen = []

    def half(args, *, dtype):
        seen.append((len(args), dtype))
        return tuple(a.astype(jnp.bfloat16) for a in args)

    make(promote_dtype=half)(X)
    assert seen == [(2, None)]


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nnx.WeightNorm(jnp.sin, rngs=nnx.Rngs(0)),
            r"WeightNorm\(\.\.\., layer_instance=.*\n  expected a module with a __call__\n  found",
        ),
        (lambda: nnx.WeightNorm(nnx.Linear, rngs=nnx.Rngs(0)), r"layer_instance=.*\n.*\n  found    Linear, a class"),
        (lambda: nnx.WeightNorm(nnx.Module(), rngs=nnx.Rngs(0)), r"layer_instance=.*\n.*\n  found    Module\n"),
        (
            lambda: make(feature_axes=(0, 3)),
            r"feature_axes=.*\n  expected axes of every.*such as kernel of shape \(4, 3\)\n  found    \(0, 3\)",
        ),
        (
            lambda: make(feature_axes=-2, variable_filter=...),
            r"feature_axes=.*\n.*such as bias of shape \(3,\)\n  found    -2\n.*variable_filter",
        ),
        (
            lambda: nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=None),
            r"WeightNorm\(\.\.\., rngs=\.\.\.\)[\s\S]*found    None",
        ),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_parameter_that_came_later():
    layer = nnx.WeightNorm(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), rngs=nnx.Rngs(0))
    layer.layer_instance.layers.append(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    message = r"expected only parameters that have a scale: \['layers\[0\]\.kernel'\]\n  found    layers\[1\]\.kernel"
    with pytest.raises(ValueError, match=message):
        layer(X)


def test_an_error_of_the_layer_says_where_the_wrapper_is():
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([make()])

        def __call__(self, x):
            return self.blocks[0](x)

    model = Model()
    with pytest.raises(nnx.NnxError, match=r"\(\.\.\., 4\)\n  found +shape \(2, 7\)") as raised:
        model(jnp.ones((2, 7)))
    assert "WeightNorm at Model.blocks[0]" in raised.value.__notes__[0]
