"""ToNNX: real Linen models as NNX modules, bit-equal to `apply`, stateful as NNX is, with any names."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import field
from typing import Any

import cloudpickle
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge._errors import BridgeError
from bridge._wrapper_errors import (
    AlreadyInitializedError,
    NoModeWarning,
    NoOwnerError,
    NoRngsError,
    NotALinenModuleError,
    NotInitializedError,
    StateAttributeError,
    SubmoduleAccessError,
)
from nnx_core._errors import TraceError
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jax.random.normal(jax.random.key(7), (4, 6))
KEY, DROPOUT = jax.random.key(1), jax.random.key(2)


# ---- real models -------------------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: list[int] = field(default_factory=lambda: [8, 3])
    acts: dict[str, Callable[..., Any]] = field(default_factory=lambda: {"hidden": nn.relu})

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in self.widths[:-1]:
            x = self.acts["hidden"](nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(-1, 2, 3, 1)
        x = nn.Conv(4, (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        self.sow("intermediates", "features", x)
        return nn.Dense(3)(x)


class Setup(nn.Module):
    features: int = 5

    def setup(self):
        self.enc = nn.Dense(self.features)
        self.layers = [nn.Dense(6), nn.Dense(6)]
        self.norm = nn.BatchNorm(momentum=0.5)

    @property
    def size(self):
        return self.features * 2

    def encode(self, x):
        return self.enc(x)

    def __call__(self, x, train: bool = False):
        for layer in self.layers:
            x = layer(x)
        return self.encode(self.norm(x, use_running_average=not train))


class Stack(nn.Module):
    """Layers under nn.scan and nn.remat, with dropout and statistics inside."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.remat(nn.Dense)(6)(x)
                x = nn.BatchNorm(use_running_average=not train)(x)
                return nn.Dropout(0.5, deterministic=not train)(x), None

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return layers()(x, None)[0]


MODELS = {"MLP": MLP, "CNN": CNN, "Setup": Setup, "Stack": Stack}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def both(make, **options):
    """The model wrapped, the Linen model, and its variables."""
    model = ToNNX(make(), nnx.Rngs(params=KEY, dropout=DROPOUT), parity=True, **options).lazy_init(X)
    return model, make(), make().init({"params": KEY, "dropout": DROPOUT}, X)


def mutable(variables):
    return [name for name in variables if name != "params"]


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


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x, key="n"):
        n = self.variable("counts", key, lambda: jnp.zeros(()))
        if not self.is_initializing():
            n.value += 1
        self.sow("intermediates", "seen", n.value)
        return x + n.value


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


# ---- names -------------------------------------------------------------------------------------------------

HOSTILE = (
    "module", "rngs", "train", "eval", "sow", "perturb", "set_attributes", "lazy_init", "iter_modules", "items",
    "to_nnx__module", "mutable", "value", "keys",
)  # fmt: skip


class Named(nn.Module):
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = nn.Dense(6, name=name)(x)
            self.variable("stats", name + "_", lambda: jnp.zeros(()))
        return x


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_collide_with_methods_row17(name):
    module = Named((name,))
    model = ToNNX(module, KEY, parity=True).lazy_init(X)
    variables = module.init(KEY, X)
    assert_trees_equal(variables_of(model), variables)
    assert_trees_equal(model(X), module.apply(variables, X))
    assert type(nnx.state(model)[name]["kernel"]) is nnx.Param
    assert model.module is module
    assert isinstance(model.rngs, nnx.Rngs)
    for copied in (nnx.clone(model), nnx.merge(*nnx.split(model)), copy.deepcopy(model)):
        assert isinstance(copied.rngs, nnx.Rngs)
        assert_trees_equal(variables_of(copied), variables)
    assert_trees_equal(nnx.jit(lambda m, x: m(x))(model, X), jax.jit(module.apply)(variables, X))
    nnx.jit(lambda m: m(X, mutable=True))(model)
    model.note = 3
    assert_trees_equal(variables_of(model), variables)


def test_all_hostile_names_at_once_row17():
    module = Named(HOSTILE)
    model = ToNNX(module, KEY, parity=True).lazy_init(X)
    assert_trees_equal(variables_of(model), module.init(KEY, X))
    assert_trees_equal(variables_of(jax.tree.map(lambda x: x, model)), module.init(KEY, X))


class TwoCollections(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (6,))
        ema = self.variable("ema", "w", lambda: jnp.zeros(6))
        if not self.is_initializing():
            ema.value = 0.5 * ema.value + w
        return x * ema.value


def test_same_name_in_two_collections_row18():
    module, model = TwoCollections(), ToNNX(TwoCollections(), nnx.Rngs(0)).lazy_init(X)
    variables = module.init(KEY, X)
    assert_trees_equal(variables_of(model), variables)
    for _ in range(2):
        expected, updates = module.apply(variables, X, mutable=["ema"])
        variables = {**variables, **updates}
        assert_trees_equal(model(X), expected)
        assert_trees_equal(variables_of(model), variables)
    assert type(model.w) is nnx.Param
    ema = nnx.state(model)["w@ema"]
    nnx.jit(lambda m: m(X))(model)
    assert nnx.state(model)["w@ema"] is ema


def test_a_name_in_a_second_collection_that_comes_later_row18():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (6,))
            self.sow("intermediates", "w", x)
            return x * w

    model = ToNNX(Late(), nnx.Rngs(0)).lazy_init(X)
    w = model.w
    model(X, mutable=["intermediates"])
    assert model.w is w
    assert list(nnx.pop(model, nnx.Intermediate)) == ["w@intermediates"]
    assert_trees_equal(model(X), X)


# ---- random keys -------------------------------------------------------------------------------------------


def counts(model):
    return {name: int(stream.count[...]) for name, stream in model.rngs.items()}


def test_keys_are_drawn_only_when_linen_asks_row4():
    model = ToNNX(CNN(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    assert counts(model) == {"params": 1, "dropout": 0}
    model(X)
    assert counts(model) == {"params": 1, "dropout": 0}
    first = model(X, train=True)
    assert counts(model) == {"params": 1, "dropout": 1}
    assert not np.array_equal(first, model(X, train=True))
    assert counts(model) == {"params": 1, "dropout": 2}


def test_keys_drawn_under_lifted_transforms_row4():
    model = ToNNX(Stack(), nnx.Rngs(params=0, dropout=1)).lazy_init(X)
    model(X)
    assert counts(model)["dropout"] == 0
    model(X, train=True)
    assert counts(model)["dropout"] == 1


def test_the_default_stream_is_linens_params_row4():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    assert counts(model) == {"default": 1}
    model(X, train=True)
    assert counts(model) == {"default": 2}


def test_deterministic_calls_in_closures_of_jax_transforms_row4():
    model = ToNNX(nn.Dense(6), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    jitted = jax.jit(lambda x: model(x))(X)
    assert_trees_equal(jitted, jax.jit(lambda x: nn.Dense(6).apply(variables_of(model), x))(X))
    assert jax.vmap(model)(X).shape == expected.shape
    assert jax.eval_shape(model, X).shape == expected.shape
    assert jax.checkpoint(model)(X).shape == expected.shape
    assert jax.lax.scan(lambda c, _: (model(c), None), X, length=2)[0].shape == expected.shape
    assert counts(model) == {"default": 1}


def test_a_write_under_a_foreign_trace_names_the_path_row61():
    model = ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(TraceError, match="BatchStat at batch_stats/norm/mean"):
        jax.jit(lambda x: model(x, train=True))(X)


def test_missing_rng_raises_what_linen_raises_row5():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model.rngs = None
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model(X, train=True)
    model(X)


def test_rngs_of_the_caller_are_forked():
    rngs = nnx.Rngs(0)
    model = ToNNX(CNN(), rngs)
    assert int(rngs.default.count[...]) == 1
    model.lazy_init(X)
    assert int(rngs.default.count[...]) == 1


def test_explicit_streams_of_a_call():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    rngs = nnx.Rngs(dropout=5)
    key = jax.random.fold_in(jax.random.key(5), 0)
    assert_trees_equal(model(X, rngs=rngs), model(X))
    assert int(rngs.dropout.count[...]) == 0
    before = variables_of(model)
    expected, _ = CNN().apply(before, X, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    assert_trees_equal(model(X, train=True, rngs=rngs), expected)
    assert int(rngs.dropout.count[...]) == 1
    assert counts(model) == {"default": 1}


def test_parity_repeats_the_mask_until_reseeded_row32():
    model = ToNNX(nn.Dropout(0.5, deterministic=False), nnx.Rngs(dropout=DROPOUT), parity=True)
    first = model(X)
    assert_trees_equal(model(X), first)
    assert counts(model) == {"dropout": 0}
    nnx.reseed(model, dropout=3)
    assert not np.array_equal(model(X), first)


def test_rng_state_can_be_left_out_row67():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


# ---- attributes of the wrapper and of the Linen module -----------------------------------------------------


def test_plain_attributes_are_left_alone_rows_20_57():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    model.qwix_path = ("a", "b")
    model.array = jnp.ones(2)
    model.parts = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.zeros(1)]
    model.extra = nnx.Param(jnp.ones(2))
    model.Dense_0.note = "mine"
    assert_trees_equal(model(X), expected)
    model(X, train=True)
    nnx.jit(lambda m: m(X, train=True))(model)
    assert model.qwix_path == ("a", "b")
    assert model.Dense_0.note == "mine"
    assert nnx.state(model)["parts"][0]["kernel"].shape == (2, 2)
    nnx.jit(lambda m: setattr(m, "array", m.array + 1))(model)
    assert model.array.tolist() == [2.0, 2.0]
    del model.array, model.qwix_path
    assert not hasattr(model, "array")
    copied = copy.copy(model)
    assert copied.extra is model.extra
    assert_trees_equal(nnx.clone(model)(X), model(X))


def test_an_attribute_set_before_a_variable_of_that_name():
    model = ToNNX(MLP(), nnx.Rngs(0))
    model.Dense_0 = "mine"
    model.lazy_init(X)
    assert model.Dense_0 == "mine"
    assert nnx.state(model)["Dense_0"]["kernel"].shape == (6, 8)
    assert nnx.clone(model).Dense_0 == "mine"
    assert_trees_equal(model(X), MLP().apply(variables_of(model), X))


def test_fields_properties_and_methods_are_reached_row23():
    model, module, variables = both(Setup)
    assert model.features == 5
    assert model.size == 10
    assert_trees_equal(model.encode(X), module.apply(variables, X, method="encode"))
    assert_trees_equal(model(X, method=Setup.encode), model.encode(X))
    assert_trees_equal(model(X, method=module.encode), model.encode(X))
    assert_trees_equal(model(X, method=lambda m, x: m.enc(x)), model.encode(X))
    with pytest.raises(AttributeError, match=r"ToNNX\(Setup\) has no attribute or variable 'nothing'"):
        model.nothing  # noqa: B018  # the access is the test
    with pytest.raises(AttributeError, match="'tabulate'"):
        model.tabulate  # noqa: B018  # nn.Module's own methods are on model.module


def test_setup_submodules_are_callable_row23():
    model, module, variables = both(Setup)
    assert_trees_equal(model.enc(X), module.apply(variables, X, method="encode"))
    assert_trees_equal(model.layers_1(X), module.apply(variables, X, method=lambda m, x: m.layers[1](x)))
    model.norm(X, use_running_average=False)
    assert float(abs(model.norm.mean[...]).sum()) > 0
    assert model.enc.kernel is model.enc["kernel"]


def test_compact_submodules_are_not_callable_row23():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(SubmoduleAccessError, match=r"(?s)Dense_0 of CNN cannot be called.*exist only while"):
        model.Dense_0(X)
    with pytest.raises(SubmoduleAccessError, match="not reached through its ToNNX"):
        bridge.linen_state.LinenScope()(X)


def test_writing_attributes_that_are_variables():
    model = ToNNX(nn.Dense(3), nnx.Rngs(0)).lazy_init(X)
    model.bias = nnx.Param(jnp.full(3, 2.0))
    assert_trees_equal(model(X), nn.Dense(3).apply(variables_of(model), X))
    assert float(variables_of(model)["params"]["bias"].sum()) == 6.0
    with pytest.raises(StateAttributeError, match=r"model\.bias\[\.\.\.\] = value"):
        model.bias = jnp.zeros(3)
    del model.bias
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="bias"):
        model(X)


# ---- modes -------------------------------------------------------------------------------------------------


class FieldFlags(nn.Module):
    train: bool = False
    norm: nn.Module = field(default_factory=lambda: nn.BatchNorm(use_running_average=True))
    drops: Any = (nn.Dropout(0.5, deterministic=True),)

    @nn.compact
    def __call__(self, x):
        assert self.train is not self.drops[0].deterministic, "a flag was not reached"
        return self.drops[0](self.norm(x))


@pytest.mark.parametrize("make", [CNN, Setup, FieldFlags])
@pytest.mark.parametrize("outer", [False, True], ids=["wrapper", "container"])
def test_train_and_eval_reach_fields_and_call_arguments_row22(make, outer):
    model = ToNNX(make(), nnx.Rngs(0)).lazy_init(X)
    container = nnx.List([model]) if outer else model
    evaluated = model(X)
    container.train()
    stats = variables_of(model)["batch_stats"]
    assert not np.array_equal(model(X), evaluated)
    assert_trees_equal(jax.tree.structure(variables_of(model)["batch_stats"]), jax.tree.structure(stats))
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(variables_of(model)["batch_stats"]), strict=True)
    )
    container.eval()
    stats = variables_of(model)["batch_stats"]
    model(X)
    assert_trees_equal(variables_of(model)["batch_stats"], stats)


def test_an_argument_beats_the_mode_row22():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    expected = model(X)
    model.train()
    assert_trees_equal(model(X, train=False), expected)
    assert_trees_equal(model(X, False), expected)


def test_layers_with_open_flags_row22():
    norm = ToNNX(nn.BatchNorm(), nnx.Rngs(0)).lazy_init(X, use_running_average=False)
    norm.train()
    norm(X)
    norm.eval()
    norm(X)
    norm(X, use_running_average=False)
    assert norm.use_running_average is True
    drop = ToNNX(nn.Dropout(0.5), nnx.Rngs(0))
    drop.eval()
    assert_trees_equal(drop(X), X)


def test_set_attributes_reaches_fields_row22():
    model = ToNNX(MLP(), nnx.Rngs(0))
    model.set_attributes(widths=[2, 2])
    assert model.module.widths == [2, 2]
    assert model.lazy_init(X)(X).shape == (4, 2)
    with pytest.raises(nnx.NnxError, match="deterministic"):
        ToNNX(nn.Dense(3)).set_attributes(deterministic=True)


def test_modes_are_seen_by_compiled_functions_row22():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    step = nnx.jit(lambda m: m(X))
    step(model)
    assert counts(model) == {"default": 1}
    model.train()
    step(model)
    assert counts(model) == {"default": 2}
    nnx.jit(lambda m: m.eval())(model)
    step(model)
    assert counts(model) == {"default": 2}


def test_a_module_without_flags_says_so_row22():
    model = ToNNX(nn.Dense(3), nnx.Rngs(0))
    for mode in (model.train, model.eval):
        with pytest.warns(NoModeWarning, match=rf"ToNNX\(Dense\)\.{mode.__name__}\(\) has no effect"):
            mode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx.List([model]).train()


# ---- lazy_init ---------------------------------------------------------------------------------------------


def test_shapes_are_enough():
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for make in MODELS.values():
        model = ToNNX(make(), KEY, parity=True).lazy_init(spec)
        assert_trees_equal(variables_of(model), make().init(KEY, X))


class Outer(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.inner = nnx.List([ToNNX(nn.Dense(5), rngs), ToNNX(Setup(), rngs)])
        self.shared = ToNNX(nn.Dense(5), rngs)

    def __call__(self, x, scale=1.0, train=False):
        x = self.drop(self.norm(self.first(x))) * scale
        x = self.inner[1](jnp.pad(self.inner[0](x), ((0, 0), (0, 1))), train=train)
        return self.shared(self.shared(x))


def test_lazy_init_of_a_model_leaves_siblings_alone_row29():
    model = Outer(nnx.Rngs(0))
    before = {path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    assert bridge.lazy_init(model, jax.ShapeDtypeStruct(X.shape, X.dtype), 2.0, train=True) is model
    after = {path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    moved = {path[:1] for path in before if after[path] is not before[path]}
    assert moved <= {("inner",), ("shared",)}  # only their own random streams
    assert model.inner[0].kernel.shape == (6, 5)
    assert model.shared.kernel.shape == (5, 5)
    assert float(abs(model.inner[1].norm.mean[...]).sum()) == 0.0
    assert int(model.drop.rngs.count[...]) == 0
    model(X, train=True)


def test_lazy_init_of_a_model_gives_what_the_parts_give_alone_row29():
    model, parts = Outer(nnx.Rngs(0)), Outer(nnx.Rngs(0))
    bridge.lazy_init(model, X)
    parts.inner[0].lazy_init(X)
    assert_trees_equal(variables_of(model.inner[0]), variables_of(parts.inner[0]))


def test_lazy_init_never_overwrites_row29():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    with pytest.raises(AlreadyInitializedError, match=r"(?s)lazy_init of ToNNX\(CNN\).*found: 8 variables"):
        model.lazy_init(X)
    with pytest.raises(AlreadyInitializedError, match="never overwrites"):
        model.lazy_init(X, method="__call__")
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))), before)
    outer = Outer(nnx.Rngs(0))
    outer.inner[0].lazy_init(X)
    kernel = outer.inner[0].kernel.get_raw_value()
    bridge.lazy_init(outer, X)
    assert outer.inner[0].kernel.get_raw_value() is kernel
    bridge.lazy_init(outer, X)


class TwoMethods(nn.Module):
    def setup(self):
        self.enc, self.dec = nn.Dense(4), nn.Dense(6)

    def encode(self, x):
        return self.enc(x)

    def decode(self, x):
        return self.dec(x)


def test_lazy_init_of_several_methods():
    model = ToNNX(TwoMethods(), nnx.Rngs(0)).lazy_init(X, method="encode")
    kernel = model.enc.kernel
    assert bridge.lazy_init(model.decode, model.encode(X)) is not None
    assert model.enc.kernel is kernel
    assert model.decode(model.encode(X)).shape == X.shape


def test_lazy_init_of_a_method_of_a_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.parts = nnx.List([ToNNX(TwoMethods(), rngs)])

        def both(self, x):
            return self.parts[0].decode(self.parts[0].encode(x))

    model = Model(nnx.Rngs(0))
    bridge.lazy_init(model.both, X)
    assert sorted(variables_of(model)["params"]["parts"]["0"]) == ["dec", "enc"]
    assert model.both(X).shape == X.shape


def test_lazy_init_under_transforms():
    def make(key):
        return ToNNX(CNN(), nnx.Rngs(key)).lazy_init(X)

    abstract = nnx.eval_shape(lambda: make(KEY))
    assert abstract.Dense_0.kernel.get_value() == jax.ShapeDtypeStruct((24, 3), jnp.float32)
    jitted = nnx.jit(make)(KEY)
    assert jitted.Dense_0.kernel.shape == (24, 3)
    stacked = nnx.vmap(make)(jax.random.split(KEY, 3))
    assert stacked.Dense_0.kernel.shape == (3, 24, 3)
    outputs = nnx.vmap(lambda m: m(X))(stacked)
    assert outputs.shape == (3, 4, 3)


def test_errors_before_anything_is_made_row44():
    with pytest.raises(NotInitializedError, match=r"(?s)ToNNX\(CNN\) was called before.*model\.lazy_init\(x\) first"):
        ToNNX(CNN(), nnx.Rngs(0))(X)
    with pytest.raises(NoRngsError, match=r"(?s)lazy_init of ToNNX\(Dense\) needs random keys.*nnx\.Rngs\(0\)"):
        ToNNX(nn.Dense(3)).lazy_init(X)
    assert ToNNX(nn.Dense(3)).lazy_init(X, rngs=0).kernel.shape == (6, 3)
    with pytest.raises(NotALinenModuleError, match=r"(?s)Make one first: ToNNX\(Dense\(\.\.\.\), rngs"):
        ToNNX(nn.Dense, nnx.Rngs(0))
    with pytest.raises(NotALinenModuleError, match="It is an NNX module already"):
        ToNNX(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(NotALinenModuleError, match="found: 3"):
        ToNNX(3)
    with pytest.raises(NoOwnerError, match="an NNX module, or a method of one"):
        bridge.lazy_init(lambda x: x, X)
    assert issubclass(NotInitializedError, BridgeError)


def test_a_module_without_variables_needs_no_init():
    assert_trees_equal(ToNNX(nn.Dropout(0.5, deterministic=True))(X), X)


def test_a_wrong_parameter_is_linens_error():
    model = ToNNX(nn.Dense(3), nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="kernel"):
        model(jnp.ones((1, 5)))


# ---- transforms, copies, hashing ---------------------------------------------------------------------------


@models
def test_jit_is_the_jitted_apply(make):
    model, module, variables = both(make)

    @jax.jit
    def linen(variables):
        return module.apply(variables, X, train=True, mutable=mutable(variables), rngs={"dropout": DROPOUT})

    expected, updates = linen(variables)
    assert_trees_equal(nnx.jit(lambda m: m(X, train=True))(model), expected)
    assert_trees_equal(variables_of(model), {**variables, **updates})


@models
def test_remat_is_the_call(make):
    model, _, _ = both(make)
    twin = nnx.clone(model)
    expected = nnx.jit(lambda m: m(X, train=True))(twin)
    assert_trees_equal(nnx.jit(nnx.remat(lambda m: m(X, train=True)))(model), expected)
    assert_trees_equal(variables_of(model), variables_of(twin))


def test_scan_carries_statistics():
    model, twin = (ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X) for _ in range(2))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model, x):
        return model, model(x, train=True)

    xs = jnp.stack([X, X + 1, X * 2])
    model, ys = run(model, xs)
    one = nnx.jit(lambda m, x: m(x, train=True))
    assert_trees_close(ys, jnp.stack([one(twin, x) for x in xs]))
    assert_trees_close(variables_of(model), variables_of(twin))


def test_split_merge_clone_eval_shape():
    model, module, variables = both(CNN)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graphdef, params, rest)
    assert merged.Conv_0.kernel is not model.Conv_0.kernel
    assert_trees_equal(merged(X), module.apply(variables, X))
    assert nnx.eval_shape(lambda m: m(X), model).shape == (4, 3)
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(model)))


@pytest.mark.parametrize("make", [MLP, CNN, Stack])
def test_copies_and_pickles(make):
    model, module, variables = both(make)
    for twin in (
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)) if make is CNN else cloudpickle.loads(cloudpickle.dumps(model)),
    ):
        assert_trees_equal(twin(X), module.apply(variables, X))


def test_list_and_dict_fields_are_hashed_row36():
    traces = []

    @nnx.jit
    def run(model):
        traces.append(1)
        return model(X)

    for widths in ([8, 3], [8, 3], [4, 3]):
        model = ToNNX(MLP(widths), nnx.Rngs(0)).lazy_init(X)
        assert run(model).shape == (4, 3)
    assert len(traces) == 2
    fields = [MLP([1]), MLP((1,)), MLP([True]), MLP([1], {"hidden": nn.gelu})]
    defs = [nnx.graphdef(ToNNX(m)) for m in fields]
    assert len(set(defs)) == len(fields)
    assert nnx.graphdef(ToNNX(MLP([1]))) == defs[0]


def test_fields_with_arrays_sets_and_partials_are_hashed_row36():
    import functools

    class Odd(nn.Module):
        table: Any
        tags: Any
        f: Any
        thing: Any

        @nn.compact
        def __call__(self, x):
            return self.f(x) + self.table.sum()

    class Thing:
        __hash__ = None

    thing = Thing()

    def make(n):
        return ToNNX(Odd(np.arange(n), {1, 2}, functools.partial(jnp.sum, axis=[1][0]), thing))

    assert nnx.graphdef(make(3)) == nnx.graphdef(make(3))
    assert nnx.graphdef(make(3)) != nnx.graphdef(make(4))
    assert nnx.jit(lambda m: m(X))(make(3)).shape == (4,)


def test_a_steady_call_does_not_walk():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    view = model._view()
    model(X)
    model(X, train=True)
    assert model._view() is view
    model.Conv_0.kernel.set_metadata(unit="m")
    assert model._view() is not view


def test_a_module_made_inside_another_linen_module_row14():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            child = nn.Dense(3)
            model = ToNNX(child, nnx.Rngs(0)).lazy_init(x)
            assert model.module.parent is None
            return model(x)

    y = Parent().apply({}, X)
    assert y.shape == (4, 3)


def test_inside_linen_the_modules_own_rules_hold():
    model = ToNNX(Counter(), nnx.Rngs(0)).lazy_init(X)

    class Parent(nn.Module):
        def __call__(self, x):
            return model(x)

    with pytest.raises(flax.errors.ModifyScopeVariableError, match="counts"):
        Parent().apply({}, X)
    Parent().apply({}, X, mutable=["counts"])
    assert float(model.n[...]) == 1.0


def test_control_flow_keeps_statistics_in_place_row3():
    model, twin = (ToNNX(Setup(), nnx.Rngs(0)).lazy_init(X) for _ in range(2))
    model.set_attributes(train=True)
    mean = model.norm.mean

    def body(_, model):
        model(X)
        return model

    assert nnx.cond(True, lambda m: m(X), lambda m: m(X) * 0, model).shape == (4, 5)
    nnx.fori_loop(0, 2, body, model)
    nnx.while_loop(lambda c: c[1] < 2, lambda c: (body(0, c[0]), c[1] + 1), (model, 0))
    for _ in range(5):
        twin(X, train=True)
    assert model.norm.mean is mean
    assert_trees_close(variables_of(model), variables_of(twin))


def test_captured_intermediates_under_jit():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    scope, kernel = model.Dense_0, model.Dense_0.kernel
    nnx.jit(lambda m: m(X, mutable=["intermediates"], capture_intermediates=True))(model)
    assert model.Dense_0 is scope
    assert scope.kernel is kernel
    captured = nnx.pop(model, nnx.Intermediate)
    assert captured["Dense_0"]["__call__"].get_value()[0].shape == (4, 3)
    assert list(scope) == ["kernel", "bias"]
