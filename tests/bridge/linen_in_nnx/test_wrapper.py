"""ToNNX: real Linen models as NNX modules, bit-equal to `apply`, their state updated in place."""

import inspect

import flax.errors
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from tests.support.linen_models import CNN, DROPOUT, KEY, Counter, Setup, Stack, X, both, models, mutable
from tests.tolerance import assert_trees_equal

# ---- the same numbers --------------------------------------------------------------------------------------


@models
def test_parity_init_is_bit_equal_row32(make):
    model, _, variables = both(make)
    assert_trees_equal(variables_of(model), variables)


def test_parity_init_from_one_key_row32():
    model = ToNNX(CNN(), KEY, parity=True).lazy_init(X)
    assert_trees_equal(variables_of(model), CNN().init(KEY, X))


@models
def test_outputs_are_applys(make):
    model, module, variables = both(make)
    assert_trees_equal(model(X), module.apply(variables, X))


@models
def test_training_outputs_and_statistics_are_applys_rows_8_32_58(make):
    model, module, variables = both(make)
    expected, updates = module.apply(variables, X, train=True, mutable=mutable(variables), rngs={"dropout": DROPOUT})
    assert_trees_equal(model(X, train=True), expected)
    assert_trees_equal(variables_of(model), {**variables, **updates})


@models
def test_dropout_of_explicit_keys_row32(make):
    model = ToNNX(make(), nnx.Rngs(0)).lazy_init(X)
    variables, key = variables_of(model), jax.random.key(9)
    expected, _ = make().apply(variables, X, train=True, mutable=mutable(variables), rngs={"dropout": key})
    assert_trees_equal(model(X, train=True, rngs={"dropout": key}), expected)


@models
def test_gradients_are_linens(make):
    model, module, variables = both(make)
    rest = {name: variables[name] for name in mutable(variables)}

    @jax.jit
    def linen(params):
        def loss(params):
            y, _ = module.apply(
                {"params": params, **rest}, X, train=True, mutable=list(rest), rngs={"dropout": DROPOUT}
            )
            return (y**2).sum()

        return jax.grad(loss)(params)

    @nnx.jit
    def wrapped(model):
        return nnx.grad(lambda m: (m(X, train=True) ** 2).sum())(model)

    assert_trees_equal(nnx.to_pure_dict(wrapped(model)), jax.tree.map(lambda x: x, linen(variables["params"])))


@models
def test_a_training_run_is_linens(make):
    model, module, variables = both(make)
    tx = optax.adam(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, rest = variables["params"], {name: variables[name] for name in mutable(variables)}
    state = tx.init(params)

    def loss_of(y):
        return ((y - 1) ** 2).mean()

    @jax.jit
    def linen_step(params, rest, state):
        def loss(params):
            y, updates = module.apply(
                {"params": params, **rest}, X, train=True, mutable=list(rest), rngs={"dropout": DROPOUT}
            )
            return loss_of(y), updates

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), rest, state

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: loss_of(m(X, train=True)))(model)
        optimizer.update(model, grads)
        return value

    for _ in range(3):
        expected, params, rest, state = linen_step(params, rest, state)
        assert_trees_equal(step(model, optimizer), expected)
    assert_trees_equal(variables_of(model), {"params": params, **rest})


# ---- state: paths, identity, ties --------------------------------------------------------------------------


def test_paths_are_linens():
    state = nnx.state(ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X))
    assert type(state["Dense_0"]["kernel"]) is nnx.Param
    assert type(state["BatchNorm_0"]["mean"]) is nnx.BatchStat


@models
def test_variables_and_scopes_are_updated_in_place_row3(make):
    model, _, _ = both(make)
    before = [(path, x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable | nnx.Object)]
    model(X, train=True)
    nnx.jit(lambda m: m(X, train=True))(model)
    model(X, mutable=["intermediates"], capture_intermediates=True)
    nnx.pop(model, nnx.Intermediate)
    model(X, train=True)
    after = dict(nnx.iter_graph(model))
    assert all(after[path] is x for path, x in before)


def test_ties_survive_calls_and_updates_row3():
    model = ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X)
    model.layers_0.kernel = model.layers_1.kernel
    assert len(nnx.to_flat_state(nnx.state(model, nnx.Param))) == 7
    model(X, train=True)
    nnx.jit(lambda m: m(X, train=True))(model)
    model(X, mutable=True)
    assert model.layers_0.kernel is model.layers_1.kernel


def test_only_what_was_written_changes():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    kernel = model.Conv_0.kernel.get_raw_value()
    model(X, train=True, mutable=True)
    assert model.Conv_0.kernel.get_raw_value() is kernel


def test_metadata_added_on_the_nnx_side_stays_row61():
    model, module, variables = both(Stack)
    mean = next(v for _, v in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)))
    mean.set_metadata(out_sharding=("layers", None), unit="m")
    expected, _ = module.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": DROPOUT})
    assert_trees_equal(model(X, train=True), expected)
    assert mean.get_metadata() == {"out_sharding": ("layers", None), "unit": "m"}


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxes_become_metadata_and_go_back_rows_7_68(box):
    module = nn.Dense(3, kernel_init=box(nn.initializers.lecun_normal(), ("in", "out")))
    model = ToNNX(module, KEY, parity=True).lazy_init(X)
    variables = module.init(KEY, X)
    assert model.kernel.out_sharding == ("in", "out")
    assert_trees_equal(variables_of(model), variables)
    assert_trees_equal(model(X), module.apply(variables, X))
    model(X, mutable=True)
    assert_trees_equal(variables_of(model), variables)


# ---- which collections are written -------------------------------------------------------------------------


def test_held_collections_are_writable_by_default_rows_8_58():
    model = ToNNX(Counter(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    assert float(model.n[...]) == 1.0
    assert not hasattr(model, "seen")
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="counts"):
        model(X, mutable=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="counts"):
        model(X, mutable=["intermediates"])


def test_params_are_written_only_if_asked():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("w", nn.initializers.zeros, (6,))
            self.put_variable("params", "w", jnp.ones(6))
            return x

    model = ToNNX(Writes(), nnx.Rngs(0)).lazy_init(X)
    w = model.w
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="params"):
        model(X)
    model(X, mutable=["params"])
    assert model.w is w
    assert float(w.sum()) == 6.0


def test_sown_values_append_until_popped():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    for n in (1, 2):
        model(X, mutable=["intermediates"])
        assert len(model.features.get_value()) == n
    model(X)
    assert len(model.features.get_value()) == 2
    popped = nnx.pop(model, nnx.Intermediate)
    assert list(popped) == ["features"]
    assert not hasattr(model, "features")
    model(X, mutable="intermediates")
    assert len(model.features.get_value()) == 1


def test_state_made_by_a_later_call():
    model = ToNNX(Counter(), nnx.Rngs(0)).lazy_init(X)
    model(X, key="m")
    model(X, key="m")
    assert float(model.m[...]) == 2.0
    nnx.jit(lambda m: m(X, key="k"))(model)
    assert float(model.k[...]) == 1.0


@pytest.mark.parametrize("name", ["__init__", "__call__", "lazy_init"])
def test_signatures_are_those_of_flax_and_more(name):
    from flax.nnx import bridge as flax_bridge

    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (ToNNX, flax_bridge.ToNNX))
    common = {key: (p.kind, p.default) for key, p in ours.items() if key in theirs}
    assert common == {key: (p.kind, p.default) for key, p in theirs.items()}
    assert set(ours) - set(theirs) <= {"parity"}
    function = inspect.signature(bridge.lazy_init).parameters
    assert list(function) == list(inspect.signature(flax_bridge.lazy_init).parameters)
