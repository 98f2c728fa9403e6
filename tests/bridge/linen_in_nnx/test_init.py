"""ToNNX: variables are made for what a call needs, once, and nothing else changes."""

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge._errors import BridgeError
from bridge.linen_in_nnx._errors import (
    AlreadyInitializedError,
    NoOwnerError,
    NoRngsError,
    NotALinenModuleError,
    NotInitializedError,
    UnknownValueError,
)
from tests.support.linen_models import CNN, KEY, MODELS, Setup, X
from tests.tolerance import assert_trees_close, assert_trees_equal


@pytest.mark.slow
def test_shapes_are_enough():
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for make in MODELS.values():
        model = ToNNX(make(), KEY, parity=True).lazy_init(spec)
        assert_trees_equal(variables_of(model), jax.jit(make().init)(KEY, X))  # compiled, as the wrapped one's is


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


@pytest.mark.slow
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


# ---- keys given in the call, values that variables depend on, transforms on the way --------------------------


class Given(nnx.Module):
    """Wrapped modules without keys of their own: the call brings them."""

    def __init__(self, source, parity=False):
        self.first, self.second = ToNNX(nn.Dense(6), parity=parity), ToNNX(nn.Dense(3), parity=parity)
        self.source = source

    def __call__(self, x):
        source = self.source if isinstance(self.source, nnx.Rngs) else dict(self.source)
        return self.second(self.first(x, rngs=source), rngs=source)


@pytest.mark.parametrize("inputs", [X, jax.ShapeDtypeStruct(X.shape, X.dtype)], ids=["arrays", "shapes"])
def test_keys_of_an_inner_call_are_used_row_29(inputs):
    model = bridge.lazy_init(Given(nnx.Rngs(params=KEY)), inputs)
    for n, part in enumerate((model.first, model.second)):
        assert_trees_equal(variables_of(part), part.module.init(jax.random.fold_in(KEY, n), X))
    assert int(model.source.params.count[...]) == 0  # the stream is a sibling: not moved
    named = bridge.lazy_init(Given({"params": KEY}), inputs)
    assert_trees_equal(variables_of(named.second), nn.Dense(3).init(KEY, X))
    seeded = bridge.lazy_init(Given({"params": 5}), inputs)
    assert_trees_equal(variables_of(seeded.second), nn.Dense(3).init(jax.random.key(5), X))
    exact = bridge.lazy_init(Given(nnx.Rngs(params=KEY), parity=True), inputs)
    assert_trees_equal(variables_of(exact.second), nn.Dense(3).init(KEY, X))


def test_keys_of_a_method_argument_are_used():
    class Model(nnx.Module):
        def __init__(self):
            self.part = ToNNX(nn.Dense(3))

        def __call__(self, x, rngs):
            return self.part(x, rngs=rngs)

    rngs = nnx.Rngs(params=KEY)
    model = bridge.lazy_init(Model(), X, rngs)
    assert_trees_equal(variables_of(model.part), nn.Dense(3).init(jax.random.fold_in(KEY, 0), X))
    assert int(rngs.params.count[...]) == 0


class Centred(nn.Module):
    """A variable that is computed from the input."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("stats", "mean", lambda: x.mean(0))
        return nn.Dense(6)(x - mean.value)


def test_variables_that_depend_on_values_row_29():
    model = ToNNX(Centred(), KEY, parity=True)
    with pytest.raises(UnknownValueError, match=r"(?s)lazy_init of ToNNX\(Centred\) needs the values of its inputs"):
        model.lazy_init(jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert variables_of(model) == {}
    assert_trees_equal(variables_of(model.lazy_init(X)), Centred().init(KEY, X))


def test_variables_that_depend_on_values_inside_a_model_row_29():
    def make():
        keys = {"params": KEY}
        return nnx.Sequential(nnx.BatchNorm(6, rngs=nnx.Rngs(0)), *[ToNNX(Centred(), keys) for _ in range(2)])

    model, twin = make(), make()
    mean = model.layers[0].mean.get_raw_value()
    bridge.lazy_init(model, X)
    assert model.layers[0].mean.get_raw_value() is mean
    first = nnx.clone(twin.layers[0])(X)
    second = twin.layers[1].lazy_init(first)(first)
    twin.layers[2].lazy_init(second)
    for ours, alone in zip(model.layers[1:], twin.layers[1:], strict=True):
        assert_trees_close(variables_of(ours), variables_of(alone))
    assert float(abs(model.layers[2].mean[...]).sum()) > 0
    other = make()
    with pytest.raises(UnknownValueError, match=r"depend on a ShapeDtypeStruct.*\n.*Pass arrays instead"):
        bridge.lazy_init(other, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert variables_of(other.layers[1]) == {}


ON_THE_WAY = {
    "jit": lambda part, x: nnx.jit(lambda m, x: m(x))(part, x),
    "remat": lambda part, x: nnx.remat(lambda m, x: m(x))(part, x),
    "jit in remat": lambda part, x: nnx.remat(lambda m, x: nnx.jit(lambda m, x: m(x))(m, x))(part, x),
    "value_and_grad": lambda part, x: nnx.value_and_grad(lambda m, x: m(x).sum())(part, x)[0],
}
_compiled = nnx.jit(lambda m, x: m(x))


@pytest.mark.parametrize("name", [*ON_THE_WAY, "a function that is compiled already"])
def test_wrapped_modules_behind_transforms_are_found(name):
    class Model(nnx.Module):
        def __init__(self):
            self.part = ToNNX(nn.Dense(6), {"params": KEY})

        def __call__(self, x):
            return ON_THE_WAY.get(name, _compiled)(self.part, x)

    for _ in range(2):  # the second model finds everything compiled
        model = bridge.lazy_init(Model(), X)
        assert_trees_equal(variables_of(model.part), nn.Dense(6).init(jax.random.fold_in(KEY, 0), X))
        model(X)


def test_keys_and_values_behind_transforms_cannot_be_had():
    class Keyed(nnx.Module):
        def __init__(self):
            self.part, self.rngs = ToNNX(nn.Dense(6)), nnx.Rngs(0)

        def __call__(self, x):
            return nnx.jit(lambda m, r, x: m(x, rngs=r))(self.part, self.rngs, x)

    class Valued(nnx.Module):
        def __init__(self):
            self.part = ToNNX(Centred(), nnx.Rngs(0))

        def __call__(self, x):
            return nnx.jit(lambda m, x: m(x))(self.part, x)

    with pytest.raises(
        UnknownValueError, match=r"ToNNX\(Dense\) needs the values of its random keys(.|\n)*inside a JAX"
    ):
        bridge.lazy_init(Keyed(), X)
    with pytest.raises(UnknownValueError, match=r"ToNNX\(Centred\) needs the values of its inputs(.|\n)*inside a JAX"):
        bridge.lazy_init(Valued(), X)


def test_nothing_of_a_model_is_computed_row_29():
    ran = []

    class Model(nnx.Module):
        def __init__(self):
            self.part, self.rngs = ToNNX(nn.Dense(6)), nnx.Rngs(0)

        def __call__(self, x):
            jax.debug.callback(ran.append, x.sum())
            return self.part(x, rngs=self.rngs)

    model = bridge.lazy_init(Model(), X)
    jax.effects_barrier()
    assert ran == []
    model(X)
    jax.effects_barrier()
    assert len(ran) == 1


def test_a_failed_lazy_init_changes_nothing():
    model = ToNNX(CNN(), nnx.Rngs(0))
    with pytest.raises(TypeError):
        model.lazy_init(jnp.ones((4, 5)))  # cannot be reshaped
    assert variables_of(model) == {}
    assert int(model.rngs.default.count[...]) == 0
    outer = Outer(nnx.Rngs(0))
    with pytest.raises(ValueError, match="shape"):
        bridge.lazy_init(outer, jnp.ones((4, 5)))
    assert variables_of(outer.shared) == {}


def test_any_keyword_reaches_the_module_row_35():
    class Options(nn.Module):
        @nn.compact
        def __call__(self, x, name=None, fn=None, owner=None, options=None):
            assert type(options) is dict, "an argument was changed on the way"
            assert (name, fn, owner) == ("n", nn.relu, 1), "an argument was lost on the way"
            return nn.Dense(options["width"])(x)

    given = {"name": "n", "fn": nn.relu, "owner": 1, "options": {"width": 2}}
    model = ToNNX(Options(), nnx.Rngs(0)).lazy_init(X, **given)
    assert model(X, **given).shape == (4, 2)


def test_linen_code_knows_that_it_is_initialised_row_64():
    seen = []

    class Watches(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(bridge.is_linen_initializing())
            return nn.Dense(2)(x)

    model = ToNNX(Watches(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    assert seen == [True, False]


class Encoder(ToNNX):
    """A wrapper with methods of its own."""

    def scaled(self, x):
        return 2 * self(x)


def test_a_method_of_a_subclass_is_what_is_initialised():
    model = Encoder(nn.Dense(3), {"params": KEY}, parity=True)
    bridge.lazy_init(model.scaled, X)
    assert_trees_equal(model.scaled(X), 2 * nn.Dense(3).apply(nn.Dense(3).init(KEY, X), X))


class Doubled(ToNNX):
    """A wrapper with a call of its own."""

    def __call__(self, x):
        return super().__call__(jnp.concatenate([x, x], axis=-1))


def test_a_call_of_a_subclass_runs_like_any_method():
    model = Doubled(nn.Dense(3), {"params": KEY}, parity=True)
    bridge.lazy_init(model.__call__, X)  # as before: `lazy_init(model, x)` is that of the wrapped module
    assert model.kernel.shape == (2 * X.shape[-1], 3)
    direct = Doubled(nn.Dense(3), {"params": KEY}, parity=True).lazy_init(X)
    assert direct.kernel.shape == (X.shape[-1], 3)
