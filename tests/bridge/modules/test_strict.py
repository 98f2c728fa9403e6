"""bridge.Module where it is stricter than flax.nnx's, as the requirement rows ask: Linen is the oracle."""

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx

import bridge
import nnx_core as nnx
from bridge._errors import UnboundModuleError
from bridge.modules._errors import NameTwiceError, OutsideBridgeModuleError
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = normal(3, 4, 3)
KEY = jax.random.key(0)


class Dense(bridge.Module):
    features: int

    @bridge.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ kernel[...] + self.param("bias", nn.initializers.zeros, (self.features,))[...]


class Outer(bridge.Module):
    @bridge.compact
    def __call__(self, x):
        x = Dense(4)(x)
        x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(4, 3, rngs=rngs))(x)
        return bridge.linen_in_bridge_mdl(nn.Dense(2), name="linen")(x)


class LinenOuter(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="Dense_0")(x)
        x = nn.Dense(3, name="Linear_0")(x)
        return nn.Dense(2, name="linen")(x)


def without(variables, module, name):
    params = variables["params"]
    inner = {key: x for key, x in params[module].items() if key != name}
    return {"params": {**params, module: inner}}


#: The scope that our error names: a Linen module inside raises its own, in which it is the root.
SCOPES = {"Dense_0": "/Dense_0", "Linear_0": "/Linear_0", "linen": "/"}


@pytest.mark.parametrize(("module", "name"), [("Dense_0", "bias"), ("Linear_0", "kernel"), ("linen", "kernel")])
def test_row_1_and_54_a_missing_parameter_raises_what_linen_raises(module, name):
    variables = Outer().init(0, X)
    broken = without(variables, module, name)
    with pytest.raises(flax.errors.ScopeParamNotFoundError) as linen:
        LinenOuter().apply(broken, X)
    for rngs in (None, 0):  # flax.nnx.bridge runs on fresh random weights if there are keys
        with pytest.raises(flax.errors.ScopeParamNotFoundError, match=f'"{name}"') as ours:
            Outer().apply(broken, X, rngs=rngs)
    assert ours.value.args[0] == linen.value.args[0].replace(f'"/{module}"', f'"{SCOPES[module]}"')
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match='"kernel" from collection "params" in "/Dense_0"'):
        Outer().apply({}, X)


@pytest.mark.parametrize("module", ["Dense_0", "Linear_0", "linen"])
def test_row_1_a_wrong_shape_raises_what_linen_raises(module):
    variables = Outer().init(0, X)
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"][module]["bias"] = jnp.zeros(7)
    with pytest.raises(flax.errors.ScopeParamShapeError) as linen:
        LinenOuter().apply(broken, X)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r'"bias".*\(7,\)') as ours:
        Outer().apply(broken, X)
    assert ours.value.args[0] == linen.value.args[0].replace(f'"/{module}"', f'"{SCOPES[module]}"')


def test_row_1_setup_modules_and_fields_too():
    class Net(bridge.Module):
        inner: nnx.Module

        def setup(self):
            self.first = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 3, rngs=rngs))

        def __call__(self, x):
            return self.inner(self.first(x))

    net = Net(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    y, variables = net.init_with_output(1, X)
    assert_trees_close(net.apply(variables, X), y)
    for module in ("inner", "first"):
        with pytest.raises(flax.errors.ScopeParamNotFoundError, match=f'"bias" in scope "/{module}"'):
            net.apply(without(variables, module, "bias"), X)
    net.apply(jax.tree.map(jnp.zeros_like, variables), X)
    assert float(jnp.abs(net.inner.kernel[...]).sum()) > 0  # the caller's module is his


def test_variables_are_made_where_linen_makes_them():
    class Ours(bridge.Module):
        @bridge.compact
        def __call__(self, make=True):
            return self.variable("cache", "n", jnp.ones if make else None, *([(2,)] if make else []))[...]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, make=True):
            return self.variable("cache", "n", jnp.ones if make else None, *([(2,)] if make else [])).value

    assert_trees_equal(Ours().apply({}, mutable=["cache"]), Linen().apply({}, mutable=["cache"]))
    there = {"cache": {"other": jnp.ones(1)}}
    for variables, make in (({}, True), (there, True), (there, False)):
        with pytest.raises(flax.errors.FlaxError) as linen:
            Linen().apply(variables, make)
        with pytest.raises(type(linen.value)) as ours:
            Ours().apply(variables, make)
        assert ours.value.args[0] == linen.value.args[0]


def test_mutable_is_linens():
    """Only mutable collections are written, and returned: then `{"params": params, **updates}` is safe, as in Linen.

    flax.nnx.bridge returns all of them: params from the updates replace the trained ones in that very idiom.
    """

    class Ours(bridge.Module):
        @bridge.compact
        def __call__(self, *names):
            for name in ("counts", "ema"):
                variable = self.variable(name, "n", lambda: jnp.zeros(()))
                if name in names:
                    variable[...] += 1
            self.param("p", nn.initializers.ones, ())

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, *names):
            for name in ("counts", "ema"):
                variable = self.variable(name, "n", lambda: jnp.zeros(()))
                if name in names:
                    variable.value += 1
            self.param("p", nn.initializers.ones, ())

    variables = Ours().init(0)
    assert_trees_equal(variables, Linen().init(KEY))
    for mutable in ("counts", ["counts"], ["counts", "ema"], True, [], ("ema",), nn.DenyList(["ema"])):
        mine, linen = (m.apply(variables, mutable=mutable) for m in (Ours(), Linen()))
        assert_trees_equal(mine, linen)
    assert_trees_equal(Ours().apply(variables, "counts", mutable="counts"), (None, {"counts": {"n": jnp.ones(())}}))
    for mutable in (False, ["counts"]):
        with pytest.raises(flax.errors.ModifyScopeVariableError) as linen:
            Linen().apply(variables, "ema", mutable=mutable)
        with pytest.raises(flax.errors.ModifyScopeVariableError) as ours:
            Ours().apply(variables, "ema", mutable=mutable)
        assert ours.value.args[0] == linen.value.args[0]


def test_init_leaves_averages_as_linen_does():
    """NNX's and Linen's BatchNorm: init returns what the constructor made; flax.nnx.bridge moves NNX's."""

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.BatchNorm(3, rngs=rngs), name="nnx")(x)
            return bridge.linen_in_bridge_mdl(nn.BatchNorm(use_running_average=False), name="linen")(x)

    stats = Net().init(0, X)["batch_stats"]
    fresh = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    assert_trees_equal(stats, {"nnx": fresh, "linen": fresh})


def test_row_4_and_25_apply_draws_only_what_is_asked_for():
    """No initializer runs in apply, and no stream moves in a deterministic call: flax.nnx.bridge moves three."""
    variables = Outer().init(0, X)
    rngs = nnx.Rngs(0, dropout=1)
    Outer().apply(variables, X, rngs=rngs)
    assert [int(s.count[...]) for s in rngs.values()] == [0, 0]
    text = str(jax.make_jaxpr(lambda v, x: Outer().apply(v, x))(variables, X))
    assert "random" not in text
    assert "threefry" not in text


class Drop(bridge.Module):
    rate: float = 0.5

    @bridge.compact
    def __call__(self, x, deterministic=False):
        first = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Dropout(self.rate, rngs=rngs))
        second = bridge.linen_in_bridge_mdl(nn.Dropout(self.rate), name="linen")
        return first(x, deterministic=deterministic), second(x, deterministic=deterministic)


def test_row_5_dropout_needs_a_key_and_gets_another_each_step():
    ones = jnp.ones((20, 20))
    assert_trees_equal(Drop().apply({}, ones, deterministic=True), (ones, ones))
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        Drop().apply({}, ones)
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "params"'):
        Dense(2).init(None, X)
    rngs = nnx.Rngs(dropout=1)
    steps = [Drop().apply({}, ones, rngs=rngs) for _ in range(2)]
    for i in range(2):
        assert not jnp.array_equal(steps[0][i], steps[1][i])
        assert 0.3 < float((steps[0][i] == 0).mean()) < 0.7
    assert_trees_equal(Drop().apply({}, ones, rngs={"dropout": 1}), steps[0])
    assert_trees_equal(Drop().apply({}, ones, rngs={"dropout": jax.random.key(1)}), steps[0])


def test_missing_stream_is_looked_for_in_params_as_in_linen():
    class Net(bridge.Module):
        @bridge.compact
        def __call__(self):
            return jax.random.key_data(self.make_rng("noise"))

    assert_trees_equal(Net().apply({}, rngs={"params": 1}), Net().apply({}, rngs={"noise": 1}))
    with pytest.raises(flax.errors.InvalidRngError, match='Net at / needs PRNG for "noise"'):
        Net().apply({}, rngs={"dropout": 1})


# ---- names ----


def two(make_first, make_second):
    class Net(bridge.Module):
        size: int = 2

        @bridge.compact
        def __call__(self, x):
            make_first(self)
            make_second(self)
            return x

    return Net()


MAKERS = {
    "param": lambda m: m.param("a", nn.initializers.zeros, ()),
    "variable": lambda m: m.variable("ema", "a", jnp.zeros, ()),
    "submodule": lambda m: Dense(2, name="a"),
    "nnx": lambda m: bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(1, 1, rngs=rngs), name="a"),
    "linen": lambda m: bridge.linen_in_bridge_mdl(nn.Dense(1), name="a"),
}


@pytest.mark.parametrize("first", MAKERS)
@pytest.mark.parametrize("second", MAKERS)
def test_the_same_name_twice(first, second):
    """Legal only for two collections. flax.nnx.bridge silently shares or drops one of them."""
    net = two(MAKERS[first], MAKERS[second])
    if {first, second} == {"param", "variable"}:
        assert set(net.init(0, X)) == {"params", "ema"}
        return
    with pytest.raises(NameTwiceError, match=r"(?s)'a' of Net at /:.*a name of its own.*found: a .* before\nGive"):
        net.init(0, X)


def test_names_of_fields_and_of_other_methods():
    field = two(lambda m: m.param("size", nn.initializers.zeros, ()), lambda m: None)
    with pytest.raises(NameTwiceError, match=r"(?s)param 'size' of Net at /:.*found: a field of the module"):
        field.init(0, X)

    class Base(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return Dense(3)(x)

    class Derived(Base):
        @bridge.compact
        def __call__(self, x):
            return Dense(3)(super().__call__(x))

    with pytest.raises(NameTwiceError, match=r"(?s)submodule 'Dense_0' of Derived.*the method 'Derived.__call__' made"):
        Derived().init(0, X)


# ---- where modules may be used ----


def test_unbound_modules_say_what_to_do():
    with pytest.raises(UnboundModuleError, match=r"(?s)a call of '__call__' of Dense, which is not bound.*Call Dense"):
        Dense(2)(X)
    for use in (lambda m: m.param("a", nn.initializers.zeros, ()), lambda m: m.variable("c", "a"), Dense.make_rng):
        with pytest.raises(UnboundModuleError, match=r"(?s)of Dense, which is not bound.*bind\(variables\)"):
            use(Dense(2))

    class Plain(bridge.Module):
        def __call__(self, x):
            return Dense(2)(x)

    with pytest.raises(UnboundModuleError, match="Dense"):  # neither setup nor compact: it has no name
        Plain().init(0, X)


def test_interop_outside_a_bridge_module():
    with pytest.raises(OutsideBridgeModuleError, match=r"(?s)^nnx_in_bridge_mdl\(\) makes.*found: a call outside"):
        bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(1, 1, rngs=rngs))
    with pytest.raises(OutsideBridgeModuleError, match=r"(?s)^linen_in_bridge_mdl\(\).*ToNNX"):
        bridge.linen_in_bridge_mdl(nn.Dense(1))


def test_a_global_module_in_setup_is_copied():
    shared = Dense(2)

    class Net(bridge.Module):
        def setup(self):
            self.dense = shared
            self.more = [shared]

        def __call__(self, x):
            return self.dense(x) + self.more[0](x)

    assert set(Net().init(0, X)["params"]) == {"dense", "more"}
    assert shared.scope is None
    assert shared == Dense(2)


def test_what_flax_does_instead():
    """The deviations above are there to this day: when one goes away, so may our row."""
    lib = flax_nnx.bridge

    class Two(lib.Module):
        @lib.compact
        def __call__(self):
            self.param("a", nn.initializers.normal(), ())
            self.variable("ema", "a", jnp.zeros, ())
            return self.param("b", nn.initializers.normal(), ())

    variables = Two().init(0)
    assert set(variables) == {"params"}
    assert Two().apply({"params": {"a": jnp.ones(())}}, rngs=1) is not None
    assert set(Two().apply(variables, mutable=["ema"])[1]) == {"params"}
