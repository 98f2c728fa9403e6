"""ToLinen: the numbers are those of the NNX module, and apply costs no more. `row N` is a row of REQUIREMENTS.md."""

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen
from tests.layers import LAYERS
from tests.support.to_linen_models import DROPOUT, KEY, Net, X, equal, equal_programs, native, primitives
from tests.tolerance import assert_trees_equal

# ---- numbers ----


def as_nnx(layer, values):
    """Linen's values as variables by the paths of the NNX layer, fused where it fuses them."""
    flat = {}
    for path, names in layer.params.items():
        names = (names,) if isinstance(names, str) else names
        parts = [values[name] for name in names]
        collection = names[0].split("/")[0]
        flat[f"{collection}/{path}"] = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return unflatten_dict(flat, sep="/")


def call_of(layer, train):
    """What runs the layer: a function, since Linen keeps the keyword `rngs` of apply for itself."""
    return lambda module, x: layer.call(module, x, **layer.modes[train])


def flat(tree):
    return flatten_dict(tree, sep="/")


CASES = [
    pytest.param(layer, train, id=f"{layer.name}-{'train' if train else 'eval'}")
    for layer in LAYERS
    for train in ((True, False) if layer.modes[True] != layer.modes[False] else (False,))
]


@pytest.mark.parametrize(("layer", "train"), CASES)
def test_every_layer_equals_the_native_call(layer, train):
    model = ToLinen(lambda rngs: layer.make(nnx, rngs))

    def ours(values, x):
        variables = as_nnx(layer, values)
        y, updates = model.apply(variables, x, nnx_method=call_of(layer, train), mutable=["batch_stats"])
        return y, {**flat(variables), **flat(updates)}

    def native_call(values, x):
        y, updated = layer.functional(train=train)(values, x)
        return y, flat(as_nnx(layer, updated))

    equal_programs(ours, native_call, layer.variables(), layer.example())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_row_25_apply_of_every_layer_is_no_longer_than_the_native_call(layer):
    model, call, x = ToLinen(lambda rngs: layer.make(nnx, rngs)), call_of(layer, True), layer.example()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: layer.make(nnx, nnx.Rngs(0))))

    def native_call(state, x):
        module = nnx.merge(graphdef, state)
        return call(module, x), nnx.state(module, nnx.BatchStat)

    ours = primitives(
        lambda v, x: model.apply(v, x, nnx_method=call, mutable=["batch_stats"]), as_nnx(layer, layer.variables()), x
    )
    assert 0 < len(ours) <= len(primitives(native_call, state, x))


# A layer that is made of layers draws in the order of its constructor; Linen folds the names of scopes into the key.
ONE_SCOPE = [
    layer for layer in LAYERS if all(isinstance(name, str) and name.count("/") == 1 for name in layer.params.values())
]


@pytest.mark.parametrize("layer", ONE_SCOPE, ids=lambda layer: layer.name)
def test_row_32_same_key_same_initial_values_as_the_linen_layer(layer):
    model = ToLinen(lambda rngs: layer.make(nnx, rngs))
    method = {} if layer.method == "__call__" else {"method": layer.method}

    def ours(key, x):
        return model.init(key, x, nnx_method=call_of(layer, False))

    def theirs(key, x):
        return layer.twin().init(key, x, **method, **layer.twin_modes[False])

    equal_programs(ours, theirs, KEY, layer.example())


def test_outputs_gradients_and_statistics_equal_the_native_model():
    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    module = native(lambda: Net(3, 2, rngs=nnx.Rngs(5)), variables)

    @jax.jit
    def linen_step(params, stats):
        def loss(params):
            y, updates = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
            return (y**2).mean(), (y, updates)

        grads, (y, updates) = jax.grad(loss, has_aux=True)(params)
        return y, grads, updates["batch_stats"]

    @nnx.jit
    def native_step(module):
        def loss(module):
            y = module(X)
            return (y**2).mean(), y

        grads, y = nnx.grad(loss, has_aux=True)(module)
        nnx.pop(module, nnx.Intermediate)
        return y, grads, nnx.state(module, nnx.BatchStat)

    y, grads, stats = native_step(module)
    pure = jax.tree.map(lambda x: x, (nnx.to_pure_dict(grads), nnx.to_pure_dict(stats)))
    as_linen = [flatten_dict(tree, sep="/") for tree in map(_with_string_keys, pure)]
    ours = linen_step(variables["params"], variables["batch_stats"])
    equal((ours[0], *(flatten_dict(t, sep="/") for t in ours[1:])), (y, *as_linen))
    assert float(jnp.abs(as_linen[0]["head/kernel"]).sum()) > 0


def _with_string_keys(tree):
    return {str(k): _with_string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_row_32_dropout_draws_the_mask_that_linen_draws():
    model = to_linen(nnx.Dropout, 0.5)
    theirs = nn.Dropout(0.5, deterministic=False).apply({}, X, rngs=DROPOUT)
    assert_trees_equal(model.apply({}, X, rngs=DROPOUT), theirs)
    legacy = {"dropout": jax.random.PRNGKey(1)}
    assert_trees_equal(model.apply({}, X, rngs=legacy), theirs)


def test_row_65_each_stream_gets_its_own_key_at_each_apply():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(x), self.b(x), self.a(x)

    model = to_linen(Two)
    assert model.init(KEY, X) == {}  # random state is not stored
    first, second, third = model.apply({}, X, rngs=DROPOUT)
    assert not (first == second).all()
    assert not (first == third).all()
    assert_trees_equal(model.apply({}, X, rngs=DROPOUT), (first, second, third))
    other = model.apply({}, X, rngs={"dropout": jax.random.key(2)})
    assert not (other[0] == first).all()


def test_init_leaves_state_as_it_was_made():
    variables = to_linen(Net, 3, 1).init(KEY, X)
    norm = variables["batch_stats"]["blocks"]["0"]["norm"]
    assert_trees_equal(norm, nn.BatchNorm(use_running_average=False).init(KEY, X)["batch_stats"])


# ---- apply is strict, and runs no initializer ----


def test_row_25_apply_runs_no_initializer():
    runs = []

    def init(key, shape, dtype):
        runs.append(shape)
        return jax.random.normal(key, shape, dtype)

    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    names = primitives(lambda v: model.apply(v, X, train=False), variables)
    assert not [n for n in names if "random" in n or "threefry" in n or n in ("erf_inv", "shift_right_logical")]
    linear = to_linen(nnx.Linear, 3, 4, kernel_init=init)
    variables = linear.init(KEY, X)
    linear.apply(variables, X)
    runs.clear()
    linear.apply(variables, X)  # not even traced again
    assert not runs


def test_row_25_the_jaxpr_of_apply_is_that_of_the_native_call():
    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    module = native(lambda: Net(3, 2, rngs=nnx.Rngs(0)), variables)
    module.eval()
    ours = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, X)
    graphdef, state = nnx.split(module)
    theirs = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    assert len(ours.eqns) == len(theirs.eqns)


def test_row_25_dropout_in_apply_costs_no_more_than_natively():
    model, module = to_linen(nnx.Dropout, 0.5), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    ours = jax.make_jaxpr(lambda k: model.apply({}, X, rngs={"dropout": k}))(KEY)
    graphdef, state = nnx.split(module)
    theirs = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(X))(state)
    assert len(ours.eqns) <= len(theirs.eqns)
