"""bridge.Module beside flax.nnx.bridge.Module: the same program, the same names, numbers and initial values."""

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.core import freeze

import bridge
import nnx_core as nnx
from bridge.modules._errors import NameTwiceError
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(3, 4, 3))
LIBRARIES = [(nnx, bridge), (flax_nnx, flax_nnx.bridge)]


def dense_of(lib):
    class Dense(lib.Module):
        features: int
        use_bias: bool = True

        @lib.compact
        def __call__(self, x):
            y = x @ self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))[...]
            return y + self.param("bias", nn.initializers.normal(), (self.features,))[...] if self.use_bias else y

    return Dense


def compact_net(n, lib):
    """Submodules named by their class and by hand, one without bias, one used twice."""
    Dense = dense_of(lib)

    class Net(lib.Module):
        width: int

        @lib.compact
        def __call__(self, x):
            x = jnp.tanh(Dense(self.width)(x))
            shared = Dense(self.width, use_bias=False)
            return Dense(2, name="head")(shared(shared(x)))

    return Net(5)


def setup_net(n, lib):
    """Parameters and submodules of setup, nested, and a method."""
    Dense = dense_of(lib)

    class Inner(lib.Module):
        def setup(self):
            self.scale = self.param("scale", nn.initializers.normal(), (3,))

        def __call__(self, x):
            return x * self.scale[...]

    class Net(lib.Module):
        inner: Inner

        def setup(self):
            self.zero = Inner()
            self.shift = self.param("shift", nn.initializers.normal(), (3,))
            self.out = Dense(2)

        def encode(self, x):
            return self.inner(self.zero(x)) + self.shift[...]

        def __call__(self, x):
            return self.out(self.encode(x))

    return Net(Inner())


def mixed_net(n, lib):
    """NNX and Linen submodules between the module's own."""
    Dense = dense_of(lib)

    class Net(lib.Module):
        @lib.compact
        def __call__(self, x):
            x = Dense(4)(x)
            x = lib.nnx_in_bridge_mdl(lambda rngs: n.Linear(4, 5, rngs=rngs))(x)
            x = lib.linen_in_bridge_mdl(nn.Conv(3, (1,)))(x)
            x = lib.nnx_in_bridge_mdl(lambda rngs: n.BatchNorm(3, rngs=rngs), name="norm")(x)
            return Dense(2)(lib.linen_in_bridge_mdl(nn.Dense(3), name="linen")(x))

    return Net()


def setup_mixed_net(n, lib):
    class Net(lib.Module):
        def setup(self):
            self.first = lib.nnx_in_bridge_mdl(lambda rngs: n.Linear(3, 4, rngs=rngs))
            self.second = lib.linen_in_bridge_mdl(nn.Dense(2))

        def __call__(self, x):
            return self.second(self.first(x))

    return Net()


def counting_net(n, lib):
    class Net(lib.Module):
        @lib.compact
        def __call__(self, x):
            count = self.variable("counts", "n", lambda: jnp.zeros(()))
            count[...] += 1
            key = jax.random.key_data(self.make_rng("noise"))
            return x + count[...], key

    return Net()


def custom_init_net(n, lib):
    Dense = dense_of(lib)

    class Net(lib.Module):
        def __init__(self, sizes):
            self.sizes = sizes

        @lib.compact
        def __call__(self, x):
            for size in self.sizes:
                x = Dense(size)(x)
            return x

    return Net((4, 2))


def shared_net(n, lib):
    """One submodule under three attributes: a priority says which of them names it."""
    Dense = dense_of(lib)

    class Net(lib.Module):
        def setup(self):
            self.set_attr_priority("a", lib.AttrPriority.LOW)
            self.b = Dense(3)
            self.a = self.b
            self.c = self.b

        def __call__(self, x):
            return self.c(self.a(x))

    return Net()


def scanned_net(n, lib):
    """NNX layers made under vmap, run under scan; a submodule of its own under jit and remat."""
    Dense = dense_of(lib)

    class Net(lib.Module):
        @lib.compact
        def __call__(self, x):
            @n.split_rngs(splits=2)
            @n.vmap
            def make(rngs):
                return n.Linear(3, 3, rngs=rngs)

            layers = lib.nnx_in_bridge_mdl(make)
            x = n.scan(lambda x, layer: layer(x), in_axes=(n.Carry, 0), out_axes=n.Carry)(x, layers)
            x = n.jit(lambda m, x: m(x))(Dense(3), x)
            return n.remat(lambda m, x: m(x))(Dense(3), x)

    return Net()


PROGRAMS = [compact_net, setup_net, mixed_net, setup_mixed_net, counting_net, custom_init_net, shared_net, scanned_net]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_same_program_same_variables_and_outputs(program):
    (n1, b1), (n2, b2) = LIBRARIES
    ours, theirs = program(n1, b1), program(n2, b2)
    mine, out = ours.init(n1.Rngs(0, noise=5), X), theirs.init(n2.Rngs(0, noise=5), X)
    # NNX's averages have moved in theirs: test_init_leaves_averages_as_linen_does
    assert_trees_equal(*({k: v for k, v in x.items() if k != "batch_stats"} for x in (mine, out)))
    mutable = ["counts", "batch_stats"]
    y1, after1 = ours.apply({**out, **mine}, X, rngs=n1.Rngs(0, noise=7), mutable=mutable)
    y2, after2 = theirs.apply(mine, X, rngs=n2.Rngs(0, noise=7), mutable=mutable)
    assert_trees_close(y1, y2)
    # theirs returns every collection: test_mutable_is_linens
    assert_trees_close(after1, {k: v for k, v in after2.items() if k in mutable})


@pytest.mark.parametrize("rngs", [0, {"params": 3}, {"default": 4}, {"params": 1, "dropout": 2}, jax.random.key(8)])
def test_same_rngs_same_initial_values(rngs):
    Ours, Theirs = dense_of(bridge), dense_of(flax_nnx.bridge)
    assert_trees_equal(Ours(4).init(rngs, X), Theirs(4).init(rngs, X))


def test_methods_by_name_function_and_bound_method():
    for n, lib in LIBRARIES:
        net = setup_net(n, lib)
        variables = net.init(0, X)
        encoded = net.apply(variables, X, method="encode")
        assert_trees_equal(net.apply(variables, X, method=type(net).encode), encoded)
        assert_trees_equal(net.apply(variables, X, method=net.encode), encoded)
        assert_trees_equal(net.apply(variables, X, method=lambda m, x: m.encode(x) * 2), encoded * 2)
        assert set(net.init(0, X, method="encode")["params"]) == {"inner", "zero", "shift"}
        with pytest.raises(flax.errors.ApplyModuleInvalidMethodError, match="3 is not a valid function"):
            net.apply(variables, X, method=3)
        with pytest.raises(AttributeError, match="nothing"):
            net.apply(variables, X, method="nothing")


def test_partitioned_parameters_keep_their_boxes():
    """Rows 7 and 68: boxes cross unchanged, without a mesh."""

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self):
            init = nn.initializers.normal()
            a = self.param("a", bridge.with_partitioning(init, ("in", "out")), (2, 3))
            b = self.param("b", nn.with_partitioning(init, ("in", None)), (2, 3))
            c = self.param("c", nn.with_logical_partitioning(init, ("in", "out")), (2, 3))
            boxed = self.param("d", nn.with_partitioning(init, ("in", None)), (2, 3), unbox=False)
            assert a.out_sharding == c.out_sharding == ("in", "out")
            assert isinstance(boxed.get_value(), nn.Partitioned)
            return a[...] + b[...] + c[...]

    y, variables = Net().init_with_output(0)
    kinds = {name: (type(box), box.names) for name, box in variables["params"].items()}
    plain = (nn.Partitioned, ("in", None))
    logical = (nn.LogicallyPartitioned, ("in", "out"))
    assert kinds == {"a": (nn.Partitioned, ("in", "out")), "b": plain, "c": logical, "d": plain}
    assert_trees_equal(Net().apply(variables), y)
    mesh = jax.make_mesh((1,), ("in",), axis_types=(jax.sharding.AxisType.Auto,))
    assert bridge.to_linen_var(nnx.Param(bridge.with_partitioning(jnp.ones, ("in",), mesh)((2,)))).mesh is mesh


def test_hostile_names():
    """Rows 17 and 18: names of methods, and one name in two collections."""

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self):
            found = [self.param(name, nn.initializers.normal(), ())[...] for name in ("train", "apply", "param", "w")]
            found.append(self.variable("ema", "w", jnp.zeros, ())[...])
            found.append(dense_of(bridge)(2, name="init")(X).sum())
            found.append(dense_of(bridge)(2, name="scope")(X).sum())
            return found

    y, variables = Net().init_with_output(0)
    assert set(variables["params"]) == {"train", "apply", "param", "w", "init", "scope"}
    assert set(variables["ema"]) == {"w"}
    assert_trees_equal(Net().apply(variables), y)


def test_any_mapping_and_integer_keys():
    """Rows 16, 21 and 31: FrozenDict, integer keys of lists; the input is not touched; the output has text keys."""
    Dense = dense_of(bridge)

    class Net(bridge.Module):
        def setup(self):
            self.layers = [Dense(3), Dense(2)]
            self.heads = {"a": Dense(1)}

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.heads["a"](x)

    y, variables = Net().init_with_output(0, X)
    assert list(variables["params"]["layers"]) == ["0", "1"]
    layers = variables["params"]["layers"]
    numbered = freeze({"params": {**variables["params"], "layers": {0: layers["0"], 1: layers["1"]}}})
    before = jax.tree.map(lambda x: x, numbered)
    assert_trees_equal(Net().apply(numbered, X), y)
    assert_trees_equal(numbered, before)


def test_sow_and_perturb_as_in_linen():
    class Mixin:
        def body(self, x):
            self.sow("intermediates", "h", x)
            self.sow("intermediates", "h", x + 1)
            return self.perturb("delta", x * 2)

    class Ours(bridge.Module, Mixin):
        @bridge.compact
        def __call__(self, x):
            return self.body(x)

    class Linen(nn.Module, Mixin):
        @nn.compact
        def __call__(self, x):
            return self.body(x)

    ours, linen = Ours().init(0, X), Linen().init(jax.random.key(0), X)
    assert_trees_equal(ours, linen)
    for mutable in (False, ["intermediates"]):
        for variables in ({}, ours):
            mine = Ours().apply(variables, X, mutable=mutable)
            assert_trees_equal(mine, Linen().apply(variables, X, mutable=mutable))

    def loss(model, deltas):
        return (model.apply({"perturbations": deltas}, X) ** 2).sum()

    gradients = [jax.grad(lambda d, m=m: loss(m, d))(ours["perturbations"]) for m in (Ours(), Linen())]
    assert_trees_equal(*gradients)


def test_modules_are_configuration():
    """Equal by their fields, hashable, not changed by init or apply, shared fields stay shared."""
    Dense = dense_of(bridge)
    assert Dense(3) == Dense(3) != Dense(4)
    assert hash(Dense(3)) == hash(Dense(3))

    class Pair(bridge.Module):
        a: Dense
        b: Dense

        def __call__(self, x):
            return self.a(x) + self.b(x)

    one = Dense(3)
    shared, apart = Pair(one, one), Pair(Dense(3), Dense(3))
    assert set(shared.init(0, X)["params"]) == {"a"}
    assert set(apart.init(0, X)["params"]) == {"a", "b"}
    assert one.scope is None
    assert vars(one) == vars(Dense(3))
    assert one.variables == {}
    assert not one.is_initializing()


def test_what_is_running():
    """current_module and current_context, seen from NNX and Linen code too; nothing is left when a call fails."""
    seen = []

    class Spy(nnx.Module):
        def __call__(self):
            seen.append(type(bridge.current_module()).__name__)

    class LinenSpy(nn.Module):
        def __call__(self):
            seen.append(type(bridge.current_module()).__name__)

    class Child(bridge.Module):
        def __call__(self):
            context = bridge.current_context()
            seen.append((context.module is self, context.in_compact, self.is_initializing()))

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, fail=False):
            bridge.nnx_in_bridge_mdl(lambda rngs: Spy())()
            bridge.linen_in_bridge_mdl(LinenSpy())()
            Child()()
            seen.append((bridge.current_context().in_compact, dict(bridge.current_context().type_counter)))
            alone = Child(parent=None)
            seen.append(alone.scope)
            if fail:
                raise KeyError("on purpose")

    Net().init(0)
    counter = {Spy: 1, LinenSpy: 1, Child: 1}
    assert seen[:2] == ["Net", "Net"]
    assert seen[-3:] == [(True, False, True), (True, counter), None]
    with pytest.raises(KeyError, match="on purpose"):
        Net().apply({}, fail=True)
    assert bridge.current_module() is None
    assert bridge.current_context() is None


def test_one_class_name_twice_gives_two_names():
    """Two classes called Dense: flax's modules share one set of parameters then."""
    First, Second = dense_of(bridge), dense_of(bridge)

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return Second(3)(First(3)(x))

    assert set(Net().init(0, X)["params"]) == {"Dense_0", "Dense_1"}


def test_called_again_with_other_fields():
    """A compact method that runs twice uses the same parameters, also where a submodule is made anew."""
    Dense = dense_of(bridge)

    class Net(bridge.Module):
        @bridge.compact
        def step(self, x, use_bias):
            return Dense(3, use_bias)(x)

        def __call__(self, x):
            return self.step(x, True), self.step(x, False), self.step(x, True)

    (with_bias, without, again), variables = Net().init_with_output(0, X)
    assert set(variables["params"]["Dense_0"]) == {"kernel", "bias"}
    assert_trees_equal(with_bias, again)
    assert_trees_close(without, X @ variables["params"]["Dense_0"]["kernel"])


def test_attributes_of_setup_are_the_users():
    """`self.w = self.param("w", ...)[...]` keeps the array under `w`, and the parameter in the variables."""

    class Net(bridge.Module):
        def setup(self):
            self.w = self.param("w", nn.initializers.normal(), (3,))[...]
            self.p = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x * self.w + self.p[...]

    y, variables = Net().init_with_output(0, X)
    assert set(variables["params"]) == {"w", "p"}
    zeros = jax.tree.map(jnp.zeros_like, variables)
    assert_trees_equal(Net().apply(variables, X), y)
    assert_trees_equal(Net().apply(zeros, X), jnp.zeros_like(X))


def test_name_errors_are_linens():
    assert issubclass(NameTwiceError, flax.errors.NameInUseError)
