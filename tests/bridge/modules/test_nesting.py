"""bridge.Module with NNX and Linen inside, inside NNX and Linen, under transforms, in training: the same numbers."""

import copy
import pickle

import flax.errors
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToLinen, ToNNX
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(3, 6, 3) + 1)
Y = jnp.asarray(normal(4, 6, 2))


class Head(bridge.Module):
    features: int

    @bridge.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ kernel[...]


class Mixed(bridge.Module):
    """Own parameters, NNX and Linen layers with averages and dropout, from setup and from a compact method."""

    rate: float = 0.5

    def setup(self):
        self.linear = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 4, rngs=rngs))
        self.norm = bridge.linen_in_bridge_mdl(nn.BatchNorm(use_running_average=None))

    @bridge.compact
    def __call__(self, x, train=True):
        x = jnp.tanh(self.norm(self.linear(x), use_running_average=not train))
        average = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.BatchNorm(4, rngs=rngs), name="average")
        x = average(x, use_running_average=not train)
        x = bridge.linen_in_bridge_mdl(nn.Dropout(self.rate), name="drop")(x, deterministic=not train)
        return Head(2)(x)


class LinenMixed(nn.Module):
    """The same in Linen, with the same names."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="linear")(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.BatchNorm(use_running_average=not train, name="average", epsilon=1e-5, momentum=0.99)(x)
        return nn.Dense(2, use_bias=False, name="Head_0")(x)


def trained(model, variables, steps=3, **kwargs):
    """Losses, params and averages of some steps of the usual Linen training loop."""
    optimizer = optax.adam(0.05)
    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            y, updates = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"], **kwargs)
            return ((y - Y) ** 2).mean(), updates["batch_stats"]

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state_ = optimizer.update(gradients, state)
        return value, optax.apply_updates(params, updates), stats, state_

    losses = []
    for _ in range(steps):
        value, params, stats, state = step(params, stats, state)
        losses.append(value)
    return losses, params, stats


def test_training_equals_linens():
    variables = Mixed(0.0).init(0, X)
    linen = LinenMixed().init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, linen)
    ours, theirs = trained(Mixed(0.0), variables), trained(LinenMixed(), variables)
    assert_trees_close(ours, theirs)
    assert ours[0][-1] < ours[0][0]
    assert_trees_close(
        Mixed().apply({"params": ours[1], "batch_stats": ours[2]}, X, train=False),
        LinenMixed().apply({"params": ours[1], "batch_stats": ours[2]}, X, train=False),
    )


def test_training_with_dropout():
    variables = Mixed().init(0, X)
    key = jax.random.key(9)
    first, again = (trained(Mixed(), variables, rngs={"dropout": key}) for _ in range(2))
    other = trained(Mixed(), variables, rngs={"dropout": jax.random.key(8)})
    assert_trees_equal(first, again)
    assert float(first[0][0]) != float(other[0][0])


# ---- deeper ----


class Inner(nnx.Module):
    """NNX that holds Linen."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.linen = ToNNX(nn.Dense(3), rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.count[...] += 1
        return self.linen(self.linear(x))


class LinenInner(nn.Module):
    """Linen that holds NNX that holds Linen."""

    @nn.compact
    def __call__(self, x):
        return ToLinen(Inner, name="inner")(nn.Dense(3)(x))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_three_layers_inside(kind):
    """Row 14: bridge.Module -> ToLinen -> NNX -> ToNNX -> Linen, and bridge.Module -> NNX -> ToNNX -> Linen."""

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            if kind == "nnx":
                return bridge.nnx_in_bridge_mdl(lambda rngs: Inner(rngs=rngs))(x)
            return bridge.linen_in_bridge_mdl(LinenInner())(x)

    y, variables = Net().init_with_output(0, X)
    at, name = ((), "Inner_0") if kind == "nnx" else (("inner",), "LinenInner_0")

    def below(tree):
        tree = tree[name]
        for key in at:
            tree = tree[key]
        return tree

    assert jax.tree.map(jnp.shape, below(variables["params"])) == {
        "linear": {"kernel": (3, 3), "bias": (3,)},
        "linen": {"kernel": (3, 3), "bias": (3,)},
    }
    assert float(below(variables["batch_stats"])["count"]) == 0
    out, updates = Net().apply(variables, X, mutable=["batch_stats"])
    assert_trees_close(out, y)
    assert float(below(updates["batch_stats"])["count"]) == 1
    assert_trees_close(Net().apply({**variables, **updates}, X, mutable=["batch_stats"])[0], y)


def test_in_nnx_and_back():
    """NNX -> bridge.Module: `bind` makes it a stateful NNX module; under nnx.jit and grad it trains as apply does."""

    class Model(nnx.Module):
        def __init__(self, variables, *, rngs):
            self.first = nnx.Linear(3, 3, rngs=rngs)
            self.mixed = Mixed().bind(variables, rngs=rngs)

        def __call__(self, x, train):
            return self.mixed(self.first(x), train)

    variables = Mixed().init(0, X)
    model = Model(variables, rngs=nnx.Rngs(1, dropout=2))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    first = model.first(X)
    assert_trees_close(model(X, False), Mixed().apply(variables, first, train=False))
    kernel = model.mixed.linear.kernel
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert {"mixed/linear/kernel", "mixed/Head_0/kernel", "mixed/norm/scale", "first/bias"} <= paths
    rngs = {"dropout": model.mixed.scope.rngs.dropout.key.get_value()}
    expected, updates = Mixed().apply(variables, first, rngs=nnx.Rngs(rngs), mutable=["batch_stats"])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y = model(X, True)
            return ((y - Y) ** 2).mean(), y

        (value, y), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return value, y

    losses = [step(model, optimizer)]
    assert_trees_close(losses[0][1], expected)
    assert_trees_close(model.mixed.variables["batch_stats"].unfreeze()["norm"], updates["batch_stats"]["norm"])
    losses += [step(model, optimizer) for _ in range(10)]
    assert losses[-1][0] < losses[0][0]
    assert model.mixed.linear.kernel is kernel  # law 3
    assert_trees_close(model(X, False), Mixed().apply(model.mixed.variables, model.first(X), train=False))


def test_bound_modules_split_merge_clone_and_keep_their_children():
    variables = Mixed().init(0, X)
    model = Mixed().bind(variables)
    expected = model(X, False)
    head = model.Head_0
    model(X, False)
    assert model.Head_0 is head
    for again in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert again.Head_0 is not head
        assert_trees_equal(again(X, False), expected)
    assert_trees_equal(model.variables.unfreeze(), variables)
    untouched = Mixed().bind(variables)  # nothing has been asked for: an optimizer made now fits later
    kept = [{path: x for path, x in nnx.iter_graph(m) if isinstance(x, nnx.Param)} for m in (untouched, model)]
    assert set(kept[0]) == set(kept[1])
    fresh = nnx.merge(*nnx.split(untouched))
    assert_trees_equal(fresh(X, False), expected)
    untouched(X, False)
    after = dict(nnx.iter_graph(untouched))
    assert all(after[path] is variable for path, variable in kept[0].items())


def test_bind_is_strict_and_leaves_configuration_alone():

    config = Head(2)
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match='"kernel" from collection "params"'):
        config.bind({}, rngs=0)(X)
    bound = config.bind(config.init(0, X))
    assert config.scope is None
    assert not bound.is_initializing()
    assert bound != Head(2)


def test_linen_around_nnx_around_bridge():
    """Linen -> ToLinen -> NNX -> bridge.Module: variables under the path of each, trained by Linen's loop."""
    variables = Head(2).init(0, X)

    class Holder(nnx.Module):
        def __init__(self, *, rngs):
            self.head = Head(2).bind(variables)

        def __call__(self, x):
            return self.head(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ToLinen(Holder, name="holder")(x)

    around = Outer().init(jax.random.key(0), X)
    leaves = jax.tree.leaves(around["params"])
    assert_trees_equal(leaves, jax.tree.leaves(variables))
    assert_trees_close(nn.jit(Outer)().apply(around, X), Head(2).apply(variables, X))


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_apply_is_a_pure_function(transform):
    variables = Mixed().init(0, X)
    out = Mixed().apply(variables, X, train=False)
    assert_trees_close(transform(lambda v, x: Mixed().apply(v, x, train=False))(variables, X), out)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), variables)
    both = jax.vmap(lambda v: Mixed().apply(v, X, train=False))(stacked)
    assert_trees_close(both[0], out)
    abstract = jax.eval_shape(lambda: Mixed().init(0, X))
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(jnp.shape, variables)


def test_linen_transforms_inside():
    """nn.jit, nn.remat and nn.scan of a Linen submodule, next to parameters of the module itself."""
    Scanned = nn.scan(nn.remat(nn.jit(LinenCell)), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            x = bridge.linen_in_bridge_mdl(Scanned(), name="cells")(x, None)[0]
            return Head(2)(x)

    y, variables = Net().init_with_output(0, X)
    assert variables["params"]["cells"]["Dense_0"]["kernel"].shape == (3, 3, 3)
    cells = {"params": variables["params"]["cells"]}
    inner = Scanned().apply(cells, X, None)[0]
    assert_trees_close(y, inner @ variables["params"]["Head_0"]["kernel"])
    assert_trees_close(Net().apply(variables, X), y)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(3)(x)), None


def test_state_that_a_call_makes():
    """Row 13: an NNX layer creates its cache in a call; the next one finds it."""

    class Cache(nnx.Module):
        def __init__(self):
            self.seen = None

        def __call__(self, x):
            seen = self.seen
            if seen is None:
                self.seen = nnx.Cache(x)
                return x
            seen[...] = seen[...] + x
            return seen[...]

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return bridge.nnx_in_bridge_mdl(lambda rngs: Cache())(x)

    variables = {}
    for i in range(1, 4):
        y, variables = Net().apply(variables, jnp.ones(2), mutable=["cache"])
        assert_trees_equal(y, jnp.full(2, float(i)))
        assert_trees_equal(variables, {"cache": {"Cache_0": {"seen": y}}})


def test_intermediates_of_nnx_and_linen_children():
    class Sower(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "h", x)
            return x

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            layer = bridge.nnx_in_bridge_mdl(lambda rngs: Sower())
            return layer(layer(x) + 1)

    assert Net().init(0, X) == {}
    assert_trees_equal(Net().apply({}, X), X + 1)
    _, updates = Net().apply({}, X, mutable=["intermediates"])
    assert_trees_equal(updates, {"intermediates": {"Sower_0": {"h": (X, X + 1)}}})


def test_copies_pickles_and_static_arguments():
    """Row 19: configuration and bound modules are copied and pickled; equal configuration compiles once."""
    variables = Head(2).init(0, X)
    expected = Head(2).apply(variables, X)
    for module in (Head(2), Head(2).bind(variables)):
        for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            out = twin(X) if module.scope else twin.apply(variables, X)
            assert_trees_equal(out, expected)
    traced = []

    def run(module, variables):
        traced.append(module)
        return module.apply(variables, X)

    compiled = jax.jit(run, static_argnums=0)
    assert_trees_close(compiled(Head(2), variables), compiled(Head(2), variables))
    assert len(traced) == 1


def test_modes_and_loading_reach_the_children():
    """Rows 11 and 22, for a bound module: `eval()` reaches NNX children, `load_variables` is strict."""

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Dropout(0.5, rngs=rngs))(x)
            return Head(2)(x)

    variables = Net().init(0, X)
    model = Net().bind(variables, rngs=nnx.Rngs(0))
    dropped = model(X)
    model.eval()
    assert_trees_close(model(X), Head(2).apply({"params": variables["params"]["Head_0"]}, X))
    assert not jnp.array_equal(dropped, model(X))
    assert_trees_equal(bridge.variables_of(model), variables)
    assert bridge.load_variables(model, jax.tree.map(jnp.zeros_like, variables)).complete
    assert_trees_equal(model(X), jnp.zeros((6, 2)))


def test_stacks_are_bound_under_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: Head(2).init(key, X))(keys)
    models = nnx.vmap(Head(2).bind)(stacked)
    out = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, X)
    assert_trees_close(out, jax.vmap(lambda v: Head(2).apply(v, X))(stacked))


class Sower(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "h", x)
        return nn.Dense(3)(x)


class SowsTwice(bridge.Module):
    def setup(self):
        self.part = bridge.linen_in_bridge_mdl(Sower())

    def __call__(self, x):
        return self.part(self.part(x))


class LinenSowsTwice(nn.Module):
    def setup(self):
        self.part = Sower()

    def __call__(self, x):
        return self.part(self.part(x))


@pytest.mark.parametrize("mutable", [False, ["intermediates"], ["other"], True], ids=str)
def test_what_a_linen_child_sows_is_kept_where_it_may_be_row12(mutable):
    x = jnp.arange(6.0).reshape(2, 3)
    variables = LinenSowsTwice().init(jax.random.key(0), x)
    found = SowsTwice().apply(variables, x, mutable=mutable)
    assert_trees_equal(found, LinenSowsTwice().apply(variables, x, mutable=mutable))


def test_apply_inside_a_linen_module_is_not_that_modules_call():
    class Statistics(bridge.Module):
        def setup(self):
            self.norm = bridge.linen_in_bridge_mdl(nn.BatchNorm(use_running_average=False))

        def __call__(self, x):
            return self.norm(x)

    x = jnp.arange(6.0).reshape(2, 3)
    inner = Statistics().init(0, x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Statistics().apply(inner, x, mutable=["batch_stats"])

    found, wanted = Outer().apply({}, x), Statistics().apply(inner, x, mutable=["batch_stats"])
    assert_trees_equal(found, wanted)
    assert float(abs(found[1]["batch_stats"]["norm"]["mean"]).sum()) > 0
